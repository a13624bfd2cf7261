"""The record of a run: one JSON object per line with a chained checksum; TensorBoard files are written from it."""

import os
import pathlib
import shutil
import warnings

from jaxreg.extras import extra_needed
from jaxreg.training import files
from jaxreg.training.mesh import is_main

__all__ = ["DamagedLogError", "MetricsLog", "read_metrics"]


class DamagedLogError(ValueError):
  """A line of a run's metrics is not what was written."""


def read_metrics(folder) -> list[dict]:
  """The rows of a run's `metrics.jsonl`, in order; a torn last line (the writer was killed) is left out.

  Raises:
    DamagedLogError: when a line before the last is lost, doubled or changed; it names the file and the line. `fit`
      repairs the file from the checkpoint that it resumes from.
  """
  path = pathlib.Path(folder) / "metrics.jsonl"
  lines = path.read_bytes().split(b"\n") if path.exists() else []
  rows, chain = [], 0
  for number, line in enumerate(filter(None, lines), 1):
    row, chain = _checked(line, chain)
    if row is None:
      if number == sum(map(bool, lines)) and lines[-1]:  # no end of line: it was being written
        break
      raise DamagedLogError(f"line {number} of {path} is not what was written, or one before it is lost.")
    rows.append(row)
  return rows


def _line(row: dict, chain: int) -> tuple[str, int]:
  """A row as a line that ends in a checksum of itself and all lines before it."""
  body = files.dumps(row)
  chain = files.crc(body.encode(), chain)
  return f'{body[:-1]}, "crc": {chain}}}\n', chain


def _checked(line: bytes, chain: int) -> tuple[dict | None, int]:
  body, mark, end = line.rpartition(b', "crc": ')
  try:
    row = files.loads(body.decode() + "}")
    expected = int(end[:-1])
  except (ValueError, UnicodeDecodeError):
    return None, chain
  found = files.crc(body + b"}", chain)
  return (row if mark and end[-1:] == b"}" and found == expected else None), expected


class MetricsLog:
  """Appends rows of metrics to a folder; without a folder, or on other hosts than the first, it only remembers them.

  Args:
    folder: the run's folder, or None.
    rows: the rows so far, as the checkpoint has them; whatever else is in the file belongs to work that is done again.
    tensorboard: whether to write event files to `<folder>/tensorboard`.
  """

  def __init__(self, folder=None, *, rows: list[dict] | None = None, tensorboard: bool = True):
    self.rows, self._file, self._events, self._chain = list(rows or []), None, None, 0
    if folder is None or not is_main():
      return
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    try:
      read_metrics(folder)
    except DamagedLogError as error:
      warnings.warn(f"{error} It is written anew from the checkpoint.", stacklevel=2)
    text = ""
    for row in self.rows:
      line, self._chain = _line(row, self._chain)
      text += line
    files.replace(folder / "metrics.jsonl", text.encode())
    self._file = open(folder / "metrics.jsonl", "a", encoding="utf-8")  # noqa: SIM115, closed by close()
    if tensorboard:
      with extra_needed("training", "a run's folder with tensorboard=True"):
        import tensorboardX

      shutil.rmtree(folder / "tensorboard", ignore_errors=True)
      self._events = tensorboardX.SummaryWriter(str(folder / "tensorboard"))
      for row in self.rows:
        self._write_events(row)

  def append(self, row: dict) -> None:
    """Adds one row; it must have a `"step"` larger than the last one's."""
    self.rows.append(row)
    if self._file is not None:
      line, self._chain = _line(row, self._chain)
      self._file.write(line)
      self._file.flush()
    self._write_events(row)

  def sync(self) -> None:
    """Forces all rows to disk."""
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
