"""Corruptions of grey images in [0, 1] that a classifier did not see while training."""

import numpy as np
from scipy import ndimage

__all__ = ["CORRUPTIONS", "corrupted"]

CORRUPTIONS = ("Gaussian noise", "salt and pepper", "blur", "contrast", "brightness", "rotation")


def corrupted(images: np.ndarray, corruption: str, *, seed: int = 0) -> np.ndarray:
  """The images with one of `CORRUPTIONS`, kept in [0, 1].

  Noise has deviation 0.35; a fifth of the pixels are salt or pepper; the blur is Gaussian of one pixel; contrast falls
  to 0.3 around each image's mean; brightness rises by 0.4; rotations are uniform within 25 degrees.

  >>> images = np.full((2, 4, 4), 0.5, np.float32)
  >>> [corrupted(images, name).shape for name in CORRUPTIONS] == [(2, 4, 4)] * len(CORRUPTIONS)
  True
  >>> bool(np.allclose(corrupted(images, "brightness"), 0.9))
  True

  Args:
    images: floating `[examples, rows, columns]`.
    corruption: its name.
    seed: of noise and angles.

  Returns:
    As `images`.
  """
  rng = np.random.default_rng((seed, CORRUPTIONS.index(corruption)))
  if corruption == "Gaussian noise":
    found = images + 0.35 * rng.normal(size=images.shape)
  elif corruption == "salt and pepper":
    found = np.where(rng.random(images.shape) < 0.2, rng.integers(0, 2, images.shape), images)
  elif corruption == "blur":
    found = ndimage.gaussian_filter(images, (0, 1, 1))
  elif corruption == "contrast":
    mean = images.mean((1, 2), keepdims=True)
    found = mean + 0.3 * (images - mean)
  elif corruption == "brightness":
    found = images + 0.4
  else:
    angles = rng.uniform(-25, 25, len(images))
    found = np.stack([ndimage.rotate(image, angle, reshape=False, order=1) for image, angle in zip(images, angles)])
  return np.clip(found, 0, 1).astype(images.dtype)
