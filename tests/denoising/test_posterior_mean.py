"""Posterior means and scores of mixtures and samples, Tweedie's formula, the noise schedule."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.scipy.special import logsumexp

from jaxreg.denoising import posterior_mean as closed
from jaxreg.losses.score_matching import (
  denoising_score_matching_loss,
  posterior_mean_squared_loss,
  score_regression_weight,
)
from tests.conformance import CLASSES, EXAMPLES, draw_logits, row

MIXTURE = dict(
  means=np.array([[0.8, 0.8], [-0.8, 0.5], [0.1, -0.7]]),
  variances=np.array([0.05, 0.0, 0.2]),
  weights=np.array([0.5, 0.2, 0.3]),
)
X = np.random.default_rng(0).normal(size=(7, 2))
TIMES = np.linspace(0.05, 1.0, 7)


def schedule(times=TIMES):
  return closed.linear_vp_schedule(jnp.asarray(times), start_rate=0.1, end_rate=8.0)


def log_density(x, signal, variance):
  """Of noisy data, up to a constant."""
  totals = signal**2 * MIXTURE["variances"] + variance
  squares = jnp.sum((x - signal * MIXTURE["means"]) ** 2, -1)
  return logsumexp(-squares / (2 * totals) - x.size / 2 * jnp.log(totals), b=MIXTURE["weights"])


@pytest.mark.golden
def test_golden_29_score_ntk_schedule_mixture_and_losses(golden, x64):
  names = []
  for name, arrays, _ in golden("29-score_ntk").cases():
    if "beta" not in arrays:
      continue
    names.append(name)
    close = lambda got, want, name=name: np.testing.assert_allclose(got, want, rtol=1e-9, err_msg=name)
    a = {key: jnp.asarray(value) for key, value in arrays.items()}
    signal, variance = closed.linear_vp_schedule(a["t"], start_rate=a["beta"][0], end_rate=a["beta"][1])
    close(signal, a["out_alpha"])
    close(variance, a["out_h"])
    noise = dict(signal=signal, variance=variance)
    mixture = dict(means=a["means"], variances=a["vars"], weights=a["weights"])
    close(closed.gaussian_mixture_posterior_mean(a["x"], **noise, **mixture), a["out_posterior_mean"])
    close(closed.gaussian_mixture_score(a["x"], **noise, **mixture), a["out_score"])
    scores = closed.score_from_posterior_mean(a["f"], a["x"], **noise)
    close(denoising_score_matching_loss(scores, a["x"], a["x0"], **noise), a["out_dsm_unweighted"])
    close(posterior_mean_squared_loss(a["f"], a["x0"]), a["out_regression_loss"])
    weighted = denoising_score_matching_loss(
      scores, a["x"], a["x0"], **noise, weight=score_regression_weight(signal, variance)
    )
    close(weighted, a["out_regression_loss"])
  assert names


def test_scores_are_gradients_of_the_log_density(x64):
  signal, variance = schedule()
  expected = jax.vmap(jax.grad(log_density))(X, signal, variance)
  score = closed.gaussian_mixture_score(X, signal=signal, variance=variance, **MIXTURE)
  np.testing.assert_allclose(score, expected, rtol=1e-9)
  mean = closed.gaussian_mixture_posterior_mean(X, signal=signal, variance=variance, **MIXTURE)
  tweedie = closed.score_from_posterior_mean(mean, X, signal=signal, variance=variance)
  np.testing.assert_allclose(tweedie, expected, rtol=1e-9)
  np.testing.assert_allclose(
    closed.posterior_mean_from_score(score, X, signal=signal, variance=variance), mean, atol=1e-12
  )


def test_posterior_covariance_is_the_jacobian(x64):
  """Against the covariance of the mixture's components, worked out by hand."""
  for x, signal, variance in zip(X, *schedule()):
    call = functools.partial(closed.gaussian_mixture_posterior_mean, signal=signal, variance=variance, **MIXTURE)
    covariance = variance / signal * jax.jacfwd(call)(jnp.asarray(x))
    v, mu = MIXTURE["variances"], MIXTURE["means"]
    totals = signal**2 * v + variance
    log_shares = (
      np.log(MIXTURE["weights"]) - jnp.sum((x - signal * mu) ** 2, -1) / (2 * totals) - jnp.log(totals)
    )  # fmt: skip
    shares = jax.nn.softmax(log_shares)
    means = mu + (signal * v / totals)[:, None] * (x - signal * mu)
    deviations = means - shares @ means
    expected = (shares * v * variance / totals).sum() * jnp.eye(2) + jnp.einsum(
      "k,ki,kj->ij", shares, deviations, deviations
    )
    np.testing.assert_allclose(covariance, expected, atol=1e-8)
    np.testing.assert_allclose(covariance, covariance.T, atol=1e-12)
    assert np.linalg.eigvalsh(covariance).min() > -1e-12


