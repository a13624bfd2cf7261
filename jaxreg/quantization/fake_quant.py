"""Fake quantization: values rounded to a grid of integers times a scale, in floating point and with a gradient.

Weights have a symmetric grid with rounding, non-negative activations an unsigned one with floor; scales are constants
of the backward pass. `quantize_weight` and `quantize_activation` give the integers themselves, for integer arithmetic.
"""

import math
import numbers
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxreg.checks import check_float, check_hyperparameter
from jaxreg.quantization.straight_through import straight_through_value

__all__ = [
  "Quantized",
  "fake_quant_activation",
  "fake_quant_weight",
  "quantize_activation",
  "quantize_weight",
]

# Added to ranges as in the official code, but not to those below the second number: tiny weights have a grid, too.
_EPSILON, _TINY_RANGE = float(np.finfo(np.float32).eps), 1e-4
_MOST_BITS = 23  # what float32 counts exactly, half steps included


class Quantized(NamedTuple):
  """Integers and what they stand for.

  Attributes:
    values: whole numbers, in floating point, `[...]`.
    scale: steps per unit, broadcasting against `values`, which stand for `values / scale`.
  """

  values: jax.Array
  scale: jax.Array


def fake_quant_weight(
  weights: ArrayLike,
  *,
  bits: ArrayLike | None,
  reduce_axes: Sequence[int] | None = None,
  official_ties: bool = False,
) -> jax.Array:
  """Weights on a symmetric grid, `floor(clip(w s, -B, B) + 1/2) / s` with `B = 2^(bits - 1) - 1`, `s = B / max |w|`.

  The gradient is that of the identity, everywhere: no weight lies beyond the largest.

  >>> import jax.numpy as jnp
  >>> weights = fake_quant_weight(jnp.array([[-1.0], [0.3], [0.2]]), bits=3)
  >>> [round(x, 3) for x in weights.ravel().tolist()]
  [-1.0, 0.333, 0.333]

  Args:
    weights: floating `[..., outputs]`.
    bits: integer in [1, 23], or None to return the weights as they are; may be traced. With one bit all become zero.
    reduce_axes: axes that share a scale, static; None is all but the last, one scale for each output.
    official_ties: static; whether the weights that meet the limit exactly have half a gradient, as in the official
      code, where it comes from the derivative of a minimum at equality.

  Returns:
    As `weights`.

  Raises:
    ValueError: when `weights` are not floating point, or `bits` or `reduce_axes` are out of range.

  Reference: Abdolrashidi et al., "Pareto-Optimal Quantized ResNet Is Mostly 4-bit", CVPR Workshops 2021; the quantizer
    is that of its code, google/aqt `jax_legacy`.
  """
  check_float("weights", weights)
  if bits is None:
    return weights
  integers, steps = _quantized_weight(weights, bits, reduce_axes)
  share = jnp.where(jnp.abs(steps) == _symmetric_limit(bits), 0.5, 1) if official_ties else 1
  return _with_gradient(weights, integers.values / integers.scale, share)


