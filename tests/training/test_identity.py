"""A run has an identity: nothing made by another experiment is ever returned."""

import dataclasses
import json
import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxreg.data import stream
from jaxreg.training import HeldOut, Mean, examples, fit, gradient_task, hparams, identity, sweep

OPTIONS = {"log_every": 10, "progress": False, "tensorboard": False}
SWEEP = {"seeds": [0, 1], "steps": 10, "engine": "map", "progress": False}


@dataclasses.dataclass(frozen=True)
class Config:
  """What is static about the task below."""

  width: int = 3
  loss: str = "squared"


LOSSES = {"squared": jnp.square, "absolute": jnp.abs}
TEST = np.ones((4, 2), np.float32)


def task(config=Config(), optimizer=optax.sgd, labels=1.0, test=TEST, batch_size=4, **options):
  """A small network; what it closes over (loss, optimizer, held-out data) matters as much as its config."""
  data = {"x": np.ones((8, 2), np.float32), "y": np.full((8, 1), labels, np.float32)}
  model = nn.Dense(config.width)

  def objective(params, extra, batch, context):
    error = model.apply(params, batch["x"]) - batch["y"]
    return LOSSES[config.loss](error).mean(), (extra, {})

  return gradient_task(
    init_params=lambda key, hparams: (model.init(key, data["x"][:1]), {}),
    objective=objective,
    optimizer=lambda hparams: optimizer(hparams["learning_rate"]),
    data=data,
    batch_size=batch_size,
    hparams={"learning_rate": 0.1},
    evaluate=lambda params, extra, hparams: {"mean": model.apply(params, test).mean()},
    config=config,
    **options,
  )


