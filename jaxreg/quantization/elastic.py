"""Elastic quantization: one set of weights for any number of bits, per tensor or per channel, symmetric or not.

Each quantizer keeps a table of learned step sizes and offsets with a column for each number of bits. What a layer uses
is data, an `ElasticConfig` in the collection `elastic`, so that one compiled program serves all configurations.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.dtypes import promote_dtype
from flax.traverse_util import flatten_dict, unflatten_dict

from jaxreg.checks import check_float, check_hyperparameter
from jaxreg.quantization.layers import conv_dimensions, conv_strides, layer_parameters
from jaxreg.quantization.straight_through import straight_through_value

__all__ = [
  "ELASTIC_BITS",
  "ElasticConfig",
  "ElasticConv",
  "ElasticDense",
  "ElasticLayer",
  "ElasticQuantizer",
  "LsqTable",
  "calibrate_elastic",
  "config_variables",
  "elastic_layers",
  "lsq_calibrate",
  "lsq_quantize",
  "recalibrate_batch_norm",
  "sample_config",
  "sample_forms",
  "uniform_config",
]

ELASTIC_BITS = (2, 3, 4, 5, 6, 7, 8)  # columns of the tables
_EPSILON = 1e-6  # added to step sizes
_NON_NEGATIVE = -1e-9  # inputs above this have no sign bit


def lsq_quantize(
  values: jax.Array,
  scale: jax.Array,
  offset: jax.Array | float = 0.0,
  *,
  bits: int | jax.Array,
  signed: bool | jax.Array = True,
  gradient_factor: float | jax.Array = 1.0,
) -> jax.Array:
  """Values on a learned grid, `S round(clip(t, n, p)) + offset` with `t = (values - offset) / S`, `S = |scale| + 1e-6`.

  The grid is `n = -2^(bits - 1)`, `p = 2^(bits - 1) - 1`, without a sign `0` and `2^bits - 1`. Rounding, half to even,
  has derivative one: with I = 1 where `n <= t <= p` and r the integer, the gradient is `G I` in the values,
  `gradient_factor sum G (r - I t)` in the scale and `gradient_factor sum G (1 - I)` in the offset.

  >>> import jax.numpy as jnp
  >>> lsq_quantize(jnp.array([-9.0, 0.4, 0.6, 9.0]), jnp.array(1.0), bits=2).round(3).tolist()
  [-2.0, 0.0, 1.0, 1.0]

  Args:
    values: floating `[...]`.
    scale: step sizes, broadcasting against `values`.
    offset: in units of the values, broadcasting against them; 0 in symmetric grids. An integer zero point z is
      `-offset / S`.
    bits: an integer in [1, 24]; may be traced.
    signed: whether the grid has negative integers; may be traced.
    gradient_factor: on the gradients of scale and offset, broadcasting against the scale; may be traced.

  Returns:
    `[...]`, in the dtype of `values`.

  Raises:
    ValueError: when values or scale are not floating point, they do not broadcast, or `bits` is not an integer in
      [1, 24].

  Reference: Xu, Han, Tian, Yang, Zhang, "EQ-Net: Elastic Quantization Neural Networks", ICCV 2023, equation 1 with the
    offset of its code, whose sign is kept here; the learned step is that of Esser et al., "Learned Step Size
    Quantization", ICLR 2020.
  """
  check_float("values", values)
  check_float("scale", scale)
  for name, array in (("scale", scale), ("offset", offset)):
    if not _broadcasts(jnp.shape(array), jnp.shape(values)):
      raise ValueError(f"{name} must broadcast against values {jnp.shape(values)}, got shape {jnp.shape(array)}.")
  dtype = jnp.promote_types(jnp.result_type(values), jnp.float32)
  wide, scale, offset = (jnp.asarray(array, dtype) for array in (values, scale, offset))
  low, high = grid_limits(bits, signed, dtype)
  step = jnp.abs(_scale_gradient(scale, gradient_factor)) + _EPSILON
  offset = _scale_gradient(offset, gradient_factor)
  ratio = jax.lax.stop_gradient((wide - offset) / step)
  integers = jnp.round(jnp.clip(ratio, low, high))
  # The ends are inside: zeros of a ReLU lie there. Through jnp.clip half of their gradient would be lost.
  inside = (low <= ratio) & (ratio <= high)
  slopes = jnp.where(inside, wide, offset) + step * jnp.where(inside, integers - ratio, integers)
  return straight_through_value(slopes, integers * step + offset).astype(jnp.result_type(values))


def grid_limits(bits, signed, dtype):
  """The smallest and the largest integer of a grid."""
  if not jnp.issubdtype(jnp.result_type(bits), jnp.integer):
    raise ValueError(f"bits must be an integer, got dtype {jnp.result_type(bits)}.")
  check_hyperparameter("bits", bits, low=1, high=24)
  half = jnp.left_shift(1, jnp.asarray(bits) - 1).astype(dtype)
  return jnp.where(signed, -half, 0), jnp.where(signed, half, 2 * half) - 1


def _broadcasts(shape, target):
  return len(shape) <= len(target) and all(a in (1, b) for a, b in zip(shape[::-1], target[::-1]))


def _scale_gradient(values, factor):
  scaled = values * jnp.asarray(factor, values.dtype)
  return straight_through_value(scaled, jnp.broadcast_to(values, scaled.shape))


class LsqTable(NamedTuple):
  """Step sizes and offsets, `[channels, bits]` each; one channel is the whole tensor."""

  scale: jax.Array
  offset: jax.Array


def lsq_calibrate(
  values: jax.Array,
  *,
  bits: Sequence[int] = ELASTIC_BITS,
  symmetric: bool | jax.Array,
  per_channel: bool = False,
  signed: bool | jax.Array = True,
  candidates: int = 80,
) -> LsqTable:
  """Step sizes and offsets with the smallest error `mean |x - quantized|^2.4` among clipped ranges.

  The range is multiplied by 1, 0.99, 0.98, … Symmetric grids take `max |x|`, others the smallest and largest value.

  >>> import jax.numpy as jnp
  >>> table = lsq_calibrate(jnp.linspace(-1, 1, 100), bits=(2, 8), symmetric=True)
  >>> table.scale.shape, bool(table.scale[0, 0] > table.scale[0, 1]), table.offset.tolist()
  ((1, 2), True, [[0.0, 0.0]])

  Args:
    values: floating, `[..., channels]`.
    bits: static; the columns of the table.
    symmetric: whether the offset is 0; may be traced.
    per_channel: static; whether each channel of the last axis has a step of its own.
    signed: whether the grid has negative integers; may be traced.
    candidates: static; number of ranges that are tried, at most 100.

  Returns:
    The table, float32 at least; `[channels, bits]`, or `[1, bits]`. It has no gradient.

  Raises:
    ValueError: when values are not floating point or empty, or `candidates` is out of range.

  Reference: Xu, Han, Tian, Yang, Zhang, "EQ-Net: Elastic Quantization Neural Networks", ICCV 2023, the initialisation
    of its code.
  """
  check_float("values", values)
  if not jnp.size(values):
    raise ValueError(f"values must not be empty, got shape {jnp.shape(values)}.")
  check_hyperparameter("candidates", candidates, low=1, high=100)
  return _calibrate(_rows(values, per_channel), tuple(bits), symmetric, signed, candidates, candidates)


def _rows(values, per_channel):
  wide = jax.lax.stop_gradient(jnp.asarray(values, jnp.promote_types(jnp.result_type(values), jnp.float32)))
  return wide.reshape(-1, wide.shape[-1]).T if per_channel else wide.reshape(1, -1)


@functools.partial(jax.jit, static_argnames=("bits", "candidates"))  # layers of one shape share it
def _calibrate(rows, bits, symmetric, signed, limit, candidates):
  """The table of rows, of which the first `limit` candidates count."""
  smallest, largest = grid_limits(jnp.asarray(bits), signed, rows.dtype)
  low, high = jnp.min(rows, axis=1)[:, None], jnp.max(rows, axis=1)[:, None]
  magnitude = jnp.maximum(jnp.abs(low), jnp.abs(high))
  high = jnp.where(symmetric, magnitude, high)
  low = jnp.where(symmetric, jnp.where(signed, -magnitude, 0), low)

  def table(share):
    scale = (share * high - share * low) / (largest - smallest)
    offset = jnp.where(signed, share * low - scale * smallest, _NON_NEGATIVE)
    return LsqTable(scale, jnp.where(symmetric, 0, offset).astype(scale.dtype))

  def error_of(scale, offset, low, high):
    step, offset = jnp.where(scale > 0, scale, 1)[:, None], offset[:, None]
    on_grid = jnp.round(jnp.clip((rows - offset) / step, low, high)) * step + offset
    return jnp.mean(jnp.abs(rows - on_grid) ** 2.4, axis=-1)

  def better(best, index):
    found, error = best
    new = table(1 - 0.01 * index.astype(rows.dtype))
    new_error = jax.vmap(error_of, (1, 1, 0, 0), 1)(*new, smallest, largest)
    improved = (new_error < error) & (index < limit)
    kept = jax.tree.map(lambda a, b: jnp.where(improved, a, b), new, found)
    return (kept, jnp.where(improved, new_error, error)), None

  start = table(1.0)
  if candidates == 1:
    return start
  infinite = jnp.full_like(start.scale, jnp.inf)
  return jax.lax.scan(better, (start, infinite), jnp.arange(candidates))[0][0]


class ElasticConfig(NamedTuple):
  """How layers are quantized: scalars for one layer, arrays `[layers]` in the order of their calls for a network.

  Attributes:
    weight_bits: integers from 2 to 8, or 0 for floating point.
    act_bits: the same of the layer's inputs.
    per_channel: whether each output channel of the weights has its own step.
    weight_symmetric: whether the weights' grid has no offset.
    act_symmetric: whether the inputs' grid has none.
  """

  weight_bits: jax.Array
  act_bits: jax.Array
  per_channel: jax.Array
  weight_symmetric: jax.Array
  act_symmetric: jax.Array


class ElasticQuantizer(nn.Module):
  """Fake-quantizes with the entry of its tables that the call asks for; all choices may be traced.

  Parameters `symmetric_scale`, `asymmetric_scale` and `asymmetric_offset` are `[1, bits]` tables, with the prefix
  `channel_` also `[channels, bits]` ones. Gradients of scales and offsets are multiplied by `1 / sqrt(p size)`, for
  channels by `2 / sqrt(p size / inputs)` as in the official code, with the largest integer p and, for inputs, the size
  of the batch on this device. What `init` fills the tables with are unclipped ranges of what it is called with: use
  `calibrate_elastic` afterwards.

  >>> import jax, jax.numpy as jnp
  >>> quantizer, values = ElasticQuantizer(), jnp.linspace(-1, 1, 25)
  >>> variables = quantizer.init(jax.random.key(0), values, bits=2, symmetric=True)
  >>> len(set(quantizer.apply(variables, values, bits=2, symmetric=True).tolist()))
  3

  Attributes:
    channels: whether the values are weights `[..., inputs, outputs]` with tables for output channels.

  Reference: Xu, Han, Tian, Yang, Zhang, "EQ-Net: Elastic Quantization Neural Networks", ICCV 2023, Section 3.1.
  """

  channels: bool = False

  @nn.compact
  def __call__(
    self,
    values: jax.Array,
    *,
    bits: int | jax.Array,
    symmetric: bool | jax.Array,
    per_channel: bool | jax.Array = False,
  ) -> jax.Array:
    check_hyperparameter("bits", bits, low=0, high=ELASTIC_BITS[-1])
    first = functools.cache(lambda: calibrated_tables(values, channels=self.channels, candidates=1))
    names = table_names(self.channels)
    tables = {name: self.param(name, lambda _, name=name: first()[name]) for name in names}
    signed = self.variable("calibration", "signed", lambda: _has_sign(values, self.channels)).value
    bits = jnp.asarray(bits)
    column = jnp.clip(bits, ELASTIC_BITS[0], ELASTIC_BITS[-1]) - ELASTIC_BITS[0]
    take = lambda name: jax.lax.dynamic_index_in_dim(tables[name], column, axis=1, keepdims=False)
    scale = jnp.where(symmetric, take("symmetric_scale"), take("asymmetric_scale"))
    offset = jnp.where(symmetric, 0, take("asymmetric_offset"))
    _, largest = grid_limits(column + ELASTIC_BITS[0], signed, scale.dtype)
    factor = jax.lax.rsqrt(largest * values.size)
    if self.channels:
      own_scale = jnp.where(symmetric, take("channel_symmetric_scale"), take("channel_asymmetric_scale"))
      own_offset = jnp.where(symmetric, 0, take("channel_asymmetric_offset"))
      scale, offset = jnp.where(per_channel, own_scale, scale), jnp.where(per_channel, own_offset, offset)
      factor = jnp.where(per_channel, 2 * jax.lax.rsqrt(largest * (values.size / values.shape[-2])), factor)
    on_grid = lsq_quantize(
      values, scale, offset, bits=column + ELASTIC_BITS[0], signed=signed, gradient_factor=factor
    )  # fmt: skip
    return jnp.where(bits > 0, on_grid, values)


def table_names(channels: bool) -> tuple[str, ...]:
  """The names of a quantizer's tables."""
  names = ("symmetric_scale", "asymmetric_scale", "asymmetric_offset")
  return names + tuple(f"channel_{name}" for name in names) if channels else names


