"""Noise masks driven by a policy gradient."""

import numpy as np

from tests.experiments import recipe_checks


def test_smoke(tmp_path):
  recipe_checks.check_smoke("noise_mask", tmp_path)


def test_run_and_predict(tmp_path):
  recipe_checks.check_run_and_predict("noise_mask", tmp_path, inputs=np.ones((3, 14, 14), np.float32))
