"""Derivatives of an ODE's solution in time, by Taylor-mode differentiation: the high-order way to cheaper solves."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental import jet
from jax.typing import ArrayLike

from jaxreg.checks import check_float
from jaxreg.metrics.sizes import static_integer

__all__ = ["solution_derivative"]


def solution_derivative(vector_field: Callable, t, y: ArrayLike, args=None, *, order: int) -> jax.Array:
  """The derivative `d^K y / dt^K` of the solution of `dy/dt = f(t, y, args)` through a point.

  The integral of its squared norm along a solution is small when a solver of order `K` can take large steps: integrate
  it beside the state, and add it to the loss.

  >>> import jax.numpy as jnp
  >>> solution_derivative(lambda t, y, args: -2.0 * y, 0.0, jnp.ones(2), order=3).tolist()
  [-8.0, -8.0]

  Args:
    vector_field: `(t, y, args) -> dy/dt`, of operations that `jax.experimental.jet` knows.
    t: time, scalar.
    y: the state, floating `[...]`.
    args: passed to the vector field.
    order: `K`, static, at least 1.

  Returns:
    `[...]`, in the dtype of `y`.

  Raises:
    ValueError: when `y` is not floating point or `order` not a positive integer.

  Reference: Kelly, Bettencourt, Johnson, Duvenaud, "Learning Differential Equations that are Easy to Solve",
    NeurIPS 2020, the regularizer R_K (Section 3) and its Taylor-mode computation (Section 4).
  """
  check_float("y", y)
  order = static_integer("order", order, low=1)
  time = jnp.asarray(t, y.dtype)
  one = jnp.ones((), y.dtype)
  field = lambda time, state: vector_field(time, state, args)
  derivatives = [field(time, y)]
  for known in range(1, order):
    # Time's own derivatives are 1, 0, 0, ...; each pass makes one more derivative of the state exact.
    times = [one, *[jnp.zeros((), y.dtype)] * (known - 1)]
    _, higher = jet.jet(field, (time, y), (times, derivatives))
    derivatives = [derivatives[0], *higher]
  return derivatives[-1]
