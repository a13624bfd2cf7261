"""Classification metrics against scikit-learn, `lax.top_k` and counting."""

import functools
import json

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies
from hypothesis.extra import numpy as arrays
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from sklearn import metrics as sklearn_metrics

from jaxreg.metrics import classification
from jaxreg.metrics.classification import (
  area_under_roc,
  balanced_top_k_accuracy,
  memorization_fractions,
  top_k_accuracy,
)
from tests.conformance import CLASSES, EXAMPLES, draw_classification, draw_logits, metric_row, unchanged

RNG = np.random.default_rng(0)
LOGITS = RNG.integers(-2, 3, (64, 5)).astype(np.float32)  # few values, hence many ties
LABELS = RNG.integers(0, 4, 64)  # class 4 does not occur
top_k, balanced, auroc = jax.jit(top_k_accuracy), jax.jit(balanced_top_k_accuracy), jax.jit(area_under_roc)


@pytest.mark.parametrize("k", range(1, 6))
def test_top_k_agrees_with_lax_top_k(k):
  hits = np.any(jax.lax.top_k(LOGITS, k)[1] == LABELS[:, None], axis=-1)
  np.testing.assert_allclose(top_k(LOGITS, LABELS, k=k), hits.mean(), rtol=1e-6)
  by_class = [hits[LABELS == y].mean() for y in np.unique(LABELS)]
  np.testing.assert_allclose(balanced(LOGITS, LABELS, k=k), np.mean(by_class), rtol=1e-6)


def test_top_one_agrees_with_scikit_learn():
  predicted = LOGITS.argmax(-1)
  np.testing.assert_allclose(top_k(LOGITS, LABELS), sklearn_metrics.accuracy_score(LABELS, predicted), rtol=1e-6)
  # scikit-learn, too, leaves out classes that no label has.
  present = LOGITS[:, :4]
  expected = sklearn_metrics.balanced_accuracy_score(LABELS, present.argmax(-1))
  np.testing.assert_allclose(balanced(present, LABELS), expected, rtol=1e-6)


def test_nan_logits_score_nothing():
  logits = jnp.array([[jnp.nan] * 3, [5.0, jnp.nan, 0.0], [5.0, 1.0, 0.0]])
  assert top_k(logits, jnp.zeros(3, jnp.int32)) == pytest.approx(1 / 3)
  assert top_k(jnp.full((2, 3), jnp.nan), jnp.zeros(2, jnp.int32), k=3) == 0


def test_masked_examples_do_not_count():
  where = np.arange(64) < 40
  for metric in (top_k, balanced):
    np.testing.assert_allclose(metric(LOGITS, LABELS, where=where), metric(LOGITS[:40], LABELS[:40]), rtol=1e-6)
  scores, positives = LOGITS[:, 0], LABELS == 0
  np.testing.assert_allclose(auroc(scores, positives, where=where), auroc(scores[:40], positives[:40]), rtol=1e-6)
  poisoned = jnp.where(where, scores, jnp.nan)  # padding may hold anything
  np.testing.assert_allclose(auroc(poisoned, positives, where=where), auroc(scores[:40], positives[:40]), rtol=1e-6)


def test_leading_axes_are_all_examples():
  np.testing.assert_allclose(top_k(LOGITS.reshape(4, 16, 5), LABELS.reshape(4, 16)), top_k(LOGITS, LABELS), rtol=1e-6)
  np.testing.assert_allclose(
    balanced(LOGITS.reshape(4, 16, 5), LABELS.reshape(4, 16)), balanced(LOGITS, LABELS), rtol=1e-6
  )


@hypothesis.settings(max_examples=30, deadline=None)
@hypothesis.given(
  scores=arrays.arrays(
    np.float32,
    (12,),
    elements=strategies.sampled_from([-np.inf, -1e30, -1.0, -1e-30, -0.0, 0.0, 1.0, 1.0000001, 1e30, np.inf]),
  ),
  positives=arrays.arrays(np.bool_, (12,)),
)
def test_area_under_roc_counts_pairs(scores, positives):
  value = auroc(scores, positives)
  if positives.all() or not positives.any():
    assert np.isnan(value)
    return
  up, down = scores[positives][:, None], scores[~positives][None]
  np.testing.assert_allclose(value, np.mean((up > down) + 0.5 * (up == down)), rtol=1e-6)
  np.testing.assert_allclose(auroc(-scores, positives), 1 - value, atol=1e-6)
  np.testing.assert_allclose(auroc(scores, positives.astype(np.int32)), value)


