"""Denoising in closed form: the noise of a diffusion model, posterior means of clean data, and their scores.

A diffusion process turns data x_0 into `x_t = signal x_0 + sqrt(variance) noise`. Its score at time t and the mean of
x_0 given x_t say the same (Tweedie's formula), and a model of either is a model of the other:

>>> import jax.numpy as jnp
>>> signal, variance = linear_vp_schedule(0.5, start_rate=0.1, end_rate=8.0)
>>> mean = empirical_posterior_mean(jnp.array([0.3, -0.2]), jnp.eye(2), signal=signal, variance=variance)
>>> score = score_from_posterior_mean(mean, jnp.array([0.3, -0.2]), signal=signal, variance=variance)
>>> score.shape
(2,)
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxreg.checks import check_float, check_hyperparameter, check_same_shape

__all__ = [
  "NoiseSchedule",
  "empirical_posterior_mean",
  "gaussian_mixture_posterior_mean",
  "gaussian_mixture_score",
  "linear_vp_schedule",
  "posterior_mean_from_score",
  "score_from_posterior_mean",
]


class NoiseSchedule(NamedTuple):
  """What noise has made of the data: `x_t = signal x_0 + sqrt(variance) noise`.

  Attributes:
    signal: alpha, `[...]`, in (0, 1].
    variance: h, `[...]`, in [0, 1).
  """

  signal: jax.Array
  variance: jax.Array


def linear_vp_schedule(times: ArrayLike, *, start_rate: ArrayLike, end_rate: ArrayLike) -> NoiseSchedule:
  """The variance-preserving process with rate g linear in time: `alpha = exp(-G / 2)`, `h = 1 - alpha^2`, `G = int g`.

  `dX = -g(t) X / 2 dt + sqrt(g(t)) dB` with `g = start_rate + (end_rate - start_rate) t`. The variance keeps its digits
  at small times.

  >>> import jax.numpy as jnp
  >>> signal, variance = linear_vp_schedule(jnp.array([0.0, 1.0]), start_rate=0.1, end_rate=8.0)
  >>> [round(value, 4) for value in (*signal.tolist(), *variance.tolist())]
  [1.0, 0.132, 0.0, 0.9826]

  Args:
    times: non-negative, floating `[...]`.
    start_rate: g(0), not negative; may be traced.
    end_rate: g(1), not negative; may be traced.

  Returns:
    The schedule at these times.

  Raises:
    ValueError: when `times` are not floating point or a rate is negative.

  Reference: Han, Razaviyayn, Xu, "Neural Network-Based Score Estimation in Diffusion Models: Optimization and
    Generalization", ICLR 2024, the forward process.
  """
  check_float("times", times)
  check_hyperparameter("start_rate", start_rate, low=0)
  check_hyperparameter("end_rate", end_rate, low=0)
  dtype = jnp.result_type(times)
  times, start, end = (
    jnp.asarray(x, jnp.promote_types(dtype, jnp.float32)) for x in (times, start_rate, end_rate)
  )  # fmt: skip
  total = start * times + (end - start) * jnp.square(times) / 2
  return NoiseSchedule(jnp.exp(-total / 2).astype(dtype), -jnp.expm1(-total).astype(dtype))


def gaussian_mixture_posterior_mean(
  noisy: ArrayLike,
  *,
  signal: ArrayLike,
  variance: ArrayLike,
  means: ArrayLike,
  variances: ArrayLike,
  weights: ArrayLike,
) -> jax.Array:
  """`E[x_0 | x_t]` when x_0 is a mixture of isotropic Gaussians: `sum_k r_k (mu_k + alpha v_k / V_k (x - alpha mu_k))`.

  Here `V_k = alpha^2 v_k + h`, and r_k are the components' posterior probabilities.

  >>> import jax.numpy as jnp
  >>> mixture = dict(means=jnp.zeros((1, 2)), variances=jnp.ones(1), weights=jnp.ones(1))
  >>> gaussian_mixture_posterior_mean(jnp.ones(2), signal=1.0, variance=1.0, **mixture).tolist()
  [0.5, 0.5]

  Args:
    noisy: x_t, floating `[..., dimensions]`.
    signal: alpha, broadcasting against `noisy` without its last axis; may be traced.
    variance: h, positive, likewise.
    means: mu, floating `[components, dimensions]`.
    variances: v, not negative, floating `[components]`; 0 is a point.
    weights: positive, floating `[components]`; they need not add up to 1.

  Returns:
    `[..., dimensions]`.

  Raises:
    ValueError: when shapes do not fit or a hyperparameter is out of range.

  Reference: Han, Razaviyayn, Xu, ICLR 2024, the posterior mean f* (for mixtures: derived anew).
  """
  noisy, gaps, shares, signal, totals, means, variances, dtype = _mixture(
    noisy, signal, variance, means, variances, weights
  )
  each = means + (signal[..., None] * variances / totals)[..., None] * gaps
  return jnp.sum(shares[..., None] * each, -2).astype(dtype)


def gaussian_mixture_score(
  noisy: ArrayLike,
  *,
  signal: ArrayLike,
  variance: ArrayLike,
  means: ArrayLike,
  variances: ArrayLike,
  weights: ArrayLike,
) -> jax.Array:
  """The score of x_t when x_0 is a mixture of isotropic Gaussians: `sum_k r_k (alpha mu_k - x) / (alpha^2 v_k + h)`.

  >>> import jax.numpy as jnp
  >>> mixture = dict(means=jnp.zeros((1, 2)), variances=jnp.ones(1), weights=jnp.ones(1))
  >>> gaussian_mixture_score(jnp.ones(2), signal=1.0, variance=1.0, **mixture).tolist()
  [-0.5, -0.5]

  Args:
    noisy: x_t, floating `[..., dimensions]`.
    signal: alpha, broadcasting against `noisy` without its last axis; may be traced.
    variance: h, positive, likewise.
    means: mu, floating `[components, dimensions]`.
    variances: v, not negative, floating `[components]`; 0 is a point.
    weights: positive, floating `[components]`; they need not add up to 1.

  Returns:
    `[..., dimensions]`.

  Raises:
    ValueError: when shapes do not fit or a hyperparameter is out of range.

  Reference: Han, Razaviyayn, Xu, ICLR 2024, the score (for mixtures: derived anew).
  """
  _, gaps, shares, _, totals, _, _, dtype = _mixture(noisy, signal, variance, means, variances, weights)
  return -jnp.sum((shares / totals)[..., None] * gaps, -2).astype(dtype)


def _mixture(noisy, signal, variance, means, variances, weights):
  """All arguments wide, with the gaps `x - alpha mu_k`, posterior probabilities and variances of the components."""
  check_float("noisy", noisy)
  check_hyperparameter("signal", signal, shape=jnp.shape(noisy)[:-1])
  check_hyperparameter("variance", variance, low=0, open_low=True, shape=jnp.shape(noisy)[:-1])
  shapes = jnp.shape(means), jnp.shape(variances), jnp.shape(weights)
  if len(shapes[0]) != 2 or shapes[0][1:] != jnp.shape(noisy)[-1:] or set(shapes[1:]) != {shapes[0][:1]}:
    raise ValueError(
      "means must be [components, dimensions] with the last axis of noisy, variances and weights [components], got"
      f" shapes {shapes[0]}, {shapes[1]}, {shapes[2]} and noisy {jnp.shape(noisy)}."
    )
  dtype = jnp.result_type(noisy)
  wide = jnp.promote_types(dtype, jnp.float32)
  noisy, signal, variance, means, variances, weights = (
    jnp.asarray(x, wide) for x in (noisy, signal, variance, means, variances, weights)
  )
  gaps = noisy[..., None, :] - signal[..., None, None] * means
  totals = jnp.square(signal)[..., None] * variances + variance[..., None]
  logits = jnp.log(weights) - jnp.sum(jnp.square(gaps), -1) / (2 * totals) - noisy.shape[-1] / 2 * jnp.log(totals)
  return noisy, gaps, jax.nn.softmax(logits), signal, totals, means, variances, dtype


def empirical_posterior_mean(
  noisy: ArrayLike, examples: ArrayLike, *, signal: ArrayLike, variance: ArrayLike
) -> jax.Array:
  """`E[x_0 | x_t]` when x_0 is one of the examples: their average with weights `softmax(-|x - alpha x_i|^2 / (2 h))`.

  >>> import jax.numpy as jnp
  >>> empirical_posterior_mean(jnp.zeros(1), jnp.array([[1.0], [-1.0]]), signal=0.5, variance=0.1).tolist()
  [0.0]

  Args:
    noisy: x_t, floating `[..., dimensions]`.
    examples: floating `[examples, dimensions]`.
    signal: alpha, broadcasting against `noisy` without its last axis; may be traced.
    variance: h, positive, likewise.

  Returns:
    `[..., dimensions]`.

  Raises:
    ValueError: when shapes do not fit or a hyperparameter is out of range.

  Reference: Han, Razaviyayn, Xu, ICLR 2024, the posterior mean f* (of a sample: derived anew).
  """
  check_float("examples", examples)
  if jnp.ndim(examples) != 2 or jnp.shape(examples)[1:] != jnp.shape(noisy)[-1:]:
    raise ValueError(
      f"examples must be [examples, dimensions] with the last axis of noisy, got shape {jnp.shape(examples)}"
      f" and noisy {jnp.shape(noisy)}."
    )
  ones = jnp.ones(jnp.shape(examples)[0], jnp.promote_types(jnp.result_type(examples), jnp.float32))
  mixture = dict(means=examples, variances=0 * ones, weights=ones)
  return gaussian_mixture_posterior_mean(noisy, signal=signal, variance=variance, **mixture)


def score_from_posterior_mean(
  posterior_mean: ArrayLike, noisy: ArrayLike, *, signal: ArrayLike, variance: ArrayLike
) -> jax.Array:
  """Tweedie's formula: the score `(alpha E[x_0 | x_t] - x_t) / h`. It divides errors of the mean by `h / alpha`.

  >>> import jax.numpy as jnp
  >>> score_from_posterior_mean(jnp.array([2.0]), jnp.array([0.0]), signal=0.5, variance=0.25).tolist()
  [4.0]

  Args:
    posterior_mean: floating `[..., dimensions]`.
    noisy: x_t, of the same shape.
    signal: alpha, broadcasting against `noisy` without its last axis; may be traced.
    variance: h, positive, likewise.

  Returns:
    `[..., dimensions]`.

  Raises:
    ValueError: when shapes differ or a hyperparameter is out of range.

  Reference: Han, Razaviyayn, Xu, ICLR 2024, the parametric form of the score.
  """
  check_hyperparameter("signal", signal, shape=jnp.shape(noisy)[:-1])
  check_hyperparameter("variance", variance, low=0, open_low=True, shape=jnp.shape(noisy)[:-1])
  wide, signal, variance, dtype = _pair(signal, variance, posterior_mean=posterior_mean, noisy=noisy)
  return ((signal * wide[0] - wide[1]) / variance).astype(dtype)


def posterior_mean_from_score(
  score: ArrayLike, noisy: ArrayLike, *, signal: ArrayLike, variance: ArrayLike
) -> jax.Array:
  """Tweedie's formula for the mean: `E[x_0 | x_t] = (x_t + h score) / alpha`.

  >>> import jax.numpy as jnp
  >>> posterior_mean_from_score(jnp.array([4.0]), jnp.array([0.0]), signal=0.5, variance=0.25).tolist()
  [2.0]

  Args:
    score: floating `[..., dimensions]`.
    noisy: x_t, of the same shape.
    signal: alpha, positive, broadcasting against `noisy` without its last axis; may be traced.
    variance: h, not negative, likewise.

  Returns:
    `[..., dimensions]`.

  Raises:
    ValueError: when shapes differ or a hyperparameter is out of range.

  Reference: Han, Razaviyayn, Xu, ICLR 2024, the parametric form of the score.
  """
  check_hyperparameter("signal", signal, low=0, open_low=True, shape=jnp.shape(noisy)[:-1])
  check_hyperparameter("variance", variance, low=0, shape=jnp.shape(noisy)[:-1])
  wide, signal, variance, dtype = _pair(signal, variance, score=score, noisy=noisy)
  return ((wide[1] + variance * wide[0]) / signal).astype(dtype)


def _pair(signal, variance, **arrays):
  for name, array in arrays.items():
    check_float(name, array)
  check_same_shape(**arrays)
  dtype = jnp.result_type(*arrays.values())
  wide = jnp.promote_types(dtype, jnp.float32)
  signal, variance = (jnp.asarray(x, wide)[..., None] for x in (signal, variance))
  return [jnp.asarray(x, wide) for x in arrays.values()], signal, variance, dtype
