"""EnsLoss."""

import dataclasses

import jax
import numpy as np
import pytest

from experiments.papers import ensloss
from jaxreg.losses import calibrated_ensemble
from jaxreg.training.task import Context
from tests.experiments import recipe_checks


def test_smoke(tmp_path):
  recipe_checks.check_smoke("ensloss", tmp_path)


def test_run_and_predict(tmp_path):
  recipe_checks.check_run_and_predict("ensloss", tmp_path)


def test_paper_step():
  recipe_checks.check_paper_step("ensloss")


def test_paper_ten_steps(tmp_path):
  recipe_checks.check_paper_ten_steps("ensloss", tmp_path)


@pytest.mark.parametrize("loss", ["ensloss", "resampled", "mixture"])
def test_random_losses_are_those_of_the_library(loss):
  """Lambda is a hyperparameter, or one of the run's own for each period of epochs."""
  config = dataclasses.replace(ensloss.PRESETS["smoke"], loss=loss, period=2, epochs=5, train=64, batch_size=16)
  task = ensloss.task(config)
  assert ("box_cox" in task.hparams) == (loss == "ensloss")
  extras = [task.init(jax.random.key(seed), task.hparams).extra for seed in (0, 1)]
  rng = np.random.default_rng(0)
  logits, labels, key = rng.normal(size=16).astype(np.float32), rng.integers(0, 2, 16), jax.random.key(3)
  values = lambda step, extra, **hparams: ensloss._values(
    config, logits, labels, extra, Context(np.int32(step), key, {**task.hparams, **hparams}, None)
  )
  if loss == "mixture":
    expected = calibrated_ensemble.random_margin_loss_mixture(logits, labels, key)
    np.testing.assert_array_equal(values(0, extras[0]), expected)
    return
  expected = lambda box_cox: calibrated_ensemble.ensloss(logits, labels, key, box_cox=box_cox)
  if loss == "ensloss":
    np.testing.assert_array_equal(values(0, extras[0]), expected(0.0))
    np.testing.assert_array_equal(values(0, extras[0], box_cox=-0.5), expected(-0.5))
    return
  drawn, other = (np.asarray(extra["box_cox"]) for extra in extras)
  assert drawn.shape == (3,) and len({*drawn, *other}) == 6 and (np.abs([drawn, other]) <= 1).all()
  for step, period in ((0, 0), (7, 0), (8, 1), (15, 1), (16, 2), (19, 2)):  # four steps an epoch
    np.testing.assert_array_equal(values(step, extras[0]), expected(drawn[period]))
