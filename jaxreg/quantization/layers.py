"""Convolutions and dense layers at low precision."""

import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.linen.dtypes import promote_dtype
from jax.typing import ArrayLike

from jaxreg.metrics.sizes import is_integer
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

  The state is in the collection `quant_stats`; the statistics move whenever that is mutable. Where it is not and there
  is no bound yet, so that inputs pass as they are, a call with concrete values warns; `jit` cannot (ask
  `check_bounds`).

  >>> import jax, jax.numpy as jnp
  >>> variables = ActivationBound().init(jax.random.key(0), jnp.ones((4, 3)))
  >>> bound, new = ActivationBound().apply(variables, jnp.ones((4, 3)), mutable=["quant_stats"])
  >>> bound.tolist(), new["quant_stats"]["state"].maximum.tolist()
  ([-1.0, -1.0, -1.0], [1.0, 1.0, 1.0])

  Attributes:
    rate: of the moving averages.
    axis_name: mapped axis or axes over which a batch is split, or None.
    from_first_batch: whether a channel's averages start from its first batch, or from zero, as in the official code,
      where one batch gives a tenth of the right bound.

  Reference: Abdolrashidi et al., "Pareto-Optimal Quantized ResNet Is Mostly 4-bit", CVPR Workshops 2021 (calibration).
  """

  rate: float = 0.1
  axis_name: str | None = None
  from_first_batch: bool = True

  @nn.compact
  def __call__(self, inputs: ArrayLike) -> jax.Array:
    state = self.variable("quant_stats", "state", activation_bound_init, inputs.shape[-1], dtype=inputs.dtype)
    if self.is_mutable_collection("quant_stats"):
      if not self.is_initializing():
        # Only a channel that has seen nothing but zeros has no mean square.
        rate = jnp.where(state.value.mean_square > 0, self.rate, 1) if self.from_first_batch else self.rate
        state.value = activation_bound_update(inputs, state=state.value, rate=rate, axis_name=self.axis_name)
    # A checkpoint that is restored without its structure has a dict in the place of the state.
    bound = state.value["bound"] if isinstance(state.value, dict) else state.value.bound
    passes = self.is_mutable_collection("quant_stats") or isinstance(bound, jax.core.Tracer)
    if not passes and (np.asarray(bound) < 0).any():
      layer = "/".join(self.path[:-1])
      warnings.warn(f"inputs of {layer!r} are not quantized: freeze_bounds comes first.", stacklevel=2)
    return bound


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
    from_first_batch: as in `ActivationBound`.

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
  from_first_batch: bool = True

  @nn.compact
  def __call__(self, inputs: ArrayLike) -> jax.Array:
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
    kernel_size: extent of the kernel in each spatial direction; one number for all of them.
    strides: one number per direction or for all of them, None for ones.
    padding: `SAME`, `VALID`, `CIRCULAR` or pairs of numbers.
    kernel_dilation: distance of the kernel's entries, as the strides.
    feature_group_count: number of groups of channels that are convolved separately.
    weight_bits, act_bits, signed, use_bias, dtype, param_dtype, kernel_init, bias_init, rate, axis_name,
      from_first_batch: as in `QDense`.
    conv_general_dilated: what convolves; `layers.loop_conv_general_dilated` trains faster in a loop on a CPU.

  Reference: Abdolrashidi et al., "Pareto-Optimal Quantized ResNet Is Mostly 4-bit", CVPR Workshops 2021.
  """

  features: int
  kernel_size: int | Sequence[int]
  strides: int | Sequence[int] | None = None
  padding: str | Sequence[tuple[int, int]] = "SAME"
  kernel_dilation: int | Sequence[int] | None = None
  feature_group_count: int = 1
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
  from_first_batch: bool = True
  conv_general_dilated: Callable = jax.lax.conv_general_dilated

  @nn.compact
  def __call__(self, inputs: ArrayLike) -> jax.Array:
    window = conv_window(self, inputs)
    inputs, kernel, bias = _operands(self, inputs, window.kernel_shape)
    inputs, padding = circular_padding(inputs, window)
    outputs = self.conv_general_dilated(
      inputs, kernel, window.strides, padding, rhs_dilation=window.dilation,
      feature_group_count=self.feature_group_count, dimension_numbers=conv_dimensions(inputs.ndim),
    )  # fmt: skip
    return outputs if bias is None else outputs + bias


class ConvWindow(NamedTuple):
  """What a convolution layer does in each spatial direction, and the shape of its kernel."""

  kernel_shape: tuple[int, ...]
  strides: tuple[int, ...]
  dilation: tuple[int, ...]
  padding: str | Sequence[tuple[int, int]]


def conv_window(layer, inputs) -> ConvWindow:
  """The window of a convolution layer for its inputs; one number stands for all directions."""
  each = lambda value: (value,) * (inputs.ndim - 2) if is_integer(value) else tuple(value)
  groups, channels = getattr(layer, "feature_group_count", 1), inputs.shape[-1]
  if channels % groups or layer.features % groups:
    raise ValueError(f"feature_group_count must divide {channels} inputs and {layer.features} features, got {groups}.")
  shape = (*each(layer.kernel_size), channels // groups, layer.features)
  return ConvWindow(shape, each(layer.strides or 1), each(getattr(layer, "kernel_dilation", None) or 1), layer.padding)


def circular_padding(inputs, window: ConvWindow):
  """The inputs and the padding that is left: none after `CIRCULAR`, which XLA does not know, as Flax pads."""
  if window.padding != "CIRCULAR":
    return inputs, window.padding
  spans = [(size - 1) * rate + 1 for size, rate in zip(window.kernel_shape, window.dilation)]
  edges = [((span - 1) // 2, span // 2) for span in spans]
  return jnp.pad(inputs, [(0, 0), *edges, (0, 0)], mode="wrap"), "VALID"


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
    options = dict(rate=layer.rate, axis_name=layer.axis_name, from_first_batch=layer.from_first_batch)
    bound = ActivationBound(**options, name="input_bound")(inputs)
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
