"""Losses of the margin of a binary classifier with one logit, each one value per example."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from jaxreg.checks import as_array, check_float, check_hyperparameter, counted_labels, dtype_of, example_mask
from jaxreg.losses.labelled_logits import narrowed, widened

__all__ = [
  "MARGIN_LOSSES",
  "binary_exponential_loss",
  "binary_focal_loss",
  "binary_hinge_loss",
  "binary_logistic_loss",
  "binary_squared_hinge_loss",
]


def binary_logistic_loss(logits: ArrayLike, labels: ArrayLike) -> jax.Array:
  """The logistic loss `log(1 + exp(-m))` of the margin, binary cross-entropy.

  >>> import jax.numpy as jnp
  >>> [round(value, 3) for value in binary_logistic_loss(jnp.array([0.0, -2.0]), jnp.array([1, 1])).tolist()]
  [0.693, 2.127]

  Args:
    logits: floating `[...]` or `[..., 1]`, positive for class 1.
    labels: integers `[...]`, 0 or 1; others give a loss of 0.

  Returns:
    `[...]`.

  Raises:
    ValueError: when labels do not fit the logits.

  Reference: Bartlett, Jordan, McAuliffe, "Convexity, Classification, and Risk Bounds", JASA 2006, Section 1 (examples
    of margin losses).
  """
  return _of_margins(logits, labels, lambda margins: optax.sigmoid_binary_cross_entropy(margins, 1.0))


def binary_hinge_loss(logits: ArrayLike, labels: ArrayLike) -> jax.Array:
  """The hinge loss `max(1 - m, 0)` of the margin.

  >>> import jax.numpy as jnp
  >>> binary_hinge_loss(jnp.array([0.5, -2.0]), jnp.array([1, 0])).tolist()
  [0.5, 0.0]

  Args:
    logits: floating `[...]` or `[..., 1]`, positive for class 1.
    labels: integers `[...]`, 0 or 1; others give a loss of 0.

  Returns:
    `[...]`.

  Raises:
    ValueError: when labels do not fit the logits.

  Reference: Bartlett, Jordan, McAuliffe, "Convexity, Classification, and Risk Bounds", JASA 2006, Section 1 (examples
    of margin losses).
  """
  return _of_margins(logits, labels, lambda margins: optax.hinge_loss(margins, 1.0))


def binary_squared_hinge_loss(logits: ArrayLike, labels: ArrayLike) -> jax.Array:
  """The squared hinge loss `max(1 - m, 0)^2` of the margin.

  >>> import jax.numpy as jnp
  >>> binary_squared_hinge_loss(jnp.array([0.5, -2.0]), jnp.array([1, 0])).tolist()
  [0.25, 0.0]

  Args:
    logits: floating `[...]` or `[..., 1]`, positive for class 1.
    labels: integers `[...]`, 0 or 1; others give a loss of 0.

  Returns:
    `[...]`.

  Raises:
    ValueError: when labels do not fit the logits.

  Reference: Bartlett, Jordan, McAuliffe, "Convexity, Classification, and Risk Bounds", JASA 2006, Section 1 (examples
    of margin losses).
  """
  return _of_margins(logits, labels, lambda margins: jnp.square(optax.hinge_loss(margins, 1.0)))


def binary_exponential_loss(logits: ArrayLike, labels: ArrayLike) -> jax.Array:
  """The exponential loss `exp(-m)` of the margin, continued by its tangent near the end of the dtype's range.

  >>> import jax.numpy as jnp
  >>> [round(value, 3) for value in binary_exponential_loss(jnp.array([0.0, -1.0]), jnp.array([1, 1])).tolist()]
  [1.0, 2.718]

  Args:
    logits: floating `[...]` or `[..., 1]`, positive for class 1.
    labels: integers `[...]`, 0 or 1; others give a loss of 0.

  Returns:
    `[...]`.

  Raises:
    ValueError: when labels do not fit the logits.

  Reference: Bartlett, Jordan, McAuliffe, "Convexity, Classification, and Risk Bounds", JASA 2006, Section 1 (examples
    of margin losses).
  """
  batch = binary_margins(logits, labels)
  exponent = -batch.margins
  limit = log_limit(exponent.dtype)
  inside = jnp.exp(jnp.minimum(exponent, limit))
  return batch.values(jnp.where(exponent > limit, jnp.exp(limit) * (1 + exponent - limit), inside))


def binary_focal_loss(logits: ArrayLike, labels: ArrayLike, *, gamma: ArrayLike = 2.0) -> jax.Array:
  """The focal loss `(1 - p)^gamma (-log p)` with `p = sigmoid(m)` of the margin, without class weights.

  It is the one loss here that is not convex. Computed with `(1 - p)^gamma` as an exponential, its gradient is finite
  where `p` rounds to 1, at any `gamma`, which that of `optax.sigmoid_focal_loss` is not.

  >>> import jax.numpy as jnp
  >>> round(binary_focal_loss(jnp.array(0.0), jnp.array(1), gamma=1.0).item(), 3)
  0.347

  Args:
    logits: floating `[...]` or `[..., 1]`, positive for class 1.
    labels: integers `[...]`, 0 or 1; others give a loss of 0.
    gamma: non-negative; 0 is the logistic loss; may be traced.

  Returns:
    `[...]`.

  Raises:
    ValueError: when labels do not fit the logits or `gamma` is negative.

  Reference: Lin, Goyal, Girshick, He, Dollar, "Focal Loss for Dense Object Detection", ICCV 2017, equation 4.
  """
  batch = binary_margins(logits, labels)
  check_hyperparameter("gamma", gamma, low=0, shape=batch.margins.shape)
  weight = jnp.exp(-jnp.asarray(gamma, batch.margins.dtype) * jax.nn.softplus(batch.margins))
  return batch.values(weight * jax.nn.softplus(-batch.margins))


MARGIN_LOSSES = {
  "logistic": binary_logistic_loss,
  "hinge": binary_hinge_loss,
  "exponential": binary_exponential_loss,
  "squared_hinge": binary_squared_hinge_loss,
  "focal": binary_focal_loss,
}


class Margins(NamedTuple):
  """Margins `(2 y - 1) logits` as the losses compute with them, each `[...]`."""

  margins: jax.Array  # float32 at least; 0 where an example does not count
  counted: jax.Array  # booleans
  dtype: np.dtype  # of the logits as they came, and of the loss

  def values(self, values):
    """A loss as it is returned: 0 for examples that do not count, in the dtype of the logits."""
    return narrowed(jnp.where(self.counted, values, 0), self.dtype)


def binary_margins(logits, labels, where=None) -> Margins:
  """Margins shaped like the labels; those other than 0 and 1 do not count, nor do examples outside `where`."""
  logits, dtype = as_array("logits", logits), dtype_of("labels", labels)
  check_float("logits", logits)
  if not jnp.issubdtype(dtype, jnp.integer):
    raise ValueError(f"labels must be integers, 0 or 1, got dtype {dtype}.")
  labels = as_array("labels", labels)
  if logits.shape == (*labels.shape, 1):
    logits = logits[..., 0]
  if logits.shape != labels.shape:
    raise ValueError(
      f"labels must have the shape of logits, without a last axis of length one if there is one, got labels"
      f" {labels.shape} and logits {logits.shape}."
    )
  labels, counted = counted_labels(labels, 2)
  if where is not None:
    counted &= example_mask(where, labels.shape)
  wide = jnp.where(counted, widened(logits), 0)
  return Margins(jnp.where(labels > 0, wide, -wide), counted, logits.dtype)


def _of_margins(logits, labels, loss):
  batch = binary_margins(logits, labels)
  return batch.values(loss(batch.margins))


def log_limit(dtype):
  """The largest exponent used: far enough from the dtype's end that sums and derivatives stay finite."""
  return jnp.asarray(np.log(jnp.finfo(dtype).max) - 20, dtype)
