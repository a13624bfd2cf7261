"""Losses of the spherical family: the Z-loss and its siblings, functions of a logit, the logits' sum and square sum."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxreg.checks import as_array, check_float, check_hyperparameter, check_same_shape
from jaxreg.losses.labelled_logits import classes_last, labelled, narrowed, widened
from jaxreg.losses.softmax_family import of_label, with_label

__all__ = [
  "SphericalStatistics",
  "log_partition_penalty",
  "one_hot_squared_error_from_statistics",
  "one_hot_squared_error_loss",
  "spherical_softmax_from_statistics",
  "spherical_softmax_loss",
  "spherical_statistics",
  "taylor_softmax_from_statistics",
  "taylor_softmax_loss",
  "z_loss",
  "z_loss_from_statistics",
]

# Above it 1 is lost beside the square of a logit in float32, and far below it the square does not overflow.
_LARGE = 1e8


class SphericalStatistics(NamedTuple):
  """All that a loss of the spherical family reads of an example's logits."""

  target: jax.Array  # the label's logit, [...] (or [..., k] for a target of k classes)
  total: jax.Array  # sum of all logits, [...]
  square_total: jax.Array  # sum of their squares, [...]


def spherical_statistics(
  logits: ArrayLike, labels: ArrayLike, *, axis: int = -1, where: ArrayLike | None = None
) -> SphericalStatistics:
  """The label's logit `o_y`, `s = sum_k o_k` and `q = sum_k o_k^2`.

  `jaxreg.solvers.factored_output` computes them without the logits.

  >>> import jax.numpy as jnp
  >>> statistics = spherical_statistics(jnp.array([[3.0, 1.0]]), jnp.array([0]))
  >>> [value.tolist() for value in statistics]
  [[3.0], [4.0], [10.0]]

  Args:
    logits: floating `[..., classes]`.
    labels: integers `[...]`.
    axis: the axis of the classes.
    where: boolean, broadcasting against `logits`: the classes that take part, the label among them.

  Returns:
    Three arrays `[...]`, in float32 at least.

  Raises:
    ValueError: when labels do not fit the logits.

  Reference: Vincent, de Brebisson, Bouthillier, "Efficient Exact Gradient Update for Training Deep Networks with Very
    Large Sparse Targets", NeurIPS 2015, the spherical family.
  """
  batch = labelled(logits, labels, axis=axis, where=where)
  wide = batch.logits
  parts = of_label(wide, batch.labels)[..., 0], jnp.sum(wide, -1), jnp.sum(wide * wide, -1)
  return SphericalStatistics(*(jnp.where(batch.counted, part, 0) for part in parts))


def z_loss(
  logits: ArrayLike,
  labels: ArrayLike,
  *,
  sharpness: ArrayLike = 1.0,
  location: ArrayLike = 0.0,
  epsilon: ArrayLike = 1e-12,
  axis: int = -1,
  where: ArrayLike | None = None,
) -> jax.Array:
  """The Z-loss `softplus(a (b - z_y)) / a` of the standardized logit `z_y = (o_y - mean(o)) / (std(o) + epsilon)`.

  It does not change when all logits are shifted or multiplied by a positive number, so it trains a ranking and gives no
  probabilities. Since `|z_y| <= sqrt(classes - 1)`, a location much above that has no effect but a constant slope.
  Equal logits have `z_y = 0` and gradient 0. `log_partition_penalty` is what language models call "z-loss".

  >>> import jax.numpy as jnp
  >>> logits, labels = jnp.array([[3.0, 1.0, 2.0]]), jnp.array([0])
  >>> [round(float(z_loss(scale * logits + 7, labels)[0]), 3) for scale in (1.0, 100.0)]
  [0.258, 0.258]

  Args:
    logits: floating `[..., classes]`.
    labels: integers `[...]`.
    sharpness: the paper's a, positive: hinge `max(0, b - z_y)` at infinity, linear in `z_y` towards 0; may be traced.
    location: the paper's b, the standardized logit that the label should reach; may be traced.
    epsilon: non-negative, added to the standard deviation; may be traced.
    axis: the axis of the classes.
    where: boolean, broadcasting against `logits`: the classes that take part, the label among them.

  Returns:
    `[...]`, the loss of each example.

  Raises:
    ValueError: when labels do not fit the logits or a hyperparameter is out of range.

  Reference: de Brebisson, Vincent, "The Z-loss: a shift and scale invariant classification loss belonging to the
    Spherical Family", 2016 (arXiv:1604.08859); the form in a and b, epsilon as in the authors' code.
  """
  batch = labelled(logits, labels, axis=axis, where=where)
  epsilon = batch.hyperparameter("epsilon", epsilon, low=0, scalar=True)
  return batch.values(_of_standardized(_standardized_label(batch, epsilon), sharpness, location))


