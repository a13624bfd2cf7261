"""Losses for bags of examples of which only the mean response is known."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxreg.checks import as_array, broadcasts, check_float, check_hyperparameter
from jaxreg.losses.labelled_logits import narrowed, widened

__all__ = [
  "bag_cross_entropy_loss",
  "bag_squared_loss",
  "instance_cross_entropy_loss",
  "instance_squared_loss",
  "interpolated_bag_cross_entropy_loss",
  "interpolated_bag_squared_loss",
  "within_bag_spread",
]


def bag_squared_loss(predictions: ArrayLike, targets: ArrayLike, *, where: ArrayLike | None = None) -> jax.Array:
  """Squared error of a bag's mean prediction, `(mean_i f_i - y)^2`: unbiased, of high variance.

  >>> import jax.numpy as jnp
  >>> bag_squared_loss(jnp.array([[1.0, 3.0]]), jnp.array([1.0])).tolist()
  [1.0]

  Args:
    predictions: floating `[..., bag_size]`.
    targets: floating `[...]`, the mean response of each bag.
    where: boolean, broadcasting against `predictions`: the examples that exist, for bags of different sizes.

  Returns:
    `[...]`, the loss of each bag.

  Raises:
    ValueError: when targets do not fit the predictions.

  Reference: Javanmard, Chen, Mirrokni, Badanidiyuru, Fu, "Learning from Aggregate Responses: Instance Level versus Bag
    Level Loss Functions", ICLR 2024, the bag-level loss.
  """
  bags = _squared(predictions, targets, where)
  return bags.values(jnp.square(bags.mean(bags.array) - bags.targets))


def instance_squared_loss(predictions: ArrayLike, targets: ArrayLike, *, where: ArrayLike | None = None) -> jax.Array:
  """Mean squared error of all predictions of a bag to its mean response: biased towards it, of low variance.

  It is `bag_squared_loss + within_bag_spread`.

  >>> import jax.numpy as jnp
  >>> instance_squared_loss(jnp.array([[1.0, 3.0]]), jnp.array([1.0])).tolist()
  [2.0]

  Args:
    predictions: floating `[..., bag_size]`.
    targets: floating `[...]`, the mean response of each bag.
    where: boolean, broadcasting against `predictions`: the examples that exist.

  Returns:
    `[...]`, the loss of each bag.

  Raises:
    ValueError: when targets do not fit the predictions.

  Reference: Javanmard et al., ICLR 2024, the instance-level loss.
  """
  bags = _squared(predictions, targets, where)
  return bags.values(bags.mean(jnp.square(bags.array - bags.targets[..., None])))


def within_bag_spread(predictions: ArrayLike, *, where: ArrayLike | None = None) -> jax.Array:
  """Variance of the predictions within a bag, by which the instance-level squared loss exceeds the bag-level one.

  >>> import jax.numpy as jnp
  >>> within_bag_spread(jnp.array([[1.0, 3.0]])).tolist()
  [1.0]

  Args:
    predictions: floating `[..., bag_size]`.
    where: boolean, broadcasting against `predictions`: the examples that exist.

  Returns:
    `[...]`, the spread of each bag.

  Raises:
    ValueError: when `predictions` are not floating point.

  Reference: Javanmard et al., ICLR 2024, the regulariser that relates the two losses.
  """
  bags = _squared(predictions, _NO_TARGETS, where)
  return bags.values(_spread(bags))


def interpolated_bag_squared_loss(
  predictions: ArrayLike, targets: ArrayLike, *, rho: ArrayLike, where: ArrayLike | None = None
) -> jax.Array:
  """`bag_squared_loss + rho * within_bag_spread`: from the bag-level loss (0) to the instance-level one (1) and beyond.

  >>> import jax.numpy as jnp
  >>> interpolated_bag_squared_loss(jnp.array([[1.0, 3.0]]), jnp.array([1.0]), rho=0.25).tolist()
  [1.25]

  Args:
    predictions: floating `[..., bag_size]`.
    targets: floating `[...]`, the mean response of each bag.
    rho: non-negative weight of the spread; may be traced.
    where: boolean, broadcasting against `predictions`: the examples that exist.

  Returns:
    `[...]`, the loss of each bag.

  Raises:
    ValueError: when targets do not fit the predictions or `rho` is negative.

  Reference: Javanmard et al., ICLR 2024, the interpolating estimator.
  """
  bags = _squared(predictions, targets, where)
  check_hyperparameter("rho", rho, low=0, shape=bags.targets.shape)
  return bags.values(jnp.square(bags.mean(bags.array) - bags.targets) + rho * _spread(bags))


def bag_cross_entropy_loss(logits: ArrayLike, targets: ArrayLike, *, where: ArrayLike | None = None) -> jax.Array:
  """Cross-entropy of a bag's label proportions to the mean of its predicted probabilities.

  >>> import jax.numpy as jnp
  >>> logits = jnp.log(jnp.array([[[0.9, 0.1], [0.1, 0.9]]]))
  >>> round(float(bag_cross_entropy_loss(logits, jnp.array([[0.5, 0.5]]))[0]), 3)  # both halves on average
  0.693

  Args:
    logits: floating `[..., bag_size, classes]`.
    targets: floating `[..., classes]`, the share of each class in the bag.
    where: boolean, broadcasting against `[..., bag_size]`: the examples that exist.

  Returns:
    `[...]`, the loss of each bag.

  Raises:
    ValueError: when targets do not fit the logits.

  Reference: Javanmard et al., ICLR 2024, the bag-level loss for classification.
  """
  bags = _classes(logits, targets, where)
  return bags.values(_bag_cross_entropy(bags))


def instance_cross_entropy_loss(logits: ArrayLike, targets: ArrayLike, *, where: ArrayLike | None = None) -> jax.Array:
  """Mean cross-entropy of a bag's label proportions to each of its predictions; at least the bag-level loss.

  >>> import jax.numpy as jnp
  >>> logits = jnp.log(jnp.array([[[0.9, 0.1], [0.1, 0.9]]]))
  >>> round(float(instance_cross_entropy_loss(logits, jnp.array([[0.5, 0.5]]))[0]), 3)
  1.204

  Args:
    logits: floating `[..., bag_size, classes]`.
    targets: floating `[..., classes]`, the share of each class in the bag.
    where: boolean, broadcasting against `[..., bag_size]`: the examples that exist.

  Returns:
    `[...]`, the loss of each bag.

  Raises:
    ValueError: when targets do not fit the logits.

  Reference: Javanmard et al., ICLR 2024, the instance-level loss for classification.
  """
  bags = _classes(logits, targets, where)
  return bags.values(_instance_cross_entropy(bags))


def interpolated_bag_cross_entropy_loss(
  logits: ArrayLike, targets: ArrayLike, *, rho: ArrayLike, where: ArrayLike | None = None
) -> jax.Array:
  """`(1 - rho) * bag_cross_entropy_loss + rho * instance_cross_entropy_loss`.

  >>> import jax.numpy as jnp
  >>> logits = jnp.log(jnp.array([[[0.9, 0.1], [0.1, 0.9]]]))
  >>> round(float(interpolated_bag_cross_entropy_loss(logits, jnp.array([[0.5, 0.5]]), rho=0.5)[0]), 3)
  0.949

  Args:
    logits: floating `[..., bag_size, classes]`.
    targets: floating `[..., classes]`, the share of each class in the bag.
    rho: in [0, 1]; may be traced.
    where: boolean, broadcasting against `[..., bag_size]`: the examples that exist.

  Returns:
    `[...]`, the loss of each bag.

  Raises:
    ValueError: when targets do not fit the logits or `rho` is out of range.

  Reference: Javanmard et al., ICLR 2024, the interpolating estimator.
  """
  bags = _classes(logits, targets, where)
  check_hyperparameter("rho", rho, low=0, high=1, shape=bags.targets.shape[:-1])
  return bags.values((1 - rho) * _bag_cross_entropy(bags) + rho * _instance_cross_entropy(bags))


_NO_TARGETS = object()


class _Bags(NamedTuple):
  """Bags as the losses compute with them."""

  array: jax.Array  # predictions or log-probabilities, float32 at least; those of examples that do not exist are 0
  targets: jax.Array | None
  where: jax.Array | None  # booleans [..., bag_size], all of them true in an empty bag
  exists: jax.Array | bool  # booleans [...]: which bags have an example
  dtype: np.dtype  # of the result

  def mean(self, values):
    """The mean over the examples of each bag."""
    return jnp.mean(values, axis=-1, where=self.where)

  def values(self, values):
    """A loss as it is returned: 0 for empty bags."""
    return narrowed(jnp.where(self.exists, values, 0), self.dtype)


def _spread(bags):
  return bags.mean(jnp.square(bags.array - bags.mean(bags.array)[..., None]))


def _bag_cross_entropy(bags):
  exists = None if bags.where is None else bags.where[..., None]
  total = jax.nn.logsumexp(bags.array, axis=-2, where=exists)
  count = jnp.asarray(bags.array.shape[-2]) if bags.where is None else jnp.sum(bags.where, axis=-1)[..., None]
  log_mean = total - jnp.log(count.astype(total.dtype))
  # A class that is not in the bag takes no part, however unlikely it is.
  return -jnp.sum(bags.targets * jnp.where(bags.targets > 0, log_mean, 0), axis=-1)


def _instance_cross_entropy(bags):
  targets = bags.targets[..., None, :]
  return bags.mean(-jnp.sum(targets * jnp.where(targets > 0, bags.array, 0), axis=-1))


def _squared(predictions, targets, where):
  predictions = as_array("predictions", predictions)
  check_float("predictions", predictions)
  if predictions.ndim < 1:
    raise ValueError("predictions must have an axis of the bag's examples, got a scalar.")
  wide = widened(predictions)
  targets = None if targets is _NO_TARGETS else _prepared_targets(targets, predictions.shape[:-1], wide.dtype)
  wide, where, exists = _masked(wide, where, predictions.shape)
  return _Bags(wide, targets, where, exists, predictions.dtype)


def _classes(logits, targets, where):
  logits = as_array("logits", logits)
  check_float("logits", logits)
  if logits.ndim < 2:
    raise ValueError(f"logits must be [..., bag_size, classes], got shape {logits.shape}.")
  wide = widened(logits)
  targets = _prepared_targets(targets, (*logits.shape[:-2], logits.shape[-1]), wide.dtype)
  wide, where, exists = _masked(wide, where, logits.shape[:-1])
  return _Bags(jax.nn.log_softmax(wide), targets, where, exists, logits.dtype)


def _prepared_targets(targets, shape, dtype):
  targets = as_array("targets", targets)
  check_float("targets", targets)
  if targets.shape != shape:
    raise ValueError(f"targets must have the shape {shape}, one for each bag, got {targets.shape}.")
  return targets.astype(dtype)


def _masked(array, where, shape):
  """Zeros where no example exists, the mask (of an empty bag all examples), and which bags are not empty."""
  if where is None:
    return array, None, shape[-1] > 0
  where = as_array("where", where)
  if where.dtype != bool or not broadcasts(where.shape, shape):
    raise ValueError(
      f"where must be boolean and broadcast against bags {shape}, got shape {where.shape} of dtype {where.dtype}."
    )
  where = jnp.broadcast_to(where, shape)
  array = jnp.where(where.reshape(shape + (1,) * (array.ndim - len(shape))), array, 0)
  exists = jnp.any(where, axis=-1)
  return array, where | ~exists[..., None], exists
