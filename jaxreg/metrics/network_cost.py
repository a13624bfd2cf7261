"""What a network costs to run once: multiplications weighted by the operands' bits, and the size of its weights."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax

from jaxreg.metrics.sizes import is_integer

__all__ = ["LayerCost", "NetworkCost", "assign_bits", "layer_table", "quant_cost"]

_FULL = 16  # bits of bfloat16, against which ratios are taken


class LayerCost(NamedTuple):
  """One convolution or dense layer.

  Attributes:
    name: path of the module.
    multiplications: for one example.
    weights: number of weights.
    input_bits: of the inputs.
    weight_bits: of the weights.
  """

  name: str
  multiplications: int
  weights: int
  input_bits: int = _FULL
  weight_bits: int = _FULL


class NetworkCost(NamedTuple):
  """The cost of running a network on one example, exact, and relative to the same network in bfloat16.

  Attributes:
    quadratic: multiplications × bits of the one operand × bits of the other.
    linear: multiplications × 4, 8 or 16, the tier of the hardware that takes the wider operand.
    memory: bits of all weights.
    quadratic_ratio, linear_ratio, memory_ratio: divided by the cost with 16 bits everywhere.
  """

  quadratic: int
  linear: int
  memory: int
  quadratic_ratio: float
  linear_ratio: float
  memory_ratio: float


def layer_table(model: nn.Module, *arguments: Any, **options: Any) -> list[LayerCost]:
  """The convolutions and dense layers of a Flax network in the order in which they run, from shapes alone.

  Counts every layer with a kernel (Flax's `Conv`, `ConvTranspose`, `Dense`, `DenseGeneral` and layers like them) at its
  `weight_bits` and `act_bits` where it says them, as `quantization.QConv` does, and at 16 bits otherwise, and the two
  products of each attention, which have no weights. Everything else is free.

  >>> import jax.numpy as jnp
  >>> layer_table(nn.Dense(5), jnp.zeros((1, 3)))
  [LayerCost(name='', multiplications=15, weights=15, input_bits=16, weight_bits=16)]

  Args:
    model: the network.
    *arguments: what it is called with, arrays or `jax.ShapeDtypeStruct`, with a batch as first axis.
    **options: static keyword arguments of the call.

  Returns:
    One entry per call of a layer.

  Reference: Abdolrashidi et al., "Pareto-Optimal Quantized ResNet Is Mostly 4-bit", CVPR Workshops 2021 (cost model).
  """
  table = []

  def record(call, arguments, keywords, context):
    outputs = call(*arguments, **keywords)
    layer = context.module
    if context.method_name == "__call__" and layer.has_variable("params", "kernel"):
      inputs = arguments[0] if arguments else keywords["inputs"]
      kernel = layer.get_variable("params", "kernel").shape
      bits = [getattr(layer, name, None) or _FULL for name in ("act_bits", "weight_bits")]
      places, weights = _places(layer, kernel, inputs.shape, outputs.shape), math.prod(kernel)
      table.append(LayerCost("/".join(layer.path), places * weights, weights, *bits))
    if context.method_name == "__call__" and isinstance(layer, nn.MultiHeadDotProductAttention):
      table.append(LayerCost("/".join((*layer.path, "attention")), _attention(layer, arguments, keywords), 0))
    return outputs

  with nn.intercept_methods(record):
    jax.eval_shape(lambda key, *arguments: model.init(key, *arguments, **options), jax.random.key(0), *arguments)
  return table


def _places(layer, kernel, inputs, outputs):
  """How often a kernel is applied for one example."""
  if isinstance(layer, (nn.ConvTranspose, nn.ConvLocal)):
    return math.prod(inputs[1:-1]) if isinstance(layer, nn.ConvTranspose) else 1
  if isinstance(layer, nn.DenseGeneral):
    features = (layer.features,) if is_integer(layer.features) else tuple(layer.features)
    return math.prod(outputs[1 : len(outputs) - len(features)])
  # A dense layer on [batch, ..., features] is applied at every place in between, as a convolution is.
  return math.prod(outputs[1:-1])


def _attention(layer, arguments, keywords):
  """Multiplications of queries with keys and of their weights with values, for one example."""
  queries = arguments[0] if arguments else keywords["inputs_q"]
  keys = arguments[1] if len(arguments) > 1 and arguments[1] is not None else keywords.get("inputs_k")
  keys = queries if keys is None else keys
  width = layer.qkv_features or queries.shape[-1]
  return 2 * width * math.prod(queries.shape[1:-1]) * keys.shape[-2]


def assign_bits(table: Sequence[LayerCost], precision) -> list[LayerCost]:
  """The same layers with the bits of a precision, whose `end_` entries are for the first and the last one.

  >>> from jaxreg.quantization import Precision
  >>> rows = assign_bits([LayerCost("a", 10, 10)] * 3, Precision(4, 4, 8, 8))
  >>> [row.weight_bits for row in rows]
  [8, 4, 8]

  Args:
    table: what `layer_table` returns.
    precision: bits, a `quantization.Precision`.

  Returns:
    The new table.

  Reference: Abdolrashidi et al., "Pareto-Optimal Quantized ResNet Is Mostly 4-bit", CVPR Workshops 2021 (cost model).
  """
  inner = dict(input_bits=precision.activations, weight_bits=precision.weights)
  ends = dict(input_bits=precision.end_activations, weight_bits=precision.end_weights)
  return [row._replace(**(ends if index in (0, len(table) - 1) else inner)) for index, row in enumerate(table)]


def quant_cost(table: Sequence[LayerCost]) -> NetworkCost:
  """The compute costs `sum n b_x b_w` and `sum n tier(max(b_x, b_w))` and the memory `sum weights b_w`, exactly.

  `n` are multiplications and tiers 4, 8 and 16 bits, so that weights on few bits gain nothing in the linear cost when
  they meet wide inputs.

  >>> cost = quant_cost([LayerCost("a", 100, 10, input_bits=4, weight_bits=2)])
  >>> cost.quadratic, cost.linear, cost.memory, cost.linear_ratio
  (800, 400, 20, 0.25)

  Args:
    table: the layers.

  Returns:
    The costs, integers and ratios.

  Raises:
    ValueError: when the table is empty.

  Reference: Abdolrashidi et al., "Pareto-Optimal Quantized ResNet Is Mostly 4-bit", CVPR Workshops 2021 (cost model).
  """
  if not table:
    raise ValueError("table must have at least one layer, got none.")
  costs, full = (_sums(rows) for rows in (table, [row._replace(input_bits=_FULL, weight_bits=_FULL) for row in table]))
  return NetworkCost(*costs, *(cost / whole for cost, whole in zip(costs, full)))


def _sums(table):
  quadratic = sum(row.multiplications * row.input_bits * row.weight_bits for row in table)
  linear = sum(row.multiplications * _tier(max(row.input_bits, row.weight_bits)) for row in table)
  return quadratic, linear, sum(row.weights * row.weight_bits for row in table)


def _tier(bits):
  return 4 if bits <= 4 else 8 if bits <= 8 else _FULL
