"""Z-loss."""

import dataclasses

import numpy as np
import pytest

from experiments.papers import z_loss
from tests.experiments import recipe_checks


def test_smoke(tmp_path):
  recipe_checks.check_smoke("z_loss", tmp_path)


def test_run_and_predict(tmp_path):
  recipe_checks.check_run_and_predict("z_loss", tmp_path)


def test_paper_step():
  recipe_checks.check_paper_step("z_loss")


def test_paper_ten_steps(tmp_path):
  recipe_checks.check_paper_ten_steps("z_loss", tmp_path)


def test_settings_are_chosen_on_the_validation_part_for_each_k():
  valid = np.array([[[0.1, 0.9]], [[0.5, 0.2]]])  # points, seeds, k
  test = np.array([[[0.8, 0.7]], [[0.6, 0.9]]])
  np.testing.assert_array_equal(z_loss.chosen_on_validation(valid, test), [[0.6, 0.7]])


@pytest.mark.parametrize("preset", ["smoke", "cpu"])
def test_losses_choose_among_as_many_settings(preset):
  config = z_loss.PRESETS[preset]
  points = {}
  for loss in ("z", "cross_entropy"):
    own = dataclasses.replace(z_loss._text_config(config, loss), classes=300, files=2)
    points[loss] = {len(values) for values in z_loss.cell(own).points.values()}
  assert points["z"] == points["cross_entropy"] == {config.text_settings}
  with pytest.raises(ValueError, match="text_softmax_rates must be as many"):
    dataclasses.replace(config, text_softmax_rates=(1e-3,))


def test_each_k_is_judged_by_itself():
  tops = np.array([[0.1, 0.2, 0.3, 0.4]])
  summary = {"text z": tops, "text cross_entropy": tops - np.array([[0.1, -0.1, 0.0, -0.2]])}
  claims = {claim.name: claim.value(summary) for claim in z_loss.claims(z_loss.PRESETS["cpu"]) if "text" in claim.name}
  assert list(claims) == ["text_top_1", "text_top_5", "text_top_10", "text_top_50"]
  np.testing.assert_allclose(list(claims.values()), [[0.1], [-0.1], [0.0], [-0.2]], atol=1e-12)