def calibrated_tables(values, *, channels: bool, candidates: int = 80) -> dict[str, jax.Array]:
  """A quantizer's tables for these values; symmetric channels try five ranges at most, as in the official code."""
  signed = _has_sign(values, channels)
  found = {}
  for prefix, per_channel in (("", False), ("channel_", True))[: 1 + channels]:
    rows, limits = _rows(values, per_channel), jnp.array([5 if per_channel else candidates, candidates])
    both = jax.vmap(
      lambda symmetric, limit, rows=rows: _calibrate(rows, ELASTIC_BITS, symmetric, signed, limit, candidates)
    )
    scale, offset = both(jnp.array([True, False]), limits)
    found |= {f"{prefix}symmetric_scale": scale[0], f"{prefix}asymmetric_scale": scale[1]}
    found[f"{prefix}asymmetric_offset"] = offset[1]
  return found


def _has_sign(values, channels):
  return jnp.bool_(True) if channels else jnp.min(values) < _NON_NEGATIVE


class ElasticDense(nn.Module):
  """A dense layer with elastic quantization of its weights and inputs, configured by the collection `elastic`.

  >>> import jax, jax.numpy as jnp
  >>> layer = ElasticDense(2)
  >>> outputs, variables = jax.jit(layer.init_with_output)(jax.random.key(0), jnp.ones((5, 3)))
  >>> sorted(variables), outputs.shape
  (['calibration', 'elastic', 'params'], (5, 2))

  Attributes:
    features: number of outputs.
    use_bias: whether to add a bias, in floating point.
    dtype: of the computation, None for that of inputs and parameters.
    param_dtype: of kernel and bias.
    kernel_init: initializer of the weights.
    bias_init: initializer of the bias.

  Reference: Xu, Han, Tian, Yang, Zhang, "EQ-Net: Elastic Quantization Neural Networks", ICCV 2023, Section 3.1.
  """

  features: int
  use_bias: bool = True
  dtype: Any = None
  param_dtype: Any = jnp.float32
  kernel_init: Callable = nn.initializers.lecun_normal()
  bias_init: Callable = nn.initializers.zeros

  @nn.compact
  def __call__(self, inputs: jax.Array) -> jax.Array:
    inputs, kernel, bias = _operands(self, inputs, (inputs.shape[-1], self.features))
    outputs = inputs @ kernel
    return outputs if bias is None else outputs + bias