def test_a_sample_is_a_mixture_of_points(x64):
  signal, variance = schedule()
  examples = jnp.asarray(MIXTURE["means"])
  mean = closed.empirical_posterior_mean(X, examples, signal=signal, variance=variance)
  weights = jax.nn.softmax(-jnp.sum((X[:, None] - signal[:, None, None] * examples) ** 2, -1) / (2 * variance[:, None]))
  np.testing.assert_allclose(mean, weights @ examples, rtol=1e-12)


def test_small_times_keep_their_digits(x64):
  time = 1e-8
  total = 0.1 * time + 7.9 * time**2 / 2
  exact = total - total**2 / 2 + total**3 / 6
  assert abs(float(schedule(np.array(time)).variance) / exact - 1) < 1e-12
  signal, variance = schedule(np.geomspace(1e-8, 5, 50))
  np.testing.assert_allclose(signal**2 + variance, 1, atol=1e-15)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_finite_far_away(dtype):
  x = jnp.array([[1e4, -1e4], [0.0, 0.0], [-1e4, 1.0]], dtype)
  signal, variance = closed.linear_vp_schedule(jnp.array([0.01, 0.5, 1.0], dtype), start_rate=0.1, end_rate=8.0)
  for function in (closed.gaussian_mixture_posterior_mean, closed.gaussian_mixture_score):
    call = lambda x, function=function: function(x, signal=signal, variance=variance, **MIXTURE)
    both = jax.jit(lambda x, call=call: (call(x), jax.grad(lambda x: call(x).astype(jnp.float32).sum())(x)))
    value, gradient = both(x)
    assert value.dtype == dtype and jnp.isfinite(value).all() and jnp.isfinite(gradient).all()


def test_bad_input():
  noise = dict(signal=0.5, variance=0.5)
  with pytest.raises(ValueError, match="means must be"):
    closed.gaussian_mixture_score(X, **noise, **{**MIXTURE, "weights": np.ones(2)})
  with pytest.raises(ValueError, match="variance must lie in"):
    closed.gaussian_mixture_posterior_mean(X, signal=0.5, variance=0.0, **MIXTURE)
  with pytest.raises(ValueError, match="examples must be"):
    closed.empirical_posterior_mean(X, jnp.ones((4, 3)), **noise)
  with pytest.raises(ValueError, match="equal shapes"):
    closed.score_from_posterior_mean(X, X[:1], **noise)
  with pytest.raises(ValueError, match="signal must lie in"):
    closed.posterior_mean_from_score(X, X, signal=0.0, variance=0.5)
  with pytest.raises(ValueError, match="start_rate"):
    closed.linear_vp_schedule(TIMES, start_rate=-1.0, end_rate=1.0)
  with pytest.raises(ValueError, match="times must be floating"):
    closed.linear_vp_schedule(np.arange(3), start_rate=0.1, end_rate=1.0)


def _mixture(rng):
  return rng.normal(size=(3, CLASSES)), rng.uniform(0.1, 1, 3), rng.dirichlet(np.ones(3))


def _of_mixture(function):
  """`function(noisy, …)` of a Gaussian mixture."""
  return row(
    function,
    lambda rng: (draw_logits(rng), *_mixture(rng)),
    call=lambda noisy, means, variances, weights, **schedule: function(
      noisy, means=means, variances=variances, weights=weights, **schedule
    ),
    bad=(("noisy", lambda noisy, *rest: (noisy.astype(np.int32), *rest)),),
    options=dict(signal=(0.2, 0.9), variance=(0.2, 0.9)),
  )


def _converts(function, named):
  """`function(values, noisy, signal, variance)`."""
  bad = (("shapes", lambda x, y: (x, y[1:])), (named, lambda x, y: (x.astype(np.int32), y)))
  draw = lambda rng: (draw_logits(rng), draw_logits(rng))
  return row(function, draw, bad=bad, examples="any", options=dict(signal=(0.2, 0.9), variance=(0.2, 0.9)))


ROWS = [
  row(
    closed.empirical_posterior_mean,
    lambda rng: (draw_logits(rng), rng.normal(size=(3, CLASSES))),
    bad=(("noisy", lambda noisy, examples: (noisy.astype(np.int32), examples)),),
    options=dict(signal=(0.2, 0.9), variance=(0.2, 0.9)),
  ),
  _of_mixture(closed.gaussian_mixture_posterior_mean),
  _of_mixture(closed.gaussian_mixture_score),
  row(
    closed.linear_vp_schedule,
    lambda rng: (rng.uniform(0, 1, EXAMPLES),),
    extreme=lambda times: (np.resize([0.0, 1e4], times.shape),),
    bad=(("times", lambda times: (times.astype(np.int32),)),),
    options=dict(start_rate=(0.0, 1.0), end_rate=(1.0, 8.0)),
  ),
  _converts(closed.posterior_mean_from_score, "score"),
  _converts(closed.score_from_posterior_mean, "posterior_mean"),
]


EXEMPT = {
  "NoiseSchedule": "result of linear_vp_schedule",
}
