"""What a recipe trains, and the one table that comes out of it, saved without pickle."""

import dataclasses
import hashlib
import io
import pathlib
import re
import time
import types
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import numpy as np

from jaxreg.training import SweepResult, Task, files, fit, sweep

__all__ = ["Cell", "CellTrials", "Interrupted", "Trials", "run_cells"]


class Cell(NamedTuple):
  """What is trained with one static setting.

  Attributes:
    task: what to train. Arrays as data are trained by `sweep`; a stream by `fit`, one run per point and seed.
    steps: the length of a run.
    points: hyperparameter values of equal length by name, or a function from the `Trials` of the cells before this one
      to them.
    eval_every: steps between evaluations; default at the end only.
    log_every: steps between logged rows of a run by `fit`; default `eval_every`.
    engine: `sweep`'s engine.
    seeds: seeds of this cell, instead of the run's.
    keep_params: whether the result that `measure` gets holds the trained parameters.
  """

  task: Task
  steps: int
  points: Mapping[str, Sequence] | Callable[["Trials"], Mapping[str, Sequence]] = types.MappingProxyType({})
  eval_every: int | None = None
  log_every: int | None = None
  engine: str = "auto"
  seeds: Sequence[int] | None = None
  keep_params: bool = False


class CellTrials(NamedTuple):
  """The trials of one cell.

  Attributes:
    hparams: name -> `[points]`, all hyperparameters of the task.
    seeds: `[seeds]`.
    steps: `[evaluations]`, the steps after which the metrics were taken.
    metrics: name -> `[points, seeds, evaluations]`.
    diverged_at: `[points, seeds]`, the first step with a non-finite loss, or -1.
    engine: what trained them: `vmap`, `map` or `fit`.
  """

  hparams: dict[str, np.ndarray]
  seeds: np.ndarray
  steps: np.ndarray
  metrics: dict[str, np.ndarray]
  diverged_at: np.ndarray
  engine: str

  def last(self, name: str) -> np.ndarray:
    """A metric `[points, seeds]` at the last evaluation."""
    return self._metric(name)[:, :, -1]

  def at(self, name: str, **hparams: float) -> np.ndarray:
    """A metric `[seeds, evaluations]` at the one point that has these hyperparameters."""
    unknown = set(hparams) - set(self.hparams)
    if unknown:
      raise KeyError(f"no hyperparameter {', '.join(sorted(unknown))}; there are {', '.join(self.hparams)}.")
    matches = [np.isclose(self.hparams[key], value, rtol=1e-5, atol=0) for key, value in hparams.items()]
    found = np.flatnonzero(np.all(matches, axis=0)) if matches else np.arange(len(self.diverged_at))
    if len(found) != 1:
      listed = "; ".join(f"{key} {np.unique(self.hparams[key]).tolist()}" for key in hparams or self.hparams)
      raise KeyError(f"{len(found)} points have {hparams}, not one; there are {listed}.")
    return self._metric(name)[found[0]]

  def _metric(self, name: str) -> np.ndarray:
    if name not in self.metrics:
      raise KeyError(f"no metric {name!r}; there are {', '.join(self.metrics)}.")
    return self.metrics[name]


