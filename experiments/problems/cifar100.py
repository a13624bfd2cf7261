"""What recipes on CIFAR-100 share: one batch of the stream, standardised images, and a generated set for tests."""

import jax
import jax.numpy as jnp
import numpy as np

from experiments.problems import cifar10

__all__ = ["augment", "batch_shapes", "crops", "generated_set", "plain", "standardized"]

MEAN, DEVIATION = (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)  # of the training set's channels


def plain(example: dict, rng: np.random.Generator) -> dict:
  """Image and fine label; a `transform` of a stream."""
  del rng
  return {name: example[name] for name in ("image", "label")}


def augment(example: dict, rng: np.random.Generator) -> dict:
  """The same, shifted by up to four pixels and perhaps reflected."""
  return cifar10.augment(plain(example, rng), rng)


def crops(example: dict, rng: np.random.Generator, *, small: int) -> dict:
  """Two augmented images, and `small` parts of 30 to 80 % of the area, perhaps reflected, at 18×18 pixels."""
  image = example["image"]

  def part():
    side = round(32 * np.sqrt(rng.uniform(0.3, 0.8)))
    rows, columns = (rng.integers(0, 33 - side) + (np.arange(18) * side) // 18 for _ in range(2))
    found = image[rows][:, columns]
    return found[:, ::-1] if rng.integers(2) else found

  large = np.stack([augment(example, rng)["image"] for _ in range(2)])
  parts = np.stack([part() for _ in range(small)]) if small else np.zeros((0, 18, 18, 3), np.uint8)
  return {"image": large, "small": parts, "label": example["label"]}


def standardized(images: jax.Array, dtype=jnp.float32) -> jax.Array:
  """Bytes as numbers of mean 0 and variance 1 in each channel."""
  return ((images / 255.0 - jnp.array(MEAN)) / jnp.array(DEVIATION)).astype(dtype)


def batch_shapes(batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
  """One global batch of the stream, after one of the transforms."""
  return cifar10.batch_shapes(batch_size)


def generated_set(*, examples: int) -> dict[str, dict]:
  """Random images of all classes, training and test split, as `paper_sets` of a recipe returns them."""
  splits = cifar10.generated_set(range(100), examples=examples)["cifar10"]
  return {"cifar100": {name: {**split, "coarse_label": split["label"] // 5} for name, split in splits.items()}}
