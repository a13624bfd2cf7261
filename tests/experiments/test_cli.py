"""The command line: quick answers, clear errors, exit codes; runs and sweeps that can be taken up again."""

import json
import pathlib
import re
import signal
import subprocess
import sys
import time
import types

import jax
import pytest

import jaxreg.training
from experiments import __main__ as cli
from experiments.harness import commands, options, records, tables
from jaxreg.training import checkpoint

ROOT = pathlib.Path(cli.__file__).parent.parent
TINY = "tests.experiments.tiny_recipe"


@pytest.fixture(autouse=True)
def eighty_columns(monkeypatch):
  monkeypatch.setenv("COLUMNS", "80")


def folders(tmp_path, pattern="*"):
  return sorted(path.name for path in (tmp_path / "runs").glob(pattern))


@pytest.mark.parametrize("arguments, words", [
  (["--help"], "verify"), (["list"], "noisy_labels"), (["list", "--help"], "usage"), (["report", "--help"], "usage"),
])  # fmt: skip
def test_help_and_list_answer_quickly_without_jax(arguments, words):
  code = (
    "import sys, runpy\nsys.argv = ['experiments', *sys.argv[1:]]\n"
    "try: runpy.run_module('experiments', run_name='__main__')\nfinally: print('jax' in sys.modules)"
  )
  began = time.perf_counter()
  answer = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, cwd=ROOT)
  assert time.perf_counter() - began < 3
  assert answer.returncode == 0, answer.stderr
  assert answer.stdout.rstrip().endswith("False")
  assert words in answer.stdout
  assert all(len(line) <= 80 for line in answer.stdout.splitlines())


def test_list_is_readable_at_80_columns(capsys):
  assert cli.main(["list"]) == 0
  out = capsys.readouterr().out
  assert "…" not in out and "generative_linear_probe" in out
  assert all(len(line) <= 80 for line in out.splitlines())


@pytest.mark.parametrize("arguments, words", [
  (["run", "--help"], ["NAME is a module path", "noisy_labels"]),
  (["sweep", "--help"], ["NAME is a module path"]),
  (["run", TINY, "--help"], ["learning_rate=0.05", "--set", "--config.features", "--seed"]),
  (["sweep", TINY, "smoke", "--help"], ["learning_rate=0.05", "--set", "--grid", "--steps", "--seeds"]),
  (["verify", "--help"], ["--commit", "--first-seed"]),
  (["bench", "--help"], ["overhead", "--repeats"]),
  (["demo", "--help"], ["--preset", "--engine"]),
])  # fmt: skip
def test_help(arguments, words, capsys):
  with pytest.raises(SystemExit) as stopped:
    cli.main(arguments)
  assert stopped.value.code == 0
  out = capsys.readouterr().out
  assert all(word in out for word in words), out


