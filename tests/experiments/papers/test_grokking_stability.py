"""Grokking at the edge of numerical stability."""

from tests.experiments import recipe_checks


def test_smoke(tmp_path):
  recipe_checks.check_smoke("grokking_stability", tmp_path)


def test_run_and_predict(tmp_path):
  recipe_checks.check_run_and_predict("grokking_stability", tmp_path)
