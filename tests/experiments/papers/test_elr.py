"""ELR."""

import jax
import jax.numpy as jnp
import numpy as np

from experiments.papers import elr
from experiments.problems import noisy_classification
from tests.experiments import recipe_checks


def test_smoke(tmp_path):
  recipe_checks.check_smoke("elr", tmp_path)


def test_run_and_predict(tmp_path):
  recipe_checks.check_run_and_predict("elr", tmp_path)


def test_weights_are_averaged_within_the_run():
  """A ramp of 40,000 steps is no averaging in 2,400: it ends at the fraction of the steps where it ends on CIFAR-10."""
  momentum = lambda step, ramp: float(noisy_classification.averaging(step, 0.997, ramp))
  problem = elr.PRESETS["cpu"].problem
  ramp = noisy_classification.elr_plus_task(problem).hparams["ema_ramp"]
  assert problem.steps == 2400 and ramp == 1364
  np.testing.assert_allclose(
    [momentum(step, ramp) for step in (0, 681, 1363, 2399)],
    [0.997 * np.exp(-5 * (1 - 1 / 1364) ** 2), 0.997 * np.exp(-1.25), 0.997, 0.997],
    rtol=1e-5,
  )
  # Without a ramp the mean of all weights so far, then the moving average.
  np.testing.assert_allclose([momentum(step, 0) for step in (0, 1, 99, 5000)], [0, 1 / 2, 0.99, 0.997], rtol=1e-6)


def test_averaged_weights_follow_the_momentum():
  problem = elr.PRESETS["smoke"].problem
  task = noisy_classification.elr_plus_task(problem)
  hparams = {**task.hparams, "ema_ramp": 0.0}
  state = task.init(jax.random.key(0), hparams)
  batch = {"x": jnp.asarray(task.data["x"][: task.batch_size]), "id": jnp.arange(task.batch_size)}
  expected = state.extra["averaged"]
  for step in range(3):
    state, _ = jax.jit(task.step)(state, batch, hparams)
    old = 1 - 1 / (step + 1)
    expected = jax.tree.map(lambda a, b, old=old: old * a + (1 - old) * b, expected, state.params)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), state.extra["averaged"], expected)
