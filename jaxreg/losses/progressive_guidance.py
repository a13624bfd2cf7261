"""Guidance of a network's quantized forms: the finest teaches a random one, and that one the coarsest."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxreg.losses.labelled_logits import labelled
from jaxreg.losses.softmax_family import of_label

__all__ = ["guided_cross_entropy_loss", "progressive_guidance_loss"]


def guided_cross_entropy_loss(
  logits: ArrayLike,
  teacher_logits: ArrayLike,
  labels: ArrayLike,
  *,
  guidance: ArrayLike = 0.5,
  axis: int = -1,
  where: ArrayLike | None = None,
) -> jax.Array:
  """`guidance KL(teacher || student) + (1 - guidance) cross-entropy`, with a constant teacher and temperature 1.

  >>> import jax.numpy as jnp
  >>> logits, teacher, labels = jnp.zeros((1, 2)), jnp.zeros((1, 2)), jnp.array([0])
  >>> round(guided_cross_entropy_loss(logits, teacher, labels).item(), 4)
  0.3466

  Args:
    logits: the student's, floating `[..., classes]`.
    teacher_logits: of the same shape; no gradient passes.
    labels: integers `[...]`.
    guidance: the paper's lambda, weight of the teacher, in [0, 1]; may be traced.
    axis: the axis of the classes.
    where: boolean, broadcasting against `logits`: the classes that take part, the label among them.

  Returns:
    `[...]`, the loss of each example.

  Raises:
    ValueError: when labels or teacher do not fit the logits or `guidance` is outside [0, 1].

  Reference: Xu, Han, Tian, Yang, Zhang, "EQ-Net: Elastic Quantization Neural Networks", ICCV 2023, Section 3.2.
  """
  batch = labelled(logits, labels, axis=axis, where=where)
  teacher = _log_probabilities(batch, batch.other_logits("teacher_logits", teacher_logits, axis))
  student = _log_probabilities(batch, batch.logits)
  return batch.values(_guided(batch, teacher, student, guidance))


def progressive_guidance_loss(
  logits: ArrayLike,
  random_logits: ArrayLike,
  low_logits: ArrayLike,
  labels: ArrayLike,
  *,
  guidance: ArrayLike = 0.5,
  axis: int = -1,
  where: ArrayLike | None = None,
) -> jax.Array:
  """Cross-entropy of a network's finest form, plus those of a random form it guides and the coarsest, guided by that.

  >>> import jax.numpy as jnp
  >>> logits = jnp.zeros((1, 2))
  >>> round(progressive_guidance_loss(logits, logits, logits, jnp.array([0])).item(), 4)
  1.3863

  Args:
    logits: of the form with most bits, floating `[..., classes]`.
    random_logits: of a form with random bits, of the same shape.
    low_logits: of the form with fewest bits, of the same shape.
    labels: integers `[...]`.
    guidance: the paper's lambda, weight of the teachers, in [0, 1]; 0 is hard labels for all; may be traced.
    axis: the axis of the classes.
    where: boolean, broadcasting against `logits`: the classes that take part, the label among them.

  Returns:
    `[...]`, the loss of each example; no gradient passes from a student to its teacher.

  Raises:
    ValueError: when labels or shapes do not fit or `guidance` is outside [0, 1].

  Reference: Xu, Han, Tian, Yang, Zhang, "EQ-Net: Elastic Quantization Neural Networks", ICCV 2023, Section 3.2 (group
    progressive guidance).
  """
  batch = labelled(logits, labels, axis=axis, where=where)
  middle = _log_probabilities(batch, batch.other_logits("random_logits", random_logits, axis))
  lowest = _log_probabilities(batch, batch.other_logits("low_logits", low_logits, axis))
  highest = _log_probabilities(batch, batch.logits)
  values = -of_label(highest, batch.labels)[..., 0]
  return batch.values(values + _guided(batch, highest, middle, guidance) + _guided(batch, middle, lowest, guidance))


def _guided(batch, teacher, student, guidance):
  """The guided cross-entropy of log-probabilities."""
  weight, teacher = batch.hyperparameter("guidance", guidance, low=0, high=1), jax.lax.stop_gradient(teacher)
  divergence = jnp.sum(jnp.exp(teacher) * (teacher - student), axis=-1, where=batch.where)
  return weight * divergence - (1 - weight) * of_label(student, batch.labels)[..., 0]


def _log_probabilities(batch, logits):
  """Log-softmax, 0 for classes that take no part."""
  values = jax.nn.log_softmax(logits, where=batch.where)
  return values if batch.where is None else jnp.where(batch.where, values, 0)
