"""Derivatives of solutions against closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxreg.solvers.taylor_regularization import solution_derivative
from tests.conformance import EXAMPLES, row, unchanged


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_derivatives_of_known_solutions(order, x64):
  # y' = -y^2 + t' s: the first has y = 1 / (1 + t), the second y = sin t + t^4, through t = 0.3.
  t = 0.3

  def field(t, y, scale):
    return jnp.stack([-(y[0] ** 2), jnp.cos(t) * scale + 4 * t**3])

  y = jnp.array([1 / (1 + t), np.sin(t) + t**4])
  hyperbola = (-1.0) ** order * np.prod(np.arange(1, order + 1)) / (1 + t) ** (order + 1)
  sine = np.sin(t + order * np.pi / 2) + [4 * t**3, 12 * t**2, 24 * t, 24][order - 1]
  function = jax.jit(lambda t, y: solution_derivative(field, t, y, 1.0, order=order))
  np.testing.assert_allclose(function(t, y), [hyperbola, sine], rtol=1e-12)
  if order == 3:  # d^3 y / dt^3 = -6 y^4 of the hyperbola
    slope = jax.jit(jax.grad(lambda y: function(t, y)[0]))(y)
    np.testing.assert_allclose(slope, [-24 * y[0] ** 3, 0], rtol=1e-12)


def test_bad_input():
  with pytest.raises(ValueError, match="order must be a positive integer"):
    solution_derivative(lambda t, y, args: y, 0.0, jnp.ones(2), order=0)
  with pytest.raises(ValueError, match="y must be floating"):
    solution_derivative(lambda t, y, args: y, 0.0, jnp.ones(2, int), order=1)


ROWS = [
  row(
    solution_derivative,
    lambda rng: (rng.normal(size=EXAMPLES),),
    call=lambda y: solution_derivative(lambda t, y, args: jnp.sin(y) + t, 0.5, y, order=2),
    extreme=unchanged,
  ),
]