class ElasticConv(nn.Module):
  """A convolution `[batch, …, channels]` with elastic quantization, configured by the collection `elastic`.

  `models.ResNet(conv=ElasticConv, dense=ElasticDense, …)` is an elastic residual network.

  >>> import jax, jax.numpy as jnp
  >>> layer = ElasticConv(2, (3, 3), strides=(2, 2))
  >>> outputs, variables = jax.jit(layer.init_with_output)(jax.random.key(0), jnp.ones((1, 8, 8, 3)))
  >>> outputs.shape
  (1, 4, 4, 2)

  Attributes:
    features: number of output channels.
    kernel_size: extent of the kernel in each spatial direction.
    strides: one number per direction, None for ones.
    padding: `SAME`, `VALID` or pairs of numbers.
    use_bias, dtype, param_dtype, kernel_init, bias_init: as in `ElasticDense`.

  Reference: Xu, Han, Tian, Yang, Zhang, "EQ-Net: Elastic Quantization Neural Networks", ICCV 2023, Section 3.1.
  """

  features: int
  kernel_size: Sequence[int]
  strides: Sequence[int] | None = None
  padding: str | Sequence[tuple[int, int]] = "SAME"
  use_bias: bool = True
  dtype: Any = None
  param_dtype: Any = jnp.float32
  kernel_init: Callable = nn.initializers.lecun_normal()
  bias_init: Callable = nn.initializers.zeros

  @nn.compact
  def __call__(self, inputs: jax.Array) -> jax.Array:
    inputs, kernel, bias = _operands(self, inputs, (*self.kernel_size, inputs.shape[-1], self.features))
    outputs = jax.lax.conv_general_dilated(
      inputs, kernel, conv_strides(self), self.padding, dimension_numbers=conv_dimensions(inputs.ndim)
    )
    return outputs if bias is None else outputs + bias


