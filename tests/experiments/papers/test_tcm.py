"""Threshold-consistent margins."""

import jax
import numpy as np

from experiments.papers import tcm
from experiments.problems import retrieval
from tests.experiments import recipe_checks

INPUTS = np.random.default_rng(0).normal(size=(3, 64)).astype(np.float32)


def test_smoke(tmp_path):
  recipe_checks.check_smoke("tcm", tmp_path)


def test_run_and_predict(tmp_path):
  recipe_checks.check_run_and_predict("tcm", tmp_path, inputs=INPUTS)


def test_paper_step():
  recipe_checks.check_paper_step("tcm")


def test_paper_ten_steps(tmp_path):
  recipe_checks.check_paper_ten_steps("tcm", tmp_path)


def test_margins_are_chosen_on_training_classes():
  """The tuning task trains and measures classes before the test classes, of the same set."""
  config = tcm.PRESETS["smoke"]
  problem, tuning = config.problem, config.problem.validation(config.validation_classes)
  assert tuning.train_classes + tuning.test_classes == problem.train_classes
  whole, part = (retrieval.draw(jax.random.key(0), each) for each in (problem, tuning))
  np.testing.assert_array_equal(part["train"], whole["train"][: tuning.train_classes])
  np.testing.assert_array_equal(
    part["test"][:, : problem.train_samples], whole["train"][tuning.train_classes :]
  )  # the samples that training sees, and more of the same classes
