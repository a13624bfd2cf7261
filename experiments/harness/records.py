"""Records of what was measured: where they are, and how they are written and read."""

import datetime
import json
import math
import os
import pathlib
import platform
import subprocess
from collections.abc import Mapping
from typing import Any

import numpy as np

from experiments.harness import registry

RESULTS = registry.ROOT / "results"
VERDICTS = ("reproduced", "undecided", "not reproduced")


def environment() -> dict[str, Any]:
  """Commit, versions, device and date of this process, for a record."""
  import jax

  from experiments.harness import identity

  return {
    **commit(),
    "versions": identity.versions(),
    "device": f"{jax.device_count()} × {jax.devices()[0].device_kind} ({jax.default_backend()})",
    "machine": f"{platform.machine()}, {cores()} cores",
    "date": datetime.date.today().isoformat(),
  }


def commit() -> dict[str, Any]:
  """The checkout's commit, and whether its code has changes that are not committed; None without git."""
  git = lambda *words: subprocess.run(
    ["git", *words], cwd=registry.ROOT.parent, capture_output=True, text=True, check=True
  ).stdout.strip()
  try:
    changed = git("status", "--porcelain", "--", "jaxreg", "experiments", ":!experiments/results", ":!*LEDGER.md")
    return {"commit": git("rev-parse", "HEAD"), "dirty": bool(changed)}
  except (OSError, subprocess.CalledProcessError):
    return {"commit": None, "dirty": None}


def cores() -> int:
  """Number of processors that this process may use."""
  return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def write(path: pathlib.Path, record: dict) -> None:
  """Writes a record as JSON, all of it or nothing; NaN becomes null, an infinity text."""
  from jaxreg.training import files  # imports JAX, which `list` does without

  path.parent.mkdir(parents=True, exist_ok=True)
  text = json.dumps(strict(record), indent=1, ensure_ascii=False, allow_nan=False)
  files.replace(path, f"{text}\n".encode())


def strict(value):
  """A value as JSON can say it."""
  if isinstance(value, Mapping):
    return {str(key): strict(item) for key, item in value.items()}
  if isinstance(value, list | tuple):
    return [strict(item) for item in value]
  if isinstance(value, np.ndarray | np.generic):
    return strict(value.tolist())
  if isinstance(value, float) and not math.isfinite(value):
    return None if math.isnan(value) else str(value)
  return value if value is None or isinstance(value, str | int | float | bool) else str(value)


def rounded(value):
  """A value in which numbers have ten significant digits.

  For what follows from a table: the last digits of a fit or a mean depend on the processor, and `report` is to give the
  same bytes on all. Settings, which are compared, keep their digits.
  """
  if isinstance(value, dict):
    return {key: rounded(item) for key, item in value.items()}
  if isinstance(value, list):
    return [rounded(item) for item in value]
  return float(f"{value:.10g}") if isinstance(value, float) else value


def read(name: str, preset: str = "cpu", root: pathlib.Path | None = None) -> dict | None:
  """The committed record of a recipe, or None."""
  path = (root or RESULTS) / name / preset / "record.json"
  return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def presets(name: str) -> list[str]:
  """The presets with a committed record, `cpu` first."""
  found = sorted(path.parent.name for path in (RESULTS / name).glob("*/record.json"))
  return sorted(found, key=lambda preset: preset != "cpu")


def outcome(record: dict | None) -> str:
  """How many of a record's claims came out how."""
  if record is None:
    return "not yet"
  verdicts = [claim["verdict"] for claim in record["claims"]]
  return ", ".join(f"{verdicts.count(kind)} {kind}" for kind in VERDICTS if kind in verdicts)
