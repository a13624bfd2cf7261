"""Records of what was measured, and the ledger made from them."""

import datetime
import importlib.metadata
import json
import math
import os
import pathlib
import platform
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from experiments.harness import registry

RESULTS = registry.ROOT / "results"
LEDGER = registry.ROOT / "LEDGER.md"
README = registry.ROOT.parent / "README.md"
PACKAGES = ("jaxreg", "jax", "jaxlib", "flax", "optax")


def environment() -> dict[str, Any]:
  """Versions, device and date of this process, for a record."""
  import jax

  return {
    "versions": {name: importlib.metadata.version(name) for name in PACKAGES} | {"python": platform.python_version()},
    "device": f"{jax.device_count()} × {jax.devices()[0].device_kind} ({jax.default_backend()})",
    "machine": f"{platform.machine()}, {_cores()} cores",
    "date": datetime.date.today().isoformat(),
  }


def write(path: pathlib.Path, record: dict) -> None:
  """Writes a record as JSON, all of it or nothing; NaN becomes null, an infinity text."""
  path.parent.mkdir(parents=True, exist_ok=True)
  text = json.dumps(_strict(record), indent=1, ensure_ascii=False, allow_nan=False)
  temporary = path.with_name(f"writing-{path.name}")
  temporary.write_text(text + "\n", encoding="utf-8")
  os.replace(temporary, path)


def _strict(value):
  """What JSON can say."""
  if isinstance(value, Mapping):
    return {str(key): _strict(item) for key, item in value.items()}
  if isinstance(value, list | tuple):
    return [_strict(item) for item in value]
  if isinstance(value, np.ndarray | np.generic):
    return _strict(value.tolist())
  if isinstance(value, float) and not math.isfinite(value):
    return None if math.isnan(value) else str(value)
  return str(value) if isinstance(value, pathlib.Path) else value


def read(name: str) -> dict | None:
  """The committed record of a recipe, or None."""
  path = RESULTS / name / "cpu" / "record.json"
  return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def summary(record: dict | None) -> str:
  """How many of a record's claims came out how."""
  if record is None:
    return "not yet"
  verdicts = [claim["verdict"] for claim in record["claims"]]
  return ", ".join(
    f"{verdicts.count(kind)} {kind}" for kind in ("reproduced", "undecided", "not reproduced") if kind in verdicts
  )


def report() -> None:
  """Rewrites the ledger, and the table between the markers in the README, from the committed records."""
  parts = [
    "# Ledger\n",
    "Made by `python -m experiments report` from the records in `results/`; do not edit. A verdict compares the 95 %"
    " confidence interval of the mean over seeds with a condition fixed before the run: *reproduced* when all of it"
    " satisfies the condition, *not reproduced* when none of it does, *undecided* otherwise.\n",
  ]
  known = dict(sorted(registry.entries().items(), key=lambda item: item[1].card))
  rows = ["| method | recipe | claims | paper scale |", "| --- | --- | --- | --- |"]
  for name, entry in known.items():
    if not entry.card:
      continue
    record = read(name)
    scale = "`paper` preset" if "paper" in entry.presets else "not runnable"
    rows.append(
      f"| {entry.card} | [`{name}`](experiments/papers/{name}.py): {entry.title} | {summary(record)} | {scale} |"
    )
    parts.append(_section(name, entry, record))
  parts.append(_benchmarks())
  LEDGER.write_text("\n".join(parts), encoding="utf-8")
  if README.exists():
    text = README.read_text(encoding="utf-8")
    table = "<!-- methods -->\n" + "\n".join(rows) + "\n<!-- /methods -->"
    README.write_text(re.sub(r"<!-- methods -->.*<!-- /methods -->", lambda _: table, text, flags=re.S), "utf-8")


def _section(name: str, entry: registry.Entry, record: dict | None) -> str:
  head = f"## {entry.card}: {entry.title}\n"
  if record is None:
    return head + "\nNot verified yet.\n"
  lines = [
    head,
    "| claim | condition | measured (mean, 95 % interval) | per seed | verdict |",
    "| --- | --- | --- | --- | --- |",
  ]
  for claim in record["claims"]:
    values = ", ".join(f"{value:.3g}" for value in claim["values"])
    lines.append(
      f"| {claim['sentence']} ({claim['measured']}) | {claim['condition']} | {claim['mean']:.3g}"
      f" [{claim['interval'][0]:.3g}, {claim['interval'][1]:.3g}] | {values} | **{claim['verdict']}** |"
    )
  versions = ", ".join(f"{package} {version}" for package, version in record["versions"].items())
  lines.append(
    f"\n`python -m experiments verify {name} --preset {record['preset']}`, seeds {record['seeds']},"
    f" {record['wall_seconds']:.0f} s on {record['device']}, {record['machine']}; {versions};"
    f" {record['date']}.\n"
  )
  if "paper" not in entry.presets:
    lines.append("Paper scale: not runnable (no `paper` preset).\n")
  lines += [f"{note}\n" for note in record.get("notes", [])]
  if "table" in record:
    lines += [*_table(record["table"]), ""]
  if (RESULTS / name / "cpu" / "figure.png").exists():
    lines.append(f"![{name}](results/{name}/cpu/figure.png)\n")
  return "\n".join(lines)


def _benchmarks() -> str:
  lines = []
  for path in sorted((RESULTS / "benchmarks").glob("*.json")):
    record = json.loads(path.read_text(encoding="utf-8"))
    lines += [f"### {record['title']}\n", *_table(record["rows"])]
    lines += [f"\n{note}" for note in record.get("notes", [])]
    lines.append(f"\n{record['device']}, {record['machine']}; jax {record['versions']['jax']}; {record['date']}.\n")
  return "## Benchmarks\n\n" + "\n".join(lines) if lines else ""


def _table(rows: list[dict]) -> list[str]:
  names = list(dict.fromkeys(name for row in rows for name in row))
  head = [" | ".join(names), " | ".join("---" for _ in names)]
  return [f"| {line} |" for line in (*head, *[" | ".join(_cell(row.get(name, "")) for name in names) for row in rows])]


def _cell(value) -> str:
  return f"{value:.3g}" if isinstance(value, float) else str(value)


def _cores() -> int:
  return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
