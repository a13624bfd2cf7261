"""Distillation: losses that draw a student to the ground truth and to a teacher's predictions."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxreg.losses.labelled_logits import labelled

__all__ = ["self_distillation_squared_loss"]


def self_distillation_squared_loss(
  logits: ArrayLike,
  teacher_logits: ArrayLike,
  labels: ArrayLike,
  *,
  target_weight: ArrayLike,
  axis: int = -1,
  where: ArrayLike | None = None,
) -> jax.Array:
  """Squared errors of `p = softmax(logits)`: `mean_k [alpha (p_k - [k = y])^2 + (1 - alpha) (p_k - q_k)^2]`.

  The teacher's probabilities q are constants. There is no temperature. At `target_weight = 1`, the first round of
  self-distillation, the teacher has no effect, and the loss is `brier_loss` over the number of classes.

  >>> import jax.numpy as jnp
  >>> logits, teacher, labels = jnp.zeros((1, 2)), jnp.log(jnp.array([[0.75, 0.25]])), jnp.array([0])
  >>> [round(float(self_distillation_squared_loss(logits, teacher, labels, target_weight=w)[0]), 4) for w in (0, 1)]
  [0.0625, 0.25]

  Args:
    logits: the student's, floating `[..., classes]`.
    teacher_logits: of the same shape.
    labels: integers `[...]`.
    target_weight: the paper's alpha, weight of the ground truth, in [0, 1] (or an array of them that broadcasts against
      `labels`); may be traced. Others call the weight of the teacher alpha.
    axis: the axis of the classes.
    where: boolean, broadcasting against `logits`: the classes that take part, the label among them.

  Returns:
    `[...]`, the loss of each example.

  Raises:
    ValueError: when labels or teacher do not fit the logits or `target_weight` is outside [0, 1].

  Reference: Borup, Andersen, "Even your Teacher Needs Guidance: Ground-Truth Targets Dampen Regularization Imposed by
    Self-Distillation", NeurIPS 2021, the loss for networks (as in the official code).
  """
  batch = labelled(logits, labels, axis=axis, where=where)
  teacher = batch.other_logits("teacher_logits", teacher_logits, axis)
  weight = batch.hyperparameter("target_weight", target_weight, low=0, high=1)
  student = jax.nn.softmax(batch.logits, where=batch.where)
  teacher = jax.lax.stop_gradient(jax.nn.softmax(teacher, where=batch.where))
  truth = jax.nn.one_hot(batch.labels, student.shape[-1], dtype=student.dtype)
  squared = lambda target: jnp.mean(jnp.square(student - target), axis=-1, where=batch.where)
  return batch.values(weight * squared(truth) + (1 - weight) * squared(teacher))
