import numpy as np

from tests.experiments import recipe_checks


def test_smoke(tmp_path):
  recipe_checks.check_smoke("hessian_alignment", tmp_path)


def test_run_and_predict(tmp_path):
  inputs = np.random.default_rng(0).uniform(size=(3, 14, 14, 2)).astype(np.float32)
  recipe_checks.check_run_and_predict("hessian_alignment", tmp_path, inputs=inputs)
