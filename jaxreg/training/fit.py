"""`fit`: one run, on one device or a mesh over many hosts, that survives being killed at any moment."""

import contextlib
import functools
import pathlib
import signal
import threading
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxreg.training import checkpoint
from jaxreg.training import mesh as mesh_lib
from jaxreg.training.log import MetricsLog
from jaxreg.training.loop import run_chunk
from jaxreg.training.progress import progress_bar
from jaxreg.training.task import Task, TrainState

__all__ = ["FitResult", "NonFiniteError", "fit", "initial_state"]


class NonFiniteError(FloatingPointError):
  """The loss or a parameter became infinite or NaN."""


class FitResult(NamedTuple):
  """What a run leaves.

  Attributes:
    state: the last state, global arrays.
    rows: logged metrics, one dict per logged step.
    interrupted: whether SIGTERM ended the run before its last step.
  """

  state: TrainState
  rows: list[dict]
  interrupted: bool


def fit(
  task: Task,
  *,
  steps: int,
  seed: int = 0,
  hparams: Mapping[str, Any] | None = None,
  folder=None,
  log_every: int = 100,
  eval_every: int | None = None,
  checkpoint_every: int | None = None,
  keep: int = 3,
  mesh: Mesh | None = None,
  profile_steps: int = 0,
  progress: bool = True,
  tensorboard: bool = True,
) -> FitResult:
  """Trains a task for a number of steps, resuming from the newest good checkpoint in `folder`.

  A run that is killed at any moment and started again with the same arguments on the same devices ends with
  bit-identical parameters and the same metrics. SIGTERM saves and returns. Accumulation, precision and
  rematerialisation are fields of the task: `fit(task.replace(accumulate=4), …)`.

  >>> from jaxreg.training import examples
  >>> result = fit(examples.least_squares(), steps=200, log_every=100, progress=False)
  >>> [row["step"] for row in result.rows], bool(result.rows[-1]["loss"] < 1e-3)
  ([100, 200], True)

  Args:
    task: what to train.
    steps: the step number to end at.
    seed: the seed of the run's key.
    hparams: overrides of the task's default hyperparameters.
    folder: where checkpoints, `metrics.jsonl` and TensorBoard files go; None keeps nothing.
    log_every: steps per compiled chunk and per logged row, whose metrics are means over the chunk.
    eval_every: steps between evaluations, a multiple of `log_every`; default at the end only.
    checkpoint_every: steps between checkpoints, a multiple of `log_every`; default `10 * log_every`.
    keep: how many checkpoints to keep.
    mesh: a mesh with axis `data` (and `model`); see `mesh.data_mesh` for the default.
    profile_steps: if positive, that many steps are first run on a copy of the state under JAX's profiler, whose trace
      goes to `<folder>/profile`; training is not affected.
    progress: whether to show a progress bar.
    tensorboard: whether to write TensorBoard event files.

  Returns:
    A `FitResult`.

  Raises:
    NonFiniteError: when the loss or a parameter is not finite; the last good checkpoint is kept.
    CheckpointError: when a checkpoint cannot be written.
    ValueError: when an argument is out of range.
  """
  eval_every = eval_every or steps
  checkpoint_every = checkpoint_every or 10 * log_every
  if steps < 1 or log_every < 1:
    raise ValueError(f"steps and log_every must be positive, got {steps} and {log_every}.")
  for name, value in (("eval_every", eval_every), ("checkpoint_every", checkpoint_every)):
    if value < 1 or (value % log_every and value != steps):
      raise ValueError(f"{name} must be a multiple of log_every = {log_every} or equal to steps, got {value}.")
  if profile_steps and folder is None:
    raise ValueError("profile_steps needs a folder for the trace.")

  mesh = mesh or mesh_lib.data_mesh()
  hparams = merge_hparams(task, hparams)
  state = initial_state(task, seed, hparams, mesh)
  stream = task.data() if callable(task.data) else None
  start, info = 0, _fingerprint(seed, hparams)
  found = checkpoint.latest(folder) if folder is not None else None
  if found is not None:
    state, saved, position = checkpoint.restore(folder, found, state)
    if saved != info:
      raise ValueError(f"{folder} holds a run with {saved}, not {info}; choose another folder or delete it.")
    start = found
    if stream is not None:
      stream.set_state(position)
  first = stream.get_state() if stream is not None else None
  data = stream if stream is not None else mesh_lib.replicate(task.data, mesh)

  if profile_steps:
    _profile(task, state, _chunk_data(data, profile_steps, mesh), hparams, profile_steps, mesh, folder)
    if stream is not None:  # the profiled steps read batches that training still needs
      stream.set_state(first)

  with _writing(folder):
    log = MetricsLog(folder, step=start, tensorboard=tensorboard)

  def save():
    if folder is not None:
      with _writing(folder):
        log.sync()
      position = stream.get_state() if stream is not None else None
      checkpoint.save(folder, state, info=info, position=position, keep=keep)

  step, saved_at = start, found
  evaluate = compiled_evaluate(task)
  with contextlib.ExitStack() as stack:
    stack.callback(log.close)
    if stream is not None:
      stack.callback(stream.close)
    terminated = stack.enter_context(_catch_sigterm())
    advance = stack.enter_context(progress_bar(steps, start, show=progress))
    while step < steps:
      count = min(log_every - step % log_every, steps - step)
      began = time.perf_counter()
      chunk = compiled_chunk(task, mesh, count)
      new_state, metrics, finite = chunk(state, _chunk_data(data, count, mesh), hparams, np.int32(count))
      metrics, finite = jax.device_get((metrics, finite))
      if not finite["loss"] == count:
        raise NonFiniteError(_non_finite_message("the loss", step + int(finite["loss"]) + 1, folder, saved_at))
      if not finite["params"]:
        raise NonFiniteError(_non_finite_message("a parameter", step + count, folder, saved_at))
      state, step = new_state, step + count
      row = {"step": step, **{name: float(value) for name, value in metrics.items()}}
      if step % eval_every == 0 or step == steps:
        row |= {name: float(value) for name, value in jax.device_get(evaluate(state, hparams)).items()}
      with _writing(folder):
        log.append(row)
      advance(count, row["loss"], time.perf_counter() - began)
      stop = _agreed(terminated.is_set())
      if step % checkpoint_every == 0 or step == steps or stop:
        save()
        saved_at = step
      if stop:
        break
  return FitResult(state, log.rows, interrupted=step < steps)


