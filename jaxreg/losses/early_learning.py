"""Early-learning regularization (ELR, ELR+): a moving average of predictions keeps wrong labels from being learned."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxreg.checks import check_float, check_hyperparameter, check_integer_labels, check_same_shape
from jaxreg.losses.example_table import check_ids, gather_rows, update_rows
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
  """The targets of all examples, `[examples, classes]`: moving averages of predictions, starting at zero."""

  targets: jax.Array


def elr_init(num_examples: int, num_classes: int, *, dtype=jnp.float32) -> ELRState:
  """Zero targets for every example.

  >>> elr_init(100, 10).targets.shape
  (100, 10)

  Args:
    num_examples: size of the data set; ids index it.
    num_classes: number of classes.
    dtype: storage dtype; bfloat16 halves the memory, updates are computed in float32 all the same.

  Returns:
    An `ELRState`.
  """
  return ELRState(jnp.zeros((num_examples, num_classes), dtype))


def elr_regularizer(probabilities: jax.Array, targets: jax.Array, *, clip: float = 1e-4) -> jax.Array:
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
  check_float("probabilities", probabilities)
  check_same_shape(probabilities=probabilities, targets=targets)
  check_hyperparameter("clip", clip, low=0, high=0.5, open_high=True)
  dtype = jnp.promote_types(probabilities.dtype, jnp.float32)
  inner = _inner(probabilities.astype(dtype), jax.lax.stop_gradient(targets).astype(dtype), clip)
  return jnp.log1p(-jnp.minimum(inner, _bound(clip, dtype))).astype(probabilities.dtype)


def elr_loss(
  logits: jax.Array,
  labels: jax.Array,
  ids: jax.Array,
  *,
  state: ELRState,
  momentum: float | jax.Array = 0.7,
  weight: float | jax.Array = 3.0,
  clip: float = 1e-4,
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
    ids: integers `[...]`, each example's index in the data set, none twice in a batch.
    state: from `elr_init` or the step before; keep it in checkpoints.
    momentum: in [0, 1]; the paper's beta.
    weight: non-negative; the paper's lambda.
    clip: probabilities are clipped to `[clip, 1 - clip]`, with zero gradient outside.
    axis_name: static; under `pmap` or `shard_map`, the axis that splits the batch.

  Returns:
    The loss of each example `[...]`, and the new state.

  Raises:
    ValueError: when shapes do not fit or a hyperparameter is out of range.

  Reference: Liu et al., NeurIPS 2020, equations 6 and 9.
  """
  check_integer_labels(logits, labels)
  _check(logits, labels, ids, state, momentum, weight, clip)
  wide = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
  probabilities = jax.nn.softmax(wide)
  targets = _moving_average(gather_rows(state.targets, ids), _normalized(_clip(probabilities, clip)), momentum)
  values = _regularized_cross_entropy(wide, labels, targets, jnp.asarray(weight, wide.dtype), clip)
  return values.astype(logits.dtype), ELRState(update_rows(state.targets, ids, targets, axis_name=axis_name))


def elr_plus_loss(
  logits: jax.Array,
  soft_labels: jax.Array,
  teacher_logits: jax.Array,
  ids: jax.Array,
  *,
  state: ELRState,
  permutation: jax.Array,
  coefficient: jax.Array,
  momentum: float | jax.Array = 0.7,
  weight: float | jax.Array = 3.0,
  ramp: float | jax.Array = 1.0,
  clip: float = 1e-4,
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
    axis_name: static; under `pmap` or `shard_map`, the axis that splits the batch; mixing stays within each part.

  Returns:
    The loss of each example `[batch]`, and the new state.

  Raises:
    ValueError: when shapes do not fit or a hyperparameter is out of range.

  Reference: Liu et al., NeurIPS 2020, Section 4.4 and the official ELR+ loss.
  """
  check_float("logits", logits)
  check_same_shape(logits=logits, soft_labels=soft_labels, teacher_logits=teacher_logits)
  check_same_shape(ids=ids, permutation=permutation)
  check_hyperparameter("coefficient", coefficient, low=0, high=1)
  check_hyperparameter("ramp", ramp, low=0, high=1)
  _check(logits, jnp.zeros(logits.shape[:-1], jnp.int32), ids, state, momentum, weight, clip)
  wide = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
  teacher = jax.lax.stop_gradient(jax.nn.softmax(teacher_logits.astype(wide.dtype)))
  targets = _moving_average(gather_rows(state.targets, ids), teacher, momentum)
  mixed = coefficient * targets + (1 - coefficient) * targets[permutation]
  values = optax.softmax_cross_entropy(wide, soft_labels.astype(wide.dtype))
  values += ramp * weight * elr_regularizer(jax.nn.softmax(wide), mixed, clip=clip)
  return values.astype(logits.dtype), ELRState(update_rows(state.targets, ids, targets, axis_name=axis_name))


def sigmoid_rampup(step: int | jax.Array, *, length: int | jax.Array) -> jax.Array:
  """`exp(-5 (1 - min(step, length) / length)^2)`: from exp(-5) to 1; a length of 0 gives 1.

  >>> print(sigmoid_rampup(0, length=10).round(4), sigmoid_rampup(10, length=10))
  0.0067 1.0

  Args:
    step: non-negative, may be traced.
    length: non-negative number of steps.

  Returns:
    A float32 scalar.
  """
  check_hyperparameter("length", length, low=0)
  length = jnp.asarray(length, jnp.float32)
  fraction = jnp.where(length > 0, jnp.clip(step, 0, length) / jnp.maximum(length, 1e-30), 1)
  return jnp.exp(-5 * (1 - fraction) ** 2)


def noisy_label_candidates(state: ELRState, labels: jax.Array) -> jax.Array:
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
  check_integer_labels(state.targets, labels)
  return state.targets.argmax(-1) != labels


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


def _check(logits, labels, ids, state, momentum, weight, clip):
  check_ids(ids, labels)
  if state.targets.shape[-1] != logits.shape[-1]:
    raise ValueError(f"state must have targets for {logits.shape[-1]} classes, got {state.targets.shape[-1]}.")
  check_hyperparameter("momentum", momentum, low=0, high=1)
  check_hyperparameter("weight", weight, low=0)
  check_hyperparameter("clip", clip, low=0, high=0.5, open_high=True)


def _clip(probabilities: jax.Array, clip: float) -> jax.Array:
  return jnp.clip(probabilities, clip, 1 - clip)


def _normalized(probabilities: jax.Array) -> jax.Array:
  return probabilities / jnp.sum(probabilities, axis=-1, keepdims=True)


def _moving_average(old: jax.Array, new: jax.Array, momentum) -> jax.Array:
  return jax.lax.stop_gradient(momentum * old + (1 - momentum) * new)
