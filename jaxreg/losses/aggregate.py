"""Losses for bags of examples of which only the mean response is known."""

import jax
import jax.numpy as jnp

from jaxreg.checks import check_float, check_hyperparameter

__all__ = [
  "bag_cross_entropy_loss",
  "bag_squared_loss",
  "instance_cross_entropy_loss",
  "instance_squared_loss",
  "interpolated_bag_cross_entropy_loss",
  "interpolated_bag_squared_loss",
  "within_bag_spread",
]


def bag_squared_loss(predictions: jax.Array, targets: jax.Array, *, where: jax.Array | None = None) -> jax.Array:
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
  wide, targets, where = _prepare(predictions, targets, where)
  return jnp.square(_mean(wide, where) - targets).astype(predictions.dtype)


def instance_squared_loss(predictions: jax.Array, targets: jax.Array, *, where: jax.Array | None = None) -> jax.Array:
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
  wide, targets, where = _prepare(predictions, targets, where)
  return _mean(jnp.square(wide - targets[..., None]), where).astype(predictions.dtype)


def within_bag_spread(predictions: jax.Array, *, where: jax.Array | None = None) -> jax.Array:
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
  wide, _, where = _prepare(predictions, None, where)
  return _mean(jnp.square(wide - _mean(wide, where)[..., None]), where).astype(predictions.dtype)


def interpolated_bag_squared_loss(
  predictions: jax.Array, targets: jax.Array, *, rho: float | jax.Array, where: jax.Array | None = None
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
  check_hyperparameter("rho", rho, low=0)
  wide, targets, where = _prepare(predictions, targets, where)
  mean = _mean(wide, where)
  spread = _mean(jnp.square(wide - mean[..., None]), where)
  return (jnp.square(mean - targets) + rho * spread).astype(predictions.dtype)


def bag_cross_entropy_loss(logits: jax.Array, targets: jax.Array, *, where: jax.Array | None = None) -> jax.Array:
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
  log_probabilities, targets, where = _prepare_classes(logits, targets, where)
  exists = None if where is None else where[..., None]
  count = logits.shape[-2] if where is None else jnp.sum(exists, axis=-2)
  total = jax.nn.logsumexp(log_probabilities, axis=-2, where=exists)
  log_mean = total - jnp.log(jnp.asarray(count, total.dtype))
  # A class that is not in the bag takes no part, however unlikely it is.
  return -jnp.sum(targets * jnp.where(targets > 0, log_mean, 0), axis=-1).astype(logits.dtype)


def instance_cross_entropy_loss(logits: jax.Array, targets: jax.Array, *, where: jax.Array | None = None) -> jax.Array:
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
  log_probabilities, targets, where = _prepare_classes(logits, targets, where)
  targets = targets[..., None, :]
  terms = -jnp.sum(targets * jnp.where(targets > 0, log_probabilities, 0), axis=-1)
  return _mean(terms, where).astype(logits.dtype)


def interpolated_bag_cross_entropy_loss(
  logits: jax.Array, targets: jax.Array, *, rho: float | jax.Array, where: jax.Array | None = None
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
  check_hyperparameter("rho", rho, low=0, high=1)
  bag = bag_cross_entropy_loss(logits, targets, where=where)
  return ((1 - rho) * bag + rho * instance_cross_entropy_loss(logits, targets, where=where)).astype(logits.dtype)


def _prepare(predictions, targets, where):
  check_float("predictions", predictions)
  if jnp.ndim(predictions) < 1:
    raise ValueError("predictions must have an axis of the bag's examples, got a scalar.")
  _check_targets(targets, jnp.shape(predictions)[:-1])
  dtype = jnp.promote_types(predictions.dtype, jnp.float32)
  where = None if where is None else jnp.broadcast_to(where, predictions.shape)
  return predictions.astype(dtype), None if targets is None else targets.astype(dtype), where


def _prepare_classes(logits, targets, where):
  check_float("logits", logits)
  if jnp.ndim(logits) < 2:
    raise ValueError(f"logits must be [..., bag_size, classes], got shape {jnp.shape(logits)}.")
  _check_targets(targets, (*jnp.shape(logits)[:-2], jnp.shape(logits)[-1]))
  dtype = jnp.promote_types(logits.dtype, jnp.float32)
  where = None if where is None else jnp.broadcast_to(where, logits.shape[:-1])
  return jax.nn.log_softmax(logits.astype(dtype)), targets.astype(dtype), where


def _check_targets(targets, shape):
  if targets is None:
    return
  check_float("targets", targets)
  if jnp.shape(targets) != shape:
    raise ValueError(f"targets must have the shape {shape}, one for each bag, got {jnp.shape(targets)}.")


def _mean(values, where):
  return jnp.mean(values, axis=-1, where=where)
