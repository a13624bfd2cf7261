"""`fit` and `sweep` in two real processes of four virtual devices each, connected by JAX's own runtime on loopback."""

import numpy as np
import pytest

from jaxreg.training import checkpoint, log
from tests.training import processes


def _pair(folder, *options, port=None, die=None):
  port = port or processes.free_port()
  shared = ["--coordinator", f"127.0.0.1:{port}", "--processes", 2, "--devices", 4, *options]
  return [
    processes.start(folder, *shared, "--process", index, *(die if die and index == 1 else ())) for index in range(2)
  ]


def _floats(answer):
  return np.asarray(answer["w"], np.uint32).view(np.float32)


def test_fit_in_two_processes_equals_one_and_recovers_after_one_dies(tmp_path):
  alone, pair = tmp_path / "alone", tmp_path / "pair"
  code, single, output = processes.finish(processes.start(alone))
  assert code == 0, output
  # Process 1 dies without a word after step 100; the other ends too instead of waiting for ever.
  for code, _, output in [processes.finish(worker) for worker in _pair(pair, die=("--die-at", 100))]:
    assert code != 0, output
  assert checkpoint.latest(pair) in (80, 120)
  (code, both, output), (other, _, more) = [processes.finish(worker) for worker in _pair(pair)]
  assert code == 0 and other == 0, output + more
  np.testing.assert_allclose(_floats(both), _floats(single), rtol=1e-6, atol=1e-7)
  rows = log.read_metrics(pair)
  assert [row["step"] for row in rows] == list(range(20, 401, 20))
  expected = log.read_metrics(alone)
  np.testing.assert_allclose([row["loss"] for row in rows], [row["loss"] for row in expected], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("damaged", ["params", "manifest.json"])
def test_two_processes_agree_on_the_checkpoint_to_fall_back_to(tmp_path, damaged):
  for worker in _pair(tmp_path, "--steps", 120):
    code, _, output = processes.finish(worker)
    assert code == 0, output
  newest = tmp_path / "checkpoints" / "000000120"
  file = newest / damaged if damaged.endswith("json") else next(f for f in newest.rglob("*") if f.is_file())
  file.write_bytes(file.read_bytes()[:-1])
  first, second = [processes.finish(worker) for worker in _pair(tmp_path, "--steps", 160)]
  assert first[0] == 0 and second[0] == 0, first[2] + second[2]
  assert "passing over the checkpoint of step 120" in first[2]  # process 0 looks, the other follows
  assert checkpoint.latest(tmp_path) == 160


def test_restores_onto_another_number_of_devices_and_processes(tmp_path):
  for worker in _pair(tmp_path, "--steps", 200):
    code, _, output = processes.finish(worker)
    assert code == 0, output
  code, answer, output = processes.finish(processes.start(tmp_path, "--steps", 400))
  assert code == 0, output
  _, straight, _ = processes.finish(processes.start(tmp_path / "straight", "--steps", 400))
  np.testing.assert_allclose(_floats(answer), _floats(straight), rtol=1e-6, atol=1e-7)


def test_sweep_in_two_processes_equals_one_and_recovers(tmp_path):
  code, single, output = processes.finish(processes.start(tmp_path / "alone", "--job", "sweep", "--devices", 2))
  assert code == 0, output
  workers = _pair(tmp_path / "pair", "--job", "sweep")
  for worker in workers:
    code, _, output = processes.finish(worker)
    assert code == 0, output
  chunks = sorted((tmp_path / "pair").glob("trials/piece-*.npz"))
  assert len(chunks) == 2  # 16 trials, a budget of one trial per device, 8 devices
  stamp = chunks[0].stat().st_mtime_ns
  chunks[1].write_bytes(chunks[1].read_bytes()[:-20])
  (code, both, output), (other, _, more) = [
    processes.finish(worker) for worker in _pair(tmp_path / "pair", "--job", "sweep")
  ]
  assert code == 0 and other == 0, output + more
  assert chunks[0].stat().st_mtime_ns == stamp
  np.testing.assert_array_equal(both["loss"], single["loss"])
  np.testing.assert_array_equal(both["w"], single["w"])
