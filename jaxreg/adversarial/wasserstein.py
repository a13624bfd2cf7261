"""Losses at the worst input that can be had at a price per distance: Wasserstein-robust losses in their dual form.

`phi(x) = max_z l(z) - price * cost(z, x)`. Of an empirical distribution their mean is, for some price, the largest
expected loss over all distributions within a Wasserstein distance. With the maximiser found, gradients need no
derivative of it (the envelope theorem).
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from jaxreg.checks import (
  as_array,
  check_float,
  check_hyperparameter,
  counted_labels,
  dtype_of,
  example_mask,
  widened_integers,
)
from jaxreg.losses.labelled_logits import narrowed, widened
from jaxreg.metrics.sizes import static_integer

__all__ = ["logistic_robust_loss", "ramp_robust_loss", "robust_loss", "robust_self_training_loss"]

COSTS = ("squared_l2", "l2")
SOLVERS = ("ascent", "newton")
_HALVINGS = 30
_NEWTON_STEPS = 4


def ramp_robust_loss(distances: ArrayLike, *, price: ArrayLike, power: int = 1) -> jax.Array:
  """The robust 0-1 loss of a linear classifier: 1 on the wrong side, and less the farther on the right one.

  `clip(1 - price * d, 0, 1)` at a price per distance, `clip(1 - price * d^2, 0, 1)` (1 where d <= 0) per squared
  distance: an example is moved over the boundary where that costs less than the loss that it brings.

  >>> import jax.numpy as jnp
  >>> ramp_robust_loss(jnp.array([-1.0, 0.0, 1.0, 4.0]), price=0.5).tolist()
  [1.0, 1.0, 0.5, 0.0]

  Args:
    distances: floating `[...]`, signed distances from the boundary, positive on the side of the label.
    price: gamma, non-negative scalar in units of 1 / distance, or of 1 / distance^2; may be traced.
    power: of the distance in the cost, 1 or 2; static.

  Returns:
    `[...]`, in the dtype of the distances.

  Raises:
    ValueError: when distances are not floating point or a hyperparameter is out of range.

  Reference: Saberi, Najafi, Heidari, Movasaghinia, Motahari, Khalaj, "Out-Of-Domain Unlabeled Data Improves
    Generalization", ICLR 2024, equation 4 with the 0-1 loss.
  """
  check_float("distances", distances)
  check_hyperparameter("price", price, low=0, shape=())
  power = static_integer("power", power, low=1, high=2)
  distances = as_array("distances", distances)
  wide = widened(distances)
  inside = jnp.maximum(wide, 0)  # of a NaN, NaN
  # Beyond its largest value a square would be infinite, and times a price of 0 no number.
  short = jnp.minimum(inside, jnp.sqrt(jnp.finfo(wide.dtype).max) / 2) ** power
  return narrowed(jnp.clip(1 - jnp.asarray(price, wide.dtype) * short, 0, 1), distances.dtype)


def logistic_robust_loss(
  weights: ArrayLike, inputs: ArrayLike, labels: ArrayLike, *, price: ArrayLike
) -> tuple[jax.Array, jax.Array]:
  """The robust logistic loss of a linear classifier at a price per squared distance, and the worst inputs.

  `max_z softplus(-y <theta, z>) - price |z - x|^2` with y = 1 or -1. The worst input lies along theta, where the
  problem is one-dimensional; where it has two local maxima (a price below |theta|^2 / 8) the larger one is taken.

  >>> import jax.numpy as jnp
  >>> values, worst = logistic_robust_loss(jnp.array([1.0]), jnp.array([[2.0]]), jnp.array([1]), price=1.0)
  >>> f"{values[0]:.3f} {worst[0, 0]:.3f}"
  '0.131 1.937'

  Args:
    weights: floating `[features]`, theta.
    inputs: floating `[batch, features]`.
    labels: integers `[batch]`, 0 or 1; an example with another label has loss 0.
    price: gamma, positive scalar in units of 1 / distance^2; may be traced.

  Returns:
    Losses `[batch]`, differentiable in weights, inputs and price, and worst inputs `[batch, features]`, constant; both
    in the dtype of the inputs.

  Raises:
    ValueError: when shapes or dtypes do not fit or the price is not positive.

  Reference: Saberi et al., ICLR 2024, equation 4 with the logistic loss; the duality is that of Sinha, Namkoong, Duchi,
    "Certifying Some Distributional Robustness with Principled Adversarial Training", ICLR 2018.
  """
  check_float("weights", weights)
  check_float("inputs", inputs)
  check_hyperparameter("price", price, low=0, open_low=True, shape=())
  weights, inputs = as_array("weights", weights), as_array("inputs", inputs)
  if inputs.ndim != 2 or weights.shape != inputs.shape[1:]:
    raise ValueError(
      f"inputs must be [batch, features] and weights [features], got {inputs.shape} and {weights.shape}."
    )
  labels, counted = _binary(labels, inputs.shape[:1])
  dtype = jnp.promote_types(widened(inputs).dtype, widened(weights).dtype)
  x = jnp.where(counted[:, None], widened(inputs), 0).astype(dtype)
  theta, price = widened(weights).astype(dtype), jnp.asarray(price, dtype)
  sign = jnp.where(labels == 1, 1, -1).astype(dtype)
  norm = jnp.sqrt(jnp.sum(theta**2))
  positive = norm > 0
  norm = jnp.sqrt(jnp.where(positive, jnp.sum(theta**2), 1))  # whose gradient at 0 is a number
  margins = sign * jnp.matmul(x, theta, precision="highest")
  lost = _lost_margin(*jax.lax.stop_gradient((margins, price / norm**2)))  # of the margin: |theta| times the distance
  moved = jnp.where(positive | jnp.isnan(norm), lost / jax.lax.stop_gradient(norm), 0)
  values = jax.nn.softplus(norm * moved - margins) - price * moved**2
  worst = x - (sign * moved)[:, None] * (theta / norm)
  values = jnp.where(counted, values, 0)
  return narrowed(values, inputs.dtype), jax.lax.stop_gradient(narrowed(worst, inputs.dtype))


def robust_loss(
  loss_fn: Callable[[optax.Params, jax.Array], ArrayLike],
  params: optax.Params,
  inputs: ArrayLike,
  *,
  price: ArrayLike,
  cost: str = "squared_l2",
  solver: str = "ascent",
  steps: int = 20,
  step_size: ArrayLike | None = None,
) -> tuple[jax.Array, jax.Array]:
  """The robust loss of any model, `max_z l(params, z) - price * cost(z, x)`, and the worst inputs.

  The maximum is unique where the price is more than half of the loss's largest curvature in the inputs (of a softmax of
  `W z + b`: above |W|^2 / 4). The cost without the square suits bounded losses alone: others grow without end where
  their slope is above the price.

  >>> import jax.numpy as jnp
  >>> loss_fn = lambda weights, z: jnp.log1p(jnp.exp(-z @ weights))
  >>> values, worst = robust_loss(loss_fn, jnp.array([1.0]), jnp.array([[2.0]]), price=1.0)
  >>> f"{values[0]:.3f} {worst[0, 0]:.3f}"
  '0.131 1.937'

  Args:
    loss_fn: `(params, [batch, ...]) -> [batch]`, each example's loss; closes over the labels. No example's loss may
      depend on another example.
    params: a pytree.
    inputs: floating `[batch, ...]`.
    price: gamma, positive scalar in units of loss / cost; may be traced.
    cost: `squared_l2` or `l2`, over all axes but the first; static.
    solver: `ascent`, gradient steps from the inputs; or `newton`, of the squared cost, for inputs of few entries: a
      Hessian for each example; static.
    steps: of the solver, at least 1; static.
    step_size: of the ascent; default `1 / (2 price)`, at which the squared cost alone would need one step; may be
      traced.

  Returns:
    Losses `[batch]`, differentiable in params, inputs and price as if the worst inputs were constant, and the worst
    inputs `[batch, ...]`, constant.

  Raises:
    ValueError: when inputs are not floating point, the loss is not one value per example, or a hyperparameter is out of
      range.

  Reference: Saberi et al., ICLR 2024, equation 4; Sinha, Namkoong, Duchi, ICLR 2018, equation 2 and its algorithm.
  """
  check_float("inputs", inputs)
  check_hyperparameter("price", price, low=0, open_low=True, shape=())
  steps = static_integer("steps", steps, low=1)
  if cost not in COSTS or solver not in SOLVERS or (cost, solver) == ("l2", "newton"):
    raise ValueError(f"cost must be one of {', '.join(COSTS)} and solver of {', '.join(SOLVERS)}, newton not with l2.")
  if step_size is not None:
    check_hyperparameter("step_size", step_size, low=0, shape=())
  inputs = as_array("inputs", inputs)
  losses = jax.eval_shape(loss_fn, params, inputs)
  if inputs.ndim < 1 or getattr(losses, "shape", None) != inputs.shape[:1]:
    raise ValueError(f"loss_fn must return one value per example of inputs {inputs.shape}, got {losses}.")
  dtype = jnp.promote_types(inputs.dtype, jnp.float32)
  price = jnp.asarray(price, dtype)
  size = jnp.asarray(1 / (2 * price) if step_size is None else step_size, dtype)
  fixed, start, rate = jax.lax.stop_gradient((params, inputs.astype(dtype), price))
  move = _newton if solver == "newton" else _ascent
  loss_of = lambda z: jnp.asarray(loss_fn(fixed, z.astype(inputs.dtype)))
  step = move(loss_of, start, rate, jax.lax.stop_gradient(size), cost)
  worst = jax.lax.stop_gradient(jax.lax.fori_loop(0, steps, lambda _, z: step(z), start).astype(inputs.dtype))
  values = jnp.asarray(loss_fn(params, worst))
  paid = price * _cost(worst.astype(dtype) - inputs.astype(dtype), cost)
  return (values.astype(paid.dtype) - paid).astype(values.dtype), worst


def robust_self_training_loss(
  robust: Callable[[jax.Array, jax.Array, ArrayLike], ArrayLike],
  predict: Callable[[jax.Array], ArrayLike],
  inputs: ArrayLike,
  labels: ArrayLike,
  unlabeled: ArrayLike,
  *,
  price: ArrayLike,
  unlabeled_price: ArrayLike,
  weight: ArrayLike,
  where: ArrayLike | None = None,
  where_unlabeled: ArrayLike | None = None,
) -> jax.Array:
  """A robust loss of labeled examples, and of unlabeled ones, perhaps of another domain, with the model's own labels.

  `mean robust(x, y, price) + weight * mean robust(x', predict(x'), unlabeled_price)`. The second term does not say on
  which side of the boundary an example belongs, but that the boundary shall keep away from where examples are.

  >>> import jax.numpy as jnp
  >>> robust = lambda x, y, price: ramp_robust_loss(jnp.where(y == 1, 1, -1) * x[:, 0], price=price)
  >>> robust_self_training_loss(
  ...   robust, lambda x: x[:, 0] > 0, jnp.array([[1.0]]), jnp.array([1]), jnp.array([[-1.0], [4.0]]),
  ...   price=0.5, unlabeled_price=0.25, weight=2.0).item()
  1.25

  Args:
    robust: `(inputs, labels, price) -> [batch]`, such as `logistic_robust_loss` of the model's weights.
    predict: `inputs -> labels [batch]`, the model's own, constant under differentiation.
    inputs: `[labeled, ...]`.
    labels: `[labeled]`.
    unlabeled: `[unlabeled, ...]`.
    price: gamma, of labeled examples; may be traced.
    unlabeled_price: gamma', of unlabeled ones; may be traced.
    weight: lambda, non-negative scalar; may be traced.
    where: boolean `[labeled]`: the examples that count; `robust` and `predict` see zeros in place of the others.
    where_unlabeled: boolean `[unlabeled]`, likewise.

  Returns:
    Scalar; a mean over no example is 0.

  Raises:
    ValueError: when a mask does not fit, `robust` does not return one value per example, or a price or the weight is
      negative.

  Reference: Saberi et al., ICLR 2024, equation 5.
  """
  check_hyperparameter("weight", weight, low=0, shape=())
  check_hyperparameter("price", price, low=0, shape=())
  check_hyperparameter("unlabeled_price", unlabeled_price, low=0, shape=())
  inputs, counted = _counted("inputs", inputs, where)
  unlabeled, counted_unlabeled = _counted("unlabeled", unlabeled, where_unlabeled)
  own = jax.lax.stop_gradient(jnp.asarray(predict(unlabeled)))
  labelled = inputs, labels, price, counted
  terms = []
  for x, y, cost, counted in (labelled, (unlabeled, own, unlabeled_price, counted_unlabeled)):
    values = jnp.asarray(robust(x, y, cost))
    if values.shape != counted.shape:
      raise ValueError(f"robust must return one value per example, {counted.shape}, got shape {values.shape}.")
    total = jnp.sum(jnp.where(counted, widened(values), 0))
    terms.append(total / jnp.maximum(jnp.sum(counted), 1))
  return narrowed(terms[0] + jnp.asarray(weight, terms[1].dtype) * terms[1], values.dtype)


def _counted(name, inputs, where):
  """Inputs without those of examples that do not count, which may be no numbers; and which do."""
  inputs = as_array(name, inputs)
  if inputs.ndim < 1:
    raise ValueError(f"{name} must have a leading axis of examples, got a scalar.")
  counted = example_mask(where, inputs.shape[:1])
  return jnp.where(counted.reshape(-1, *[1] * (inputs.ndim - 1)), inputs, 0), counted


def _binary(labels, shape):
  """Labels 0 and 1, and which are."""
  if not jnp.issubdtype(dtype_of("labels", labels), jnp.integer) or jnp.shape(labels) != shape:
    raise ValueError(f"labels must be integers, one per input, expected shape {shape}, got {jnp.shape(labels)}.")
  return counted_labels(widened_integers(as_array("labels", labels)), 2)


def _lost_margin(margins, curvature):
  """The s in [0, 1 / (2 k)] that maximises `softplus(s - m) - k s^2`.

  The derivative `sigmoid(s - m) - 2 k s` falls, rises between the points where the loss's curvature is 2 k (none if
  2 k >= 1 / 4), and falls again: one local maximum before them, one after, of which the higher is taken.
  """
  largest = 1 / (2 * curvature)
  root = jnp.sqrt(jnp.maximum(1 - 8 * curvature, 0))
  # Where sigmoid (1 - sigmoid) = 2 k; without the root's cancellation at small k.
  half = 2 * jnp.arctanh(jnp.minimum(root, 1 - jnp.finfo(margins.dtype).eps))
  left, right = (jnp.clip(margins + side, 0, largest) for side in (-half, half))
  slope = lambda s: jax.nn.sigmoid(s - margins) - 2 * curvature * s

  def halved(_, bracket):
    low, high = bracket
    middle = (low + high) / 2
    rises = slope(middle) > 0
    return jnp.where(rises, middle, low), jnp.where(rises, high, middle)

  def polished(_, s):
    # The digits that halving leaves out: small losses of margin are as precise as large ones.
    share = jax.nn.sigmoid(s - margins)
    step = (share - 2 * curvature * s) / (share * (1 - share) - 2 * curvature)
    ahead = jnp.maximum(s - step, 0)
    closer = jnp.abs(slope(ahead)) <= jnp.abs(slope(s))
    return jnp.where(closer, ahead, s)

  found = []
  for bracket in ((jnp.zeros_like(margins), left), (right, jnp.broadcast_to(largest, margins.shape))):
    low, high = jax.lax.fori_loop(0, _HALVINGS, halved, bracket)
    found.append(jax.lax.fori_loop(0, _NEWTON_STEPS, polished, (low + high) / 2))
  values = [jax.nn.softplus(s - margins) - curvature * s**2 for s in found]
  chosen = jnp.where(values[1] > values[0], found[1], found[0])
  return jnp.where(jnp.isnan(margins * curvature), jnp.nan, chosen)


def _axes(array):
  return tuple(range(1, array.ndim))


def _cost(offset, cost):
  squared = jnp.sum(offset**2, axis=_axes(offset))
  if cost == "squared_l2":
    return squared
  return jnp.where(squared > 0, jnp.sqrt(jnp.where(squared > 0, squared, 1)), squared)


def _ascent(loss_of, start, price, size, cost):
  """A step of gradient ascent."""

  def step(z):
    slope = jax.grad(lambda z: jnp.sum(loss_of(z)))(z).astype(z.dtype)
    offset = z - start
    if cost == "squared_l2":
      return z + size * (slope - 2 * price * offset)
    length = lambda array: jnp.sqrt(jnp.sum(array**2, axis=_axes(array), keepdims=True))
    away, steep = length(offset), length(slope)
    # At the input itself the cost has a kink: leave it where the loss is steeper.
    leaving = slope * jnp.maximum(1 - price / jnp.where(steep > 0, steep, 1), 0)
    going = slope - price * offset / jnp.where(away > 0, away, 1)
    return z + size * jnp.where(away > 0, going, leaving)

  return step


def _newton(loss_of, start, price, size, cost):
  """A Newton step of every example."""
  del size, cost
  entries = math.prod(start.shape[1:])
  identity = jnp.eye(entries, dtype=start.dtype)

  def step(z):
    total = lambda flat: jnp.sum(loss_of(flat.reshape(z.shape))).astype(z.dtype)
    flat = z.reshape(len(z), entries)
    gradient = jax.grad(total)
    # Examples are independent: a direction of all of them at once gives a row of each one's Hessian.
    along = lambda direction: jax.jvp(gradient, (flat,), (jnp.broadcast_to(direction, flat.shape),))[1]
    hessians = jnp.moveaxis(jax.vmap(along)(identity), 0, 1)
    slope = gradient(flat) - 2 * price * (flat - start.reshape(flat.shape))
    change = jnp.linalg.solve(2 * price * identity - hessians, slope[..., None])[..., 0]
    return (flat + change).reshape(z.shape)

  return step
