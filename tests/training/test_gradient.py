"""The gradient step: weighted means however the batch is cut, optimizers that look elsewhere, precision, the hook."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxreg.training import Mean, data_mesh, gradient_task
from jaxreg.training.task import Computation, Task, TrainState

RNG = np.random.default_rng(0)
X = RNG.normal(size=(16, 3)).astype(np.float32)
Y = RNG.normal(size=16).astype(np.float32)
MASK = np.array([1, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 0, 1, 1, 1, 1], np.float32)
BATCH = {"x": X, "y": Y, "mask": MASK, "id": np.arange(16, dtype=np.int32)}


def make(optimizer=None, weighted=False, **options):
  def objective(params, extra, batch, context):
    errors = (batch["x"] @ params - batch["y"]) ** 2
    extra = {"count": extra["count"] + 1}
    if weighted:
      loss = Mean(jnp.sum(errors * batch["mask"]), jnp.sum(batch["mask"]))
      return loss, (extra, {"error": loss})
    return errors.mean(), (extra, {"error": errors.mean()})

  return gradient_task(
    init_params=lambda key, hparams: (jnp.ones(3), {"count": jnp.zeros(())}),
    objective=objective,
    optimizer=lambda hparams: optimizer or optax.sgd(0.1),
    data={name: BATCH[name] for name in ("x", "y", "mask")},
    batch_size=16,
    **options,
  )


def one_step(task, batch=None):
  state, metrics = jax.jit(task.step)(task.init(jax.random.key(0), {}), batch or BATCH, {})
  return state, metrics


def masked_loss(w):
  return np.sum(MASK * (X @ w - Y) ** 2) / MASK.sum()


@pytest.mark.parametrize("accumulate", [1, 2, 8, 16])
def test_a_masked_mean_does_not_depend_on_accumulation(accumulate):
  state, metrics = one_step(make(weighted=True, accumulate=accumulate))
  np.testing.assert_allclose(metrics["loss"], masked_loss(np.ones(3)), rtol=1e-6)
  np.testing.assert_allclose(metrics["error"], metrics["loss"], rtol=1e-6)
  gradient = 2 * X.T @ (MASK * (X @ np.ones(3) - Y)) / MASK.sum()
  np.testing.assert_allclose(state.params, 1 - 0.1 * gradient, rtol=1e-5)
  assert state.extra["count"] == accumulate


def test_a_masked_mean_does_not_depend_on_devices():
  task = make(weighted=True)
  want, measured = one_step(task)
  split = jax.tree.map(lambda x: x.reshape(8, 2, *x.shape[1:]), BATCH)  # some devices have no unmasked example
  mapped = task.replace(axis_name="i", accumulate=2)
  state = jax.tree.map(lambda x: jnp.broadcast_to(x, (8, *x.shape)), task.init(jax.random.key(0), {}))
  state, metrics = jax.pmap(mapped.step, axis_name="i", in_axes=(0, 0, None))(state, split, {})
  np.testing.assert_allclose(state.params[3], want.params, rtol=1e-6)
  np.testing.assert_allclose(metrics["loss"], np.full(8, measured["loss"]), rtol=1e-6)
  sharded = jax.device_put(BATCH, NamedSharding(data_mesh(jax.devices()), PartitionSpec("data")))
  np.testing.assert_allclose(one_step(task, sharded)[0].params, want.params, rtol=1e-6)


def test_a_batch_without_weight_moves_nothing():
  state, metrics = one_step(make(weighted=True), {**BATCH, "mask": np.zeros(16, np.float32)})
  assert metrics["loss"] == 0 and (state.params == 1).all()


SAM = functools.partial(
  optax.contrib.sam, optax.sgd(0.1), optax.chain(optax.contrib.normalize(), optax.sgd(0.05)), sync_period=2,
  opaque_mode=True, reset_state=False,
)  # fmt: skip


@pytest.mark.parametrize("accumulate", [1, 4])
def test_sharpness_aware_minimisation(accumulate):
  state, _ = one_step(make(SAM(), accumulate=accumulate))
  loss = lambda w: jnp.mean((X @ w - Y) ** 2)
  gradient = jax.grad(loss)(jnp.ones(3))
  want = 1 - 0.1 * jax.grad(loss)(1 + 0.05 * gradient / jnp.linalg.norm(gradient))
  np.testing.assert_allclose(state.params, want, atol=1e-5)
  assert state.extra["count"] == accumulate  # looking elsewhere does not move the extra state


OPTIMIZERS = {
  "lbfgs": optax.lbfgs(),
  "backtracking": optax.chain(optax.sgd(1.0), optax.scale_by_backtracking_linesearch(10)),
  "polyak": optax.polyak_sgd(),
  "reduce on plateau": optax.chain(optax.sgd(0.1), optax.contrib.reduce_on_plateau()),
  "multi steps": optax.MultiSteps(optax.sgd(0.1), 2),
  "apply if finite": optax.apply_if_finite(optax.sgd(0.1), 3),
  "schedule free": optax.contrib.schedule_free_sgd(0.1),
  "sam": SAM(),
  "sophia": optax.contrib.sophia(0.1),
  "sophia in a chain": optax.chain(optax.contrib.sophia(0.1), optax.scale_by_backtracking_linesearch(10)),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("accumulate", [1, 4])
def test_optimizers_get_what_they_ask_for(name, accumulate):
  task = make(OPTIMIZERS[name], accumulate=accumulate)
  state, step = task.init(jax.random.key(0), {}), jax.jit(task.step)
  losses = []
  for _ in range(8):
    state, metrics = step(state, BATCH, {})
    losses.append(float(metrics["loss"]))
  assert losses[-1] < losses[0]
  if name == "lbfgs":
    np.testing.assert_allclose(state.params, np.linalg.lstsq(X, Y)[0], atol=1e-3)


def test_float16_by_loss_scaling_is_near_float32():
  """A batch that is fitted already: an example's gradient over the batch size is below float16's smallest number."""
  w = RNG.normal(size=(8, 10)).astype(np.float32) * 4
  x = RNG.normal(size=(4096, 8)).astype(np.float32)
  y = (x @ w).argmax(1).astype(np.int32)

  def objective(params, extra, batch, context):
    logits = (batch["x"] @ params).astype(jnp.float32)
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"]).mean(), (extra, {})

  task = gradient_task(
    init_params=lambda key, hparams: (jnp.asarray(w * 2), {}),
    objective=objective,
    optimizer=lambda hparams: optax.sgd(1.0),
    data={"x": x, "y": y},
    batch_size=4096,
  )
  step = lambda task: one_step(task, {"x": x, "y": y, "id": np.arange(4096)})[0].params - w * 2
  want = step(task)
  for options in ({"precision": "float16"}, {"precision": "float16", "accumulate": 4}, {"precision": "bfloat16"}):
    assert jnp.linalg.norm(step(task.replace(**options)) - want) < 0.2 * jnp.linalg.norm(want)


def test_float16_finds_a_scale_at_which_large_gradients_do_not_overflow():
  big = make().replace(precision="float16")
  state, _ = one_step(big, {**BATCH, "x": X * 100, "y": Y * 100})
  want, _ = one_step(make(), {**BATCH, "x": X * 100, "y": Y * 100})
  np.testing.assert_allclose(state.params, want.params, rtol=0.02)


def test_precision_casts_inputs_and_keeps_targets_labels_and_ids():
  seen = {}

  def objective(params, extra, batch, context):
    seen.update({name: value.dtype for name, value in batch.items()} | {"params": params.dtype})
    return jnp.mean(batch["x"] @ params), (extra, {})

  task = gradient_task(
    init_params=lambda key, hparams: (jnp.ones(3), {}), objective=objective, optimizer=lambda hparams: optax.sgd(0.1),
    data={"x": X, "y": Y}, batch_size=16, precision="bfloat16",
  )  # fmt: skip
  one_step(task, {"x": X, "y": Y, "id": np.arange(16, dtype=np.int32)})
  assert seen == {"x": jnp.bfloat16, "params": jnp.bfloat16, "y": np.float32, "id": np.int32}


def test_the_hook_after_the_update_sees_the_new_parameters():
  def average(params, extra, context):
    return params, {**extra, "teacher": 0.5 * extra["teacher"] + 0.5 * params}

  def objective(params, extra, batch, context):
    return jnp.mean((batch["x"] @ params - batch["y"]) ** 2), (extra, {})

  task = gradient_task(
    init_params=lambda key, hparams: (jnp.ones(3), {"teacher": jnp.ones(3)}), objective=objective,
    optimizer=lambda hparams: optax.sgd(0.1), data={"x": X, "y": Y}, batch_size=16, after_update=average,
  )  # fmt: skip
  state, _ = one_step(task)
  np.testing.assert_allclose(state.extra["teacher"], 0.5 + 0.5 * state.params, rtol=1e-6)
  project = task.replace()  # a plain copy
  assert project.step is task.step


def test_the_context_says_where_training_is():
  seen = []

  def objective(params, extra, batch, context):
    seen.append(context)
    return jnp.sum(params) * context.step, (extra, {"step_number": context.step.astype(float)})

  task = gradient_task(
    init_params=lambda key, hparams: (jnp.ones(3), {}), objective=objective, optimizer=lambda hparams: optax.sgd(0.1),
    data={"x": X}, batch_size=16, hparams={"a": 1.0},
  )  # fmt: skip
  state = task.init(jax.random.key(0), task.hparams)
  for expected in range(3):
    state, metrics = task.step(state, {"x": X, "id": np.arange(16)}, task.hparams)
    assert metrics["step_number"] == expected
  assert seen[0].hparams == {"a": 1.0} and seen[0].axis_name is None
  keys = [jax.random.key_data(context.key).tolist() for context in seen]
  assert len({tuple(key) for key in keys}) == 3


@pytest.mark.parametrize("change, message", [
  ({"precision": "int3"}, "precision must be one of"),
  ({"precision": "float64"}, "needs JAX's 64-bit mode"),
  ({"accumulate": 0}, "accumulate must be a positive divisor"),
  ({"accumulate": 7}, "accumulate must be a positive divisor of batch_size 16, got 7"),
])  # fmt: skip
def test_bad_computations(change, message):
  with pytest.raises(ValueError, match=message):
    make().replace(**change)


def test_a_step_of_ones_own_cannot_be_computed_differently():
  task = Task(
    init=lambda key, hparams: TrainState.create(key, jnp.ones(3)),
    step=lambda state, batch, hparams: (state.advance(), {"loss": jnp.zeros(())}),
    data={"x": X},
    batch_size=4,
  )
  with pytest.raises(ValueError, match="precision need a task of gradient_task"):
    task.replace(precision="bfloat16")
  assert task.replace(precision="float32").computation == Computation()
