"""Projection heads."""

import numpy as np

from experiments.papers import projection_head
from tests.experiments import recipe_checks


def test_smoke(tmp_path):
  recipe_checks.check_smoke("projection_head", tmp_path)


def test_run_and_predict(tmp_path):
  recipe_checks.check_run_and_predict("projection_head", tmp_path)


def test_paper_step():
  recipe_checks.check_paper_step("projection_head")


def test_paper_ten_steps(tmp_path):
  recipe_checks.check_paper_ten_steps("projection_head", tmp_path)


def test_theory_has_square_roots_before_the_head():
  np.testing.assert_allclose(projection_head.theory(1) ** 2, projection_head.theory(2), rtol=1e-6)
