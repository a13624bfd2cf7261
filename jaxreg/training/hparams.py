"""Hyperparameters as scalars: defaults with overrides, dtypes, and a check of their domains before a run starts."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.typing import ArrayLike

from jaxreg.training.task import Task

__all__ = ["check_domains", "columns", "grid", "merge"]

_KINDS = "biufc"


def grid(**values: Sequence | ArrayLike) -> dict[str, np.ndarray]:
  """All combinations of hyperparameter values, as equally long arrays.

  >>> grid(learning_rate=[0.1, 0.2], weight=[1.0, 2.0, 3.0])["weight"].tolist()
  [1.0, 2.0, 3.0, 1.0, 2.0, 3.0]

  Args:
    **values: the values of each hyperparameter, the last one varying fastest.

  Returns:
    name -> values `[points]`, as `sweep` takes them.
  """
  points = list(itertools.product(*values.values()))
  return {name: np.asarray([point[i] for point in points]) for i, name in enumerate(values)}


def merge(task: Task, hparams: Mapping[str, Any] | None = None) -> dict[str, np.ndarray]:
  """The task's default hyperparameters with overrides, as NumPy scalars.

  A hyperparameter has its default's dtype, or a wider kind where the value needs one: a default of 1 with the value
  0.05 is a float.

  Raises:
    ValueError: for an unknown name, or a value that is not a number of that dtype, or not a number at all.
  """
  values = columns(task, {name: [value] for name, value in (hparams or {}).items()})
  return {name: value[0] for name, value in values.items()}


def columns(task: Task, points: Mapping[str, Sequence | ArrayLike]) -> dict[str, np.ndarray]:
  """Every hyperparameter of the task at every point, `[points]` each.

  Raises:
    ValueError: as `merge`, and when the points are not equally long.
  """
  lengths = {name: len(np.atleast_1d(value)) for name, value in points.items()}
  if len(set(lengths.values())) > 1:
    raise ValueError(f"points must be equally long, got {lengths}; grid(...) makes all combinations.")
  unknown = sorted(set(points) - set(task.hparams))
  if unknown:
    raise ValueError(f"unknown hyperparameters {unknown}; the task has {sorted(task.hparams)}.")
  count = next(iter(lengths.values()), 1)
  return {
    name: _column(name, default, points[name])
    if name in points
    else np.repeat(_column(name, default, [default]), count)
    for name, default in task.hparams.items()
  }


def _column(name: str, default, values) -> np.ndarray:
  given, own = np.asarray(values), np.asarray(default)
  if given.dtype.kind not in _KINDS or given.ndim != 1 or own.ndim:
    raise ValueError(f"hyperparameter {name} must be a number, got {values!r}.")
  wider = _KINDS.index(given.dtype.kind) > _KINDS.index(own.dtype.kind)
  column = given.astype(jax.dtypes.canonicalize_dtype(given.dtype if wider else own.dtype))
  if np.isnan(column).any():
    raise ValueError(f"hyperparameter {name} must be a number, got nan.")
  exact = column == given if column.dtype.kind in "biu" else np.isfinite(column) | ~np.isfinite(given)
  if not np.all(exact):
    raise ValueError(f"hyperparameter {name} must fit into {column.dtype}, got {given[~exact][0]}.")
  return column


def check_domains(task: Task, points: Mapping[str, np.ndarray], shapes) -> None:
  """Lets the ingredients check the values: they refuse what lies outside of a domain where it is concrete.

  The task's functions are traced with the least and with the largest value of every hyperparameter, which nothing is
  computed for; if that is refused, every point is traced to find the one that is to blame.

  Args:
    task: the task.
    points: as `columns` returns them.
    shapes: `(key, batch)` as `jax.ShapeDtypeStruct`.

  Raises:
    ValueError: the ingredient's own sentence.
  """
  ends = [{name: value.min() for name, value in points.items()}, {name: value.max() for name, value in points.items()}]
  try:
    for end in ends[: 1 if ends[0] == ends[1] else 2]:
      _trace(task, end, *shapes)
  except (ValueError, AssertionError):
    for index in range(len(next(iter(points.values()), [0]))):
      _trace(task, {name: value[index] for name, value in points.items()}, *shapes)


def _trace(task: Task, hparams, key, batch) -> None:
  def run(key, batch):
    state = task.init(key, hparams)
    state, metrics = task.step(state, batch, hparams)
    return metrics, {} if task.evaluate is None else task.evaluate(state, hparams)

  jax.eval_shape(run, key, batch)
