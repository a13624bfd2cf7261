"""`verify`: taken up after a kill, another experiment refused, one failure among many, records that stay apart."""

import dataclasses
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time
import types

import numpy as np
import pytest

from experiments import __main__ as cli
from experiments.harness import identity, records, registry, report, verification
from experiments.harness.trials import Trials
from tests.experiments import tiny_recipe

ROOT = pathlib.Path(cli.__file__).parent.parent
TINY = "tests.experiments.tiny_recipe"
SEEDS = [100, 101]


def tiny(**changes):
  """The tiny recipe with some of its functions changed."""
  return types.SimpleNamespace(**{**vars(tiny_recipe), **changes})


def run(folder, recipe=tiny_recipe, config=tiny_recipe.PRESETS["smoke"], seeds=SEEDS):
  return verification.verify(recipe, TINY, "smoke", config, seeds, folder, progress=False)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
  folder = tmp_path_factory.mktemp("finished") / "smoke"
  return folder, run(folder)


@pytest.fixture
def copy(finished, tmp_path):
  return shutil.copytree(finished[0], tmp_path / "copy"), finished[1]


def test_a_record_says_how_it_was_made(finished):
  folder, record = finished
  written = json.loads((folder / "record.json").read_text())
  assert written == json.loads(json.dumps(records.strict(record)))
  fields = {"recipe", "preset", "config", "seeds", "versions", "code", "commit", "dirty", "device", "machine", "date"}
  assert fields <= set(written)
  assert written["engines"] == {"rates": "vmap", "better rate": "vmap"}
  assert written["wall_seconds"] > 0 and written["resumed"] is False and written["card"] == "00-tiny"
  assert written["claims"][0]["verdict"] == "undecided"  # two seeds


def test_the_commit_and_whether_there_are_changes(tmp_path, monkeypatch):
  monkeypatch.setattr(registry, "ROOT", tmp_path / "experiments")
  (tmp_path / "experiments" / "results").mkdir(parents=True)
  assert records.commit() == {"commit": None, "dirty": None}
  git = lambda *words: subprocess.run(
    ["git", "-c", "user.name=a", "-c", "user.email=b", *words], cwd=tmp_path, check=True
  )
  git("init", "-q")
  git("commit", "-q", "--allow-empty", "-m", "first")
  (tmp_path / "experiments" / "results" / "record.json").write_text("")
  found = records.commit()
  assert len(found["commit"]) == 40 and found["dirty"] is False  # records are no code
  (tmp_path / "experiments" / "new.py").write_text("")
  assert records.commit() == {**found, "dirty": True}


def test_a_finished_folder_is_judged_again_without_training(copy, monkeypatch):
  folder, record = copy
  monkeypatch.setattr(verification, "run_cells", None)
  assert run(folder) == record


def test_a_crash_after_training_costs_nothing(copy):
  """Figures and claims may be mended: what trains is the same, and the table was saved at once."""
  folder, record = copy
  (folder / "record.json").unlink()
  mended = run(folder, tiny(figure=lambda *_: None, cells=None, measure=None, __file__=tiny_recipe.__file__))
  assert mended == record


def test_a_kill_in_the_middle(tmp_path):
  """What was trained before is not trained again."""

  def killed(config, seeds, trained):
    raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    run(tmp_path, tiny(measure=killed))
  assert not (tmp_path / "trials.npz").exists()
  pieces = {path: path.read_bytes() for path in (tmp_path / "cells").rglob("*.npz")}
  assert pieces
  record = run(tmp_path)
  assert record["resumed"] is True
  assert all(path.read_bytes() == content for path, content in pieces.items())


def test_measurements_are_not_made_twice(copy):
  folder, record = copy
  (folder / "trials.npz").unlink()
  again = run(folder, tiny(measure=None))
  assert again["claims"] == record["claims"]
  (kept,) = (folder / "cells").glob("measured-*.npz")
  np.testing.assert_equal(Trials.load(folder / "trials.npz").measured, Trials.load(kept).measured)


def test_more_seeds_go_on(copy):
  folder, record = copy
  before = {path for path in (folder / "cells").rglob("*.npz")}
  more = run(folder, seeds=[100, 101, 102, 103, 104])
  assert more["claims"][0]["values"][:2] == pytest.approx(record["claims"][0]["values"], rel=1e-3)
  assert more["claims"][0]["verdict"] == "reproduced" and more["seeds"] == [100, 101, 102, 103, 104]
  assert before < {path for path in (folder / "cells").rglob("*.npz")}  # the first two were not trained again
  assert Trials.load(folder / "trials.npz").seeds.tolist() == more["seeds"]


