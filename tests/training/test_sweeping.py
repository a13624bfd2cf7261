"""`sweep`: both engines against the same trial run alone, divergence, memory chunks, resuming, placement."""

import csv
import importlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

from jaxreg.training import examples, fit, gradient_task, grid, program, sweep, sweep_settings, trial_mesh
from jaxreg.training import mesh as mesh_lib

module = importlib.import_module("jaxreg.training.sweeping")  # the name `sweep` is the function
KINDS = (("learning_rate", "float32"),)
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


def test_trials_fit_the_memory_budget_and_change_nothing(task):
  mesh = trial_mesh(jax.devices()[:2])
  whole = sweep(task, POINTS, engine="map", mesh=mesh, **OPTIONS)
  need = program.needed_bytes(program.compiled(program.lowered_engine, task, mesh, 2, KINDS, "map", 1, 50))
  runner = module._Runner(task, mesh, 1, 100, 50, need + 10, True, whole.hparams, whole.seeds)
  runner._engine = "map"
  assert runner._fitting_size(6) == 2
  cut = sweep(task, POINTS, engine="map", mesh=mesh, memory_budget=need + 10, **OPTIONS)
  np.testing.assert_array_equal(cut.params["w"], whole.params["w"])


def test_a_budget_below_one_trial_warns(task):
  with pytest.warns(UserWarning, match="more than the budget of 1"):
    sweep(task, {"learning_rate": [0.01]}, engine="map", mesh=trial_mesh(jax.devices()[:1]), memory_budget=1, **OPTIONS)


def test_resumes_piece_by_piece(task, tmp_path, monkeypatch):
  options = {**OPTIONS, "engine": "map", "mesh": trial_mesh(jax.devices()[:2]), "folder": tmp_path}
  monkeypatch.setattr(module, "PIECE_SECONDS", 0.0)  # one trial per device and piece
  run, calls = module._Runner._run, []

  def dies_at_third(self, part, *rest):
    calls.append(part)
    if len(calls) == 3:
      raise KeyboardInterrupt
    return run(self, part, *rest)

  monkeypatch.setattr(module._Runner, "_run", dies_at_third)
  with pytest.raises(KeyboardInterrupt):
    sweep(task, POINTS, **options)
  assert len(list(tmp_path.glob("trials/piece-*.npz"))) == 2
  result = sweep(task, POINTS, **options)
  assert [len(part) for part in calls] == [2, 2, 2, 2]
  whole = sweep(task, POINTS, engine="map", **OPTIONS)
  np.testing.assert_array_equal(result.params["w"], whole.params["w"])
  np.testing.assert_array_equal(result.metrics["distance"], whole.metrics["distance"])


def test_more_points_and_seeds_continue(task, tmp_path, monkeypatch):
  options = {**OPTIONS, "engine": "map", "folder": tmp_path}
  sweep(task, POINTS, **options)
  ran, run = [], module._Runner._run
  monkeypatch.setattr(module._Runner, "_run", lambda self, part, *rest: ran.append(len(part)) or run(self, part, *rest))
  wider = {"learning_rate": [0.1, 0.2, 0.01]}
  result = sweep(task, wider, **{**options, "seeds": [3, 5, 4]})
  assert sum(ran) == 9 - 4  # two rates with seeds 3 and 4 were there
  np.testing.assert_array_equal(
    result.params["w"], sweep(task, wider, **{**OPTIONS, "seeds": [3, 5, 4]}, engine="map").params["w"]
  )


@pytest.mark.parametrize("engine, lanes, pieces", [("map", 1, 6), ("vmap", 1, 6), ("map", 2, 3)])
def test_long_sweeps_are_cut_into_pieces(task, tmp_path, monkeypatch, engine, lanes, pieces):
  monkeypatch.setattr(module, "PIECE_SECONDS", 1e-9)
  sweep(task, POINTS, engine=engine, lanes=lanes, mesh=trial_mesh(jax.devices()[:1]), folder=tmp_path, **OPTIONS)
  assert len(list(tmp_path.glob("trials/piece-*.npz"))) == pieces


def test_each_device_runs_its_own_trials_only(task):
  """`lax.map` under plain sharded jit makes every device run every trial; the compiled program shows it does not."""
  mesh = trial_mesh(jax.devices()[:4])
  compiled = program.compiled(program.lowered_engine, task, mesh, 8, KINDS, "map", 1, 50)
  text = compiled.as_text()
  assert not re.search(r"all-gather|all-reduce|collective-permute", text)
  assert "f32[2,4]" in text and "f32[8,4]" not in text  # two of the eight trials' weights on a device
  seeds, rates = mesh_lib.shard((np.arange(8, dtype=np.uint32), np.ones(8, np.float32)), mesh, PartitionSpec("trial"))
  state = program.compiled(program.lowered_init, task, mesh, 8, KINDS)(seeds, {"learning_rate": rates})
  data, count, trials = mesh_lib.replicate((task.data, np.int32(50), np.int32(2)), mesh)
  out, *_ = compiled(state, {"learning_rate": rates}, data, count, trials)
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


def test_settings_stay_in_their_folder(tmp_path):
  point = (examples.least_squares(), grid(learning_rate=[0.02]))
  for name in ("../outside", "/outside", "a/b", "..", "", None):
    with pytest.raises(ValueError, match="a setting must be the name of a file or folder, without path parts"):
      sweep_settings({"inside": point, name: point}, seeds=[0], steps=5, folder=tmp_path / "sweep", progress=False)
  assert not list(tmp_path.iterdir())  # refused before anything is trained