CHANGES = {
  "config.width": (lambda: task(Config(width=4)), "config.width is 3 there and 4 here"),
  "config.loss": (lambda: task(Config(loss="absolute")), 'config.loss is "squared" there and "absolute" here'),
  "optimizer": (lambda: task(optimizer=optax.adam), "program is "),
  "labels": (lambda: task(labels=2.0), "data.y is "),
  "held-out data": (lambda: task(test=TEST * 2), "program is "),
  "batch size": (lambda: task(batch_size=2), "batch_size is 4 there and 2 here"),
  "precision": (lambda: task(precision="bfloat16"), 'precision is "float32" there and "bfloat16" here'),
  "accumulation": (lambda: task(accumulate=2), "accumulate is 1 there and 2 here"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_fit_and_sweep_refuse_the_folder_of_another_experiment(name, tmp_path):
  other, message = CHANGES[name]
  fit(task(), steps=20, folder=tmp_path / "fit", **OPTIONS)
  sweep(task(), {}, folder=tmp_path / "sweep", **SWEEP)
  with pytest.raises(ValueError, match="holds another run: .*" + message):
    fit(other(), steps=20, folder=tmp_path / "fit", **OPTIONS)
  with pytest.raises(ValueError, match="holds another run: .*" + message):
    sweep(other(), {}, folder=tmp_path / "sweep", **SWEEP)


@pytest.mark.parametrize("change, message", [
  ({"seed": 1}, "seed is 0 there and 1 here"),
  ({"hparams": {"learning_rate": 0.2}}, "hparams.learning_rate is 0.1"),
  ({"log_every": 5}, "log_every is 10 there and 5 here"),
  ({"eval_every": 10}, 'eval_every is "the end" there and 10 here'),
])  # fmt: skip
def test_what_a_run_is_called_with_belongs_to_its_identity(change, message, tmp_path):
  fit(task(), steps=20, folder=tmp_path, **OPTIONS)
  with pytest.raises(ValueError, match=message):
    fit(task(), steps=40, folder=tmp_path, **{**OPTIONS, **change})


@pytest.mark.parametrize("change", [{"steps": 20}, {"eval_every": 5}])
def test_lengths_of_a_sweep_belong_to_its_identity(change, tmp_path):
  sweep(task(), {}, folder=tmp_path, **SWEEP)
  with pytest.raises(ValueError, match="holds another run"):
    sweep(task(), {}, folder=tmp_path, **{**SWEEP, **change})


def test_fit_and_sweep_do_not_share_a_folder(tmp_path):
  fit(task(), steps=10, folder=tmp_path, **OPTIONS)
  with pytest.raises(ValueError, match='kind is "fit" there and "sweep" here'):
    sweep(task(), {}, folder=tmp_path, **SWEEP)


def test_a_task_that_is_built_again_is_the_same(tmp_path):
  first = fit(task(), steps=20, folder=tmp_path / "fit", **OPTIONS)
  again = fit(task(), steps=20, folder=tmp_path / "fit", **OPTIONS)
  np.testing.assert_array_equal(first.state.params["params"]["kernel"], again.state.params["params"]["kernel"])
  began = sweep(task(), {"learning_rate": [0.1]}, folder=tmp_path / "sweep", **SWEEP)
  assert (
    sweep(task(), {}, folder=tmp_path / "sweep", **SWEEP).metrics["loss"].tolist() == began.metrics["loss"].tolist()
  )


def test_results_without_parameters_are_run_again_when_they_are_asked_for(tmp_path):
  sweep(task(), {}, folder=tmp_path, **SWEEP)
  result = sweep(task(), {}, folder=tmp_path, keep_params=True, **SWEEP)
  assert result.params["params"]["kernel"].shape == (2, 2, 3)


def test_a_folder_without_identity_or_with_a_damaged_one_is_refused(tmp_path):
  fit(task(), steps=10, folder=tmp_path, **OPTIONS)
  config = tmp_path / "config.json"
  text = config.read_text()
  config.write_text(text[:50])
  with pytest.raises(ValueError, match="config.json is damaged"):
    fit(task(), steps=20, folder=tmp_path, **OPTIONS)
  config.unlink()
  with pytest.raises(ValueError, match="holds checkpoints without a config.json"):
    fit(task(), steps=20, folder=tmp_path, **OPTIONS)
  config.write_text(text)
  fit(task(), steps=20, folder=tmp_path, **OPTIONS)


def test_the_identity_says_what_a_reader_looks_for(tmp_path):
  fit(task(), steps=10, seed=3, folder=tmp_path, **OPTIONS)
  saved = json.loads((tmp_path / "config.json").read_text())
  assert saved["seed"] == 3 and saved["hparams"] == {"learning_rate": pytest.approx(0.1)}
  assert saved["config"]["width"] == 3 and saved["config"]["type"].endswith("test_identity.Config")
  assert set(saved["versions"]) == {"jaxreg", "jax"} and saved["data"]["x"].startswith("float32[8, 2] ")


def test_streams_are_told_apart_by_what_they_read(tmp_path):
  arrays = task().data

  def streamed(values, seed=0):
    return task().replace(data=lambda: stream.array_stream({**arrays, "y": values}, batch_size=4, seed=seed))

  fit(streamed(arrays["y"]), steps=10, folder=tmp_path, **OPTIONS)
  with pytest.raises(ValueError, match="data.arrays.y is"):
    fit(streamed(arrays["y"] + 1), steps=20, folder=tmp_path, **OPTIONS)
  with pytest.raises(ValueError, match="data.seed is 0 there and 1 here"):
    fit(streamed(arrays["y"], seed=1), steps=20, folder=tmp_path, **OPTIONS)
  fit(streamed(arrays["y"]), steps=20, folder=tmp_path, **OPTIONS)


def test_held_out_streams_belong_to_the_identity_and_are_weighted(tmp_path):
  values = np.arange(5, dtype=np.float32)

  def held_out(scale):
    opened = lambda: stream.array_stream({"x": values * scale}, batch_size=2, seed=None, num_epochs=1,
                                         drop_remainder=False)  # fmt: skip
    measure = lambda state, batch, hparams: {
      "held_out": Mean(jnp.sum(batch["x"] * batch["valid"]), batch["valid"].sum())
    }
    return task().replace(held_out=HeldOut(opened, measure))

  result = fit(held_out(1), steps=10, folder=tmp_path, **OPTIONS)
  assert result.rows[-1]["held_out"] == values.mean()
  with pytest.raises(ValueError, match="held_out.data.arrays.x is"):
    fit(held_out(2), steps=20, folder=tmp_path, **OPTIONS)
  vector = held_out(1)
  vector = vector.replace(held_out=vector.held_out._replace(measure=lambda s, b, h: {"x": Mean(b["x"], 1.0)}))
  with pytest.raises(ValueError, match="x of held_out must be a scalar"):
    fit(vector, steps=10, **OPTIONS)


PROGRAM = """
from tests.training.test_identity import program_hash
print("hash", program_hash())
"""


def program_hash() -> str:
  """The identity's hash of a task with what programs contain: custom rules, loops, random draws, constants."""
  from jaxreg.losses import early_learning

  one = task()

  def objective(params, extra, batch, context):
    logits = batch["x"] @ params
    values, extra = early_learning.elr_loss(
      logits, jnp.zeros(4, jnp.int32), batch["id"], state=extra, momentum=0.5, weight=context.hparams["learning_rate"]
    )
    noise = jax.random.normal(context.key, ())
    return values.mean() + noise * jax.nn.relu(logits).sum(), (extra, {})

  other = gradient_task(
    init_params=lambda key, h: (jax.random.normal(key, (2, 3)), early_learning.elr_init(8, 3)),
    objective=objective,
    optimizer=lambda h: optax.adam(h["learning_rate"]),
    data=one.data,
    batch_size=4,
    hparams={"learning_rate": 0.1},
  )
  return identity.of_task(other, hparams.merge(other), identity.batch_shapes(other))["program"]


def test_the_hash_of_a_program_is_the_same_in_every_process():
  answer = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
  assert answer.stdout.split() == ["hash", program_hash()]


def test_domains_are_checked_before_a_run_starts():
  from jaxreg.losses import comp_sum

  one = examples.least_squares()

  def objective(params, extra, batch, context):
    logits = jnp.stack([batch["x"] @ params["w"], batch["y"]], -1)
    return comp_sum.comp_sum_loss(logits, jnp.zeros(16, jnp.int32), tau=context.hparams["tau"]).mean(), (extra, {})

  checked = gradient_task(
    init_params=lambda key, hparams: ({"w": jnp.zeros(4)}, {}),
    objective=objective,
    optimizer=lambda hparams: optax.sgd(0.1),
    data=one.data,
    batch_size=16,
    hparams={"tau": 1.0},
  )
  for run in (
    lambda tau: fit(checked, steps=10, hparams={"tau": tau}, **OPTIONS),
    lambda tau: sweep(checked, {"tau": [0.5, tau]}, **SWEEP),
  ):
    with pytest.raises(ValueError, match="tau must lie in"):
      run(-1.0)
    with pytest.raises(ValueError, match="got nan"):
      run(float("nan"))
    run(2.0)
