"""Distillation: losses that draw a student to the ground truth and to a teacher's predictions."""

import jax
import jax.numpy as jnp

from jaxreg.checks import check_hyperparameter, check_integer_labels, check_same_shape

__all__ = ["self_distillation_squared_loss"]


def self_distillation_squared_loss(
  logits: jax.Array,
  teacher_logits: jax.Array,
  labels: jax.Array,
  *,
  target_weight: float | jax.Array,
  axis: int = -1,
  where: jax.Array | None = None,
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
  check_integer_labels(logits, labels, axis=axis)
  check_same_shape(logits=logits, teacher_logits=teacher_logits)
  check_hyperparameter("target_weight", target_weight, low=0, high=1)
  dtype = jnp.promote_types(logits.dtype, jnp.float32)
  student = jax.nn.softmax(logits.astype(dtype), axis=axis, where=where)
  teacher = jax.lax.stop_gradient(jax.nn.softmax(teacher_logits.astype(dtype), axis=axis, where=where))
  truth = jax.nn.one_hot(labels, logits.shape[axis], axis=axis, dtype=dtype)
  squared = lambda target: jnp.mean(jnp.square(student - target), axis=axis, where=where)
  weight = jnp.asarray(target_weight, dtype)
  return (weight * squared(truth) + (1 - weight) * squared(teacher)).astype(logits.dtype)
