"""`fit`: one run, on one device or a mesh over many hosts, that survives being killed at any moment."""

import contextlib
import functools
import pathlib
import signal
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from jaxreg.training import checkpoint, files, identity, program
from jaxreg.training import hparams as hparams_lib
from jaxreg.training import mesh as mesh_lib
from jaxreg.training.log import MetricsLog
from jaxreg.training.progress import progress_bar
from jaxreg.training.task import Task, TrainState

__all__ = ["FitResult", "NonFiniteError", "fit"]


class NonFiniteError(FloatingPointError):
  """The loss or a parameter became infinite or NaN."""


class FitResult(NamedTuple):
  """What a run leaves.

  Attributes:
    state: the last state, global arrays.
    rows: logged metrics, one dict per logged step.
    interrupted: the number of the signal that ended the run before its last step (SIGTERM or SIGINT), else 0.
    stopped: whether patience ended it before its last step.
  """

  state: TrainState
  rows: list[dict]
  interrupted: int
  stopped: bool


class _Best(NamedTuple):
  """Which evaluation counts as the best one, and how long to wait for a better one."""

  metric: str | None
  sign: int
  patience: int | None

  def values(self, rows: list[dict]) -> list[float]:
    """The evaluations so far, larger is better; one that is not a number is the worst."""
    values = [self.sign * row[self.metric] for row in rows if self.metric in row]
    return [value if np.isfinite(value) else -np.inf for value in values]

  def is_newest(self, rows: list[dict]) -> bool:
    values = self.values(rows)
    return bool(values) and values[-1] > max(values[:-1], default=-np.inf)

  def is_over(self, rows: list[dict]) -> bool:
    values = self.values(rows)
    return self.patience is not None and len(values) - 1 - int(np.argmax(values or [0])) >= self.patience


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
  best: str | None = None,
  best_is: str = "max",
  patience: int | None = None,
  on_log: Callable[[dict], None] | None = None,
  on_evaluate: Callable[[dict], None] | None = None,
  mesh: Mesh | None = None,
  profile_steps: int = 0,
  progress: bool = True,
  tensorboard: bool = True,
) -> FitResult:
  """Trains a task for a number of steps, resuming from the newest good checkpoint in `folder`.

  A run that is killed at any moment and started again with the same arguments on the same devices ends with
  bit-identical parameters and the same metrics. SIGTERM and SIGINT (Ctrl-C) save and return. More steps continue a
  finished run; anything else that its numbers depend on must be the same (`identity`), or the folder is refused.
  Accumulation, precision and rematerialisation are fields of the task: `fit(task.replace(accumulate=4), …)`.

  >>> from jaxreg.training import examples
  >>> result = fit(examples.least_squares(), steps=200, log_every=100, progress=False)
  >>> [row["step"] for row in result.rows], bool(result.rows[-1]["loss"] < 1e-3)
  ([100, 200], True)

  Args:
    task: what to train.
    steps: the step number to end at.
    seed: the seed of the run's key, in [0, 2**32).
    hparams: overrides of the task's default hyperparameters.
    folder: where checkpoints, `config.json`, `metrics.jsonl` and TensorBoard files go; None keeps nothing.
    log_every: steps per compiled chunk and per logged row, whose metrics are means over the chunk.
    eval_every: steps between evaluations, a multiple of `log_every`; default at the end only.
    checkpoint_every: steps between checkpoints, a multiple of `log_every`; default `10 * log_every`.
    keep: how many checkpoints to keep, at least 1.
    best: a metric of the evaluations; the state of the best one is kept as a checkpoint in `<folder>/best`.
    best_is: `max` or `min`, the better direction of `best`.
    patience: the run ends after so many evaluations without a better one; needs `best`.
    on_log: called with every new row of metrics, on the main process.
    on_evaluate: called with every new row that has an evaluation, on the main process.
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
    FolderError: when the folder cannot be written, or another process is writing to it.
    ValueError: when an argument is out of range, or the folder holds another run.
  """
  _check(steps, seed, log_every, eval_every, checkpoint_every, keep, best, best_is, patience, profile_steps, folder)
  settings = {"log_every": log_every, "eval_every": "the end" if eval_every is None else eval_every}
  settings["best"] = f"{best_is} {best}" if best else None
  eval_every, checkpoint_every = eval_every or steps, checkpoint_every or 10 * log_every
  mesh = mesh or mesh_lib.data_mesh()
  hparams = hparams_lib.merge(task, hparams)
  with contextlib.ExitStack() as stack:
    stream = task.data() if callable(task.data) else None
    if stream is not None:
      stack.callback(stream.close)
    batch = identity.batch_shapes(task, None if stream is None else _peek(stream))
    key = jax.eval_shape(lambda: jax.random.key(0))
    points = {name: np.asarray(value)[None] for name, value in hparams.items()}
    hparams_lib.check_domains(task, points, (key, identity.as_structs(batch)))
    stack.enter_context(files.lock(folder))
    if folder is not None:
      run = {
        "kind": "fit",
        "seed": seed,
        "hparams": hparams,
        **settings,
        **identity.of_task(task, hparams, batch, stream),
      }
      identity.claim(folder, run)
    state = program.initial_state(task, seed, hparams, mesh)
    found = checkpoint.latest(folder) if folder is not None else None
    rows = []
    if found is not None:
      if found > steps:
        raise ValueError(f"{folder} holds a run at step {found}, which is beyond steps = {steps}.")
      state, rows, position = checkpoint.restore(folder, found, state)
      if stream is not None:
        stream.set_state(position)
    if folder is not None:
      checkpoint.clear_after(folder, found)
    chunk_data = functools.partial(_chunk_data, mesh_lib.replicate(task.data, mesh) if stream is None else stream)
    if profile_steps:
      _profile(task, state, chunk_data, hparams, profile_steps, mesh, folder, stream)
    with files.writing(folder):
      log = MetricsLog(folder, rows=rows, tensorboard=tensorboard)
    stack.callback(log.close)
    caught = stack.enter_context(_catch_signals())
    step, saved = found or 0, found
    advance = stack.enter_context(progress_bar(steps, step, show=progress))
    ranking = _Best(best, {"max": 1, "min": -1}[best_is], patience)

    def save():
      if folder is not None:
        with files.writing(folder):
          log.sync()
        position = stream.get_state() if stream is not None else None
        checkpoint.save(folder, state, rows=log.rows, position=position, keep=keep)

    while step < steps and not (best and ranking.is_over(log.rows)):
      count = min(log_every - step % log_every, steps - step)
      began = time.perf_counter()
      state, row = _train(task, state, chunk_data(count, mesh), hparams, step, count, mesh, folder, saved)
      step += count
      evaluated = step % eval_every == 0 or step == steps
      if evaluated:
        row |= _evaluate(task, state, hparams, mesh)
        if best is not None and best not in row:
          raise ValueError(
            f"best must be a metric of the evaluation, one of {sorted(set(row) - {'step'})}: got {best!r}."
          )
      with files.writing(folder):
        log.append(row)
      if mesh_lib.is_main():
        for callback, called in ((on_log, True), (on_evaluate, evaluated)):
          if callback is not None and called:
            callback(dict(row))
      advance(count, row["loss"], time.perf_counter() - began)
      if best and evaluated and folder is not None and ranking.is_newest(log.rows):
        checkpoint.save(pathlib.Path(folder) / "best", state, rows=log.rows, keep=1)
      stop = _agreed(caught)
      if step % checkpoint_every == 0 or step == steps or stop or (best and ranking.is_over(log.rows)):
        save()
        saved = step
      if stop:
        break
    stopped = step < steps and bool(best) and ranking.is_over(log.rows)
    return FitResult(state, log.rows, 0 if step == steps or stopped else _agreed(caught), stopped)


