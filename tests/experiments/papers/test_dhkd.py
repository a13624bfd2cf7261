"""DHKD."""

import jax
import jax.numpy as jnp
import numpy as np

from experiments.papers import dhkd
from tests.experiments import recipe_checks


def test_smoke(tmp_path):
  recipe_checks.check_smoke("dhkd", tmp_path)


def test_run_and_predict(tmp_path):
  recipe_checks.check_run_and_predict("dhkd", tmp_path, inputs=np.ones((3, 48), np.float32))


def test_paper_step():
  recipe_checks.check_paper_step("dhkd")


def test_paper_ten_steps(tmp_path):
  recipe_checks.check_paper_ten_steps("dhkd", tmp_path)


def test_every_tuned_method_has_as_many_settings():
  counts = {name: len(several) for name, several in dhkd.settings(dhkd.PRESETS["cpu"]).items()}
  assert counts.pop("BinaryKL alone") == 1
  assert len(set(counts.values())) == 1 and len(counts) == 1 + len(dhkd.METHODS)


def test_the_teacher_trains_first_and_is_then_left_alone():
  config = dhkd.reduced(dhkd.PRESETS["paper"])
  task = dhkd.task(config)
  state = task.init(jax.random.key(0), task.hparams)
  rng = np.random.default_rng(0)
  batch = {"image": jnp.asarray(rng.integers(0, 256, (16, 32, 32, 3), np.uint8)), "label": jnp.arange(16) % 100}
  step = jax.jit(task.step)
  moved = lambda before, after, who: any(
    np.any(a != b) for a, b in zip(jax.tree.leaves(before[who]), jax.tree.leaves(after[who]))
  )
  for at, own, other in ((0, "teacher", "student"), (config.steps, "student", "teacher")):
    old = state._replace(step=jnp.int32(at))
    state, _ = step(old, batch, task.hparams)
    assert moved(old.params, state.params, own) and moved(old.extra, state.extra, own)
    assert not moved(old.params, state.params, other) and not moved(old.extra, state.extra, other)