def merge_hparams(task: Task, hparams: Mapping[str, Any] | None) -> dict[str, np.ndarray]:
  """The task's default hyperparameters with overrides, as NumPy scalars; unknown names are a ValueError."""
  unknown = set(hparams or {}) - set(task.hparams)
  if unknown:
    raise ValueError(f"unknown hyperparameters {sorted(unknown)}; the task has {sorted(task.hparams)}.")
  return {name: _scalar(value) for name, value in {**task.hparams, **(hparams or {})}.items()}


def initial_state(task: Task, seed: int, hparams: Mapping[str, Any], mesh: Mesh) -> TrainState:
  """The state before the first step, laid out on the mesh."""
  return _compiled_init(task, mesh)(np.uint32(seed), dict(hparams))


def abstract_state(task: Task, mesh: Mesh) -> TrainState:
  """Shapes and shardings of the state, without computing anything."""
  shapes = jax.eval_shape(lambda: task.init(jax.random.key(0), merge_hparams(task, None)))
  place = lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
  return jax.tree.map(place, shapes, _state_sharding(task, mesh, shapes))


@functools.lru_cache(maxsize=32)
def _compiled_init(task: Task, mesh: Mesh):
  shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(task, mesh))
  return jax.jit(lambda seed, hparams: task.init(jax.random.key(seed), hparams), out_shardings=shardings)


