"""Penalties that draw the distribution of each layer's weights to a kurtosis and to no skewness."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxreg.checks import check_hyperparameter
from jaxreg.metrics.weights import weight_moments

__all__ = ["kurtosis_penalty", "skewness_penalty", "weight_distribution_penalty"]


def kurtosis_penalty(weights, *, target: ArrayLike = 1.8) -> jax.Array:
  """The mean over tensors of `(kurtosis - target)^2`; 1.8 is the kurtosis of a uniform law.

  >>> import jax.numpy as jnp
  >>> float(kurtosis_penalty([jnp.linspace(-1, 1, 10_000)]).round(6))
  0.0

  Args:
    weights: pytree of floating arrays, the weights of all layers but the first.
    target: at least 1, the least kurtosis there is; may be traced.

  Returns:
    Scalar, float32 at least.

  Raises:
    ValueError: when there are no weights, they are not floating point or `target` is below 1.

  Reference: Xu, Han, Tian, Yang, Zhang, "EQ-Net: Elastic Quantization Neural Networks", ICCV 2023, equation 6; without
    the first layer as in the official code.
  """
  check_hyperparameter("target", target, low=1)
  return _mean(weights, lambda moments: (moments.kurtosis - target) ** 2)


def skewness_penalty(weights) -> jax.Array:
  """The mean over tensors of the squared skewness.

  >>> import jax.numpy as jnp
  >>> float(skewness_penalty([jnp.array([-2.0, 0.0, 2.0])]))
  0.0

  Args:
    weights: pytree of floating arrays, the weights of all layers but the first.

  Returns:
    Scalar, float32 at least.

  Raises:
    ValueError: when there are no weights or they are not floating point.

  Reference: Xu, Han, Tian, Yang, Zhang, "EQ-Net: Elastic Quantization Neural Networks", ICCV 2023, equation 6; without
    the first layer as in the official code.
  """
  return _mean(weights, lambda moments: moments.skewness**2)


def weight_distribution_penalty(
  weights,
  *,
  kurtosis_weight: ArrayLike = 0.015,
  skewness_weight: ArrayLike = 1.0,
  target: ArrayLike = 1.8,
) -> jax.Array:
  """`kurtosis_weight * kurtosis_penalty + skewness_weight * skewness_penalty`: weights that lie well on any grid.

  >>> import jax.numpy as jnp
  >>> float(weight_distribution_penalty([jnp.linspace(-1, 1, 10_000)]).round(6))
  0.0

  Args:
    weights: pytree of floating arrays, the weights of all quantized layers but the first.
    kurtosis_weight: non-negative; 0.015 in the official code, 1 in the paper; may be traced.
    skewness_weight: non-negative; may be traced.
    target: of the kurtosis, at least 1; may be traced.

  Returns:
    Scalar, float32 at least.

  Raises:
    ValueError: when there are no weights, they are not floating point, or a number is out of range.

  Reference: Xu, Han, Tian, Yang, Zhang, "EQ-Net: Elastic Quantization Neural Networks", ICCV 2023, equation 6.
  """
  check_hyperparameter("kurtosis_weight", kurtosis_weight, low=0)
  check_hyperparameter("skewness_weight", skewness_weight, low=0)
  check_hyperparameter("target", target, low=1)
  return _mean(
    weights, lambda moments: kurtosis_weight * (moments.kurtosis - target) ** 2 + skewness_weight * moments.skewness**2
  )


def _mean(weights, of_moments):
  leaves = jax.tree.leaves(weights)
  if not leaves:
    raise ValueError("weights must have at least one array, got none.")
  return jnp.mean(jnp.stack([of_moments(weight_moments(leaf)) for leaf in leaves]))
