"""Domain-specific risk minimization."""

import dataclasses

import numpy as np
import pytest

from experiments.papers import drm
from tests.experiments import recipe_checks


def test_smoke(tmp_path):
  recipe_checks.check_smoke("drm", tmp_path)


def test_run_and_predict(tmp_path):
  recipe_checks.check_run_and_predict("drm", tmp_path, inputs=np.ones((3, 14, 14, 1), np.float32))


def test_paper_step():
  recipe_checks.check_paper_step("drm")


@pytest.mark.parametrize("problem", drm.PROBLEMS)
def test_paper_ten_steps(problem, tmp_path, monkeypatch):
  other = dict(problem=problem, target={"rotated": 75.0, "colored": 0.1}[problem])
  monkeypatch.setitem(drm.PRESETS, "paper", dataclasses.replace(drm.PRESETS["paper"], **other))
  recipe_checks.check_paper_ten_steps("drm", tmp_path)
