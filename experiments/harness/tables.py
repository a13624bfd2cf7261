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
  sizes = {name: _widest(name, words) for name in names}
  for part in _parts(sizes, keys, [name for name in names if name not in keys], console.width):
    table = Table(title=title, title_justify="left")
    for name in (*keys, *part):
      fits = 1 + sum(sizes[key] + 3 for key in {*keys, name}) <= console.width
      table.add_column(name, overflow="fold", min_width=sizes[name] if fits else None)
    for row, after in zip(words, [*words[1:], {}]):
      ends = section is not None and row.get(section) != after.get(section)
      table.add_row(*[row.get(name, "") for name in (*keys, *part)], end_section=ends)
    console.print(table)
    title = None


def _widest(name: str, words) -> int:
  """Characters that a column needs: headings may break between words, values may not."""
  return max([*map(len, name.split()), *(len(row.get(name, "")) for row in words)])


def _parts(sizes, keys, names, width) -> list[list[str]]:
  """Columns together as long as they fit beside the keys."""
  parts, used = [[]], (start := 1 + sum(sizes[key] + 3 for key in keys))
  for name in names:
    if parts[-1] and used + sizes[name] + 3 > width:
      parts, used = [*parts, []], start
    parts[-1].append(name)
    used += sizes[name] + 3
  return parts


def _word(value) -> str:
  return f"{value:.4g}" if isinstance(value, float) else str(value)
