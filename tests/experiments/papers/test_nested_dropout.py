"""Nested dropout and co-teaching."""

from tests.experiments import recipe_checks


def test_smoke(tmp_path):
  recipe_checks.check_smoke("nested_dropout", tmp_path)


def test_run_and_predict(tmp_path):
  recipe_checks.check_run_and_predict("nested_dropout", tmp_path)


def test_paper_step():
  recipe_checks.check_paper_step("nested_dropout")


def test_paper_ten_steps(tmp_path):
  recipe_checks.check_paper_ten_steps("nested_dropout", tmp_path)