def _operands(layer, inputs, shape):
  """Inputs and kernel on their grids, and the bias, all in the dtype of the computation."""
  highest = ELASTIC_BITS[-1]
  default = lambda: jax.tree.map(jnp.asarray, ElasticConfig(highest, highest, False, True, True))
  config = layer.variable("elastic", "config", default).value
  inputs, kernel, bias = promote_dtype(inputs, *layer_parameters(layer, shape), dtype=layer.dtype)
  kernel = ElasticQuantizer(channels=True, name="weight_quantizer")(
    kernel, bits=config.weight_bits, symmetric=config.weight_symmetric, per_channel=config.per_channel
  )
  inputs = ElasticQuantizer(name="input_quantizer")(inputs, bits=config.act_bits, symmetric=config.act_symmetric)
  return inputs, kernel, bias


def calibrate_elastic(model: nn.Module, variables: Mapping[str, Any], *arguments: Any, **options: Any) -> dict:
  """The variables of a network with all tables fitted to its weights and to the inputs of its layers on one batch.

  The batch runs through the network in floating point. Signs are decided here: inputs that are nowhere negative get a
  grid without a sign.

  >>> import jax, jax.numpy as jnp
  >>> layer, inputs = ElasticDense(2), jnp.abs(jax.random.normal(jax.random.key(1), (5, 3)))
  >>> variables = jax.jit(lambda key: calibrate_elastic(layer, layer.init(key, inputs), inputs))(jax.random.key(0))
  >>> bool(variables["calibration"]["input_quantizer"]["signed"])
  False

  Args:
    model: the network.
    variables: of `model.init`.
    *arguments: of the call, with the inputs of a calibration batch.
    **options: keyword arguments of the call.

  Returns:
    New variables.

  Raises:
    ValueError: when the network has no elastic layer.

  Reference: Xu, Han, Tian, Yang, Zhang, "EQ-Net: Elastic Quantization Neural Networks", ICCV 2023; its code fits the
    tables of a layer to inputs that are already quantized.
  """
  seen = {}

  def record(call, arguments, keywords, context):
    if not isinstance(context.module, ElasticQuantizer) or context.method_name != "__call__":
      return call(*arguments, **keywords)
    seen[context.module.path] = (arguments[0], context.module.channels)
    return arguments[0]

  with nn.intercept_methods(record):
    model.apply(variables, *arguments, **options)
  if not seen:
    raise ValueError("model must have elastic layers, got none.")
  params, signs = flatten_dict(variables["params"]), flatten_dict(variables["calibration"])
  for path, (values, channels) in seen.items():
    signs[(*path, "signed")] = _has_sign(values, channels)
    for name, table in calibrated_tables(values, channels=channels).items():
      params[(*path, name)] = table.astype(params[(*path, name)].dtype)
  return {**variables, "params": unflatten_dict(params), "calibration": unflatten_dict(signs)}


