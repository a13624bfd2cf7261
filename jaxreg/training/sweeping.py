"""`sweep`: many runs of one task as one compiled program, over all devices, resumable piece by piece."""

import csv
import os
import pathlib
import time
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, PartitionSpec
from jax.typing import ArrayLike

from jaxreg.data.names import check_file_name
from jaxreg.extras import extra_needed
from jaxreg.training import files, identity, program, structure
from jaxreg.training import hparams as hparams_lib
from jaxreg.training import mesh as mesh_lib
from jaxreg.training.archive import Archive, trial_keys
from jaxreg.training.fitting import check_seed
from jaxreg.training.progress import progress_bar
from jaxreg.training.task import Task

__all__ = ["ENGINES", "SweepResult", "sweep", "sweep_settings"]

ENGINES = ("auto", "vmap", "map")
PIECE_SECONDS = 30.0  # a killed sweep loses at most about this much work


class SweepResult(NamedTuple):
  """The trials of a sweep, points × seeds with the seed varying fastest.

  Attributes:
    hparams: name -> `[trials]`.
    seeds: `[trials]`.
    steps: `[evaluations]`, the steps after which the metrics were taken.
    metrics: name -> `[trials, evaluations]`: training metrics averaged since the evaluation before, and `evaluate`'s.
    diverged_at: int `[trials]`, the first step with a non-finite loss, or -1.
    params: the trained parameters with a leading axis of trials if asked for, else None.
    extra: what else was trained or counted, with the parameters.
    engine: the engine that trained them, or both.
    seconds: wall time, of which `compile_seconds` went into compiling and measuring engines.
    compile_seconds: see there.
  """

  hparams: dict[str, np.ndarray]
  seeds: np.ndarray
  steps: np.ndarray
  metrics: dict[str, np.ndarray]
  diverged_at: np.ndarray
  params: Any
  extra: Any
  engine: str
  seconds: float
  compile_seconds: float

  def by_point(self, name: str) -> np.ndarray:
    """A metric as `[points, seeds, evaluations]`."""
    values = self.metrics[name]
    return values.reshape(-1, len(np.unique(self.seeds)), values.shape[-1])

  def select(self, metric: str, *, maximize: bool = True) -> dict[str, float]:
    """The hyperparameters whose mean over seeds of a metric at the last evaluation is best.

    A seed whose run diverged counts as the worst value. To select on validation data, name a validation metric.
    """
    sign = 1 if maximize else -1
    last = np.where(self.diverged_at >= 0, -np.inf, sign * self.metrics[metric][:, -1].astype(np.float64))
    seeds = len(np.unique(self.seeds))
    scores = np.where(np.isnan(last), -np.inf, last).reshape(-1, seeds).mean(1)
    return {name: value[seeds * int(np.argmax(scores))].item() for name, value in self.hparams.items()}

  def rows(self) -> list[dict]:
    """One flat dict per trial and evaluation."""
    return [
      {
        **{name: value[trial].item() for name, value in self.hparams.items()},
        "seed": int(self.seeds[trial]),
        "step": int(step),
        "diverged_at": int(self.diverged_at[trial]),
        **{name: float(value[trial, index]) for name, value in self.metrics.items()},
      }
      for trial in range(len(self.seeds))
      for index, step in enumerate(self.steps)
    ]

  def to_csv(self, path) -> None:
    """Writes `rows` as a CSV file."""
    rows = self.rows()
    with open(path, "w", newline="", encoding="utf-8") as file:
      writer = csv.DictWriter(file, list(rows[0]))
      writer.writeheader()
      writer.writerows(rows)

  def to_dataframe(self):
    """`rows` as a pandas DataFrame."""
    with extra_needed("training", "to_dataframe (unlike rows and to_csv)"):
      import pandas

    return pandas.DataFrame(self.rows())


