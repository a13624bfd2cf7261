"""Comp-sum losses."""

from tests.experiments import recipe_checks


def test_smoke(tmp_path):
  recipe_checks.check_smoke("comp_sum", tmp_path)


def test_run_and_predict(tmp_path):
  recipe_checks.check_run_and_predict("comp_sum", tmp_path)


def test_paper_step():
  recipe_checks.check_paper_step("comp_sum")


def test_paper_ten_steps(tmp_path):
  recipe_checks.check_paper_ten_steps("comp_sum", tmp_path)
