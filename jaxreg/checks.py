"""Trace-time checks shared by the ingredients: one sentence that names the argument, what was expected, what came."""

import numbers

import jax
import jax.numpy as jnp
import numpy as np

__all__ = ["as_array", "check_float", "check_hyperparameter", "check_integer_labels", "check_same_shape", "check_state"]


def as_array(name: str, value) -> jax.Array:
  """The value as a JAX array; ValueError when it is no array of numbers (a text, None, a list of unequal rows)."""
  if isinstance(value, jax.Array):
    return value
  try:
    return jnp.asarray(value)
  except (TypeError, ValueError) as error:
    raise ValueError(f"{name} must be an array of numbers, got {_described(value)}.") from error


def check_float(name: str, value) -> None:
  """Raises ValueError unless `value` has a floating-point dtype."""
  dtype = dtype_of(name, value)
  if not jnp.issubdtype(dtype, jnp.floating):
    raise ValueError(f"{name} must be floating point, got dtype {dtype}.")


def check_integer_labels(logits, labels, *, axis: int = -1) -> None:
  """Raises ValueError unless `labels` are integers shaped like `logits` without the class `axis`."""
  check_float("logits", logits)
  if jnp.ndim(logits) < 1:
    raise ValueError("logits must have a class axis, got a scalar.")
  if not jnp.issubdtype(dtype_of("labels", labels), jnp.integer):
    raise ValueError(f"labels must be integer class indices, got dtype {jnp.result_type(labels)}.")
  shape = list(jnp.shape(logits))
  if not -len(shape) <= axis < len(shape):
    raise ValueError(f"axis must be an axis of logits with shape {tuple(shape)}, got {axis}.")
  del shape[axis]
  if jnp.shape(labels) != tuple(shape):
    raise ValueError(
      f"labels must have the shape of logits without the class axis, expected {tuple(shape)}, got {jnp.shape(labels)}."
    )


def check_same_shape(**arrays) -> None:
  """Raises ValueError unless all keyword arrays share one shape."""
  for name, value in arrays.items():
    dtype_of(name, value)
  shapes = {name: jnp.shape(value) for name, value in arrays.items()}
  if len(set(shapes.values())) > 1:
    listed = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
    raise ValueError(f"arrays must have equal shapes, got {listed}.")


def check_state(state, kind: type, name: str = "state") -> None:
  """Raises ValueError unless `state` is a `kind`, for example when the bare table is given."""
  if not isinstance(state, kind):
    raise ValueError(f"{name} must be {kind.__name__} as its init function returns it, got {type(state).__name__}.")


def check_updates(updates, params, name: str) -> None:
  """Raises ValueError unless the transformation of that name was given parameters shaped like the updates.

  An update of None, of a parameter that is not trained, fits anything.
  """
  if params is None:
    raise ValueError(f"params must be given to the update of {name}, got None.")
  leaves, structure = jax.tree.flatten(updates, is_leaf=lambda node: node is None)
  for update, parameter in zip(leaves, structure.flatten_up_to(params)):
    if update is not None:
      check_same_shape(updates=update, params=parameter)


def check_hyperparameter(
  name: str, value, low=None, high=None, *, open_low=False, open_high=False, shape: tuple[int, ...] | None = None
) -> None:
  """Raises ValueError when a hyperparameter has a wrong shape, or a Python or NumPy one lies outside its domain.

  Values on a device and traced ones pass unread: reading one would force a transfer on every call, so those are the
  caller's responsibility.

  Args:
    name: the argument's name, for the message.
    value: number, NumPy array or JAX array.
    low: smallest allowed value, or None.
    high: largest allowed value, or None.
    open_low: whether `low` itself is excluded.
    open_high: whether `high` itself is excluded.
    shape: the shape that the value must broadcast to, for example that of the labels; `()` for scalars only. A value of
      shape `[batch, 1]` beside labels `[batch]` would make a result `[batch, batch]`.
  """
  dtype_of(name, value)
  if shape is not None and not broadcasts(jnp.shape(value), shape):
    expected = f"a scalar or broadcast to {shape}" if shape else "a scalar"
    raise ValueError(f"{name} must be {expected}, got shape {jnp.shape(value)}.")
  if isinstance(value, jax.Array) or not isinstance(value, (numbers.Number, np.ndarray, np.generic)):
    return
  array = np.asarray(value)
  inside = ~np.isnan(array)
  if low is not None:
    inside &= (array > low) if open_low else (array >= low)
  if high is not None:
    inside &= (array < high) if open_high else (array <= high)
  if not inside.all():
    left = f"{'(' if open_low or low is None else '['}{'-inf' if low is None else low}"
    right = f"{'inf' if high is None else high}{')' if open_high or high is None else ']'}"
    raise ValueError(f"{name} must lie in {left}, {right}, got {value}.")


def dtype_of(name: str, value) -> np.dtype:
  """The dtype that an array of this value has; ValueError when it is no array of numbers."""
  if isinstance(value, np.ndarray | np.generic | numbers.Number):  # without a transfer
    try:
      return jnp.result_type(value)
    except TypeError:
      pass
  return value.dtype if isinstance(value, jax.Array | jax.ShapeDtypeStruct) else as_array(name, value).dtype


def _described(value) -> str:
  return "None" if value is None else f"{type(value).__name__} {value!r}"[:80]


def shape_without(array, axis: int) -> tuple[int, ...]:
  """The shape of an array without one of its axes."""
  shape = list(jnp.shape(array))
  del shape[axis]
  return tuple(shape)


def broadcasts(shape, target) -> bool:
  """Whether an array of `shape` broadcasts to `target`."""
  try:
    return np.broadcast_shapes(shape, target) == tuple(target)
  except ValueError:
    return False


def widened_integers(array: jax.Array) -> jax.Array:
  """Integers in 32 bits at least, in which sums and comparisons with a number of classes do not wrap around."""
  return array.astype(jax.dtypes.canonicalize_dtype(jnp.int64 if array.dtype.itemsize > 4 else jnp.int32))


def counted_labels(labels: jax.Array, classes: int) -> tuple[jax.Array, jax.Array]:
  """Widened labels in `[0, classes)`, 0 for those outside, and which were inside.

  >>> import jax.numpy as jnp
  >>> [array.tolist() for array in counted_labels(jnp.array([3, 255], jnp.uint8), 300)]
  [[3, 255], [True, True]]

  Args:
    labels: integers `[...]` of any width.
    classes: number of classes.

  Returns:
    Integers `[...]` in int32 at least, and booleans `[...]`.
  """
  labels = widened_integers(labels)
  counted = (labels >= 0) & (labels < classes)
  return jnp.where(counted, labels, 0), counted


def example_mask(where, shape) -> jax.Array:
  """A checked mask of examples, one boolean per label; None stands for all of them."""
  if where is None:
    return jnp.ones(shape, bool)
  where = as_array("where", where)
  if where.shape != shape or where.dtype != bool:
    raise ValueError(
      f"where must be boolean, one per label, expected shape {shape}, got {where.shape} of dtype {where.dtype}."
    )
  return where