def _check(steps, seed, log_every, eval_every, checkpoint_every, keep, best, best_is, patience, profile_steps, folder):
  for name, value in (("steps", steps), ("log_every", log_every), ("keep", keep)):
    if not isinstance(value, (int, np.integer)) or value < 1:
      raise ValueError(f"{name} must be a positive integer, got {value!r}.")
  check_seed(seed)
  for name, value in (("eval_every", eval_every), ("checkpoint_every", checkpoint_every)):
    if value is not None and (value < 1 or (value % log_every and value != steps)):
      raise ValueError(f"{name} must be positive and a multiple of log_every = {log_every}, or steps, got {value}.")
  if profile_steps < 0 or (profile_steps and folder is None):
    raise ValueError(f"profile_steps must not be negative and needs a folder for the trace, got {profile_steps}.")
  if best_is not in ("max", "min"):
    raise ValueError(f"best_is must be max or min, got {best_is!r}.")
  if patience is not None and (best is None or patience < 1):
    raise ValueError(f"patience must be positive and needs best, the metric to wait for, got {patience}.")


def check_seed(seed) -> None:
  """Raises ValueError unless `seed` fits a 32-bit unsigned integer."""
  if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)) or not 0 <= seed < 2**32:
    raise ValueError(f"a seed must be an integer in [0, 2**32), got {seed!r}.")


