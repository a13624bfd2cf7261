"""The only training scan of the package: `run_chunk`; `fit` and `sweep` differ in what they wrap around it."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxreg.training.task import Task, TrainState

__all__ = ["batch_ids", "run_chunk"]


def batch_ids(key: jax.Array, first_step: ArrayLike, *, steps: int, examples: int, batch_size: int) -> jax.Array:
  """The examples of some consecutive steps: every epoch is a new permutation, its incomplete last batch dropped.

  Args:
    key: the run's key.
    first_step: int scalar, the first step's number.
    steps: static; how many steps.
    examples: static; size of the data set.
    batch_size: static; examples per step.

  Returns:
    int32 `[steps, batch_size]` indices; a function of (key, step) alone, however the steps are cut into chunks.
  """
  per_epoch = examples // batch_size
  first_epoch = first_step // per_epoch
  epochs = first_epoch + jnp.arange((steps - 1) // per_epoch + 2)

  def permutation(epoch):
    return _permutation(jax.random.fold_in(jax.random.fold_in(key, 2), epoch), examples)[: per_epoch * batch_size]

  batches = jax.vmap(permutation)(epochs).reshape(-1, batch_size)
  return jax.lax.dynamic_slice_in_dim(batches, first_step - first_epoch * per_epoch, steps)


def _permutation(key: jax.Array, count: int) -> jax.Array:
  bits = jax.random.bits(key, (count,), jnp.uint32)
  width = max(count - 1, 1).bit_length()
  if width > 16:
    return jnp.argsort(bits).astype(jnp.int32)
  # Sorting one word that ends in the index is six times faster on a CPU than sorting pairs. Examples whose 16 or more
  # random bits agree come in order of their index, next to each other: within a batch, or over a border of two.
  words = (bits << width) | jnp.arange(count, dtype=jnp.uint32)
  return (jax.lax.sort(words, is_stable=False) & ((1 << width) - 1)).astype(jnp.int32)


def run_chunk(
  task: Task, state: TrainState, data: Any, hparams: Mapping[str, Any], steps: int, *, count=None, constrain=None
):
  """Takes some steps in one loop.

  Args:
    task: static.
    state: where to start.
    data: the task's arrays, all of them; or, when the task reads a stream, batches stacked along a leading axis of
      length `steps`.
    hparams: hyperparameters.
    steps: static; how many steps at most.
    count: how many steps to take, at least 1, a number that one compiled program may read; default `steps`.
    constrain: function applied to every batch (a sharding constraint), or None.

  Returns:
    The state, the metrics averaged over the steps, and the number of steps before the first non-finite loss.
  """
  constrain = constrain or (lambda batch: batch)
  count = steps if count is None else count
  batch_at = _batches(task, state, data, steps)

  def body(index, carry):
    state, totals, finite = carry
    state, metrics = task.step(state, constrain(batch_at(index)), hparams)
    finite += (finite == index) & jnp.isfinite(metrics["loss"])
    return state, jax.tree.map(jnp.add, totals, metrics), finite

  shapes = jax.eval_shape(lambda: task.step(state, constrain(batch_at(0)), hparams)[1])
  if "loss" not in shapes:
    raise ValueError(f"a task's step must return a metric named loss, got {sorted(shapes)}.")
  totals = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.promote_types(x.dtype, jnp.float32)), shapes)
  state, totals, finite = jax.lax.fori_loop(0, count, body, (state, totals, jnp.int32(0)))
  return state, jax.tree.map(lambda x: x / count, totals), finite


def _batches(task: Task, state: TrainState, data, steps: int):
  """A function from the index of a step in the chunk to its batch."""
  if callable(task.data):
    return lambda index: jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, index, keepdims=False), data)
  examples = jax.tree.leaves(data)[0].shape[0]
  if task.batch_size is None:
    everything = {**data, "id": jnp.arange(examples, dtype=jnp.int32)}
    return lambda index: everything
  if task.batch_size > examples:
    raise ValueError(f"batch_size must be at most the {examples} examples of the data, got {task.batch_size}.")
  ids = batch_ids(state.key, state.step, steps=steps, examples=examples, batch_size=task.batch_size)

  def batch_at(index):
    chosen = jax.lax.dynamic_index_in_dim(ids, index, keepdims=False)
    rows = jax.tree.map(lambda x: jnp.asarray(x).at[chosen].get(mode="promise_in_bounds"), data)
    return {**rows, "id": chosen}

  return batch_at
