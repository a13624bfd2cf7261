"""The command line: quick answers, clear errors, exit codes; runs and sweeps that can be taken up again."""

import json
import subprocess
import sys
import time

import pytest

from experiments import __main__ as cli
from jaxreg.training import checkpoint


@pytest.fixture(autouse=True)
def in_temporary_folder(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "8")  # this process has its devices already


@pytest.mark.parametrize("arguments", [["--help"], ["list"]])
def test_help_and_list_answer_quickly_without_jax(arguments):
  code = (
    "import sys, runpy\nsys.argv = ['experiments', *sys.argv[1:]]\n"
    "try: runpy.run_module('experiments', run_name='__main__')\nfinally: print('jax' in sys.modules)"
  )
  began = time.perf_counter()
  answer = subprocess.run(
    [sys.executable, "-c", code, *arguments], capture_output=True, text=True, cwd=cli.__file__.rsplit("/", 2)[0]
  )
  assert time.perf_counter() - began < 2
  assert answer.returncode == 0, answer.stderr
  assert answer.stdout.rstrip().endswith("False")
  assert ("verify" if arguments == ["--help"] else "noisy_labels") in answer.stdout


@pytest.mark.parametrize("arguments, message", [
  (["runn", "elr"], "unknown command 'runn'; did you mean run?"),
  (["run", "eler"], "unknown recipe 'eler'; did you mean elr?"),
  (["run", "elr", "smok"], "unknown preset 'smok'; did you mean smoke?"),
  (["run"], "run needs a recipe's name"),
  (["verify", "ldrr"], "unknown recipe 'ldrr'; did you mean ldr?"),
  (["verify", "noisy_labels", "--preset", "smoke"], "noisy_labels states no claims"),
  (["verify", "ldr", "--seeds", "1"], "seeds must be at least 2"),
  (["verify", "ldr", "--first-seed", "3"], "first_seed must be at least 100"),
  (["bench", "speeed"], "unknown benchmark 'speeed'"),
  (["demo", "--preset", "cpuu"], "unknown preset 'cpuu'; did you mean cpu?"),
  (["run", "elr", "smoke", "--set", "weight=big"], "--set takes NAME=NUMBER"),
  (["run", "elr", "smoke", "--set", "wait=1"], "unknown hyperparameters ['wait']"),
  (["run", "elr", "smoke", "--accumulate", "7"], "accumulate must be a positive divisor"),
  (["run", "elr", "smoke", "--precision", "int3"], "precision must be one of"),
  (["sweep", "elr", "smoke", "--engine", "warp"], "engine must be one of"),
  (["run", "grokking_stability", "smoke", "--config.loss", "hinge"], "loss must be one of"),
  (["list", "all"], "list takes no arguments"),
])  # fmt: skip
def test_mistakes_are_named(arguments, message, capsys):
  try:
    code = cli.main(arguments)
  except SystemExit as stopped:  # what tyro finds while reading flags
    code = stopped.code
  assert code == 2
  assert message in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("arguments", [
  ["run", "elr", "smoke", "--seed", "many"],
  ["run", "elr", "smoke", "--no-such-flag", "1"],
])  # fmt: skip
def test_wrong_types_and_flags_are_refused(arguments, capsys):
  with pytest.raises(SystemExit) as stopped:
    cli.main(arguments)
  assert stopped.value.code == 2
  assert "many" in (text := "".join(capsys.readouterr())) or "no-such-flag" in text


def test_no_command_prints_usage(capsys):
  assert cli.main([]) == 2
  assert "usage" in capsys.readouterr().out


def test_run_and_resume(tmp_path, capsys):
  arguments = ["run", "wgsef", "smoke", "--folder", "here", "--checkpoint-every", "20"]
  assert cli.main([*arguments, "--steps", "40"]) == 0
  assert checkpoint.latest("here") == 40
  assert cli.main(arguments) == 0
  assert checkpoint.latest("here") == 60
  assert "test_accuracy" in capsys.readouterr().out
  assert list((tmp_path / "here" / "tensorboard").iterdir())


def test_sweep_writes_rows(tmp_path, capsys):
  assert cli.main(["sweep", "wgsef", "smoke", "--seeds", "2", "--engine", "vmap"]) == 0
  rows = [json.loads(line) for line in (tmp_path / "runs" / "sweep-wgsef" / "trials.jsonl").read_text().splitlines()]
  assert {row["k"] for row in rows} == {8, 16} and {row["seed"] for row in rows} == {0, 1}
  assert "trials in" in capsys.readouterr().out


def test_unwritable_folder_exits_with_one_line(tmp_path, capsys):
  (tmp_path / "file").write_text("")
  assert cli.main(["run", "wgsef", "smoke", "--folder", "file/run"]) == 1
  error = capsys.readouterr().err
  assert "CheckpointError: cannot write" in error and "Traceback" not in error
