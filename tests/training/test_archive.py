"""Finished trials on disk: damage of every kind is noticed, named and run again, never passed on."""

import numpy as np
import pytest

from jaxreg.training import examples, sweep
from jaxreg.training.archive import Archive, trial_keys

POINTS = {"learning_rate": [0.01, 0.05]}
OPTIONS = {"seeds": [0, 1], "steps": 10, "engine": "map", "progress": False}


@pytest.fixture(scope="module")
def task():
  return examples.least_squares()


@pytest.fixture(scope="module")
def whole(task):
  return sweep(task, POINTS, **OPTIONS)


def _flip(path):
  data = bytearray(path.read_bytes())
  data[len(data) // 2] ^= 1
  path.write_bytes(data)


def _truncate(path):
  path.write_bytes(path.read_bytes()[:-5])


def _empty(path):
  path.write_bytes(b"")


@pytest.mark.parametrize("damage", [_flip, _truncate, _empty])
def test_a_damaged_piece_runs_again(task, whole, tmp_path, damage):
  sweep(task, POINTS, folder=tmp_path, **OPTIONS)
  damaged = max(tmp_path.glob("trials/piece-*.npz"))
  damage(damaged)
  with pytest.warns(UserWarning, match=f"{damaged.name} does not have the bytes that were written"):
    again = sweep(task, POINTS, folder=tmp_path, **OPTIONS)
  np.testing.assert_array_equal(again.metrics["loss"], whole.metrics["loss"])


def test_every_bit_matters(task, tmp_path):
  sweep(task, POINTS, folder=tmp_path, **OPTIONS)
  piece = max(tmp_path.glob("trials/piece-*.npz"))
  content = piece.read_bytes()
  for position in np.linspace(0, len(content) - 1, 20).astype(int):
    data = bytearray(content)
    data[position] ^= 0x10
    piece.write_bytes(data)
    with pytest.warns(UserWarning, match="does not have the bytes"):
      Archive(tmp_path)
    piece.write_bytes(content)


def test_lost_and_doubled_pieces(task, whole, tmp_path):
  sweep(task, POINTS, folder=tmp_path, **OPTIONS)
  pieces = sorted(tmp_path.glob("trials/piece-*.npz"))
  (tmp_path / "trials" / "piece-copy.npz").write_bytes(pieces[0].read_bytes())
  pieces[-1].unlink()
  with pytest.warns(UserWarning, match="piece-copy.npz"):
    again = sweep(task, POINTS, folder=tmp_path, **OPTIONS)
  np.testing.assert_array_equal(again.metrics["loss"], whole.metrics["loss"])


def test_trials_remember_their_engine(task, tmp_path):
  first = sweep(task, POINTS, **{**OPTIONS, "engine": "vmap"}, folder=tmp_path)
  again = sweep(task, POINTS, **{**OPTIONS, "engine": "auto"}, folder=tmp_path)
  assert first.engine == again.engine == "vmap" and again.compile_seconds == 0
  other = sweep(task, POINTS, **OPTIONS, folder=tmp_path)  # asked for `map`, it runs again
  assert other.engine == "map" and other.compile_seconds > 0


def test_trials_are_told_apart_by_exact_values():
  one = np.float32(0.1)
  keys = trial_keys({"a": np.array([one, np.nextafter(one, np.float32(1)), one])}, np.array([0, 0, 1]))
  assert len(set(keys)) == 3