def z_loss_from_statistics(
  statistics: SphericalStatistics,
  *,
  classes: ArrayLike,
  sharpness: ArrayLike = 1.0,
  location: ArrayLike = 0.0,
  epsilon: ArrayLike = 1e-12,
) -> jax.Array:
  """The Z-loss with `mean = s / classes` and `std = sqrt(q / classes - mean^2)`.

  The variance cancels when the logits' mean is far larger than their deviation; `solvers.factored_output` therefore
  keeps them centred. It is kept where `|z_y| <= sqrt(classes - 1)`, which holds for any logits.

  >>> import jax.numpy as jnp
  >>> statistics = spherical_statistics(jnp.array([[3.0, 1.0, 2.0]]), jnp.array([0]))
  >>> round(float(z_loss_from_statistics(statistics, classes=3)[0]), 3)
  0.258

  Args:
    statistics: of each example, floating `[...]`.
    classes: number of classes; may be traced.
    sharpness: see `z_loss`.
    location: see `z_loss`.
    epsilon: see `z_loss`.

  Returns:
    `[...]`, the loss of each example.

  Raises:
    ValueError: when the statistics have different shapes or a hyperparameter is out of range.

  Reference: de Brebisson, Vincent, "The Z-loss: a shift and scale invariant classification loss belonging to the
    Spherical Family", 2016 (arXiv:1604.08859).
  """
  target, total, square_total = _checked(statistics, classes)
  check_hyperparameter("epsilon", epsilon, low=0, shape=target.shape)
  mean = total / classes
  deviation = target - mean
  variance = square_total / classes - mean * mean
  least = deviation * deviation / jnp.maximum(classes - 1, 1)
  variance = jnp.where(variance < least, least, variance)
  flat = variance == 0
  standardized = deviation / (jnp.sqrt(jnp.where(flat, 1, variance)) + epsilon)
  standardized = jnp.where(flat, 0, standardized)
  return narrowed(_of_standardized(standardized, sharpness, location), statistics.target.dtype)


def taylor_softmax_loss(
  logits: ArrayLike, labels: ArrayLike, *, axis: int = -1, where: ArrayLike | None = None
) -> jax.Array:
  """The log-Taylor-softmax `-log((1 + o_y + o_y^2 / 2) / sum_k (1 + o_k + o_k^2 / 2))`.

  >>> import jax.numpy as jnp
  >>> round(float(jnp.exp(-taylor_softmax_loss(jnp.array([[2.0, 0.0]]), jnp.array([1])))[0]), 4)
  0.1667

  Args:
    logits: floating `[..., classes]`.
    labels: integers `[...]`.
    axis: the axis of the classes.
    where: boolean, broadcasting against `logits`: the classes that take part, the label among them.

  Returns:
    `[...]`, the loss of each example.

  Raises:
    ValueError: when labels do not fit the logits.

  Reference: de Brebisson, Vincent, "An Exploration of Softmax Alternatives Belonging to the Spherical Loss Family",
    ICLR 2016, the Taylor softmax.
  """
  batch = labelled(logits, labels, axis=axis, where=where)
  wide, where = batch.logits, batch.where
  # Terms are divided by the square of a bound, a constant of the loss, lest they overflow.
  bound = jnp.maximum(jax.lax.stop_gradient(jnp.max(jnp.abs(wide), -1, keepdims=True, where=where, initial=0)), 1)
  small = wide / bound
  terms = 1 / bound / bound + small / bound + small * small / 2
  normalizer = jnp.log(jnp.sum(terms, -1, where=where)) + 2 * jnp.log(bound[..., 0])
  return batch.values(normalizer - _log_taylor(of_label(wide, batch.labels)[..., 0]))


def taylor_softmax_from_statistics(statistics: SphericalStatistics, *, classes: ArrayLike) -> jax.Array:
  """The log-Taylor-softmax loss with the normalizer `classes + s + q / 2`.

  >>> import jax.numpy as jnp
  >>> statistics = spherical_statistics(jnp.array([[2.0, 0.0]]), jnp.array([1]))
  >>> round(float(jnp.exp(-taylor_softmax_from_statistics(statistics, classes=2))[0]), 4)
  0.1667

  Args:
    statistics: of each example, floating `[...]`.
    classes: number of classes; may be traced.

  Returns:
    `[...]`, the loss of each example.

  Raises:
    ValueError: when the statistics have different shapes or `classes` is not positive.

  Reference: de Brebisson, Vincent, "An Exploration of Softmax Alternatives Belonging to the Spherical Loss Family",
    ICLR 2016, the Taylor softmax.
  """
  target, total, square_total = _checked(statistics, classes)
  normalizer = classes + total + square_total / 2
  least = classes / 2  # each class contributes at least a half
  normalizer = jnp.where(normalizer < least, least, normalizer)
  return narrowed(jnp.log(normalizer) - _log_taylor(target), statistics.target.dtype)


