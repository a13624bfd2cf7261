"""Quantized residual networks."""

from tests.experiments import recipe_checks


def test_smoke(tmp_path):
  recipe_checks.check_smoke("quantized_resnet", tmp_path)


def test_run_and_predict(tmp_path):
  recipe_checks.check_run_and_predict("quantized_resnet", tmp_path)


def test_paper_step():
  recipe_checks.check_paper_step("quantized_resnet")


def test_paper_ten_steps(tmp_path):
  recipe_checks.check_paper_ten_steps("quantized_resnet", tmp_path)