def test_the_automatic_engine_is_one_of_both_and_agrees(task, alone):
  result = sweep(task, POINTS, engine="auto", **OPTIONS)
  assert result.engine in ("vmap", "map")
  np.testing.assert_allclose(result.metrics["distance"][:, 0], [r.rows[0]["distance"] for r in alone], rtol=1e-3)


@pytest.mark.parametrize("change, message", [
  ({"engine": "fast"}, "engine must be one of"),
  ({"eval_every": 30}, "eval_every must be a positive divisor"),
  ({"seeds": []}, "seeds must be one or more different integers"),
  ({"seeds": 3}, r"seeds must be a sequence of integers, such as range\(5\), got 3"),
  ({"seeds": [1.7]}, "a seed must be an integer"),
  ({"seeds": [-1]}, r"a seed must be an integer in \[0, 2\*\*32\)"),
  ({"seeds": [2**32]}, "a seed must be an integer"),
  ({"seeds": [1, 1]}, "different integers"),
  ({"steps": 0}, "steps must be a positive integer"),
  ({"lanes": 0}, "lanes must be a positive integer"),
  ({"memory_budget": -1}, "memory_budget must be positive"),
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


def test_the_best_point_is_selected_by_its_mean_over_seeds(task):
  result = sweep(task, {"learning_rate": [0.01, 1e8, 0.05]}, engine="map", **OPTIONS)
  means = result.by_point("distance")[:, :, -1].mean(1)[[0, 2]]
  rates = np.float32([0.01, 0.05])
  assert result.select("distance", maximize=False)["learning_rate"] == rates[means.argmin()]
  assert result.select("distance")["learning_rate"] == rates[means.argmax()]  # the diverged one is worst either way


def test_tables(task, tmp_path):
  result = sweep(task, POINTS, engine="map", **OPTIONS)
  result.to_csv(tmp_path / "trials.csv")
  with open(tmp_path / "trials.csv", encoding="utf-8") as file:
    rows = list(csv.DictReader(file))
  assert len(rows) == 12 and float(rows[3]["distance"]) == result.rows()[3]["distance"]
  pandas = pytest.importorskip("pandas")
  frame = result.to_dataframe()
  assert isinstance(frame, pandas.DataFrame) and len(frame) == 12


@pytest.mark.parametrize("points, expected", [
  ({"learning_rate": [0, 1]}, [0.0, 1.0]),
  ({"learning_rate": [1, 0.05]}, [1.0, np.float32(0.05)]),
  ({"learning_rate": np.array([0.05, 0.1])}, [np.float32(0.05), np.float32(0.1)]),
])  # fmt: skip
@pytest.mark.parametrize("default", [0.05, 1])
@pytest.mark.parametrize("engine", ["map", "vmap"])
def test_whole_numbers_among_the_values_stay_what_they_are(task, points, expected, default, engine):
  one = task.replace(hparams={"learning_rate": default})
  result = sweep(one, points, seeds=[0], steps=10, engine=engine, progress=False)
  assert result.hparams["learning_rate"].tolist() == expected


def test_metrics_must_be_scalars_with_names_of_their_own(task):
  for metrics, message in (({"w": np.ones(3)}, r"w of evaluate must be a scalar, got shape \(3,\)"),
                           ({"step": 1.0}, "must not be called step")):  # fmt: skip
    bad = task.replace(evaluate=lambda state, hparams, metrics=metrics: metrics)
    with pytest.raises(ValueError, match=message):
      sweep(bad, POINTS, engine="map", **OPTIONS)
    with pytest.raises(ValueError, match=message):
      fit(bad, steps=10, log_every=10, progress=False)


def test_a_step_that_does_not_count_is_refused(task):
  def step(state, batch, hparams):
    new, metrics = task.step(state, batch, hparams)
    return new._replace(step=state.step), metrics

  stuck = task.replace(step=step)
  for run in (lambda: sweep(stuck, POINTS, engine="map", **OPTIONS), lambda: fit(stuck, steps=10, progress=False)):
    with pytest.raises(ValueError, match="must return state.advance"):
      run()


@pytest.mark.parametrize("engine", ["map", "vmap"])
def test_leaves_of_less_than_a_byte(engine, tmp_path):
  """Stored int4 weights among what is not trained."""
  rng = np.random.default_rng(0)
  weights = jnp.asarray([3, -8, 7], jnp.int4)

  def objective(params, extra, batch, context):
    outputs = batch["x"] @ (params["scale"] * extra["weights"].astype(jnp.float32))
    return jnp.mean((outputs - batch["y"]) ** 2), (extra, {})

  task = gradient_task(
    lambda key, hparams: ({"scale": jnp.ones(3)}, {"weights": weights}),
    objective,
    lambda hparams: optax.sgd(hparams["learning_rate"]),
    data={"x": rng.normal(size=(32, 3)).astype(np.float32), "y": rng.normal(size=32).astype(np.float32)},
    batch_size=8,
    hparams={"learning_rate": 0.01},
  )
  options = dict(seeds=[0, 1], steps=4, engine=engine, progress=False, keep_params=True, folder=tmp_path)
  result = sweep(task, grid(learning_rate=[0.01, 0.02]), **options)
  again = sweep(task, grid(learning_rate=[0.01, 0.02]), **options)
  for one in (result, again):
    assert one.extra["weights"].dtype == jnp.int4
    np.testing.assert_array_equal(
      np.asarray(one.extra["weights"], np.int8), np.tile([3, -8, 7], (*one.extra["weights"].shape[:-1], 1))
    )
  np.testing.assert_array_equal(again.params["scale"], result.params["scale"])