def spherical_softmax_loss(
  logits: ArrayLike,
  labels: ArrayLike,
  *,
  epsilon: ArrayLike = 1e-3,
  axis: int = -1,
  where: ArrayLike | None = None,
) -> jax.Array:
  """The log-spherical-softmax `-log((o_y^2 + epsilon) / sum_k (o_k^2 + epsilon))`.

  It does not tell a logit's sign. The default epsilon is ours.

  >>> import jax.numpy as jnp
  >>> round(float(jnp.exp(-spherical_softmax_loss(jnp.array([[3.0, 1.0]]), jnp.array([0]), epsilon=1.0))[0]), 4)
  0.8333

  Args:
    logits: floating `[..., classes]`.
    labels: integers `[...]`.
    epsilon: positive; may be traced.
    axis: the axis of the classes.
    where: boolean, broadcasting against `logits`: the classes that take part, the label among them.

  Returns:
    `[...]`, the loss of each example.

  Raises:
    ValueError: when labels do not fit the logits or `epsilon` is not positive.

  Reference: de Brebisson, Vincent, "An Exploration of Softmax Alternatives Belonging to the Spherical Loss Family",
    ICLR 2016, the spherical softmax.
  """
  batch = labelled(logits, labels, axis=axis, where=where)
  epsilon = batch.hyperparameter("epsilon", epsilon, low=0, open_low=True, scalar=True)
  wide, where = batch.logits, batch.where
  bound = jnp.maximum(jax.lax.stop_gradient(jnp.max(jnp.abs(wide), -1, keepdims=True, where=where, initial=0)), 1)
  small = wide / bound
  normalizer = jnp.log(jnp.sum(small * small + epsilon / bound / bound, -1, where=where)) + 2 * jnp.log(bound[..., 0])
  return batch.values(normalizer - _log_square(of_label(wide, batch.labels)[..., 0], epsilon))


def spherical_softmax_from_statistics(
  statistics: SphericalStatistics, *, classes: ArrayLike, epsilon: ArrayLike = 1e-3
) -> jax.Array:
  """The log-spherical-softmax loss with the normalizer `q + classes * epsilon`.

  >>> import jax.numpy as jnp
  >>> statistics = spherical_statistics(jnp.array([[3.0, 1.0]]), jnp.array([0]))
  >>> round(float(jnp.exp(-spherical_softmax_from_statistics(statistics, classes=2, epsilon=1.0))[0]), 4)
  0.8333

  Args:
    statistics: of each example, floating `[...]`.
    classes: number of classes; may be traced.
    epsilon: positive; may be traced.

  Returns:
    `[...]`, the loss of each example.

  Raises:
    ValueError: when the statistics have different shapes or a hyperparameter is out of range.

  Reference: de Brebisson, Vincent, "An Exploration of Softmax Alternatives Belonging to the Spherical Loss Family",
    ICLR 2016, the spherical softmax.
  """
  target, _, square_total = _checked(statistics, classes)
  check_hyperparameter("epsilon", epsilon, low=0, open_low=True, shape=target.shape)
  square_total = jnp.where(square_total < 0, 0, square_total)
  values = jnp.log(square_total + classes * epsilon) - _log_square(target, epsilon)
  return narrowed(values, statistics.target.dtype)


def one_hot_squared_error_loss(
  logits: ArrayLike, labels: ArrayLike, *, axis: int = -1, where: ArrayLike | None = None
) -> jax.Array:
  """The squared error of the logits themselves to the one-hot label: `sum_k (o_k - [k = y])^2`.

  >>> import jax.numpy as jnp
  >>> one_hot_squared_error_loss(jnp.array([[3.0, 1.0]]), jnp.array([0])).tolist()
  [5.0]

  Args:
    logits: floating `[..., classes]`.
    labels: integers `[...]`.
    axis: the axis of the classes.
    where: boolean, broadcasting against `logits`: the classes that take part, the label among them.

  Returns:
    `[...]`, the loss of each example.

  Raises:
    ValueError: when labels do not fit the logits.

  Reference: Vincent, de Brebisson, Bouthillier, "Efficient Exact Gradient Update for Training Deep Networks with Very
    Large Sparse Targets", NeurIPS 2015, the squared error.
  """
  batch = labelled(logits, labels, axis=axis, where=where)
  difference = with_label(batch.logits, batch.labels, of_label(batch.logits, batch.labels) - 1)
  return batch.values(jnp.sum(difference * difference, -1, where=batch.where))


