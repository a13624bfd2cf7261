"""Rounding that the backward pass does not see: integer values forward, the identity's gradient backward."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxreg.checks import check_float, check_same_shape

__all__ = ["straight_through_floor", "straight_through_round", "straight_through_value"]


def straight_through_value(values: ArrayLike, replaced: ArrayLike) -> jax.Array:
  """`replaced` in the forward pass, with the gradient of `values`.

  Written as `values + stop_gradient(replaced - values)` it would round; this form returns `replaced` bit for bit.

  >>> import jax, jax.numpy as jnp
  >>> binary = lambda x: straight_through_value(x, jnp.sign(x))
  >>> binary(jnp.array([-0.3, 2.0])).tolist(), jax.grad(lambda x: binary(x).sum())(jnp.array([-0.3, 2.0])).tolist()
  ([-1.0, 1.0], [1.0, 1.0])

  Args:
    values: floating `[...]`.
    replaced: `[...]`, what the forward pass is to see; cast to the dtype of `values`.

  Returns:
    `[...]`.

  Raises:
    ValueError: when `values` are not floating point or the shapes differ.

  Reference: Bengio, Léonard, Courville, "Estimating or Propagating Gradients Through Stochastic Neurons for
    Conditional Computation", 2013, Section 3.4.
  """
  check_float("values", values)
  check_same_shape(values=values, replaced=replaced)
  return _straight_through(values, jax.lax.stop_gradient(jnp.asarray(replaced, jnp.result_type(values))))


def straight_through_floor(values: ArrayLike) -> jax.Array:
  """`floor(values)` with derivative one.

  >>> import jax
  >>> [float(f(1.7)) for f in (straight_through_floor, jax.grad(straight_through_floor))]
  [1.0, 1.0]

  Args:
    values: floating `[...]`.

  Returns:
    `[...]`.

  Raises:
    ValueError: when `values` are not floating point.

  Reference: Abdolrashidi et al., "Pareto-Optimal Quantized ResNet Is Mostly 4-bit", CVPR Workshops 2021 (quantizers).
  """
  check_float("values", values)
  return _straight_through(values, jax.lax.stop_gradient(jnp.floor(values)))


def straight_through_round(values: ArrayLike) -> jax.Array:
  """`floor(values + 1/2)`, that is rounding with halves upwards, with derivative one.

  >>> import jax
  >>> [float(straight_through_round(x)) for x in (-0.5, 0.5, 1.5)], float(jax.grad(straight_through_round)(0.3))
  ([0.0, 1.0, 2.0], 1.0)

  Args:
    values: floating `[...]`.

  Returns:
    `[...]`.

  Raises:
    ValueError: when `values` are not floating point.

  Reference: Abdolrashidi et al., "Pareto-Optimal Quantized ResNet Is Mostly 4-bit", CVPR Workshops 2021 (quantizers).
  """
  check_float("values", values)
  return _straight_through(values, jax.lax.stop_gradient(jnp.floor(values + 0.5)))


@jax.custom_jvp
def _straight_through(values, replaced):
  return replaced


@_straight_through.defjvp
def _straight_through_jvp(primals, tangents):
  return primals[1], tangents[0]
