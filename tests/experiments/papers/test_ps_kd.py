"""PS-KD."""

import numpy as np

from experiments.papers import ps_kd
from tests.experiments import recipe_checks


def test_smoke(tmp_path):
  recipe_checks.check_smoke("ps_kd", tmp_path)


def test_run_and_predict(tmp_path):
  recipe_checks.check_run_and_predict("ps_kd", tmp_path, inputs=np.ones((3, 16), np.float32))


def test_paper_step():
  recipe_checks.check_paper_step("ps_kd")


def test_paper_ten_steps(tmp_path):
  recipe_checks.check_paper_ten_steps("ps_kd", tmp_path)


def test_every_method_has_as_many_settings():
  counts = {name: len(several) for name, several in ps_kd.settings(ps_kd.PRESETS["cpu"]).items()}
  assert len(set(counts.values())) == 1 and len(counts) == 3
