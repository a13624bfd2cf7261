"""Differential equations on [-1, 1]^d with sharp peaks as solutions, in closed form: problems for adaptive sampling."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxreg.checks import check_hyperparameter
from jaxreg.solvers.adaptive_sampling import Derivatives, laplacian

__all__ = ["PeakEquation", "cubic_peak_equation", "poisson_peak_equation", "two_peaks_equation"]


class PeakEquation(NamedTuple):
  """A problem with its solution.

  Attributes:
    solution: `[d] -> scalar`, also the boundary values.
    source: the right-hand side, `[d] -> scalar`.
    expression: the left-hand side, `(x, value, gradient, laplacian) -> scalar` of a point `[d]` and a function's
      value, gradient `[d]` and Laplacian there.
  """

  solution: Callable
  source: Callable
  expression: Callable

  def operator(self, u: Callable, point: ArrayLike) -> jax.Array:
    """The left-hand side of a function `u: [d] -> scalar` at a point `[d]`."""
    return self.expression(point, u(point), jax.grad(u)(point), laplacian(u)(point))

  def residual(self, u: Callable, point: ArrayLike) -> jax.Array:
    """`operator(u) - source` at a point `[d]`."""
    return self.operator(u, point) - self.source(point)

  def residuals(self, derivatives: Derivatives, points: ArrayLike) -> jax.Array:
    """The residuals `[n]` of a function whose derivatives at points `[n, d]` are known."""
    return jax.vmap(self.expression)(points, *derivatives) - jax.vmap(self.source)(points)


def poisson_peak_equation(*, center: Sequence[float] = (0.5, 0.5), sharpness: ArrayLike = 1000.0) -> PeakEquation:
  """`-Laplace u = s` with the solution `exp(-sharpness |x - center|^2)`.

  >>> equation = poisson_peak_equation(sharpness=10.0)
  >>> abs(float(equation.residual(equation.solution, jnp.array([0.4, 0.7])))) < 1e-3
  True

  Args:
    center: of the peak, one number per dimension.
    sharpness: positive; may be traced.

  Returns:
    The problem.

  Raises:
    ValueError: when `sharpness` is not positive.

  Reference: Tang, Wan, Yang, "DAS-PINNs: A Deep Adaptive Sampling Method for Solving High-Dimensional Partial
    Differential Equations", JCP 2023, the two-dimensional peak problem.
  """
  check_hyperparameter("sharpness", sharpness, low=0, open_low=True)
  peak = lambda x: _peak(x, center, sharpness)
  return PeakEquation(
    solution=lambda x: peak(x)[0],
    source=lambda x: -peak(x)[2],
    expression=lambda x, value, slope, curvature: -curvature,
  )


def two_peaks_equation(
  *, centers: Sequence[Sequence[float]] = ((0.5, 0.5), (-0.5, -0.5)), sharpness: ArrayLike = 1000.0
) -> PeakEquation:
  """`-div(u grad v) + Laplace u = s` with `v = |x|^2`, whose solution is a sum of peaks.

  >>> equation = two_peaks_equation(sharpness=10.0)
  >>> abs(float(equation.residual(equation.solution, jnp.array([0.4, 0.7])))) < 1e-3
  True

  Args:
    centers: of the peaks, one number per dimension each.
    sharpness: positive; may be traced.

  Returns:
    The problem.

  Raises:
    ValueError: when `sharpness` is not positive.

  Reference: Tang, Wan, Yang, "DAS-PINNs: A Deep Adaptive Sampling Method for Solving High-Dimensional Partial
    Differential Equations", JCP 2023, the problem with two peaks.
  """
  check_hyperparameter("sharpness", sharpness, low=0, open_low=True)

  def parts(x):
    return [sum(terms) for terms in zip(*(_peak(x, center, sharpness) for center in centers))]

  def combine(x, value, slope, curvature):
    return curvature - 2 * jnp.vdot(x, slope) - 2 * len(x) * value

  return PeakEquation(
    solution=lambda x: parts(x)[0],
    source=lambda x: combine(x, *parts(x)),
    expression=combine,
  )


def cubic_peak_equation(*, dimension: int = 10, sharpness: ArrayLike = 10.0) -> PeakEquation:
  """`-Laplace u + u - u^3 = s` with the solution `exp(-sharpness |x|^2)`.

  >>> equation = cubic_peak_equation(dimension=3)
  >>> abs(float(equation.residual(equation.solution, jnp.array([0.1, 0.2, 0.0])))) < 1e-3
  True

  Args:
    dimension: static.
    sharpness: positive; may be traced.

  Returns:
    The problem.

  Raises:
    ValueError: when `sharpness` is not positive.

  Reference: Tang, Zhai, Wan, Yang, "Adversarial Adaptive Sampling: Unify PINN and Optimal Transport for the
    Approximation of PDEs", ICLR 2024, the nonlinear problem in ten dimensions (details unverified).
  """
  check_hyperparameter("sharpness", sharpness, low=0, open_low=True)

  def source(x):
    value, _, curvature = _peak(x, (0.0,) * dimension, sharpness)
    return -curvature + value - value**3

  return PeakEquation(
    solution=lambda x: _peak(x, (0.0,) * dimension, sharpness)[0],
    source=source,
    expression=lambda x, value, slope, curvature: -curvature + value - value**3,
  )


def _peak(x, center, sharpness):
  """Value, gradient and Laplacian of `exp(-sharpness |x - center|^2)`."""
  offset = x - jnp.asarray(center, x.dtype)
  square = jnp.vdot(offset, offset)
  value = jnp.exp(-sharpness * square)
  return value, -2 * sharpness * offset * value, (4 * sharpness**2 * square - 2 * sharpness * len(x)) * value