def sweep(
  task: Task,
  points: Mapping[str, Sequence | ArrayLike],
  *,
  seeds: Iterable[int],
  steps: int,
  eval_every: int | None = None,
  engine: str = "auto",
  lanes: int = 1,
  mesh: Mesh | None = None,
  memory_budget: int | None = None,
  folder=None,
  keep_params: bool = False,
  progress: bool = True,
  label: str = "sweep",
) -> SweepResult:
  """Trains every hyperparameter point with every seed; trials with the same seed share initial draws and batches.

  The `map` engine runs each device's trials one after another, and a trial is then bit-equal to the same trial run
  alone by `fit` (with `lanes = 1`). The `vmap` engine runs them together; it draws the same keys and batches and agrees
  to rounding over the first steps. A diverging trial does not disturb the others.

  In a folder, finished trials are kept in pieces of half a minute (or of a trial per device, where that takes longer).
  The same sweep takes them up again, also with more
  points or seeds; another experiment (`identity`) is refused.

  >>> from jaxreg.training import examples, grid
  >>> result = sweep(examples.least_squares(), grid(learning_rate=[0.01, 0.05]), seeds=[0, 1], steps=100,
  ...                engine="vmap", progress=False)
  >>> print(result.metrics["distance"].shape, result.hparams["learning_rate"])
  (4, 1) [0.01 0.01 0.05 0.05]

  Args:
    task: what to train; its `data` must be arrays.
    points: name -> values of equal length (see `grid`); other hyperparameters keep the task's defaults.
    seeds: different seeds of the runs' keys, in [0, 2**32).
    steps: steps per trial.
    eval_every: steps between evaluations, a divisor of `steps`; default `steps`.
    engine: `vmap` (together; best on accelerators), `map` (in turn; best on a CPU, above all for convolutions), or
      `auto`: the one that a rule picks from the cost of a step, or where that does not say, the faster one on a few
      steps.
    lanes: trials that the `map` engine vectorises at a time.
    mesh: a mesh with the axis `trial`; all devices by default.
    memory_budget: bytes per device that the trials running at a time may use; by default two thirds of what the device
      reports, or of the machine's free memory divided by the number of local devices.
    folder: where finished trials are kept; None keeps nothing.
    keep_params: whether to return the trained parameters and the extra state.
    progress: whether to show a progress bar.
    label: what the progress bar says.

  Returns:
    A `SweepResult`.

  Raises:
    FolderError: when the folder cannot be written, or another process is writing to it.
    ValueError: when an argument is out of range, or the folder holds another experiment.
  """
  began = time.perf_counter()
  seeds = _check(task, seeds, steps, eval_every, engine, lanes, memory_budget)
  eval_every = eval_every or steps
  mesh = mesh or mesh_lib.trial_mesh()
  columns = hparams_lib.columns(task, points)
  if not len(next(iter(columns.values()), [0])):
    raise ValueError("a sweep needs at least one point.")
  batch, key = identity.batch_shapes(task), jax.eval_shape(lambda: jax.random.key(0))
  hparams_lib.check_domains(task, columns, (key, identity.as_structs(batch)))
  count = len(next(iter(columns.values()), [0]))
  hparams = {name: np.repeat(value, len(seeds)) for name, value in columns.items()}
  trial_seeds = np.tile(np.asarray(seeds, np.uint32), count)
  if folder is not None:
    first = {name: value[0] for name, value in columns.items()}
    run = {"kind": "sweep", "steps": steps, "eval_every": eval_every, **identity.of_task(task, first, batch)}
  with files.lock(folder):
    if folder is not None:
      identity.claim(folder, run)
    archive = Archive(folder, engine, ("kept",) if keep_params else ())
    keys = trial_keys(hparams, trial_seeds)
    pending = np.array([index for index, key in enumerate(keys) if key not in archive], int)
    compile_seconds = 0.0
    if pending.size:
      trials = {name: value[pending] for name, value in hparams.items()}, trial_seeds[pending]
      runner = _Runner(task, mesh, lanes, steps, eval_every, memory_budget, keep_params, *trials)
      evaluations = steps // eval_every
      total, done = len(keys) * evaluations, (len(keys) - pending.size) * evaluations
      with progress_bar(total, done, show=progress, label=label, unit="trial part") as advance:
        engine, compile_seconds = runner.prepare(engine, batch, paced=folder is not None)
        for part, results in runner.pieces(advance):
          archive.add({name: value[part] for name, value in trials[0].items()}, trials[1][part], engine, results)
    collected = archive.collect(keys)
  params, extra = _trained(task, collected) if keep_params else (None, None)
  return SweepResult(
    hparams=hparams,
    seeds=trial_seeds,
    steps=np.arange(eval_every, steps + 1, eval_every),
    metrics={name[7:]: value for name, value in collected.items() if name.startswith("metric/")},
    diverged_at=collected["diverged_at"],
    params=params,
    extra=extra,
    engine=" and ".join(sorted(set(collected["engine"].tolist()))),
    seconds=time.perf_counter() - began,
    compile_seconds=compile_seconds,
  )


