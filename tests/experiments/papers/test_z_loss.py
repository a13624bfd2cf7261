"""Z-loss."""

import numpy as np

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
