"""Doubly robust adversarial training."""

import numpy as np

from tests.experiments import recipe_checks


def test_smoke(tmp_path):
  recipe_checks.check_smoke("doubly_robust_at", tmp_path)


def test_run_and_predict(tmp_path):
  recipe_checks.check_run_and_predict("doubly_robust_at", tmp_path, inputs=np.ones((3, 64), np.float32))
