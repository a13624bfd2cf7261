"""Inference in integers: 8-bit operands, 32-bit sums, one scale per layer's inputs and per output channel.

AQT multiplies the integers. It has announced its end, with qwix as its successor: all that knows of it here are
`integer_dot` and `aqt_dot_general`.
"""

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxreg.checks import check_float
from jaxreg.quantization.bounds import activation_bound_init
from jaxreg.quantization.fake_quant import quantize_activation, quantize_weight
from jaxreg.quantization.layers import conv_strides, layer_parameters

__all__ = ["IntegerConv", "IntegerDense", "aqt_dot_general", "integer_conv", "integer_dense", "integer_dot"]

_SHIFT = 128  # brings unsigned 8-bit activations into the range of signed ones


def integer_dot(lhs: jax.Array, rhs: jax.Array) -> jax.Array:
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
  from aqt.jax.v2 import config
  from aqt.jax.v2.flax import aqt_flax

  if not isinstance(bits, int) or not 2 <= bits <= 8:
    raise ValueError(f"bits must be an integer in [2, 8], got {bits}.")
  settings = config.config_v4(fwd_bits=bits, dlhs_bits=None, drhs_bits=None)
  config.set_stochastic_rounding(settings, False, False, "jax.uniform")
  if quantized_backward:
    config.set_use_fwd_quant(settings, True, True)  # config_v4 refuses it as an argument
  return aqt_flax.AqtDotGeneral(settings, prng_name=None)


