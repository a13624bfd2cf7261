"""Linear classifiers of two classes over a grid of weight decays, from the nearest centroid to the separating one."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxreg.checks import as_array, check_float, check_hyperparameter, counted_labels, dtype_of

__all__ = ["RegularizationPath", "regularization_path"]

LOSSES = ("softplus", "squared_hinge", "hinge")
_STEPS = 100
_SHORTEST = 1e-10  # of steps, in units of Newton's


class RegularizationPath(NamedTuple):
  """Classifiers `weights . x + bias`, positive for class 1, one for each strength.

  Attributes:
    weights: `[strengths, features]`.
    bias: `[strengths]`.
    converged: boolean `[strengths]`, whether the minimum was found to what the dtype resolves.
  """

  weights: jax.Array
  bias: jax.Array
  converged: jax.Array


def regularization_path(
  inputs: ArrayLike, labels: ArrayLike, *, strengths: ArrayLike, loss: str = "softplus"
) -> RegularizationPath:
  """Minimises `mean loss(y (w . x + b)) + strength |w|^2`, `y = 2 label - 1`, for each strength; b is free.

  `softplus` (logistic regression) and `squared_hinge` by Newton's method, each strength starting from the next larger
  one's solution; `hinge` (the support vector machine) by a primal-dual interior-point method in its dual. All in the
  span of the centred inputs, so that no equation has more unknowns than there are examples; angles are those of the
  inputs' space. As the strength grows, `w` turns to the difference of the means of balanced classes, and as it falls to
  the boundary of smallest error or largest margin.

  >>> import jax.numpy as jnp
  >>> inputs, labels = jnp.array([[0.0, 0.0], [0.0, 1.0], [4.0, 0.0], [4.0, 1.0]]), jnp.array([0, 0, 1, 1])
  >>> path = regularization_path(inputs, labels, strengths=jnp.array([0.01, 100.0]))
  >>> path.converged.tolist(), (path.weights[:, 0] > 0).tolist(), jnp.sign(-path.bias / path.weights[:, 0]).tolist()
  ([True, True], [True, True], [1.0, 1.0])

  Args:
    inputs: floating `[examples, features]`.
    labels: integers `[examples]`, 0 or 1; examples with another label count for nothing.
    strengths: positive `[strengths]`, in any order; may be traced. In float32 very small ones may not converge.
    loss: `softplus`, `squared_hinge` or `hinge`; static.

  Returns:
    `RegularizationPath`, in float32 at least. Cannot be differentiated in reverse mode; runs under `jit` and `vmap`,
    for example over pairs of classes.

  Raises:
    ValueError: when shapes or dtypes do not fit, a strength is not positive, or the loss has another name.

  Reference: Tanay, Griffin, "A New Angle on L2 Regularization", arXiv 1806.11186, 2018; Ferris, Munson,
    "Interior-Point Methods for Massive Support Vector Machines", SIAM Journal on Optimization 2002.
  """
  check_float("inputs", inputs)
  if jnp.ndim(inputs) != 2 or 0 in jnp.shape(inputs):
    raise ValueError(f"inputs must be [examples, features], neither of them 0, got shape {jnp.shape(inputs)}.")
  if not jnp.issubdtype(dtype_of("labels", labels), jnp.integer) or jnp.shape(labels) != jnp.shape(inputs)[:1]:
    raise ValueError(
      f"labels must be integers of shape {jnp.shape(inputs)[:1]}, got {jnp.shape(labels)} of dtype"
      f" {jnp.result_type(labels)}."
    )
  check_hyperparameter("strengths", strengths, low=0, open_low=True)
  if jnp.ndim(strengths) != 1:
    raise ValueError(f"strengths must be [strengths], got shape {jnp.shape(strengths)}.")
  if loss not in LOSSES:
    raise ValueError(f"loss must be one of {', '.join(LOSSES)}, got {loss!r}.")
  inputs = jnp.asarray(inputs)
  inputs = inputs.astype(jnp.promote_types(inputs.dtype, jnp.float32))
  labels, counted = counted_labels(as_array("labels", labels), 2)
  strengths = jnp.asarray(strengths, inputs.dtype)
  weight = counted.astype(inputs.dtype) / jnp.maximum(jnp.sum(counted), 1).astype(inputs.dtype)
  inputs = jnp.where(counted[:, None], inputs, 0)
  center = _product(weight, inputs)
  centred = jnp.where(counted[:, None], inputs - center, 0)
  signs = jnp.where(counted, 2 * labels - 1, 0).astype(inputs.dtype)
  # A scale of one for inputs of any unit.
  scale = jnp.sqrt(jnp.maximum(_product(weight, jnp.sum(jnp.square(centred), 1)), jnp.finfo(inputs.dtype).tiny))
  coordinates, basis = centred / scale, None
  if centred.shape[1] > centred.shape[0]:
    left, values, basis = jnp.linalg.svd(coordinates, full_matrices=False)
    coordinates = left * values
  fit = functools.partial(_hinge_fit if loss == "hinge" else functools.partial(_newton_fit, _SMOOTH.get(loss)))
  order = jnp.argsort(-strengths)

  def one(start, strength):
    found, converged = fit(coordinates, signs, weight, strength / scale**2, start)
    return found, (found, converged)

  start = jnp.zeros(coordinates.shape[1] + 1, inputs.dtype)
  _, (found, converged) = jax.lax.scan(one, start, strengths[order])
  found, converged = found[jnp.argsort(order)], converged[jnp.argsort(order)]
  weights = (found[:, :-1] if basis is None else _product(found[:, :-1], basis)) / scale
  return RegularizationPath(weights, found[:, -1] - _product(weights, center), converged)


def _product(first, second):
  return jnp.matmul(first, second, precision="highest")


def _softplus(margins):
  """Values, first and second derivatives of `log(1 + exp(-m))`."""
  other = jax.nn.sigmoid(-margins)
  return jax.nn.softplus(-margins), -other, other * jax.nn.sigmoid(margins)


def _squared_hinge(margins):
  short = jnp.maximum(1 - margins, 0)
  return jnp.square(short), -2 * short, jnp.where(short > 0, 2.0, 0.0).astype(margins.dtype)


_SMOOTH = {"softplus": _softplus, "squared_hinge": _squared_hinge}


def _newton_fit(loss, inputs, signs, weight, strength, start):
  """The minimum in `(w, b)`, and whether Newton's decrement, or the gradient, fell to what the dtype resolves."""
  dtype = inputs.dtype
  design = jnp.concatenate([inputs, jnp.ones_like(signs)[:, None]], axis=1)
  penalized = jnp.ones(design.shape[1], dtype).at[-1].set(0)
  tolerance = jnp.sqrt(jnp.finfo(dtype).eps)
  resolution = 32 * jnp.finfo(dtype).eps

  def value_and_slope(x):
    value, slope, curvature = loss(signs * _product(design, x))
    total = jnp.sum(weight * value) + strength * jnp.sum(penalized * x**2)
    return total, _product(weight * slope * signs, design) + 2 * strength * penalized * x, weight * curvature

  def going(carry):
    *_, converged, stalled, steps = carry
    return ~converged & ~stalled & (steps < _STEPS)

  def step(carry):
    x, value, slope, curvature, _, _, steps = carry
    hessian = _product(design.T * curvature, design) + 2 * strength * jnp.diag(penalized)
    # Where no example has a curvature the bias is free.
    hessian = hessian.at[-1, -1].add(jnp.finfo(dtype).eps * (1 + hessian[-1, -1]))
    direction = -jnp.linalg.solve(hessian, slope)
    decrement = jnp.sqrt(jnp.maximum(-jnp.dot(slope, direction), 0))
    size = jnp.sqrt(jnp.maximum(jnp.dot(x, _product(hessian, x)), 0))

    def short(search):
      length, (_, new, after, _) = search
      # Near the minimum values differ by rounding only, and the gradient decides.
      tied = jnp.abs(new - value) <= 4 * jnp.finfo(dtype).eps * jnp.abs(value)
      fits = (new <= value - 1e-4 * length * decrement**2) | (tied & (jnp.linalg.norm(after) < jnp.linalg.norm(slope)))
      return ~fits & (length > _SHORTEST)

    at = lambda length: (length, (x + length * direction, *value_and_slope(x + length * direction)))
    length, (moved, new, after, bend) = jax.lax.while_loop(
      short, lambda search: at(search[0] / 2), at(jnp.ones((), dtype))
    )
    # A step from so near ends at twice as many digits.
    converged = (decrement <= tolerance * size) | (jnp.linalg.norm(after) <= resolution)
    return moved, new, after, bend, converged, length <= _SHORTEST, steps + 1

  first = (start, *value_and_slope(start), jnp.bool_(False), jnp.bool_(False), jnp.int32(0))
  found, *_, converged, _, _ = jax.lax.while_loop(going, step, first)
  return found, converged


