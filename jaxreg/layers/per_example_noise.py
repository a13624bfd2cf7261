"""Dropout and augmentations whose strength differs from example to example, and through which no gradient flows to it.

A self-tuning network draws its hyperparameters anew for each example; the masks and shifts that they govern are part of
the data, not of the path by which hyperparameters are differentiated.
"""

import math

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxreg.checks import check_float

__all__ = ["per_example_color_jitter", "per_example_cutout", "per_example_dropout", "per_example_scale_noise"]

_LUMA = (0.299, 0.587, 0.114)
_YIQ = (_LUMA, (0.596, -0.274, -0.322), (0.211, -0.523, 0.312))


def per_example_dropout(key: jax.Array, inputs: ArrayLike, *, rate: ArrayLike) -> jax.Array:
  """`x * mask / (1 - rate)` with `mask ~ Bernoulli(1 - rate)` for every entry.

  >>> import jax, jax.numpy as jnp
  >>> per_example_dropout(jax.random.key(0), jnp.ones((2, 3)), rate=jnp.array([0.0, 1.0])).tolist()
  [[1.0, 1.0, 1.0], [0.0, 0.0, 0.0]]

  Args:
    key: threefry key.
    inputs: floating `[examples, ...]`.
    rate: in [0, 1], `[examples]` or a scalar; taken as constant.

  Returns:
    Like the inputs.

  Raises:
    ValueError: when an argument does not fit.

  Reference: Srivastava, Hinton, Krizhevsky, Sutskever, Salakhutdinov, "Dropout: A Simple Way to Prevent Neural Networks
    from Overfitting", JMLR 2014.
  """
  keep = 1 - _per_example("rate", rate, inputs)
  mask = jax.random.uniform(key, inputs.shape, keep.dtype) < keep
  factor = jnp.where(mask, 1 / jnp.where(keep > 0, keep, 1), 0)
  return inputs * factor.astype(inputs.dtype)


def per_example_scale_noise(key: jax.Array, inputs: ArrayLike, *, deviation: ArrayLike) -> jax.Array:
  """`x (1 + deviation n)` with one `n ~ N(0, 1)` for each example.

  >>> import jax, jax.numpy as jnp
  >>> per_example_scale_noise(jax.random.key(0), jnp.ones((2, 3)), deviation=jnp.zeros(2)).tolist()
  [[1.0, 1.0, 1.0], [1.0, 1.0, 1.0]]

  Args:
    key: threefry key.
    inputs: floating `[examples, ...]`.
    deviation: non-negative, `[examples]` or a scalar; taken as constant.

  Returns:
    Like the inputs.

  Raises:
    ValueError: when an argument does not fit.

  Reference: MacKay, Vicol, Lorraine, Duvenaud, Grosse, "Self-Tuning Networks: Bilevel Optimization of Hyperparameters
    using Structured Best-Response Functions", ICLR 2019, the input scaling of the official code (details unverified).
  """
  deviation = _per_example("deviation", deviation, inputs)
  factor = 1 + deviation * jax.random.normal(key, (len(inputs),) + (1,) * (inputs.ndim - 1), deviation.dtype)
  return inputs * factor.astype(inputs.dtype)


def per_example_cutout(
  key: jax.Array, images: ArrayLike, *, length: ArrayLike, holes: ArrayLike, max_holes: int
) -> jax.Array:
  """Sets `holes` squares of side `length`, centred anywhere in the image and cut at its border, to zero.

  >>> import jax, jax.numpy as jnp
  >>> images, holes = jnp.ones((2, 4, 4, 1)), jnp.array([0, 1])
  >>> per_example_cutout(jax.random.key(0), images, length=8, holes=holes, max_holes=2).sum((1, 2, 3)).tolist()
  [16.0, 0.0]

  Args:
    key: threefry key.
    images: floating `[examples, height, width, channels]`.
    length: side in pixels, `[examples]` or a scalar.
    holes: number of squares, `[examples]` or a scalar.
    max_holes: the largest number of squares there can be, static.

  Returns:
    Like the images.

  Raises:
    ValueError: when an argument does not fit.

  Reference: DeVries, Taylor, "Improved Regularization of Convolutional Neural Networks with Cutout", arXiv 2017.
  """
  _check_images(images)
  length, holes = (_per_example(name, value, images) for name, value in (("length", length), ("holes", holes)))
  size = jnp.array(images.shape[1:3])
  centres = jnp.floor(jax.random.uniform(key, (len(images), max_holes, 2), length.dtype) * size)

  def covered(axis):
    offset = jnp.arange(images.shape[1 + axis]) - centres[..., axis, None]
    half = jnp.floor(length[:, 0] / 2)
    return (offset >= -half) & (offset < length[:, 0] - half)

  active = jnp.arange(max_holes)[:, None, None] < holes
  hidden = (active & covered(0)[..., :, None] & covered(1)[..., None, :]).any(1)
  return images * ~hidden[..., None]