@pytest.mark.parametrize("change, message", [
  ({"config": dataclasses.replace(tiny_recipe.PRESETS["smoke"], steps=40)}, "config.steps is 20 there and 40 here"),
  ({"seeds": [101, 102]}, r"seeds is \[100, 101\] there and \[101, 102\] here"),
  ({"seeds": [100]}, r"seeds is \[100, 101\] there and \[100\] here"),
])  # fmt: skip
def test_another_experiment_is_refused(copy, change, message):
  folder, _ = copy
  before = (folder / "config.json").read_bytes()
  with pytest.raises(ValueError, match=f"holds another experiment: {message}"):
    run(folder, **change)
  assert (folder / "config.json").read_bytes() == before and (folder / "trials.npz").exists()


def test_trials_of_nobody_are_refused(copy):
  folder, _ = copy
  (folder / "config.json").unlink()
  with pytest.raises(ValueError, match="without a config.json"):
    run(folder)


def test_other_code_makes_the_tables_again(copy, monkeypatch):
  folder, _ = copy
  monkeypatch.setattr(identity, "code", lambda _: "other")
  calls = []
  measure = lambda *arguments: calls.append(1) or tiny_recipe.measure(*arguments)
  assert run(folder, tiny(measure=measure))["code"] == "other" and calls


def test_the_hash_of_the_code_is_that_of_what_trains(tmp_path):
  source = pathlib.Path(tiny_recipe.__file__).read_text()
  path = tmp_path / "recipe.py"
  recipe = types.SimpleNamespace(__file__=str(path))

  def code(old, new):
    assert old in source
    path.write_text(source.replace(old, new))
    return identity.code(recipe)

  same = code("x", "x")
  assert code("comes closer to the truth", "is nearer") == same
  assert code("plots.bars", "plots.curves") == same
  assert code("steps // 2", "steps // 4") != same
  assert code("np.linalg.norm(weights, axis=-1)", "np.abs(weights).sum(-1)") != same
  assert code("from jaxreg.training import grid", "from jaxreg.training.sweeping import grid") != same


def write_recipe(folder, name, body=""):
  (folder / f"{name}.py").write_text(f"from {TINY} import *\n{body}\n")
  return f"{name}"


def test_one_failing_recipe_does_not_end_the_list(tmp_path, monkeypatch, capsys):
  (tmp_path / "mine").mkdir()
  monkeypatch.syspath_prepend(tmp_path)
  write_recipe(tmp_path / "mine", "good")
  write_recipe(tmp_path / "mine", "bad", "def measure(config, seeds, trained):\n  return {'norm': 1 / 0}")
  assert cli.main(["verify", "mine.bad", "mine.good", "--preset", "smoke", "--seeds", "2"]) == 1
  out, err = capsys.readouterr()
  assert "error: mine.bad: ZeroDivisionError: division by zero" in err and "failed: mine.bad" in err
  assert "Traceback" not in err and (tmp_path / "runs" / "mine.bad" / "smoke" / "traceback.txt").exists()
  assert (tmp_path / "runs" / "mine.good" / "smoke" / "record.json").exists() and "undecided" in out
  assert all(len(line) <= 80 for line in out.splitlines())


def test_presets_and_other_recipes_stay_apart(tmp_path, monkeypatch):
  """`verify` writes to `runs/`; with `--commit` to the folder of its preset alone."""
  monkeypatch.setattr(records, "RESULTS", tmp_path / "results")
  monkeypatch.setattr(report, "LEDGER", tmp_path / "LEDGER.md")
  monkeypatch.setattr(report, "README", tmp_path / "README.md")
  entry = registry.Entry("tiny", TINY, "Tiny | recipe", "00-tiny", ("smoke", "cpu", "other"), True)
  monkeypatch.setattr(registry, "entries", lambda: {"tiny": entry})
  monkeypatch.setattr(tiny_recipe, "PRESETS", {**tiny_recipe.PRESETS, "other": tiny_recipe.Config(steps=40)})
  assert cli.main(["verify", "tiny", "--seeds", "5"]) == 0
  assert not (tmp_path / "results").exists()
  assert cli.main(["verify", "--seeds", "5", "--commit"]) == 0
  first = {path.name: path.read_bytes() for path in (tmp_path / "results" / "tiny" / "cpu").iterdir()}
  assert set(first) == set(verification.FILES)
  assert cli.main(["verify", "tiny", "--preset", "other", "--seeds", "5", "--commit"]) == 0
  assert {path.name: path.read_bytes() for path in (tmp_path / "results" / "tiny" / "cpu").iterdir()} == first
  ledger = (tmp_path / "LEDGER.md").read_text()
  assert "### Preset cpu" in ledger and "### Preset other" in ledger and "## 00-tiny: Tiny | recipe" in ledger


