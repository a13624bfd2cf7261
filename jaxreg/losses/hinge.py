"""Multiclass hinge losses, one value per example: what is wrong by less than a margin counts."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxreg.losses.labelled_logits import labelled
from jaxreg.losses.softmax_family import of_label, with_label

__all__ = ["crammer_singer_loss", "weston_watkins_loss"]


def crammer_singer_loss(
  logits: ArrayLike,
  labels: ArrayLike,
  *,
  margin: ArrayLike = 1.0,
  axis: int = -1,
  where: ArrayLike | None = None,
) -> jax.Array:
  """Crammer-Singer hinge: `max(0, margin + max_{k != y} f_k - f_y)`; at margin 1 `optax.losses.multiclass_hinge_loss`.

  >>> import jax.numpy as jnp
  >>> crammer_singer_loss(jnp.array([[3.0, 1.0, 2.5]]), jnp.array([0]), margin=1.0).tolist()
  [0.5]

  Args:
    logits: floating `[..., classes]`.
    labels: integers `[...]`.
    margin: non-negative; may be traced.
    axis: the axis of the classes.
    where: boolean, broadcasting against `logits`: the classes that take part, the label among them.

  Returns:
    `[...]`, the loss of each example.

  Raises:
    ValueError: when labels do not fit the logits or `margin` is negative.

  Reference: Crammer, Singer, "On the Algorithmic Implementation of Multiclass Kernel-based Vector Machines", JMLR 2001.
  """
  batch = labelled(logits, labels, axis=axis, where=where)
  margin, wide = batch.hyperparameter("margin", margin, low=0), _lowest_where_masked(batch)
  violation = margin + (largest_other(wide, batch.labels) - of_label(wide, batch.labels))[..., 0]
  return batch.values(jax.nn.relu(violation))


def weston_watkins_loss(
  logits: ArrayLike,
  labels: ArrayLike,
  *,
  margin: ArrayLike = 1.0,
  axis: int = -1,
  where: ArrayLike | None = None,
) -> jax.Array:
  """Weston-Watkins hinge: `mean_k max(0, margin + f_k - f_y)`, where the label itself counts as 0.

  The mean is over all classes, as in Zhu, Ying and Yang's comparison; the original sums.

  >>> import jax.numpy as jnp
  >>> weston_watkins_loss(jnp.array([[3.0, 1.0, 2.5, 3.0]]), jnp.array([0]), margin=1.0).tolist()
  [0.375]

  Args:
    logits: floating `[..., classes]`.
    labels: integers `[...]`.
    margin: non-negative; may be traced.
    axis: the axis of the classes.
    where: boolean, broadcasting against `logits`: the classes that take part, the label among them.

  Returns:
    `[...]`, the loss of each example.

  Raises:
    ValueError: when labels do not fit the logits or `margin` is negative.

  Reference: Weston, Watkins, "Support Vector Machines for Multi-class Pattern Recognition", ESANN 1999.
  """
  batch = labelled(logits, labels, axis=axis, where=where)
  margin = batch.hyperparameter("margin", margin, low=0, scalar=True)
  count = batch.logits.shape[-1] if batch.where is None else jnp.sum(batch.where, axis=-1)
  return batch.values(_violations(_lowest_where_masked(batch), batch.labels, margin) / count)


def _lowest_where_masked(batch):
  wide = batch.logits
  return wide if batch.where is None else jnp.where(batch.where, wide, jnp.finfo(wide.dtype).min)


@jax.custom_jvp
def _violations(wide, labels, margin):
  """`sum_{k != y} max(0, margin + f_k - f_y)`."""
  return jnp.sum(_violation(wide, labels, margin), axis=-1)


def _violation(wide, labels, margin):
  return with_label(jax.nn.relu(margin + wide - of_label(wide, labels)), labels, 0)


@_violations.defjvp
def _violations_jvp(primals, tangents):
  violation = _violation(*primals)
  violating = (violation > 0).astype(violation.dtype)
  shift = tangents[2] - of_label(tangents[0], primals[1])[..., 0]
  dot = jnp.sum(violating * tangents[0], axis=-1) + jnp.sum(violating, axis=-1) * shift
  return jnp.sum(violation, axis=-1), dot


@jax.custom_jvp
def largest_other(wide, labels):
  return jnp.max(with_label(wide, labels, jnp.finfo(wide.dtype).min), axis=-1, keepdims=True)


@largest_other.defjvp
def largest_other_jvp(primals, tangents):
  """Equal shares for ties, as in jnp.max, whose own rule is slow on a CPU."""
  wide, labels = primals
  largest = largest_other(wide, labels)
  ties = with_label((wide == largest).astype(wide.dtype), labels, 0)
  share = 1 / jnp.maximum(jnp.sum(ties, axis=-1, keepdims=True), 1)
  return largest, jnp.sum(ties * tangents[0], axis=-1, keepdims=True) * share
