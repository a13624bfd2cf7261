"""How good a linear classifier on ordered features is by the number of features kept, and which number to keep."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxreg.checks import as_array, check_float, check_hyperparameter, counted_labels

__all__ = ["accuracy_per_cutoff", "best_cutoff"]


def accuracy_per_cutoff(features: ArrayLike, kernel: ArrayLike, labels: ArrayLike) -> jax.Array:
  """The accuracy of `argmax h[:k] V[:k]` for every number `k` of leading features.

  One pass over the features; the logits of one cut-off are held at a time.

  >>> import jax.numpy as jnp
  >>> features = jnp.array([[1.0, 0.0], [1.0, 2.0]])
  >>> accuracy_per_cutoff(features, jnp.array([[1.0, 0.0], [0.0, 1.0]]), jnp.array([0, 1])).tolist()
  [0.5, 1.0]

  Args:
    features: floating `[..., examples, channels]`; leading axes are networks, whose logits are averaged.
    kernel: floating `[..., channels, classes]`, the classifier, without bias.
    labels: integers `[examples]`; those outside `[0, classes)` are left out.

  Returns:
    `[channels]`, float32 or wider, at index `k - 1` the fraction that is right with `k` features; ties go to the first
    class. Not-a-number where no label is a class.

  Raises:
    ValueError: when shapes or dtypes do not fit.

  Reference: Chen, Hu, Shen, Ai, Suykens, "Compressing Features for Learning with Noisy Labels", IEEE TNNLS 2022, the
    choice of the cut-off in the official code.
  """
  features, kernel, labels = (
    as_array(name, value) for name, value in (("features", features), ("kernel", kernel), ("labels", labels))
  )
  check_float("features", features)
  check_float("kernel", kernel)
  channels, classes = kernel.shape[-2:] if kernel.ndim > 1 else (None, None)
  if features.ndim < 2 or kernel.shape != (*features.shape[:-2], features.shape[-1], classes):
    raise ValueError(
      "features must be [..., examples, channels] and kernel [..., channels, classes], got shapes"
      f" {features.shape} and {kernel.shape}."
    )
  if labels.shape != features.shape[-2:-1] or not jnp.issubdtype(labels.dtype, jnp.integer):
    raise ValueError(
      f"labels must be integers, one per example, expected shape {features.shape[-2:-1]}, got {labels.shape} of dtype"
      f" {labels.dtype}."
    )
  labels, counted = counted_labels(labels, classes)
  dtype = jnp.promote_types(jnp.result_type(features, kernel), jnp.float32)
  by_channel = jnp.moveaxis(features.reshape(-1, *features.shape[-2:]).astype(dtype), -1, 0)
  weights = jnp.moveaxis(kernel.reshape(-1, channels, classes).astype(dtype), -2, 0)

  def add(logits, channel):
    column, weight = channel  # [networks, examples], [networks, classes]
    logits += jnp.einsum("ne,nc->ec", column, weight, precision="highest") / len(column)
    right = jnp.where(jnp.isnan(logits).any(-1), jnp.nan, (logits.argmax(-1) == labels).astype(dtype))
    return logits, jnp.mean(right, where=counted)

  return jax.lax.scan(add, jnp.zeros((len(labels), classes), dtype), (by_channel, weights))[1]


def best_cutoff(accuracies: ArrayLike, *, penalty: ArrayLike = 1e-5) -> jax.Array:
  """The number of features with the best accuracy, the smaller one where accuracies nearly tie.

  `argmax_k (accuracy_k - penalty (k - 1))`.

  >>> import jax.numpy as jnp
  >>> best_cutoff(jnp.array([0.5, 0.9, 0.9, 0.4])).item()
  2

  Args:
    accuracies: floating `[..., channels]`, as `accuracy_per_cutoff` returns them.
    penalty: non-negative, what one more feature costs; a scalar.

  Returns:
    Integers `[...]` in [1, channels]: a number of features, not an index.

  Raises:
    ValueError: when accuracies are not floating point or have no channel, or `penalty` is negative.

  Reference: Chen et al., IEEE TNNLS 2022, the choice of the cut-off in the official code.
  """
  accuracies = as_array("accuracies", accuracies)
  check_float("accuracies", accuracies)
  if accuracies.ndim < 1 or not accuracies.shape[-1]:
    raise ValueError(f"accuracies must be [..., channels] with at least one channel, got shape {accuracies.shape}.")
  check_hyperparameter("penalty", penalty, low=0, shape=())
  wide = accuracies.astype(jnp.promote_types(accuracies.dtype, jnp.float32))
  return jnp.argmax(wide - penalty * jnp.arange(wide.shape[-1]), axis=-1) + 1
