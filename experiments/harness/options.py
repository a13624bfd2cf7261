"""The flags of the commands, and the hyperparameters that they set."""

import dataclasses
import itertools
import math
import pathlib
import re
from collections.abc import Mapping, Sequence

import numpy as np

from experiments.harness import registry

__all__ = [
  "Distributed", "RunOptions", "SweepOptions", "VerifyOptions", "assignments", "gathered", "grid_points", "hparam_help"
]  # fmt: skip

LARGEST_SEED = 2**32 - 1


@dataclasses.dataclass(frozen=True)
class Distributed:
  """Several processes, one a host; on a TPU pod or under Slurm the addresses are found by JAX itself.

  Attributes:
    auto: initialise from what the cluster says of itself.
    coordinator: `host:port` of process 0, when the cluster says nothing.
    processes: number of processes.
    process: this process's number.
    heartbeat_timeout: seconds after which the others end when one has died.
  """

  auto: bool = False
  coordinator: str | None = None
  processes: int | None = None
  process: int | None = None
  heartbeat_timeout: int = 100

  def check(self) -> None:
    """Raises ValueError for processes that could not find each other."""
    if (self.processes, self.process) != (None, None) and not (self.auto or self.coordinator):
      raise ValueError(
        "--distributed.processes and --distributed.process need --distributed.coordinator HOST:PORT, or"
        " --distributed.auto where the cluster knows its hosts."
      )


@dataclasses.dataclass(frozen=True)
class RunOptions:
  """How to train.

  Attributes:
    folder: where checkpoints and metrics go; by default a folder in `runs/` named after the recipe, the preset and a
      hash of all settings. Running again resumes.
    seed: the run's seed.
    steps: overrides the recipe's number of steps.
    checkpoint_every: steps between checkpoints, a multiple of the recipe's logging interval.
    accumulate: micro-batches per step.
    precision: dtype of the computation: float32, bfloat16, float16 or float64.
    remat: recompute activations in the backward pass.
    profile_steps: steps to run under the profiler first.
    set: hyperparameters, as NAME=VALUE; the flag may come several times.
    distributed: several hosts.
  """

  folder: pathlib.Path | None = None
  seed: int = 0
  steps: int | None = None
  checkpoint_every: int | None = None
  accumulate: int = 1
  precision: str = "float32"
  remat: bool = False
  profile_steps: int = 0
  set: tuple[str, ...] = ()
  distributed: Distributed = Distributed()

  def check(self) -> None:
    """Raises ValueError for hosts that could not find each other; `fit` checks the rest."""
    self.distributed.check()


@dataclasses.dataclass(frozen=True)
class SweepOptions:
  """How to sweep.

  Attributes:
    folder: where finished trials and the table go; by default a folder in `runs/` named after the recipe, the preset
      and a hash of all settings. Running again resumes.
    seeds: number of seeds, starting at `first_seed`.
    first_seed: the first seed.
    steps: overrides the recipe's number of steps.
    engine: auto, vmap or map.
    memory_gib: memory per device that a chunk of trials may use.
    set: hyperparameters that all trials have, as NAME=VALUE; the flag may come several times.
    grid: values to try instead of the recipe's, as NAME=VALUE,VALUE,…, in all combinations with the others; the flag
      may come several times.
    distributed: several hosts.
  """

  folder: pathlib.Path | None = None
  seeds: int = 5
  first_seed: int = 0
  steps: int | None = None
  engine: str = "auto"
  memory_gib: float | None = None
  set: tuple[str, ...] = ()
  grid: tuple[str, ...] = ()
  distributed: Distributed = Distributed()

  def check(self) -> None:
    """Raises ValueError for what cannot be run."""
    _check_seeds(self.seeds, self.first_seed, least=1)
    if self.memory_gib is not None and not 0 < self.memory_gib < math.inf:
      raise ValueError(f"--memory-gib must be positive, got {self.memory_gib:g}.")
    self.distributed.check()


