"""Self-knowledge distillation with refined targets (PS-KD): last epoch's prediction joins the label."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from jaxreg.checks import (
  as_array,
  check_float,
  check_hyperparameter,
  check_state,
  counted_labels,
  dtype_of,
)
from jaxreg.losses.example_table import gather_rows, only_examples, table_ids, update_rows
from jaxreg.losses.labelled_logits import labelled, narrowed, widened

__all__ = ["PSKDState", "ps_kd_alpha", "ps_kd_init", "ps_kd_loss", "ps_kd_targets"]


class PSKDState(NamedTuple):
  """The last prediction for every example, probabilities `[examples, classes]`; zeros for one not visited yet."""

  predictions: jax.Array


def ps_kd_init(num_examples: int, num_classes: int, *, dtype=jnp.float32) -> PSKDState:
  """A table without predictions: until its second visit an example's target is its label alone.

  >>> ps_kd_init(100, 10).predictions.shape
  (100, 10)

  Args:
    num_examples: size of the data set; ids index it.
    num_classes: number of classes.
    dtype: storage dtype; bfloat16 halves the memory (2.6 GB for 1.3 million examples of 1,000 classes).

  Returns:
    A `PSKDState`.

  Reference: Kim, Ji, Yoon, Hwang, "Self-Knowledge Distillation with Progressive Refinement of Targets", ICCV 2021.
  """
  return PSKDState(jnp.zeros((num_examples, num_classes), dtype))


def ps_kd_alpha(
  step: ArrayLike, *, final: ArrayLike = 0.8, epochs: ArrayLike, steps_per_epoch: ArrayLike = 1
) -> jax.Array:
  """The weight of the last prediction, `final * (epoch + 1) / epochs` with the epoch counted from 0.

  It is constant within an epoch and never 0, which does not matter in the first one, where the table holds no
  predictions. With `functools.partial` it is a schedule as optax has them.

  >>> [round(float(ps_kd_alpha(step, final=0.8, epochs=4, steps_per_epoch=10)), 3) for step in (0, 9, 10, 39)]
  [0.2, 0.2, 0.4, 0.8]

  Args:
    step: non-negative number of steps taken before this one, or of epochs; may be traced.
    final: the paper's alpha_T, in [0, 1], reached in the last epoch and kept after it.
    epochs: at least 1.
    steps_per_epoch: at least 1; leave it out when `step` counts epochs.

  Returns:
    `[...]` like `step`, in float32, or in float64 where that is enabled.

  Raises:
    ValueError: when an argument is out of range.

  Reference: Kim et al., ICCV 2021, the schedule of alpha_t (as in the official code).
  """
  step = as_array("step", step)
  check_hyperparameter("final", final, low=0, high=1, shape=step.shape)
  check_hyperparameter("epochs", epochs, low=1, shape=step.shape)
  check_hyperparameter("steps_per_epoch", steps_per_epoch, low=1, shape=step.shape)
  dtype = jnp.promote_types(jnp.result_type(float), jnp.float32)
  epoch = jnp.floor_divide(step, jnp.asarray(steps_per_epoch)).astype(dtype)
  return jnp.asarray(final, dtype) * jnp.clip((epoch + 1) / jnp.asarray(epochs, dtype), 0, 1)


def ps_kd_targets(labels: ArrayLike, predictions: ArrayLike, *, alpha: ArrayLike) -> jax.Array:
  """The refined targets `(1 - alpha) y + alpha b`: one-hot labels mixed with earlier predictions, without gradient.

  Use them with `optax.softmax_cross_entropy` where no table can be kept and the predictions come from the parameters of
  the epoch before. A row of zeros (no prediction yet) leaves the label; other rows are divided by their sums, which
  rounding may have moved from 1.

  >>> import jax.numpy as jnp
  >>> print(ps_kd_targets(jnp.array([0, 1]), jnp.array([[0.5, 0.5], [0.0, 0.0]]), alpha=0.4))
  [[0.8 0.2]
   [0.  1. ]]

  Args:
    labels: integers `[...]`.
    predictions: probabilities `[..., classes]`.
    alpha: in [0, 1], a scalar or `[...]`; may be traced.

  Returns:
    `[..., classes]`, of sum 1; zeros for a label outside `[0, classes)`.

  Raises:
    ValueError: when shapes do not fit or `alpha` is out of range.

  Reference: Kim et al., ICCV 2021, the soft targets (as in the official code).
  """
  labels, predictions = as_array("labels", labels), as_array("predictions", predictions)
  check_float("predictions", predictions)
  if not jnp.issubdtype(dtype_of("labels", labels), jnp.integer):
    raise ValueError(f"labels must be integer class indices, got dtype {labels.dtype}.")
  if predictions.shape[:-1] != labels.shape or predictions.ndim < 1:
    raise ValueError(
      f"predictions must have the shape of labels and an axis of classes, got {predictions.shape} for labels of shape"
      f" {labels.shape}."
    )
  check_hyperparameter("alpha", alpha, low=0, high=1, shape=labels.shape)
  labels, counted = counted_labels(labels, predictions.shape[-1])
  targets = _targets(labels, jax.lax.stop_gradient(widened(predictions)), alpha)
  return narrowed(jnp.where(counted[..., None], targets, 0), predictions.dtype)


def ps_kd_loss(
  logits: ArrayLike,
  labels: ArrayLike,
  ids: ArrayLike,
  *,
  state: PSKDState,
  alpha: ArrayLike,
  where: ArrayLike | None = None,
  unique_ids: bool = False,
  axis_name: str | None = None,
) -> tuple[jax.Array, PSKDState]:
  """Cross-entropy with the targets `(1 - alpha) y + alpha b`, where b was predicted at the example's last visit.

  The table then takes the softmax of these logits, without gradient: those of the pass that is trained on, with its
  augmentation, batch statistics and dropout, and of the parameters before the step.

  It pays where a network is over-confident; one that is not gets under-confident. At `alpha = 0`, and at every
  example's first visit, it is cross-entropy. Of inputs that were mixed (mixup, CutMix) mix the targets of both with
  `ps_kd_targets`, and update the table from unmixed ones.

  >>> import jax, jax.numpy as jnp
  >>> state, labels = ps_kd_init(4, 3), jnp.array([0, 2])
  >>> for epoch in range(2):
  ...   alpha = ps_kd_alpha(epoch, final=0.8, epochs=2)
  ...   values, state = ps_kd_loss(jnp.array([[2.0, 0, 0]] * 2), labels, jnp.array([3, 1]), state=state, alpha=alpha)
  >>> [round(float(value), 2) for value in values], state.predictions.sum(axis=1).round(3).tolist()
  ([0.58, 0.98], [0.0, 1.0, 0.0, 1.0])

  Args:
    logits: floating `[..., classes]`.
    labels: integers `[...]`.
    ids: integers `[...]`, each example's index in the data set; see `update_rows` for those outside the table and
      those that occur twice. The target of an example outside the table is its label.
    state: from `ps_kd_init` or the step before; keep it in checkpoints.
    alpha: in [0, 1], a scalar or `[...]`; may be traced, and has to be where `ps_kd_alpha` raises it, else every epoch
      compiles anew.
    where: boolean `[...]`, the examples that count: the others have loss 0 and change no predictions, as have those
      whose label is outside `[0, classes)`.
    unique_ids: static; see `update_rows`.
    axis_name: static; under `pmap` or `shard_map`, the axis that splits the batch.

  Returns:
    The loss of each example `[...]`, and the new state.

  Raises:
    ValueError: when shapes do not fit or `alpha` is out of range.

  Reference: Kim et al., ICCV 2021, the PS-KD loss; the table follows the official code.
  """
  batch = only_examples(labelled(logits, labels), where)
  check_state(state, PSKDState)
  table, classes = as_array("state", state.predictions), batch.logits.shape[-1]
  if table.ndim != 2 or table.shape[1] != classes:
    raise ValueError(f"state must have predictions of {classes} classes, [examples, classes], got shape {table.shape}.")
  alpha = batch.hyperparameter("alpha", alpha, low=0, high=1)
  ids = table_ids(ids, batch.labels.shape, table.shape[0], batch.counted)
  targets = _targets(batch.labels, jax.lax.stop_gradient(gather_rows(table, ids)), alpha)
  values = optax.softmax_cross_entropy(batch.logits, targets.astype(batch.logits.dtype))
  new = update_rows(table, ids, jax.nn.softmax(batch.logits), unique_ids=unique_ids, axis_name=axis_name)
  return batch.values(values), PSKDState(new)


def _targets(labels, predictions, alpha):
  total = jnp.sum(predictions, axis=-1, keepdims=True)
  alpha = jnp.where(total == 0, 0, jnp.asarray(alpha, predictions.dtype)[..., None])  # a NaN stays one
  one_hot = jax.nn.one_hot(labels, predictions.shape[-1], dtype=predictions.dtype)
  return (1 - alpha) * one_hot + alpha * (predictions / jnp.where(total == 0, 1, total))
