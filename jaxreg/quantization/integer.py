"""Inference in integers: 8-bit operands, 32-bit sums, one scale per layer's inputs and per output channel.

AQT multiplies the integers. It has announced its end, with qwix as its successor: all that knows of it here are
`integer_dot` and `aqt_dot_general`.
"""

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxreg.checks import check_float
from jaxreg.extras import extra_needed
from jaxreg.metrics.sizes import static_integer
from jaxreg.quantization.bounds import activation_bound_init
from jaxreg.quantization.fake_quant import Quantized, quantize_activation, quantize_weight
from jaxreg.quantization.layers import ConvWindow, circular_padding, conv_window

__all__ = ["IntegerConv", "IntegerDense", "aqt_dot_general", "integer_conv", "integer_dense", "integer_dot"]

_SHIFT = 128  # brings unsigned 8-bit activations into the range of signed ones


def integer_dot(lhs: ArrayLike, rhs: ArrayLike) -> jax.Array:
  """The exact product of 8-bit integers, `lhs[..., i] rhs[i, j]` summed over `i` in 32 bits.

  >>> import jax.numpy as jnp
  >>> integer_dot(jnp.full((1, 3), 127, jnp.int8), jnp.full((3, 1), -127, jnp.int8)).tolist()
  [[-48387]]

  Args:
    lhs: int8 `[..., inputs]`.
    rhs: int8 `[inputs, outputs]`.

  Returns:
    int32 `[..., outputs]`.

  Raises:
    ValueError: when the operands are not int8 or do not fit.

  Reference: Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only
    Inference", CVPR 2018, Section 2.2.
  """
  with extra_needed("quantization", "integer_dot"):
    from aqt.jax.v2 import aqt_tensor, config

  for name, operand in (("lhs", lhs), ("rhs", rhs)):
    if jnp.result_type(operand) != jnp.int8:
      raise ValueError(f"{name} must be int8, got {jnp.result_type(operand)}.")
  if jnp.ndim(lhs) < 1 or jnp.ndim(rhs) != 2 or lhs.shape[-1] != rhs.shape[0]:
    raise ValueError(f"rhs must be [inputs, outputs] for the inputs of lhs {lhs.shape}, got {rhs.shape}.")
  general = config.default_unquantized_config()
  config.set_accumulator_dtype(general, fwd_dtype=jnp.int32, dlhs_dtype=None, drhs_dtype=None)
  ready = [
    aqt_tensor.QTensor(qvalue=jnp.asarray(q), scale=[], scale_t=[], bias=[], dequant_dtype=jnp.int32)
    for q in (lhs, rhs)
  ]
  # Without scales what AQT returns is the sum itself, in the dtype to which the first two arguments promote.
  shapes = [jnp.asarray(q, jnp.int32) for q in (lhs, rhs)]
  return general.fwd(*shapes, *ready, (((lhs.ndim - 1,), (0,)), ((), ())))[0]


def aqt_dot_general(*, bits: int, quantized_backward: bool = True) -> Callable:
  """AQT's own quantized product for the argument `dot_general` of `flax.linen.Dense`, for training.

  Its scales are those of AQT, `max |.| / (2^(bits - 1) - 1/2)` of each row of the inputs and each column of the
  weights, taken anew at every call, with rounding of halves to even: not the scales of `fake_quant_weight`, and no
  calibration. Its counterpart for convolutions has no gradient (aqtp 0.9.0), hence `QConv`.

  >>> import flax.linen as nn, jax, jax.numpy as jnp
  >>> layer = nn.Dense(2, dot_general=aqt_dot_general(bits=4))
  >>> jax.eval_shape(layer.init_with_output, jax.random.key(0), jnp.ones((5, 3)))[0].shape
  (5, 2)

  Args:
    bits: of both operands, 2 to 8; static.
    quantized_backward: static; whether the backward pass multiplies with the quantized operands, as fake quantization
      does, or with the original ones.

  Returns:
    A function like `jax.lax.dot_general`, a Flax module.

  Raises:
    ValueError: when `bits` are out of range.

  Reference: Lew et al., "AQT: Accurate Quantized Training", https://github.com/google/aqt, version 2.
  """
  with extra_needed("quantization", "aqt_dot_general"):
    from aqt.jax.v2 import config
    from aqt.jax.v2.flax import aqt_flax

  bits = static_integer("bits", bits, low=2, high=8)
  settings = config.config_v4(fwd_bits=bits, dlhs_bits=None, drhs_bits=None)
  config.set_stochastic_rounding(settings, False, False, "jax.uniform")
  if quantized_backward:
    config.set_use_fwd_quant(settings, True, True)  # config_v4 refuses it as an argument
  return aqt_flax.AqtDotGeneral(settings, prng_name=None)


