"""Convolutions whose gradients are fast inside a loop on a CPU.

There XLA gives the convolutions of JAX's own gradient layouts for which it has slow code only, and a training loop that
is one program (`lax.scan`) takes ten times as long as it need, or more. Here the gradient of the kernel is one matrix
product for each of its entries in space, and that of the inputs a convolution with a kernel laid out anew.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from jaxreg.checks import as_array

__all__ = ["loop_conv_general_dilated"]

_PLANE = ("NHWC", "HWIO", "NHWC")


def loop_conv_general_dilated(
  lhs: ArrayLike,
  rhs: ArrayLike,
  window_strides,
  padding,
  lhs_dilation=None,
  rhs_dilation=None,
  dimension_numbers=None,
  feature_group_count: int = 1,
  batch_group_count: int = 1,
  precision=None,
  preferred_element_type=None,
) -> jax.Array:
  """`jax.lax.conv_general_dilated` with another gradient, for training loops on a CPU.

  It is for the argument of that name of `flax.linen.Conv` and of this library's convolutional layers. Two- and
  three-dimensional convolutions with channels last, without groups and dilation, are computed in the new way, and only
  on a CPU (three-dimensional ones as two-dimensional ones of several planes); all others are left to JAX. Values and
  gradients are the same up to rounding. The new way has no forward-mode derivative, save of its gradients.

  >>> import flax.linen as nn, jax, jax.numpy as jnp
  >>> layer = nn.Conv(3, (3, 3), strides=2, conv_general_dilated=loop_conv_general_dilated)
  >>> layer.init_with_output(jax.random.key(0), jnp.ones((1, 8, 8, 2)))[0].shape
  (1, 4, 4, 3)

  Args:
    lhs: inputs, floating, `[batch, *space, channels]`.
    rhs: kernel, floating, `[*extents, channels, outputs]`.
    window_strides: a number for each direction in space; static.
    padding: `SAME`, `VALID` or pairs of numbers; static.
    lhs_dilation, rhs_dilation, dimension_numbers, feature_group_count, batch_group_count, precision,
      preferred_element_type: as for `jax.lax.conv_general_dilated`; static.

  Returns:
    `[batch, *space', outputs]`.

  Raises:
    ValueError, TypeError: what `jax.lax.conv_general_dilated` raises.

  Reference: none.
  """
  options = dict(
    lhs_dilation=lhs_dilation, rhs_dilation=rhs_dilation, dimension_numbers=dimension_numbers,
    feature_group_count=feature_group_count, batch_group_count=batch_group_count, precision=precision,
    preferred_element_type=preferred_element_type,
  )  # fmt: skip
  plain = functools.partial(lax.conv_general_dilated, window_strides=window_strides, padding=padding, **options)
  lhs, rhs = as_array("lhs", lhs), as_array("rhs", rhs)
  outputs = jax.eval_shape(plain, lhs, rhs)  # what is wrong is an error here
  space, dilations = jnp.ndim(lhs) - 2, [*(lhs_dilation or ()), *(rhs_dilation or ())]
  last = lax.ConvDimensionNumbers(*[(0, space + 1, *range(1, space + 1))] * 2, (0, space + 1, *range(1, space + 1)))
  last = last._replace(rhs_spec=(space + 1, space, *range(space)))
  numbers = lax.conv_dimension_numbers(jnp.shape(lhs), jnp.shape(rhs), dimension_numbers)
  usual = numbers == last and max(dilations, default=1) == feature_group_count == batch_group_count == 1
  usual = usual and preferred_element_type is None and jnp.result_type(lhs) == outputs.dtype
  if not usual or space not in (2, 3) or jax.default_backend() != "cpu":
    return plain(lhs, rhs)
  if isinstance(padding, str):
    padding = lax.padtype_to_pads(lhs.shape[1:-1], rhs.shape[:-2], window_strides, padding)
  strides, padding = tuple(map(int, window_strides)), tuple((int(low), int(high)) for low, high in padding)
  if space == 3:
    return _in_space(lhs, rhs, strides, padding, precision)
  return _in_the_plane(lhs, rhs, strides, padding, precision)


def _in_space(inputs, kernel, strides, padding, precision):
  """A convolution in the plane of the channels of all planes under the kernel."""
  depth, *extents, channels, outputs = kernel.shape
  padded = lax.pad(inputs, jnp.zeros((), inputs.dtype), [(0, 0, 0), (*padding[0], 0), *[(0, 0, 0)] * 3])
  count = (padded.shape[1] - depth) // strides[0] + 1
  planes = [lax.slice_in_dim(padded, z, z + (count - 1) * strides[0] + 1, strides[0], 1) for z in range(depth)]
  stacked = jnp.concatenate(planes, axis=-1).reshape(-1, *inputs.shape[2:4], depth * channels)
  kernel = jnp.moveaxis(kernel, 0, 2).reshape(*extents, depth * channels, outputs)
  result = _in_the_plane(stacked, kernel, strides[1:], padding[1:], precision)
  return result.reshape(-1, count, *result.shape[1:])


def _plain(inputs, kernel, strides, padding, precision):
  return lax.conv_general_dilated(inputs, kernel, strides, padding, dimension_numbers=_PLANE, precision=precision)


_in_the_plane = jax.custom_vjp(_plain, nondiff_argnums=(2, 3, 4))


def _forward(inputs, kernel, strides, padding, precision):
  return _plain(inputs, kernel, strides, padding, precision), (inputs, kernel)


def _backward(strides, padding, precision, saved, cotangent):
  inputs, kernel = saved
  zero = jnp.zeros((), inputs.dtype)
  extents, sizes = kernel.shape[:2], cotangent.shape[1:3]
  spans = [(size - 1) * stride + 1 for size, stride in zip(sizes, strides)]  # of the kernel's first entry
  padded = lax.pad(inputs, zero, [(0, 0, 0), *[(*pair, 0) for pair in padding], (0, 0, 0)])
  products = [
    jnp.einsum(
      "nhwi,nhwo->io", padded[:, row : row + spans[0] : strides[0], column : column + spans[1] : strides[1]], cotangent,
      precision=precision,
    )
    for row, column in itertools.product(*map(range, extents))
  ]  # fmt: skip
  # Every output's cotangent at the place of its window, with zeros between and around.
  borders = [
    (extent - 1 - low, size + low - span, stride - 1)
    for extent, (low, _), size, span, stride in zip(extents, padding, inputs.shape[1:3], spans, strides)
  ]
  spread = lax.pad(cotangent, zero, [(0, 0, 0), *borders, (0, 0, 0)])
  turned = lax.optimization_barrier(jnp.flip(kernel, (0, 1)).swapaxes(2, 3))
  return _plain(spread, turned, (1, 1), ((0, 0), (0, 0)), precision), jnp.stack(products).reshape(kernel.shape)


_in_the_plane.defvjp(_forward, _backward)
