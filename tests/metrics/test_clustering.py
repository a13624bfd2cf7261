"""Clustering metrics against scikit-learn, SciPy's assignment and the official numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import optimize
from sklearn import metrics as sklearn_metrics

from jaxreg.metrics.clustering import (
  adjusted_rand_index,
  cluster_accuracy,
  normalized_mutual_information,
  split_cluster_accuracy,
)
from tests.conformance import CLASSES, EXAMPLES, row

RNG = np.random.default_rng(0)
LABELS = RNG.integers(0, 5, 80)
CLUSTERS = np.where(RNG.random(80) < 0.6, (LABELS + 2) % 5, RNG.integers(0, 5, 80))
METRICS = (cluster_accuracy, normalized_mutual_information, adjusted_rand_index)


@pytest.mark.golden
def test_golden_class_relation_kd_metrics(golden, x64):
  names = []
  file = golden("35-class_relation_kd")
  file.meta.pop("cases")
  order = [{"seen": "known"}.get(name, name) for name in file.meta["order_out_v"].split(", ")]
  for name, arrays, _ in file.cases("metric"):
    names.append(name)
    close = lambda got, want, name=name: np.testing.assert_allclose(got, want, rtol=1e-10, err_msg=name)
    true, predicted = arrays["y_true"], arrays["y_pred"]
    classes = int(max(true.max(), predicted.max())) + 1
    for joint, version in ((False, "v1"), (True, "v2")):
      options = dict(num_known=int(arrays["num_seen"]), num_classes=classes, joint=joint)
      split = split_cluster_accuracy(predicted, true, **options)
      close([getattr(split, part) for part in order], arrays[f"out_{version}"])
    true, predicted = arrays["y_novel"], arrays["pred_novel"]
    shift = min(true.min(), predicted.min())
    true, predicted = true - shift, predicted - shift
    classes = int(max(true.max(), predicted.max())) + 1
    for metric, short in zip(METRICS, ("cluster_acc", "nmi", "ari")):
      close(metric(predicted, true, num_classes=classes), arrays[f"out_{short}_novel"])
  assert names


def test_accuracy_agrees_with_scipy():
  for seed in range(5):
    rng = np.random.default_rng(seed)
    clusters, labels = rng.integers(0, 6, (2, 40))
    table = np.zeros((6, 6), int)
    np.add.at(table, (clusters, labels), 1)
    expected = table[optimize.linear_sum_assignment(-table)].sum() / 40
    np.testing.assert_allclose(cluster_accuracy(clusters, labels, num_classes=6), expected, rtol=1e-6)


@pytest.mark.parametrize(
  ("metric", "reference"),
  [
    (normalized_mutual_information, sklearn_metrics.normalized_mutual_info_score),
    (adjusted_rand_index, sklearn_metrics.adjusted_rand_score),
  ],
)
def test_agreement_with_scikit_learn(metric, reference, x64):
  one, apart, rng = np.zeros(20, int), np.arange(20), np.random.default_rng(1)
  pairs = [(CLUSTERS, LABELS), (LABELS, LABELS), (one, one), (one, apart), (apart, apart), (apart, apart[::-1])]
  pairs += [tuple(rng.integers(0, 3, (2, 20))) for _ in range(3)]
  for clusters, labels in pairs:
    value = metric(clusters, labels, num_classes=20)
    np.testing.assert_allclose(value, reference(labels, clusters), rtol=1e-9, atol=1e-12)


def test_names_of_clusters_do_not_matter():
  renamed = np.array([3, 0, 4, 1, 2])[CLUSTERS]
  for metric in METRICS:
    expected = metric(CLUSTERS, LABELS, num_classes=5)
    np.testing.assert_allclose(metric(renamed, LABELS, num_classes=5), expected, rtol=1e-6)
    np.testing.assert_allclose(metric(CLUSTERS, LABELS, num_classes=9), expected, rtol=1e-6)
  assert cluster_accuracy((LABELS + 1) % 5, LABELS, num_classes=5) == 1


def test_split_accuracy_by_hand():
  labels, clusters = np.array([0, 0, 1, 1, 2, 2, 3, 3]), np.array([0, 1, 1, 1, 3, 3, 2, 0])
  joint = split_cluster_accuracy(clusters, labels, num_known=2, num_classes=4)
  np.testing.assert_allclose(joint, [6 / 8, 3 / 4, 3 / 4])
  # A model that swaps the known classes is forgiven by one protocol only.
  swapped = np.array([1, 0, 2, 3])[clusters]
  np.testing.assert_allclose(split_cluster_accuracy(swapped, labels, num_known=2, num_classes=4), joint)
  apart = split_cluster_accuracy(swapped, labels, num_known=2, num_classes=4, joint=False)
  np.testing.assert_allclose(apart, [(1 + 3) / 8, 1 / 4, 3 / 4])


@pytest.mark.parametrize("metric", METRICS, ids=lambda metric: metric.__name__)
def test_examples_that_do_not_count(metric):
  where = RNG.random(80) < 0.5
  expected = metric(CLUSTERS[where], LABELS[where], num_classes=5)
  np.testing.assert_allclose(metric(CLUSTERS, LABELS, num_classes=5, where=where), expected, rtol=1e-6)
  outside = np.where(where, LABELS, -100).reshape(8, 10)
  np.testing.assert_allclose(metric(CLUSTERS.reshape(8, 10), outside, num_classes=5), expected, rtol=1e-6)
  several = jax.jit(jax.vmap(lambda c: metric(c, LABELS, num_classes=5)))(jnp.stack([CLUSTERS, LABELS]))
  np.testing.assert_allclose(several, [metric(CLUSTERS, LABELS, num_classes=5), 1], rtol=1e-6)


def test_bad_input():
  with pytest.raises(ValueError, match="num_classes must be a positive integer"):
    cluster_accuracy(CLUSTERS, LABELS, num_classes=0)
  with pytest.raises(ValueError, match="clusters must be integers"):
    cluster_accuracy(CLUSTERS * 1.0, LABELS, num_classes=5)
  with pytest.raises(ValueError, match="num_known must be an integer in"):
    split_cluster_accuracy(CLUSTERS, LABELS, num_known=5, num_classes=5)


def _row(function, **options):
  return row(
    function,
    lambda rng: tuple(rng.integers(0, CLASSES, (2, EXAMPLES)).astype(np.int32)),
    extreme=lambda clusters, labels: (clusters * 0, labels),
    bad=(
      ("shapes", lambda c, y: (c[1:], y)),
      ("labels", lambda c, y: (c, y.astype(np.float32))),
      ("clusters", lambda c, y: (c.astype(np.float32), y)),
    ),
    examples="reduced",
    differentiable=False,
    wide=True,
    options=dict(num_classes=CLASSES, **options),
  )


def test_narrow_integers():
  """More classes than an int8 holds, and a product of both counts that an int16 does not."""
  rng = np.random.default_rng(9)
  labels = rng.integers(0, 127, 300)
  clusters = rng.permutation(300)[labels]
  for metric in (cluster_accuracy, normalized_mutual_information, adjusted_rand_index):
    expected = metric(clusters, labels, num_classes=300)
    for clusters_dtype, labels_dtype in ((np.int16, np.int8), (np.uint16, np.uint8)):
      narrow = metric(clusters.astype(clusters_dtype), labels.astype(labels_dtype), num_classes=300)
      np.testing.assert_array_equal(narrow, expected)


ROWS = [*map(_row, METRICS), _row(split_cluster_accuracy, num_known=2)]


EXEMPT = {"SplitAccuracy": "result of split_cluster_accuracy"}
