"""Gaussian hypotheses given a training set, and the law of their test errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads
from scipy import integrate, stats

from jaxreg.kernels import hypothesis_space as space
from jaxreg.kernels.rbf import rbf_kernel
from tests.conformance import row, unchanged

pytestmark = pytest.mark.usefixtures("x64")


@pytest.fixture(scope="module")
def problem():
  with jax.enable_x64(True):
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape))
    inputs, tests, targets, test_targets = draw(8, 3), draw(5, 3), draw(8, 2), draw(5, 2)
    kernel = lambda a, b: rbf_kernel(a, b, gamma=0.5)
    grams = kernel(inputs, inputs), kernel(tests, inputs), kernel(tests, tests)
    posterior = space.hypothesis_posterior(*grams, targets)
    return {"grams": grams, "targets": targets, "posterior": posterior, "test_targets": test_targets}


def test_posterior_is_the_conditional_gaussian(problem):
  (gram, cross, test_gram), targets = problem["grams"], problem["targets"]
  # By the precision matrix of the joint Gaussian.
  precision = jnp.linalg.inv(jnp.block([[gram, cross.T], [cross, test_gram]]))
  count = gram.shape[0]
  covariance = jnp.linalg.inv(precision[count:, count:])
  np.testing.assert_allclose(problem["posterior"].covariance, covariance, atol=1e-9)
  np.testing.assert_allclose(
    problem["posterior"].mean, -covariance @ precision[count:, :count] @ targets, atol=1e-9
  )  # fmt: skip


def test_moments_of_the_errors(problem):
  law = space.error_law(problem["posterior"], problem["test_targets"])
  mean, variance = space.error_moments(law)
  count = 100_000
  errors = np.asarray(space.sample_hypothesis_errors(jax.random.key(0), law, samples=count))
  assert abs(errors.mean() - mean) < 3 * errors.std() / count**0.5
  squares = (errors - errors.mean()) ** 2
  assert abs(errors.var() - variance) < 3 * squares.std() / count**0.5
  (posterior, targets), size = (problem["posterior"], problem["test_targets"]), problem["test_targets"].size
  gap, covariance = posterior.mean - targets, posterior.covariance
  np.testing.assert_allclose(mean, (2 * jnp.trace(covariance) + jnp.sum(gap**2)) / size, rtol=1e-12)
  expected = (4 * jnp.trace(covariance @ covariance) + 4 * jnp.trace(gap.T @ covariance @ gap)) / size**2
  np.testing.assert_allclose(variance, expected, rtol=1e-12)
  # The symmetric root and the eigenbasis describe the same law.
  normals = jax.random.normal(jax.random.key(1), (*targets.shape, 20_000))
  other = np.asarray(space.hypothesis_errors(posterior, targets, normals))
  assert abs(other.mean() - mean) < 4 * other.std() / len(other) ** 0.5


@pytest.mark.parametrize("target", [1e-4, 0.1, 1.0, 3.0])
def test_one_test_input(target):
  """With one test input the error is an exact noncentral chi-square variable."""
  variance, bias = 0.7, 0.4
  law = space.ErrorLaw(jnp.array([variance]), jnp.array([[bias]]))
  cdf = jax.scipy.stats.norm.cdf
  expected = -jnp.log(cdf((target**0.5 - bias) / variance**0.5) - cdf((-(target**0.5) - bias) / variance**0.5))
  np.testing.assert_allclose(space.inverted_inductive_bias(law, target), expected, rtol=1e-9)


def test_saddlepoint_is_close_to_the_exact_bias():
  rng = np.random.default_rng(2)
  law = space.ErrorLaw(jnp.asarray(rng.uniform(0.3, 1.5, 6)), jnp.asarray(rng.normal(size=(6, 2))))
  mean, _ = space.error_moments(law)
  saddlepoint = jax.jit(space.saddlepoint_inductive_bias)
  exact = jax.jit(space.inverted_inductive_bias)
  for share in (1e-3, 0.05, 0.5, 1.0, 2.0):
    np.testing.assert_allclose(saddlepoint(law, share * mean), exact(law, share * mean), rtol=0.02)
  around = [saddlepoint(law, share * mean) for share in (0.99, 0.998, 1.0, 1.002, 1.01)]
  assert (np.diff(around) < 0).all()  # no jump where the formula is singular
  flat = law._replace(variances=law.variances.at[0].set(0), biases=law.biases.at[0].set(0))
  assert jnp.isfinite(saddlepoint(flat, 0.1 * mean))


def by_convolution(large, small, count, total):
  """`log P(large chi2_1 + small chi2_count <= total)`, an integral over the first variable."""
  density = lambda x: np.exp(stats.norm.logpdf(x) + stats.chi2.logcdf((total - large * x**2) / small, count) - peak)
  end = (total / large) ** 0.5
  peak = stats.chi2.logcdf(total / small, count)
  # The other variables decide in a thin layer at the end, which the quadrature must be told of.
  left = total - small * count * np.array([1e-3, 0.1, 0.5, 1.0, 2.0, 4.0, 10.0, 40.0])
  points = np.r_[0.0, np.sort(left[left > 0] ** 0.5), end]
  pieces = [integrate.quad(density, a, b, epsabs=0, epsrel=1e-12, limit=500)[0] for a, b in zip(points, points[1:])]
  return peak + np.log(2 * np.sum(pieces))


@pytest.mark.parametrize("ratio", [1.5, 1e2, 1e5, 1e8])
@pytest.mark.parametrize("count, share", [(3, 0.2), (3, 1.5), (20, 1e-6), (20, 0.05), (200, 0.9)])
def test_inversion_at_any_ratio_of_variances(ratio, count, share):
  """Ruben's series, which stood here before, gave 1,424 nats where 2.39 is right."""
  variances = np.r_[1.0, np.full(count, 1 / ratio)]
  law = space.ErrorLaw(jnp.asarray(variances), jnp.zeros((count + 1, 1)))
  total = share * variances.sum()
  expected = -by_convolution(1.0, 1 / ratio, count, total)
  function = lambda law, target: space.inverted_inductive_bias(law, target)
  target = total / (count + 1)
  np.testing.assert_allclose(jax.jit(function)(law, target), expected, rtol=1e-8)
  single = jax.tree.map(lambda x: x.astype(jnp.float32), law)
  np.testing.assert_allclose(function(single, jnp.float32(target)), expected, rtol=1e-4, atol=1e-4)
  of_logs = lambda logs, log: function(space.ErrorLaw(jnp.exp(logs), law.biases), jnp.exp(log))
  check_grads(of_logs, (jnp.log(law.variances), jnp.log(target)), order=1, modes=("rev",), eps=1e-5, rtol=1e-3)


