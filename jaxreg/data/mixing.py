"""Mixing of examples within a batch."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxreg.checks import check_float, check_hyperparameter

__all__ = ["mixup"]


def mixup(
  key: jax.Array,
  inputs: ArrayLike,
  targets: ArrayLike,
  *,
  alpha: ArrayLike = 1.0,
  at_least_half: bool = True,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
  """Mixup: `l x + (1 - l) x[permutation]` for inputs and targets, with one `l ~ Beta(alpha, alpha)` for the batch.

  Couples the examples of a batch; under `pmap` each device mixes its own (give each its own key).

  >>> import jax, jax.numpy as jnp
  >>> inputs, targets = jnp.arange(8.0).reshape(4, 2), jnp.eye(4)
  >>> mixed, soft, coefficient, permutation = mixup(jax.random.key(0), inputs, targets, alpha=1.0)
  >>> mixed.shape, soft.shape, bool(coefficient >= 0.5), sorted(permutation.tolist())
  ((4, 2), (4, 4), True, [0, 1, 2, 3])

  Args:
    key: threefry key.
    inputs: floating `[batch, ...]`.
    targets: floating `[batch, ...]`, for instance one-hot or soft labels.
    alpha: non-negative; 0 mixes nothing; may be traced.
    at_least_half: static; whether `l` becomes `max(l, 1 - l)`, so that each example keeps the larger share of itself.

  Returns:
    The mixed inputs and targets, of the given shapes and dtypes; the coefficient `l`, a scalar; the permutation,
    int32 `[batch]`: the partner of each example.

  Raises:
    ValueError: when an array is not floating, the batch sizes differ or `alpha` is negative.

  Reference: Zhang, Cisse, Dauphin, Lopez-Paz, "mixup: Beyond Empirical Risk Minimization", ICLR 2018; the larger share:
    Berthelot et al., "MixMatch", NeurIPS 2019, equation 9.
  """
  check_float("inputs", inputs)
  check_float("targets", targets)
  check_hyperparameter("alpha", alpha, low=0)
  if jnp.ndim(inputs) < 1 or jnp.ndim(targets) < 1 or inputs.shape[0] != targets.shape[0]:
    shapes = f"{jnp.shape(inputs)} and {jnp.shape(targets)}"
    raise ValueError(f"inputs and targets must share a leading batch axis, got shapes {shapes}.")
  inputs, targets = jnp.asarray(inputs), jnp.asarray(targets)
  draw, shuffle = jax.random.split(key)
  dtype = jnp.promote_types(jnp.promote_types(inputs.dtype, targets.dtype), jnp.float32)
  alpha = jnp.asarray(alpha, dtype)
  safe = jnp.where(alpha > 0, alpha, 1)
  coefficient = jnp.where(alpha > 0, jax.random.beta(draw, safe, safe, dtype=dtype), 1)
  if at_least_half:
    coefficient = jnp.maximum(coefficient, 1 - coefficient)
  permutation = jax.random.permutation(shuffle, inputs.shape[0]).astype(jnp.int32)
  return _mix(inputs, coefficient, permutation), _mix(targets, coefficient, permutation), coefficient, permutation


def _mix(array, coefficient, permutation):
  wide = array.astype(coefficient.dtype)
  return (coefficient * wide + (1 - coefficient) * wide[permutation]).astype(array.dtype)
