"""Calibration metrics against loops over the definitions, scikit-learn, and the official numbers."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn import metrics as sklearn_metrics

from jaxreg.losses import brier_loss
from jaxreg.metrics import calibration
from jaxreg.metrics.calibration import (
  area_under_risk_coverage,
  brier_score,
  excess_area_under_risk_coverage,
  expected_calibration_error,
  negative_log_likelihood,
)
from tests.conformance import BAD_LABELS, draw_classification, draw_probabilities, metric_row, row

RNG = np.random.default_rng(0)
PROBABILITIES, LABELS = RNG.dirichlet(np.ones(4), 57), RNG.integers(0, 4, 57)
OF_PROBABILITIES = (
  expected_calibration_error,
  area_under_risk_coverage,
  excess_area_under_risk_coverage,
  brier_score,
)


@pytest.mark.golden
def test_golden_ps_kd_metrics(golden, x64):
  names = []
  file = golden("26-ps_kd")
  file.meta.pop("cases")
  for name, arrays, _ in file.cases("metric"):
    names.append(name)
    probabilities, labels = jnp.asarray(arrays["probs"]), jnp.asarray(arrays["labels"])
    for value, expected in (
      (100 * expected_calibration_error(probabilities, labels), arrays["out_ece_percent"]),
      (1000 * area_under_risk_coverage(probabilities, labels), arrays["out_aurc_x1000"]),
      (1000 * excess_area_under_risk_coverage(probabilities, labels), arrays["out_eaurc_x1000"]),
      (negative_log_likelihood(jnp.log(probabilities), labels), arrays["out_nll"]),
    ):
      np.testing.assert_allclose(value, expected, rtol=1e-10, err_msg=name)
  assert names


def test_calibration_error_by_the_definition(x64):
  confidence, right = PROBABILITIES.max(1), PROBABILITIES.argmax(1) == LABELS
  for bins in (1, 10, 15):
    expected = 0.0
    for i in range(bins):
      inside = (confidence > i / bins) & (confidence <= (i + 1) / bins)
      if inside.any():
        expected += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
    np.testing.assert_allclose(expected_calibration_error(PROBABILITIES, LABELS, bins=bins), expected, rtol=1e-12)


def test_bins_are_closed_on_the_right():
  two = np.array([[0.8, 0.2], [0.75, 0.25]], np.float32)  # both in (0.7, 0.8], whose gaps cancel in part
  np.testing.assert_allclose(expected_calibration_error(two, np.array([0, 1])), abs(1 - 1.55) / 2, rtol=1e-5)
  edge = np.array([[0.5, 0.5], [0.5, 0.5]], np.float32)
  np.testing.assert_allclose(expected_calibration_error(edge, np.array([0, 1]), bins=2), 0, atol=1e-7)


def test_certain_predictions():
  certain, labels = np.eye(3, dtype=np.float32)[[0, 1, 2, 1]], np.array([0, 1, 2, 1])
  assert expected_calibration_error(certain, labels) == 0
  assert expected_calibration_error(certain, (labels + 1) % 3) == 1
  assert expected_calibration_error(certain + 1e-6, labels) < 1e-5  # above 1 by rounding
  assert area_under_risk_coverage(certain, (labels + 1) % 3) == 1
  assert excess_area_under_risk_coverage(certain, (labels + 1) % 3) == 0


def test_risk_coverage_by_the_definition(x64):
  wrong = (PROBABILITIES.argmax(1) != LABELS)[np.argsort(-PROBABILITIES.max(1))]
  expected = np.mean(np.cumsum(wrong) / np.arange(1, 58))
  np.testing.assert_allclose(area_under_risk_coverage(PROBABILITIES, LABELS), expected, rtol=1e-12)
  r = wrong.sum()
  best = sum(j / (57 - r + j) for j in range(1, r + 1)) / 57
  np.testing.assert_allclose(excess_area_under_risk_coverage(PROBABILITIES, LABELS), expected - best, rtol=1e-10)


def test_ties_count_as_the_mean_over_their_orders(x64):
  confidence, wrong = np.array([0.9, 0.7, 0.7, 0.7, 0.6]), np.array([0, 1, 0, 1, 1])
  probabilities = np.stack([confidence, 1 - confidence], axis=1)
  areas = [np.mean(np.cumsum(wrong[[0, *middle, 4]]) / np.arange(1, 6)) for middle in itertools.permutations([1, 2, 3])]
  np.testing.assert_allclose(area_under_risk_coverage(probabilities, wrong), np.mean(areas), rtol=1e-12)
  for order in itertools.permutations(range(5)):
    chosen = list(order)
    value = area_under_risk_coverage(probabilities[chosen], wrong[chosen])
    np.testing.assert_allclose(value, np.mean(areas), rtol=1e-12)


def test_errors_last_are_the_best_order_and_nothing_is_better():
  confidence = np.linspace(0.95, 0.55, 20, dtype=np.float32)
  probabilities = np.stack([confidence, 1 - confidence], axis=1)
  assert excess_area_under_risk_coverage(probabilities, (np.arange(20) >= 14).astype(int)) == 0
  for seed in range(20):
    rng = np.random.default_rng(seed)
    drawn = rng.dirichlet(0.1 * np.ones(3), 40).round(2).astype(np.float32)
    assert excess_area_under_risk_coverage(drawn, rng.integers(0, 3, 40)) >= 0


def test_scores_agree_with_scikit_learn_and_the_loss(x64):
  expected = sklearn_metrics.log_loss(LABELS, PROBABILITIES)
  np.testing.assert_allclose(negative_log_likelihood(np.log(PROBABILITIES), LABELS), expected, rtol=1e-12)
  losses = brier_loss(jnp.log(PROBABILITIES), jnp.asarray(LABELS))
  np.testing.assert_allclose(brier_score(PROBABILITIES, LABELS), losses.mean(), rtol=1e-12)


@pytest.mark.parametrize("metric", [*OF_PROBABILITIES, negative_log_likelihood], ids=lambda metric: metric.__name__)
def test_examples_that_do_not_count(metric):
  """Under a mask or with a label that is no class they are as if they were not there, NaN among them."""
  where = RNG.random(57) < 0.5
  expected = metric(PROBABILITIES[where], LABELS[where])
  spoiled = np.where(where[:, None], PROBABILITIES, np.nan)
  np.testing.assert_allclose(metric(spoiled, LABELS, where=where), expected, rtol=1e-6)
  np.testing.assert_allclose(jax.jit(metric)(spoiled, np.where(where, LABELS, -100)), expected, rtol=1e-6)
  grid = lambda array: array.reshape(3, 19, *array.shape[1:])
  np.testing.assert_allclose(metric(grid(spoiled), grid(LABELS), where=grid(where)), expected, rtol=1e-6)
  assert np.isnan(metric(spoiled, LABELS)) and np.isnan(metric(PROBABILITIES, LABELS, where=np.zeros(57, bool)))


def test_bad_input_is_refused():
  with pytest.raises(ValueError, match="bins must be a positive integer"):
    expected_calibration_error(PROBABILITIES, LABELS, bins=0)
  with pytest.raises(ValueError, match="where must be boolean, one per label"):
    area_under_risk_coverage(PROBABILITIES, LABELS, where=np.ones((57, 1), bool))


def _of_probabilities_row(function):
  return row(
    function,
    lambda rng: (draw_probabilities(rng), draw_classification(rng)[1]),
    extreme=lambda p, y: (np.resize(np.eye(p.shape[-1]), p.shape), y),
    bad=tuple(("labels|probabilities", spoil) for _, spoil in BAD_LABELS),
    examples="reduced",
    differentiable=False,
    wide=True,
  )


ROWS = [*map(_of_probabilities_row, OF_PROBABILITIES), metric_row(calibration.negative_log_likelihood)]
