"""Checkpoints give back what was saved: structures of every kind, dtypes, and a clear word where they do not fit."""

import collections
import dataclasses
import typing

import equinox as eqx
import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jaxreg.training import CheckpointError, checkpoint, fit, gradient_task, load_params, mesh, predict, program

X = np.random.default_rng(0).normal(size=(8, 2)).astype(np.float32)
OPTIONS = {"log_every": 2, "progress": False, "tensorboard": False}


class Layer(typing.NamedTuple):
  """Parameters as people write them without a framework."""

  w: jax.Array
  b: jax.Array


def make(params, apply, extra=None):
  def objective(p, e, batch, context):
    return jnp.mean((apply(p, e, batch["x"]) - 1) ** 2), (e, {})

  return gradient_task(
    init_params=lambda key, hparams: (params, {} if extra is None else extra), objective=objective,
    optimizer=lambda hparams: optax.sgd(0.1), data={"x": X}, batch_size=4, predict=apply,
  )  # fmt: skip


W, B = jnp.ones(2), jnp.zeros(())
STRUCTURES = {
  "dict": ({"w": W, "b": B}, lambda p, e, x: x @ p["w"] + p["b"]),
  "list of layers": ([{"w": W}, {"b": B}], lambda p, e, x: x @ p[0]["w"] + p[1]["b"]),
  "tuple": ((W, B), lambda p, e, x: x @ p[0] + p[1]),
  "named tuple": (Layer(W, B), lambda p, e, x: x @ p.w + p.b),
  "integer keys": ({1: W, 0: B}, lambda p, e, x: x @ p[1] + p[0]),
  "array": (W, lambda p, e, x: x @ p),
  "none among them": ({"w": W, "b": None}, lambda p, e, x: x @ p["w"]),
  "empty parts": ({"w": W, "act": {}, "more": []}, lambda p, e, x: x @ p["w"] + 0 * len(p["act"])),
  "array without entries": ({"w": W, "z": jnp.zeros((0, 3))}, lambda p, e, x: x @ p["w"] + p["z"].sum()),
  "bfloat16": ({"w": W.astype(jnp.bfloat16)}, lambda p, e, x: x @ p["w"].astype(jnp.float32)),
  "key in extra": ({"w": W}, lambda p, e, x: x @ p["w"] + 0 * jax.random.normal(e["key"], x.shape[:1]),
                   {"key": jax.random.key(1)}),
  "named tuple in extra": ({"w": W}, lambda p, e, x: x @ p["w"] + 0 * e.w.sum(), Layer(W, B)),
}  # fmt: skip


@pytest.mark.parametrize("name", STRUCTURES)
def test_structures_come_back_as_saved(name, tmp_path):
  task = make(*STRUCTURES[name])
  fit(task, steps=2, folder=tmp_path, **OPTIONS)
  state = fit(task, steps=4, folder=tmp_path, **OPTIONS).state  # resumes
  want = fit(task, steps=4, **OPTIONS).state
  for field in ("params", "extra"):
    loaded = load_params(tmp_path, field=field)
    for tree in (getattr(state, field), getattr(want, field)):
      assert jax.tree.structure(loaded) == jax.tree.structure(tree)
      plain = lambda leaf: jax.random.key_data(leaf) if field == "extra" and name == "key in extra" else leaf
      jax.tree.map(lambda a, b: np.testing.assert_array_equal(plain(a), plain(b)), loaded, tree)
      jax.tree.map(lambda a, b: np.testing.assert_equal(a.dtype, b.dtype), loaded, tree)
  np.testing.assert_allclose(predict(task, tmp_path, X), task.predict(state, X), rtol=1e-6)


@flax.struct.dataclass
class Structured:
  w: jax.Array
  name: str = flax.struct.field(pytree_node=False, default="a")


class Module(eqx.Module):
  w: jax.Array
  name: str = eqx.field(static=True, default="a")


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Registered:
  w: jax.Array