@functools.lru_cache(maxsize=32)
def compiled_chunk(task: Task, mesh: Mesh, steps: int):
  """The jitted chunk of at most `steps` steps on the mesh; also says whether loss and parameters stayed finite.

  It reads the number of steps, as a sweep's program does: a constant would be rounded into the metrics differently.
  """
  constrain = None
  if mesh.size > 1:
    batch = NamedSharding(mesh, PartitionSpec("data"))
    constrain = lambda tree: jax.lax.with_sharding_constraint(tree, jax.tree.map(lambda _: batch, tree))

  def chunk(state, data, hparams, count):
    state, metrics, finite = run_chunk(task, state, data, hparams, steps, count=count, constrain=constrain)
    if mesh.size > 1:
      state = jax.lax.with_sharding_constraint(state, _state_sharding(task, mesh, state))
    leaves = [x for x in jax.tree.leaves(state.params) if jnp.issubdtype(x.dtype, jnp.inexact)]
    good = jnp.all(jnp.stack([jnp.all(jnp.isfinite(x)) for x in leaves])) if leaves else jnp.array(True)
    return state, metrics, {"loss": finite, "params": good}

  return jax.jit(chunk, donate_argnums=0)


@functools.lru_cache(maxsize=32)
def compiled_evaluate(task: Task):
  """The jitted evaluation of a task."""
  return jax.jit(lambda state, hparams: {} if task.evaluate is None else task.evaluate(state, hparams))


def _state_sharding(task: Task, mesh: Mesh, state: TrainState):
  spec = task.param_spec or (lambda path, leaf: PartitionSpec())
  return jax.tree_util.tree_map_with_path(lambda path, leaf: NamedSharding(mesh, spec(path, leaf)), state)


def _chunk_data(data, count: int, mesh: Mesh):
  if not hasattr(data, "get_state"):
    return data
  try:
    batches = [next(data) for _ in range(count)]
  except StopIteration:
    raise ValueError("the data stream ended before the run; let it repeat or take fewer steps.") from None
  stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *batches)
  return mesh_lib.split_processes(stacked, mesh, PartitionSpec(None, "data"))


def _profile(task, state, data, hparams, steps, mesh, folder) -> None:
  chunk = compiled_chunk(task, mesh, steps)
  run = lambda: jax.block_until_ready(chunk(jax.tree.map(jnp.copy, state), data, hparams, np.int32(steps)))
  run()  # the first call compiles, which would drown the trace
  with jax.profiler.trace(str(pathlib.Path(folder) / "profile")):
    run()


def _scalar(value):
  value = np.asarray(value)
  return value.astype(jax.dtypes.canonicalize_dtype(value.dtype))


def _fingerprint(seed: int, hparams: Mapping[str, Any]) -> dict:
  return {"seed": int(seed), "hparams": {name: value.tolist() for name, value in sorted(hparams.items())}}


def _non_finite_message(what: str, step: int, folder, saved_at) -> str:
  kept = (
    f"the last good checkpoint is step {saved_at} in {folder}" if saved_at is not None else "no checkpoint was kept"
  )
  return f"{what} is not finite at step {step}; {kept}. A smaller learning rate or gradient clipping may help."


@contextlib.contextmanager
def _writing(folder):
  try:
    yield
  except OSError as error:
    raise checkpoint.CheckpointError(
      f"cannot write to the run's folder {folder}: {error}. Earlier checkpoints are intact."
    ) from error


@contextlib.contextmanager
def _catch_sigterm():
  """Yields an event that SIGTERM sets; only a process's main thread can ask for that."""
  event = threading.Event()
  if threading.current_thread() is not threading.main_thread():
    yield event
    return
  previous = signal.signal(signal.SIGTERM, lambda *_: event.set())
  try:
    yield event
  finally:
    signal.signal(signal.SIGTERM, previous)


def _agreed(flag: bool) -> bool:
  if jax.process_count() == 1:
    return flag
  from jax.experimental import multihost_utils

  return bool(np.any(multihost_utils.process_allgather(np.array(flag))))
