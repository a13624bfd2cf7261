"""`sweep`: many runs of one task as one compiled program, over all devices, resumable chunk by chunk of trials."""

import concurrent.futures
import dataclasses
import functools
import hashlib
import itertools
import json
import os
import pathlib
import time
import warnings
import zipfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxreg.training import mesh as mesh_lib
from jaxreg.training.fit import merge_hparams
from jaxreg.training.loop import run_chunk
from jaxreg.training.progress import progress_bar
from jaxreg.training.task import Task

__all__ = ["ENGINES", "SweepResult", "grid", "sweep", "sweep_settings"]

ENGINES = ("auto", "vmap", "map")


class SweepResult(NamedTuple):
  """The trials of a sweep, points × seeds with the seed varying fastest.

  Attributes:
    hparams: name -> `[trials]`.
    seeds: `[trials]`.
    steps: `[evaluations]`, the steps after which the metrics were taken.
    metrics: name -> `[trials, evaluations]`: training metrics averaged since the evaluation before, and `evaluate`'s.
    diverged_at: int `[trials]`, the first step with a non-finite loss, or -1.
    params: the trained parameters with a leading axis of trials if asked for, else None.
    engine: the engine that ran.
    seconds: wall time, of which `compile_seconds` went into compiling and measuring engines.
    compile_seconds: see there.
  """

  hparams: dict[str, np.ndarray]
  seeds: np.ndarray
  steps: np.ndarray
  metrics: dict[str, np.ndarray]
  diverged_at: np.ndarray
  params: Any
  engine: str
  seconds: float
  compile_seconds: float

  def by_point(self, name: str) -> np.ndarray:
    """A metric as `[points, seeds, evaluations]`."""
    values = self.metrics[name]
    return values.reshape(-1, len(np.unique(self.seeds)), values.shape[-1])

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


def grid(**values: Sequence) -> dict[str, np.ndarray]:
  """All combinations of hyperparameter values, as equally long arrays.

  >>> grid(learning_rate=[0.1, 0.2], weight=[1.0, 2.0, 3.0])["weight"].tolist()
  [1.0, 2.0, 3.0, 1.0, 2.0, 3.0]
  """
  points = list(itertools.product(*values.values()))
  return {name: np.asarray([point[i] for point in points]) for i, name in enumerate(values)}


