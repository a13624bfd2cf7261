"""`verify`: trains a recipe's cells, saves the table, judges the claims, writes record and figure."""

import json
import pathlib
import shutil
import time
from collections.abc import Sequence

import numpy as np

from experiments.harness import claims, identity, records
from experiments.harness.trials import Trials, run_cells

__all__ = ["judged", "publish", "summary", "verify"]

FILES = ("trials.npz", "config.json", "figure.png", "record.json")


def verify(
  recipe, name: str, preset: str, config, seeds: Sequence[int], folder: pathlib.Path, *, progress: bool = True
) -> dict:
  """Trains in `folder`, or takes up what is there, and writes `trials.npz`, `record.json` and `figure.png`.

  Args:
    recipe: the recipe's module.
    name: its name.
    preset: the name of the configuration.
    config: the configuration.
    seeds: seeds of the run's keys.
    folder: where everything goes, finished parts among them.
    progress: whether to show progress bars.

  Returns:
    The record.

  Raises:
    ValueError: when the folder holds another experiment.
  """
  if preset == "paper":
    _check_streams(recipe, name, config, seeds)
  who = identity.identity(recipe, name, preset, config, seeds)
  _compare(folder, who)
  trials, made = _trained(recipe, config, seeds, folder, who, progress)
  record = {"card": getattr(recipe, "CARD", ""), **who, **made, **judged(recipe, config, trials)}
  records.write(folder / "record.json", record)
  recipe.figure(config, summary(recipe, config, trials), folder / "figure.png")
  return record


def publish(folder: pathlib.Path, target: pathlib.Path) -> None:
  """Copies what a verification left to where it is committed."""
  target.mkdir(parents=True, exist_ok=True)
  for file in FILES:
    shutil.copyfile(folder / file, target / file)


def summary(recipe, config, trials: Trials) -> dict[str, np.ndarray]:
  """What claims and figure read: the recipe's `summary` of the table, or what it measured."""
  return recipe.summary(config, trials) if hasattr(recipe, "summary") else trials.measured


def judged(recipe, config, trials: Trials) -> dict:
  """The part of a record that follows from the table alone: claims with verdicts, deviations, notes, table."""
  found = summary(recipe, config, trials)
  parts = {
    "claims": [_outcome(claim, found) for claim in recipe.claims(config)],
    "deviations": list(getattr(recipe, "DEVIATIONS", ())),
    "notes": list(recipe.notes(config) if hasattr(recipe, "notes") else getattr(recipe, "NOTES", ())),
  }
  table = {"table": recipe.table(config, found)} if hasattr(recipe, "table") else {}
  tables = {"tables": recipe.tables(config, found)} if hasattr(recipe, "tables") else {}
  return records.rounded(records.strict(parts | table | tables))


def _trained(recipe, config, seeds, folder, who, progress) -> tuple[Trials, dict]:
  """The table and how it was made, from the folder where it is finished."""
  path, described = folder / "trials.npz", folder / "config.json"
  if path.exists():
    trials = Trials.load(path)
    if trials.seeds.tolist() == list(seeds):
      return trials, json.loads(described.read_text(encoding="utf-8"))["made"]
  resumed, began = (folder / "cells").exists(), time.perf_counter()
  if not described.exists():  # with fewer seeds it stays right until there are more
    records.write(described, who)
  trials = run_cells(recipe, config, seeds, folder / "cells", key=identity.short_hash(who), progress=progress)
  made = {
    "wall_seconds": time.perf_counter() - began,
    "resumed": resumed,
    "engines": {cell: table.engine for cell, table in trials.cells.items()},
    **records.environment(),
  }
  records.write(described, {**who, "made": made})  # before the table, which is reused only with it
  trials.save(path)
  return trials, made


def _check_streams(recipe, name, config, seeds) -> None:
  """The preset of a paper is not verified by cells that train on something else."""
  cells = recipe.cells(config, list(seeds)) if hasattr(recipe, "cells") else {}
  if not any(callable(cell.task.data) for cell in cells.values()):
    raise ValueError(
      f"verify cannot run preset paper of {name}: none of the cells that its claims need reads the paper's data set."
    )


def _compare(folder: pathlib.Path, who: dict) -> None:
  """More seeds than a folder holds go on with it; anything else that differs is another experiment.

  Where only the code differs, the table is made again. Whether a cell's trained parts are still its own, `sweep` and
  `fit` decide by the programs that they run.
  """
  path = folder / "config.json"
  if not path.exists():
    if (folder / "trials.npz").exists():
      raise ValueError(f"{folder} holds trials without a config.json that says whose; delete it.")
    return
  found = json.loads(path.read_text(encoding="utf-8"))
  found.pop("made", None)
  same_code = found["code"] == who["code"]
  found["code"] = who["code"]
  if who["seeds"][: len(found["seeds"])] == found["seeds"]:
    found["seeds"] = who["seeds"]
  for field, before, after in identity.differences(found, who)[:1]:
    raise ValueError(
      f"{folder} holds another experiment: {field} is {before} there and {after} here; delete it or choose another"
      " --folder."
    )
  if not same_code:
    (folder / "trials.npz").unlink(missing_ok=True)
    path.unlink()


def _outcome(claim: claims.Claim, found) -> dict:
  result = claims.judge(claim, found)
  outcome = {
    "name": claim.name,
    "sentence": claim.sentence,
    "measured": claim.measured,
    "condition": claim.condition,
    "values": result.values,
    "mean": result.mean,
    "interval": [result.low, result.high],
    "verdict": result.verdict,
  }
  outcome |= {"scale": claim.scale} if claim.scale != "linear" else {}
  return outcome | ({"amended": claim.amended} if claim.amended else {})