def integer_dense(
  inputs: jax.Array,
  kernel: jax.Array,
  *,
  weight_bits: int | jax.Array,
  act_bits: int | jax.Array,
  bound: float | jax.Array,
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
    kernel: floating `[inputs, outputs]`.
    weight_bits: 2 to 8, of the weights; may be traced.
    act_bits: 2 to 8, of the inputs; may be traced.
    bound: non-negative scalar, of the inputs; one for all channels, for it is taken out of the sum.
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
  inputs: jax.Array,
  kernel: jax.Array,
  *,
  weight_bits: int | jax.Array,
  act_bits: int | jax.Array,
  bound: float | jax.Array,
  signed: bool,
  strides: Sequence[int] = (1, 1),
  padding: str | Sequence[tuple[int, int]] = "SAME",
) -> jax.Array:
  """A convolution in integers, as `integer_dense`: the sum of one product for each position in the kernel.

  >>> import jax.numpy as jnp
  >>> options = dict(weight_bits=4, act_bits=4, bound=2.0, signed=False)
  >>> outputs = integer_conv(jnp.ones((1, 4, 4, 1)), jnp.ones((3, 3, 1, 1)), **options)
  >>> [round(x, 3) for x in outputs.ravel().tolist()[:4]]
  [4.0, 6.0, 6.0, 4.0]

  Args:
    inputs: floating `[batch, height, width, inputs]`.
    kernel: floating `[rows, columns, inputs, outputs]`.
    weight_bits: 2 to 8, of the weights; may be traced.
    act_bits: 2 to 8, of the inputs; may be traced.
    bound: non-negative scalar, of the inputs.
    signed: static; whether inputs have both signs.
    strides: static, of both directions.
    padding: static, `SAME`, `VALID` or two pairs of numbers.

  Returns:
    `[batch, height, width, outputs]`, in the dtype of the inputs. There is no gradient.

  Raises:
    ValueError: when arguments do not fit or are out of range.

  Reference: Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only
    Inference", CVPR 2018, Section 2.3; grids of Abdolrashidi et al., CVPR Workshops 2021.
  """
  _check_kernel(inputs, kernel, 4)
  values, weights, unscale = _integer_operands(inputs, kernel, weight_bits, act_bits, bound, signed)
  window = kernel.shape[:2]
  if isinstance(padding, str):
    padding = jax.lax.padtype_to_pads(inputs.shape[1:3], window, strides, padding)
  edges = [(0, 0), *padding, (0, 0)]
  # Beyond the edge is a zero, which the shift has moved as well.
  padded = jnp.pad(values, edges, constant_values=0 if signed else -_SHIFT)
  rows, columns = ((n - size) // stride + 1 for n, size, stride in zip(padded.shape[1:3], window, strides))

  def part(i, j):
    ends = i + (rows - 1) * strides[0] + 1, j + (columns - 1) * strides[1] + 1
    return integer_dot(padded[:, i : ends[0] : strides[0], j : ends[1] : strides[1]], weights[i, j])

  total = sum(part(i, j) for i in range(window[0]) for j in range(window[1]))
  return unscale(total, jnp.sum(weights, axis=(0, 1, 2), dtype=jnp.int32))


def _integer_operands(inputs, kernel, weight_bits, act_bits, bound, signed):
  """8-bit operands, and the function from integer sums and column sums of weights to the layer's outputs."""
  for name, bits in (("weight_bits", weight_bits), ("act_bits", act_bits)):
    if not isinstance(bits, jax.Array) and bits not in range(2, 9):
      raise ValueError(f"{name} must be an integer in [2, 8], got {bits}.")
  if jnp.ndim(bound):
    raise ValueError(f"bound must be one number for all channels, got shape {jnp.shape(bound)}.")
  weights = quantize_weight(kernel, bits=weight_bits)
  values = quantize_activation(inputs, bits=act_bits, bound=bound, signed=signed)
  shift = 0 if signed else _SHIFT
  scale = (values.scale * weights.scale).reshape(-1)

  def unscale(total, column_sums):
    return ((total + shift * column_sums) / scale).astype(inputs.dtype)

  return (values.values - shift).astype(jnp.int8), weights.values.astype(jnp.int8), unscale


def _check_kernel(inputs, kernel, rank):
  check_float("inputs", inputs)
  check_float("kernel", kernel)
  if jnp.ndim(kernel) != rank or jnp.ndim(inputs) < 1 or kernel.shape[-2] != inputs.shape[-1]:
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

  >>> import jax, jax.numpy as jnp
  >>> from jaxreg.quantization.layers import QDense
  >>> x, bits = jnp.ones((1, 3)), dict(weight_bits=8, act_bits=8)
  >>> variables = jax.eval_shape(QDense(2, **bits).init, jax.random.key(0), x)
  >>> jax.eval_shape(IntegerDense(2, **bits).apply, variables, x).shape
  (1, 2)

  Attributes:
    features, weight_bits, act_bits, signed, use_bias, param_dtype, kernel_init, bias_init: as in `QDense`; at most
      8 bits.
    dtype, rate, axis_name: not used; there so that the class can take the place of `QDense`.

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

  @nn.compact
  def __call__(self, inputs: jax.Array) -> jax.Array:
    kernel, bias = layer_parameters(self, (inputs.shape[-1], self.features))
    outputs = integer_dense(inputs, kernel, **_grids(self, inputs))
    return outputs if bias is None else outputs + bias


class IntegerConv(nn.Module):
  """A trained `QConv` on images in integer arithmetic; takes its variables, with the largest bound of the channels.

  >>> import jax, jax.numpy as jnp
  >>> from jaxreg.models import quant_resnet
  >>> from jaxreg.quantization.layers import PRECISIONS
  >>> options = dict(classes=3, width=2, conv=IntegerConv, dense=IntegerDense)
  >>> model = quant_resnet((1,), PRECISIONS["W8A8"], **options)
  >>> run = lambda key, images: model.init_with_output(key, images, train=False)
  >>> jax.eval_shape(run, jax.random.key(0), jnp.ones((2, 4, 4, 1)))[0].shape
  (2, 3)

  Attributes:
    features, kernel_size, strides, padding, weight_bits, act_bits, signed, use_bias, param_dtype, kernel_init,
      bias_init: as in `QConv`; at most 8 bits.
    dtype, rate, axis_name: not used; there so that the class can take the place of `QConv`.

  Reference: Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only
    Inference", CVPR 2018.
  """

  features: int
  kernel_size: Sequence[int]
  strides: Sequence[int] | None = None
  padding: str | Sequence[tuple[int, int]] = "SAME"
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

  @nn.compact
  def __call__(self, inputs: jax.Array) -> jax.Array:
    kernel, bias = layer_parameters(self, (*self.kernel_size, inputs.shape[-1], self.features))
    options = dict(strides=conv_strides(self), padding=self.padding)
    outputs = integer_conv(inputs, kernel, **_grids(self, inputs), **options)
    return outputs if bias is None else outputs + bias


def _grids(layer, inputs):
  bound = _Frozen(name="input_bound")(inputs)
  return dict(weight_bits=layer.weight_bits, act_bits=layer.act_bits, bound=bound, signed=layer.signed)
