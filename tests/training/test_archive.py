"""Finished trials on disk: damage of every kind is noticed, named and run again, never passed on."""

import typing

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxreg.training import examples, gradient_task, sweep
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


class Counts(typing.NamedTuple):
  """Extra state of several kinds."""

  seen: jax.Array
  key: jax.Array


@pytest.mark.parametrize("engine", ["map", "vmap"])
def test_what_is_kept_of_trials_comes_back_from_the_folder_as_it_was(engine, tmp_path):
  """Batch statistics and the like, typed keys, bfloat16, nothing at all."""

  def objective(params, extra, batch, context):
    loss = jnp.mean((batch["x"] @ params["w"].astype(jnp.float32)) ** 2)
    return loss, (extra._replace(seen=extra.seen + 1), {})

  task = gradient_task(
    init_params=lambda key, hparams: (
      {"w": jnp.ones(3, jnp.bfloat16), "none": {}}, Counts(jnp.zeros(2), jax.random.fold_in(key, 7))
    ),
    objective=objective, optimizer=lambda hparams: optax.sgd(0.1), data={"x": np.ones((4, 3), np.float32)},
    batch_size=2,
  )  # fmt: skip
  options = {**OPTIONS, "engine": engine, "keep_params": True, "folder": tmp_path}
  first, again = sweep(task, {}, **options), sweep(task, {}, **options)
  assert again.compile_seconds == 0
  assert first.params["w"].dtype == again.params["w"].dtype == jnp.bfloat16 and first.params["w"].shape == (2, 3)
  np.testing.assert_array_equal(first.params["w"], again.params["w"])
  assert isinstance(again.extra, Counts) and (again.extra.seen == 10).all()
  want = [jax.random.key_data(task.init(jax.random.key(seed), {}).extra.key) for seed in (0, 1)]
  for result in (first, again):
    np.testing.assert_array_equal(jax.random.key_data(result.extra.key), want)


def test_nothing_to_keep_is_kept(tmp_path):
  task = examples.least_squares()
  empty = gradient_task(
    init_params=lambda key, hparams: ({}, {}), objective=lambda p, e, batch, c: (batch["x"].mean(), (e, {})),
    optimizer=lambda hparams: optax.sgd(0.1), data=task.data, batch_size=16,
  )  # fmt: skip
  options = {**OPTIONS, "keep_params": True, "folder": tmp_path}
  sweep(empty, {}, **options)
  result = sweep(empty, {}, **options)
  assert result.params == {} and result.compile_seconds == 0
