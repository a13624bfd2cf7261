"""`fit` survives: processes that are really killed, files really damaged, disks really full."""

import json
import pathlib
import shutil
import signal

import jax.numpy as jnp
import numpy as np
import pytest

from jaxreg.training import (
  CheckpointError,
  FolderError,
  NonFiniteError,
  checkpoint,
  examples,
  fit,
  load_params,
  log,
  predict,
  sweep,
)
from tests.training import processes

OPTIONS = {"log_every": 20, "eval_every": 40, "checkpoint_every": 40, "progress": False}


@pytest.fixture(scope="module")
def unharmed(tmp_path_factory):
  """The answer of a run that nobody disturbed."""
  code, answer, output = processes.finish(processes.start(tmp_path_factory.mktemp("unharmed")))
  assert code == 0, output
  return answer


@pytest.mark.parametrize("job", ["fit", "stream"])
def test_killed_and_resumed_ends_bit_identical(tmp_path, unharmed, job):
  if job == "stream":
    _, unharmed, _ = processes.finish(processes.start(tmp_path / "other", "--job", job))
  run = tmp_path / "run"
  for moment in ("step 60", "step 160"):  # once between two checkpoints, once just before one
    process = processes.start(run, "--slow", "0.05", "--job", job)
    processes.wait_for(process, moment)
    process.send_signal(signal.SIGKILL)
    process.wait()
  code, answer, output = processes.finish(processes.start(run, "--job", job))
  assert code == 0, output
  assert answer["w"] == unharmed["w"]
  assert answer["rows"] == unharmed["rows"]
  assert [row["step"] for row in log.read_metrics(run)] == list(range(20, 401, 20))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_save_and_end_the_run(tmp_path, unharmed, number):
  process = processes.start(tmp_path, "--slow", "0.2")
  processes.wait_for(process, "step 60")
  process.send_signal(number)
  code, answer, output = processes.finish(process)
  assert code == 0 and answer["interrupted"] == number, output
  assert checkpoint.latest(tmp_path) == answer["rows"][-1]["step"]
  code, answer, output = processes.finish(processes.start(tmp_path))
  assert code == 0 and not answer["interrupted"], output
  assert answer["w"] == unharmed["w"] and answer["rows"] == unharmed["rows"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
  """A folder with checkpoints at 120, 160 and 200."""
  folder = tmp_path_factory.mktemp("finished")
  fit(examples.least_squares(), steps=200, folder=folder, **OPTIONS)
  return folder


def _largest(folder: pathlib.Path, item: str) -> pathlib.Path:
  return max((file for file in (folder / item).rglob("*") if file.is_file()), key=lambda file: file.stat().st_size)


def _truncate(newest):
  file = _largest(newest, "params")
  file.write_bytes(file.read_bytes()[:-3])


def _flip(newest):
  file = _largest(newest, "rest")
  data = bytearray(file.read_bytes())
  data[len(data) // 2] ^= 1
  file.write_bytes(data)


def _flip_manifest(newest):
  file = newest / "manifest.json"
  file.write_text(file.read_text().replace("1", "2", 1))


def _half_delete(newest):
  shutil.rmtree(newest / "params")


def _unfinished(newest):
  (newest / "manifest.json").unlink()


@pytest.mark.parametrize("damage", [_truncate, _flip, _flip_manifest, _half_delete, _unfinished])
def test_damaged_newest_checkpoint_is_passed_over(finished, tmp_path, damage):
  run = tmp_path / "run"
  shutil.copytree(finished, run)
  whole = load_params(run)
  damage(run / "checkpoints" / "000000200")
  with pytest.warns(UserWarning, match="passing over the checkpoint of step 200"):
    assert checkpoint.latest(run) == 160
  with pytest.warns(UserWarning, match="passing over"):
    result = fit(examples.least_squares(), steps=200, folder=run, **OPTIONS)
  np.testing.assert_array_equal(result.state.params["w"], whole["w"])
  assert checkpoint.defect(run, 200) is None


@pytest.mark.parametrize("damage", [_truncate, _flip, _flip_manifest, _half_delete, _unfinished])
def test_an_explicit_step_is_checked_like_the_newest(finished, tmp_path, damage):
  run = tmp_path / "run"
  shutil.copytree(finished, run)
  damage(run / "checkpoints" / "000000200")
  for read in (
    lambda: load_params(run, 200),
    lambda: predict(examples.least_squares(), run, np.ones((1, 4)), step=200),
  ):
    with pytest.raises(CheckpointError, match="the checkpoint of step 200 .* cannot be read"):
      read()
  with pytest.raises(CheckpointError, match="step 7 .* there is none"):
    load_params(run, 7)
  load_params(run, 160)


def test_a_checkpoint_under_another_name_is_noticed(finished, tmp_path):
  run = tmp_path / "run"
  shutil.copytree(finished, run)
  shutil.copytree(run / "checkpoints" / "000000160", run / "checkpoints" / "000000400")
  assert "the one of step 160 under another name" in checkpoint.defect(run, 400)
  with pytest.warns(UserWarning, match="passing over the checkpoint of step 400"):
    assert checkpoint.latest(run) == 200


def test_retention_counts_good_checkpoints_only_and_clears_the_rest(tmp_path):
  task = examples.least_squares()
  options = {**OPTIONS, "folder": tmp_path, "keep": 1}
  fit(task, steps=80, **{**options, "keep": 2})
  _flip(tmp_path / "checkpoints" / "000000080")
  shutil.copytree(tmp_path / "checkpoints" / "000000040", tmp_path / "checkpoints" / "000000060")
  with pytest.warns(UserWarning, match="passing over"):
    fit(task, steps=60, **options)
  assert checkpoint.steps(tmp_path) == [60] and checkpoint.latest(tmp_path) == 60
  with pytest.raises(ValueError, match="keep must be a positive integer"):
    fit(task, steps=100, **{**options, "keep": 0})


@pytest.mark.parametrize("position", [0.0, 0.3, 0.6, 0.99])
def test_every_file_is_covered_by_the_manifest(finished, tmp_path, position):
  run = tmp_path / "run"
  shutil.copytree(finished, run)
  for file in (run / "checkpoints" / "000000200").rglob("*"):
    if file.is_file() and file.stat().st_size:
      content = file.read_bytes()
      data = bytearray(content)
      data[int(position * len(data))] ^= 0x10
      file.write_bytes(data)
      assert checkpoint.defect(run, 200) is not None, file
      file.write_bytes(content)


def test_non_finite_loss_stops_and_keeps_the_last_good_checkpoint(tmp_path):
  plain = examples.least_squares()

  def step(state, batch, hparams):
    new, metrics = plain.step(state, batch, hparams)
    return new, {**metrics, "loss": jnp.where(state.step < 80, 1.0, np.nan) * metrics["loss"]}

  task = plain.replace(step=step)
  with pytest.raises(NonFiniteError, match="the loss is not finite at step 81; the last good checkpoint is step 80"):
    fit(task, steps=200, folder=tmp_path, **OPTIONS)
  assert checkpoint.latest(tmp_path) == 80


def test_unwritable_folder_is_one_clear_error(tmp_path):
  (tmp_path / "file").write_text("")
  for run in (
    lambda folder: fit(examples.least_squares(), steps=40, folder=folder, **OPTIONS),
    lambda folder: sweep(examples.least_squares(), {}, seeds=[0], steps=20, folder=folder, progress=False),
  ):
    with pytest.raises(FolderError, match="cannot write to the run's folder"):
      run(tmp_path / "file" / "run")


def test_full_disk_is_one_clear_error_and_earlier_checkpoints_stay(tmp_path):
  code, _, output = processes.finish(processes.start(tmp_path, "--steps", 80, "--examples", 4096))
  assert code == 0, output
  code, _, output = processes.finish(processes.start(tmp_path, "--steps", 400, "--examples", 4096, "--file-limit", 700))
  assert code != 0 and "cannot write" in output and "intact" in output
  assert checkpoint.latest(tmp_path) == 80
  code, _, output = processes.finish(processes.start(tmp_path, "--steps", 400, "--examples", 4096))
  assert code == 0, output


def test_a_full_disk_ends_a_sweep_with_one_sentence_and_keeps_what_is_done(tmp_path):
  code, _, output = processes.finish(processes.start(tmp_path, "--job", "sweep", "--seeds", 1))
  assert code == 0, output
  pieces = sorted(tmp_path.glob("trials/*"))
  code, _, output = processes.finish(
    processes.start(tmp_path, "--job", "sweep", "--seeds", 2, "--file-limit", pieces[0].stat().st_size // 2)
  )
  assert code != 0 and "FolderError: cannot write to the run's folder" in output
  assert sorted(tmp_path.glob("trials/*")) == pieces


@pytest.mark.parametrize("job", ["fit", "sweep"])
def test_one_writer_per_folder(tmp_path, job):
  holder = processes.start(tmp_path, "--job", job, "--hold", 60)
  processes.wait_for(holder, "holding")
  try:
    code, _, output = processes.finish(processes.start(tmp_path, "--job", job))
    assert code != 0 and "another process is writing to" in output
  finally:
    holder.kill()
    holder.wait()
  code, _, output = processes.finish(processes.start(tmp_path, "--job", job))  # the lock died with its process
  assert code == 0, output


def test_a_finished_run_is_longer_than_asked_for(tmp_path):
  fit(examples.least_squares(), steps=120, folder=tmp_path, **OPTIONS)
  with pytest.raises(ValueError, match="holds a run at step 120, which is beyond steps = 80"):
    fit(examples.least_squares(), steps=80, folder=tmp_path, **OPTIONS)


def test_more_steps_continue_and_end_as_one_run(tmp_path):
  task = examples.least_squares()
  fit(task, steps=80, folder=tmp_path, **OPTIONS)
  longer = fit(task, steps=200, folder=tmp_path, **OPTIONS)
  whole = fit(task, steps=200, **OPTIONS)
  np.testing.assert_array_equal(longer.state.params["w"], whole.state.params["w"])
  assert longer.rows == whole.rows == log.read_metrics(tmp_path)


def _damage_lose(lines):
  del lines[2]


def _damage_double(lines):
  lines.insert(2, lines[2])


def _damage_change(lines):
  lines[2] = lines[2].replace(b'"loss": ', b'"loss": 1')


def _damage_byte(lines):
  lines[2] = lines[2][:10] + bytes([lines[2][10] ^ 0x80]) + lines[2][11:]


@pytest.mark.parametrize("damage", [_damage_lose, _damage_double, _damage_change, _damage_byte])
def test_damaged_metrics_are_noticed_and_repaired(finished, tmp_path, damage):
  run = tmp_path / "run"
  shutil.copytree(finished, run)
  whole = log.read_metrics(run)
  lines = (run / "metrics.jsonl").read_bytes().splitlines(keepends=True)
  damage(lines)
  (run / "metrics.jsonl").write_bytes(b"".join(lines))
  with pytest.raises(log.DamagedLogError, match=r"line \d of .*metrics.jsonl"):
    log.read_metrics(run)
  with pytest.warns(UserWarning, match="metrics.jsonl is not what was written.* written anew from the checkpoint"):
    assert fit(examples.least_squares(), steps=200, folder=run, **OPTIONS).rows == whole
  assert log.read_metrics(run) == whole


def test_metrics_are_strict_json(tmp_path):
  task = examples.least_squares()
  odd = task.replace(evaluate=lambda state, hparams: {"nothing": np.nan, "much": np.inf})
  fit(odd, steps=20, folder=tmp_path, **OPTIONS)
  refuse = lambda word: pytest.fail(f"bare {word} in JSON")
  for line in (tmp_path / "metrics.jsonl").read_text().splitlines():
    json.loads(line, parse_constant=refuse)
  (row,) = log.read_metrics(tmp_path)
  assert np.isnan(row["nothing"]) and row["much"] == np.inf


def test_the_best_state_is_kept_and_patience_ends_the_run(tmp_path):
  task = examples.least_squares()
  scores = {40: 0.1, 80: 0.5, 120: 0.3, 160: 0.4, 200: 0.9}
  at = lambda step: sum((step == number) * score for number, score in scores.items())
  scored = task.replace(evaluate=lambda state, hparams: {"score": at(state.step)})
  options = {**OPTIONS, "folder": tmp_path, "best": "score", "patience": 2}
  evaluated, logged = [], []
  result = fit(scored, steps=200, on_evaluate=evaluated.append, on_log=logged.append, **options)
  assert result.stopped and not result.interrupted and result.rows[-1]["step"] == 160
  assert [row["step"] for row in evaluated] == [40, 80, 120, 160] and len(logged) == 8
  assert checkpoint.steps(tmp_path / "best") == [80]
  np.testing.assert_array_equal(load_params(tmp_path / "best")["w"], fit(task, steps=80, **OPTIONS).state.params["w"])
  again = fit(scored, steps=200, **options)
  assert again.stopped and again.rows == result.rows
  with pytest.raises(ValueError, match='best is "max score" there and "min loss" here'):
    fit(scored, steps=200, **{**options, "best": "loss", "best_is": "min"})
  with pytest.raises(ValueError, match="best must be a metric of the evaluation"):
    fit(task, steps=40, best="score", **OPTIONS)


@pytest.mark.parametrize("change, message", [
  ({"steps": 0}, "steps must be a positive integer"),
  ({"log_every": 0}, "log_every must be a positive integer"),
  ({"seed": -1}, "a seed must be an integer in"),
  ({"seed": 2**32}, "a seed must be an integer in"),
  ({"checkpoint_every": 0}, "checkpoint_every must be positive and a multiple of log_every"),
  ({"eval_every": 30}, "eval_every must be positive and a multiple of log_every"),
  ({"patience": 2}, "patience must be positive and needs best"),
  ({"hparams": {"learning_rate": float("nan")}}, "hyperparameter learning_rate must be a number, got nan"),
  ({"hparams": {"learning_rate": "big"}}, "hyperparameter learning_rate must be a number"),
  ({"hparams": {"rate": 1.0}}, "unknown hyperparameters"),
])  # fmt: skip
def test_bad_arguments(change, message):
  with pytest.raises(ValueError, match=message):
    fit(examples.least_squares(), **{"steps": 40, **OPTIONS, **change})


def test_data_must_share_their_leading_axis():
  task = examples.least_squares()
  with pytest.raises(ValueError, match="must share their leading axis of examples, got lengths: x 64, y 10"):
    task.replace(data={**task.data, "y": task.data["y"][:10]})
