"""What every loss of logits and integer labels starts and ends with: one form of the arrays, and which examples count.

A label outside `[0, classes)` (-1, -100 or 255, by which data sets mark what is to be ignored) gives the value 0 and
gradients of 0, whatever the logits of that example are, not-a-numbers among them; so does an example of which no class
takes part. Labels of any integer dtype are widened before anything is computed from them.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxreg.checks import (
  as_array,
  check_float,
  check_hyperparameter,
  check_integer_labels,
  check_same_shape,
  counted_labels,
)

__all__ = ["Labelled", "labelled"]


class Labelled(NamedTuple):
  """Logits and labels as the losses compute with them."""

  logits: jax.Array  # [..., classes] in float32 at least; 0 for classes that take no part
  labels: jax.Array  # integers [...] in [0, classes)
  where: jax.Array | None  # booleans [..., classes], the label's class among those that take part; or None
  counted: jax.Array  # booleans [...], which examples count
  dtype: np.dtype  # of the logits as they came, and of the loss

  def values(self, values: jax.Array) -> jax.Array:
    """A loss as it is returned: 0 for examples that do not count, in the dtype of the logits."""
    return narrowed(jnp.where(self.counted, values, 0), self.dtype)

  def other_logits(self, name: str, logits, axis: int = -1) -> jax.Array:
    """Further logits of the same examples and classes, in the same form."""
    logits = as_array(name, logits)
    check_float(name, logits)
    other = jnp.moveaxis(logits, axis, -1) if jnp.ndim(logits) else logits
    check_same_shape(**{"logits": self.logits, name: other})
    return only_counted(_masked(widened(other), self.where), self.counted)

  def hyperparameter(self, name: str, value, low=None, high=None, *, scalar: bool = False, **options) -> jax.Array:
    """A checked hyperparameter, a scalar or else one value per example, in the dtype of the computation."""
    check_hyperparameter(name, value, low, high, shape=() if scalar else self.labels.shape, **options)
    return jnp.asarray(value, jnp.promote_types(self.dtype, jnp.float32))


def labelled(
  logits: jax.typing.ArrayLike,
  labels: jax.typing.ArrayLike,
  *,
  axis: int = -1,
  where: jax.typing.ArrayLike | None = None,
) -> Labelled:
  """Checked logits and labels in one form, with the classes last.

  >>> import jax.numpy as jnp
  >>> batch = labelled(jnp.zeros((3, 2), jnp.bfloat16), jnp.array([1, -100, 2], jnp.int8))
  >>> batch.labels.tolist(), batch.counted.tolist(), batch.values(batch.logits[:, 0] + 1).tolist()
  ([1, 0, 0], [True, False, False], [1.0, 0.0, 0.0])

  Args:
    logits: floating, the classes on `axis`.
    labels: integers of any width, shaped like `logits` without the axis of the classes.
    axis: the axis of the classes.
    where: boolean, broadcasting against `logits`: the classes that take part; the label's always does. Logits of the
      others are not read. An example of which no class takes part does not count.

  Returns:
    `Labelled`.

  Raises:
    ValueError: when labels or `where` do not fit the logits.
  """
  logits, labels = as_array("logits", logits), as_array("labels", labels)
  check_integer_labels(logits, labels, axis=axis)
  classes = logits.shape[axis]
  labels, counted = counted_labels(labels, classes)
  wide = jnp.moveaxis(widened(logits), axis, -1)
  if where is not None:
    where = _class_mask(where, logits.shape, labels.shape, axis)
    counted &= jnp.any(where, axis=-1)
    where = where | (jnp.arange(classes) == labels[..., None])
  return Labelled(only_counted(_masked(wide, where), counted), labels, where, counted, logits.dtype)


def classes_last(logits, *, axis: int = -1, where=None) -> tuple[jax.Array, jax.Array | None]:
  """Checked logits without labels and the mask of their classes, in the form of `labelled`.

  >>> import jax.numpy as jnp
  >>> logits, mask = classes_last(jnp.array([[1.0], [jnp.inf]]), axis=0, where=jnp.array([[True], [False]]))
  >>> logits.tolist(), mask.tolist()
  ([[1.0, 0.0]], [[True, False]])

  Args:
    logits: floating, the classes on `axis`.
    axis: the axis of the classes.
    where: boolean, broadcasting against `logits`: the classes that take part.

  Returns:
    `[..., classes]`, in float32 at least, and booleans of the same shape or None.

  Raises:
    ValueError: when `logits` are not floating point or `where` does not fit them.
  """
  logits = as_array("logits", logits)
  check_float("logits", logits)
  if logits.ndim < 1:
    raise ValueError("logits must have a class axis, got a scalar.")
  if where is not None:
    where = _class_mask(where, logits.shape, logits.shape[:axis] + logits.shape[axis:][1:], axis)
  return _masked(jnp.moveaxis(widened(logits), axis, -1), where), where


def widened(array: jax.Array) -> jax.Array:
  """The array in float32 at least; the gradient that comes back is kept inside the range of float16.

  >>> import jax.numpy as jnp
  >>> widened(jnp.ones(2, jnp.float16)).dtype.name
  'float32'

  Args:
    array: floating `[...]`.

  Returns:
    `[...]`.
  """
  if array.dtype == jnp.float16:
    return _from_half(array)
  return array.astype(jnp.promote_types(array.dtype, jnp.float32))


def narrowed(values: jax.Array, dtype) -> jax.Array:
  """The values in a dtype; finite ones beyond the range of float16 become its largest.

  >>> import jax.numpy as jnp
  >>> narrowed(jnp.array([1e6, -1e6, 2.0]), jnp.float16).tolist()
  [65504.0, -65504.0, 2.0]

  Args:
    values: floating `[...]`.
    dtype: floating.

  Returns:
    `[...]`.
  """
  return _to_half(values) if dtype == jnp.float16 else values.astype(dtype)


@jax.custom_vjp
def _from_half(array):
  return array.astype(jnp.float32)


_from_half.defvjp(lambda array: (_from_half(array), None), lambda _, gradient: (_saturated(gradient),))


@jax.custom_jvp
def _to_half(values):
  return _saturated(values)


@_to_half.defjvp
def _to_half_jvp(primals, tangents):
  """A value beyond the range keeps its slope: it would otherwise not be trained."""
  return _to_half(*primals), tangents[0].astype(jnp.float16)


def _saturated(values):
  limit = float(jnp.finfo(jnp.float16).max)
  return jnp.where(jnp.isfinite(values), jnp.clip(values, -limit, limit), values).astype(jnp.float16)


@jax.custom_jvp
def only_counted(logits: jax.Array, counted: jax.Array) -> jax.Array:
  """The logits, to which no gradient comes back from examples that do not count."""
  return logits


@only_counted.defjvp
def _only_counted_jvp(primals, tangents):
  """What is not a number stops here on its way back; selecting the logits themselves would cost a pass over them."""
  logits, counted = primals
  return logits, jnp.where(counted[..., None], tangents[0], 0)


def _masked(logits, where):
  return logits if where is None else jnp.where(where, logits, 0)


def _class_mask(where, shape, examples, axis):
  """The mask of the classes with the shape of the logits, and the classes last."""
  where = as_array("where", where)
  if where.dtype != bool:
    raise ValueError(f"where must be boolean, got dtype {where.dtype}.")
  try:
    fits = jnp.broadcast_shapes(where.shape, shape) == shape
  except ValueError:
    fits = False
  if not fits:
    raise ValueError(f"where must broadcast against logits of shape {shape}, got {where.shape}.")
  if where.ndim and where.shape == examples and where.shape[-1] == shape[axis]:
    raise ValueError(
      f"where of shape {where.shape} may mean examples or classes of logits of shape {shape}: expand its dimensions."
    )
  return jnp.moveaxis(jnp.broadcast_to(where, shape), axis, -1)