def test_area_under_roc_agrees_with_scikit_learn():
  scores = RNG.integers(0, 40, 500).astype(np.float32)
  positives = RNG.random(500) < 0.3
  np.testing.assert_allclose(auroc(scores, positives), sklearn_metrics.roc_auc_score(positives, scores), rtol=1e-6)


def test_area_under_roc_of_a_nan_score_is_nan():
  assert np.isnan(auroc(jnp.array([0.0, jnp.nan, 1.0]), jnp.array([False, True, True])))


def test_area_under_roc_stays_exact_on_many_examples():
  """Sums of ranks leave float32's integers at a few thousand examples; counts do not."""
  n = 200_000
  scores, positives = np.arange(n, dtype=np.float32), np.arange(n) % 2 == 1
  np.testing.assert_allclose(auroc(scores, positives), 0.5 + 1 / n, rtol=1e-6)


def test_memorization_fractions():
  logits = jnp.eye(4)[jnp.array([0, 1, 2, 3, 0, 1])]  # predictions 0 1 2 3 0 1
  labels = jnp.array([0, 1, 0, 1, 0, 2])
  true_labels = jnp.array([0, 0, 2, 0, 3, 0])
  fractions = jax.jit(memorization_fractions)(logits, labels, true_labels)
  # Mislabelled: 1 memorized, 2 correct, 3 other, 4 memorized, 5 other.
  np.testing.assert_allclose(fractions, (0.2, 0.4, 0.4), rtol=1e-6)
  masked = memorization_fractions(logits, labels, true_labels, where=jnp.arange(6) < 3)
  np.testing.assert_allclose(masked, (0.5, 0.5, 0.0), rtol=1e-6)
  assert all(np.isnan(share) for share in memorization_fractions(logits, labels, labels))


def test_traced_k_vmap_and_devices():
  ks = jnp.arange(1, 6)
  alone = [top_k(LOGITS, LABELS, k=k) for k in ks]
  np.testing.assert_allclose(jax.vmap(lambda k: top_k_accuracy(LOGITS, LABELS, k=k))(ks), alone, rtol=1e-6)
  sharding = NamedSharding(jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,)), PartitionSpec("data"))
  logits, labels = jax.device_put((LOGITS, LABELS), sharding)
  np.testing.assert_allclose(top_k(logits, labels), top_k(LOGITS, LABELS), rtol=1e-6)
  np.testing.assert_allclose(balanced(logits, labels), balanced(LOGITS, LABELS), rtol=1e-6)
  np.testing.assert_allclose(auroc(logits[:, 0], labels == 0), auroc(LOGITS[:, 0], LABELS == 0), rtol=1e-6)
  per_device = jax.pmap(area_under_roc)(LOGITS[:, 0].reshape(8, 8), LABELS.reshape(8, 8) < 2)
  looped = [auroc(s, p) for s, p in zip(LOGITS[:, 0].reshape(8, 8), LABELS.reshape(8, 8) < 2)]
  np.testing.assert_allclose(per_device, looped, rtol=1e-6)


def test_dtypes():
  assert top_k(LOGITS.astype(jnp.bfloat16), LABELS).dtype == jnp.float32
  assert auroc(LOGITS[:, 0].astype(jnp.bfloat16), LABELS == 0).dtype == jnp.float32


def test_dtypes_in_float64(x64):
  assert top_k_accuracy(LOGITS.astype(np.float64), LABELS).dtype == jnp.float64
  assert area_under_roc(LOGITS[:, 0].astype(np.float64), LABELS == 0).dtype == jnp.float64


@pytest.mark.parametrize(
  "call, message",
  [
    (lambda: top_k_accuracy(LOGITS, LABELS[:, None]), "labels must have the shape"),
    (lambda: top_k_accuracy(LOGITS, LABELS, k=6), "k must lie in"),
    (lambda: balanced_top_k_accuracy(LOGITS, LABELS, k=0), "k must lie in"),
    (lambda: top_k_accuracy(LOGITS, LABELS, where=np.ones((64, 1), bool)), "where must be boolean, one per label"),
    (lambda: area_under_roc(LOGITS, LOGITS > 0), "one axis"),
    (lambda: area_under_roc(LOGITS[:, 0], LABELS[:5] > 0), "equal shapes"),
    (lambda: area_under_roc(LOGITS[:, 0], LOGITS[:, 1]), "boolean or integer"),
    (lambda: area_under_roc(LABELS, LABELS > 0), "scores must be floating"),
    (lambda: memorization_fractions(LOGITS, LABELS, LABELS[:5]), "equal shapes"),
    (lambda: memorization_fractions(LOGITS, LABELS, LOGITS[:, 0]), "true_labels must be integer"),
  ],
)
def test_bad_input_is_refused(call, message):
  with pytest.raises(ValueError, match=message):
    call()


