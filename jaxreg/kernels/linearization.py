"""Networks that are polynomials in their parameters: expansions of any function around given ones."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxreg.metrics.sizes import static_integer

__all__ = ["linearize", "taylor_expand"]


def linearize(function: Callable, params: Any) -> Callable:
  """The function that is linear in the parameters and touches the given one: `f(theta_0) + J (theta - theta_0)`.

  Trained by gradient descent it does what a network of infinite width does, with the tangent kernel at `params`.

  >>> import jax.numpy as jnp
  >>> linear = linearize(lambda w, x: w**2 * x, jnp.float32(1.0))
  >>> float(linear(jnp.float32(3.0), 2.0))  # 2 + 2 * 1 * 2 * (3 - 1)
  10.0

  Args:
    function: static; `(params, *inputs) -> outputs`, arrays or a tree of them, differentiable by JAX.
    params: theta_0, a tree of floating arrays.

  Returns:
    `(params, *inputs) -> outputs`.

  Reference: Lee et al., "Wide Neural Networks of Any Depth Evolve as Linear Models Under Gradient Descent", NeurIPS
    2019, equation 6.
  """
  return taylor_expand(function, params, degree=1)


def taylor_expand(function: Callable, params: Any, *, degree: int) -> Callable:
  """The Taylor polynomial of a function in its parameters: `sum_k d^k f(theta_0)[theta - theta_0] / k!`.

  >>> import jax.numpy as jnp
  >>> square = taylor_expand(lambda w, x: w**3 * x, jnp.float32(1.0), degree=2)
  >>> float(square(jnp.float32(2.0), 1.0))  # 1 + 3 + 3
  7.0

  Args:
    function: static; `(params, *inputs) -> outputs`, arrays or a tree of them, differentiable `degree` times by JAX.
    params: theta_0, a tree of floating arrays.
    degree: static; non-negative.

  Returns:
    `(params, *inputs) -> outputs`; it can be differentiated in the parameters and the inputs.

  Raises:
    ValueError: when `degree` is not a non-negative integer.

  Reference: Novak et al., "Neural Tangents: Fast and Easy Infinite Neural Networks in Python", ICLR 2020, Section 2.3.
  """
  degree = static_integer("degree", degree, low=0)

  def expanded(new, *inputs):
    change = jax.tree.map(jnp.subtract, new, params)
    term = lambda at: function(at, *inputs)
    total = term(params)
    for order in range(1, degree + 1):
      term = _directional(term, change)
      value, factor = term(params), 1 / math.factorial(order)
      total = jax.tree.map(lambda x, y, factor=factor: x + jnp.asarray(factor, jnp.result_type(y)) * y, total, value)
    return total

  return expanded


def _directional(function, change):
  return lambda at: jax.jvp(function, (at,), (change,))[1]