def test_inversion_of_close_variances_with_biases_against_samples(problem):
  law = space.error_law(problem["posterior"], problem["test_targets"])
  errors = np.asarray(space.sample_hypothesis_errors(jax.random.key(2), law, samples=40_000))
  for quantile in (0.01, 0.3, 0.9):
    bias = space.inverted_inductive_bias(law, np.quantile(errors, quantile))
    np.testing.assert_allclose(np.exp(-bias), quantile, atol=4 * (quantile * (1 - quantile) / 4e4) ** 0.5)
  gradient = jax.grad(lambda law: space.inverted_inductive_bias(law, np.mean(errors)))(law)
  assert all(jnp.isfinite(leaf).all() for leaf in gradient)


def test_inversion_says_when_it_has_not_converged():
  law = space.ErrorLaw(jnp.array([1.0, 1e-6]), jnp.array([[1.0], [1.0]]))
  assert jnp.isnan(space.inverted_inductive_bias(law, 0.4, points=12))
  assert jnp.isfinite(space.inverted_inductive_bias(law, 0.4))
  assert space.inverted_inductive_bias(law, 1e3) == 0


def test_training_inputs_are_no_test():
  inputs = jnp.asarray(np.random.default_rng(1).normal(size=(6, 3)))
  gram, targets = rbf_kernel(inputs, inputs, gamma=0.5), jnp.ones((6, 1))
  posterior = space.hypothesis_posterior(gram, gram, gram, targets)
  np.testing.assert_allclose(posterior.covariance, 0, atol=1e-12)
  errors = space.sample_hypothesis_errors(jax.random.key(0), space.error_law(posterior, targets), samples=10)
  np.testing.assert_allclose(errors, 0, atol=1e-12)


