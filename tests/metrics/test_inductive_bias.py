"""The required inductive bias: the fitted law of test errors and its lower tail."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from jaxreg.kernels import hypothesis_space
from jaxreg.kernels.rbf import rbf_kernel
from jaxreg.metrics import inductive_bias
from tests.conformance import EXTREME, row

pytestmark = pytest.mark.usefixtures("x64", "optimized")
fit = jax.jit(inductive_bias.fit_scaled_chi2, static_argnames="steps")
required = jax.jit(inductive_bias.required_inductive_bias, static_argnames="steps")
TARGETS = jnp.array([0.05, 0.5, 2.0, 4.0, 40.0])


@pytest.fixture(scope="module")
def errors():
  rng = np.random.default_rng(0)
  return rng.noncentral_chisquare(8.0, 12.0, size=600) * 0.05


def test_fit_recovers_a_law():
  rng = np.random.default_rng(1)
  draws = jnp.asarray(0.3 * rng.noncentral_chisquare(20.0, 10.0, size=3000))
  law = fit(draws, steps=20)
  np.testing.assert_allclose(law.scale * (law.df + law.nc), 0.3 * 30, rtol=0.05)
  # The variance fixes what the mean leaves open; df and nc by themselves remain uncertain.
  np.testing.assert_allclose(2 * law.scale**2 * (law.df + 2 * law.nc), draws.var(), rtol=0.05)
  truth = inductive_bias.ScaledChi2(jnp.array(20.0), jnp.array(10.0), jnp.array(0.3), 0.0)
  density = inductive_bias.noncentral_chi2_logpdf(draws / truth.scale, df=truth.df, nc=truth.nc) - jnp.log(truth.scale)
  assert law.log_likelihood >= density.mean()


def test_scaling_and_monotonicity(errors):
  values = required(errors, TARGETS)
  assert (values >= 0).all() and (jnp.diff(values) <= 0).all()
  assert values[-1] < 1e-6
  np.testing.assert_allclose(required(37.0 * errors, 37.0 * TARGETS), values, rtol=1e-6, atol=1e-9)


def test_slope_in_the_deep_tail_is_the_dimension(errors):
  law = fit(errors)
  bias = lambda log: inductive_bias.scaled_chi2_inductive_bias(jnp.exp(log), law)
  np.testing.assert_allclose(jax.grad(bias)(jnp.log(1e-7)), -law.df / 2, atol=1e-3)


def test_one_test_input_makes_the_law_exact():
  variance, bias, target = 0.7, 0.4, 0.01
  law = inductive_bias.ScaledChi2(jnp.array(1.0), jnp.array(bias**2 / variance), jnp.array(variance), 0.0)
  cdf = jax.scipy.stats.norm.cdf
  expected = -jnp.log(cdf((target**0.5 - bias) / variance**0.5) - cdf((-(target**0.5) - bias) / variance**0.5))
  np.testing.assert_allclose(inductive_bias.scaled_chi2_inductive_bias(target, law), expected, rtol=1e-9)


def test_equal_errors_are_a_point():
  np.testing.assert_array_equal(required(jnp.zeros(600), TARGETS), 0)
  np.testing.assert_array_equal(required(jnp.full(600, 1.0), TARGETS), [jnp.inf, jnp.inf, 0, 0, 0])


def test_encoded_bias(errors):
  easier = 0.3 * errors
  encoded = jax.jit(inductive_bias.encoded_inductive_bias)(errors, easier, TARGETS)
  np.testing.assert_allclose(encoded, required(errors, TARGETS) - required(easier, TARGETS), rtol=1e-9, atol=1e-12)
  assert encoded[1] > 1


def test_bootstrap_spreads_around_the_estimate(errors):
  draws = inductive_bias.bootstrap_inductive_bias(jax.random.key(0), errors, TARGETS[1], resamples=8, steps=15)
  estimate = required(errors, TARGETS)[1]  # compiled for the tests above
  assert draws.shape == (8,) and draws.min() < estimate < draws.max() and draws.std() < estimate


def test_networks_are_mapped_over_keys():
  sampled = inductive_bias.sample_network_errors(jax.random.key(3), jax.random.uniform, samples=4)
  np.testing.assert_array_equal(sampled, [jax.random.uniform(key) for key in jax.random.split(jax.random.key(3), 4)])


def test_bad_input(errors):
  law = inductive_bias.ScaledChi2(1.0, 1.0, 1.0, 0.0)
  cases = (
    ("errors must be floating", lambda: inductive_bias.fit_scaled_chi2(jnp.ones(3, int))),
    ("errors must be ", lambda: inductive_bias.required_inductive_bias(jnp.ones((2, 2)), 1.0)),
    ("target must", lambda: inductive_bias.required_inductive_bias(jnp.ones(2), 0.0)),
    ("target must", lambda: inductive_bias.scaled_chi2_inductive_bias(-1.0, law)),
    ("target must", lambda: inductive_bias.sankaran_inductive_bias(0.0, law)),
    ("resamples must", lambda: inductive_bias.bootstrap_inductive_bias(jax.random.key(0), errors, 1.0, resamples=0)),
    ("model_errors must", lambda: inductive_bias.encoded_inductive_bias(errors, jnp.ones(()), 1.0)),
    ("samples must", lambda: inductive_bias.sample_network_errors(jax.random.key(0), jax.random.uniform, samples=0)),
  )
  for message, call in cases:
    with pytest.raises(ValueError, match=message):
      call()


@pytest.mark.golden
def test_golden_27_inductive_bias(golden):
  checked, known = set(), {}
  for _, arrays, _ in golden("27-inductive_bias").cases():
    known |= arrays
    for key, check in CHECKS.items():
      if key in arrays:
        check({name: jnp.asarray(value) for name, value in known.items()})
        checked.add(key)
  assert checked


def laws(parameters):
  errors, df, nc, scale = parameters.T
  return errors, inductive_bias.ScaledChi2(df, nc, scale, 0.0)


def check_tail(g):
  errors, law = laws(g["params"])
  bias = inductive_bias.scaled_chi2_inductive_bias(errors, law)
  np.testing.assert_allclose(bias, g["out_bias_mpmath"], rtol=1e-9)
  np.testing.assert_allclose(bias, g["out_bias"], rtol=1e-9)
  np.testing.assert_allclose(
    inductive_bias.sankaran_inductive_bias(errors, law), g["out_bias_sankaran"], rtol=1e-9
  )  # fmt: skip


def check_fit(g):
  law = fit(g["errors"])
  assert law.log_likelihood >= g["out_fit_mean_loglik"] - 1e-4
  biases = inductive_bias.scaled_chi2_inductive_bias(g["targets"], law)
  np.testing.assert_allclose(biases, g["out_bias"], rtol=0.05)


def check_hypotheses(g):
  kernel = lambda a, b: rbf_kernel(a, b, gamma=0.5)  # bandwidth 1
  np.testing.assert_allclose(kernel(g["X"], g["X"]), g["out_K"], rtol=1e-9)
  posterior = hypothesis_space.hypothesis_posterior(
    kernel(g["X"], g["X"]), kernel(g["Xt"], g["X"]), kernel(g["Xt"], g["Xt"]), g["Y"]
  )
  np.testing.assert_allclose(posterior.mean, g["out_post_mean"], rtol=1e-9)
  np.testing.assert_allclose(posterior.covariance, g["out_post_cov"], rtol=1e-9, atol=1e-12)
  errors = hypothesis_space.hypothesis_errors(posterior, g["Yt"], g["normals"])
  np.testing.assert_allclose(errors, g["out_test_mse"], rtol=1e-7)
  law = hypothesis_space.error_law(posterior, g["Yt"])
  np.testing.assert_allclose(hypothesis_space.error_moments(law), [g["out_mse_mean"], g["out_mse_var"]], rtol=1e-9)
  exact = jax.jit(hypothesis_space.inverted_inductive_bias)
  for target, expected in zip(g["targets"], g["out_exact_bias"]):
    np.testing.assert_allclose(exact(law, target), expected, rtol=1e-8)


def check_slope(g):
  errors, law = laws(g["params"])
  count = g["out_dbias_dlogtarget"].shape[0]
  bias = lambda log: inductive_bias.scaled_chi2_inductive_bias(jnp.exp(log), law).sum()
  np.testing.assert_allclose(jax.grad(bias)(jnp.log(errors))[:count], g["out_dbias_dlogtarget"], rtol=1e-9)


CHECKS = {
  "out_bias_mpmath": check_tail,
  "errors": check_fit,
  "out_exact_bias": check_hypotheses,
  "out_dbias_dlogtarget": check_slope,
}


def test_bias_of_errors_that_hardly_differ():
  """Noncentralities of 1e8: the normal distribution, 1.28 nats before where 15.1 is right."""
  normal = stats.norm(loc=1, scale=1e-4)
  errors = normal.ppf((np.arange(2000) + 0.5) / 2000)
  targets = np.array([0.9995, 0.9999, 1.0, 1.0005])
  np.testing.assert_allclose(required(jnp.asarray(errors), targets), -normal.logcdf(targets), rtol=0.02, atol=1e-6)
  single = required(jnp.asarray(errors, jnp.float32), targets)
  np.testing.assert_allclose(single, -normal.logcdf(targets), rtol=0.03, atol=1e-5)


ROWS = [
  *(
    row(
      function,
      lambda rng: (0.1 + rng.gamma(2.0, size=5),),
      call=lambda target, function=function, **law: function(
        target, inductive_bias.ScaledChi2(law["df"], law["nc"], law["scale"], 0.0)
      ),
      extreme=lambda target: (EXTREME ** np.linspace(-1, 1, 5),),
      wide=True,
      options=dict(df=(3.0, 9.0), nc=(0.5, 5.0), scale=(0.5, 2.0)),
    )
    for function in (inductive_bias.scaled_chi2_inductive_bias, inductive_bias.sankaran_inductive_bias)
  ),
]


EXEMPT = {
  "ScaledChi2": "result of fit_scaled_chi2",
  "bootstrap_inductive_bias": "fits",
  "encoded_inductive_bias": "fits",
  "fit_scaled_chi2": "an iterative fit with a flat optimum: mapping moves it more than rounding",
  "required_inductive_bias": "fits",
  "sample_network_errors": "maps a function of the caller",
}
