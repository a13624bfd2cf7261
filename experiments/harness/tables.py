"""Tables for the terminal that stay readable at 80 columns."""

import io
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

__all__ = ["show", "text"]


def show(
  rows: Sequence[dict], *, keys: Sequence[str] = (), title: str | None = None, section: str | None = None
) -> None:
  """Prints rows, floats in four digits; columns that do not fit the width follow in further tables.

  Args:
    rows: name -> value of each row; all names of all rows are columns.
    keys: columns that say which row it is; they stand in each of the tables.
    title: the table's title.
    section: a column; a line is drawn wherever its value changes.
  """
  _show(Console(markup=False, highlight=False), rows, keys, title, section)


def text(rows: Sequence[dict], *, width: int = 140, **options) -> str:
  """What `show` prints on a terminal of a width."""
  console = Console(file=io.StringIO(), width=width, markup=False, highlight=False)
  _show(console, rows, options.get("keys", ()), options.get("title"), options.get("section"))
  return console.file.getvalue()


def _show(console, rows, keys, title, section) -> None:
  words = [{name: _word(value) for name, value in row.items()} for row in rows]
  names = list(dict.fromkeys(name for row in words for name in row))
  keys = [name for name in names if name in keys]
  for part in _parts(words, keys, [name for name in names if name not in keys], console.width):
    table = Table(title=title, title_justify="left")
    for name in (*keys, *part):
      table.add_column(name, overflow="fold")
    for row, after in zip(words, [*words[1:], {}]):
      ends = section is not None and row.get(section) != after.get(section)
      table.add_row(*[row.get(name, "") for name in (*keys, *part)], end_section=ends)
    console.print(table)
    title = None


def _parts(words, keys, names, width) -> list[list[str]]:
  """Columns together as long as they fit beside the keys."""
  widest = lambda name: max([*map(len, name.split()), *(len(row.get(name, "")) for row in words)]) + 3
  parts, used = [[]], (start := 1 + sum(map(widest, keys)))
  for name in names:
    if parts[-1] and used + widest(name) > width:
      parts, used = [*parts, []], start
    parts[-1].append(name)
    used += widest(name)
  return parts


def _word(value) -> str:
  return f"{value:.4g}" if isinstance(value, float) else str(value)