def test_bad_input(problem):
  (gram, cross, test_gram), targets = problem["grams"], problem["targets"]
  law = space.error_law(problem["posterior"], problem["test_targets"])
  cases = (
    ("gram must have shape", lambda: space.hypothesis_posterior(gram[:3], cross, test_gram, targets)),
    ("targets must have shape", lambda: space.hypothesis_posterior(gram, cross, test_gram, targets[:3])),
    ("targets must be a matrix", lambda: space.hypothesis_posterior(gram, cross, test_gram, targets[:, 0])),
    ("jitter must", lambda: space.hypothesis_posterior(gram, cross, test_gram, targets, jitter=-1.0)),
    ("targets must be", lambda: space.error_law(problem["posterior"], targets)),
    ("normals must be", lambda: space.hypothesis_errors(problem["posterior"], problem["test_targets"], jnp.ones(3))),
    ("samples must", lambda: space.sample_hypothesis_errors(jax.random.key(0), law, samples=0)),
    ("target must", lambda: space.saddlepoint_inductive_bias(law, 0.0)),
    ("target must", lambda: space.inverted_inductive_bias(law, -1.0)),
    ("law must", lambda: space.inverted_inductive_bias(law._replace(variances=jnp.ones(2)), 1.0)),
  )
  for message, call in cases:
    with pytest.raises(ValueError, match=message):
      call()


def _law(variances, biases):
  """A law, which is float32 at least."""
  return space.ErrorLaw(*(leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32)) for leaf in (variances, biases)))


def _of_law(function, **options):
  """`function(law, target)` as a function of the target."""
  return row(
    function,
    lambda rng: (np.float64(rng.uniform(0.2, 0.6)), rng.uniform(0.5, 1.5, 4), rng.normal(size=(4, 1))),
    call=lambda target, variances, biases, **options: function(_law(variances, biases), target, **options),
    extreme=unchanged,
    wide=True,
    options=options,
  )


def _interpolation(rng):
  """Targets, and the Gram matrices of four examples and three tests."""
  factor = rng.normal(size=(7, 7))
  gram = factor @ factor.T + np.eye(7)
  return rng.normal(size=(4, 2)), gram[:4, :4], gram[4:, :4], gram[4:, 4:]


def _posterior(targets, gram, cross, tests, **options):
  return space.hypothesis_posterior(gram, cross, tests, targets, **options)


ROWS = [
  _of_law(space.inverted_inductive_bias),
  _of_law(space.saddlepoint_inductive_bias, iterations=60),
  row(
    space.error_moments,
    lambda rng: (rng.normal(size=(4, 1)), rng.uniform(0.5, 1.5, 4)),
    call=lambda biases, variances: list(space.error_moments(_law(variances, biases))),
    wide=True,
  ),
  row(space.hypothesis_posterior, _interpolation, call=_posterior, wide=True, options=dict(jitter=(0.0, 0.5))),
  row(
    space.error_law,
    lambda rng: (*_interpolation(rng), rng.normal(size=(3, 2))),
    call=lambda *arguments: sum(jnp.sum(leaf**2) for leaf in space.error_law(_posterior(*arguments[:4]), arguments[4])),
    wide=True,
  ),
  row(
    space.hypothesis_errors,
    lambda rng: (*_interpolation(rng), rng.normal(size=(3, 2)), rng.normal(size=(3, 2, 5))),
    call=lambda *arguments: space.hypothesis_errors(_posterior(*arguments[:4]), *arguments[4:]),
    wide=True,
  ),
]


EXEMPT = {
  "ErrorLaw": "result of error_law",
  "HypothesisPosterior": "result of hypothesis_posterior",
  "sample_hypothesis_errors": "draws; its tests compare the distributions",
}
