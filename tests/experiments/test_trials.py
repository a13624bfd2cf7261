"""The table of trials: cells are trained into it, it is saved exactly, and points are found by their values."""

import dataclasses
import types

import jax.numpy as jnp
import numpy as np
import pytest

from experiments.harness.trials import Cell, CellTrials, Interrupted, Trials, run_cells, safe_name
from jaxreg.training.examples import least_squares
from tests.experiments import tiny_recipe

CONFIG = tiny_recipe.PRESETS["smoke"]


class Batches:
  """The examples of a task in order, as a stream whose position can be set."""

  def __init__(self, data, size, epochs=None):
    self.data, self.size, self.epochs, self.position = data, size, epochs, 0
    self.identity = "examples in order"

  def __iter__(self):
    return self

  def __next__(self):
    count = len(self.data["x"]) // self.size
    if self.epochs is not None and self.position >= count * self.epochs:
      raise StopIteration
    ids = np.arange(self.size, dtype=np.int32) + self.position % count * self.size
    self.position += 1
    return {**{name: value[ids] for name, value in self.data.items()}, "id": ids}

  def get_state(self):
    return str(self.position).encode()

  def set_state(self, state):
    self.position = int(state)

  def close(self):
    pass


def streamed(config):
  task = dataclasses.replace(least_squares(), config=config)
  return dataclasses.replace(task, data=lambda: Batches(task.data, 16))


def recipe(cells):
  return types.SimpleNamespace(cells=lambda config, seeds: cells)


@pytest.fixture(scope="module")
def trials():
  return run_cells(tiny_recipe, CONFIG, [100, 101, 102], progress=False)


def test_cells_and_measurements_fill_the_table(trials):
  rates = trials["rates"]
  assert rates.metrics["distance"].shape == (2, 3, 2) and rates.last("distance").shape == (2, 3)
  assert rates.seeds.tolist() == [100, 101, 102] and rates.steps.tolist() == [10, 20]
  assert rates.engine == "vmap" and (rates.diverged_at == -1).all()
  np.testing.assert_array_equal(rates.at("distance", learning_rate=0.05), rates.metrics["distance"][1])
  # Points that depend on the cell before, and parameters that reach `measure`.
  np.testing.assert_allclose(trials["better rate"].hparams["learning_rate"], [0.05])
  np.testing.assert_allclose(trials["better rate"].last("distance")[0], rates.last("distance")[1], rtol=1e-3)
  assert trials.measured["norm"].shape == (3,)


def test_save_and_load_are_exact_and_without_pickle(trials, tmp_path):
  odd = dataclasses.replace(trials, measured={**trials.measured, "a/b c": np.float64([1 / 3, np.nan, np.inf]), "half":
                                              jnp.bfloat16([1.5, 2, 3])})  # fmt: skip
  odd.save(tmp_path / "new" / "trials.npz")
  again = Trials.load(tmp_path / "new" / "trials.npz")
  assert list(again.cells) == list(odd.cells) and set(again.measured) == set(odd.measured)
  for name, cell in odd.cells.items():
    np.testing.assert_equal(dict(again[name]._asdict()), dict(cell._asdict()))
  for name, value in odd.measured.items():
    np.testing.assert_array_equal(again.measured[name], np.asarray(value, np.float32 if name == "half" else None))
  assert again.measured["names"][0] == "é|\n" and again.measured["names"].dtype.kind == "U"
  before = (tmp_path / "new" / "trials.npz").read_bytes()
  again.save(tmp_path / "new" / "trials.npz")
  assert (tmp_path / "new" / "trials.npz").read_bytes() == before
  assert [path.name for path in (tmp_path / "new").iterdir()] == ["trials.npz"]


def test_an_empty_table_and_objects(tmp_path):
  Trials(np.arange(3)).save(tmp_path / "trials.npz")
  assert Trials.load(tmp_path / "trials.npz").cells == {}
  with pytest.raises(ValueError, match="measured/x must be numbers or text"):
    Trials(np.arange(1), {}, {"x": np.array([{}], object)}).save(tmp_path / "trials.npz")


def test_lookups_say_what_exists(trials):
  with pytest.raises(KeyError, match="no cell 'rate'; there are rates, better rate"):
    trials["rate"]
  with pytest.raises(KeyError, match="no metric 'los'; there are .*loss"):
    trials["rates"].last("los")
  with pytest.raises(KeyError, match="no hyperparameter rate; there are learning_rate"):
    trials["rates"].at("loss", rate=1)
  with pytest.raises(KeyError, match=r"0 points have .* there are learning_rate \[0.001"):
    trials["rates"].at("loss", learning_rate=0.5)
  with pytest.raises(KeyError, match="2 points have"):
    trials["rates"].at("loss")


def test_a_value_of_zero_is_found():
  cell = CellTrials({"w": np.float32([0, 1e-9])}, np.arange(1), np.arange(1), {"m": np.arange(2.0).reshape(2, 1, 1)},
                    np.full((2, 1), -1), "map")  # fmt: skip
  assert cell.at("m", w=0.0).item() == 0 and cell.at("m", w=1e-9).item() == 1


def test_a_stream_is_trained_run_by_run(tmp_path):
  cell = Cell(streamed(CONFIG), 20, {"learning_rate": [0.01, 0.05]}, eval_every=10, log_every=5, keep_params=True)
  kept = types.SimpleNamespace(
    cells=lambda config, seeds: {"stream": cell},
    measure=lambda config, seeds, trained: {
      "w": trained["stream"].params["w"].reshape(2, len(seeds), -1).swapaxes(0, 1)
    },
  )
  trials = run_cells(kept, CONFIG, [100, 101], tmp_path, progress=False)
  table = trials["stream"]
  assert table.engine == "fit" and table.metrics["distance"].shape == (2, 2, 2) and table.steps.tolist() == [10, 20]
  assert trials.measured["w"].shape == (2, 2, 4)
  np.testing.assert_allclose(table.hparams["learning_rate"], [0.01, 0.05])
  again = run_cells(kept, CONFIG, [100, 101], tmp_path, progress=False)
  np.testing.assert_equal(again["stream"].metrics, table.metrics)


def test_seeds_of_a_cell(tmp_path):
  cell = tiny_recipe.cell(CONFIG)._replace(seeds=[7])
  trials = run_cells(recipe({"one": cell}), CONFIG, [100, 101], tmp_path, progress=False)
  assert trials.seeds.tolist() == [100, 101] and trials["one"].seeds.tolist() == [7]


def test_measurements_need_a_row_per_seed():
  wrong = types.SimpleNamespace(measure=lambda config, seeds, trained: {"x": np.zeros(3)})
  with pytest.raises(ValueError, match=r"\[seeds, ...\]; 'x' is \(3,\) for 2 seeds"):
    run_cells(wrong, CONFIG, [100, 101])


def test_an_interrupted_run_ends_the_verification(monkeypatch):
  stopped = types.SimpleNamespace(interrupted=15, state=types.SimpleNamespace(step=3))
  monkeypatch.setattr("experiments.harness.trials.fit", lambda *_, **__: stopped)
  with pytest.raises(Interrupted, match="at step 3 of 20") as caught:
    run_cells(recipe({"stream": Cell(streamed(CONFIG), 20)}), CONFIG, [100], progress=False)
  assert caught.value.signal == 15


def test_names_of_folders_stay_different():
  assert safe_name("elr_plus-0.4") == "elr_plus-0.4"
  assert len({safe_name("a b"), safe_name("a/b"), safe_name("a-b")}) == 3
