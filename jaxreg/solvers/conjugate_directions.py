"""Conjugate directions for symmetric positive definite systems, with directions from any function of the residual."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxreg.checks import check_float, check_hyperparameter
from jaxreg.metrics.sizes import static_integer

__all__ = ["ConjugateDirectionsResult", "solve_conjugate_directions"]


class ConjugateDirectionsResult(NamedTuple):
  """What the iteration found."""

  x: jax.Array  # [...], like b
  residual_norms: jax.Array  # |b - A x| before each iteration and after the last one, then repeated, [steps + 1]
  iterations: jax.Array  # int32
  converged: jax.Array  # whether the residual is at most tolerance times the first one


class _State(NamedTuple):
  x: jax.Array
  residual: jax.Array
  directions: jax.Array  # the last ones, the newest first, [orthogonalize, ...]
  images: jax.Array  # A times them
  curvatures: jax.Array  # d . A d of each, 1 where there is none yet
  iteration: jax.Array
  norms: jax.Array


def solve_conjugate_directions(
  matvec: Callable,
  b: ArrayLike,
  direction: Callable,
  *,
  x0: ArrayLike | None = None,
  steps: int = 100,
  tolerance: ArrayLike = 1e-4,
  orthogonalize: int = 2,
  project: Callable | None = None,
) -> ConjugateDirectionsResult:
  """Solves `A x = b` by exact line searches along directions that a function proposes and that are made A-orthogonal.

  With `d = direction(r / |r|)` an iteration is `d <- d - sum_i d_i (d . A d_i) / (d_i . A d_i)` over the last
  directions, `x <- x + d (r . d) / (d . A d)`, `r <- b - A x`. A direction's length and sign do not matter, and the
  A-norm of the error never grows: a bad direction costs an iteration, not the solution. Derivatives of the solution in
  `b` and in what `matvec` closes over are those of the exact solution, by another solve with the same directions; the
  norms and iterations have none. The identity gives the
  conjugate gradient iterates, `A^-1` the solution in one iteration. Where a direction is of no use (it lies in the span
  of those before, or is not finite) the residual takes its place.

  >>> import jax.numpy as jnp
  >>> matvec = lambda v: jnp.array([1.0, 2.0, 3.0]) * v
  >>> result = solve_conjugate_directions(matvec, jnp.ones(3), lambda r: r, steps=5)
  >>> int(result.iterations), [round(value, 3) for value in result.x.tolist()]
  (3, [1.0, 0.5, 0.333])

  Args:
    matvec: static; `[...]` to `A` times it, `A` symmetric and positive definite.
    b: floating `[...]`, any shape, such as a grid's; map over it for several right-hand sides.
    direction: static; a residual of norm 1 `[...]` to a direction `[...]`, such as a trained network.
    x0: where to start, `[...]`; by default 0.
    steps: static, the largest number of iterations.
    tolerance: relative to the first residual; may be traced.
    orthogonalize: static, the number of directions to be orthogonal to.
    project: static; for a singular `A`, the projection that removes its null space, such as `lambda v: v - v.mean()`;
      applied to `b`, residuals and directions.

  Returns:
    ConjugateDirectionsResult.

  Raises:
    ValueError: when `b` is not floating point, shapes do not fit or a hyperparameter is outside its domain.

  Reference: Kaneda, Akar, Chen, Kala, Hyde, Teran, "A Deep Conjugate Direction Method for Iteratively Solving Linear
    Systems", ICML 2023, Algorithm 1.
  """
  check_float("b", b)
  check_hyperparameter("steps", steps, low=1)
  check_hyperparameter("tolerance", tolerance, low=0)
  orthogonalize = static_integer("orthogonalize", orthogonalize, low=0)
  dtype = jnp.promote_types(jnp.result_type(b), jnp.float32)
  if x0 is not None and jnp.shape(x0) != jnp.shape(b):
    raise ValueError(f"x0 must have the shape of b, {jnp.shape(b)}, got {jnp.shape(x0)}.")
  project = project or (lambda v: v)
  target = project(jnp.asarray(b, dtype))
  x = jnp.zeros_like(target) if x0 is None else jnp.asarray(x0, dtype)
  for name, function in (("matvec", matvec), ("direction", direction)):
    shape = jax.eval_shape(function, x).shape
    if shape != x.shape:
      raise ValueError(f"{name} must return the shape of b, {x.shape}, got {shape}.")

  small = jax.lax.stop_gradient(tolerance)

  def unfinished(state):
    # Goes on when the norm is NaN, which then reaches the solution.
    return (state.iteration < steps) & ~(state.norms[state.iteration] <= small * state.norms[0])

  def solve(matvec, residual):
    advance = functools.partial(_iterate, target=residual, matvec=matvec, direction=direction, project=project)
    end = jax.lax.while_loop(
      unfinished, advance, _start(jnp.zeros_like(residual), project(residual), steps, orthogonalize)
    )
    norms = jnp.where(jnp.arange(steps + 1) <= end.iteration, end.norms, end.norms[end.iteration])
    return end.x, (norms, end.iteration)

  # The difference to the start is solved for, so that the solve of a derivative can begin at zero.
  x = jax.lax.stop_gradient(x)
  rest = project(target - matvec(x))
  change, (norms, iterations) = jax.lax.custom_linear_solve(matvec, rest, solve, symmetric=True, has_aux=True)
  solution = (x + change).astype(jnp.result_type(b))
  return ConjugateDirectionsResult(solution, norms, iterations, norms[-1] <= tolerance * norms[0])


def _start(x: jax.Array, residual: jax.Array, steps: int, orthogonalize: int) -> _State:
  none = jnp.zeros((orthogonalize, *x.shape), x.dtype)
  norms = jnp.zeros(steps + 1, x.dtype).at[0].set(jnp.linalg.norm(residual.ravel()))
  return _State(x, residual, none, none, jnp.ones(orthogonalize, x.dtype), jnp.int32(0), norms)


def _iterate(state: _State, *, target: jax.Array, matvec: Callable, direction: Callable, project: Callable) -> _State:
  d, image, curvature = _next_direction(state, matvec, direction, project)
  x = state.x + d * (jnp.vdot(state.residual, d) / curvature)
  residual = project(target - matvec(x))  # an updated residual would drift away from the true one
  push = lambda new, old: jnp.concatenate([new[None], old])[: len(old)]
  return _State(
    x,
    residual,
    push(d, state.directions),
    push(image, state.images),
    push(curvature, state.curvatures),
    state.iteration + 1,
    state.norms.at[state.iteration + 1].set(jnp.linalg.norm(residual.ravel())),
  )


def _next_direction(state: _State, matvec: Callable, direction: Callable, project: Callable):
  """A direction, A times it, and their product, which is positive."""
  unit = state.residual / state.norms[state.iteration]
  proposed = project(direction(unit).astype(unit.dtype))
  length = jnp.linalg.norm(proposed.ravel())

  def orthogonalized(raw):
    # All coefficients come from the direction as proposed (classical Gram-Schmidt), as in the published iteration.
    axes = tuple(range(1, raw.ndim + 1))
    coefficients = jnp.sum(raw * state.images, axis=axes) / state.curvatures
    d = raw - jnp.tensordot(coefficients, state.directions, 1)
    image = matvec(d)
    return d, image, jnp.vdot(d, image)

  def fall_back():
    # The residual is orthogonal to the directions before, so that orthogonalization cannot make it vanish.
    d, image, curvature = orthogonalized(unit)
    return d, image, jnp.where(curvature > 0, curvature, 1)

  d, image, curvature = orthogonalized(proposed / jnp.where(length > 0, length, 1))
  rounding = 10 * jnp.finfo(d.dtype).eps
  usable = (curvature > 0) & jnp.isfinite(curvature) & (jnp.linalg.norm(d.ravel()) > rounding)
  return jax.lax.cond(usable, lambda: (d, image, curvature), fall_back)