def _train(task, state, data, hparams, step, count, mesh, folder, saved):
  """One chunk of steps: the state after it and its row of metrics."""
  state, metrics, finite = program.compiled_chunk(task, mesh, count)(state, data, hparams, np.int32(count))
  metrics, finite, reached = jax.device_get((metrics, finite, state.step))
  if not finite["loss"] == count:
    raise NonFiniteError(_non_finite_message("the loss", step + int(finite["loss"]) + 1, folder, saved))
  if not finite["params"]:
    raise NonFiniteError(_non_finite_message("a parameter", step + count, folder, saved))
  if reached != step + count:
    raise ValueError(f"the task's step must return state.advance(…), but after step {step + count} it says {reached}.")
  return state, {"step": step + count, **{name: float(value) for name, value in metrics.items()}}


def _evaluate(task: Task, state, hparams, mesh) -> dict[str, float]:
  """The task's metrics on held-out arrays, and on the whole of its held-out stream."""
  measured = jax.device_get(program.compiled_evaluate(task)(state, hparams))
  row = {name: float(value) for name, value in measured.items()}
  if task.held_out is None:
    return row
  sums = {}
  stream = task.held_out.open()
  try:
    for batch in stream:
      batch = mesh_lib.split_processes(batch, mesh, PartitionSpec("data"))
      for name, mean in jax.device_get(program.compiled_held_out(task)(state, batch, hparams)).items():
        sums[name] = sums.get(name, 0) + np.array([mean.total, mean.weight], np.float64)
  finally:
    stream.close()
  if not sums:
    raise ValueError("the held-out stream is empty.")
  return row | {name: float(total / weight) if weight else 0.0 for name, (total, weight) in sums.items()}


def _peek(stream):
  """The first batch of a stream, which stays where it is."""
  position = stream.get_state()
  batch = next(stream)
  stream.set_state(position)
  return batch


def _chunk_data(data, count: int, mesh: Mesh):
  if not hasattr(data, "get_state"):
    return data
  try:
    batches = [next(data) for _ in range(count)]
  except StopIteration:
    raise ValueError("the data stream ended before the run; let it repeat or take fewer steps.") from None
  stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *batches)
  return mesh_lib.split_processes(stacked, mesh, PartitionSpec(None, "data"))


def _profile(task, state, chunk_data, hparams, steps, mesh, folder, stream) -> None:
  position = stream.get_state() if stream is not None else None
  chunk, data = program.compiled_chunk(task, mesh, steps), chunk_data(steps, mesh)
  run = lambda: jax.block_until_ready(chunk(jax.tree.map(jnp.copy, state), data, hparams, np.int32(steps)))
  run()  # the first call compiles, which would drown the trace
  with jax.profiler.trace(str(pathlib.Path(folder) / "profile")):
    run()
  if stream is not None:  # the profiled steps read batches that training still needs
    stream.set_state(position)


def _non_finite_message(what: str, step: int, folder, saved) -> str:
  kept = f"the last good checkpoint is step {saved} in {folder}" if saved is not None else "no checkpoint was kept"
  return f"{what} is not finite at step {step}; {kept}. A smaller learning rate or gradient clipping may help."


@contextlib.contextmanager
def _catch_signals():
  """Yields a list that SIGTERM and SIGINT are put into; a second SIGINT interrupts at once.

  Only a process's main thread can ask for that.
  """
  caught = []
  if threading.current_thread() is not threading.main_thread():
    yield caught
    return

  def catch(number, frame):
    if number == signal.SIGINT and caught:
      raise KeyboardInterrupt
    caught.append(number)

  previous = {number: signal.signal(number, catch) for number in (signal.SIGTERM, signal.SIGINT)}
  try:
    yield caught
  finally:
    for number, handler in previous.items():
      signal.signal(number, handler)


def _agreed(caught: list[int]) -> int:
  """The number of a signal that any process has caught, or 0."""
  number = int(caught[0]) if caught else 0
  if jax.process_count() == 1:
    return number
  from jax.experimental import multihost_utils

  return int(np.max(multihost_utils.process_allgather(np.array(number))))
