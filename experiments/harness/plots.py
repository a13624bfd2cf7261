"""The forms of figures in use: bars with seeds, curves with bands, scatter."""

import pathlib
from collections.abc import Mapping

import numpy as np

__all__ = ["bars", "curves", "panels", "save", "scatter"]


def panels(count: int = 1, *, width: float = 4.2, height: float = 3.6):
  """A figure with panels of so many inches each, in two rows if there are more than four; returns figure and axes."""
  import matplotlib.pyplot as plt

  rows = 1 if count <= 4 else 2
  columns = -(-count // rows)
  figure, grid = plt.subplots(
    rows, columns, figsize=(width * columns, height * rows), layout="constrained", squeeze=False
  )
  axes = list(grid.flat)
  for axis in axes:
    axis.grid(alpha=0.3)
    axis.set_axisbelow(True)
  for axis in axes[count:]:
    axis.remove()
  return figure, axes[:count]


def bars(axis, groups: Mapping[str, np.ndarray], *, colors=None) -> None:
  """A bar for the mean of each group of values `[seeds]`, named below it (aslant if long), and a dot per seed."""
  for index, (values, color) in enumerate(zip(groups.values(), colors or [f"C{i}" for i in range(len(groups))])):
    values = np.asarray(values, np.float64)
    axis.bar(index, values.mean(), color=color, alpha=0.5)
    axis.plot(index + _spread(len(values)), values, "o", color=color, markersize=4)
  axis.set_xticks(range(len(groups)), list(groups))
  if len(groups) * max(len(line) for name in groups for line in name.split("\n")) > 48:
    axis.tick_params(axis="x", labelsize=8)
    for label in axis.get_xticklabels():
      label.set(rotation=35, ha="right", rotation_mode="anchor")


def curves(axis, x, groups: Mapping[str, np.ndarray], **style) -> None:
  """A line for the mean over seeds of values `[seeds, x]` of each group, and a band over their range.

  `style` goes to the lines: `linestyle`, `marker`, `color`.
  """
  for label, values in groups.items():
    values = np.asarray(values, np.float64)
    (line,) = axis.plot(x, values.mean(0), label=label, **style)
    axis.fill_between(x, values.min(0), values.max(0), color=line.get_color(), alpha=0.15, linewidth=0)


def scatter(axis, groups: Mapping[str, tuple[np.ndarray, np.ndarray]], **style) -> None:
  """A dot per seed at `(x [seeds], y [seeds])` of each group."""
  for label, (x, y) in groups.items():
    axis.plot(x, y, label=label, **{"marker": "o", "linestyle": "", "alpha": 0.7, "markersize": 5, **style})


def save(figure, path: pathlib.Path) -> None:
  """Writes the figure, with its folder, and closes it."""
  import matplotlib.pyplot as plt

  path.parent.mkdir(parents=True, exist_ok=True)
  figure.savefig(path, dpi=120)
  plt.close(figure)


def _spread(count: int) -> np.ndarray:
  return np.linspace(-0.15, 0.15, count) if count > 1 else np.zeros(1)
