"""The record of a run: one JSON object per line is authoritative, TensorBoard event files are written from it."""

import json
import os
import pathlib
import shutil

from jaxreg.training.mesh import is_main

__all__ = ["MetricsLog", "read_metrics"]


def read_metrics(folder) -> list[dict]:
  """The rows of a run's `metrics.jsonl`, in order; a torn last line (the writer was killed) is left out."""
  path = pathlib.Path(folder) / "metrics.jsonl"
  rows = []
  for line in path.read_text().splitlines() if path.exists() else []:
    try:
      rows.append(json.loads(line))
    except json.JSONDecodeError:
      break
  return rows


class MetricsLog:
  """Appends rows of metrics to a folder; without a folder, or on other hosts than the first, it only remembers them.

  Args:
    folder: the run's folder, or None.
    step: rows after this step belong to work that a resumed run will do again, and are cut.
    tensorboard: whether to write event files to `<folder>/tensorboard`.
  """

  def __init__(self, folder=None, *, step: int = 0, tensorboard: bool = True):
    self._file, self._events = None, None
    if folder is None:
      self.rows = []
      return
    folder = pathlib.Path(folder)
    self.rows = [row for row in read_metrics(folder) if row["step"] <= step]
    if not is_main():
      return
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / "metrics.tmp"
    temporary.write_text("".join(json.dumps(row) + "\n" for row in self.rows))
    os.replace(temporary, folder / "metrics.jsonl")
    self._file = open(folder / "metrics.jsonl", "a", encoding="utf-8")  # noqa: SIM115, closed by close()
    if tensorboard:
      import tensorboardX

      shutil.rmtree(folder / "tensorboard", ignore_errors=True)
      self._events = tensorboardX.SummaryWriter(str(folder / "tensorboard"))
      for row in self.rows:
        self._write_events(row)

  def append(self, row: dict) -> None:
    """Adds one row; it must have a `"step"` larger than the last one's."""
    self.rows.append(row)
    if self._file is not None:
      self._file.write(json.dumps(row) + "\n")
      self._file.flush()
    self._write_events(row)

  def sync(self) -> None:
    """Forces all rows to disk; called before a checkpoint that relies on them."""
    if self._file is not None:
      os.fsync(self._file.fileno())

  def close(self) -> None:
    """Closes the files."""
    if self._file is not None:
      self._file.close()
    if self._events is not None:
      self._events.close()

  def _write_events(self, row: dict) -> None:
    if self._events is not None:
      for name, value in row.items():
        if name != "step":
          self._events.add_scalar(name, value, row["step"])