def fake_quant_activation(
  inputs: ArrayLike,
  *,
  bits: ArrayLike | None,
  bound: ArrayLike,
  signed: bool,
  official_ties: bool = False,
) -> jax.Array:
  """Activations on a grid up to a bound: signed ones as weights, others `clip(floor(x s), 0, 2^bits - 1) / s`.

  The scale of the unsigned grid is `s = 2^bits / bound`; its values are the lower ends of their bins. The gradient is
  one for values within the bound (`0 <= x <= bound`, or `|x| <= bound`) and zero outside; none reaches the bound.

  >>> import jax.numpy as jnp
  >>> inputs = fake_quant_activation(jnp.array([-1.0, 0.4, 0.6, 2.0]), bits=2, bound=1.0, signed=False)
  >>> [round(x, 3) for x in inputs.tolist()]
  [0.0, 0.25, 0.5, 0.75]

  Args:
    inputs: floating `[...]`.
    bits: integer in [1, 23], or None to return the inputs as they are; may be traced.
    bound: the largest magnitude on the grid, in the inputs' unit, broadcasting against `inputs`; where it is negative
      the inputs are returned as they are; may be traced.
    signed: static; whether the inputs have both signs.
    official_ties: static; whether values in the lowest and highest bin of the unsigned grid, or on the limit of the
      signed one, have half a gradient, as in the official code.

  Returns:
    As `inputs`.

  Raises:
    ValueError: when `inputs` are not floating point, `bits` are out of range or `bound` does not broadcast.

  Reference: Abdolrashidi et al., "Pareto-Optimal Quantized ResNet Is Mostly 4-bit", CVPR Workshops 2021; the quantizer
    is that of its code, google/aqt `jax_legacy`.
  """
  check_float("inputs", inputs)
  if bits is None:
    return inputs
  integers, steps = _quantized_activation(inputs, bits, bound, signed)
  bound = jnp.asarray(bound, integers.values.dtype)
  if official_ties:
    lowest, highest = _limits(bits, signed)
    steps = steps if signed else jnp.floor(steps)
    outside = (steps < lowest) | (steps > highest)
    share = jnp.where(outside, 0, jnp.where((steps == lowest) | (steps == highest), 0.5, 1))
  else:
    share = (jnp.abs(inputs) <= bound) if signed else (inputs >= 0) & (inputs <= bound)
  quantized = _with_gradient(inputs, integers.values / integers.scale, share)
  return jnp.where(bound < 0, inputs, quantized)


def quantize_weight(weights: ArrayLike, *, bits: ArrayLike, reduce_axes: Sequence[int] | None = None) -> Quantized:
  """The integers in `[-B, B]`, `B = 2^(bits - 1) - 1`, behind `fake_quant_weight`, and their scale.

  >>> import jax.numpy as jnp
  >>> quantize_weight(jnp.array([[-1.0], [0.3]]), bits=4).values.ravel().tolist()
  [-7.0, 2.0]

  Args:
    weights: floating `[..., outputs]`.
    bits: as in `fake_quant_weight`.
    reduce_axes: as in `fake_quant_weight`.

  Returns:
    Integers `[..., outputs]` and scale, in float32 (float64 if the weights are).

  Raises:
    ValueError: as `fake_quant_weight`.

  Reference: Abdolrashidi et al., "Pareto-Optimal Quantized ResNet Is Mostly 4-bit", CVPR Workshops 2021 (quantizers).
  """
  check_float("weights", weights)
  return _quantized_weight(weights, bits, reduce_axes)[0]


def quantize_activation(inputs: ArrayLike, *, bits: ArrayLike, bound: ArrayLike, signed: bool) -> Quantized:
  """The integers behind `fake_quant_activation`, in `[-B, B]` or in `[0, 2^bits - 1]`, and their scale.

  >>> import jax.numpy as jnp
  >>> quantize_activation(jnp.array([0.4, 0.6, 2.0]), bits=2, bound=1.0, signed=False).values.tolist()
  [1.0, 2.0, 3.0]

  Args:
    inputs: floating `[...]`.
    bits: as in `fake_quant_activation`.
    bound: as in `fake_quant_activation`, non-negative.
    signed: as in `fake_quant_activation`.

  Returns:
    Integers `[...]` and scale, in float32 (float64 if the inputs are).

  Raises:
    ValueError: as `fake_quant_activation`.

  Reference: Abdolrashidi et al., "Pareto-Optimal Quantized ResNet Is Mostly 4-bit", CVPR Workshops 2021 (quantizers).
  """
  check_float("inputs", inputs)
  return _quantized_activation(inputs, bits, bound, signed)[0]


