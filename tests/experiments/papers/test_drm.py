"""Domain-specific risk minimization."""

import numpy as np

from tests.experiments import recipe_checks


def test_smoke(tmp_path):
  recipe_checks.check_smoke("drm", tmp_path)


def test_run_and_predict(tmp_path):
  recipe_checks.check_run_and_predict("drm", tmp_path, inputs=np.ones((3, 14, 14, 1), np.float32))
