"""Early-learning regularization (ELR, ELR+): a moving average of predictions keeps wrong labels from being learned."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from jaxreg.checks import (
  as_array,
  check_float,
  check_hyperparameter,
  check_integer_labels,
  check_same_shape,
  check_state,
  widened_integers,
)
from jaxreg.losses.example_table import gather_rows, only_examples, pooled_rows, set_rows, table_ids
from jaxreg.losses.labelled_logits import labelled, narrowed, widened
from jaxreg.losses.softmax_family import of_label

__all__ = [
  "ELRState",
  "elr_init",
  "elr_loss",
  "elr_plus_loss",
  "elr_regularizer",
  "noisy_label_candidates",
  "sigmoid_rampup",
]


class ELRState(NamedTuple):
  """The targets of all examples: moving averages of predictions, starting at zero.

  `[examples, classes]`; or `[examples, k]`, of the k classes with the largest targets, where `classes` says which.
  """

  targets: jax.Array
  classes: jax.Array | None = None  # integers [examples, k]


def elr_init(num_examples: int, num_classes: int, *, top_k: int | None = None, dtype=jnp.float32) -> ELRState:
  """Zero targets for every example.

  >>> elr_init(100, 10).targets.shape, elr_init(1000, 300, top_k=5).targets.shape
  ((100, 10), (1000, 5))

  Args:
    num_examples: size of the data set; ids index it.
    num_classes: number of classes.
    top_k: static; how many of an example's targets are kept between its visits, the others being forgotten (taken as
      0); None keeps all. For many classes: 1.3 million examples of 1,000 classes take 5 GB, their best ten 0.1 GB.
    dtype: storage dtype; bfloat16 halves the memory, updates are computed in float32 all the same.

  Returns:
    An `ELRState`.

  Raises:
    ValueError: when `top_k` is not between 1 and `num_classes`.
  """
  if top_k is None:
    return ELRState(jnp.zeros((num_examples, num_classes), dtype))
  if not 1 <= top_k <= num_classes:
    raise ValueError(f"top_k must lie in [1, {num_classes}], the number of classes, got {top_k}.")
  classes = jnp.broadcast_to(jnp.arange(top_k, dtype=jnp.int32), (num_examples, top_k))
  return ELRState(jnp.zeros((num_examples, top_k), dtype), classes)


def elr_regularizer(probabilities: ArrayLike, targets: ArrayLike, *, clip: float = 1e-4) -> jax.Array:
  """`log(1 - <p, t>)` per example, with `p` clipped to `[clip, 1 - clip]`; add it to any loss.

  It is at most 0 and at least `log(clip)` for one-hot targets. Targets count as constants.

  >>> import jax.numpy as jnp
  >>> print(elr_regularizer(jnp.array([[0.5, 0.5]]), jnp.array([[1.0, 0.0]])).round(3))
  [-0.693]

  Args:
    probabilities: `[..., classes]`.
    targets: `[..., classes]`, non-negative, of sum at most 1.
    clip: in [0, 0.5).

  Returns:
    `[...]`.

  Raises:
    ValueError: when shapes differ or `clip` is out of range.

  Reference: Liu, Niles-Weed, Razavian, Fernandez-Granda, "Early-Learning Regularization Prevents Memorization of Noisy
    Labels", NeurIPS 2020, equation 6.
  """
  probabilities, targets = as_array("probabilities", probabilities), as_array("targets", targets)
  check_float("probabilities", probabilities)
  check_same_shape(probabilities=probabilities, targets=targets)
  check_hyperparameter("clip", clip, low=0, high=0.5, open_high=True, shape=())
  wide = widened(probabilities)
  inner = _inner(wide, jax.lax.stop_gradient(targets).astype(wide.dtype), clip)
  return narrowed(jnp.log1p(-jnp.minimum(inner, _bound(clip, wide.dtype))), probabilities.dtype)


def elr_loss(
  logits: ArrayLike,
  labels: ArrayLike,
  ids: ArrayLike,
  *,
  state: ELRState,
  momentum: ArrayLike = 0.7,
  weight: ArrayLike = 3.0,
  clip: float = 1e-4,
  where: ArrayLike | None = None,
  unique_ids: bool = False,
  axis_name: str | None = None,
) -> tuple[jax.Array, ELRState]:
  """Cross-entropy plus `weight * log(1 - <p, t>)`, the targets `t` of the batch being updated first.

  `t <- momentum t + (1 - momentum) p / sum(p)` with `p` the clipped softmax, without gradient. The loss may be
  negative.

  >>> import jax, jax.numpy as jnp
  >>> state, labels = elr_init(4, 3), jnp.array([0, 2])
  >>> for ids in (jnp.array([0, 1]), jnp.array([2, 3])):
  ...   values, state = elr_loss(jnp.zeros((2, 3)), labels, ids, state=state, momentum=0.7, weight=3.0)
  >>> values.shape, bool(jnp.allclose(state.targets.sum(axis=1), 0.3))
  ((2,), True)

  Args:
    logits: floating `[..., classes]`.
    labels: integers `[...]`.
    ids: integers `[...]`, each example's index in the data set; see `update_rows` for those outside the table and
      those that occur twice. An example outside the table has zero targets before its update.
    state: from `elr_init` or the step before; keep it in checkpoints.
    momentum: in [0, 1]; the paper's beta.
    weight: non-negative; the paper's lambda.
    clip: probabilities are clipped to `[clip, 1 - clip]`, with zero gradient outside.
    where: boolean `[...]`, the examples that count: the others have loss 0 and change no targets, as have those whose
      label is outside `[0, classes)`.
    unique_ids: static; see `update_rows`.
    axis_name: static; under `pmap` or `shard_map`, the axis that splits the batch.

  Returns:
    The loss of each example `[...]`, and the new state.

  Raises:
    ValueError: when shapes do not fit or a hyperparameter is out of range.

  Reference: Liu et al., NeurIPS 2020, equations 6 and 9.
  """
  batch = only_examples(labelled(logits, labels), where)
  ids = _checked(batch, ids, state, momentum, clip)
  weight = batch.hyperparameter("weight", weight, low=0)
  probabilities = jax.nn.softmax(batch.logits)
  old = _gather(state, ids, batch.logits.shape[-1])
  targets = _moving_average(old, _normalized(_clip(probabilities, clip)), momentum)
  values = _regularized_cross_entropy(batch.logits, batch.labels, targets, weight, clip)
  return batch.values(values), _update(state, ids, targets, unique_ids, axis_name)


def elr_plus_loss(
  logits: ArrayLike,
  soft_labels: ArrayLike,
  teacher_logits: ArrayLike,
  ids: ArrayLike,
  *,
  state: ELRState,
  permutation: ArrayLike,
  coefficient: ArrayLike,
  momentum: ArrayLike = 0.7,
  weight: ArrayLike = 3.0,
  ramp: ArrayLike = 1.0,
  clip: float = 1e-4,
  reweight_labels: bool = False,
  where: ArrayLike | None = None,
  unique_ids: bool = False,
  axis_name: str | None = None,
) -> tuple[jax.Array, ELRState]:
  """The loss of one of ELR+'s two networks on a mixed batch, with targets from the other's averaged weights.

  The table is updated with the teacher's predictions (not clipped) for the unmixed batch; the targets are then mixed
  like the inputs: `q = l t + (1 - l) t[permutation]`; the loss is `-<y, log p> + ramp * weight * log(1 - <q, p>)`.

  >>> import jax, jax.numpy as jnp
  >>> state = elr_init(2, 3)
  >>> for step in range(2):
  ...   values, state = elr_plus_loss(
  ...     jnp.zeros((2, 3)), jnp.eye(3)[:2], jnp.zeros((2, 3)), jnp.arange(2), state=state,
  ...     permutation=jnp.array([1, 0]), coefficient=0.8, ramp=sigmoid_rampup(step, length=10))
  >>> values.shape, state.targets.shape
  ((2,), (2, 3))

  Args:
    logits: floating `[batch, classes]`, the network's outputs for the mixed inputs.
    soft_labels: `[batch, classes]`, mixed one-hot labels.
    teacher_logits: `[batch, classes]`, the other network's averaged weights' outputs for the unmixed inputs.
    ids: integers `[batch]`.
    state: this network's targets.
    permutation: integers `[batch]`, the partner that each example was mixed with.
    coefficient: scalar in [0.5, 1], the share of the example itself.
    momentum: in [0, 1].
    weight: non-negative.
    ramp: in [0, 1]; see `sigmoid_rampup`.
    clip: see `elr_loss`.
    reweight_labels: static; whether labels `y` are replaced by `y q / sum(y q)`, as the official code does for data of
      100 classes (it is not in the paper). Where the product is 0 for all classes the labels stay.
    where: boolean `[batch]`, the examples that count, see `elr_loss`.
    unique_ids: static; see `update_rows`.
    axis_name: static; under `pmap` or `shard_map`, the axis that splits the batch; mixing stays within each part.

  Returns:
    The loss of each example `[batch]`, and the new state.

  Raises:
    ValueError: when shapes do not fit or a hyperparameter is out of range.

  Reference: Liu et al., NeurIPS 2020, Section 4.4 and the official ELR+ loss.
  """
  logits, soft_labels, teacher_logits = (
    as_array(name, value)
    for name, value in (("logits", logits), ("soft_labels", soft_labels), ("teacher_logits", teacher_logits))
  )
  check_float("logits", logits)
  check_same_shape(logits=logits, soft_labels=soft_labels, teacher_logits=teacher_logits)
  if logits.ndim != 2:
    raise ValueError(f"logits must be [batch, classes], got shape {logits.shape}; use vmap for more.")
  # Labels are dense here: of integer ones only the examples that count are left.
  batch = only_examples(labelled(logits, jnp.zeros(logits.shape[:-1], jnp.int32)), where)
  check_same_shape(ids=ids, permutation=permutation)
  coefficient = batch.hyperparameter("coefficient", coefficient, low=0, high=1, scalar=True)
  ramp = batch.hyperparameter("ramp", ramp, low=0, high=1, scalar=True)
  weight = batch.hyperparameter("weight", weight, low=0)
  ids = _checked(batch, ids, state, momentum, clip)
  teacher = jnp.where(batch.counted[..., None], widened(teacher_logits), 0)
  targets = _moving_average(_gather(state, ids, logits.shape[-1]), jax.nn.softmax(teacher), momentum)
  mixed = coefficient * targets + (1 - coefficient) * targets[permutation]
  soft_labels = jnp.where(batch.counted[..., None], soft_labels.astype(mixed.dtype), 0)
  if reweight_labels:
    product = soft_labels * mixed
    total = jnp.sum(product, axis=-1, keepdims=True)
    soft_labels = jnp.where(total > 0, product / jnp.where(total > 0, total, 1), soft_labels)
  values = optax.softmax_cross_entropy(batch.logits, soft_labels)
  values += ramp * weight * elr_regularizer(jax.nn.softmax(batch.logits), mixed, clip=clip)
  return batch.values(values), _update(state, ids, targets, unique_ids, axis_name)


def sigmoid_rampup(step: ArrayLike, *, length: ArrayLike) -> jax.Array:
  """`exp(-5 (1 - min(step, length) / length)^2)`: from exp(-5) to 1; a length of 0 gives 1.

  >>> print(sigmoid_rampup(0, length=10).round(4), sigmoid_rampup(10, length=10))
  0.0067 1.0

  Args:
    step: non-negative, may be traced.
    length: non-negative number of steps.

  Returns:
    A scalar in float32, or in float64 where that is enabled.
  """
  step = as_array("step", step)
  check_hyperparameter("length", length, low=0, shape=step.shape)
  length = jnp.asarray(length, jnp.promote_types(jnp.result_type(float), jnp.float32))
  fraction = jnp.where(length > 0, jnp.clip(step, 0, length) / jnp.maximum(length, 1e-30), 1)
  return jnp.exp(-5 * (1 - fraction) ** 2)


def noisy_label_candidates(state: ELRState, labels: ArrayLike) -> jax.Array:
  """Which examples' targets disagree with their labels.

  >>> import jax.numpy as jnp
  >>> noisy_label_candidates(ELRState(jnp.array([[0.9, 0.1], [0.2, 0.8]])), jnp.array([0, 0])).tolist()
  [False, True]

  Args:
    state: the targets of all examples.
    labels: integers `[examples]`.

  Returns:
    Booleans `[examples]`.

  Raises:
    ValueError: unless there is one integer label for each example.
  """
  check_state(state, ELRState)
  targets, labels = as_array("state", state.targets), as_array("labels", labels)
  check_integer_labels(targets, labels)
  labels = widened_integers(labels)
  best = targets.argmax(-1)
  if state.classes is not None:
    best = of_label(as_array("state", state.classes), best)[..., 0]
  return best != labels


@jax.custom_jvp
def _regularized_cross_entropy(logits, labels, targets, weight, clip):
  """Cross-entropy plus the weighted regularizer, with a gradient in one pass; the targets are constants."""
  cross_entropy = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
  return cross_entropy + weight * elr_regularizer(jax.nn.softmax(logits), targets, clip=clip)


@_regularized_cross_entropy.defjvp
def _regularized_cross_entropy_jvp(primals, tangents):
  logits, labels, targets, weight, clip = primals
  logits_dot, _, _, weight_dot, _ = tangents
  probabilities = jax.nn.softmax(logits)
  inner, bound = _inner(probabilities, targets, clip), _bound(clip, logits.dtype)
  cross_entropy = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
  regularizer = jnp.log1p(-jnp.minimum(inner, bound))
  # d log(1 - inner) / d p_k is -t_k / (1 - inner) where p_k is not clipped.
  factor = jnp.where(inner < bound, -weight / (1 - jnp.minimum(inner, bound)), 0)[..., None]
  inside = (probabilities > clip) & (probabilities < 1 - clip)
  pulled = probabilities * jnp.where(inside, targets, 0)
  gradient = probabilities * (1 - factor * jnp.sum(pulled, axis=-1, keepdims=True)) + factor * pulled
  dot = jnp.sum(gradient * logits_dot, axis=-1) - of_label(logits_dot, labels)[..., 0] + regularizer * weight_dot
  return cross_entropy + weight * regularizer, dot


def _inner(probabilities, targets, clip):
  return jnp.sum(_clip(probabilities, clip) * targets, axis=-1)


def _bound(clip, dtype):
  """Several classes can only reach an inner product of 1 by rounding; the bound keeps the logarithm finite then."""
  return 1 - jnp.maximum(jnp.asarray(clip, dtype), jnp.finfo(dtype).eps) / 2


def _checked(batch, ids, state, momentum, clip):
  """Ids that index the table, after checks of what the losses share."""
  check_state(state, ELRState)
  shape, classes = jnp.shape(state.targets), batch.logits.shape[-1]
  if len(shape) != 2 or (state.classes is None and shape[1] != classes):
    raise ValueError(f"state must have targets for {classes} classes, [examples, classes], got shape {shape}.")
  check_hyperparameter("momentum", momentum, low=0, high=1, shape=())
  check_hyperparameter("clip", clip, low=0, high=0.5, open_high=True, shape=())
  return table_ids(ids, batch.labels.shape, shape[0], batch.counted)


def _gather(state, ids, num_classes):
  """The targets of some examples, `[..., classes]`."""
  rows = gather_rows(as_array("state", state.targets), ids)
  if state.classes is None:
    return rows
  flat = rows.reshape(-1, rows.shape[-1])
  classes = as_array("state", state.classes)[jnp.where(ids < 0, 0, ids)].reshape(flat.shape)
  place = jax.vmap(lambda values, classes: jnp.zeros(num_classes, flat.dtype).at[classes].set(values))
  return place(flat, classes).reshape(*ids.shape, num_classes)


def _update(state, ids, targets, unique_ids, axis_name):
  """The state with the targets of some examples replaced; see `update_rows`."""
  table = as_array("state", state.targets)
  ids, targets = pooled_rows(ids, targets, table.shape[0], unique_ids=unique_ids, axis_name=axis_name)
  if state.classes is None:
    return ELRState(set_rows(table, ids, targets))
  targets, classes = jax.lax.top_k(targets, table.shape[1])
  return ELRState(set_rows(table, ids, targets), set_rows(as_array("state", state.classes), ids, classes))


def _clip(probabilities: jax.Array, clip: float) -> jax.Array:
  return jnp.clip(probabilities, clip, 1 - clip)


def _normalized(probabilities: jax.Array) -> jax.Array:
  return probabilities / jnp.sum(probabilities, axis=-1, keepdims=True)


def _moving_average(old: jax.Array, new: jax.Array, momentum) -> jax.Array:
  return jax.lax.stop_gradient(momentum * old + (1 - momentum) * new)
