"""The cross-entropy that nested dropout minimises on average, exactly: over all numbers of leading channels."""

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from jaxreg.checks import as_array, check_float
from jaxreg.losses.labelled_logits import labelled, widened

__all__ = ["expected_nested_cross_entropy_loss"]


def expected_nested_cross_entropy_loss(
  features: ArrayLike, kernel: ArrayLike, labels: ArrayLike, *, probabilities: ArrayLike
) -> jax.Array:
  """`sum_k p_k CE(h[:k] V[:k], y)`: the expectation of the loss over the number of channels kept.

  The logits of all cut-offs are running sums over the channels, `[..., channels, classes]` in memory.

  >>> import jax.numpy as jnp
  >>> features, kernel = jnp.ones((2, 3)), jnp.eye(3)
  >>> values = expected_nested_cross_entropy_loss(features, kernel, jnp.array([0, 2]), probabilities=jnp.ones(3) / 3)
  >>> [round(float(value), 3) for value in values]
  [0.837, 1.504]

  Args:
    features: floating `[..., channels]`.
    kernel: floating `[channels, classes]`, the classifier, without bias.
    labels: integers `[...]`; those outside `[0, classes)` have loss 0.
    probabilities: `[channels]`, index `k - 1` for `k` channels, as `nested_cutoff_probabilities` returns them; may be
      traced.

  Returns:
    `[...]`, in the dtype of the features.

  Raises:
    ValueError: when shapes or dtypes do not fit.

  Reference: Chen, Hu, Shen, Ai, Suykens, "Compressing Features for Learning with Noisy Labels", IEEE TNNLS 2022.
  """
  features, kernel, probabilities = (
    as_array(name, value)
    for name, value in (("features", features), ("kernel", kernel), ("probabilities", probabilities))
  )
  for name, value in (("features", features), ("kernel", kernel), ("probabilities", probabilities)):
    check_float(name, value)
  channels = features.shape[-1:]
  if features.ndim < 1 or kernel.ndim != 2 or kernel.shape[:1] != channels or probabilities.shape != channels:
    raise ValueError(
      "features must be [..., channels], kernel [channels, classes] and probabilities [channels], got shapes"
      f" {features.shape}, {kernel.shape} and {probabilities.shape}."
    )
  batch = labelled(jnp.zeros((*features.shape[:-1], kernel.shape[-1]), features.dtype), labels)
  counted = jnp.where(batch.counted[..., None], widened(features), 0)
  logits = jnp.cumsum(counted[..., None] * widened(kernel), axis=-2)
  each = optax.softmax_cross_entropy_with_integer_labels(
    logits, jnp.broadcast_to(batch.labels[..., None], logits.shape[:-1])
  )
  values = jnp.sum(each * widened(probabilities).astype(each.dtype), axis=-1)
  return batch.values(values)