GRAPH, STATE = nnx.split(nnx.Linear(2, 1, rngs=nnx.Rngs(0)))
NODES = {
  "flax dataclass": (Structured(W), lambda p, e, x: x @ p.w),
  "equinox module": (Module(W), lambda p, e, x: x @ p.w),
  "registered dataclass": (Registered(W), lambda p, e, x: x @ p.w),
  "nnx state": (STATE, lambda p, e, x: nnx.merge(GRAPH, p)(x)[:, 0]),
  "frozen dict": (flax.core.freeze({"w": W}), lambda p, e, x: x @ p["w"]),
  "ordered dict": (collections.OrderedDict(b=W, a=B), lambda p, e, x: x @ p["b"] + p["a"]),
  "default dict": (collections.defaultdict(list, w=W), lambda p, e, x: x @ p["w"]),
  "in extra": ({"w": W}, lambda p, e, x: x @ p["w"] + 0 * e[0].w.sum(), [Registered(W)]),
}


@pytest.mark.parametrize("name", NODES)
def test_predictions_with_nodes_that_only_the_registry_knows(name, tmp_path):
  task = make(*NODES[name])
  fit(task, steps=2, folder=tmp_path, **OPTIONS)
  state = fit(task, steps=4, folder=tmp_path, **OPTIONS).state  # resumes
  assert jax.tree.structure(state) == jax.tree.structure(fit(task, steps=4, **OPTIONS).state)
  np.testing.assert_allclose(predict(task, tmp_path, X), task.predict(state, X), rtol=1e-6)
  other = make({"v": W}, lambda p, e, x: x @ p["v"])
  with pytest.raises(CheckpointError, match="params|extra"):
    predict(other, tmp_path, X)


def test_a_named_tuple_whose_class_is_gone_keeps_its_fields(tmp_path, monkeypatch):
  fit(make(*STRUCTURES["named tuple"]), steps=2, folder=tmp_path, **OPTIONS)
  monkeypatch.delattr(f"{__name__}.Layer")
  loaded = load_params(tmp_path)
  assert type(loaded).__name__ == "Layer" and loaded._fields == ("w", "b")


@pytest.mark.parametrize("other, message", [
  ({"w": W.astype(jnp.bfloat16), "b": B}, r"params/w is float32\[2\] in the checkpoint and bfloat16\[2\] in this task"),
  ({"w": jnp.ones(3), "b": B}, r"params/w is float32\[2\] in the checkpoint and float32\[3\] in this task"),
  ({"w": W}, "params have another structure"),
  ([W, B], "params have another structure"),
])  # fmt: skip
def test_what_does_not_fit_is_refused_by_name(other, message, tmp_path):
  fit(make(*STRUCTURES["dict"]), steps=2, folder=tmp_path, **OPTIONS)
  task = make(other, lambda p, e, x: x[:, 0])
  like = program.abstract_state(task, mesh.data_mesh())
  with pytest.raises(CheckpointError, match=message):
    checkpoint.restore(tmp_path, 2, like)
  with pytest.raises(CheckpointError, match=message):
    predict(task, tmp_path, X)


def test_another_dtype_is_cast_when_asked(tmp_path):
  state = fit(make(*STRUCTURES["dict"]), steps=2, folder=tmp_path, **OPTIONS).state
  task = make({"w": W.astype(jnp.bfloat16), "b": B}, lambda p, e, x: x[:, 0])
  like = program.abstract_state(task, mesh.data_mesh())
  cast, _, _ = checkpoint.restore(tmp_path, 2, like, cast=True)
  np.testing.assert_array_equal(cast.params["w"], state.params["w"].astype(jnp.bfloat16))
  assert load_params(tmp_path, dtype=np.float16)["w"].dtype == np.float16


def test_rows_and_step_are_in_the_checkpoint(tmp_path):
  task = make(*STRUCTURES["dict"])
  result = fit(task, steps=4, folder=tmp_path, **OPTIONS)
  _, rows, position = checkpoint.restore(tmp_path, 4, program.abstract_state(task, mesh.data_mesh()))
  assert rows == result.rows and position is None