def integer_dense(
  inputs: ArrayLike,
  kernel: ArrayLike | Quantized,
  *,
  weight_bits: ArrayLike,
  act_bits: ArrayLike,
  bound: ArrayLike,
  signed: bool,
) -> jax.Array:
  """A dense layer in integers: what its fake-quantized operands give, `(q_x q_w) / (s_x s_w)`, up to one rounding.

  Unsigned activations are shifted by 128, which the weights' column sums correct exactly.

  >>> import jax.numpy as jnp
  >>> options = dict(weight_bits=8, act_bits=8, bound=1.0, signed=False)
  >>> [round(x, 3) for x in integer_dense(jnp.array([[1.0, 0.5]]), jnp.array([[1.0], [-1.0]]), **options)[0].tolist()]
  [0.5]

  Args:
    inputs: floating `[..., inputs]`.
    kernel: floating `[inputs, outputs]`, or what `quantize_weight` makes of it.
    weight_bits: 2 to 8, of the weights; may be traced. Not used where the kernel is quantized already.
    act_bits: 2 to 8, of the inputs; may be traced.
    bound: non-negative scalar, of the inputs; one for all channels, for it is taken out of the sum. Where it is
      negative, which is a bound that was never frozen, the outputs are NaN.
    signed: static; whether inputs have both signs.

  Returns:
    `[..., outputs]`, in the dtype of the inputs. There is no gradient.

  Raises:
    ValueError: when arguments do not fit or are out of range.

  Reference: Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only
    Inference", CVPR 2018, Section 2.3; grids of Abdolrashidi et al., CVPR Workshops 2021.
  """
  _check_kernel(inputs, kernel, 2)
  values, weights, unscale = _integer_operands(inputs, kernel, weight_bits, act_bits, bound, signed)
  return unscale(integer_dot(values, weights), jnp.sum(weights, axis=0, dtype=jnp.int32))