def _hinge_fit(inputs, signs, weight, strength, start):
  """The minimum in `(w, b)` from the dual `min |sum_i a_i y_i x_i|^2 / 2 - sum_i a_i`, `0 <= a_i <= c_i`, `y . a = 0`.

  The bounds are `c_i = weight_i / (2 strength)`, and `a` has their unit or that of the inputs, whichever is smaller.
  """
  del start
  dtype = inputs.dtype
  bound = jnp.max(weight) / (2 * strength)
  unit = jnp.minimum(bound, 1)
  bound = bound / unit
  counted = weight > 0
  size = jnp.maximum(jnp.sum(counted), 1).astype(dtype)
  rows = signs[:, None] * inputs * jnp.sqrt(unit)
  mean = lambda values: jnp.sum(jnp.where(counted, values, 0)) / size

  def solved(diagonal, right):
    """`(rows rows^T + diag)^-1 right` by the smaller matrix."""
    scaled = rows / diagonal[:, None]
    inner = jnp.eye(rows.shape[1], dtype=dtype) + _product(rows.T, scaled)
    factor = jax.scipy.linalg.cho_factor(inner)
    correction = _product(scaled, jax.scipy.linalg.cho_solve(factor, _product(rows.T, right / diagonal[:, None])))
    return right / diagonal[:, None] - correction

  def going(carry):
    state, gap, best, stalled, steps = carry
    return (gap > jnp.finfo(dtype).eps ** 0.75) & (stalled < 4) & (steps < _STEPS)

  def step(carry):
    (dual, low, high, bias), gap, best, stalled, steps = carry
    slack = bound - dual
    target = 0.1 * mean(dual * low + slack * high) / 2
    residual = _product(rows, _product(dual, rows)) - 1 + bias * signs - target / dual + target / slack
    # One solve for both right-hand sides.
    both = solved(low / dual + high / slack, jnp.stack([-residual, signs], axis=1))
    across = jnp.dot(signs, both[:, 1])
    step_bias = (jnp.dot(signs, both[:, 0]) + jnp.dot(signs, dual)) / jnp.where(across > 0, across, 1)
    move = both[:, 0] - step_bias * both[:, 1]
    step_low = target / dual - low - low / dual * move
    step_high = target / slack - high + high / slack * move
    room = lambda value, change: jnp.min(jnp.where(change < 0, -value / jnp.where(change < 0, change, 1), jnp.inf))
    pairs = ((dual, move), (slack, -move), (low, step_low), (high, step_high))
    length = jnp.minimum(1, 0.99 * functools.reduce(jnp.minimum, (room(*pair) for pair in pairs)))
    state = (dual + length * move, low + length * step_low, high + length * step_high, bias + length * step_bias)
    dual, low, high, bias = state
    balance = jnp.abs(jnp.dot(signs, dual)) / size
    gap = mean(dual * low + (bound - dual) * high) / jnp.maximum(mean(dual), 1e-30) + balance
    better = gap < best[1]
    best = jax.tree.map(lambda new, old: jnp.where(better, new, old), (state, gap), best)
    return state, gap, best, jnp.where(better, 0, stalled + 1), steps + 1

  half = jnp.full_like(signs, 0.5)
  state = (half, jnp.ones_like(signs), half / (bound - half), jnp.zeros((), dtype))
  first = (state, jnp.asarray(jnp.inf, dtype), (state, jnp.asarray(jnp.inf, dtype)), jnp.int32(0), jnp.int32(0))
  (dual, _, _, bias), gap = jax.lax.while_loop(going, step, first)[2]
  weights = _product(dual, rows) * jnp.sqrt(unit)
  return jnp.append(weights, bias), gap <= jnp.finfo(dtype).eps ** 0.6