def sweep_settings(settings: Mapping[str, tuple[Task, Mapping]], *, folder=None, **options) -> dict[str, SweepResult]:
  """The outer loop over static settings: one `sweep`, and one compilation, for each named (task, points).

  Args:
    settings: name -> (task, points).
    folder: each setting's trials go to a folder of its name inside of it.
    **options: of `sweep`.

  Raises:
    ValueError: when trials are to be kept in a folder and a name has path parts; before anything is trained.
  """
  if folder is not None:
    for name in settings:
      check_file_name("a setting", name)
  return {
    name: sweep(task, points, folder=None if folder is None else pathlib.Path(folder) / name, label=name, **options)
    for name, (task, points) in settings.items()
  }


def _check(task, seeds, steps, eval_every, engine, lanes, memory_budget) -> list[int]:
  if callable(task.data):
    raise ValueError("sweep needs data as arrays; a stream can only be read by one run at a time, use fit.")
  for name, value in (("steps", steps), ("lanes", lanes)):
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
      raise ValueError(f"{name} must be a positive integer, got {value!r}.")
  if eval_every is not None and (eval_every < 1 or steps % eval_every):
    raise ValueError(f"eval_every must be a positive divisor of steps = {steps}, got {eval_every}.")
  if engine not in ENGINES:
    raise ValueError(f"engine must be one of {', '.join(ENGINES)}, got {engine!r}.")
  if memory_budget is not None and memory_budget <= 0:
    raise ValueError(f"memory_budget must be positive, got {memory_budget}.")
  if isinstance(seeds, (str, bytes)) or not isinstance(seeds, Iterable):
    raise ValueError(f"seeds must be a sequence of integers, such as range(5), got {seeds!r}.")
  seeds = list(seeds)
  for seed in seeds:
    check_seed(seed)
  if not seeds or len(set(seeds)) < len(seeds):
    raise ValueError(f"seeds must be one or more different integers, got {seeds}.")
  return seeds


def _trained(task: Task, collected):
  """The parameters and the extra state of all trials, in the structure of the state."""
  shapes = jax.eval_shape(lambda: task.init(jax.random.key(0), hparams_lib.merge(task)))
  result = []
  for name in ("params", "extra"):
    like, treedef = jax.tree.flatten(getattr(shapes, name))
    leaves = [structure.like(leaf, collected[f"{name}/{index}"]) for index, leaf in enumerate(like)]
    # Leaves of less than a byte come as int8.
    narrow = lambda leaf, array: array if structure.is_key(leaf) else array.astype(leaf.dtype)
    leaves = [narrow(leaf, array) for leaf, array in zip(like, leaves)]
    result.append(jax.tree.unflatten(treedef, leaves))
  return result