def sweep(
  task: Task,
  points: Mapping[str, Sequence],
  *,
  seeds: Sequence[int],
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

  >>> from jaxreg.training import examples
  >>> result = sweep(examples.least_squares(), grid(learning_rate=[0.01, 0.05]), seeds=[0, 1], steps=100,
  ...                engine="vmap", progress=False)
  >>> print(result.metrics["distance"].shape, result.hparams["learning_rate"])
  (4, 1) [0.01 0.01 0.05 0.05]

  Args:
    task: what to train; its `data` must be arrays.
    points: name -> values of equal length (see `grid`); other hyperparameters keep the task's defaults.
    seeds: seeds of the runs' keys.
    steps: steps per trial.
    eval_every: steps between evaluations, a divisor of `steps`; default `steps`.
    engine: `vmap` (together; best on accelerators), `map` (in turn; best on a CPU, above all for convolutions), or
      `auto`, which times both on a few steps.
    lanes: trials that the `map` engine vectorises at a time.
    mesh: a mesh with the axis `trial`; all devices by default.
    memory_budget: bytes per device that a chunk of trials may use; by default two thirds of what the device reports,
      or of the machine's free memory divided by the number of local devices.
    folder: where finished chunks are kept, to be skipped when the same sweep is run again; None keeps nothing.
    keep_params: whether to return the trained parameters.
    progress: whether to show a progress bar.
    label: what the progress bar says.

  Returns:
    A `SweepResult`.

  Raises:
    ValueError: when an argument is out of range.
  """
  began = time.perf_counter()
  eval_every = eval_every or steps
  if callable(task.data):
    raise ValueError("sweep needs data as arrays; a stream can only be read by one run at a time, use fit.")
  if steps < 1 or steps % eval_every:
    raise ValueError(f"eval_every must be a positive divisor of steps = {steps}, got {eval_every}.")
  if engine not in ENGINES:
    raise ValueError(f"engine must be one of {', '.join(ENGINES)}, got {engine!r}.")
  mesh = mesh or mesh_lib.trial_mesh()
  hparams, trial_seeds = _trials(task, points, seeds)
  data = mesh_lib.replicate(task.data, mesh)
  archive = _Archive(folder, _fingerprint(label, task, hparams, trial_seeds, steps, eval_every, keep_params))
  total = len(trial_seeds)
  pending = np.setdiff1d(np.arange(total), archive.done)
  compile_seconds = 0.0
  if pending.size:
    clock = time.perf_counter()
    if engine == "auto":
      trials = {name: value[pending] for name, value in hparams.items()}, trial_seeds[pending]
      engine = _measure_engines(task, *trials, data, mesh, lanes, eval_every, memory_budget)
    size = _chunk_size(task, engine, mesh, lanes, eval_every, pending.size, memory_budget)
    _compile_side_by_side((_lowered, task, engine, mesh, lanes, eval_every, size), (_lowered_init, task, mesh, size))
    compile_seconds = time.perf_counter() - clock
    run = functools.partial(_run_trials, task, engine, mesh, lanes, steps, eval_every, data, keep_params)
    evaluations = steps // eval_every
    chunks = [pending[start : start + size] for start in range(0, pending.size, size)]
    with progress_bar(
      total * evaluations, len(archive.done) * evaluations, show=progress, label=label, unit="trial part"
    ) as advance:
      for chunk in chunks:
        # The last chunk is padded with copies of its first trial, so that every chunk runs the same program.
        padded = np.concatenate([chunk, np.full(size - chunk.size, chunk[0])])
        parts = run(
          {name: value[padded] for name, value in hparams.items()},
          trial_seeds[padded],
          lambda count=chunk.size: advance(count),
        )
        archive.add(chunk, jax.tree.map(lambda x, n=chunk.size: x[:n], parts))
  metrics, diverged_at, leaves = archive.collect(total)
  params = None
  if keep_params:
    shapes = jax.eval_shape(lambda: task.init(jax.random.key(0), merge_hparams(task, None))).params
    params = jax.tree.unflatten(jax.tree.structure(shapes), leaves)
  return SweepResult(
    hparams=hparams,
    seeds=trial_seeds,
    steps=np.arange(eval_every, steps + 1, eval_every),
    metrics=metrics,
    diverged_at=diverged_at,
    params=params,
    engine=engine,
    seconds=time.perf_counter() - began,
    compile_seconds=compile_seconds,
  )


def sweep_settings(settings: Mapping[str, tuple[Task, Mapping]], *, folder=None, **options) -> dict[str, SweepResult]:
  """The outer loop over static settings: one `sweep`, and one compilation, for each named (task, points)."""
  return {
    name: sweep(task, points, folder=None if folder is None else pathlib.Path(folder) / name, label=name, **options)
    for name, (task, points) in settings.items()
  }


def _trials(task: Task, points: Mapping[str, Sequence], seeds: Sequence[int]):
  lengths = {name: len(value) for name, value in points.items()}
  if len(set(lengths.values())) > 1:
    raise ValueError(f"points must be equally long, got {lengths}; grid(...) makes all combinations.")
  if not len(seeds) or 0 in lengths.values():
    raise ValueError("a sweep needs at least one point and one seed.")
  defaults = merge_hparams(task, {name: value[0] for name, value in points.items()})
  count = next(iter(lengths.values()), 1)
  columns = {
    name: np.asarray(points[name], value.dtype) if name in points else np.full(count, value)
    for name, value in defaults.items()
  }
  hparams = {name: np.repeat(value, len(seeds)) for name, value in columns.items()}
  return hparams, np.tile(np.asarray(seeds, np.uint32), count)


def _program(task: Task, engine: str, mesh: Mesh, lanes: int, steps: int):
  """The function of all trials that an engine runs: `(state, hparams, (data, count)) -> (state, metrics, diverged)`."""

  def advance(state, hparams, shared):
    data, count = shared
    start = state.step
    state, metrics, finite = run_chunk(task, state, data, hparams, steps, count=count)
    diverged_at = jnp.where(finite < count, start + finite + 1, -1)
    measured = {} if task.evaluate is None else task.evaluate(state, hparams)
    return state, {**metrics, **measured}, diverged_at

  return jax.vmap(advance, in_axes=(0, 0, None)) if engine == "vmap" else _mapped(advance, mesh, lanes)


def _mapped(function, mesh: Mesh, lanes: int):
  """`function(first, second, shared)` for every trial in turn; without shard_map every device would run every trial."""

  def mapped(first, second, shared):
    one = lambda pair: function(*pair, shared)
    return jax.lax.map(one, (first, second), batch_size=lanes if lanes > 1 else None)

  trial, everywhere = PartitionSpec("trial"), PartitionSpec()
  return jax.shard_map(mapped, mesh=mesh, in_specs=(trial, trial, everywhere), out_specs=trial, check_vma=False)


@functools.lru_cache(maxsize=32)
def _lowered_init(task: Task, mesh: Mesh, size: int):
  """The initial states of `size` trials, one after another for either engine."""
  trial = NamedSharding(mesh, PartitionSpec("trial"))
  init = lambda seed, hparams, _: task.init(jax.random.key(seed), hparams)
  seeds = jax.ShapeDtypeStruct((size,), jnp.uint32, sharding=trial)
  hparams = _hparams_like(task, trial, size)
  return jax.jit(lambda *trials: _mapped(init, mesh, 1)(*trials, ()), out_shardings=trial).lower(seeds, hparams)


@functools.lru_cache(maxsize=32)
def _lowered(task: Task, engine: str, mesh: Mesh, lanes: int, steps: int, size: int):
  """An engine's program for `size` trials and at most `steps` steps."""
  trial, everywhere = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("trial",), ()))
  like = lambda sharding: lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
  state = jax.tree.map(like(trial), _lowered_init(task, mesh, size).out_info)
  shared = jax.tree.map(like(everywhere), jax.eval_shape(lambda: (jax.tree.map(jnp.asarray, task.data), jnp.int32(0))))
  program = jax.jit(_program(task, engine, mesh, lanes, steps), out_shardings=trial, donate_argnums=0)
  return program.lower(state, _hparams_like(task, trial, size), shared)


