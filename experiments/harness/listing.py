"""`list`: the recipes as a table, from their source and the records, without importing JAX."""

from rich.console import Console
from rich.table import Table

from experiments.harness import records, registry


def show() -> int:
  """Prints the table."""
  table = Table()
  table.add_column("recipe", no_wrap=True)
  table.add_column("what it is", overflow="fold")
  table.add_column("presets", overflow="fold", max_width=15)
  table.add_column("reproduced", no_wrap=True)
  for entry in registry.entries().values():
    table.add_row(entry.name, entry.title.split(":")[0], " ".join(entry.presets), _claims(records.read(entry.name)))
  Console(markup=False, highlight=False).print(table)
  print("reproduced: claims of the cpu preset that a committed record confirms.\nexperiments/LEDGER.md has them all.")
  return 0


def _claims(record: dict | None) -> str:
  if record is None:
    return "not yet"
  verdicts = [claim["verdict"] for claim in record["claims"]]
  return f"{verdicts.count('reproduced')} of {len(verdicts)}"
