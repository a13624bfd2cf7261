"""What recipes on all of MNIST share: one batch of the stream, images at half the resolution, a generated set."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxreg.data import colored_digits

__all__ = ["batch_shapes", "colored", "generated_set", "halved"]


def batch_shapes(batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
  """One global batch of the stream."""
  return {
    "image": jax.ShapeDtypeStruct((batch_size, 28, 28, 1), jnp.uint8),
    "label": jax.ShapeDtypeStruct((batch_size,), jnp.int32),
    "id": jax.ShapeDtypeStruct((batch_size,), jnp.int32),
  }


def generated_set(*, examples: int) -> dict[str, dict]:
  """Random images of all digits, training and test split, as `paper_sets` of a recipe returns them."""
  rng = np.random.default_rng(0)
  split = lambda count: {
    "image": rng.integers(0, 256, (count, 28, 28, 1), np.uint8),
    "label": np.resize(np.arange(10), count),
  }
  return {"mnist": {"train": split(examples), "test": split(examples // 4 + 1)}}


def halved(images: jax.Array, dtype=jnp.float32) -> jax.Array:
  """Every other row and column of bytes `[batch, 28, 28, 1]`, in [0, 1]."""
  return images[:, ::2, ::2].astype(dtype) / 255


def colored(key: jax.Array, images, digits, ids, *, color_flips, label_flip) -> tuple[jax.Array, jax.Array]:
  """Coloured digits whose wrong labels and colours depend on the example's number alone, the same in every epoch.

  >>> images, zeros, never = jnp.ones((3, 2, 2, 1)), jnp.zeros(3, int), jnp.zeros(3)
  >>> inputs, labels = colored(jax.random.key(0), images, zeros, jnp.arange(3), color_flips=never, label_flip=0.0)
  >>> inputs.shape, labels.tolist()
  ((3, 2, 2, 2), [1, 1, 1])

  Args:
    key: of all examples.
    images: floating `[batch, height, width, 1]`.
    digits: integers `[batch]`.
    ids: integers `[batch]`, the examples' numbers.
    color_flips: `[batch]`, the probability that the colour is not the label.
    label_flip: scalar, the fraction of wrong labels.

  Returns:
    Images `[batch, height, width, 2]`, and labels, 0 or 1.
  """

  def one(number, image, digit, color_flip):
    own = jax.random.fold_in(key, number)
    inputs, labels, _ = colored_digits(own, image[None], digit[None], color_flip=color_flip, label_flip=label_flip)
    return inputs[0], labels[0]

  return jax.vmap(one)(ids, images, digits, color_flips)
