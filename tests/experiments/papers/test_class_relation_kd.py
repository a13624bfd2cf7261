"""Cr-KD."""

import jax
import jax.numpy as jnp
import numpy as np

from experiments.papers import class_relation_kd
from tests.experiments import recipe_checks


def test_smoke(tmp_path):
  recipe_checks.check_smoke("class_relation_kd", tmp_path)


def test_run_and_predict(tmp_path):
  recipe_checks.check_run_and_predict("class_relation_kd", tmp_path, inputs=np.ones((3, 32), np.float32))


def test_paper_step():
  recipe_checks.check_paper_step("class_relation_kd")


def test_paper_ten_steps(tmp_path):
  recipe_checks.check_paper_ten_steps("class_relation_kd", tmp_path)


def test_novel_means_are_mixtures_of_two_known_ones():
  config = class_relation_kd.PRESETS["cpu"]
  part = class_relation_kd.related_classes(config, jax.random.key(3), 0.0)["train"]
  means = np.stack([part["x"][part["y"] == label].mean(0) for label in range(20)])
  known, novel = means[:10], means[10:]
  np.testing.assert_allclose(known @ known.T, 4 * np.eye(10), atol=0.6)
  shares = np.sort(novel @ known.T / 4, axis=1)
  np.testing.assert_allclose(shares[:, -2:], np.tile([0.35, 0.65], (10, 1)), atol=0.1)
  assert np.abs(shares[:, :-2]).max() < 0.1


def test_the_teacher_is_the_supervised_network_and_stays():
  config = class_relation_kd.PRESETS["smoke"]
  task = class_relation_kd.task(config)
  state = task.init(jax.random.key(0), task.hparams)
  step = jax.jit(task.step)
  batch = {"row": jnp.arange(config.batch_size), "id": jnp.arange(config.batch_size)}
  for _ in range(2):
    state, _ = step(state, batch, task.hparams)
  supervised = state._replace(step=jnp.int32(config.supervised_steps))
  state, _ = step(supervised, batch, task.hparams)
  same = lambda a, b: all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)))
  parts = lambda params: {name: params[name] for name in ("encoder", "known")}
  assert same(state.extra["teacher"]["params"], parts(supervised.params))
  assert not same(parts(state.params), parts(supervised.params))
  state, _ = step(state, batch, task.hparams)
  assert same(state.extra["teacher"]["params"], parts(supervised.params))
  norms = jnp.linalg.norm(state.params["novel"]["each"]["cosine"]["prototypes"], axis=-1)
  np.testing.assert_allclose(norms, 1, rtol=1e-5)


def test_learning_rate():
  config = class_relation_kd.PRESETS["paper"]
  epoch, first = config.steps_per_epoch, config.supervised_steps
  rate = lambda step: float(class_relation_kd._rate(config, step, {"learning_rate": 0.4}))
  found = [rate(0), rate(first - 1), rate(first), rate(first + 9 * epoch), rate(first + 10 * epoch)]
  np.testing.assert_allclose(found, [0.1, 0.1, 0.04, 0.4, 0.4], rtol=1e-5)
  assert 1e-3 <= rate(config.steps - 1) < 1.1e-3
