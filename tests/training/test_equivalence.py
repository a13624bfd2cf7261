"""One `step`, the same numbers: jit, pmap, sharded jit over eight devices (two processes: test_distributed)."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxreg.losses import early_learning
from jaxreg.models import MLP
from jaxreg.training import data_mesh, examples, fit, gradient_task
from jaxreg.training.loop import batch_ids


def table_task():
  """A network whose loss keeps a row per example: the case in which replicas drift apart if done carelessly."""
  rng = np.random.default_rng(0)
  model = MLP((16, 3), activation=nn.tanh)
  data = {"x": rng.normal(size=(64, 5)).astype(np.float32), "y": rng.integers(0, 3, 64).astype(np.int32)}

  def objective(params, extra, batch, context):
    logits = model.apply({"params": params}, batch["x"])
    values, table = early_learning.elr_loss(
      logits,
      batch["y"],
      batch["id"],
      state=extra,
      momentum=0.7,
      weight=context.hparams["weight"],
      axis_name=context.axis_name,
    )
    return jnp.mean(values), (table, {"accuracy": jnp.mean(logits.argmax(-1) == batch["y"])})

  return gradient_task(
    init_params=lambda key, h: (model.init(key, jnp.zeros((1, 5)))["params"], early_learning.elr_init(64, 3)),
    objective=objective,
    optimizer=lambda hparams: optax.adam(hparams["learning_rate"]),
    data=data,
    batch_size=32,
    hparams={"learning_rate": 1e-2, "weight": 3.0},
  )


def _batches(task, state, steps):
  ids = batch_ids(state.key, state.step, steps=steps, examples=64, batch_size=32)
  return [{**{name: value[np.asarray(row)] for name, value in task.data.items()}, "id": np.asarray(row)} for row in ids]


@pytest.fixture(scope="module")
def plain():
  task = table_task()
  state = task.init(jax.random.key(0), task.hparams)
  batches = _batches(task, state, 5)
  step = jax.jit(task.step)
  metrics = []
  for batch in batches:
    state, measured = step(state, batch, task.hparams)
    metrics.append(measured)
  return task, batches, state, metrics


def _assert_close(left, right):
  keyless = lambda state: state._replace(key=jax.random.key_data(state.key))
  chex.assert_trees_all_close(keyless(left), keyless(right), rtol=2e-5, atol=2e-6)


def test_pmap_equals_jit(plain):
  task, batches, expected, metrics = plain
  mapped = task.replace(axis_name="devices")
  step = jax.pmap(mapped.step, axis_name="devices", in_axes=(0, 0, None))
  state = task.init(jax.random.key(0), task.hparams)
  state = jax.tree.map(lambda x: jnp.broadcast_to(x, (8, *x.shape)), state)
  for batch, want in zip(batches, metrics):
    split = jax.tree.map(lambda x: x.reshape(8, -1, *x.shape[1:]), batch)
    state, measured = step(state, split, task.hparams)
    np.testing.assert_allclose(measured["loss"], np.full(8, want["loss"]), rtol=1e-5)
    np.testing.assert_allclose(measured["accuracy"], np.full(8, want["accuracy"]), rtol=1e-6)
  for device in (0, 7):  # every replica holds the whole table
    _assert_close(jax.tree.map(lambda x, device=device: x[device], state), expected)


def test_sharded_jit_equals_jit(plain):
  task, batches, expected, metrics = plain
  mesh = data_mesh(jax.devices())
  replicated, split = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec("data"))
  state = jax.device_put(task.init(jax.random.key(0), task.hparams), replicated)
  step = jax.jit(task.step)
  for batch, want in zip(batches, metrics):
    state, measured = step(state, jax.device_put(batch, split), task.hparams)
    np.testing.assert_allclose(measured["loss"], want["loss"], rtol=1e-5)
  _assert_close(state, expected)


def test_fit_on_a_mesh_equals_fit_on_one_device():
  task = table_task()
  one = fit(task, steps=20, log_every=10, mesh=data_mesh(jax.devices()[:1]), progress=False)
  eight = fit(task, steps=20, log_every=10, mesh=data_mesh(jax.devices()), progress=False)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), one.state.params, eight.state.params
  )
  assert eight.state.params["Dense_0"]["kernel"].sharding.num_devices == 8


def test_parameters_can_be_sharded_over_the_model_axis(tmp_path):
  def spec(path, leaf):
    return PartitionSpec(None, "model") if leaf.ndim == 2 and leaf.shape[1] % 2 == 0 else PartitionSpec()

  task = table_task().replace(param_spec=spec)
  mesh = data_mesh(jax.devices(), model=2)
  sharded = fit(task, steps=20, log_every=10, checkpoint_every=10, mesh=mesh, folder=tmp_path, progress=False)
  assert sharded.state.params["Dense_0"]["kernel"].addressable_shards[0].data.shape == (5, 8)
  one = fit(table_task(), steps=20, log_every=10, progress=False)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), one.state.params,
               sharded.state.params)  # fmt: skip
  fewer = fit(task, steps=30, log_every=10, mesh=data_mesh(jax.devices()[:2], model=2), folder=tmp_path, progress=False)
  longer = fit(table_task(), steps=30, log_every=10, progress=False)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), longer.state.params,
               fewer.state.params)  # fmt: skip


@pytest.mark.parametrize("changes, tolerance", [({"accumulate": 4}, 1e-5), ({"remat": True}, 1e-6),
                                                ({"precision": "bfloat16"}, 2e-2)])  # fmt: skip
def test_switches_of_the_step_leave_the_numbers(changes, tolerance):
  task = examples.least_squares(batch_size=32)
  plain = fit(task, steps=50, log_every=50, progress=False).state.params
  switched = fit(task.replace(**changes), steps=50, log_every=50, progress=False).state.params
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=tolerance), plain, switched)
  jax.tree.map(lambda a: np.testing.assert_equal(a.dtype, np.float32), switched)


def test_accumulation_works_sharded():
  task = table_task().replace(accumulate=2)
  one = fit(task, steps=5, log_every=5, mesh=data_mesh(jax.devices()[:1]), progress=False)
  eight = fit(task, steps=5, log_every=5, mesh=data_mesh(jax.devices()), progress=False)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), one.state.params, eight.state.params
  )


def test_profiling_writes_a_trace_and_leaves_training_alone(tmp_path):
  task = examples.least_squares()
  profiled = fit(task, steps=40, log_every=20, folder=tmp_path, profile_steps=3, progress=False)
  plain = fit(task, steps=40, log_every=20, progress=False)
  assert list((tmp_path / "profile").rglob("*.xplane.pb"))
  np.testing.assert_array_equal(profiled.state.params["w"], plain.state.params["w"])
