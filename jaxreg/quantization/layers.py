"""Convolutions and dense layers at low precision."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.dtypes import promote_dtype

from jaxreg.quantization.bounds import activation_bound_init, activation_bound_update
from jaxreg.quantization.fake_quant import fake_quant_activation, fake_quant_weight
from jaxreg.quantization.straight_through import straight_through_value

__all__ = ["ActivationBound", "PRECISIONS", "Precision", "QConv", "QDense"]

BFLOAT16 = 16  # as a number of bits: operands rounded to bfloat16, products and sums in float32


class Precision(NamedTuple):
  """Bits of the operands of a network's layers; 16 is bfloat16.

  Attributes:
    weights: of the inner layers' weights.
    activations: of the inner layers' inputs.
    end_weights: of the first and last layers' weights.
    end_activations: of the first and last layers' inputs.
  """

  weights: int | jax.Array
  activations: int | jax.Array
  end_weights: int | jax.Array
  end_activations: int | jax.Array


# What the paper compares, and a grid too coarse to keep up.
PRECISIONS = {
  "bfloat16": Precision(16, 16, 16, 16),
  "W8A8": Precision(8, 8, 8, 8),
  "W4A4": Precision(4, 4, 4, 4),
  "W4A4, ends W8A8": Precision(4, 4, 8, 8),
  "W2A2, ends W8A8": Precision(2, 2, 8, 8),
}


class ActivationBound(nn.Module):
  """Keeps the statistics of what passes and returns the bound, which is -1 until `freeze_bounds` sets it.

  The state is in the collection `quant_stats`; the statistics move whenever that is mutable.

  >>> import jax, jax.numpy as jnp
  >>> variables = ActivationBound().init(jax.random.key(0), jnp.ones((4, 3)))
  >>> bound, new = ActivationBound().apply(variables, jnp.ones((4, 3)), mutable=["quant_stats"])
  >>> bound.tolist(), [round(x, 2) for x in new["quant_stats"]["state"].maximum.tolist()]
  ([-1.0, -1.0, -1.0], [0.1, 0.1, 0.1])

  Attributes:
    rate: of the moving averages.
    axis_name: mapped axis or axes over which a batch is split, or None.

  Reference: Abdolrashidi et al., "Pareto-Optimal Quantized ResNet Is Mostly 4-bit", CVPR Workshops 2021 (calibration).
  """

  rate: float = 0.1
  axis_name: str | None = None

  @nn.compact
  def __call__(self, inputs: jax.Array) -> jax.Array:
    state = self.variable("quant_stats", "state", activation_bound_init, inputs.shape[-1], dtype=inputs.dtype)
    if self.is_mutable_collection("quant_stats") and not self.is_initializing():
      state.value = activation_bound_update(inputs, state=state.value, rate=self.rate, axis_name=self.axis_name)
    # A checkpoint that is restored without its structure has a dict in the place of the state.
    return state.value["bound"] if isinstance(state.value, dict) else state.value.bound


class QDense(nn.Module):
  """A dense layer whose weights and inputs are fake-quantized; its parameters are those of `flax.linen.Dense`.

  >>> import jax, jax.numpy as jnp
  >>> layer = QDense(2, weight_bits=4, act_bits=4)
  >>> outputs, variables = jax.eval_shape(layer.init_with_output, jax.random.key(0), jnp.ones((5, 3)))
  >>> outputs.shape, sorted(variables)
  ((5, 2), ['params', 'quant_stats'])

  Attributes:
    features: number of outputs.
    weight_bits: 1 to 15 for an integer grid, 16 to round operands to bfloat16, None to leave them; may be traced.
    act_bits: the same of the inputs, whose bound is calibrated by `ActivationBound` and `freeze_bounds`.
    signed: whether inputs have both signs.
    use_bias: whether to add a bias, in floating point.
    dtype: of the computation, None for that of inputs and parameters.
    param_dtype: of the parameters.
    kernel_init: initializer of the weights.
    bias_init: initializer of the bias.
    rate: of the calibration's moving averages.
    axis_name: mapped axis or axes over which a batch is split, or None.

  Reference: Abdolrashidi et al., "Pareto-Optimal Quantized ResNet Is Mostly 4-bit", CVPR Workshops 2021.
  """

  features: int
  weight_bits: int | jax.Array | None = None
  act_bits: int | jax.Array | None = None
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
    inputs, kernel, bias = _operands(self, inputs, (inputs.shape[-1], self.features))
    outputs = inputs @ kernel
    return outputs if bias is None else outputs + bias


class QConv(nn.Module):
  """A convolution `[batch, …, channels]` on fake-quantized operands; its parameters are those of `flax.linen.Conv`.

  >>> import jax, jax.numpy as jnp
  >>> layer = QConv(2, (3, 3), strides=(2, 2), weight_bits=4, act_bits=4)
  >>> jax.eval_shape(layer.init_with_output, jax.random.key(0), jnp.ones((1, 8, 8, 3)))[0].shape
  (1, 4, 4, 2)

  Attributes:
    features: number of output channels.
    kernel_size: extent of the kernel in each spatial direction.
    strides: one number per direction, None for ones.
    padding: `SAME`, `VALID` or pairs of numbers.
    weight_bits, act_bits, signed, use_bias, dtype, param_dtype, kernel_init, bias_init, rate, axis_name: as in
      `QDense`.
    conv_general_dilated: what convolves; `layers.loop_conv_general_dilated` trains faster in a loop on a CPU.

  Reference: Abdolrashidi et al., "Pareto-Optimal Quantized ResNet Is Mostly 4-bit", CVPR Workshops 2021.
  """

  features: int
  kernel_size: Sequence[int]
  strides: Sequence[int] | None = None
  padding: str | Sequence[tuple[int, int]] = "SAME"
  weight_bits: int | jax.Array | None = None
  act_bits: int | jax.Array | None = None
  signed: bool = False
  use_bias: bool = True
  dtype: Any = None
  param_dtype: Any = jnp.float32
  kernel_init: Callable = nn.initializers.lecun_normal()
  bias_init: Callable = nn.initializers.zeros
  rate: float = 0.1
  axis_name: str | None = None
  conv_general_dilated: Callable = jax.lax.conv_general_dilated

  @nn.compact
  def __call__(self, inputs: jax.Array) -> jax.Array:
    inputs, kernel, bias = _operands(self, inputs, (*self.kernel_size, inputs.shape[-1], self.features))
    outputs = self.conv_general_dilated(
      inputs, kernel, conv_strides(self), self.padding, dimension_numbers=conv_dimensions(inputs.ndim)
    )
    return outputs if bias is None else outputs + bias


def conv_strides(layer) -> tuple[int, ...]:
  """The strides of a convolution layer."""
  return tuple(layer.strides or (1,) * len(layer.kernel_size))


def conv_dimensions(rank: int) -> jax.lax.ConvDimensionNumbers:
  """Batch first and channels last; in kernels, inputs and outputs last."""
  spatial = tuple(range(1, rank - 1))
  return jax.lax.ConvDimensionNumbers(
    (0, rank - 1, *spatial), (rank - 1, rank - 2, *range(rank - 2)), (0, rank - 1, *spatial)
  )


def layer_parameters(layer, shape):
  """Kernel and bias (None without) of a layer, under the names that Flax's own layers use."""
  kernel = layer.param("kernel", layer.kernel_init, shape, layer.param_dtype)
  return kernel, layer.param("bias", layer.bias_init, (shape[-1],), layer.param_dtype) if layer.use_bias else None