def _quantized_weight(weights, bits, reduce_axes):
  bits = _checked_bits(bits)
  rank = jnp.ndim(weights)
  axes = tuple(range(rank - 1)) if reduce_axes is None else tuple(reduce_axes)
  if not all(-rank <= axis < rank for axis in axes):
    raise ValueError(f"reduce_axes must be axes of weights with shape {jnp.shape(weights)}, got {reduce_axes}.")
  wide = _wide(weights)
  limit = _symmetric_limit(bits)
  scale = jax.lax.stop_gradient(_steps_per_unit(limit, jnp.max(jnp.abs(wide), axis=axes, keepdims=True)))
  return _symmetric(wide, scale, limit)


def _quantized_activation(inputs, bits, bound, signed):
  bits = _checked_bits(bits)
  check_hyperparameter("bound", bound)
  if not _broadcasts(jnp.shape(bound), jnp.shape(inputs)):
    raise ValueError(f"bound must broadcast against inputs {jnp.shape(inputs)}, got shape {jnp.shape(bound)}.")
  wide = _wide(inputs)
  bound = jax.lax.stop_gradient(jnp.maximum(jnp.asarray(bound, wide.dtype), 0))  # negative: not used, but finite
  if signed:
    limit = _symmetric_limit(bits)
    return _symmetric(wide, _steps_per_unit(limit, bound), limit)
  highest = _limits(bits, signed)[1]
  scale = _steps_per_unit(highest + 1, bound)
  steps = wide * scale
  return Quantized(jnp.clip(jnp.floor(steps), 0, highest), scale), steps


def _steps_per_unit(steps, bound):
  """`steps / bound`, finite also where the bound is 0 and everything is rounded to next to nothing."""
  more = _EPSILON * jnp.minimum(bound / _TINY_RANGE, 1) ** 4  # vanishes fast, but not at once
  return steps / jnp.maximum(bound + more, steps * jnp.finfo(bound.dtype).tiny)


def _symmetric(wide, scale, limit):
  steps = wide * scale
  return Quantized(jnp.floor(jnp.clip(steps, -limit, limit) + 0.5), scale), steps


def _limits(bits, signed):
  """The lowest and the highest integer of an activation's grid."""
  return (-_symmetric_limit(bits), _symmetric_limit(bits)) if signed else (0.0, _power_of_two(bits) - 1)


def _symmetric_limit(bits):
  """The largest integer of the symmetric grid; for one bit a quarter, which rounds to zero."""
  limit = _power_of_two(bits - 1) - 1
  return (limit or 0.25) if isinstance(limit, float) else jnp.maximum(limit, 0.25)


def _power_of_two(exponent):
  if isinstance(exponent, numbers.Number):
    return float(2 ** int(exponent))
  return jnp.left_shift(1, jnp.asarray(exponent, jnp.int32)).astype(jnp.float32)  # exp2 may be off by a rounding


def _with_gradient(values, quantized, share):
  """`quantized`, with the gradient of `share * values`."""
  surrogate = values * jax.lax.stop_gradient(jnp.asarray(share, jnp.result_type(values)))
  return straight_through_value(surrogate, jnp.asarray(quantized, jnp.result_type(values)))


def _wide(values):
  return jnp.asarray(values, jnp.promote_types(jnp.result_type(values), jnp.float32))


def _broadcasts(shape, target):
  return len(shape) <= len(target) and all(n in (1, m) for n, m in zip(shape[::-1], target[::-1]))


def _checked_bits(bits):
  """The same; a NumPy scalar as a Python one."""
  if isinstance(bits, jax.Array):
    if bits.ndim or not jnp.issubdtype(bits.dtype, jnp.integer):
      raise ValueError(f"bits must be an integer scalar, got {bits.dtype} of shape {bits.shape}.")
    return bits
  number = bits.item() if isinstance(bits, np.ndarray) and bits.ndim == 0 else bits
  if not isinstance(number, numbers.Number) or not 1 <= number <= _MOST_BITS or math.floor(number) != number:
    raise ValueError(f"bits must be an integer in [1, {_MOST_BITS}], got {bits}.")
  return number