@dataclasses.dataclass(frozen=True)
class Trials:
  """All that a recipe's `summary` reads; `trials["cell"]` is one cell's `CellTrials`.

  Attributes:
    seeds: `[seeds]`, the run's.
    cells: name -> `CellTrials`.
    measured: name -> `[seeds, ...]`, what the recipe's `measure` returned.
  """

  seeds: np.ndarray
  cells: dict[str, CellTrials] = dataclasses.field(default_factory=dict)
  measured: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)

  def __getitem__(self, cell: str) -> CellTrials:
    if cell not in self.cells:
      raise KeyError(f"no cell {cell!r}; there are {', '.join(self.cells) or 'none'}.")
    return self.cells[cell]

  def save(self, path: pathlib.Path) -> None:
    """Writes the table as an `.npz` file of numbers and unicode text, all of it or nothing."""
    arrays = {"seeds": self.seeds, "cells": list(self.cells), "engines": [c.engine for c in self.cells.values()]}
    arrays |= {f"measured/{name}": value for name, value in self.measured.items()}
    for index, cell in enumerate(self.cells.values()):
      arrays |= {f"{index}/{field}": getattr(cell, field) for field in ("seeds", "steps", "diverged_at")}
      arrays |= {f"{index}/hparams/{name}": value for name, value in cell.hparams.items()}
      arrays |= {f"{index}/metrics/{name}": value for name, value in cell.metrics.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **{name: _plain(name, value) for name, value in arrays.items()})
    files.replace(path, buffer.getvalue())

  @classmethod
  def load(cls, path: pathlib.Path) -> "Trials":
    """Reads what `save` wrote; a damaged file is a ValueError with its name."""
    try:
      with np.load(path, allow_pickle=False) as file:  # zip files carry a CRC-32 of every array
        arrays = {name: file[name] for name in file.files}
    except (zipfile.BadZipFile, zlib.error, EOFError, ValueError) as error:
      raise ValueError(f"{path} does not have the bytes that were written: {error}") from error
    below = lambda prefix: {n.removeprefix(prefix): v for n, v in arrays.items() if n.startswith(prefix)}
    cells = {
      str(name): CellTrials(
        hparams=below(f"{index}/hparams/"),
        seeds=arrays[f"{index}/seeds"],
        steps=arrays[f"{index}/steps"],
        metrics=below(f"{index}/metrics/"),
        diverged_at=arrays[f"{index}/diverged_at"],
        engine=str(engine),
      )
      for index, (name, engine) in enumerate(zip(arrays["cells"], arrays["engines"]))
    }
    return cls(arrays["seeds"], cells, below("measured/"))


class Interrupted(Exception):
  """A run was told to end by a signal, and saved what it had."""

  def __init__(self, result, steps: int):
    super().__init__(f"interrupted at step {int(result.state.step)} of {steps}")
    self.signal = int(result.interrupted)


def run_cells(
  recipe, config, seeds: Sequence[int], folder: pathlib.Path | None = None, *, key: str = "", progress: bool = True
) -> Trials:
  """Trains a recipe's cells one after another and calls its `measure`; returns the table.

  Args:
    recipe: a module with `cells(config, seeds)`, `measure(config, seeds, trained)`, or both; `trained` holds the cells'
      results by name.
    config: the recipe's configuration.
    seeds: the run's seeds.
    folder: where finished parts are kept, to be taken up again; None keeps nothing.
    key: what the measurements in the folder depend on, as a word; those of another key are made again.
    progress: whether to show progress bars.

  Raises:
    Interrupted: when the process was told to end.
    ValueError: when the folder holds another experiment.
  """
  trials, trained = Trials(np.asarray(seeds, np.int64)), {}
  cells = recipe.cells(config, list(seeds)) if hasattr(recipe, "cells") else {}
  for cell in cells.values():
    if callable(cell.task.data):
      cell.task.data().close()  # a data set that is missing is said before hours of training
  for name, cell in cells.items():
    points = cell.points(trials) if callable(cell.points) else cell.points
    train = _train_stream if callable(cell.task.data) else _train_arrays
    place = None if folder is None else pathlib.Path(folder) / safe_name(name)
    result = train(cell, points, list(seeds if cell.seeds is None else cell.seeds), place, name, progress)
    trials = dataclasses.replace(trials, cells={**trials.cells, name: _table(result)})
    trained[name] = result
  if hasattr(recipe, "measure"):
    path = None if folder is None else pathlib.Path(folder) / f"measured-{key}.npz"
    trials = dataclasses.replace(trials, measured=_measured(recipe, config, list(seeds), trained, path))
  return trials


def safe_name(name: str) -> str:
  """A name as a folder's: different names stay different."""
  safe = re.sub(r"[^A-Za-z0-9._-]+", "-", name)
  return safe if safe == name else f"{safe}-{hashlib.sha256(name.encode()).hexdigest()[:6]}"


