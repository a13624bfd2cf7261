"""Convolutions as matrices, entry by entry."""

import numpy as np


def conv_matrix(kernel: np.ndarray, size: int, stride: int = 1, padding: str = "CIRCULAR") -> np.ndarray:
  """The matrix of a convolution with `size` output pixels per dimension, [outputs × pixels, inputs × pixels]."""
  d, k = kernel.ndim - 2, kernel.shape[0]
  width = stride * (size - 1) + k if padding == "VALID" else stride * size
  low = {"CIRCULAR": k // 2, "SAME": max(k - stride, 0) // 2, "VALID": 0}[padding]
  matrix = np.zeros((kernel.shape[-1], *[size] * d, kernel.shape[-2], *[width] * d), kernel.dtype)
  for place in np.ndindex(*[size] * d):
    for tap in np.ndindex(*[k] * d):
      pixel = [stride * p + t - low for p, t in zip(place, tap)]
      if padding == "CIRCULAR":
        pixel = [p % width for p in pixel]
      elif not all(0 <= p < width for p in pixel):
        continue
      matrix[(slice(None), *place, slice(None), *pixel)] += kernel[tap].T
  return matrix.reshape(kernel.shape[-1] * size**d, -1)


def defect(matrix: np.ndarray) -> np.ndarray:
  """`A A^T - I`, or `A^T A - I` for matrices with more rows than columns."""
  gram = matrix @ matrix.T if len(matrix) <= matrix.shape[1] else matrix.T @ matrix
  return gram - np.eye(len(gram))


def orthonormal(rng: np.random.Generator, rows: int, columns: int) -> np.ndarray:
  """A random matrix with orthonormal rows, or columns if there are fewer of them."""
  factor = np.linalg.qr(rng.normal(size=(max(rows, columns), min(rows, columns))))[0]
  return factor if rows >= columns else factor.T


def shifting_kernel(rng: np.random.Generator, size: int, channels: int, outputs: int) -> np.ndarray:
  """An orthogonal 2D kernel that uses many taps: a shift of its own for each channel, between two mixtures."""
  kernel = np.zeros((size, size, channels, channels))
  for channel in range(channels):
    kernel[(*rng.integers(0, size, 2), channel, channel)] = 1
  return orthonormal(rng, channels, channels) @ kernel @ orthonormal(rng, channels, outputs)
