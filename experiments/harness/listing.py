"""`list`: the recipes as a table, from their source and the records, without importing JAX."""

from rich.console import Console
from rich.table import Table

from experiments.harness import records, registry


def show(arguments: list[str]) -> int:
  """Prints the table."""
  if arguments:
    raise ValueError(f"list takes no arguments, got {' '.join(arguments)}.")
  table = Table("recipe", "what it is", "presets", "verified")
  for entry in registry.entries().values():
    table.add_row(entry.name, entry.title, " ".join(entry.presets), records.summary(records.read(entry.name)))
  Console().print(table)
  return 0
