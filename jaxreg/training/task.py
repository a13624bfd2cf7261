"""What is trained: a `Task` is four pure functions, data and a config. `gradient.gradient_task` builds most of them."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

__all__ = ["PRECISIONS", "Computation", "Context", "HeldOut", "Mean", "Task", "TrainState"]

PRECISIONS = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float16": jnp.float16, "float64": jnp.float64}


class TrainState(NamedTuple):
  """All that changes while training; every leaf is an array, so it checkpoints, maps and shards as a whole.

  Attributes:
    step: int32 scalar, the number of steps taken.
    key: the run's threefry key, constant; randomness at a step comes from `step_key`.
    params: what is differentiated.
    extra: what is not: batch statistics, tables of per-example state, corrupted labels, a teacher's parameters.
    opt_state: the optimizer's state.
  """

  step: jax.Array
  key: jax.Array
  params: Any
  extra: Any = ()
  opt_state: Any = ()

  @classmethod
  def create(cls, key: jax.Array, params, extra=(), opt_state=()) -> "TrainState":
    """The state before the first step."""
    return cls(jnp.int32(0), key, params, extra, opt_state)

  def advance(self, **changes) -> "TrainState":
    """The state one step later, with some fields changed: what a task's `step` returns."""
    return self._replace(step=self.step + 1, **changes)

  def step_key(self) -> jax.Array:
    """The key of this step, independent of those that draw the initial parameters and the order of the data."""
    return jax.random.fold_in(jax.random.fold_in(self.key, 1), self.step)


class Context(NamedTuple):
  """What an objective may read besides parameters and data.

  Attributes:
    step: int32 scalar, the number of steps taken before this one.
    key: the key of this step (of this device and micro-batch, where there are several).
    hparams: the hyperparameters, a mapping of scalars.
    axis_name: None except under `pmap` or `shard_map`, where terms that couple examples reduce over it.
  """

  step: jax.Array
  key: jax.Array
  hparams: Mapping[str, Any]
  axis_name: str | None


class Mean(NamedTuple):
  """A mean over examples as a sum and a weight, the same number however a batch is accumulated or split over devices.

  An objective may return its loss, and any metric, as `Mean(jnp.sum(mask * values), jnp.sum(mask))`. The weight must
  not depend on the parameters. A weight of zero gives 0.

  Attributes:
    total: the weighted sum of the examples' values, a scalar.
    weight: the sum of the weights, a scalar.
  """

  total: jax.Array
  weight: jax.Array

  def value(self) -> jax.Array:
    """The mean."""
    weight = jnp.asarray(self.weight, jnp.result_type(self.total, jnp.float32))
    return jnp.where(weight == 0, 0, self.total / jnp.where(weight == 0, 1, weight))


class HeldOut(NamedTuple):
  """Held-out data that are read as a stream.

  Attributes:
    open: a function without arguments that opens a stream of batches which ends (`num_epochs=1`).
    measure: `(state, batch, hparams) -> metrics`, each a `Mean` over the batch's examples; a batch that was filled up
      says so in its entry `"valid"`.
  """

  open: Callable
  measure: Callable


@dataclasses.dataclass(frozen=True)
class Computation:
  """How a gradient step is computed; static, and part of a run's identity.

  Attributes:
    accumulate: number of equal micro-batches whose gradients are averaged in one step.
    precision: the dtype in which the objective computes; parameters, optimizer and extra state keep their own.
    remat: whether the backward pass recomputes all but the matrix products instead of storing them.
    axis_name: the mapped axis of `pmap` or `shard_map` over which gradients and metrics are averaged.
    cast: names of the batch's entries that go into the network and are cast to `precision`; others, such as
      regression targets, keep their dtype.
  """

  accumulate: int = 1
  precision: str = "float32"
  remat: bool = False
  axis_name: str | None = None
  cast: tuple[str, ...] = ("x",)

  def __post_init__(self):
    if self.precision not in PRECISIONS:
      raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {self.precision!r}.")
    if self.precision == "float64" and not jax.config.jax_enable_x64:
      raise ValueError("precision float64 needs JAX's 64-bit mode: jax.config.update('jax_enable_x64', True).")
    if not isinstance(self.accumulate, int) or self.accumulate < 1:
      raise ValueError(f"accumulate must be a positive divisor of the batch size, got {self.accumulate!r}.")


