"""The checks that every recipe passes, on the smallest recipe there is."""

from tests.experiments import recipe_checks

TINY = "tests.experiments.tiny_recipe"


def test_smoke(tmp_path):
  recipe_checks.check_smoke(TINY, tmp_path)


def test_run_and_predict(tmp_path):
  recipe_checks.check_run_and_predict(TINY, tmp_path)
