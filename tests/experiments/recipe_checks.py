"""What every recipe is tested for; `papers/test_<name>.py` calls these, so that workers share the load.

    from tests.experiments import recipe_checks


    def test_smoke(tmp_path):
      recipe_checks.check_smoke("elr", tmp_path)


    def test_run_and_predict(tmp_path):
      recipe_checks.check_run_and_predict("elr", tmp_path)

and, of a recipe with a `paper` preset,

    def test_paper_step():
      recipe_checks.check_paper_step("elr")


    def test_paper_ten_steps(tmp_path):
      recipe_checks.check_paper_ten_steps("elr", tmp_path)
"""

import contextlib
import dataclasses
import json

import jax
import numpy as np

from experiments.harness import full_scale, registry, verification
from experiments.harness.trials import Cell, Trials
from jaxreg.data import write_tfds
from jaxreg.training import data_mesh, fit, predict, program

SEEDS = [100, 101]


def check_smoke(name: str, tmp_path) -> None:
  """The smoke preset trains, is judged and drawn; the saved table alone gives the same record and figure again."""
  recipe = registry.recipe(name)
  config = registry.preset(recipe, "smoke")
  record = verification.verify(recipe, name, "smoke", config, SEEDS, tmp_path / "smoke", progress=False)
  assert [claim["name"] for claim in record["claims"]] == [claim.name for claim in recipe.claims(config)]
  assert all(len(claim["values"]) == len(SEEDS) for claim in record["claims"])
  written = json.loads((tmp_path / "smoke" / "record.json").read_text(), parse_constant=_no_constants)
  assert written["seeds"] == SEEDS
  assert (tmp_path / "smoke" / "figure.png").stat().st_size > 10_000
  again = Trials.load(tmp_path / "smoke" / "trials.npz")
  judged = verification.judged(recipe, config, again)
  np.testing.assert_equal(judged, {key: record[key] for key in judged})
  recipe.figure(config, verification.summary(recipe, config, again), tmp_path / "again.png")
  assert (tmp_path / "again.png").exists()


def check_run_and_predict(name: str, tmp_path, *, inputs=None) -> None:
  """Two steps of the smoke preset's cell by `fit`; `predict` from the checkpoint equals the task's own."""
  cell: Cell = registry.recipe(name).cell(registry.preset(registry.recipe(name), "smoke"))
  task = cell.task
  assert task.config is not None and dataclasses.is_dataclass(task.config)
  assert not callable(cell.points) and set(cell.points) <= set(task.hparams)
  result = fit(task, folder=tmp_path / "run", progress=False, steps=2, log_every=1, eval_every=2)
  assert np.isfinite(result.rows[-1]["loss"])
  inputs = task.data[task.computation.cast[0]][:3] if inputs is None else inputs
  outputs = predict(task, tmp_path / "run", inputs)
  jax.tree.map(np.testing.assert_allclose, outputs, jax.jit(task.predict)(result.state, inputs))


def check_paper_step(name: str) -> None:
  """The paper preset's step compiles at full shape on a virtual mesh and fits a large accelerator's memory."""
  recipe = registry.recipe(name)
  config = registry.preset(recipe, "paper")
  task, batch = recipe.cell(config).task, recipe.paper_batch(config)
  assert callable(task.data), "a paper preset reads a stream"
  assert task.held_out is not None, "a paper preset measures held-out data"
  assert all(shape.shape[0] == task.batch_size for shape in batch.values())
  with _programs_stay_out_of_the_cache():
    compiled = full_scale.compile_step(task, batch, data_mesh(jax.devices()))
  needed = program.needed_bytes(compiled)
  print(f"{name}: {needed / 2**30:.2f} GiB per device")
  assert 0 < needed < 80 * 2**30  # what one H100 or two TPU v4 chips hold


def check_paper_ten_steps(name: str, tmp_path) -> None:
  """Ten steps at reduced width from a generated set, and an evaluation on its held-out split."""
  recipe = registry.recipe(name)
  config = recipe.reduced(registry.preset(recipe, "paper"))
  config = dataclasses.replace(config, data_dir=str(tmp_path / "sets"))
  for dataset, splits in recipe.paper_sets(config).items():
    write_tfds(dataset, splits, data_dir=tmp_path / "sets")
  task = recipe.cell(config).task
  with contextlib.closing(task.data()) as stream:
    first = next(stream)
  shapes = {key: (value.shape, value.dtype) for key, value in first.items()}
  assert shapes == {key: (spec.shape, spec.dtype) for key, spec in recipe.paper_batch(config).items()}
  result = fit(task, steps=10, log_every=5, progress=False, mesh=data_mesh(jax.devices()))
  assert [row["step"] for row in result.rows] == [5, 10]
  assert all(np.isfinite(row["loss"]) for row in result.rows)
  held_out = set(result.rows[-1]) - set(result.rows[0])
  assert held_out, "the evaluation measures nothing on held-out data"
  assert all(np.isfinite(result.rows[-1][key]) for key in held_out)


@contextlib.contextmanager
def _programs_stay_out_of_the_cache():
  """Writing executables of this size to the compilation cache has crashed the process inside of XLA."""
  name = "jax_persistent_cache_min_compile_time_secs"
  before = getattr(jax.config, name)
  jax.config.update(name, 1e9)
  try:
    yield
  finally:
    jax.config.update(name, before)


def _no_constants(text: str):
  raise ValueError(f"{text} is not JSON")
