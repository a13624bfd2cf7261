"""What penalties of several environments share: checked features and labels, and means over environments."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxreg.checks import as_array, check_float, counted_labels

__all__ = []


def checked_features(features, *, ndim: int | None = None) -> jax.Array:
  """Floating features of a batch, with as many axes as are wanted."""
  check_float("features", features)
  features = as_array("features", features)
  form = "[environments, batch, features]" if ndim == 3 else "[..., batch, features]"
  if features.ndim < 2 or ndim not in (None, features.ndim):
    raise ValueError(f"features must be {form}, got shape {features.shape}.")
  return features


def class_labels(labels, shape, classes: int) -> tuple[jax.Array, jax.Array]:
  """Widened labels, of two classes for one column, and which are classes."""
  labels = as_array("labels", labels)
  if not jnp.issubdtype(labels.dtype, jnp.integer) or labels.shape != shape:
    raise ValueError(
      f"labels must be integers, one per example, expected shape {shape}, got {labels.shape} of dtype {labels.dtype}."
    )
  return counted_labels(labels, max(classes, 2))


def class_targets(labels: jax.Array, classes: int, dtype) -> jax.Array:
  """What the probabilities should be: one-hot, or the label itself for one column."""
  return labels[..., None].astype(dtype) if classes == 1 else jax.nn.one_hot(labels, classes, dtype=dtype)


def example_weights(counted: jax.Array, dtype) -> jax.Array:
  """One over the number of examples of the environment that count, for those that do."""
  return counted.astype(dtype) / jnp.maximum(jnp.sum(counted, axis=-1, keepdims=True), 1).astype(dtype)


def mean_of_environments(tree: Any, some: jax.Array) -> Any:
  """The mean over the leading axis, of those that have examples; 0 where none has."""
  count = jnp.maximum(jnp.sum(some), 1)
  return jax.tree.map(lambda leaf: jnp.sum(jnp.where(expanded(some, leaf), leaf, 0), axis=0) / count, tree)


def expanded(flags: jax.Array, like: jax.Array) -> jax.Array:
  """Flags of leading axes, with as many axes as an array."""
  return flags.reshape(*flags.shape, *[1] * (like.ndim - flags.ndim))
