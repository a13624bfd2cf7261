"""Denoising score matching, as a loss of scores and, the same thing, as regression of clean data on noisy data."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxreg.checks import check_float, check_hyperparameter, check_same_shape

__all__ = ["denoising_score_matching_loss", "posterior_mean_squared_loss", "score_regression_weight"]


def posterior_mean_squared_loss(predictions: ArrayLike, clean: ArrayLike) -> jax.Array:
  """Squared error of a denoiser, `sum_d (f_d - x_0,d)^2`, whose minimiser is the posterior mean `E[x_0 | x_t]`.

  It equals `denoising_score_matching_loss` of the denoiser's score with weight `score_regression_weight`.

  >>> import jax.numpy as jnp
  >>> posterior_mean_squared_loss(jnp.array([[0.5, 0.0]]), jnp.array([[0.0, 1.0]])).tolist()
  [1.25]

  Args:
    predictions: f, of the clean data from noisy data and time, floating `[..., dimensions]`.
    clean: x_0, of the same shape.

  Returns:
    `[...]`, the loss of each example.

  Raises:
    ValueError: when shapes differ or an array is not floating point.

  Reference: Han, Razaviyayn, Xu, "Neural Network-Based Score Estimation in Diffusion Models: Optimization and
    Generalization", ICLR 2024, score matching as regression.
  """
  wide, dtype = _wide(predictions=predictions, clean=clean)
  return jnp.sum(jnp.square(wide[0] - wide[1]), -1).astype(dtype)


def denoising_score_matching_loss(
  scores: ArrayLike,
  noisy: ArrayLike,
  clean: ArrayLike,
  *,
  signal: ArrayLike,
  variance: ArrayLike,
  weight: ArrayLike = 1.0,
) -> jax.Array:
  """Denoising score matching, `weight |s + (x_t - alpha x_0) / h|^2`.

  >>> import jax.numpy as jnp
  >>> arrays = jnp.array([[0.0]]), jnp.array([[1.0]]), jnp.array([[1.0]])
  >>> denoising_score_matching_loss(*arrays, signal=0.5, variance=0.25).tolist()
  [4.0]

  Args:
    scores: s, of x_t, floating `[..., dimensions]`.
    noisy: x_t, of the same shape.
    clean: x_0, of the same shape.
    signal: alpha, scalar or `[...]`; may be traced.
    variance: h, positive, likewise.
    weight: of the time, likewise; not negative.

  Returns:
    `[...]`, the loss of each example.

  Raises:
    ValueError: when shapes differ, an array is not floating point or a hyperparameter is out of range.

  Reference: Han, Razaviyayn, Xu, ICLR 2024, the denoising score matching objective.
  """
  (scores, noisy, clean), dtype = _wide(scores=scores, noisy=noisy, clean=clean)
  check_hyperparameter("signal", signal, shape=scores.shape[:-1])
  check_hyperparameter("variance", variance, low=0, open_low=True, shape=scores.shape[:-1])
  check_hyperparameter("weight", weight, low=0, shape=scores.shape[:-1])
  signal, variance, weight = (jnp.asarray(x, scores.dtype) for x in (signal, variance, weight))
  residuals = scores + (noisy - signal[..., None] * clean) / variance[..., None]
  return (weight * jnp.sum(jnp.square(residuals), -1)).astype(dtype)


def score_regression_weight(signal: ArrayLike, variance: ArrayLike) -> jax.Array:
  """The weight `h^2 / alpha^2` at which denoising score matching is regression on clean data.

  >>> import jax.numpy as jnp
  >>> float(score_regression_weight(jnp.array(0.5), jnp.array(0.25)))
  0.25

  Args:
    signal: alpha, positive, floating `[...]`.
    variance: h, floating `[...]`.

  Returns:
    `[...]`.

  Raises:
    ValueError: when shapes differ or an array is not floating point.

  Reference: Han, Razaviyayn, Xu, ICLR 2024, the weight lambda(t).
  """
  (signal, variance), dtype = _wide(signal=signal, variance=variance)
  return jnp.square(variance / signal).astype(dtype)


def _wide(**arrays):
  for name, array in arrays.items():
    check_float(name, array)
  check_same_shape(**arrays)
  dtype = jnp.result_type(*arrays.values())
  return [jnp.asarray(x, jnp.promote_types(dtype, jnp.float32)) for x in arrays.values()], dtype