class _Runner:
  """Trials that are still to be run, and the compiled programs that run them."""

  def __init__(self, task, mesh, lanes, steps, eval_every, memory_budget, keep_params, hparams, seeds):
    self._task, self._mesh, self._lanes, self._steps, self._eval_every = task, mesh, lanes, steps, eval_every
    self._budget, self._keep_params, self._hparams, self._seeds = memory_budget, keep_params, hparams, seeds
    self._kinds = tuple(sorted((name, str(value.dtype)) for name, value in hparams.items()))
    self._data = mesh_lib.replicate(dict(task.data), mesh)

  def prepare(self, engine: str, batch, *, paced: bool) -> tuple[str, float]:
    """Chooses the engine and how many trials run at a time, and compiles; returns the engine and the seconds."""
    began = time.perf_counter()
    self._pace = None  # seconds that one trial of each device takes
    if engine == "auto":
      engine = _engine_by_rule(self._task, batch, self._mesh) or self._faster_engine()
    self._engine = engine
    self._size = self._fitting_size(len(self._seeds))
    self._paced = paced
    if paced and not self._in_turn():
      self._shrink_to_pace()
    return engine, time.perf_counter() - began

  def pieces(self, advance_bar):
    """Yields `(indices, results)` of finished trials; a first small piece tells how many make up a piece's time."""
    devices, start = self._mesh.size, 0
    while start < len(self._seeds):
      each = self._size // devices
      if self._paced and self._in_turn():
        each = 1 if self._pace is None else int(np.clip(PIECE_SECONDS / max(self._pace, 1e-9), 1, each))
      # Equal pieces waste less than full ones and a short rest.
      rest = -(-(len(self._seeds) - start) // devices)
      each = -(-rest // -(-rest // each)) if self._pace is not None or not self._paced else each
      part = np.arange(start, min(start + each * devices, len(self._seeds)))
      began = time.perf_counter()
      results = self._run(part, each, lambda part=part: advance_bar(len(part)))
      pace = (time.perf_counter() - began) / each
      self._pace = float(mesh_lib.synchronize(np.float64(pace)))
      yield part, results
      start += len(part)

  def _in_turn(self) -> bool:
    return self._engine == "map" and self._lanes == 1

  def _arguments(self, size: int, engine: str | None = None):
    name = engine or self._engine
    state = (program.lowered_init, self._task, self._mesh, size, self._kinds)
    return state, (program.lowered_engine, *state[1:], name, self._lanes, self._eval_every)

  def _start(self, size: int, each: int, part: np.ndarray):
    """Initial states and hyperparameters; trial t of a piece is on device t modulo their number, the rest fills."""
    places = np.zeros(size, int)
    slots = np.arange(size).reshape(self._mesh.size, -1)
    for index, trial in enumerate(part):
      device, slot = index % self._mesh.size, index // self._mesh.size
      places[slots[device, slot]] = trial
    for device in range(self._mesh.size):
      places[slots[device, -(-(len(part) - device) // self._mesh.size) :]] = part[0]
    chosen = self._seeds[places], {name: value[places] for name, value in self._hparams.items()}
    seeds, hparams = mesh_lib.shard(chosen, self._mesh, PartitionSpec("trial"))
    where = [slots[index % self._mesh.size, index // self._mesh.size] for index in range(len(part))]
    return program.compiled(*self._arguments(size)[0])(seeds, hparams), hparams, np.asarray(where)

  def _run(self, part, each: int, advance_bar) -> dict[str, np.ndarray]:
    advance = program.compiled(*self._arguments(self._size)[1])
    state, hparams, where = self._start(self._size, each, part)
    count, trials = mesh_lib.replicate((np.int32(self._eval_every), np.int32(each)), self._mesh)
    metrics, diverged = [], []
    for _ in range(self._steps // self._eval_every):
      state, measured, diverged_at = jax.block_until_ready(advance(state, hparams, self._data, count, trials))
      metrics.append(measured)
      diverged.append(diverged_at)
      advance_bar()
    kept = {"params": state.params, "extra": state.extra} if self._keep_params else {}
    kept = {name: list(map(structure.array_of, jax.tree.leaves(tree))) for name, tree in kept.items()}
    metrics, diverged, kept, reached = mesh_lib.gather((metrics, diverged, kept, state.step))
    if not (reached[where] == self._steps).all():
      raise ValueError(
        f"the task's step must return state.advance(…), but after {self._steps} steps it says otherwise."
      )
    diverged = np.stack(diverged, axis=1)[where]
    results = {f"metric/{name}": np.stack([each[name] for each in metrics], axis=1)[where] for name in metrics[0]}
    results["diverged_at"] = diverged[np.arange(len(diverged)), np.argmax(diverged >= 0, axis=1)]
    for name, leaves in kept.items():
      results |= {"kept": np.ones(len(where), bool)}
      results |= {f"{name}/{index}": leaf[where] for index, leaf in enumerate(leaves)}
    return results

  def _fitting_size(self, count: int) -> int:
    """How many trials run at a time without needing more memory than there is; compiles the program for them."""
    multiple = self._mesh.size * self._lanes
    size = _round_up(count, multiple)
    budget = int(mesh_lib.synchronize(np.int64(self._budget or _free_memory())))
    while True:
      program.compile_side_by_side(*self._arguments(size))
      need = program.needed_bytes(program.compiled(*self._arguments(size)[1]))
      if need <= budget or size == multiple:
        break
      size = max(multiple, min(size // 2, int(size * budget / need)) // multiple * multiple)
    if need > budget:
      warnings.warn(
        f"{self._lanes} trial(s) per device need {need} bytes, more than the budget of {budget}.", stacklevel=5
      )
    equal = _round_up(-(-count // -(-count // size)), multiple)
    if equal != size:
      program.compile_side_by_side(*self._arguments(equal))
    return equal

  def _time_steps(self, engine: str, size: int, steps: int) -> float:
    """Seconds that some steps of `size` trials take, after a first one that touches the memory."""
    advance, chosen = program.compiled(*self._arguments(size, engine)[1]), np.arange(size) % len(self._seeds)
    trials = self._seeds[chosen], {name: value[chosen] for name, value in self._hparams.items()}
    seeds, hparams = mesh_lib.shard(trials, self._mesh, PartitionSpec("trial"))
    state = program.compiled(*self._arguments(size)[0])(seeds, hparams)
    for count in (1, steps):
      numbers = mesh_lib.replicate((np.int32(count), np.int32(size // self._mesh.size)), self._mesh)
      began = time.perf_counter()
      state, *_ = jax.block_until_ready(advance(state, hparams, self._data, *numbers))
    return float(mesh_lib.synchronize(np.float64(time.perf_counter() - began)))

  def _shrink_to_pace(self) -> None:
    """Fewer trials at a time where those of one program would take longer than a piece may."""
    steps = min(5, self._eval_every)
    seconds = self._time_steps(self._engine, self._size, steps) * self._steps / steps
    multiple = self._mesh.size * self._lanes
    if seconds > 2 * PIECE_SECONDS and self._size > multiple:
      size = _round_up(int(self._size * PIECE_SECONDS / seconds) or 1, multiple)
      if size < self._size:
        self._size = self._fitting_size(size)

  def _faster_engine(self, *, steps: int = 20) -> str:
    """The engine whose program for these trials takes its first steps in less time per trial."""
    self._engine, sizes = "map", {}
    full = _round_up(len(self._seeds), self._mesh.size * self._lanes)
    both = [self._arguments(full, engine)[1] for engine in ("vmap", "map")]
    program.compile_side_by_side(self._arguments(full)[0], *both)
    for engine in ("vmap", "map"):
      self._engine = engine
      sizes[engine] = self._fitting_size(len(self._seeds))
    steps = min(steps, self._eval_every)
    times = {engine: self._time_steps(engine, size, steps) / size for engine, size in sizes.items()}
    return min(times, key=times.get)


def _engine_by_rule(task: Task, batch, mesh: Mesh) -> str | None:
  """The engine that is faster in all that was measured for steps of this kind, or None where either may be.

  On a CPU convolutions of trials side by side become grouped ones, which are slow, and so is whatever a step spends
  much arithmetic on: in turn, a trial's data stay in the cache. On an accelerator trials side by side fill it.
  """
  flops, convolutions = program.step_cost(task, batch)
  if mesh.devices.flat[0].platform != "cpu":
    return None if convolutions else "vmap"
  return "map" if convolutions or flops > 1e6 else None


def _free_memory() -> int:
  stats = jax.local_devices()[0].memory_stats()
  if stats and "bytes_limit" in stats:
    return (stats["bytes_limit"] - stats.get("bytes_in_use", 0)) * 2 // 3
  pages = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
  return pages * 2 // 3 // jax.local_device_count()


def _round_up(count: int, multiple: int) -> int:
  return -(-count // multiple) * multiple