def recalibrate_batch_norm(model: nn.Module, variables: Mapping[str, Any], batches: jax.Array) -> dict:
  """The variables with batch statistics of their current configuration, from batches that train nothing.

  A supernet's moving averages mix all its configurations, so each needs statistics of its own before it is evaluated.

  >>> import jax, jax.numpy as jnp
  >>> from jaxreg.models.resnet import ResNet
  >>> model = ResNet(stages=(), classes=2, width=2)
  >>> batches = jax.random.normal(jax.random.key(0), (3, 4, 8, 8, 1))
  >>> start = lambda key: recalibrate_batch_norm(model, model.init(key, batches[0], train=False), batches)
  >>> new = jax.jit(start)(jax.random.key(1))
  >>> bool((new["batch_stats"]["stem_norm"]["mean"] != 0).all())
  True

  Args:
    model: a network whose call takes `train` and whose statistics are in the collection `batch_stats`.
    variables: of the network, with the configuration in `elastic`.
    batches: floating `[batches, examples, …]`, run through in order.

  Returns:
    The variables with new `batch_stats`.

  Reference: Xu, Han, Tian, Yang, Zhang, "EQ-Net: Elastic Quantization Neural Networks", ICCV 2023, Section 4.
  """

  def run(statistics, inputs):
    _, new = model.apply({**variables, "batch_stats": statistics}, inputs, train=True, mutable=["batch_stats"])
    return new["batch_stats"], None

  statistics, _ = jax.lax.scan(run, variables["batch_stats"], batches)
  return {**variables, "batch_stats": statistics}


