"""The residual of a linear system after the best step along a predicted direction."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxreg.checks import check_float, check_same_shape

__all__ = ["scaled_residual_loss"]


def scaled_residual_loss(predictions: ArrayLike, right_hand_sides: ArrayLike, *, matvec: Callable) -> jax.Array:
  """`|b - alpha A q|^2` with the step `alpha = q . b / q . A q` that minimises the error in the A-norm along `q`.

  It does not depend on the length or the sign of the prediction `q`, and is 0 when `q` is a multiple of `A^-1 b`. The
  step is part of what is differentiated.

  >>> import jax.numpy as jnp
  >>> matvec = lambda v: jnp.array([1.0, 2.0]) * v
  >>> scaled_residual_loss(jnp.array([[6.0, 3.0], [1.0, 0.0]]), jnp.ones((2, 2)), matvec=matvec).tolist()
  [0.0, 1.0]

  Args:
    predictions: q, floating `[batch, ...]`.
    right_hand_sides: b, floating, like the predictions; of norm 1 in training.
    matvec: static; one vector `[...]` to `A` times it, `A` symmetric and positive definite.

  Returns:
    `[batch]`. Where `q . A q` is not positive the step is 0.

  Raises:
    ValueError: when the arrays are not floating point or their shapes differ.

  Reference: Kaneda, Akar, Chen, Kala, Hyde, Teran, "A Deep Conjugate Direction Method for Iteratively Solving Linear
    Systems", ICML 2023, the training loss (Section 5).
  """
  check_float("predictions", predictions)
  check_float("right_hand_sides", right_hand_sides)
  check_same_shape(predictions=predictions, right_hand_sides=right_hand_sides)
  if jnp.ndim(predictions) < 2:
    raise ValueError(f"predictions must have the shape [batch, ...], got {jnp.shape(predictions)}.")
  dtype = jnp.promote_types(predictions.dtype, jnp.float32)

  def one(q, b):
    image = matvec(q)
    curvature = jnp.vdot(q, image)
    usable = curvature > 0
    step = jnp.where(usable, jnp.vdot(q, b) / jnp.where(usable, curvature, 1), 0)
    return jnp.sum(jnp.square(b - step * image))

  losses = jax.vmap(one)(predictions.astype(dtype), right_hand_sides.astype(dtype))
  return losses.astype(predictions.dtype)
