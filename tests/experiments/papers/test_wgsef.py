"""WGSEF."""

import numpy as np

from experiments.papers import wgsef
from tests.experiments import recipe_checks


def test_smoke(tmp_path):
  recipe_checks.check_smoke("wgsef", tmp_path)


def test_run_and_predict(tmp_path):
  recipe_checks.check_run_and_predict("wgsef", tmp_path)


def test_the_weakest_sufficient_strength_is_chosen():
  active = np.array([[64, 20], [16, 18], [3, 17]])  # strengths, seeds
  np.testing.assert_array_equal(wgsef.weakest(active, 16), [1, 2])
