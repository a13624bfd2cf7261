"""`sweep`: both engines against the same trial run alone, divergence, memory chunks, resuming, placement."""

import importlib
import re

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from jaxreg.training import examples, fit, grid, sweep, sweep_settings, trial_mesh
from jaxreg.training import mesh as mesh_lib

module = importlib.import_module("jaxreg.training.sweep")  # the name `sweep` is the function
POINTS = {"learning_rate": [0.01, 0.05, 0.1]}
OPTIONS = {"seeds": [3, 4], "steps": 100, "eval_every": 50, "progress": False, "keep_params": True}


@pytest.fixture(scope="module")
def task():
  return examples.least_squares()


@pytest.fixture(scope="module")
def alone(task):
  """Every trial run by `fit`."""
  return [
    fit(task, steps=100, log_every=50, eval_every=50, seed=seed, hparams={"learning_rate": rate}, progress=False)
    for rate in POINTS["learning_rate"]
    for seed in OPTIONS["seeds"]
  ]


@pytest.mark.parametrize("devices", [1, 4])
def test_mapped_trials_are_bit_equal_to_fit(task, alone, devices):
  result = sweep(task, POINTS, engine="map", mesh=trial_mesh(jax.devices()[:devices]), **OPTIONS)
  for index, run in enumerate(alone):
    np.testing.assert_array_equal(result.params["w"][index], run.state.params["w"])
    for name in result.metrics:
      np.testing.assert_array_equal(result.metrics[name][index], np.float32([row[name] for row in run.rows]))