def _train_arrays(cell: Cell, points, seeds, folder, label, progress) -> SweepResult:
  return sweep(
    cell.task, points, seeds=seeds, steps=cell.steps, eval_every=cell.eval_every, engine=cell.engine, folder=folder,
    keep_params=cell.keep_params, label=label, progress=progress,
  )  # fmt: skip


def _train_stream(cell: Cell, points, seeds, folder, label, progress) -> SweepResult:
  """One run after another; training metrics are means over the `log_every` steps before an evaluation."""
  del label
  began = time.perf_counter()
  eval_every = cell.eval_every or cell.steps
  at = sorted({*range(eval_every, cell.steps + 1, eval_every), cell.steps})
  count = len(next(iter(points.values()), (None,)))
  chosen = [{name: values[index] for name, values in points.items()} for index in range(count)]
  runs, states = [], []
  for index, hparams in enumerate(chosen):
    for seed in seeds:
      result = fit(
        cell.task, steps=cell.steps, seed=seed, hparams=hparams, eval_every=cell.eval_every, progress=progress,
        log_every=cell.log_every or eval_every, folder=None if folder is None else folder / f"point{index}-seed{seed}",
      )  # fmt: skip
      if result.interrupted:
        raise Interrupted(result, cell.steps)
      runs.append({row["step"]: row for row in result.rows})
      states.append(jax.device_get(result.state) if cell.keep_params else None)
  trials = [{**cell.task.hparams, **hparams} for hparams in chosen for _ in seeds]
  names = [name for name in runs[0][cell.steps] if name != "step"]
  stacked = lambda field: jax.tree.map(lambda *x: np.stack(x), *[getattr(s, field) for s in states])
  return SweepResult(
    hparams={name: np.asarray([trial[name] for trial in trials]) for name in cell.task.hparams},
    seeds=np.tile(np.asarray(seeds, np.uint32), count),
    steps=np.asarray(at),
    metrics={name: np.asarray([[run[step][name] for step in at] for run in runs]) for name in names},
    diverged_at=np.full(len(runs), -1),  # `fit` ends with an error where a loss is not finite
    params=stacked("params") if cell.keep_params else None,
    extra=stacked("extra") if cell.keep_params else None,
    engine="fit",
    seconds=time.perf_counter() - began,
    compile_seconds=0.0,
  )


def _table(result: SweepResult) -> CellTrials:
  """Trials in a row as points × seeds."""
  seeds = np.asarray(list(dict.fromkeys(result.seeds.tolist())), np.int64)
  square = lambda values: np.asarray(values).reshape(-1, len(seeds), *np.shape(values)[1:])
  return CellTrials(
    hparams={name: square(values)[:, 0] for name, values in result.hparams.items()},
    seeds=seeds,
    steps=np.asarray(result.steps),
    metrics={name: square(values) for name, values in result.metrics.items()},
    diverged_at=square(result.diverged_at),
    engine=result.engine,
  )


def _measured(recipe, config, seeds, trained, path) -> dict[str, np.ndarray]:
  """What `measure` returns, from the file if it was finished there with these seeds."""
  if path is not None and path.exists():
    found = Trials.load(path)
    if found.seeds.tolist() == seeds:
      return found.measured
  measured = {name: np.asarray(value) for name, value in recipe.measure(config, seeds, trained).items()}
  for name, value in measured.items():
    if value.shape[:1] != (len(seeds),):
      raise ValueError(f"measure must return arrays [seeds, ...]; {name!r} is {value.shape} for {len(seeds)} seeds.")
  if path is not None:
    Trials(np.asarray(seeds, np.int64), {}, measured).save(path)
  return measured


def _plain(name: str, value) -> np.ndarray:
  """An array that NumPy reads again without pickle; its values are kept."""
  value = np.asarray(value)
  if value.size == 0 and value.dtype == np.float64 and name in ("cells", "engines"):
    value = value.astype(str)
  if value.dtype.kind == "V" or value.dtype.name == "bfloat16":
    value = value.astype(np.float32)
  if value.dtype.kind not in "biufcU":
    raise ValueError(f"{name} must be numbers or text, got an array of {value.dtype}.")
  return value
