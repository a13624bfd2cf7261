"""Progress bars on the main process's terminal."""

import contextlib
import sys

from jaxreg.extras import extra_needed
from jaxreg.training.mesh import is_main

__all__ = ["progress_bar"]


@contextlib.contextmanager
def progress_bar(total: int, done: int = 0, *, show: bool = True, label: str = "train", unit: str = "step"):
  """Yields `advance(count, loss=None, seconds=None)`; shows nothing when `show` is false or on other hosts."""
  if not (show and is_main()):
    yield lambda count, loss=None, seconds=None: None
    return
  with extra_needed("training", "a progress bar"):
    from rich import progress as rich_progress
    from rich.console import Console

  columns = (
    "{task.description}",
    rich_progress.BarColumn(),
    "{task.completed}/{task.total} " + unit + "s",
    rich_progress.TimeElapsedColumn(),
    rich_progress.TimeRemainingColumn(),
    "{task.fields[note]}",
  )
  with rich_progress.Progress(*columns, console=Console(file=sys.stderr)) as bar:
    task = bar.add_task(label, total=total, completed=done, note="")

    def advance(count, loss=None, seconds=None):
      note = "" if loss is None else f"loss {loss:.4g}"
      if seconds:
        note += f"  {count / seconds:.0f} {unit}s/s"
      bar.update(task, advance=count, note=note)

    yield advance