class ElasticLayer(NamedTuple):
  """One elastic layer of a network.

  Attributes:
    path: names of the module from the root.
    weights: number of weights.
    inputs: number of inputs for one example.
  """

  path: tuple[str, ...]
  weights: int
  inputs: int


def elastic_layers(model: nn.Module, *arguments: Any, **options: Any) -> list[ElasticLayer]:
  """The elastic layers of a network in the order of their calls, from shapes alone.

  >>> import jax.numpy as jnp
  >>> elastic_layers(ElasticDense(5), jnp.zeros((2, 3)))
  [ElasticLayer(path=(), weights=15, inputs=3)]

  Args:
    model: the network.
    *arguments: what it is called with, arrays or `jax.ShapeDtypeStruct`, with a batch as first axis.
    **options: static keyword arguments of the call.

  Returns:
    One entry per layer.

  Reference: none.
  """
  found = []

  def record(call, arguments, keywords, context):
    outputs = call(*arguments, **keywords)
    layer = context.module
    if isinstance(layer, (ElasticConv, ElasticDense)) and context.method_name == "__call__":
      inputs = arguments[0]
      weights = layer.variables["params"]["kernel"].size
      found.append(ElasticLayer(layer.path, weights, inputs.size // inputs.shape[0]))
    return outputs

  with nn.intercept_methods(record):
    jax.eval_shape(lambda key, *arguments: model.init(key, *arguments, **options), jax.random.key(0), *arguments)
  return found


def config_variables(config: ElasticConfig, layers: Sequence[ElasticLayer]) -> dict:
  """A network's configuration as its collection `elastic`.

  >>> import jax.numpy as jnp
  >>> layers = elastic_layers(ElasticDense(5), jnp.zeros((2, 3)))
  >>> int(config_variables(uniform_config(1, bits=4, end_bits=2), layers)["config"].weight_bits)
  2

  Args:
    config: arrays `[layers]`.
    layers: what `elastic_layers` returns.

  Returns:
    Nested dicts, for `model.apply({"params": …, "calibration": …, "elastic": …}, …)`.

  Raises:
    ValueError: when the numbers of layers differ.

  Reference: none.
  """
  if jnp.shape(config.weight_bits) != (len(layers),):
    raise ValueError(f"config must have arrays of shape {(len(layers),)}, got {jnp.shape(config.weight_bits)}.")
  each = {
    (*layer.path, "config"): jax.tree.map(lambda leaf, index=index: jnp.asarray(leaf)[index], config)
    for index, layer in enumerate(layers)
  }
  return unflatten_dict(each)


def uniform_config(
  layers: int,
  *,
  bits: int | jax.Array,
  end_bits: int | jax.Array = ELASTIC_BITS[-1],
  per_channel: bool | jax.Array = False,
  weight_symmetric: bool | jax.Array = True,
  act_symmetric: bool | jax.Array = True,
) -> ElasticConfig:
  """The same for all layers, except for the bits of the first and the last one.

  >>> uniform_config(4, bits=3).weight_bits.tolist()
  [8, 3, 3, 8]

  Args:
    layers: static; number of layers.
    bits: of weights and inputs of the inner layers; may be traced.
    end_bits: of the first and the last layer; may be traced.
    per_channel, weight_symmetric, act_symmetric: as in `ElasticConfig`; may be traced.

  Returns:
    Arrays `[layers]`.

  Raises:
    ValueError: when a number of bits is neither 0 nor in [2, 8].

  Reference: Xu, Han, Tian, Yang, Zhang, "EQ-Net: Elastic Quantization Neural Networks", ICCV 2023, Section 3.1.
  """
  for name, value in (("bits", bits), ("end_bits", end_bits)):
    if isinstance(value, int) and value not in (0, *ELASTIC_BITS):
      raise ValueError(f"{name} must be 0 or in [{ELASTIC_BITS[0]}, {ELASTIC_BITS[-1]}], got {value}.")
  all_bits = jnp.where(_inner(layers), bits, end_bits).astype(jnp.int32)
  forms = (
    jnp.broadcast_to(jnp.asarray(form, bool), (layers,)) for form in (per_channel, weight_symmetric, act_symmetric)
  )
  return ElasticConfig(all_bits, all_bits, *forms)


def sample_forms(key: jax.Array, config: ElasticConfig) -> ElasticConfig:
  """The same bits, with granularity and symmetry drawn anew for each layer.

  >>> import jax
  >>> sample_forms(jax.random.key(0), uniform_config(4, bits=3)).weight_bits.tolist()
  [8, 3, 3, 8]

  Args:
    key: threefry key.
    config: arrays `[layers]`.

  Returns:
    The new configuration.

  Reference: Xu, Han, Tian, Yang, Zhang, "EQ-Net: Elastic Quantization Neural Networks", ICCV 2023, Section 3.2.
  """
  forms = jax.random.bernoulli(key, 0.5, (3, *jnp.shape(config.weight_bits)))
  return ElasticConfig(config.weight_bits, config.act_bits, *forms)


def sample_config(
  key: jax.Array, layers: int, *, candidates: Sequence[int] = ELASTIC_BITS, end_bits: int = ELASTIC_BITS[-1]
) -> ElasticConfig:
  """Bits of weights and of inputs, granularity and symmetry drawn for each layer; the end layers keep their bits.

  >>> import jax
  >>> config = sample_config(jax.random.key(0), 5, candidates=(2, 4))
  >>> config.weight_bits[0].item(), set(config.act_bits[1:-1].tolist()) <= {2, 4}
  (8, True)

  Args:
    key: threefry key.
    layers: static; number of layers.
    candidates: static; numbers of bits to draw from.
    end_bits: of the first and the last layer.

  Returns:
    Arrays `[layers]`.

  Raises:
    ValueError: when a candidate is not in [2, 8].

  Reference: Xu, Han, Tian, Yang, Zhang, "EQ-Net: Elastic Quantization Neural Networks", ICCV 2023, Section 3.2.
  """
  if not set(candidates) <= set(ELASTIC_BITS):
    raise ValueError(f"candidates must lie in [{ELASTIC_BITS[0]}, {ELASTIC_BITS[-1]}], got {tuple(candidates)}.")
  bit_key, form_key = jax.random.split(key)
  drawn = jax.random.choice(bit_key, jnp.asarray(candidates, jnp.int32), (2, layers))
  bits = jnp.where(_inner(layers), drawn, end_bits)
  config = uniform_config(layers, bits=candidates[0])
  return sample_forms(form_key, config._replace(weight_bits=bits[0], act_bits=bits[1]))


def _inner(layers):
  place = jnp.arange(layers)
  return (place > 0) & (place < layers - 1)