@pytest.mark.parametrize("arguments, message", [
  (["runn", "elr"], "unknown command 'runn'; did you mean run?"),
  (["run", "eler"], "unknown recipe 'eler'; did you mean elr?"),
  (["run", TINY, "smok"], "unknown preset 'smok' of tests.experiments.tiny_recipe; did you mean smoke?"),
  (["run"], "run needs a recipe's name"),
  (["run", "no.such.recipe"], "there is no module no.such.recipe"),
  (["run", "experiments.harness.records"], "harness.records is not a recipe: it does not define PRESETS and cell"),
  (["verify", "ldrr"], "unknown recipe 'ldrr'; did you mean ldr?"),
  (["verify", TINY, "--seeds", "0"], "--seeds must be at least 2"),
  (["verify", TINY, "--seeds", "1"], "--seeds must be at least 2"),
  (["verify", TINY, "--first-seed", "3"], "--first-seed must be at least 100"),
  (["verify", TINY, "--first-seed", "4294967295"], "seeds must lie between 0 and 4294967295"),
  (["bench", "speeed"], "unknown benchmark 'speeed'"),
  (["list", "all"], "list takes no arguments"),
  (["report", "all"], "report takes no arguments"),
  (["run", TINY, "--set"], "--set takes NAME=VALUE"),
  (["run", TINY, "--set", "learning_rate"], "--set takes NAME=VALUE, got 'learning_rate'"),
  (["run", TINY, "--set", "learning_rate="], "--set takes NAME=VALUE"),
  (["run", TINY, "--set", "learning_rate=big"], "--set takes NAME=NUMBER, got 'learning_rate=big'"),
  (["run", TINY, "--set", "learning_rate=nan"], "--set takes finite numbers, got 'learning_rate=nan'"),
  (["run", TINY, "--set", "learning_rate=0.1,0.2"], "--set takes one value"),
  (["run", TINY, "--set", "learning_rat=1"], "unknown hyperparameter 'learning_rat'; did you mean learning_rate?"),
  (["run", TINY, "--set", "learning_rate=1", "--set", "learning_rate=2"], "--set gives learning_rate twice"),
  (["sweep", TINY, "--grid", "rate=1,2"], "unknown hyperparameter 'rate'"),
  (["sweep", TINY, "--grid", "learning_rate=1,inf"], "--grid takes finite numbers"),
  (["sweep", TINY, "--grid"], "--grid takes NAME=VALUE"),
  (["sweep", TINY, "--seeds", "0"], "--seeds must be at least 1"),
  (["sweep", TINY, "--first-seed", "-1"], "seeds must lie between 0 and"),
  (["sweep", TINY, "--memory-gib", "-1"], "--memory-gib must be positive"),
  (["sweep", TINY, "--memory-gib", "nan"], "--memory-gib must be positive"),
  (["sweep", TINY, "smoke", "--engine", "warp"], "engine must be one of"),
  (["run", TINY, "smoke", "--accumulate", "7"], "accumulate must be a positive divisor"),
  (["run", TINY, "smoke", "--precision", "int3"], "precision must be one of"),
  (["run", TINY, "smoke", "--steps", "0"], "steps must be a positive integer, got 0"),
  (["sweep", TINY, "smoke", "--steps", "0"], "steps"),
  (["run", TINY, "smoke", "--seed", "-1"], "a seed must be an integer in [0, 2**32), got -1"),
  (["run", TINY, "smoke", "--seed", "4294967296"], "a seed must be an integer in [0, 2**32)"),
  (["run", TINY, "smoke", "--checkpoint-every", "0"], "checkpoint_every must be positive and a multiple"),
  (["run", TINY, "smoke", "--profile-steps", "-1"], "profile_steps must not be negative"),
  (["run", TINY, "--distributed.processes", "2"], "need --distributed.coordinator HOST:PORT"),
  (["sweep", TINY, "--distributed.process", "0"], "need --distributed.coordinator HOST:PORT"),
])  # fmt: skip
def test_mistakes_are_named(arguments, message, capsys):
  assert cli.main(arguments) == 2
  err = " ".join(capsys.readouterr().err.split())
  assert message in err and err.startswith("error: ") and "Traceback" not in err


@pytest.mark.parametrize("flag, value", [("--seed", "many"), ("--no-such-flag", "1"), ("--config.steps", "few")])
def test_wrong_types_and_flags_are_refused(flag, value, capsys):
  with pytest.raises(SystemExit) as stopped:
    cli.main(["run", TINY, "smoke", flag, value])
  assert stopped.value.code == 2
  assert value in (text := "".join(capsys.readouterr())) or "no-such-flag" in text


def test_no_command_prints_usage(capsys):
  assert cli.main([]) == 2
  assert "usage" in capsys.readouterr().out


def test_run_and_resume(tmp_path, capsys):
  arguments = ["run", TINY, "smoke", "--folder", "here", "--checkpoint-every", "10"]
  assert cli.main([*arguments, "--steps", "10"]) == 0
  assert checkpoint.latest("here") == 10
  assert cli.main(arguments) == 0
  assert checkpoint.latest("here") == 20
  assert "distance" in capsys.readouterr().out
  assert list((tmp_path / "here" / "tensorboard").iterdir())