def _operands(layer, inputs, shape):
  """Inputs and kernel on their grids, and the bias, all in the dtype of the computation."""
  inputs, kernel, bias = promote_dtype(inputs, *layer_parameters(layer, shape), dtype=layer.dtype)
  kernel = _rounded(kernel, layer.weight_bits, "weight_bits", lambda bits: fake_quant_weight(kernel, bits=bits))
  if layer.act_bits is not None and not _is(layer.act_bits, BFLOAT16):
    bound = ActivationBound(rate=layer.rate, axis_name=layer.axis_name, name="input_bound")(inputs)
    on_grid = functools.partial(fake_quant_activation, inputs, bound=bound, signed=layer.signed)
  else:
    on_grid = None
  return _rounded(inputs, layer.act_bits, "act_bits", lambda bits: on_grid(bits=bits)), kernel, bias


def _rounded(values, bits, name, on_grid):
  """The operand on `bits` bits; one program for all of them when they are traced."""
  if bits is None:
    return values
  if isinstance(bits, jax.Array):
    return jnp.where(bits >= BFLOAT16, _bfloat16(values), on_grid(jnp.minimum(bits, BFLOAT16 - 1)))
  if not 1 <= bits <= BFLOAT16:
    raise ValueError(f"{name} must lie in [1, {BFLOAT16}] or be None, got {bits}.")
  return _bfloat16(values) if bits == BFLOAT16 else on_grid(bits)


def _is(bits, number):
  return not isinstance(bits, jax.Array) and bits == number


def _bfloat16(values):
  return straight_through_value(values, jax.lax.reduce_precision(values, exponent_bits=8, mantissa_bits=7))
