"""Distillation of class relations (Cr-KD): how much novel images look like the known classes, kept while clustering."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxreg.checks import as_array, check_float, check_hyperparameter, example_mask
from jaxreg.losses.labelled_logits import narrowed, only_counted, widened

__all__ = ["DIVERGENCES", "class_relation_kd_loss"]

DIVERGENCES = ("cross_entropy", "kl")


def class_relation_kd_loss(
  logits: ArrayLike,
  teacher_logits: ArrayLike,
  *,
  temperature: ArrayLike = 0.1,
  kd_temperature: ArrayLike = 4.0,
  divergence: str = "cross_entropy",
  stop_weight_gradient: bool = False,
  where: ArrayLike | None = None,
  axis_name: str | None = None,
) -> jax.Array:
  """`T^2 w H(p, q)` of unlabelled examples: p a frozen classifier's distribution over the known classes, q the model's.

  All softmaxes are at `temperature * kd_temperature`. The weight w is the mass that the model puts on the known classes
  among all of them, divided by its mean over everything that counts (views, heads and examples together). The gradient
  also flows through w: with cross-entropy, as the official code has it, mass that moves away from examples whose p is
  undecided lowers the loss; with `kl` (the paper's words) a student that agrees with the teacher has no gradient.

  Add `alpha` times the mean over what counts to the clustering loss. Give it large crops only, and the teacher the same
  ones, in evaluation mode.

  >>> import jax.numpy as jnp
  >>> known, teacher = jnp.array([[0.9, 0.1], [0.5, 0.5]]), jnp.array([[0.9, 0.1], [0.1, 0.9]])
  >>> logits = jnp.concatenate([known, jnp.zeros((2, 3))], axis=-1)
  >>> print(class_relation_kd_loss(logits, teacher, divergence="kl").round(2))
  [0.   4.95]

  Args:
    logits: floating `[..., classes]`, the known classes first, then the novel ones; cosines, in the paper.
    teacher_logits: `[..., known]` for the same examples; they count as constants.
    temperature: the paper's tau, positive scalar; may be traced.
    kd_temperature: T, positive scalar; may be traced.
    divergence: static; `cross_entropy` or `kl`.
    stop_weight_gradient: static; whether w is a constant.
    where: boolean `[...]`, the examples that count: the unlabelled ones. The others have loss 0 and no part in the mean
      of w.
    axis_name: static; under `pmap` or `shard_map`, the axis that splits the batch, over which the mean of w runs.

  Returns:
    The loss of each example `[...]`.

  Raises:
    ValueError: when shapes do not fit, or a hyperparameter is out of range.

  Reference: Gu, Zhang, Xu, He, "Class-relation Knowledge Distillation for Novel Class Discovery", ICCV 2023, the
    relation distillation with its weight (as in the official code).
  """
  if divergence not in DIVERGENCES:
    raise ValueError(f"divergence must be one of {DIVERGENCES}, got {divergence!r}.")
  logits, teacher_logits = as_array("logits", logits), as_array("teacher_logits", teacher_logits)
  check_float("logits", logits)
  check_float("teacher_logits", teacher_logits)
  if not (logits.ndim and teacher_logits.ndim) or logits.shape[:-1] != teacher_logits.shape[:-1]:
    raise ValueError(
      f"teacher_logits must be [..., known] for logits [..., classes] of the same examples, got {teacher_logits.shape}"
      f" for {logits.shape}."
    )
  known = teacher_logits.shape[-1]
  if not 1 <= known <= logits.shape[-1]:
    raise ValueError(f"teacher_logits must have 1 to {logits.shape[-1]} classes, those of logits, got {known}.")
  for name, value in (("temperature", temperature), ("kd_temperature", kd_temperature)):
    check_hyperparameter(name, value, low=0, open_low=True, shape=())
  counted = example_mask(where, logits.shape[:-1])
  wide = only_counted(jnp.where(counted[..., None], widened(logits), 0), counted)
  teacher = jnp.where(counted[..., None], widened(teacher_logits).astype(wide.dtype), 0)
  scale = jnp.asarray(temperature, wide.dtype) * jnp.asarray(kd_temperature, wide.dtype)
  scores, teacher = wide / scale, jax.lax.stop_gradient(jax.nn.log_softmax(teacher / scale))
  student = jax.nn.log_softmax(scores[..., :known])
  target = teacher if divergence == "kl" else 0
  values = jnp.sum(jnp.exp(teacher) * (target - student), axis=-1)
  weights = _normalized_mass(scores, known, counted, axis_name)
  weights = jax.lax.stop_gradient(weights) if stop_weight_gradient else weights
  values = jnp.asarray(kd_temperature, wide.dtype) ** 2 * weights * values
  return narrowed(jnp.where(counted, values, 0), logits.dtype)


def _normalized_mass(scores, known, counted, axis_name):
  """The mass of the known classes over its mean, from logarithms: all of it may be next to nothing."""
  log_mass = jax.nn.logsumexp(scores[..., :known], axis=-1) - jax.nn.logsumexp(scores, axis=-1)
  largest = jax.lax.stop_gradient(jnp.max(jnp.where(counted, log_mass, -jnp.inf), initial=-jnp.inf))
  if axis_name is not None:
    largest = jax.lax.pmax(largest, axis_name)
  mass = jnp.where(counted, jnp.exp(log_mass - jnp.where(jnp.isfinite(largest), largest, 0)), 0)
  total, count = jnp.sum(mass), jnp.sum(counted).astype(mass.dtype)
  if axis_name is not None:
    total, count = jax.lax.psum((total, count), axis_name)
  return mass * count / jnp.where(total == 0, 1, total)