def _hparams_like(task: Task, sharding, size: int):
  defaults = merge_hparams(task, None)
  return {name: jax.ShapeDtypeStruct((size,), value.dtype, sharding=sharding) for name, value in defaults.items()}


@functools.lru_cache(maxsize=64)
def _compiled(lowered: Callable, *arguments):
  """A program ahead of time, so that its memory is known before it runs; cached for a second sweep."""
  return lowered(*arguments).compile()


def _compile_side_by_side(*programs) -> None:
  """Compiles what `_compiled` will be asked for in as many threads; tracing stays in this one."""
  for lowered, *arguments in programs:
    lowered(*arguments)
  with concurrent.futures.ThreadPoolExecutor(len(programs)) as pool:
    list(pool.map(lambda program: _compiled(*program), programs))


def _run_trials(task, engine, mesh, lanes, steps, eval_every, data, keep_params, hparams, seeds, advance_bar):
  advance = _compiled(_lowered, task, engine, mesh, lanes, eval_every, len(seeds))
  seeds, hparams = mesh_lib.shard((seeds, hparams), mesh, PartitionSpec("trial"))
  shared = data, mesh_lib.replicate(np.int32(eval_every), mesh)
  state, metrics, diverged = _compiled(_lowered_init, task, mesh, len(seeds))(seeds, hparams), [], []
  for _ in range(steps // eval_every):
    state, measured, diverged_at = jax.block_until_ready(advance(state, hparams, shared))
    metrics.append(measured)
    diverged.append(diverged_at)
    advance_bar()
  metrics, diverged, params = mesh_lib.gather((metrics, diverged, state.params if keep_params else ()))
  stacked = jax.tree.map(lambda *values: np.stack(values, axis=1), *metrics)
  diverged = np.stack(diverged, axis=1)
  first = diverged[np.arange(len(diverged)), np.argmax(diverged >= 0, axis=1)]
  return stacked, first, params


def _measure_engines(task, hparams, seeds, data, mesh, lanes, eval_every, budget, *, steps: int = 20) -> str:
  """The engine whose program for these trials takes its first steps in less time per trial."""
  full = _round_up(len(seeds), mesh.size * lanes)
  engines = ("vmap", "map")
  _compile_side_by_side(
    *((_lowered, task, engine, mesh, lanes, eval_every, full) for engine in engines), (_lowered_init, task, mesh, full)
  )
  times = []
  for engine in engines:
    size = _chunk_size(task, engine, mesh, lanes, eval_every, len(seeds), budget)
    advance, init = _compiled(_lowered, task, engine, mesh, lanes, eval_every, size), _lowered_init
    chosen = np.arange(size) % len(seeds)
    trials = mesh_lib.shard((seeds[chosen], {n: v[chosen] for n, v in hparams.items()}), mesh, PartitionSpec("trial"))
    state = _compiled(init, task, mesh, size)(*trials)
    for count in (1, min(steps, eval_every)):  # the first run touches the memory
      shared = data, mesh_lib.replicate(np.int32(count), mesh)
      clock = time.perf_counter()
      state, *_ = jax.block_until_ready(advance(state, trials[1], shared))
      seconds = time.perf_counter() - clock
    times.append(seconds / size)
  # Hosts may measure differently but have to run the same program.
  return engines[int(mesh_lib.synchronize(np.int64(np.argmin(times))))]


def _chunk_size(task, engine, mesh, lanes, steps, count, budget) -> int:
  """The most trials, a multiple of the mesh and the lanes, whose compiled program fits the memory budget."""
  multiple = mesh.size * lanes
  size = _round_up(count, multiple)
  budget = int(mesh_lib.synchronize(np.int64(budget or _free_memory())))
  while True:
    memory = _compiled(_lowered, task, engine, mesh, lanes, steps, size).memory_analysis()
    need = memory.temp_size_in_bytes + memory.argument_size_in_bytes + memory.output_size_in_bytes
    if need <= budget or size == multiple:
      break
    size = max(multiple, min(size // 2, int(size * budget / need)) // multiple * multiple)
  if need > budget:
    warnings.warn(f"{lanes} trial(s) per device need {need} bytes, more than the budget of {budget}.", stacklevel=3)
  # Equal chunks waste less padding than full ones and a short rest.
  return _round_up(-(-count // -(-count // size)), multiple)


def _free_memory() -> int:
  stats = jax.local_devices()[0].memory_stats()
  if stats and "bytes_limit" in stats:
    return (stats["bytes_limit"] - stats.get("bytes_in_use", 0)) * 2 // 3
  pages = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
  return pages * 2 // 3 // jax.local_device_count()


def _round_up(count: int, multiple: int) -> int:
  return -(-count // multiple) * multiple


def _fingerprint(label, task, hparams, seeds, steps, eval_every, keep_params) -> str:
  shapes = jax.tree.map(lambda x: [str(np.asarray(x).dtype), np.shape(x)], dict(task.data))
  content = [
    label,
    {n: v.tolist() for n, v in hparams.items()},
    seeds.tolist(),
    steps,
    eval_every,
    keep_params,
    shapes,
    task.batch_size,
    dataclasses.astuple(task.computation),
  ]
  return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


class _Archive:
  """Finished chunks of trials, in memory and, if there is a folder, in one `.npz` file each."""

  def __init__(self, folder, fingerprint: str):
    self._chunks, self._fingerprint = [], fingerprint
    self._folder = None if folder is None else pathlib.Path(folder)
    if self._folder is not None:
      if mesh_lib.is_main():
        self._folder.mkdir(parents=True, exist_ok=True)
      self._read()
    self.done = np.concatenate([ids for ids, _ in self._chunks] or [np.zeros(0, np.int64)])

  def _read(self):
    """Only the main process decides which files are good; the others read those."""
    files = sorted(self._folder.glob("chunk-*.npz"))
    good = [self._load(file) is not None for file in files] if mesh_lib.is_main() else []
    bits = np.zeros(4096, np.int64)
    bits[: len(good)] = good
    bits = mesh_lib.synchronize(bits)
    for file, ok in zip(files, bits):
      if ok:
        self._chunks.append(self._load(file))

  def _load(self, file):
    try:
      with np.load(file, allow_pickle=False) as content:  # zip files carry a CRC-32 per array
        if str(content["fingerprint"]) != self._fingerprint:
          raise ValueError(f"{self._folder} holds another sweep; choose another folder or delete it.")
        leaves = {name: content[name] for name in content.files}
    except (zipfile.BadZipFile, OSError, KeyError, EOFError) as error:
      warnings.warn(f"running the trials of {file} again: {error}.", stacklevel=2)
      return None
    return leaves["ids"], leaves

  def add(self, ids, parts):
    metrics, diverged_at, params = parts
    leaves = {f"metric/{name}": value for name, value in metrics.items()}
    leaves |= {f"params/{index}": leaf for index, leaf in enumerate(jax.tree.leaves(params))}
    leaves |= {"ids": np.asarray(ids), "diverged_at": diverged_at, "fingerprint": np.array(self._fingerprint)}
    self._chunks.append((np.asarray(ids), leaves))
    if self._folder is not None and mesh_lib.is_main():
      temporary = self._folder / "writing.npz"
      np.savez(temporary, **leaves)
      os.replace(temporary, self._folder / f"chunk-{int(ids[0]):06d}.npz")

  def collect(self, total: int):
    order = np.argsort(np.concatenate([ids for ids, _ in self._chunks]), kind="stable")
    assert len(order) == total, (len(order), total)
    names = [name for name in self._chunks[0][1] if name not in ("ids", "fingerprint")]
    joined = {name: np.concatenate([leaves[name] for _, leaves in self._chunks])[order] for name in names}
    metrics = {name.removeprefix("metric/"): value for name, value in joined.items() if name.startswith("metric/")}
    params = [joined[f"params/{index}"] for index in range(sum(name.startswith("params/") for name in names))]
    return metrics, joined["diverged_at"], params
