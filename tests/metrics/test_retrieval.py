"""Retrieval metrics: loops over queries, golden vectors, masks, blocks, large sets."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxreg.metrics import retrieval
from tests.conformance import CLASSES, EXAMPLES, row

pytestmark = pytest.mark.usefixtures("x64")
METRICS = {
  "recall at 1": retrieval.recall_at_k,
  "recall at 4": functools.partial(retrieval.recall_at_k, k=4),
  "R-precision": retrieval.r_precision,
  "MAP@R": retrieval.mean_average_precision_at_r,
}
every_metric = pytest.mark.parametrize("name", METRICS)


@pytest.fixture
def batch():
  rng = np.random.default_rng(0)
  labels = np.r_[rng.integers(0, 6, 37), 6]  # the last is alone
  return rng.normal(size=(7, 4))[labels] + 0.9 * rng.normal(size=(38, 4)), labels


def loop(name, embeddings, labels):
  z = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
  found = []
  for i in range(len(z)):
    others = [j for j in range(len(z)) if j != i]
    relevant = [labels[j] == labels[i] for j in sorted(others, key=lambda j, i=i: -z[i] @ z[j])]
    count = sum(relevant)
    if count and name.startswith("recall"):
      found.append(any(relevant[: int(name[-1])]))
    elif count and name == "R-precision":
      found.append(sum(relevant[:count]) / count)
    elif count:
      found.append(sum(sum(relevant[: k + 1]) / (k + 1) for k in range(count) if relevant[k]) / count)
  return np.mean(found)


@every_metric
@pytest.mark.parametrize("block_size", [512, 5, 38])
def test_equals_the_loop_over_queries(name, block_size, batch):
  np.testing.assert_allclose(METRICS[name](*batch, block_size=block_size), loop(name, *batch), rtol=1e-12)


@pytest.mark.parametrize("name", ["R-precision", "MAP@R"])
def test_a_bound_on_the_relevant_changes_nothing(name, batch):
  bound = np.bincount(batch[1]).max() - 1
  np.testing.assert_allclose(METRICS[name](*batch, max_relevant=int(bound)), METRICS[name](*batch), rtol=1e-12)


@every_metric
def test_masks_rotations_and_names_of_classes(name, batch):
  embeddings, labels = batch
  metric, expected = METRICS[name], METRICS[name](*batch)
  rotation = np.linalg.qr(np.random.default_rng(1).normal(size=(4, 4)))[0]
  np.testing.assert_allclose(metric(3 * embeddings @ rotation, (labels * 3 + 1).astype(np.uint8)), expected, rtol=1e-12)
  more = np.r_[embeddings, np.full((5, 4), np.nan)]
  np.testing.assert_allclose(metric(more, np.r_[labels, -1, -7, -1, -1, -1]), expected, rtol=1e-12)
  where = np.arange(43) < 38
  np.testing.assert_allclose(metric(more, np.r_[labels, 0, 0, 0, 0, 0], where=where), expected, rtol=1e-12)


@every_metric
def test_equal_embeddings_retrieve_nothing(name):
  assert METRICS[name](np.ones((20, 3)), np.arange(20) // 2) == 0


@every_metric
def test_no_query_and_nan(name):
  assert np.isnan(METRICS[name](np.eye(3), np.arange(3)))
  assert np.isnan(METRICS[name](np.full((3, 3), np.nan), np.zeros(3, int)))


def test_large_sets_fit_into_memory():
  """60,000 embeddings: the compiled program needs a block of similarities, not the whole matrix."""
  size = 60_000
  shapes = jax.ShapeDtypeStruct((size, 16), jnp.float32), jax.ShapeDtypeStruct((size,), jnp.int32)
  thresholds = jnp.linspace(0.5, 1.0, 101, dtype=jnp.float32)
  for metric in (
    retrieval.recall_at_k,
    functools.partial(retrieval.mean_average_precision_at_r, max_relevant=50),
    lambda e, y: retrieval.utility_curves(e, y, thresholds, num_classes=100),
    lambda e, y: retrieval.calibration_range(e, y, num_pairs=5_000_000, key=jax.random.key(0)),
  ):
    memory = jax.jit(metric).lower(*shapes).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 2e9 < 4 * size**2


@pytest.mark.golden
def test_golden_opis_tcm(golden):
  for case, arrays, _ in golden("43-tcm").cases("opis"):
    names, labels = np.unique(arrays["labels"], return_inverse=True)
    inputs, options = (arrays["embeddings"], labels), dict(num_classes=len(names))
    rates = arrays["far_lo"], arrays["far_hi"]
    close = functools.partial(np.testing.assert_allclose, rtol=1e-10, atol=1e-10, err_msg=case)
    close(retrieval.calibration_range(*inputs, false_accept_rates=rates), [arrays["d_min"], arrays["d_max"]])
    curves = retrieval.utility_curves(*inputs, arrays["grid"], **options)
    close(curves.sensitivity, arrays["out_sensitivity"])
    close(curves.specificity, arrays["out_specificity"])
    close(curves.utility, arrays["out_utility"])
    close(curves.utility.var(axis=0).mean(), arrays["out_opis_mean"])
    close(retrieval.opis(*inputs, thresholds=arrays["grid"], **options), arrays["out_opis_trapezoid"])
    options |= dict(false_accept_rates=rates, num_thresholds=len(arrays["grid"]))
    close(retrieval.opis(*inputs, **options), arrays["out_opis_trapezoid"])
    epsilon = retrieval.epsilon_opis(*inputs, epsilon=arrays["eps"], **options)
    close(epsilon, arrays["out_eps_opis_trapezoid"])


@pytest.mark.golden
def test_golden_utilization_metrix(golden):
  for case, arrays, _ in golden("48-metrix").cases("util"):
    both = np.concatenate([arrays["train"], arrays["mixed"]])
    found = retrieval.utilization(arrays["test"], arrays["train"]), retrieval.utilization(arrays["test"], both)
    expected = arrays["out_u"], arrays["out_u_with_mixed"]
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-9, err_msg=case)


def test_calibration_range_is_quantiles_of_negative_distances(batch):
  embeddings, labels = batch
  z = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
  distances = [np.linalg.norm(z[i] - z[j]) for i in range(38) for j in range(i) if labels[i] != labels[j]]
  expected = np.quantile(distances, [0.01, 0.1])
  np.testing.assert_allclose(retrieval.calibration_range(*batch), expected, rtol=1e-9)
  found = retrieval.calibration_range(*batch, num_pairs=200_000, key=jax.random.key(0))
  np.testing.assert_allclose(found, expected, rtol=0.05)
  masked = retrieval.calibration_range(np.r_[embeddings, embeddings], np.r_[labels, np.full(38, -1)])
  np.testing.assert_allclose(masked, expected, rtol=1e-9)


def test_opis_of_classes_with_equal_curves_is_zero():
  """Rotated copies on orthogonal blocks; all negative distances are sqrt 2, so the range of thresholds is a point."""
  block = np.array([[1.0, 0.2], [1.0, -0.3], [1.0, 0.5]])
  embeddings = np.kron(np.eye(4), block)
  labels = np.repeat(np.arange(4), 3)
  options = dict(num_classes=4)
  for thresholds in (np.linspace(0.1, 1.0, 11), np.full(3, 0.4)):
    np.testing.assert_allclose(retrieval.opis(embeddings, labels, thresholds=thresholds, **options), 0, atol=1e-15)
  low, high = retrieval.calibration_range(embeddings, labels)
  np.testing.assert_allclose([low, high], np.sqrt(2), rtol=1e-12)
  assert np.isfinite(retrieval.opis(embeddings, labels, **options))


def test_range_that_is_a_point_gives_the_variance_there(batch):
  at = np.full(3, 0.9)
  curves = retrieval.utility_curves(*batch, at, num_classes=6)
  np.testing.assert_allclose(
    retrieval.opis(*batch, num_classes=6, thresholds=at), curves.utility[curves.counted, 0].var(), rtol=1e-12
  )


def test_opis_bounds_rotations_blocks_and_absent_classes(batch):
  embeddings, labels = batch
  expected = retrieval.opis(*batch, num_classes=7)
  assert 0 < expected <= 0.25
  rotation = np.linalg.qr(np.random.default_rng(1).normal(size=(4, 4)))[0]
  renamed = np.array([4, 2, 6, 0, 9, 1, 3])[labels]
  np.testing.assert_allclose(retrieval.opis(embeddings @ rotation, renamed, num_classes=11), expected, rtol=1e-9)
  np.testing.assert_allclose(retrieval.opis(*batch, num_classes=7, block_size=7), expected, rtol=1e-12)
  curves = retrieval.utility_curves(*batch, np.array([0.5, 1.0]), num_classes=8)
  assert curves.counted.tolist() == (np.bincount(labels, minlength=8) > 1).tolist()
  assert not curves.utility[~curves.counted].any()


def test_identical_points_have_distance_zero():
  embeddings = np.full((6, 3), 0.1, np.float32)
  curves = retrieval.utility_curves(embeddings, np.array([0, 0, 0, 1, 1, 1]), np.array([1e-3, 1.0]), num_classes=2)
  assert curves.sensitivity.min() == 1 and curves.specificity.max() == 0 and curves.utility.max() == 0


def test_utilization(batch):
  embeddings, _ = batch
  queries = np.random.default_rng(3).normal(size=(11, 4))
  unit = lambda x: x / np.linalg.norm(x, axis=1, keepdims=True)
  np.testing.assert_allclose(retrieval.utilization(embeddings, embeddings), 0, atol=1e-14)
  u = retrieval.utilization(queries, embeddings)
  np.testing.assert_allclose(u, np.mean(2 - 2 * (unit(queries) @ unit(embeddings).T).max(1)), rtol=1e-12)
  np.testing.assert_allclose(retrieval.utilization(queries, embeddings, block_size=3), u, rtol=1e-12)
  more = np.r_[embeddings, np.random.default_rng(4).normal(size=(20, 4))]
  assert retrieval.utilization(queries, more) <= u
  spoiled = np.where(np.arange(58)[:, None] < 38, more, np.nan)
  np.testing.assert_allclose(retrieval.utilization(queries, spoiled, where=np.arange(58) < 38), u, rtol=1e-12)


def test_bad_input(batch):
  with pytest.raises(ValueError, match="key must be given"):
    retrieval.calibration_range(*batch, num_pairs=10)
  with pytest.raises(ValueError, match="false_accept_rates must lie in"):
    retrieval.calibration_range(*batch, false_accept_rates=(0.1, 1.2))
  with pytest.raises(ValueError, match="k must lie in"):
    retrieval.recall_at_k(*batch, k=0)
  with pytest.raises(ValueError, match="where must be boolean"):
    retrieval.recall_at_k(*batch, where=np.ones(38))
  with pytest.raises(ValueError, match="block_size must be positive"):
    retrieval.recall_at_k(*batch, block_size=0)
  with pytest.raises(ValueError, match="queries and examples must be"):
    retrieval.utilization(np.ones((2, 3)), np.ones((2, 4)))


def _draw(rng):
  labels = np.resize(np.arange(CLASSES), EXAMPLES).astype(np.int32)
  return rng.normal(size=(CLASSES, 6))[labels] + rng.normal(size=(EXAMPLES, 6)), labels


BAD = (
  ("labels", lambda e, y, *rest: (e, y[1:], *rest)),
  ("labels", lambda e, y, *rest: (e, y * 1.0, *rest)),
  ("embeddings", lambda e, y, *rest: (e[0], y, *rest)),
  ("embeddings", lambda e, y, *rest: (e.astype(np.int32), y, *rest)),
)


def retrieval_row(function, *, arguments=_draw, bad=BAD, **options):
  return row(
    function, arguments, bad=bad, examples="reduced", differentiable=False, wide=True, options=options
  )  # fmt: skip


def _draw_with_thresholds(rng):
  return *_draw(rng), np.array([0.5, 0.9, 1.3])


ROWS = [
  retrieval_row(retrieval.recall_at_k, k=(1, 3)),
  retrieval_row(retrieval.recall_at_k, block_size=5),
  retrieval_row(retrieval.r_precision),
  retrieval_row(retrieval.mean_average_precision_at_r),
  retrieval_row(retrieval.calibration_range),
  row(
    retrieval.utility_curves,
    _draw_with_thresholds,
    bad=(*BAD, ("thresholds", lambda e, y, t: (e, y, t[None])), ("thresholds", lambda e, y, t: (e, y, np.arange(3)))),
    differentiable=False,
    wide=True,
    options=dict(num_classes=CLASSES),
  ),
  retrieval_row(retrieval.opis, num_classes=CLASSES),
  retrieval_row(retrieval.epsilon_opis, num_classes=CLASSES, epsilon=(0.1, 0.6)),
  row(
    retrieval.utilization,
    lambda rng: (rng.normal(size=(EXAMPLES, 6)), rng.normal(size=(EXAMPLES, 6))),
    bad=(
      ("queries", lambda q, e: (q.astype(np.int32), e)),
      ("examples", lambda q, e: (q, e[:, 1:])),
      ("examples", lambda q, e: (q, e.astype(np.int32))),
    ),
    examples="reduced",
    differentiable=False,
    wide=True,
  ),
]

EXEMPT = {"UtilityCurves": "the result of utility_curves"}
