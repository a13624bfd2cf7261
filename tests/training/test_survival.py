"""`fit` survives: processes that are really killed, files really damaged, disks really full."""

import pathlib
import shutil
import signal

import numpy as np
import pytest

from jaxreg.training import CheckpointError, NonFiniteError, checkpoint, examples, fit, load_params, log
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


def test_sigterm_saves_and_exits_cleanly(tmp_path, unharmed):
  process = processes.start(tmp_path, "--slow", "0.2")
  processes.wait_for(process, "step 60")
  process.send_signal(signal.SIGTERM)
  code, answer, output = processes.finish(process)
  assert code == 0 and answer["interrupted"], output
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
  task = examples.least_squares()
  fit(task, steps=80, folder=tmp_path, **OPTIONS)
  broken = task.replace(data={**task.data, "y": task.data["y"] * np.float32(np.nan)})
  with pytest.raises(NonFiniteError, match="the loss is not finite at step 81; the last good checkpoint is step 80"):
    fit(broken, steps=200, folder=tmp_path, **OPTIONS)
  assert checkpoint.latest(tmp_path) == 80


def test_unwritable_folder_is_one_clear_error(tmp_path):
  (tmp_path / "file").write_text("")
  with pytest.raises(CheckpointError, match="cannot write to the run's folder"):
    fit(examples.least_squares(), steps=40, folder=tmp_path / "file" / "run", **OPTIONS)


def test_full_disk_is_one_clear_error_and_earlier_checkpoints_stay(tmp_path):
  code, _, output = processes.finish(processes.start(tmp_path, "--steps", 80))
  assert code == 0, output
  code, _, output = processes.finish(processes.start(tmp_path, "--steps", 400, "--file-limit", 700))
  assert code != 0 and "CheckpointError: cannot write" in output and "Earlier checkpoints are intact" in output
  assert checkpoint.latest(tmp_path) == 80
  code, _, output = processes.finish(processes.start(tmp_path, "--steps", 400))
  assert code == 0, output


def test_folder_of_another_run_is_refused(tmp_path):
  fit(examples.least_squares(), steps=40, folder=tmp_path, **OPTIONS)
  with pytest.raises(ValueError, match="choose another folder"):
    fit(examples.least_squares(), steps=40, seed=1, folder=tmp_path, **OPTIONS)
