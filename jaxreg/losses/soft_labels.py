"""Any loss of integer labels under soft ones: label smoothing, mixup, a teacher's probabilities."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxreg.checks import as_array, check_float, check_same_shape
from jaxreg.losses.labelled_logits import narrowed, widened

__all__ = ["expected_loss"]


def expected_loss(loss: Callable, logits: ArrayLike, soft_labels: ArrayLike, **options) -> jax.Array:
  """The expectation of a loss over a label distribution, `sum_k soft_labels_k loss(logits, k)`.

  This is what soft labels mean for any loss of integer labels; for cross-entropy it is the usual form. The loss is
  computed once for each class: where there are many, prefer a closed form (`comp_sum_loss_with_soft_labels`,
  `stablemax_cross_entropy_with_soft_labels`), and for mixup, whose labels have two classes, the same number
  `c * loss(logits, labels) + (1 - c) * loss(logits, labels[partners])`.

  >>> import jax, jax.numpy as jnp, optax
  >>> from jaxreg import losses
  >>> logits, labels = jnp.array([[2.0, 0.0, -1.0]]), jnp.array([0])
  >>> smooth = optax.smooth_labels(jax.nn.one_hot(labels, 3), 0.1)
  >>> value = expected_loss(losses.comp_sum_loss, logits, smooth, tau=1.0)
  >>> bool(jnp.allclose(value, optax.softmax_cross_entropy(logits, smooth)))
  True

  Args:
    loss: static; `loss(logits, labels, **options)` with a value per example, the classes on the last axis.
    logits: floating `[..., classes]`.
    soft_labels: floating `[..., classes]`, the weight of every class; usually of sum 1.
    **options: of the loss, for example its hyperparameters.

  Returns:
    `[...]`, the loss of each example. A class of weight 0 adds 0.

  Raises:
    ValueError: when the arrays are not floating point or their shapes differ, and what the loss raises.
  """
  logits, soft_labels = as_array("logits", logits), as_array("soft_labels", soft_labels)
  check_float("logits", logits)
  check_float("soft_labels", soft_labels)
  check_same_shape(logits=logits, soft_labels=soft_labels)
  wide = widened(logits)

  @jax.checkpoint  # not the residuals of all classes at once
  def weighted(label):
    weights = soft_labels[..., label].astype(wide.dtype)
    values = loss(wide, jnp.broadcast_to(label, logits.shape[:-1]), **options)
    return jnp.where(weights == 0, 0, weights * values)

  add = lambda total, label: (total + weighted(label), None)
  total, _ = jax.lax.scan(add, jnp.zeros(logits.shape[:-1], wide.dtype), jnp.arange(logits.shape[-1]))
  return narrowed(total, logits.dtype)
