"""What is trained: a `Task` holds pure functions and the data; its `step` is the one every engine runs."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

__all__ = ["PRECISIONS", "Task", "TrainState"]

PRECISIONS = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float16": jnp.float16, "float64": jnp.float64}


class TrainState(NamedTuple):
  """All that changes while training; every leaf is an array, so it checkpoints, maps and shards as a whole.

  Attributes:
    step: int32 scalar, the number of steps taken.
    key: the run's threefry key, constant; randomness at a step is `fold_in(key, step)`.
    params: what is differentiated.
    extra: what is not: batch statistics, tables of per-example state, corrupted labels, a teacher's parameters.
    opt_state: the optimizer's state.
  """

  step: jax.Array
  key: jax.Array
  params: Any
  extra: Any
  opt_state: Any


@dataclasses.dataclass(frozen=True, eq=False)
class Task:
  """A training problem as pure functions of arrays.

  `hparams` is a mapping from names to scalars; they may be traced and vary inside a sweep. Everything else is static.

  Attributes:
    init_params: `(key, hparams) -> (params, extra)`.
    objective: `(params, extra, batch, key, hparams, axis_name) -> (loss, (extra, metrics))` with a scalar loss;
      `axis_name` is None except under `pmap` or `shard_map`, where terms that couple examples reduce over it.
    optimizer: `hparams -> optax.GradientTransformation`.
    data: a mapping of arrays that share their leading axis of examples, or a function without arguments that opens a
      stream (an iterator of batches with `get_state` and `set_state`). A batch has the same entries and `"id"`.
    batch_size: examples per step over all devices; None takes all of `data` at every step, in order.
    hparams: the default hyperparameters.
    evaluate_params: `(params, extra, hparams) -> metrics`, scalars; the default measures nothing.
    predict: `(params, extra, inputs) -> outputs`, for use of a trained checkpoint.
    custom_step: replaces `step`: `(task, state, batch, hparams) -> (state, metrics)`, for methods that are more than
      one gradient step (two networks, alternating updates). It leaves `step` and `key` of the state alone.
    param_spec: `(path, leaf) -> jax.sharding.PartitionSpec` of a leaf of the state on the mesh; default replicated.
    accumulate: number of equal micro-batches whose gradients are averaged in one step.
    precision: the dtype in which the objective computes; parameters, optimizer and extra state keep their own.
    remat: whether the backward pass recomputes all but the matrix products instead of storing them.
    axis_name: the mapped axis of `pmap` or `shard_map` over which gradients and metrics are averaged.
  """

  init_params: Callable
  objective: Callable
  optimizer: Callable
  data: Any
  batch_size: int | None
  hparams: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  evaluate_params: Callable | None = None
  predict: Callable | None = None
  custom_step: Callable | None = None
  param_spec: Callable | None = None
  accumulate: int = 1
  precision: str = "float32"
  remat: bool = False
  axis_name: str | None = None

  def __post_init__(self):
    if self.precision not in PRECISIONS:
      raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {self.precision!r}.")
    if self.accumulate < 1 or (self.batch_size or self.accumulate) % self.accumulate:
      raise ValueError(f"accumulate must be a positive divisor of batch_size {self.batch_size}, got {self.accumulate}.")
    if self.custom_step is not None and (self.accumulate, self.precision, self.remat) != (1, "float32", False):
      raise ValueError("accumulate, precision and remat need the standard step; this task brings its own.")

  def replace(self, **changes) -> "Task":
    """A copy with some fields changed: the way to switch on `accumulate`, `precision`, `remat` or `axis_name`."""
    return dataclasses.replace(self, **changes)

  def init(self, key: jax.Array, hparams: Mapping[str, Any]) -> TrainState:
    """The state before the first step."""
    params, extra = self.init_params(jax.random.fold_in(key, 0), hparams)
    return TrainState(jnp.int32(0), key, params, extra, self.optimizer(hparams).init(params))

  def step(self, state: TrainState, batch: Mapping[str, jax.Array], hparams: Mapping[str, Any]):
    """One update; returns the new state and a dict of scalar metrics that contains `"loss"`."""
    take = self.custom_step or gradient_step
    state, metrics = take(self, state, batch, hparams)
    return state._replace(step=state.step + 1), metrics

  def evaluate(self, state: TrainState, hparams: Mapping[str, Any]) -> dict[str, jax.Array]:
    """Metrics of the state on held-out data."""
    return {} if self.evaluate_params is None else self.evaluate_params(state.params, state.extra, hparams)


def step_key(state: TrainState) -> jax.Array:
  """The key of the current step, independent of those that draw the initial parameters and the batches."""
  return jax.random.fold_in(jax.random.fold_in(state.key, 1), state.step)


def gradient_step(task: Task, state: TrainState, batch, hparams):
  """The standard step: gradient of the objective, averaged over micro-batches and devices, then the optimizer."""
  key = step_key(state)
  if task.axis_name is not None:
    key = jax.random.fold_in(key, jax.lax.axis_index(task.axis_name))
  (loss, (extra, metrics)), grads = _gradients(task, state.params, state.extra, batch, key, hparams)

  def grad_fn(params, *_):  # for optimizers that look at the gradient elsewhere (sharpness-aware minimisation)
    return _gradients(task, params, state.extra, batch, key, hparams)[1]

  optimizer = optax.with_extra_args_support(task.optimizer(hparams))
  updates, opt_state = optimizer.update(grads, state.opt_state, state.params, value=loss, grad_fn=grad_fn)
  params = optax.apply_updates(state.params, updates)
  return TrainState(state.step, state.key, params, extra, opt_state), {"loss": loss, **metrics}


def _gradients(task: Task, params, extra, batch, key, hparams):
  dtype = PRECISIONS[task.precision]
  compute = (lambda tree: tree) if dtype == jnp.float32 else (lambda tree: _cast(tree, dtype))

  def objective(params, extra, batch, key):
    loss, aux = task.objective(compute(params), extra, compute(batch), key, hparams, task.axis_name)
    return loss.astype(jnp.promote_types(loss.dtype, jnp.float32)), aux

  if task.remat:
    objective = jax.checkpoint(objective, policy=jax.checkpoint_policies.checkpoint_dots)
  gradient = jax.value_and_grad(objective, has_aux=True)
  if task.accumulate == 1:
    (loss, (extra, metrics)), grads = gradient(params, extra, batch, key)
  else:
    loss, extra, metrics, grads = _accumulated(gradient, task.accumulate, params, extra, batch, key)
  if task.axis_name is not None:
    loss, metrics, grads = jax.lax.pmean((loss, metrics, grads), task.axis_name)
  return (loss, (extra, metrics)), grads


def _accumulated(gradient, count, params, extra, batch, key):
  # Every count-th example goes to one micro-batch, so that a sharded batch is not moved between devices.
  parts = jax.tree.map(lambda x: jnp.moveaxis(x.reshape(-1, count, *x.shape[1:]), 1, 0), batch)

  def body(carry, part):
    extra, index = carry
    (loss, (extra, metrics)), grads = gradient(params, extra, part, jax.random.fold_in(key, index))
    return (extra, index + 1), (loss, metrics, grads)

  # A scan that stacks would keep all gradients; summing keeps one.
  shapes = jax.eval_shape(lambda: body((extra, jnp.int32(0)), jax.tree.map(lambda x: x[0], parts))[1])
  total = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)

  def add(carry, part):
    inner, total = carry
    inner, new = body(inner, part)
    return (inner, jax.tree.map(jnp.add, total, new)), None

  ((extra, _), total), _ = jax.lax.scan(add, ((extra, jnp.int32(0)), total), parts)
  loss, metrics, grads = jax.tree.map(lambda x: x / count, total)
  return loss, extra, metrics, grads


def _cast(tree, dtype):
  def cast(leaf):
    return leaf.astype(dtype) if jnp.issubdtype(jnp.result_type(leaf), jnp.floating) else leaf

  return jax.tree.map(cast, tree)
