"""Distillation: losses that draw a student to a fixed teacher's predictions, through the softmax or class by class."""

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from jaxreg.checks import as_array, check_hyperparameter, check_same_shape
from jaxreg.losses.labelled_logits import classes_last, labelled, narrowed

__all__ = ["binary_kl_loss", "binary_kl_norm_loss", "self_distillation_squared_loss", "softmax_kd_loss"]

# A logit whose softmax is 0 beside any other.
_EXCLUDED = -1e30


def softmax_kd_loss(
  logits: ArrayLike,
  teacher_logits: ArrayLike,
  *,
  temperature: ArrayLike = 4.0,
  axis: int = -1,
  where: ArrayLike | None = None,
) -> jax.Array:
  """Knowledge distillation: `T^2 KL(softmax(t / T) || softmax(z / T))`, the teacher's logits t being constants.

  The factor keeps the size of the gradient when the temperature changes. A constant added to all of an example's
  logits, the student's or the teacher's, changes nothing.

  >>> import jax.numpy as jnp
  >>> logits, teacher = jnp.zeros((1, 2)), jnp.log(jnp.array([[0.75, 0.25]]))
  >>> print(softmax_kd_loss(logits, teacher, temperature=1.0).round(4))
  [0.1308]

  Args:
    logits: the student's, floating `[..., classes]`.
    teacher_logits: of the same shape.
    temperature: T, positive; a scalar or `[...]`; may be traced.
    axis: the axis of the classes.
    where: boolean, broadcasting against `logits`: the classes that take part.

  Returns:
    `[...]`, the loss of each example.

  Raises:
    ValueError: when the teacher's logits do not fit or the temperature is not positive.

  Reference: Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", arXiv:1503.02531, Section 2.
  """
  student, teacher, where, temperature, dtype = _pair(logits, teacher_logits, temperature, axis, where)

  def log_probabilities(scores):
    scores = scores / temperature[..., None]
    return jax.nn.log_softmax(scores if where is None else jnp.where(where, scores, _EXCLUDED))

  student, teacher = log_probabilities(student), log_probabilities(teacher)
  return narrowed(temperature**2 * jnp.sum(jnp.exp(teacher) * (teacher - student), axis=-1), dtype)


def binary_kl_loss(
  logits: ArrayLike,
  teacher_logits: ArrayLike,
  *,
  temperature: ArrayLike = 2.0,
  axis: int = -1,
  where: ArrayLike | None = None,
) -> jax.Array:
  """BinaryKL: `tau^2 sum_k KL(sigmoid(t_k / tau) || sigmoid(z_k / tau))`, each class a Bernoulli variable of its own.

  It is 0 only where the logits are equal, not merely up to a constant. The sum over classes grows with their number.
  On the head that cross-entropy trains it works against it: give it another one (`layers.DualHead`).

  >>> import jax.numpy as jnp
  >>> logits, teacher = jnp.zeros((1, 2)), jnp.array([[2.0, -2.0]])
  >>> print(binary_kl_loss(logits, teacher).round(2), binary_kl_loss(teacher, teacher))
  [0.89] [0.]

  Args:
    logits: the student's, floating `[..., classes]`.
    teacher_logits: of the same shape; they count as constants.
    temperature: tau, positive; a scalar or `[...]`; may be traced.
    axis: the axis of the classes.
    where: boolean, broadcasting against `logits`: the classes that take part.

  Returns:
    `[...]`, the loss of each example.

  Raises:
    ValueError: as `softmax_kd_loss`.

  Reference: Yang, Zong, Huang, Feng, An, "Dual-Head Knowledge Distillation: Enhancing Logits Utilization with an
    Auxiliary Head", KDD 2025, the BinaryKL loss (as in the official code, without its clamping of probabilities).
  """
  student, teacher, _, temperature, dtype = _pair(logits, teacher_logits, temperature, axis, where)
  student, teacher = student / temperature[..., None], teacher / temperature[..., None]
  # Each difference of logarithms comes with a probability that is small where the difference is large.
  term = lambda sign: (
    jax.nn.sigmoid(sign * teacher) * (jax.nn.log_sigmoid(sign * teacher) - jax.nn.log_sigmoid(sign * student))
  )
  return narrowed(temperature**2 * jnp.sum(term(1) + term(-1), axis=-1), dtype)


def binary_kl_norm_loss(
  logits: ArrayLike,
  teacher_logits: ArrayLike,
  *,
  temperature: ArrayLike = 2.0,
  axis: int = -1,
  where: ArrayLike | None = None,
) -> jax.Array:
  """BinaryKL-Norm, `tau^2 sum_k log cosh((z_k - t_k) / (2 tau))`: BinaryKL of the difference of the logits against 0.

  A regression on the teacher's logits, quadratic near them, `(z_k - t_k)^2 / 8`, and linear far away. Unlike that of
  BinaryKL its slope does not vanish where the teacher is certain.

  >>> import jax.numpy as jnp
  >>> print(binary_kl_norm_loss(jnp.zeros((1, 2)), jnp.array([[2.0, -2.0]])).round(3))
  [0.961]

  Args:
    logits, teacher_logits, temperature, axis, where: as in `binary_kl_loss`.

  Returns:
    `[...]`, the loss of each example.

  Raises:
    ValueError: as `softmax_kd_loss`.

  Reference: Yang et al., KDD 2025, the BinaryKL-Norm loss (in closed form).
  """
  student, teacher, _, temperature, dtype = _pair(logits, teacher_logits, temperature, axis, where)
  halves = (student - teacher) / (2 * temperature[..., None])
  return narrowed(temperature**2 * jnp.sum(optax.losses.log_cosh(halves), axis=-1), dtype)


def _pair(logits, teacher_logits, temperature, axis, where):
  """Student's and constant teacher's logits, 0 for classes that take no part, the mask, temperature and dtype."""
  logits, teacher_logits = as_array("logits", logits), as_array("teacher_logits", teacher_logits)
  student, mask = classes_last(logits, axis=axis, where=where)
  check_same_shape(logits=logits, teacher_logits=teacher_logits)
  teacher, _ = classes_last(teacher_logits, axis=axis, where=where)
  check_hyperparameter("temperature", temperature, low=0, open_low=True, shape=student.shape[:-1])
  temperature = jnp.broadcast_to(jnp.asarray(temperature, student.dtype), student.shape[:-1])
  return student, jax.lax.stop_gradient(teacher.astype(student.dtype)), mask, temperature, logits.dtype


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