@pytest.mark.parametrize("engine, lanes", [("vmap", 1), ("map", 2)])
def test_vectorised_trials_agree_with_fit(task, engine, lanes):
  options = {**OPTIONS, "steps": 5, "eval_every": 5}
  result = sweep(task, POINTS, engine=engine, lanes=lanes, mesh=trial_mesh(jax.devices()[:2]), **options)
  for index, (rate, seed) in enumerate(zip(result.hparams["learning_rate"], result.seeds)):
    run = fit(task, steps=5, log_every=5, seed=int(seed), hparams={"learning_rate": rate}, progress=False)
    np.testing.assert_allclose(result.params["w"][index], run.state.params["w"], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("engine", ["vmap", "map"])
def test_a_diverging_trial_is_reported_and_disturbs_nobody(task, engine):
  calm = sweep(task, POINTS, engine=engine, **OPTIONS)
  wild = sweep(task, {"learning_rate": [0.01, 1e8, 0.05, 0.1]}, engine=engine, **OPTIONS)
  assert (wild.diverged_at[[2, 3]] > 0).all() and (np.delete(wild.diverged_at, [2, 3]) == -1).all()
  np.testing.assert_array_equal(np.delete(wild.params["w"], [2, 3], axis=0), calm.params["w"])
  assert {row["diverged_at"] for row in wild.rows() if row["learning_rate"] == np.float32(1e8)} == set(
    wild.diverged_at[[2, 3]].tolist()
  )


def test_divergence_step_is_the_one_at_which_fit_stops(task):
  result = sweep(task, {"learning_rate": [1e8]}, engine="map", **OPTIONS)
  with pytest.raises(FloatingPointError, match=f"not finite at step {result.diverged_at[0]};"):
    fit(task, steps=100, log_every=50, seed=3, hparams={"learning_rate": 1e8}, progress=False)


def test_chunks_fit_the_memory_budget_and_change_nothing(task):
  mesh = trial_mesh(jax.devices()[:2])
  whole = sweep(task, POINTS, engine="map", mesh=mesh, **OPTIONS)
  executable = module._compiled(module._lowered, task, "map", mesh, 1, 50, 2).memory_analysis()
  need = executable.temp_size_in_bytes + executable.argument_size_in_bytes + executable.output_size_in_bytes
  assert module._chunk_size(task, "map", mesh, 1, 50, 6, need + 10) == 2
  cut = sweep(task, POINTS, engine="map", mesh=mesh, memory_budget=need + 10, **OPTIONS)
  np.testing.assert_array_equal(cut.params["w"], whole.params["w"])


def test_a_budget_below_one_trial_warns(task):
  with pytest.warns(UserWarning, match="more than the budget of 1"):
    sweep(task, {"learning_rate": [0.01]}, engine="map", mesh=trial_mesh(jax.devices()[:1]), memory_budget=1, **OPTIONS)


def test_resumes_chunk_by_chunk(task, tmp_path, monkeypatch):
  options = {**OPTIONS, "engine": "map", "mesh": trial_mesh(jax.devices()[:2]), "memory_budget": 1, "folder": tmp_path}
  run_trials, calls = module._run_trials, []

  def dies_at_third(*arguments):
    calls.append(arguments)
    if len(calls) == 3:
      raise KeyboardInterrupt
    return run_trials(*arguments)

  monkeypatch.setattr(module, "_run_trials", dies_at_third)
  with pytest.warns(UserWarning), pytest.raises(KeyboardInterrupt):
    sweep(task, POINTS, **options)
  assert len(list(tmp_path.glob("chunk-*.npz"))) == 2
  with pytest.warns(UserWarning):
    result = sweep(task, POINTS, **options)
  assert len(calls) == 4
  whole = sweep(task, POINTS, engine="map", **OPTIONS)
  np.testing.assert_array_equal(result.params["w"], whole.params["w"])
  np.testing.assert_array_equal(result.metrics["distance"], whole.metrics["distance"])
  with pytest.raises(ValueError, match="holds another sweep"):
    sweep(task, {"learning_rate": [0.3]}, **options)


def test_a_damaged_chunk_runs_again(task, tmp_path):
  first = sweep(task, POINTS, engine="map", folder=tmp_path, **OPTIONS)
  (chunk,) = tmp_path.glob("chunk-*.npz")
  data = bytearray(chunk.read_bytes())
  data[len(data) // 2] ^= 0xFF
  chunk.write_bytes(data)
  with pytest.warns(UserWarning, match="again"):
    second = sweep(task, POINTS, engine="map", folder=tmp_path, **OPTIONS)
  np.testing.assert_array_equal(first.params["w"], second.params["w"])


def test_each_device_runs_its_own_trials_only(task):
  """`lax.map` under plain sharded jit makes every device run every trial; the compiled program shows it does not."""
  mesh = trial_mesh(jax.devices()[:4])
  compiled = module._compiled(module._lowered, task, "map", mesh, 1, 50, 8)
  text = compiled.as_text()
  assert not re.search(r"all-gather|all-reduce|collective-permute", text)
  assert "f32[2,4]" in text and "f32[8,4]" not in text  # two of the eight trials' weights on a device
  seeds, rates = mesh_lib.shard((np.arange(8, dtype=np.uint32), np.ones(8, np.float32)), mesh, PartitionSpec("trial"))
  state = module._compiled(module._lowered_init, task, mesh, 8)(seeds, {"learning_rate": rates})
  shared = mesh_lib.replicate((task.data, np.int32(50)), mesh)
  out, *_ = compiled(state, {"learning_rate": rates}, shared)
  assert [shard.data.shape for shard in out.params["w"].addressable_shards] == [(2, 4)] * 4


def test_static_settings_are_an_outer_loop():
  settings = {
    f"features {size}": (examples.least_squares(features=size), grid(learning_rate=[0.02, 0.05])) for size in (2, 3)
  }
  results = sweep_settings(settings, seeds=[0], steps=50, engine="vmap", progress=False, keep_params=True)
  assert {name: result.params["w"].shape for name, result in results.items()} == {
    "features 2": (2, 2),
    "features 3": (2, 3),
  }


def test_the_automatic_engine_is_one_of_both_and_agrees(task, alone):
  result = sweep(task, POINTS, engine="auto", **OPTIONS)
  assert result.engine in ("vmap", "map")
  np.testing.assert_allclose(result.metrics["distance"][:, 0], [r.rows[0]["distance"] for r in alone], rtol=1e-3)


@pytest.mark.parametrize("change, message", [
  ({"engine": "fast"}, "engine must be one of"),
  ({"eval_every": 30}, "eval_every must be a positive divisor"),
  ({"seeds": []}, "at least one point and one seed"),
])  # fmt: skip
def test_bad_arguments(task, change, message):
  with pytest.raises(ValueError, match=message):
    sweep(task, POINTS, **{**OPTIONS, **change})


def test_unknown_hyperparameter(task):
  with pytest.raises(ValueError, match="unknown hyperparameters"):
    sweep(task, {"rate": [1.0]}, **OPTIONS)
  with pytest.raises(ValueError, match="equally long"):
    sweep(examples.least_squares(), {"learning_rate": [1.0], "x": [1.0, 2.0]}, **OPTIONS)


def test_metrics_by_point(task):
  result = sweep(task, POINTS, engine="vmap", **OPTIONS)
  by_point = result.by_point("distance")
  assert by_point.shape == (3, 2, 2)
  np.testing.assert_array_equal(by_point[1, 0], result.metrics["distance"][2])