def test_missing_data_are_said_in_a_sentence_and_the_list_goes_on(tmp_path, monkeypatch, capsys):
  (tmp_path / "own").mkdir()
  monkeypatch.syspath_prepend(tmp_path)
  body = (
    "from jaxreg.data import MissingDataError\nfrom experiments.harness.trials import Cell\n"
    "def missing():\n  raise MissingDataError('set x is not here; prepare it with y.')\n"
    "PRESETS = {'paper': Config(steps=20)}\n"
    "def cell(config):\n  return Cell(dataclasses.replace(least_squares(), config=config, data=missing), 20)\n"
    "def untrained(trials):\n  raise AssertionError('something was trained before')\n"
    "def cells(config, seeds):\n"
    "  return {'first': Cell(least_squares(), 20, untrained), 'stream': cell(config)}\n"
  )
  write_recipe(tmp_path / "own", "missing", body)
  write_recipe(tmp_path / "own", "other", "PRESETS = {'paper': Config(steps=20)}")
  assert cli.main(["verify", "own.missing", "own.other", "--preset", "paper"]) == 1
  err = capsys.readouterr().err
  assert "error: own.missing: set x is not here; prepare it with y." in err
  assert "error: own.other: verify cannot run preset paper of own.other: none of the cells" in err


@pytest.mark.parametrize("arguments, message", [
  (["tests.experiments.tiny_recipe", "--preset", "paper"], "unknown preset 'paper' of tests.experiments.tiny_recipe"),
  (["noisy_labels", "--preset", "smoke"], "noisy_labels states no claims"),
  (["tests.experiments.tiny_recipe", "--commit"], "is no recipe of this repository"),
  (["tests.experiments.tiny_recipe", "--preset", "smoke", "--commit"], "cannot commit preset smoke"),
])  # fmt: skip
def test_what_verify_refuses(arguments, message, capsys):
  assert cli.main(["verify", *arguments]) == 2
  assert message in capsys.readouterr().err


def test_a_papers_preset_is_not_replaced_by_a_smaller_one(tmp_path):
  with pytest.raises(ValueError, match="verify cannot run preset paper of tiny: none of the cells .* data set"):
    verification.verify(tiny_recipe, "tiny", "paper", tiny_recipe.PRESETS["cpu"], SEEDS, tmp_path)


def test_a_process_that_is_killed(tmp_path):
  """SIGTERM in the middle of the second cell: not exit code 0, and the first cell is there for the next time."""
  (tmp_path / "slow.py").write_text(
    f"from {TINY} import *\nimport {TINY} as tiny, time, pathlib\n"
    "def measure(config, seeds, trained):\n"
    "  pathlib.Path('measuring').touch()\n  time.sleep(60 if not pathlib.Path('again').exists() else 0)\n"
    "  return tiny.measure(config, seeds, trained)\n"
  )
  (tmp_path / "mine").mkdir()
  (tmp_path / "slow.py").rename(tmp_path / "mine" / "slow.py")
  command = [sys.executable, "-m", "experiments", "verify", "mine.slow", "--preset", "smoke", "--seeds", "2"]
  paths = os.pathsep.join(map(str, (tmp_path, ROOT)))
  environment = {**os.environ, "PYTHONPATH": paths, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"}
  process = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL)
  deadline = time.monotonic() + 100
  while not (tmp_path / "measuring").exists():
    assert process.poll() is None and time.monotonic() < deadline
    time.sleep(0.1)
  process.send_signal(signal.SIGTERM)
  assert process.wait(timeout=60) != 0
  (tmp_path / "again").touch()
  done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  record = json.loads((tmp_path / "runs" / "mine.slow" / "smoke" / "record.json").read_text())
  assert record["resumed"] is True
