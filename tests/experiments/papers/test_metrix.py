"""Metrix."""

import numpy as np

from tests.experiments import recipe_checks

INPUTS = np.random.default_rng(0).normal(size=(3, 64)).astype(np.float32)


def test_smoke(tmp_path):
  recipe_checks.check_smoke("metrix", tmp_path)


def test_run_and_predict(tmp_path):
  recipe_checks.check_run_and_predict("metrix", tmp_path, inputs=INPUTS)


def test_paper_step():
  recipe_checks.check_paper_step("metrix")


def test_paper_ten_steps(tmp_path):
  recipe_checks.check_paper_ten_steps("metrix", tmp_path)
