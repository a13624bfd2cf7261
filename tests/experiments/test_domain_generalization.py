"""The study of domain generalization, and the methods that it trains."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.problems.domain_methods import METHODS, SOURCES, DomainProblem, domain_task
from experiments.studies import domain_generalization as study
from tests.experiments import recipe_checks

SMALL = DomainProblem(train=16, valid=10, test=20, features=8, batch_size=8, steps=6, test_batch=10, warm_up=0.0)


def test_smoke(tmp_path):
  recipe_checks.check_smoke("domain_generalization", tmp_path)


def test_run_and_predict(tmp_path):
  recipe_checks.check_run_and_predict("domain_generalization", tmp_path, inputs=np.ones((3, 14, 14, 2), np.float32))


def test_methods_have_equally_many_settings():
  assert set(study.OWN) == set(METHODS) and len({len(values) for _, values in study.OWN.values()}) == 1


def started(method):
  task = domain_task(dataclasses.replace(SMALL, method=method))
  hparams = {key: jnp.float32(value) for key, value in {**task.hparams, "weight": 10.0}.items()}
  return task, hparams, task.init(jax.random.key(3), hparams)


def same(a, b) -> bool:
  return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


@pytest.fixture(scope="module")
def plain():
  task, hparams, start = started("ERM")
  return start, jax.jit(task.step)(start, {"row": jnp.arange(8)}, hparams)[0]


@pytest.mark.parametrize("method", METHODS[1:])
def test_every_method_has_erms_data_and_start_and_is_another_method(method, plain):
  task, hparams, start = started(method)
  data = lambda state: {part: state.extra[part] for part in ("train", "valid", "target", "target_valid")}
  assert same(data(start), data(plain[0]))
  state, metrics = jax.jit(task.step)(start, {"row": jnp.arange(8)}, hparams)
  assert np.isfinite(metrics["loss"]) and not same(start.params, state.params)
  if method != "DRM":  # whose heads are as many as the domains
    assert same(start.params, plain[0].params) and not same(state.params, plain[1].params)


@pytest.mark.parametrize("left_out", range(SOURCES))
def test_nothing_is_learned_from_the_domain_that_is_left_out(left_out):
  task = domain_task(dataclasses.replace(SMALL, method="V-REx", leave_out=True))
  hparams = {**task.hparams, "left_out": left_out, "weight": 10.0}
  state, step = task.init(jax.random.key(0), hparams), jax.jit(task.step)

  def spoil(domain):
    train = {**state.extra["train"], "x": state.extra["train"]["x"].at[:, domain].set(0.0)}
    return step(state._replace(extra={**state.extra, "train": train}), {"row": jnp.arange(8)}, hparams)[0].params

  steps = [spoil(domain) for domain in range(SOURCES)]
  original = step(state, {"row": jnp.arange(8)}, hparams)[0].params
  assert [same(each, original) for each in steps] == [spoiled == left_out for spoiled in range(SOURCES)]


def test_fish_sees_one_domain_after_another():
  task = domain_task(dataclasses.replace(SMALL, method="Fish"))
  state = task.init(jax.random.key(0), task.hparams)
  step = jax.jit(task.step)
  states = [state._replace(step=jnp.int32(at)) for at in range(2 * SOURCES)]
  losses = [step(each, {"row": jnp.arange(8)}, task.hparams)[1]["loss"].item() for each in states]
  assert losses[:SOURCES] == losses[SOURCES:] and len(set(losses)) == SOURCES


def test_equal_methods_share_a_rank():
  config = dataclasses.replace(study.PRESETS["smoke"], problems=("colored",), methods=("ERM", "IRM", "SAM"))
  summary = {"oracle colored ERM": [0.5], "oracle colored IRM": [0.7], "oracle colored SAM": [0.5]}
  ranks = study._ranks(config, {name: np.array(value) for name, value in summary.items()}, "oracle")
  assert ranks[:, 0].tolist() == [2.5, 1.0, 2.5]