@dataclasses.dataclass(frozen=True, eq=False)
class Task:
  """A training problem: four pure functions, data and a config.

  A method that is one gradient step on an objective is built by `gradient_task`. Methods that are more (two networks,
  alternating updates) write `step` themselves; it returns `state.advance(…)`, which counts the step.

  Hyperparameters are scalars that may be traced and vary inside a sweep. Everything else is static.

  Attributes:
    init: `(key, hparams) -> TrainState`; `key` is the run's.
    step: `(state, batch, hparams) -> (state, metrics)`: one update and scalar metrics, `"loss"` among them.
    data: a mapping of arrays that share their leading axis of examples, or a function without arguments that opens a
      stream (an iterator of batches with `get_state` and `set_state`). A batch has the same entries and `"id"`.
    batch_size: examples per step over all devices; None takes all of `data` at every step, in order.
    hparams: the default hyperparameters, by name.
    evaluate: `(state, hparams) -> metrics`, scalars on held-out data; None measures nothing.
    predict: `(state, inputs) -> outputs`, for use of a trained checkpoint; it sees `params` and `extra` only.
    config: a frozen dataclass with what is static about the task; it is part of a run's identity.
    held_out: held-out data too large to be held as arrays; `fit` measures them beside `evaluate`.
    param_spec: `(path, leaf) -> jax.sharding.PartitionSpec` of a leaf of the state on the mesh; default replicated.
    computation: how the gradient step is computed; change it with `replace`.
    make_step: `Computation -> step`, set by `gradient_task`.
  """

  init: Callable
  step: Callable
  data: Any
  batch_size: int | None
  hparams: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  evaluate: Callable | None = None
  predict: Callable | None = None
  config: Any = None
  held_out: HeldOut | None = None
  param_spec: Callable | None = None
  computation: Computation = Computation()
  make_step: Callable | None = None

  def __post_init__(self):
    if callable(self.data):
      if self.batch_size is None:
        raise ValueError("batch_size must be a number when data is a stream.")
    else:
      _check_data(self.data)
    size, accumulate = self.batch_size, self.computation.accumulate
    if size is not None and (size < 1 or size % accumulate):
      raise ValueError(f"accumulate must be a positive divisor of batch_size {size}, got {accumulate}.")

  def replace(self, **changes) -> "Task":
    """A copy with some fields changed, those of `computation` among them: `task.replace(accumulate=4)`.

    Raises:
      ValueError: when a task that writes its own step is asked to compute it differently.
    """
    computation = {name: changes.pop(name) for name in _COMPUTATION if name in changes}
    if computation:
      changed = dataclasses.replace(self.computation, **computation)
      if changed != self.computation:
        if self.make_step is None:
          raise ValueError(f"{', '.join(computation)} need a task of gradient_task; this one writes its own step.")
        changes |= {"computation": changed, "step": self.make_step(changed)}
    return dataclasses.replace(self, **changes)


_COMPUTATION = tuple(field.name for field in dataclasses.fields(Computation))


def _check_data(data) -> None:
  if not isinstance(data, Mapping) or not data:
    raise ValueError(f"data must be a mapping of arrays or a function that opens a stream, got {type(data).__name__}.")
  lengths = {name: np.shape(value)[:1] for name, value in data.items()}
  if len(set(lengths.values())) != 1 or () in lengths.values():
    listed = ", ".join(f"{name} {length[0] if length else 'no axis'}" for name, length in lengths.items())
    raise ValueError(f"the arrays of data must share their leading axis of examples, got lengths: {listed}.")