def integer_conv(
  inputs: ArrayLike,
  kernel: ArrayLike | Quantized,
  *,
  weight_bits: ArrayLike,
  act_bits: ArrayLike,
  bound: ArrayLike,
  signed: bool,
  strides: Sequence[int] = (1, 1),
  padding: str | Sequence[tuple[int, int]] = "SAME",
  kernel_dilation: Sequence[int] = (1, 1),
  feature_group_count: int = 1,
) -> jax.Array:
  """A convolution in integers, as `integer_dense`: the sum of one product for each position in the kernel.

  The products are AQT's; with groups of channels, which AQT does not have, they are XLA's.

  >>> import jax.numpy as jnp
  >>> options = dict(weight_bits=4, act_bits=4, bound=2.0, signed=False)
  >>> outputs = integer_conv(jnp.ones((1, 4, 4, 1)), jnp.ones((3, 3, 1, 1)), **options)
  >>> [round(x, 3) for x in outputs.ravel().tolist()[:4]]
  [4.0, 6.0, 6.0, 4.0]

  Args:
    inputs: floating `[batch, height, width, inputs]`.
    kernel: floating `[rows, columns, inputs / groups, outputs]`, or what `quantize_weight` makes of it.
    weight_bits, act_bits, bound, signed: as in `integer_dense`.
    strides: static, of both directions.
    padding: static, `SAME`, `VALID`, `CIRCULAR` or two pairs of numbers.
    kernel_dilation: static, distances of the kernel's entries.
    feature_group_count: static, number of groups of channels.

  Returns:
    `[batch, height, width, outputs]`, in the dtype of the inputs. There is no gradient.

  Raises:
    ValueError: when arguments do not fit or are out of range.

  Reference: Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only
    Inference", CVPR 2018, Section 2.3; grids of Abdolrashidi et al., CVPR Workshops 2021.
  """
  _check_kernel(inputs, kernel, 4, feature_group_count)
  values, weights, unscale = _integer_operands(inputs, kernel, weight_bits, act_bits, bound, signed)
  shape = weights.shape
  values, padding = circular_padding(values, ConvWindow(shape, tuple(strides), tuple(kernel_dilation), padding))
  spans = [(size - 1) * rate + 1 for size, rate in zip(shape, kernel_dilation)]
  if isinstance(padding, str):
    padding = jax.lax.padtype_to_pads(values.shape[1:3], spans, strides, padding)
  # Beyond the edge is a zero, which the shift has moved as well.
  padded = jnp.pad(values, [(0, 0), *padding, (0, 0)], constant_values=0 if signed else -_SHIFT)
  counts = [(n - span) // stride + 1 for n, span, stride in zip(padded.shape[1:3], spans, strides)]

  def part(i, j):
    starts = i * kernel_dilation[0], j * kernel_dilation[1]
    rows, columns = (
      slice(start, start + (count - 1) * stride + 1, stride) for start, count, stride in zip(starts, counts, strides)
    )
    return _grouped_dot(padded[:, rows, columns], weights[i, j], feature_group_count)

  total = sum(part(i, j) for i in range(shape[0]) for j in range(shape[1]))
  return unscale(total, jnp.sum(weights, axis=(0, 1, 2), dtype=jnp.int32))


def _grouped_dot(values, weights, groups):
  if groups == 1:
    return integer_dot(values, weights)
  values = values.reshape(*values.shape[:-1], groups, -1)
  weights = weights.reshape(len(weights), groups, -1)
  products = jnp.einsum("...gi,igo->...go", values, weights, preferred_element_type=jnp.int32)
  return products.reshape(*products.shape[:-2], -1)


def _integer_operands(inputs, kernel, weight_bits, act_bits, bound, signed):
  """8-bit operands, and the function from integer sums and column sums of weights to the layer's outputs."""
  for name, bits in (("weight_bits", weight_bits), ("act_bits", act_bits)):
    stored = name == "weight_bits" and isinstance(kernel, Quantized)
    if not stored and not isinstance(bits, jax.Array) and bits not in range(2, 9):
      raise ValueError(f"{name} must be an integer in [2, 8], got {bits}.")
  if jnp.ndim(bound):
    raise ValueError(f"bound must be one number for all channels, got shape {jnp.shape(bound)}.")
  weights = kernel if isinstance(kernel, Quantized) else quantize_weight(kernel, bits=weight_bits)
  values = quantize_activation(inputs, bits=act_bits, bound=bound, signed=signed)
  shift = 0 if signed else _SHIFT
  scale = (values.scale * weights.scale).reshape(-1)

  def unscale(total, column_sums):
    outputs = (total + shift * column_sums) / scale
    return jnp.where(jnp.asarray(bound) < 0, jnp.nan, outputs).astype(inputs.dtype)

  return (values.values - shift).astype(jnp.int8), weights.values.astype(jnp.int8), unscale


def _check_kernel(inputs, kernel, rank, groups=1):
  check_float("inputs", inputs)
  if isinstance(kernel, Quantized):
    kernel = kernel.values
  else:
    check_float("kernel", kernel)
  if jnp.ndim(kernel) != rank or jnp.ndim(inputs) < 1 or kernel.shape[-2] * groups != inputs.shape[-1]:
    raise ValueError(
      f"kernel must have {rank} axes, the last but one of inputs {jnp.shape(inputs)}, got {jnp.shape(kernel)}."
    )


class _Frozen(nn.Module):
  """The calibrated bound of a layer's inputs, the largest of its channels'."""

  @nn.compact
  def __call__(self, inputs):
    state = self.variable("quant_stats", "state", activation_bound_init, inputs.shape[-1], dtype=inputs.dtype)
    return jnp.max(state.value["bound"] if isinstance(state.value, dict) else state.value.bound)


class IntegerDense(nn.Module):
  """A trained `QDense` in integer arithmetic; takes its variables, and the largest bound of the channels for all.

  Where the collection `integer` holds the layer's weights as integers (`integer_variables` puts them there), it takes
  them, and no kernel is needed; otherwise it quantizes the kernel in every call.

  >>> import jax, jax.numpy as jnp
  >>> from jaxreg.quantization.layers import QDense
  >>> x, bits = jnp.ones((1, 3)), dict(weight_bits=8, act_bits=8)
  >>> variables = jax.eval_shape(QDense(2, **bits).init, jax.random.key(0), x)
  >>> jax.eval_shape(IntegerDense(2, **bits).apply, variables, x).shape
  (1, 2)

  Attributes:
    features, weight_bits, act_bits, signed, use_bias, param_dtype, kernel_init, bias_init: as in `QDense`; at most
      8 bits.
    dtype, rate, axis_name, from_first_batch: not used; there so that the class can take the place of `QDense`.

  Reference: Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only
    Inference", CVPR 2018.
  """

  features: int
  weight_bits: int | jax.Array = 8
  act_bits: int | jax.Array = 8
  signed: bool = False
  use_bias: bool = True
  dtype: Any = None
  param_dtype: Any = jnp.float32
  kernel_init: Callable = nn.initializers.lecun_normal()
  bias_init: Callable = nn.initializers.zeros
  rate: float = 0.1
  axis_name: str | None = None
  from_first_batch: bool = True

  @nn.compact
  def __call__(self, inputs: ArrayLike) -> jax.Array:
    kernel, bias = _parameters(self, (inputs.shape[-1], self.features))
    outputs = integer_dense(inputs, kernel, **_grids(self, inputs))
    return outputs if bias is None else outputs + bias


class IntegerConv(nn.Module):
  """A trained `QConv` on images in integer arithmetic; takes its variables, with the largest bound of the channels.

  Stored integers are taken as in `IntegerDense`.

  >>> import jax, jax.numpy as jnp
  >>> from jaxreg.models import quant_resnet
  >>> from jaxreg.quantization.layers import PRECISIONS
  >>> options = dict(classes=3, width=2, conv=IntegerConv, dense=IntegerDense)
  >>> model = quant_resnet((1,), PRECISIONS["W8A8"], **options)
  >>> run = lambda key, images: model.init_with_output(key, images, train=False)
  >>> jax.eval_shape(run, jax.random.key(0), jnp.ones((2, 4, 4, 1)))[0].shape
  (2, 3)

  Attributes:
    features, kernel_size, strides, padding, kernel_dilation, feature_group_count, weight_bits, act_bits, signed,
      use_bias, param_dtype, kernel_init, bias_init: as in `QConv`; at most 8 bits.
    dtype, rate, axis_name, from_first_batch: not used; there so that the class can take the place of `QConv`.

  Reference: Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only
    Inference", CVPR 2018.
  """

  features: int
  kernel_size: int | Sequence[int]
  strides: int | Sequence[int] | None = None
  padding: str | Sequence[tuple[int, int]] = "SAME"
  kernel_dilation: int | Sequence[int] | None = None
  feature_group_count: int = 1
  weight_bits: int | jax.Array = 8
  act_bits: int | jax.Array = 8
  signed: bool = False
  use_bias: bool = True
  dtype: Any = None
  param_dtype: Any = jnp.float32
  kernel_init: Callable = nn.initializers.lecun_normal()
  bias_init: Callable = nn.initializers.zeros
  rate: float = 0.1
  axis_name: str | None = None
  from_first_batch: bool = True

  @nn.compact
  def __call__(self, inputs: ArrayLike) -> jax.Array:
    window = conv_window(self, inputs)
    kernel, bias = _parameters(self, window.kernel_shape)
    options = dict(strides=window.strides, padding=window.padding, kernel_dilation=window.dilation)
    options |= dict(feature_group_count=self.feature_group_count)
    outputs = integer_conv(inputs, kernel, **_grids(self, inputs), **options)
    return outputs if bias is None else outputs + bias


def _grids(layer, inputs):
  bound = _Frozen(name="input_bound")(inputs)
  return dict(weight_bits=layer.weight_bits, act_bits=layer.act_bits, bound=bound, signed=layer.signed)


def _parameters(layer, shape):
  """The kernel as integers, those stored in the collection `integer` if there are any, and the bias or None."""
  if layer.has_variable("integer", "kernel"):
    kernel = Quantized(*(layer.get_variable("integer", name) for name in ("kernel", "scale")))
  else:
    kernel = layer.param("kernel", layer.kernel_init, shape, layer.param_dtype)
    kernel = kernel if layer.is_initializing() else _stored(layer, kernel)
  return kernel, layer.param("bias", layer.bias_init, (shape[-1],), layer.param_dtype) if layer.use_bias else None


def _stored(layer, kernel):
  """The kernel, and its integers where the collection is mutable."""
  if not layer.is_mutable_collection("integer"):
    return kernel
  weights = quantize_weight(kernel, bits=layer.weight_bits)
  narrow = not isinstance(layer.weight_bits, jax.Array) and layer.weight_bits <= 4
  layer.put_variable("integer", "kernel", weights.values.astype(jnp.int4 if narrow else jnp.int8))
  layer.put_variable("integer", "scale", weights.scale)
  return weights
