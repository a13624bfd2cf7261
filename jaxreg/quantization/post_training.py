"""From a trained floating-point network to integers: calibrate, freeze, store the weights as integers, export them."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.typing import ArrayLike

from jaxreg.checks import dtype_of
from jaxreg.quantization.bounds import (
  BoundState,
  activation_bound_init,
  activation_bound_update,
  freeze_bounds,
  mean_of_max_bound,
)
from jaxreg.quantization.layers import ActivationBound

__all__ = [
  "calibrate",
  "check_bounds",
  "export_integers",
  "import_integers",
  "integer_variables",
  "pack_int4",
  "unpack_int4",
]


def calibrate(
  model: nn.Module,
  variables: Mapping[str, Any],
  batches: Iterable[Any],
  *,
  rule: Callable[[BoundState], jax.Array] = mean_of_max_bound,
  per_tensor: bool = True,
  **options: Any,
) -> dict:
  """The variables of a network with the bounds of its activations computed from batches, and frozen.

  The batches run through the network with quantized weights and inputs in floating point; every batch counts the same.
  One bound for each layer is what integer inference takes, and costs little accuracy while training with it.

  >>> import jax, jax.numpy as jnp
  >>> from jaxreg.quantization.layers import QDense
  >>> model, batches = QDense(2, weight_bits=8, act_bits=8), [jnp.ones((5, 3)), 3 * jnp.ones((5, 3))]
  >>> variables = calibrate(model, model.init(jax.random.key(0), batches[0]), batches)
  >>> variables["quant_stats"]["input_bound"]["state"].bound.tolist()
  [2.0, 2.0, 2.0]

  Args:
    model: a Flax network of `QDense` and `QConv` layers, with the bits it shall run on.
    variables: of the network, trained in floating point or with fake quantization; its bounds are forgotten.
    batches: inputs of the network, one after another.
    rule: from statistics to a bound, as in `freeze_bounds`.
    per_tensor: whether all channels of a layer share the largest of their bounds.
    **options: keyword arguments of the call (`train=False`).

  Returns:
    New variables.

  Raises:
    ValueError: when there are no batches, or the network quantizes no inputs.

  Reference: Krishnamoorthi, "Quantizing deep convolutional networks for efficient inference: A whitepaper", 2018,
    Section 3.1.
  """

  def run(variables, inputs, rate):
    def record(call, arguments, keywords, context):
      module = context.module
      if not isinstance(module, ActivationBound) or context.method_name != "__call__":
        return call(*arguments, **keywords)
      state = module.get_variable("quant_stats", "state")
      state = activation_bound_init(len(state.bound), dtype=state.bound.dtype) if rate is None else state
      state = activation_bound_update(arguments[0], state=state, rate=1.0 if rate is None else rate)
      module.put_variable("quant_stats", "state", state)
      return state.bound  # -1: the inputs pass

    with nn.intercept_methods(record):
      return model.apply(variables, inputs, mutable=["quant_stats"], **options)[1]

  if not jax.tree.leaves(variables.get("quant_stats", {})):
    raise ValueError("model must have layers that quantize their inputs (act_bits), got none.")
  stats, first, later = None, jax.jit(lambda v, x: run(v, x, None)), jax.jit(run)
  for index, inputs in enumerate(batches):
    # A channel that was silent until now starts with the wrong weight, which is the price of equal weights.
    new = first(variables, inputs) if index == 0 else later({**variables, **stats}, inputs, 1 / (index + 1))
    stats = {"quant_stats": new["quant_stats"]}
  if stats is None:
    raise ValueError("batches must hold at least one batch, got none.")
  return {**variables, "quant_stats": freeze_bounds(stats["quant_stats"], rule=rule, per_tensor=per_tensor)}


def check_bounds(variables: Mapping[str, Any]) -> None:
  """Refuses a network some of whose layers would take inputs in floating point, because their bounds are not frozen.

  >>> import jax, jax.numpy as jnp
  >>> from jaxreg.quantization.layers import QDense
  >>> variables = QDense(2, act_bits=4).init(jax.random.key(0), jnp.ones((5, 3)))
  >>> check_bounds(variables)
  Traceback (most recent call last):
  ValueError: inputs of all layers must have frozen bounds (freeze_bounds, calibrate), got none for input_bound.

  Args:
    variables: of a network, concrete.

  Raises:
    ValueError: when a bound is negative.

  Reference: none.
  """
  leaves = jax.tree_util.tree_leaves_with_path(
    variables.get("quant_stats", {}), is_leaf=lambda leaf: isinstance(leaf, BoundState)
  )
  loose = [_joined(path[:-1]) for path, state in leaves if (np.asarray(state.bound) < 0).any()]
  if loose:
    raise ValueError(
      f"inputs of all layers must have frozen bounds (freeze_bounds, calibrate), got none for {', '.join(loose)}."
    )


def integer_variables(model: nn.Module, variables: Mapping[str, Any], *arguments: Any, **options: Any) -> dict:
  """The variables of an integer network with its kernels stored as integers, int4 up to four bits and int8 above.

  >>> import jax, jax.numpy as jnp
  >>> from jaxreg.quantization import IntegerDense, QDense
  >>> bits, x = dict(weight_bits=4, act_bits=8), jnp.ones((5, 3))
  >>> trained = calibrate(QDense(2, **bits), QDense(2, **bits).init(jax.random.key(0), x), [x])
  >>> stored = integer_variables(IntegerDense(2, **bits), trained, x)
  >>> stored["integer"]["kernel"].dtype.name, sorted(stored["params"])
  ('int4', ['bias'])

  Args:
    model: the network with `IntegerDense` and `IntegerConv` in place of `QDense` and `QConv`, with static bits.
    variables: of the trained network, with frozen bounds.
    *arguments: of a call, with inputs of any batch.
    **options: keyword arguments of the call.

  Returns:
    Variables for the same model: a collection `integer` with `kernel` and `scale` of each layer, and the parameters
    without those kernels.

  Raises:
    ValueError: when the network has no integer layers, or bounds are not frozen.

  Reference: Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only
    Inference", CVPR 2018, Section 2.
  """
  check_bounds(variables)
  _, new = jax.jit(lambda v, *a: model.apply(v, *a, mutable=["integer"], **options))(variables, *arguments)
  if not jax.tree.leaves(new):
    raise ValueError("model must have integer layers (IntegerDense, IntegerConv), got none.")
  stored = {path for path in flatten_dict(new["integer"]) if path[-1] == "kernel"}
  params = {path: leaf for path, leaf in flatten_dict(variables["params"]).items() if path not in stored}
  return {**variables, "params": unflatten_dict(params), "integer": new["integer"]}


def export_integers(variables: Mapping[str, Any]) -> dict[str, np.ndarray]:
  """What `integer_variables` made as plain NumPy arrays, for `numpy.savez`; int4 is packed, two to a byte.

  >>> import numpy as np
  >>> arrays = export_integers({"integer": {"Dense_0": {"kernel": np.ones((3, 2), "int4"), "scale": np.ones((1, 2))}}})
  >>> {name: array.shape for name, array in arrays.items()}  # doctest: +NORMALIZE_WHITESPACE
  {'integer/Dense_0/kernel:int4': (3,), 'integer/Dense_0/kernel:shape': (2,), 'integer/Dense_0/scale': (1, 2)}

  Args:
    variables: of an integer network.

  Returns:
    Arrays by path; of a `BoundState` the bound alone.

  Reference: none.
  """
  arrays = {}
  is_state = lambda leaf: isinstance(leaf, BoundState)
  for path, leaf in jax.tree_util.tree_leaves_with_path(dict(variables), is_leaf=is_state):
    name = _joined(path)
    if is_state(leaf):
      arrays[f"{name}:bound"] = np.asarray(leaf.bound)
    elif jnp.result_type(leaf) == jnp.int4:
      arrays[f"{name}:int4"], arrays[f"{name}:shape"] = pack_int4(leaf), np.array(np.shape(leaf))
    else:
      arrays[name] = np.asarray(leaf)
  return arrays


def import_integers(arrays: Mapping[str, np.ndarray]) -> dict:
  """The variables behind what `export_integers` returned, for the same network.

  >>> import numpy as np
  >>> variables = {"integer": {"kernel": np.arange(-3, 3, dtype="int4").reshape(2, 3)}}
  >>> import_integers(export_integers(variables))["integer"]["kernel"].tolist()
  [[-3, -2, -1], [0, 1, 2]]

  Args:
    arrays: by path.

  Returns:
    Variables; statistics other than the bounds are zero.

  Reference: none.
  """
  flat = {}
  for name, array in arrays.items():
    name, _, kind = name.partition(":")
    if kind == "bound":
      state = activation_bound_init(len(array), dtype=array.dtype)
      flat[name] = state._replace(bound=jnp.asarray(array))
    elif kind == "int4":
      flat[name] = unpack_int4(array, shape=tuple(arrays[f"{name}:shape"]))
    elif not kind:
      flat[name] = jnp.asarray(array)
  return unflatten_dict(flat, sep="/")


def pack_int4(values: ArrayLike) -> np.ndarray:
  """Integers from -8 to 7, two to a byte: the first of each pair in the lower half.

  >>> import numpy as np
  >>> pack_int4(np.array([1, -1, 7])).tolist()
  [241, 7]

  Args:
    values: integers `[...]`.

  Returns:
    uint8 `[ceil(size / 2)]`, in C order.

  Raises:
    ValueError: when values are no integers or out of range.

  Reference: none.
  """
  flat = np.asarray(values).astype(np.int32).ravel()
  if (
    not jnp.issubdtype(dtype_of("values", values), jnp.integer) or flat.size and not -8 <= flat.min() <= flat.max() <= 7
  ):
    raise ValueError(f"values must be integers from -8 to 7, got {jnp.result_type(values)} {np.asarray(values)}.")
  nibbles = np.pad(flat & 15, (0, flat.size % 2)).astype(np.uint8).reshape(-1, 2)
  return nibbles[:, 0] | (nibbles[:, 1] << 4)


def unpack_int4(packed: np.ndarray, *, shape: tuple[int, ...]) -> jax.Array:
  """The integers that `pack_int4` packed.

  >>> import numpy as np
  >>> unpack_int4(np.array([241, 7], np.uint8), shape=(3,)).tolist()
  [1, -1, 7]

  Args:
    packed: uint8 `[bytes]`.
    shape: of the integers.

  Returns:
    int4 `[*shape]`.

  Raises:
    ValueError: when the shape does not fit the bytes.

  Reference: none.
  """
  size, packed = int(np.prod(shape, dtype=int)), np.asarray(packed, np.uint8)
  if packed.size != (size + 1) // 2:
    raise ValueError(f"shape must fit {packed.size} bytes, got {tuple(map(int, shape))}.")
  nibbles = np.stack([packed & 15, packed >> 4], axis=-1).ravel()[:size].astype(np.int8)
  return jnp.asarray(np.where(nibbles > 7, nibbles - 16, nibbles).reshape(shape), jnp.int4)


def _joined(path) -> str:
  return jax.tree_util.keystr(path, simple=True, separator="/")