@dataclasses.dataclass(frozen=True)
class VerifyOptions:
  """How to verify.

  Attributes:
    preset: which configuration.
    seeds: number of seeds, at least two; fewer than five decide nothing.
    first_seed: the first seed; those below 100 set the conditions and cannot check them.
    folder: where trials, records and figures go, in a folder per recipe and preset. Running again resumes.
    commit: also put table, record and figure into `experiments/results`, and rebuild the ledger.
  """

  preset: str = "cpu"
  seeds: int = 5
  first_seed: int = 100
  folder: pathlib.Path = pathlib.Path("runs")
  commit: bool = False

  def check(self) -> None:
    """Raises ValueError for what cannot be verified."""
    _check_seeds(self.seeds, self.first_seed, least=2)
    if self.first_seed < 100:
      raise ValueError(f"--first-seed must be at least 100, got {self.first_seed}: smaller ones set the conditions.")
    if self.commit and self.preset == "smoke":
      raise ValueError("verify cannot commit preset smoke: it only shows that everything runs.")


def gathered(flags: Sequence[str], names: Sequence[str] = ("--set", "--grid")) -> list[str]:
  """The flags with all values of each repeated one behind its first: `--set a=1 --set b=2` keeps both.

  >>> gathered(["--set", "a=1", "--seed", "3", "--set=b=2", "c=4"])
  ['--seed', '3', '--set', 'a=1', 'b=2', 'c=4']
  """
  rest, values, current = [], {}, None
  for flag in flags:
    name, sign, value = flag.partition("=")
    if flag.startswith("-"):
      current = name if name in names else None
      if current:
        values.setdefault(current, []).extend([value] if sign else [])
        continue
    (rest if current is None else values[current]).append(flag)
  for name, given in values.items():
    if not given:
      raise ValueError(f"{name} takes NAME=VALUE, got nothing.")
    rest += [name, *given]
  return rest


def assignments(texts: Sequence[str], hparams: Mapping, flag: str = "--set") -> dict[str, list[int | float]]:
  """The values of `NAME=VALUE,…` by name: integers where the hyperparameter is one, otherwise floats.

  >>> assignments(["k=8,16", "weight=1"], {"k": 4, "weight": 0.5}, "--grid")
  {'k': [8, 16], 'weight': [1.0]}
  """
  found = {}
  for text in texts:
    name, sign, values = text.partition("=")
    if not sign or not values:
      raise ValueError(f"{flag} takes NAME=VALUE, got {text!r}.")
    if name not in hparams:
      raise registry.UnknownName("hyperparameter", name, list(hparams))
    parts = values.split(",")
    if flag == "--set" and len(parts) > 1:
      raise ValueError(f"--set takes one value, got {text!r}.")
    if name in found:
      raise ValueError(f"{flag} gives {name} twice.")
    found[name] = [_number(flag, text, part, hparams[name]) for part in parts]
  return found


def _number(flag: str, text: str, part: str, default) -> int | float:
  whole = np.asarray(default).dtype.kind in "iu" and re.fullmatch(r"[+-]?\d+", part)
  try:
    value = int(part) if whole else float(part)
  except ValueError:
    raise ValueError(f"{flag} takes NAME=NUMBER, got {text!r}.") from None
  if not math.isfinite(value):
    raise ValueError(f"{flag} takes finite numbers, got {text!r}.")
  return value


def grid_points(points: Mapping[str, Sequence], grid: Mapping[str, Sequence]) -> dict[str, list]:
  """The recipe's points with some hyperparameters' values replaced, in all combinations with what remains.

  >>> grid_points({"a": [1, 1, 2, 2], "b": [3, 4, 3, 4]}, {"b": [5, 6]})
  {'a': [1, 1, 2, 2], 'b': [5, 6, 5, 6]}
  """
  kept = [name for name in points if name not in grid]
  rows = list(dict.fromkeys(zip(*(np.asarray(points[name]).tolist() for name in kept)))) or [()]
  combined = [(*row, *new) for row in rows for new in itertools.product(*grid.values())]
  return {name: [row[index] for row in combined] for index, name in enumerate([*kept, *grid])}


def hparam_help(hparams: Mapping) -> str:
  """What `--set` takes."""
  listed = ", ".join(f"{name}={np.asarray(value).item():g}" for name, value in hparams.items())
  return f"Hyperparameters (NAME=default): {listed or 'none'}."


def _check_seeds(seeds: int, first_seed: int, least: int) -> None:
  if seeds < least:
    raise ValueError(f"--seeds must be at least {least}, got {seeds}.")
  if not 0 <= first_seed <= LARGEST_SEED + 1 - seeds:
    raise ValueError(f"seeds must lie between 0 and {LARGEST_SEED}, got --first-seed {first_seed} --seeds {seeds}.")
