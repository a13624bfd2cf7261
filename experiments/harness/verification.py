"""`verify`: trains a recipe's cells, saves the table, judges the claims, writes record and figure."""

import dataclasses
import pathlib
import time
from collections.abc import Sequence

import numpy as np

from experiments.harness import claims, records
from experiments.harness.trials import Trials, run_cells

__all__ = ["judged", "summary", "verify"]


def verify(recipe, name: str, preset: str, config, seeds: Sequence[int], folder: pathlib.Path, *, progress=True):
  """Trains (or takes up again) in `folder`, judges, and writes `trials.npz`, `record.json` and `figure.png` there.

  Returns:
    The record.
  """
  began = time.perf_counter()
  trials = run_cells(recipe, config, seeds, folder / "cells", progress=progress)
  seconds = time.perf_counter() - began
  trials.save(folder / "trials.npz")
  record = {
    "recipe": name,
    "card": getattr(recipe, "CARD", ""),
    "preset": preset,
    "config": dataclasses.asdict(config),
    "seeds": list(seeds),
    "wall_seconds": seconds,
    "engines": {cell: table.engine for cell, table in trials.cells.items()},
    **records.environment(),
  }
  record |= judged(recipe, config, trials)
  records.write(folder / "record.json", record)
  recipe.figure(config, summary(recipe, config, trials), folder / "figure.png")
  return record


def summary(recipe, config, trials: Trials) -> dict[str, np.ndarray]:
  """What claims and figure read: the recipe's `summary` of the table, or what it measured."""
  return recipe.summary(config, trials) if hasattr(recipe, "summary") else trials.measured


def judged(recipe, config, trials: Trials) -> dict:
  """The part of a record that follows from the table alone: claims with verdicts, deviations, notes, table."""
  found = summary(recipe, config, trials)
  notes = getattr(recipe, "NOTES", ())
  parts = {
    "claims": [_outcome(claim, found) for claim in recipe.claims(config)],
    "deviations": list(getattr(recipe, "DEVIATIONS", ())),
    "notes": list(recipe.notes(config) if hasattr(recipe, "notes") else notes),
  }
  return parts | ({"table": recipe.table(config, found)} if hasattr(recipe, "table") else {})


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
