"""Robust self-training with unlabelled data of another domain."""

import numpy as np

from tests.experiments import recipe_checks


def test_smoke(tmp_path):
  recipe_checks.check_smoke("robust_self_training", tmp_path)


def test_run_and_predict(tmp_path):
  recipe_checks.check_run_and_predict("robust_self_training", tmp_path, inputs=np.ones((3, 20), np.float32))