def one_hot_squared_error_from_statistics(statistics: SphericalStatistics) -> jax.Array:
  """The squared error to the one-hot label, `q - 2 o_y + 1`.

  >>> import jax.numpy as jnp
  >>> one_hot_squared_error_from_statistics(spherical_statistics(jnp.array([[3.0, 1.0]]), jnp.array([0]))).tolist()
  [5.0]

  Args:
    statistics: of each example, floating `[...]`.

  Returns:
    `[...]`, the loss of each example.

  Raises:
    ValueError: when the statistics have different shapes.

  Reference: Vincent, de Brebisson, Bouthillier, "Efficient Exact Gradient Update for Training Deep Networks with Very
    Large Sparse Targets", NeurIPS 2015, the squared error.
  """
  target, _, square_total = _checked(statistics, 1)
  others = square_total - target * target
  others = jnp.where(others < 0, 0, others)
  return narrowed(others + (target - 1) ** 2, statistics.target.dtype)


def log_partition_penalty(logits: ArrayLike, *, axis: int = -1, where: ArrayLike | None = None) -> jax.Array:
  """The squared log-partition function `(log sum_k exp(z_k))^2`, which language models add with a weight near 1e-4.

  It is often called "z-loss" and has nothing to do with `z_loss` here.

  >>> import jax.numpy as jnp
  >>> [round(value, 3) for value in log_partition_penalty(jnp.array([[0.0, 0.0], [2.0, -1e4]])).tolist()]
  [0.48, 4.0]

  Args:
    logits: floating `[..., classes]`.
    axis: the axis of the classes.
    where: boolean, broadcasting against `logits`: the classes that take part.

  Returns:
    `[...]`, the penalty of each example.

  Raises:
    ValueError: when the logits are not floating point.

  Reference: Zoph, Bello, Kumar, Du, Huang, Dean, Shazeer, Fedus, "ST-MoE: Designing Stable and Transferable Sparse
    Expert Models", 2022 (arXiv:2202.08906), equation 5, there for the logits of a router.
  """
  logits = as_array("logits", logits)
  wide, where = classes_last(logits, axis=axis, where=where)
  log_partition = jax.nn.logsumexp(wide, axis=-1, where=where)
  if where is not None:  # of no class at all
    log_partition = jnp.where(jnp.any(where, axis=-1), log_partition, 0)
  return narrowed(jnp.square(log_partition), logits.dtype)


def _checked(statistics, classes):
  for name, value in statistics._asdict().items():
    check_float(name, value)
  check_same_shape(**statistics._asdict())
  check_hyperparameter("classes", classes, low=1, shape=jnp.shape(statistics.target))
  return tuple(map(widened, statistics))


def _standardized_label(batch, epsilon):
  """`z_y` in two passes, in units of the logits' range, so that neither shift nor scale costs accuracy."""
  wide, labels, where = batch.logits, batch.labels, batch.where
  classes = wide.shape[-1] if where is None else jnp.sum(where, axis=-1, keepdims=True).astype(wide.dtype)
  constant = jax.lax.stop_gradient(wide)
  highest = jnp.max(constant, -1, keepdims=True, where=where, initial=-jnp.inf)
  span = highest - jnp.min(constant, -1, keepdims=True, where=where, initial=jnp.inf)
  flat = span <= 0  # not so of what is no number
  unit = jnp.where(flat, 1, span)
  # The highest logit goes first: were it the mean, its rounding would be all that is left of equal logits.
  scaled = ((wide if where is None else jnp.where(where, wide, highest)) - highest) / unit
  per_class = lambda x: jnp.sum(x, -1, keepdims=True, where=where) / classes
  centred = scaled - per_class(scaled)
  variance = per_class(centred * centred)
  deviation = jnp.sqrt(jnp.where(flat, 1, variance)) + epsilon / unit
  return jnp.where(flat, 0, of_label(centred, labels) / deviation)[..., 0]


def _of_standardized(standardized, sharpness, location):
  check_hyperparameter("sharpness", sharpness, low=0, open_low=True, shape=standardized.shape)
  check_hyperparameter("location", location, shape=standardized.shape)
  return jax.nn.softplus(sharpness * (location - standardized)) / sharpness


def _log_taylor(x):
  """`log(1 + x + x^2 / 2)` without overflow."""
  large = jnp.abs(x) > _LARGE
  inner, outer = jnp.where(large, 0, x), jnp.where(large, x, 1)
  beyond = 2 * jnp.log(jnp.abs(outer)) - math.log(2) + jnp.log1p(2 / outer * (1 + 1 / outer))
  return jnp.where(large, beyond, jnp.log1p(inner + inner * inner / 2))


def _log_square(x, epsilon):
  """`log(x^2 + epsilon)` without overflow."""
  large = jnp.abs(x) > _LARGE
  inner, outer = jnp.where(large, 0, x), jnp.where(large, x, 1)
  return jnp.where(large, 2 * jnp.log(jnp.abs(outer)), jnp.log(inner * inner + epsilon))