def test_worst_group_accuracy():
  rng = np.random.default_rng(0)
  logits, labels, groups = rng.normal(size=(40, 3)), rng.integers(0, 3, 40), rng.integers(-1, 4, 40)
  where = rng.uniform(size=40) < 0.8
  right = logits.argmax(1) == labels
  of_groups = [right[(groups == g) & where].mean() for g in range(4)]
  found = classification.worst_group_accuracy(logits, labels, groups, num_groups=6, where=where)
  np.testing.assert_allclose(found, min(of_groups), rtol=1e-6)
  assert np.isnan(classification.worst_group_accuracy(logits, labels, groups - 9, num_groups=6))
  with pytest.raises(ValueError, match="groups must be integers"):
    classification.worst_group_accuracy(logits, labels, groups * 1.0, num_groups=4)


@pytest.mark.golden
def test_golden_doubly_robust_at_worst_classes(golden, x64):
  names = []
  for name, case, _ in golden("22-doubly_robust_at").cases():
    names.append(name)
    labels, correct = case["tail_labels"], case["tail_correct"]
    classes, fraction = len(case["tail_out_per_class"]), json.loads(str(case["hp"]))["tail_fraction"]
    found = classification.worst_classes_accuracy(labels, correct, num_classes=classes, fraction=fraction)
    np.testing.assert_allclose(found, case["tail_out_ra_tail30"], rtol=1e-8, err_msg=name)
    for label, expected in enumerate(case["tail_out_per_class"]):
      own = classification.worst_classes_accuracy(labels, correct, num_classes=classes, where=labels == label)
      np.testing.assert_allclose(own, expected, rtol=1e-8, err_msg=name)
  assert names


@pytest.mark.parametrize("fraction", [0.0, 0.3, 0.5, 1.0])
def test_worst_classes_accuracy(fraction):
  rng = np.random.default_rng(0)
  labels, correct, where = rng.integers(-1, 9, 200), rng.uniform(size=200) < 0.6, rng.uniform(size=200) < 0.8
  where &= labels != 4  # a class that does not occur
  accuracies = sorted(correct[(labels == label) & where].mean() for label in range(7) if label != 4)
  expected = np.mean(accuracies[: max(1, round(fraction * 6))])
  call = functools.partial(classification.worst_classes_accuracy, num_classes=7, fraction=fraction, where=where)
  np.testing.assert_allclose(call(labels, correct), expected, rtol=1e-6)
  np.testing.assert_allclose(call(labels, 3 * correct), expected, rtol=1e-6)
  assert np.isnan(call(labels + 50, correct))
  for arguments, message in (
    ((labels, correct * 1.0), "correct must be boolean or integer"),
    ((labels * 1.0, correct), "labels must be integer"),
    ((labels, correct[:5]), "equal shapes"),
  ):
    with pytest.raises(ValueError, match=message):
      call(*arguments)


ROWS = [
  metric_row(
    classification.worst_classes_accuracy,
    arguments=lambda rng: (np.resize(np.arange(4, dtype=np.int32), EXAMPLES), rng.uniform(size=EXAMPLES) < 0.5),
    bad=(
      ("labels", lambda labels, correct: (labels * 1.0, correct)),
      ("correct", lambda labels, correct: (labels, correct * 1.0)),
      ("shapes", lambda labels, correct: (labels, correct[1:])),
    ),
    num_classes=4,
    fraction=(0.1, 0.9),
  )._replace(extreme=unchanged),
  metric_row(
    classification.worst_group_accuracy,
    arguments=lambda rng: (*draw_classification(rng), np.resize(np.arange(3, dtype=np.int32), EXAMPLES)),
    num_groups=3,
  ),
  metric_row(classification.top_k_accuracy, k=(1, CLASSES)),
  metric_row(classification.balanced_top_k_accuracy, k=(1, CLASSES)),
  metric_row(
    classification.area_under_roc,
    # Any of the examples' scores will do, and both classes occur.
    arguments=lambda rng: (draw_logits(rng)[:, 0], np.resize(np.array([1, 0, 0], np.int32), EXAMPLES)),
    bad=(("scores", lambda s, p: (s.astype(np.int32), p)), ("positives", lambda s, p: (s, p[1:]))),
  ),
  metric_row(
    classification.memorization_fractions,
    arguments=lambda rng: (*draw_classification(rng), np.resize(np.arange(CLASSES, dtype=np.int32), EXAMPLES)),
  ),
]


EXEMPT = {
  "MemorizationFractions": "result of memorization_fractions",
}
