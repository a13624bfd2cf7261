"""Accuracy and ranking metrics of classifiers, and what becomes of mislabelled training examples."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxreg.checks import (
  as_array,
  check_float,
  check_hyperparameter,
  check_integer_labels,
  check_same_shape,
  counted_labels,
  dtype_of,
  example_mask,
)
from jaxreg.metrics.sizes import static_integer

__all__ = [
  "MemorizationFractions",
  "area_under_roc",
  "balanced_top_k_accuracy",
  "memorization_fractions",
  "top_k_accuracy",
  "worst_classes_accuracy",
  "worst_group_accuracy",
]


class MemorizationFractions(NamedTuple):
  """Shares of the mislabelled examples, scalars of sum 1: predicted as the true, the given, or another class."""

  correct: jax.Array
  memorized: jax.Array
  other: jax.Array


def top_k_accuracy(
  logits: ArrayLike, labels: ArrayLike, *, k: ArrayLike = 1, where: ArrayLike | None = None
) -> jax.Array:
  """The share of examples whose label is among the `k` largest logits.

  Of equal logits the earlier class ranks first, as with `argmax` and `lax.top_k`; NaN ranks above all numbers.

  >>> import jax.numpy as jnp
  >>> logits, labels = jnp.array([[3.0, 2.0, 1.0], [3.0, 2.0, 1.0]]), jnp.array([0, 1])
  >>> [top_k_accuracy(logits, labels, k=k).item() for k in (1, 2)]
  [0.5, 1.0]

  Args:
    logits: floating `[..., classes]`, or probabilities.
    labels: integers `[...]`.
    k: in [1, classes]; may be traced.
    where: boolean, of the labels' shape: the examples that count.

  Returns:
    Scalar in [0, 1], of the logits' dtype, float32 at least; NaN without examples.

  Raises:
    ValueError: when shapes do not fit or `k` is out of range.

  Reference: Lapin, Hein, Schiele, "Top-k Multiclass SVM", NeurIPS 2015, the top-k error.
  """
  hits, where = _hits(logits, labels, k, where)
  return _share(hits, where, metric_dtype(logits))


def balanced_top_k_accuracy(
  logits: ArrayLike, labels: ArrayLike, *, k: ArrayLike = 1, where: ArrayLike | None = None
) -> jax.Array:
  """The mean over the classes that occur of the class's own top-k accuracy.

  >>> import jax.numpy as jnp
  >>> logits, labels = jnp.array([[1.0, 0.0]] * 4), jnp.array([0, 0, 0, 1])
  >>> top_k_accuracy(logits, labels).item(), balanced_top_k_accuracy(logits, labels).item()
  (0.75, 0.5)

  Args:
    logits: floating `[..., classes]`, or probabilities.
    labels: integers `[...]`.
    k: in [1, classes]; may be traced.
    where: boolean, of the labels' shape: the examples that count.

  Returns:
    Scalar in [0, 1], of the logits' dtype, float32 at least; NaN without examples.

  Raises:
    ValueError: when shapes do not fit or `k` is out of range.

  Reference: Brodersen, Ong, Stephan, Buhmann, "The Balanced Accuracy and Its Posterior Distribution", ICPR 2010.
  """
  hits, where = _hits(logits, labels, k, where)
  dtype = metric_dtype(logits)
  zeros = jnp.zeros(logits.shape[-1], jnp.int32)
  labels, _ = counted_labels(as_array("labels", labels), logits.shape[-1])
  count = zeros.at[labels].add(where.astype(jnp.int32))
  right = zeros.at[labels].add((hits & where).astype(jnp.int32))
  return jnp.mean(right.astype(dtype) / jnp.maximum(count, 1), where=count > 0)


def worst_group_accuracy(
  logits: ArrayLike, labels: ArrayLike, groups: ArrayLike, *, num_groups: int, where: ArrayLike | None = None
) -> jax.Array:
  """The smallest of the groups' own accuracies, over the groups that occur.

  >>> import jax.numpy as jnp
  >>> logits, labels, groups = jnp.array([[1.0, 0.0]] * 4), jnp.array([0, 0, 0, 1]), jnp.array([0, 0, 1, 1])
  >>> worst_group_accuracy(logits, labels, groups, num_groups=3).item()
  0.5

  Args:
    logits: floating `[..., classes]`, or probabilities.
    labels: integers `[...]`.
    groups: integers `[...]`, the group of each example, of label and spurious attribute for instance; examples outside
      [0, num_groups) do not count.
    num_groups: static.
    where: boolean, of the labels' shape: the examples that count.

  Returns:
    Scalar in [0, 1], of the logits' dtype, float32 at least; NaN without examples.

  Raises:
    ValueError: when shapes or dtypes do not fit.

  Reference: Sagawa, Koh, Hashimoto, Liang, "Distributionally Robust Neural Networks for Group Shifts", ICLR 2020.
  """
  hits, where = _hits(logits, labels, 1, where)
  check_hyperparameter("num_groups", num_groups, low=1)
  check_same_shape(labels=labels, groups=groups)
  if not jnp.issubdtype(dtype_of("groups", groups), jnp.integer):
    raise ValueError(f"groups must be integers, got dtype {jnp.result_type(groups)}.")
  groups, inside = counted_labels(as_array("groups", groups), num_groups)
  where &= inside
  zeros = jnp.zeros(num_groups, jnp.int32)
  count = zeros.at[groups].add(where.astype(jnp.int32))
  right = zeros.at[groups].add((hits & where).astype(jnp.int32))
  accuracy = right.astype(metric_dtype(as_array("logits", logits))) / jnp.maximum(count, 1)
  worst = jnp.min(accuracy, where=count > 0, initial=jnp.inf)
  return jnp.where(jnp.any(count > 0), worst, jnp.nan)


def worst_classes_accuracy(
  labels: ArrayLike,
  correct: ArrayLike,
  *,
  num_classes: int,
  fraction: ArrayLike = 0.3,
  where: ArrayLike | None = None,
) -> jax.Array:
  """The mean accuracy of the classes with the smallest accuracies; of attacked inputs, RA-Tail-30.

  Of the C classes that occur, `max(1, round(fraction * C))` count, each alike.

  >>> import jax.numpy as jnp
  >>> labels = jnp.array([0, 0, 1, 1, 2, 2])
  >>> correct = jnp.array([True, True, True, False, False, False])
  >>> [worst_classes_accuracy(labels, correct, num_classes=3, fraction=f).item() for f in (0.3, 0.7)]
  [0.0, 0.25]

  Args:
    labels: integers `[...]`; examples whose label is outside [0, num_classes) do not count.
    correct: boolean `[...]`, or integers of which 0 is wrong: whether the example is classified correctly.
    num_classes: static.
    fraction: of the classes, scalar in [0, 1]; may be traced.
    where: boolean `[...]`: the examples that count.

  Returns:
    Scalar in [0, 1], float32 (float64 where that is the default); NaN without examples.

  Raises:
    ValueError: when shapes or dtypes do not fit or a hyperparameter is out of range.

  Reference: Sow, Lin, Wang, Liang, "Doubly Robust Instance-Reweighted Adversarial Training", ICLR 2024, the metric
    RA-Tail-30.
  """
  num_classes = static_integer("num_classes", num_classes, low=1)
  check_hyperparameter("fraction", fraction, low=0, high=1, shape=())
  check_same_shape(labels=labels, correct=correct)
  if not jnp.issubdtype(dtype_of("labels", labels), jnp.integer):
    raise ValueError(f"labels must be integer class indices, got dtype {jnp.result_type(labels)}.")
  if jnp.issubdtype(dtype_of("correct", correct), jnp.inexact):
    raise ValueError(f"correct must be boolean or integer, got dtype {jnp.result_type(correct)}.")
  labels, counted = counted_labels(as_array("labels", labels), num_classes)
  counted &= example_mask(where, labels.shape)
  zeros = jnp.zeros(num_classes, jnp.int32)
  count = zeros.at[labels].add(counted.astype(jnp.int32))
  right = zeros.at[labels].add(((as_array("correct", correct) != 0) & counted).astype(jnp.int32))
  dtype = jnp.result_type(float)
  accuracy = right.astype(dtype) / jnp.maximum(count, 1)
  ascending = jnp.sort(jnp.where(count > 0, accuracy, jnp.inf))
  occurring = jnp.sum(count > 0)
  taken = jnp.maximum(jnp.round(jnp.asarray(fraction, dtype) * occurring), 1)
  mean = jnp.mean(ascending, where=jnp.arange(num_classes) < taken)
  return jnp.where((occurring > 0) & ~jnp.isnan(taken), mean, jnp.nan)


def area_under_roc(scores: ArrayLike, positives: ArrayLike, *, where: ArrayLike | None = None) -> jax.Array:
  """AUROC: the probability that a positive example scores above a negative one, ties counting half.

  >>> import jax.numpy as jnp
  >>> area_under_roc(jnp.array([0.9, 0.5, 0.5, 0.1]), jnp.array([True, True, False, False])).item()
  0.875

  Args:
    scores: floating `[examples]`, larger for positives; infinities are allowed.
    positives: boolean `[examples]`, or integers of which 0 is negative.
    where: boolean `[examples]`: the examples that count.

  Returns:
    Scalar in [0, 1], of the scores' dtype, float32 at least; NaN without a positive or a negative, or when a
    score is NaN.

  Raises:
    ValueError: when an argument has the wrong dtype, rank or shape.

  Reference: Hanley, McNeil, "The Meaning and Use of the Area under a Receiver Operating Characteristic (ROC) Curve",
    Radiology 1982, the Wilcoxon statistic.
  """
  check_float("scores", scores)
  if jnp.ndim(scores) != 1:
    raise ValueError(f"scores must have one axis, got shape {jnp.shape(scores)}; use vmap for more.")
  check_same_shape(scores=scores, positives=positives)
  if jnp.issubdtype(jnp.result_type(positives), jnp.inexact):
    raise ValueError(f"positives must be boolean or integer, got dtype {jnp.result_type(positives)}.")
  where = example_mask(where, jnp.shape(positives))
  scores, positives = jnp.asarray(scores), jnp.asarray(positives)
  dtype = metric_dtype(scores)
  scores, positives = jnp.asarray(scores), jnp.asarray(positives)
  positive, negative = (positives != 0) & where, (positives == 0) & where
  order = jnp.argsort(scores)
  ranked = scores[order]
  # negatives_before[i]: how many negatives are among the i smallest scores, in exact integers.
  negatives_before = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(negative[order].astype(jnp.int32))])
  below = negatives_before[jnp.searchsorted(ranked, scores, side="left")]
  not_above = negatives_before[jnp.searchsorted(ranked, scores, side="right")]
  wins = (below.astype(dtype) + not_above.astype(dtype)) / 2
  area = jnp.mean(wins / jnp.sum(negative), where=positive)
  return jnp.where(jnp.any(jnp.isnan(scores) & where), jnp.nan, area)


def memorization_fractions(
  logits: ArrayLike, labels: ArrayLike, true_labels: ArrayLike, *, where: ArrayLike | None = None
) -> MemorizationFractions:
  """How the examples with a wrong label are predicted: correctly, as the wrong label says (memorized), or otherwise.

  Examples with a NaN logit are predicted as no class, thus otherwise.

  >>> import jax.numpy as jnp
  >>> logits, labels, true_labels = jnp.eye(3), jnp.array([0, 1, 2]), jnp.array([1, 1, 0])
  >>> memorized = memorization_fractions(logits, labels, true_labels)
  >>> memorized.correct.item(), memorized.memorized.item(), memorized.other.item()
  (0.0, 1.0, 0.0)

  Args:
    logits: floating `[..., classes]`, or probabilities.
    labels: integers `[...]`: the given, partly wrong labels.
    true_labels: integers `[...]`.
    where: boolean, of the labels' shape: the examples that count.

  Returns:
    `MemorizationFractions`, of the logits' dtype, float32 at least; NaN when no example is mislabelled.

  Raises:
    ValueError: when shapes or dtypes do not fit.

  Reference: Liu, Niles-Weed, Razavian, Fernandez-Granda, "Early-Learning Regularization Prevents Memorization of Noisy
    Labels", NeurIPS 2020, Figure 1.
  """
  check_integer_labels(logits, labels)
  check_same_shape(labels=labels, true_labels=true_labels)
  if not jnp.issubdtype(dtype_of("true_labels", true_labels), jnp.integer):
    raise ValueError(f"true_labels must be integer class indices, got dtype {jnp.result_type(true_labels)}.")
  classes = jnp.shape(logits)[-1]
  labels, counted = counted_labels(as_array("labels", labels), classes)
  true_labels, known = counted_labels(as_array("true_labels", true_labels), classes)
  wrong = (labels != true_labels) & counted & known & example_mask(where, jnp.shape(labels))
  predicted = predicted_classes(logits)
  correct, memorized = predicted == true_labels, predicted == labels
  outcomes = (correct, memorized, ~correct & ~memorized)
  return MemorizationFractions(*(_share(outcome, wrong, metric_dtype(logits)) for outcome in outcomes))


def predicted_classes(logits: jax.Array) -> jax.Array:
  """The class of the largest logit, the first of equal ones, and -1, which is no class, where a logit is NaN."""
  return jnp.where(jnp.any(jnp.isnan(logits), axis=-1), -1, jnp.argmax(logits, axis=-1))


def _hits(logits, labels, k, where):
  """Whether each label is in the top k, and the mask of examples."""
  logits, labels = as_array("logits", logits), as_array("labels", labels)
  check_integer_labels(logits, labels)
  check_hyperparameter("k", k, low=1, high=logits.shape[-1], shape=())
  labels, counted = counted_labels(labels, logits.shape[-1])
  label = jnp.expand_dims(labels, -1)
  own = jnp.take_along_axis(logits, label, axis=-1)
  classes = jnp.arange(logits.shape[-1])
  # Negated, so that a NaN logit counts as ahead and a diverged network scores nothing.
  ahead = ~(logits <= own) | ((logits == own) & (classes < label))
  return jnp.sum(ahead, axis=-1) < k, counted & example_mask(where, jnp.shape(labels))


def _share(outcome, where, dtype):
  return jnp.mean(outcome.astype(dtype), where=where)


def metric_dtype(array):
  """The dtype of a metric: the array's, float32 at least."""
  return jnp.promote_types(array.dtype, jnp.float32)
