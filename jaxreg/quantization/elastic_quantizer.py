"""Quantizers with learned grids for any number of bits, per tensor or per channel, symmetric or not.

Each quantizer keeps a table of learned step sizes and offsets with a column for each number of bits.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxreg.checks import check_float, check_hyperparameter, dtype_of
from jaxreg.quantization.straight_through import straight_through_value

__all__ = ["ELASTIC_BITS", "ElasticQuantizer", "LsqTable", "lsq_calibrate", "lsq_quantize"]


ELASTIC_BITS = (2, 3, 4, 5, 6, 7, 8)  # columns of the tables


_EPSILON, _LARGEST_SHARE = 1e-6, 0.01  # added to step sizes, but not more than a hundredth of them


_NON_NEGATIVE = -1e-9  # inputs above this, times their magnitude where that is below 1, have no sign bit


def lsq_quantize(
  values: ArrayLike,
  scale: ArrayLike,
  offset: ArrayLike = 0.0,
  *,
  bits: ArrayLike,
  signed: ArrayLike = True,
  gradient_factor: ArrayLike = 1.0,
) -> jax.Array:
  """Values on a learned grid, `S round(clip(t, n, p)) + offset` with `t = (values - offset) / S`, `S = |scale| + 1e-6`.

  The grid is `n = -2^(bits - 1)`, `p = 2^(bits - 1) - 1`, without a sign `0` and `2^bits - 1`. Scales below 1e-4 have
  the step `S = 1.01 |scale|`, so that small values have a grid, too. Rounding, half to even, has derivative one: with
  I = 1 where `n <= t <= p` and r the integer, the gradient is `G I` in the values, `gradient_factor sum G (r - I t)` in
  the scale and `gradient_factor sum G (1 - I)` in the offset.

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
  size = jnp.abs(_scale_gradient(scale, gradient_factor))
  # Where the scale is 0 the steps are so small that there is nothing on the grid, but they can be divided by.
  more = jnp.clip(_LARGEST_SHARE * size, jnp.finfo(dtype).tiny / jnp.finfo(dtype).eps, _EPSILON)
  step = size + jax.lax.stop_gradient(more)
  offset = _scale_gradient(offset, gradient_factor)
  ratio = jax.lax.stop_gradient((wide - offset) / step)
  integers = jnp.round(jnp.clip(ratio, low, high))
  # The ends are inside: zeros of a ReLU lie there. Through jnp.clip half of their gradient would be lost.
  inside = (low <= ratio) & (ratio <= high)
  slopes = jnp.where(inside, wide, offset) + step * jnp.where(inside, integers - ratio, integers)
  return straight_through_value(slopes, integers * step + offset).astype(jnp.result_type(values))


def grid_limits(bits, signed, dtype):
  """The smallest and the largest integer of a grid."""
  if not jnp.issubdtype(dtype_of("bits", bits), jnp.integer):
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
  values: ArrayLike,
  *,
  bits: Sequence[int] = ELASTIC_BITS,
  symmetric: ArrayLike,
  per_channel: bool = False,
  signed: ArrayLike = True,
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
    offset = jnp.where(signed, share * low - scale * smallest, _NON_NEGATIVE * jnp.minimum(magnitude, 1))
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
    values: ArrayLike,
    *,
    bits: ArrayLike,
    symmetric: ArrayLike,
    per_channel: ArrayLike = False,
  ) -> jax.Array:
    check_hyperparameter("bits", bits, low=0, high=ELASTIC_BITS[-1])
    first = functools.cache(lambda: calibrated_tables(values, channels=self.channels, candidates=1))
    names = table_names(self.channels)
    tables = {name: self.param(name, lambda _, name=name: first()[name]) for name in names}
    signed = self.variable("calibration", "signed", lambda: has_sign(values, self.channels)).value
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
  signed = has_sign(values, channels)
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


def has_sign(values, channels):
  if channels:
    return jnp.bool_(True)
  return jnp.min(values) < _NON_NEGATIVE * jnp.minimum(jnp.max(jnp.abs(values)), 1)
