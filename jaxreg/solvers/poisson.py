"""The discrete Poisson operator on grids with obstacles."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxreg.checks import check_float

__all__ = ["poisson_matvec"]


def poisson_matvec(values: ArrayLike, *, mask: ArrayLike | None = None) -> jax.Array:
  """`2 dims u - sum of the neighbours' u`, the negative Laplacian with Dirichlet boundary, times the spacing squared.

  Cells outside the grid and those that `mask` removes have the value 0. The operator is symmetric and, on the cells
  that remain, positive definite.

  >>> import jax.numpy as jnp
  >>> poisson_matvec(jnp.ones((3, 3))).tolist()
  [[2.0, 1.0, 2.0], [1.0, 0.0, 1.0], [2.0, 1.0, 2.0]]

  Args:
    values: u, floating, with one axis per dimension of the grid; map over it for several.
    mask: boolean, like `values`; True where there is a cell.

  Returns:
    Like `values`; 0 at removed cells.

  Raises:
    ValueError: when `values` are not floating point or a scalar, or the mask's shape differs.

  Reference: none.
  """
  check_float("values", values)
  if not jnp.ndim(values):
    raise ValueError("values must have an axis per dimension of the grid, got a scalar.")
  if mask is not None and jnp.shape(mask) != jnp.shape(values):
    raise ValueError(f"mask must have the shape of values, {jnp.shape(values)}, got {jnp.shape(mask)}.")
  inside = values if mask is None else jnp.where(mask, values, 0)
  result = 2 * inside.ndim * inside
  padded = jnp.pad(inside, 1)
  middle = (slice(1, -1),) * inside.ndim
  for axis in range(inside.ndim):
    for shift in (slice(None, -2), slice(2, None)):
      result = result - padded[middle[:axis] + (shift,) + middle[axis + 1 :]]
  return result if mask is None else jnp.where(mask, result, 0)
