"""MaxMin: an activation that keeps norms, for networks whose Lipschitz constant is bounded."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxreg.checks import check_float

__all__ = ["max_min"]


def max_min(inputs: ArrayLike, *, axis: int = -1) -> jax.Array:
  """Sorts each pair of neighbouring features: the larger first, then the smaller.

  As a permutation it keeps the norm, and so does its gradient, unlike ReLU; it is 1-Lipschitz in l2 and in l-infinity.

  >>> import jax.numpy as jnp
  >>> max_min(jnp.array([1.0, 2.0, 4.0, -3.0])).tolist()
  [2.0, 1.0, 4.0, -3.0]

  Args:
    inputs: floating, with an even number of features along `axis`.
    axis: the axis of the features.

  Returns:
    An array like `inputs`.

  Raises:
    ValueError: when the inputs are not floating point or their number along `axis` is odd.

  Reference: Anil, Lucas, Grosse, "Sorting out Lipschitz Function Approximation", ICML 2019, GroupSort with groups of
    two.
  """
  check_float("inputs", inputs)
  if not -jnp.ndim(inputs) <= axis < jnp.ndim(inputs):
    raise ValueError(f"axis must be an axis of inputs with shape {jnp.shape(inputs)}, got {axis}.")
  if jnp.shape(inputs)[axis] % 2:
    raise ValueError(f"inputs must have an even number of features, got {jnp.shape(inputs)[axis]}.")
  moved = jnp.moveaxis(inputs, axis, -1)
  first, second = moved[..., ::2], moved[..., 1::2]
  ordered = first >= second  # one comparison: each gradient goes to one of the two, also in a tie
  pairs = jnp.stack([jnp.where(ordered, first, second), jnp.where(ordered, second, first)], axis=-1)
  return jnp.moveaxis(pairs.reshape(moved.shape), -1, axis)
