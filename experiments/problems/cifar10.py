"""What recipes on CIFAR-10 share: the shape of a batch, the usual augmentation, and a generated set for tests."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

__all__ = ["augment", "batch_shapes", "generated_set"]


def augment(example: dict, rng: np.random.Generator) -> dict:
  """A shift by up to four pixels and a reflection, at random; a `transform` of a stream."""
  row, column = rng.integers(0, 9, 2)
  image = np.pad(example["image"], ((4, 4), (4, 4), (0, 0)))[row : row + 32, column : column + 32]
  return {**example, "image": image[:, ::-1] if rng.integers(2) else image}


def batch_shapes(batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
  """One global batch of the stream."""
  return {
    "image": jax.ShapeDtypeStruct((batch_size, 32, 32, 3), jnp.uint8),
    "label": jax.ShapeDtypeStruct((batch_size,), jnp.int32),
    "id": jax.ShapeDtypeStruct((batch_size,), jnp.int32),
  }


def generated_set(labels: Sequence[int], *, examples: int) -> dict[str, dict]:
  """Random images with these labels in turn, training and test split, as `paper_sets` of a recipe returns them."""
  rng = np.random.default_rng(0)

  def split(examples):
    return {
      "image": rng.integers(0, 256, (examples, 32, 32, 3), np.uint8),
      "label": np.resize(labels, examples),
    }

  return {"cifar10": {"train": split(examples), "test": split(examples // 4 + 1)}}
