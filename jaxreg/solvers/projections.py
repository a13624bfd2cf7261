"""Projections onto sets with at most k non-zero entries."""

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from jaxreg.checks import check_float, check_hyperparameter, shape_without
from jaxreg.metrics.sizes import static_integer

__all__ = ["sparse_simplex_projection"]


def sparse_simplex_projection(values: ArrayLike, *, k: int, scale: ArrayLike = 1.0, axis: int = -1) -> jax.Array:
  """The nearest point of a simplex with at most `k` non-zero entries, `argmin |p - values|^2`, `p >= 0, sum p = scale`.

  The `k` largest entries are projected onto the simplex, the others are zero; of equal entries the first are taken.
  Where the `k`-th and the next entry differ, the derivative is that of the projection on the support; the choice of the
  support has none.

  >>> import jax.numpy as jnp
  >>> sparse_simplex_projection(jnp.array([0.5, 0.25, 0.0, -1.0]), k=2).tolist()
  [0.625, 0.375, 0.0, 0.0]

  Args:
    values: floating `[..., size]`.
    k: static, in [1, size].
    scale: positive, the sum of the result; a scalar or an array that broadcasts against `values` without `axis`; may be
      traced.
    axis: the axis of the simplex.

  Returns:
    `[..., size]`.

  Raises:
    ValueError: when `values` are not floating point, `k` is no integer in [1, size] or `scale` is not positive.

  Reference: Kyrillidis, Becker, Cevher, Koch, "Sparse Projections onto the Simplex", ICML 2013, the greedy selector and
    simplex projector (Section 3).
  """
  check_float("values", values)
  k = check_support_size(k, values, axis)
  check_hyperparameter("scale", scale, low=0, open_low=True, shape=shape_without(values, axis))
  dtype = jnp.promote_types(values.dtype, jnp.float32)
  wide = jnp.moveaxis(values, axis, -1).astype(dtype)
  top, places = jax.lax.top_k(wide, k)
  # A shift of all values changes nothing; without it, large values would drown the differences in rounding. Not by
  # `top[..., :1]`: for a slice of it XLA turns the selection into a sort of everything, 25 times as slow on a CPU.
  top = top - jax.lax.stop_gradient(jnp.max(top, axis=-1, keepdims=True))
  kept = jnp.vectorize(optax.projections.projection_simplex, signature="(k),()->(k)")(top, jnp.asarray(scale, dtype))
  result = jnp.put_along_axis(jnp.zeros(kept.shape[:-1] + wide.shape[-1:], dtype), places, kept, -1, inplace=False)
  return jnp.moveaxis(result, -1, axis).astype(values.dtype)


def check_support_size(k, values, axis: int) -> int:
  """`k` as a Python int; raises ValueError unless it is a static one that the length of an axis of `values` allows."""
  shape = jnp.shape(values)
  if not -len(shape) <= axis < len(shape):
    raise ValueError(f"axis must be an axis of an array with shape {shape}, got {axis}.")
  return static_integer("k", k, low=1, high=shape[axis])