def test_different_runs_have_different_folders_and_the_same_one_the_same(monkeypatch):
  used = []
  result = types.SimpleNamespace(rows=[], interrupted=0)
  monkeypatch.setattr(jaxreg.training, "fit", lambda task, *, folder, **_: used.append(folder) or result)
  variants = [[], ["--seed", "1"], ["--set", "learning_rate=0.01"], ["--remat"], ["--accumulate", "2"],
              ["--precision", "bfloat16"], ["--config.features", "5"]]  # fmt: skip
  for extra in [*variants, [], ["--steps", "10"]]:  # more steps continue
    assert cli.main(["run", TINY, "smoke", *extra]) == 0
  assert len(set(used[: len(variants)])) == len(variants) and set(used[len(variants) :]) == {used[0]}
  assert re.fullmatch(rf"runs/{TINY}-smoke-[0-9a-f]{{8}}", str(used[0]))


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_an_interrupted_run_is_no_success(number, code, monkeypatch, capsys):
  state = types.SimpleNamespace(step=7)
  result = types.SimpleNamespace(rows=[], interrupted=int(number), state=state)
  monkeypatch.setattr(jaxreg.training, "fit", lambda *_, **__: result)
  assert cli.main(["run", TINY, "smoke"]) == code
  assert "interrupted at step 7 of 20; run again to resume" in capsys.readouterr().err


def test_sweep_writes_rows(tmp_path, capsys):
  arguments = ["sweep", TINY, "smoke", "--seeds", "2", "--engine", "vmap"]
  assert cli.main(arguments) == 0
  (name,) = folders(tmp_path)
  assert name.startswith(f"sweep-{TINY}-smoke-")
  rows = [json.loads(line) for line in (tmp_path / "runs" / name / "trials.jsonl").read_text().splitlines()]
  assert len({row["learning_rate"] for row in rows}) == 2 and {row["seed"] for row in rows} == {0, 1}
  out = capsys.readouterr().out
  assert "trials in" in out and "…" not in out


def test_sweep_over_a_grid_of_ones_own(tmp_path):
  grid = ["--grid", "learning_rate=0.1,0.2,0.3", "--steps", "10", "--seeds", "1", "--engine", "map"]
  assert cli.main(["sweep", TINY, "smoke", *grid]) == 0
  (name,) = folders(tmp_path)
  rows = [json.loads(line) for line in (tmp_path / "runs" / name / "trials.jsonl").read_text().splitlines()]
  assert [row["learning_rate"] for row in rows] == pytest.approx([0.1, 0.2, 0.3]) and {row["step"] for row in rows} == {
    10
  }


def test_repeated_flags_are_kept_and_numbers_are_of_the_hyperparameters_kind():
  merged = options.gathered(["--set", "a=1", "--seed", "3", "--set", "b=2", "c=-4"])
  assert merged == ["--seed", "3", "--set", "a=1", "b=2", "c=-4"]
  values = options.assignments(["k=3", "weight=2", "rate=1e-3"], {"k": 1, "weight": 0.5, "rate": 1.0})
  assert {name: (type(v), v) for name, (v,) in values.items()} == {
    "k": (int, 3), "weight": (float, 2.0), "rate": (float, 1e-3),
  }  # fmt: skip
  assert options.assignments(["k=1.5"], {"k": 1}) == {"k": [1.5]}  # `fit` decides whether it can be one


def test_a_grid_replaces_the_recipes_values():
  points = {"noise": [0, 0, 1, 1], "weight": [1, 2, 1, 2]}
  assert options.grid_points(points, {"weight": [5], "rate": [6, 7]}) == {
    "noise": [0, 0, 1, 1], "weight": [5, 5, 5, 5], "rate": [6, 7, 6, 7]
  }  # fmt: skip
  assert options.grid_points(points, {}) == points
  assert options.grid_points({}, {"a": [1, 2]}) == {"a": [1, 2]}


