"""Coordinates of the information plane of regression: how much a representation keeps of its inputs and says of the
targets."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxreg.checks import as_array, check_float, check_same_shape, example_mask

__all__ = ["compression_ratio", "gaussian_information"]


def compression_ratio(information: ArrayLike, uncompressed: ArrayLike) -> jax.Array:
  """How much of the information about the inputs is gone, `1 - I / I_0`: 0 without compression, 1 for all of it.

  >>> import jax.numpy as jnp
  >>> compression_ratio(jnp.array([1.0, 0.25]), jnp.array([1.0, 1.0])).tolist()
  [0.0, 0.75]

  Args:
    information: floating `[...]`, of representation and inputs, for example by `losses.cs_mutual_information`.
    uncompressed: floating `[...]`, the same of training without the compression term.

  Returns:
    `[...]`, float32 at least; 0 where there was none to begin with.

  Raises:
    ValueError: when shapes or dtypes do not fit.

  Reference: Yu, Yu, Løkse, Jenssen, Príncipe, "Cauchy-Schwarz Divergence Information Bottleneck for Regression", ICLR
    2024, information planes (inferred from the authors' slides).
  """
  check_float("information", information)
  check_float("uncompressed", uncompressed)
  check_same_shape(information=information, uncompressed=uncompressed)
  dtype = jnp.promote_types(jnp.result_type(information, uncompressed), jnp.float32)
  information, uncompressed = jnp.asarray(information, dtype), jnp.asarray(uncompressed, dtype)
  none = uncompressed == 0
  return jnp.where(none, 0 * information, 1 - information / jnp.where(none, 1, uncompressed))


def gaussian_information(predictions: ArrayLike, targets: ArrayLike, *, where: ArrayLike | None = None) -> jax.Array:
  """Bits that predictions say of their targets if all is Gaussian, `log2(variance of targets / squared error) / 2`.

  Of several outputs the sum over them. A lower bound of the mutual information of Gaussian targets, whatever the
  residuals are; negative for predictions worse than the mean.

  >>> import jax.numpy as jnp
  >>> gaussian_information(jnp.array([0.5, -0.5]), jnp.array([1.0, -1.0])).item()
  1.0

  Args:
    predictions: floating `[examples]` or `[examples, outputs]`.
    targets: floating, of the same shape.
    where: boolean `[examples]`: those that count.

  Returns:
    Scalar, float32 at least; infinite for exact predictions, 0 of nothing.

  Raises:
    ValueError: when shapes or dtypes do not fit.

  Reference: Yu, Yu, Løkse, Jenssen, Príncipe, "Cauchy-Schwarz Divergence Information Bottleneck for Regression", ICLR
    2024, information planes (as in the official code).
  """
  check_float("predictions", predictions)
  check_float("targets", targets)
  check_same_shape(predictions=predictions, targets=targets)
  predictions, targets = as_array("predictions", predictions), as_array("targets", targets)
  if predictions.ndim not in (1, 2):
    raise ValueError(f"predictions must be [examples] or [examples, outputs], got shape {predictions.shape}.")
  counted = example_mask(where, predictions.shape[:1])
  dtype = jnp.promote_types(jnp.result_type(predictions, targets), jnp.float32)
  column = lambda x: jnp.where(counted[:, None], x.astype(dtype).reshape(len(x), -1), 0)
  predictions, targets = column(predictions), column(targets)
  count = jnp.sum(counted).astype(dtype)
  some = count > 0
  mean = jnp.sum(targets, axis=0) / jnp.where(some, count, 1)
  variance = jnp.sum(jnp.where(counted[:, None], targets - mean, 0) ** 2, axis=0)
  error = jnp.sum((predictions - targets) ** 2, axis=0)
  return jnp.where(some, jnp.sum(jnp.log2(variance) - jnp.log2(error)) / 2, 0)
