"""Groups of weights: their integer ids, norms and sums, and the support that they leave.

Groups are given by integer ids. `values` is an array or a pytree of arrays, `groups` has the same structure, and its
ids have the rank of their array with each axis full or of length 1 (then constant along it). Entries of all arrays with
the same id form one group, so that a neuron can be its kernel's column together with its bias.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxreg.checks import as_array, check_float, dtype_of
from jaxreg.metrics.norms import safe_sqrt
from jaxreg.metrics.weights import is_kernel, parameter_name

__all__ = ["freeze_support", "group_ids", "group_norms", "resolve_groups", "scale_groups", "sum_groups"]


def group_ids(values, *, kind: str, output_axis: int | None = None, input_axis: int | None = None):
  """Group ids of a tensor, or of several tensors grouped jointly, by kind.

  | kind | a group is | ids follow |
  | --- | --- | --- |
  | "filter", "neuron" | what feeds one output: a filter, a dense unit's weights, its bias | the output axis |
  | "channel" | what one input channel or unit feeds | the input axis |
  | "shape" | one position of the filters, across all filters | all axes but the output axis |
  | "element" | one entry | all axes |

  Outputs are on the last axis and inputs on the one before, as Flax has them, or, in a layer with an array named
  `weight` (Equinox, PyTorch), on the first axis and the second.

  >>> import jax.numpy as jnp
  >>> group_ids(jnp.zeros((3, 3, 8, 16)), kind="channel").shape
  (1, 1, 8, 1)
  >>> ids = group_ids({"kernel": jnp.zeros((4, 2)), "bias": jnp.zeros(2)}, kind="neuron")
  >>> ids["kernel"].tolist(), ids["bias"].tolist()
  ([[0, 1]], [0, 1])

  Args:
    values: array, or pytree of arrays that share their groups; only shapes are read.
    kind: static; one of the table.
    output_axis: static; the axis of the outputs in every tensor of `values`, where the names do not tell.
    input_axis: static; that of the inputs.

  Returns:
    NumPy int32 ids in the structure of `values`, ready for every function of this module.

  Raises:
    ValueError: when `kind` is unknown, a tensor's rank is too small for it, or tensors differ in their number of
      groups.

  Reference: Wen, Wu, Wang, Chen, Li, "Learning Structured Sparsity in Deep Neural Networks", NeurIPS 2016, Section
    3.2.
  """
  named = [(parameter_name(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(values)]
  output_first = any(name.endswith("weight") and is_kernel(name, leaf) for name, leaf in named)
  first, second = (0, 1) if output_first else (-1, -2)
  axes = (first if output_axis is None else output_axis, second if input_axis is None else input_axis)
  ids = jax.tree.map(lambda tensor: _tensor_ids(jnp.shape(tensor), kind, *axes), values)
  counts = {leaf.size for leaf in jax.tree.leaves(ids)}
  if len(counts) > 1:
    shapes = [jnp.shape(leaf) for leaf in jax.tree.leaves(values)]
    raise ValueError(f"values must have equally many groups of kind {kind!r}, got tensors of shapes {shapes}.")
  return ids


def group_norms(values, *, kind: str, output_axis: int | None = None, input_axis: int | None = None) -> jax.Array:
  """Euclidean norm of every group of a tensor, or of several tensors grouped jointly.

  >>> import jax.numpy as jnp
  >>> group_norms({"kernel": jnp.array([[3.0, 0.0]]), "bias": jnp.array([4.0, 0.0])}, kind="neuron").tolist()
  [5.0, 0.0]

  Args:
    values: floating array, or pytree of arrays that share their groups.
    kind: static; as in `group_ids`.
    output_axis: static; as in `group_ids`.
    input_axis: static; as in `group_ids`.

  Returns:
    `[num_groups]` float32 (float64 for float64 values).

  Raises:
    ValueError: as `group_ids`.

  Reference: Refael, Arbel, Huleihel, arXiv 2212.12921, the groups of their experiments.
  """
  ids = group_ids(values, kind=kind, output_axis=output_axis, input_axis=input_axis)
  groups, num_groups = ids, number_of_groups(ids, None, None)
  return safe_sqrt(squared_norms(values, groups, num_groups))


def resolve_groups(kind: str | Callable, values):
  """Ids and number of groups of `values`, from a kind of `group_ids` or a function from `values` to ids.

  >>> import jax.numpy as jnp
  >>> resolve_groups("neuron", jnp.zeros((4, 2)))[1]
  2

  Args:
    kind: static; a kind of `group_ids`, or a function that maps `values` to concrete ids.
    values: array or pytree of arrays.

  Returns:
    `(ids, num_groups)`.

  Raises:
    ValueError: as `group_ids`, or when the function's ids are traced.

  Reference: none; shared by `freeze_support` and `jaxreg.transforms.half_space_projection`.
  """
  groups = kind(values) if callable(kind) else group_ids(values, kind=kind)
  return groups, number_of_groups(groups, None, None)


def sum_groups(values, groups, *, num_groups: int) -> jax.Array:
  """Sum of the entries of each group.

  >>> import jax.numpy as jnp
  >>> sum_groups(jnp.array([1.0, 2.0, 3.0]), jnp.array([1, 0, 1]), num_groups=2).tolist()
  [2.0, 4.0]

  Args:
    values: floating array, or pytree of arrays.
    groups: integer ids, as the module describes.
    num_groups: static; number of groups.

  Returns:
    `[num_groups]` float32 (float64 for float64 values).

  Raises:
    ValueError: when ids do not fit the values.

  Reference: none.
  """
  total = jnp.zeros(num_groups, jnp.promote_types(common_dtype(values), jnp.float32))
  for tensor, ids in _paired(values, groups):
    constant = tuple(axis for axis in range(ids.ndim) if ids.shape[axis] == 1)
    entries = jnp.sum(jnp.asarray(tensor).astype(total.dtype), axis=constant).reshape(-1)
    if not _in_order(ids, num_groups):
      entries = jax.ops.segment_sum(entries, jnp.asarray(ids, jnp.int32).reshape(-1), num_groups)
    total = total + entries
  return total


def scale_groups(values, groups, factors: ArrayLike):
  """Multiplies each group by its factor; a factor of 0 gives exact zeros.

  >>> import jax.numpy as jnp
  >>> scale_groups(jnp.array([1.0, 2.0, 3.0]), jnp.array([1, 0, 1]), jnp.array([0.0, 10.0])).tolist()
  [10.0, 0.0, 30.0]

  Args:
    values: floating array, or pytree of arrays.
    groups: integer ids, as the module describes.
    factors: `[num_groups]` floating.

  Returns:
    The scaled values, with the structure, shapes and dtypes of `values`.

  Raises:
    ValueError: when ids do not fit the values.

  Reference: none.
  """
  scaled, factors = [], as_array("factors", factors)
  for tensor, ids in _paired(values, groups):
    factor = factors.reshape(ids.shape) if _in_order(ids, factors.size) else factors[jnp.asarray(ids, jnp.int32)]
    scaled.append((tensor * factor).astype(jnp.result_type(tensor)))
  return jax.tree.structure(values).unflatten(scaled)


def freeze_support(params, kinds):
  """Mask of the entries whose group is not zero, for fine-tuning without the penalty on the support it has found.

  >>> import jax, jax.numpy as jnp, optax
  >>> params = {"Dense_0": {"kernel": jnp.array([[1.0, 0.0]]), "bias": jnp.zeros(2)}}
  >>> mask = freeze_support(params, {"Dense_0": "neuron"})
  >>> keep = lambda updates, params: jax.tree.map(lambda m, u: jnp.where(m, u, 0), mask, updates)
  >>> tx = optax.chain(optax.sgd(1.0), optax.stateless(keep))
  >>> state = tx.init(params)
  >>> for _ in range(2):
  ...   updates, state = tx.update(jax.tree.map(jnp.ones_like, params), state, params)
  ...   params = optax.apply_updates(params, updates)
  >>> params["Dense_0"]["bias"].tolist()
  [-2.0, 0.0]

  Args:
    params: pytree of arrays.
    kinds: prefix of `params` whose leaves are a kind of `group_ids`, a function from the subtree below to ids
      (`functools.partial(group_ids, kind="neuron", output_axis=0)`), or None (everything may move). A subtree of
      several tensors is grouped jointly.

  Returns:
    Booleans in the structure and shapes of `params`, True where the entry may move.

  Raises:
    ValueError: as `group_ids`.

  Reference: Refael, Arbel, Huleihel, arXiv 2212.12921 (step 4 of card 49: the ridge part of the penalty biases the
    surviving groups, and fine-tuning removes the bias).
  """

  def mask(kind, values):
    everywhere = jax.tree.map(lambda tensor: jnp.ones(jnp.shape(tensor)), values)
    if kind is not None and jax.tree.leaves(values):
      groups, num_groups = resolve_groups(kind, values)
      occupied = jax.tree.map(lambda tensor: (jnp.asarray(tensor) != 0).astype(jnp.float32), values)
      alive = sum_groups(occupied, groups, num_groups=num_groups) > 0
      everywhere = scale_groups(everywhere, groups, alive.astype(jnp.float32))
    return jax.tree.map(lambda factor: factor > 0, everywhere)

  return jax.tree.map(mask, kinds, params, is_leaf=lambda node: node is None or callable(node))


def squared_norms(values, groups, num_groups):
  common_dtype(values)
  wide = jax.tree.map(lambda x: jnp.asarray(x).astype(jnp.promote_types(jnp.result_type(x), jnp.float32)), values)
  return sum_groups(jax.tree.map(jnp.square, wide), groups, num_groups=num_groups)


def common_dtype(values):
  leaves = jax.tree.leaves(values)
  for leaf in leaves:
    check_float("values", leaf)
  return jnp.result_type(*leaves) if leaves else jnp.dtype(jnp.float32)


def number_of_groups(groups, weights, num_groups):
  """The number of groups, from the argument, the weights or the ids themselves, which are checked where readable."""
  leaves = jax.tree.leaves(groups)
  for ids in leaves:
    if not jnp.issubdtype(dtype_of("ids", ids), jnp.integer):
      raise ValueError(f"groups must be integer ids, got dtype {jnp.result_type(ids)}.")
  if num_groups is None and weights is not None:
    num_groups = jnp.shape(weights)[0] if jnp.ndim(weights) == 1 else None
  traced = any(isinstance(ids, jax.core.Tracer) for ids in leaves)
  if traced and num_groups is None:
    raise ValueError("num_groups must be given when groups is traced, got None.")
  if traced:
    return num_groups
  bounds = [(int(np.min(ids)), int(np.max(ids))) for ids in leaves if np.size(ids)]
  largest = max((high for _, high in bounds), default=-1)
  num_groups = largest + 1 if num_groups is None else num_groups
  if largest >= num_groups or any(low < 0 for low, _ in bounds):
    raise ValueError(f"groups must hold ids from 0 to {num_groups - 1}, got {bounds} as their ranges.")
  return num_groups


def _paired(values, groups):
  """The arrays with their ids, after a check that ranks match and axes are full or of length 1."""
  structure = jax.tree.structure(values)
  pairs = list(zip(jax.tree.leaves(values), structure.flatten_up_to(groups)))
  for tensor, ids in pairs:
    shape, id_shape = jnp.shape(tensor), jnp.shape(ids)
    if len(shape) != len(id_shape) or any(i not in (1, s) for s, i in zip(shape, id_shape)):
      raise ValueError(f"groups must have the rank of values and axes full or of length 1, got {id_shape} for {shape}.")
  return pairs


def _in_order(ids, num_groups):
  """Whether the ids simply count the groups, which saves a scatter or gather."""
  return isinstance(ids, np.ndarray) and ids.size == num_groups and np.array_equal(ids.ravel(), np.arange(num_groups))


def _tensor_ids(shape, kind, output_axis, input_axis):
  outputs, inputs = (axis % max(1, len(shape)) for axis in (output_axis, input_axis))
  free = {
    "filter": {outputs},
    "neuron": {outputs},
    "channel": {inputs},
    "shape": set(range(len(shape))) - {outputs},
    "element": set(range(len(shape))),
  }
  if kind not in free:
    raise ValueError(f"kind must be one of {sorted(free)}, got {kind!r}.")
  least = {"channel": 2, "shape": 2, "element": 0}.get(kind, 1)
  if len(shape) < least:
    raise ValueError(f"values must have at least {least} axes for groups of kind {kind!r}, got shape {shape}.")
  for name, axis in (("output_axis", output_axis), ("input_axis", input_axis)):
    if len(shape) >= 2 and not -len(shape) <= axis < len(shape):
      raise ValueError(f"{name} must be an axis of every tensor, got {axis} for shape {shape}.")
  id_shape = tuple(size if axis in free[kind] else 1 for axis, size in enumerate(shape))
  return np.arange(int(np.prod(id_shape, dtype=int)), dtype=np.int32).reshape(id_shape)