def test_a_recipe_of_ones_own(tmp_path, monkeypatch):
  (tmp_path / "my_package").mkdir()
  (tmp_path / "my_package" / "my_recipe.py").write_text(f'"""Mine."""\nfrom {TINY} import *\n')
  monkeypatch.syspath_prepend(tmp_path)
  assert cli.main(["run", "my_package.my_recipe", "smoke", "--steps", "10"]) == 0
  assert folders(tmp_path)[0].startswith("my_package.my_recipe-smoke-")


def test_an_import_that_fails_inside_of_a_recipe_is_not_taken_for_a_missing_one(tmp_path, monkeypatch, capsys):
  (tmp_path / "broken_package").mkdir()
  (tmp_path / "broken_package" / "recipe.py").write_text("import no_such_library\n")
  monkeypatch.syspath_prepend(tmp_path)
  assert cli.main(["run", "broken_package.recipe"]) == 1
  assert "ModuleNotFoundError: No module named 'no_such_library'" in capsys.readouterr().err


def test_unwritable_folder_exits_with_one_line(tmp_path, capsys):
  (tmp_path / "file").write_text("")
  assert cli.main(["run", TINY, "smoke", "--folder", "file/run"]) == 1
  error = capsys.readouterr().err
  assert "cannot write" in error and "Traceback" not in error


def test_programs_are_kept_and_an_unwritable_cache_is_no_error(tmp_path, monkeypatch):
  (tmp_path / "home").write_text("")
  monkeypatch.setenv("HOME", str(tmp_path / "home"))
  before = jax.config.jax_compilation_cache_dir
  jax.config.update("jax_compilation_cache_dir", None)
  try:
    commands._keep_programs()
    assert jax.config.jax_compilation_cache_dir is None
    monkeypatch.setenv("HOME", str(tmp_path))
    commands._keep_programs()
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / ".cache" / "jaxreg" / "xla")
  finally:
    jax.config.update("jax_compilation_cache_dir", before)


def test_tables_are_cut_into_parts_that_fit(capsys):
  row = {"loss": "cross_entropy", **{f"a long metric {i}": 0.123456 for i in range(8)}}
  tables.show([row, row | {"loss": "gce"}], keys=["loss"], title="Losses")
  out = capsys.readouterr().out
  assert all(len(line) <= 80 for line in out.splitlines()) and "…" not in out
  assert out.count("cross_entropy") == 2 and "0.1235" in out and out.count("Losses") == 1
  assert tables.text([row], width=200, keys=["loss"]).count("cross_entropy") == 1


def test_processors_are_those_that_this_process_may_use(monkeypatch):
  monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0, 3, 5}, raising=False)
  assert records.cores() == 3


@pytest.mark.parametrize("recipe, setting, message", [
  ("elr", "noise_rate=1.6", "rate must lie in"),
  ("ldr", "temperature=-3", "temperature must lie in"),
])  # fmt: skip
@pytest.mark.parametrize("command", ["run", "sweep"])
def test_values_outside_of_a_domain_never_train(command, recipe, setting, message, capsys):
  assert cli.main([command, recipe, "smoke", "--set", setting]) == 2
  assert message in capsys.readouterr().err


def test_a_folder_of_another_setting_is_refused(capsys):
  arguments = ["sweep", "wgsef", "smoke", "--seeds", "1", "--engine", "map", "--folder", "here"]
  assert cli.main(arguments) == 0
  assert cli.main([*arguments, "--config.hidden", "48"]) == 2
  assert "here holds another run: config.hidden is 32 there and 48 here" in capsys.readouterr().err
  assert cli.main(["sweep", "ldr", "smoke", "--seeds", "1", "--folder", "here"]) == 2
  assert cli.main(["run", "wgsef", "smoke", "--folder", "here"]) == 2
