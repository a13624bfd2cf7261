"""Crops of images of any size and their standardisation, shared by problems that read photographs from TFDS."""

import jax
import jax.numpy as jnp
import numpy as np

__all__ = ["central_crop", "random_crop", "standardized"]

MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's channels


def random_crop(example: dict, rng: np.random.Generator, *, size: int, smallest: float = 0.08) -> dict:
  """A random part of at least `smallest` of the image, of sides that differ by at most a third, perhaps reflected."""
  height, width = example["image"].shape[:2]
  area, ratio = rng.uniform(smallest, 1) * height * width, np.exp(rng.uniform(-1, 1) * np.log(4 / 3))
  rows = int(np.clip(round(np.sqrt(area / ratio)), 1, height))
  columns = int(np.clip(round(np.sqrt(area * ratio)), 1, width))
  top, left = rng.integers(0, height - rows + 1), rng.integers(0, width - columns + 1)
  image = _resized(example["image"][top : top + rows, left : left + columns], size)
  return {"image": image[:, ::-1] if rng.integers(2) else image, "label": example["label"]}


def central_crop(example: dict, rng: np.random.Generator, *, size: int) -> dict:
  """The central square of seven eighths of the shorter side, resized."""
  del rng
  height, width = example["image"].shape[:2]
  side = max(round(0.875 * min(height, width)), 1)
  top, left = (height - side) // 2, (width - side) // 2
  return {"image": _resized(example["image"][top : top + side, left : left + side], size), "label": example["label"]}


def standardized(params, images) -> jax.Array:
  """Bytes standardised by channel, in the dtype of the parameters; other images as they are."""
  if images.dtype != jnp.uint8:
    return images
  dtype = jax.tree.leaves(params)[0].dtype
  return ((images / 255.0 - jnp.array(MEAN)) / jnp.array(DEVIATION)).astype(dtype)


def _resized(image: np.ndarray, size: int) -> np.ndarray:
  """By the nearest pixel: without an image library, and cheap."""
  rows, columns = ((np.arange(size) * length) // size for length in image.shape[:2])
  return image[rows][:, columns]