def per_example_color_jitter(
  key: jax.Array,
  images: ArrayLike,
  *,
  brightness: ArrayLike = 0.0,
  contrast: ArrayLike = 0.0,
  saturation: ArrayLike = 0.0,
  hue: ArrayLike = 0.0,
) -> jax.Array:
  """Random brightness, contrast and saturation factors in `1 ± strength`, and a hue turned by up to `hue` turns.

  The hue is turned in the YIQ colour space, where that is linear. Images with one channel know brightness and contrast.

  >>> import jax, jax.numpy as jnp
  >>> images = jnp.full((2, 2, 2, 3), 0.5)
  >>> bool(jnp.allclose(jax.jit(per_example_color_jitter)(jax.random.key(0), images, hue=0.5), images, atol=0.01))
  True

  Args:
    key: threefry key.
    images: floating in [0, 1], `[examples, height, width, 1 or 3]`.
    brightness: strength, non-negative, `[examples]` or a scalar; taken as constant, like the others.
    contrast: strength.
    saturation: strength.
    hue: largest rotation in turns, in [0, 0.5].

  Returns:
    Like the images, in [0, 1].

  Raises:
    ValueError: when an argument does not fit.

  Reference: Krizhevsky, Sutskever, Hinton, "ImageNet Classification with Deep Convolutional Neural Networks", NeurIPS
    2012, which varies intensity and colour of training images.
  """
  _check_images(images)
  strengths = {"brightness": brightness, "contrast": contrast, "saturation": saturation, "hue": hue}
  strengths = {name: _per_example(name, value, images) for name, value in strengths.items()}
  dtype = jnp.result_type(*strengths.values())
  draws = jax.random.uniform(key, (4, len(images), 1, 1, 1), dtype, -1, 1)
  factor = lambda index, name: jnp.maximum(1 + draws[index] * strengths[name], 0)
  colors = images.shape[-1] == 3
  luma = lambda x: (x @ jnp.array(_LUMA, dtype))[..., None] if colors else x

  wide = jnp.clip(images.astype(dtype) * factor(0, "brightness"), 0, 1)
  mean = jnp.mean(luma(wide), axis=(1, 2, 3), keepdims=True)
  wide = jnp.clip(mean + factor(1, "contrast") * (wide - mean), 0, 1)
  if colors:
    grey = luma(wide)
    wide = _turn_hue(grey + factor(2, "saturation") * (wide - grey), draws[3] * strengths["hue"])
  return jnp.clip(wide, 0, 1).astype(images.dtype)


def _turn_hue(images, turns):
  to_yiq = jnp.array(_YIQ, images.dtype)
  y, i, q = jnp.moveaxis(images @ to_yiq.T, -1, 0)
  cos, sin = (function(2 * math.pi * turns[..., 0]) for function in (jnp.cos, jnp.sin))
  return jnp.stack([y, cos * i - sin * q, sin * i + cos * q], -1) @ jnp.linalg.inv(to_yiq).T


def _per_example(name, value, inputs):
  """A strength as float32 or wider, constant, `[examples, 1, ...]` or a scalar with as many axes as the inputs."""
  check_float("inputs", inputs)
  shape = jnp.shape(value)
  if shape not in ((), inputs.shape[:1]):
    raise ValueError(f"{name} must be a scalar or have shape {inputs.shape[:1]}, got {shape}.")
  value = jax.lax.stop_gradient(jnp.asarray(value))
  value = value.astype(jnp.promote_types(jnp.promote_types(value.dtype, jnp.float32), inputs.dtype))
  return value.reshape(shape + (1,) * (inputs.ndim - len(shape)))


def _check_images(images):
  check_float("images", images)
  if images.ndim != 4 or images.shape[-1] not in (1, 3):
    raise ValueError(f"images must be [examples, height, width, 1 or 3], got shape {images.shape}.")
