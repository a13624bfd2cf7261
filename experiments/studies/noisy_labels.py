"""The noisy-label ablation: five losses on equal terms over noise rates and seeds (the demo).

Every loss gets the same model, data, optimizer, number of epochs and number of hyperparameter settings. The setting
and the epoch are selected by accuracy on a validation split whose labels are as noisy as the training labels; test
labels are never used for it. Differences to cross-entropy are paired by seed: at one seed and rate all losses see the
same initial parameters, batches and wrong labels.
"""

import dataclasses
import itertools
import pathlib
import sys
import time
import types

import numpy as np

from experiments.harness import plots, records, registry, tables
from experiments.harness.selection import select
from experiments.harness.trials import Cell, Trials, run_cells
from experiments.problems.noisy_classification import Problem, noisy_task
from jaxreg.training import grid

LOSSES = ("cross_entropy", "gce", "ldr_kl", "aldr_kl", "elr")
WHEN = ("selected", "last")
TITLE = "Clean test accuracy, mean ± standard error over seeds (difference to cross-entropy, paired)"
# The same number of settings for each loss.
SETTINGS = {
  "cross_entropy": {"learning_rate": [0.02, 0.05, 0.1]},
  "gce": {"q": [0.3, 0.5, 0.7]},
  "ldr_kl": {"temperature": [1.0, 3.0, 10.0]},
  "aldr_kl": {"temperature": [1.0, 3.0, 10.0]},
  "elr": {"weight": [1.0, 3.0, 7.0]},
}


@dataclasses.dataclass(frozen=True)
class Config:
  """The ablation.

  Attributes:
    problem: data, model and optimizer.
    rates: noise rates; a fraction `rate * 9 / 10` of the labels ends up wrong.
    seeds: number of seeds.
    evaluations: how often each run is evaluated.
    loss: the loss that `run` and `sweep` train.
  """

  problem: Problem = Problem(train=3500, valid=500, test=1000, hidden=(128,), epochs=20)
  rates: tuple[float, ...] = (0.0, 0.2, 0.4, 0.6)
  seeds: int = 5
  evaluations: int = 10
  loss: str = "elr"

  def __post_init__(self):
    if self.problem.steps % self.evaluations:
      raise ValueError(f"evaluations must divide the {self.problem.steps} steps, got {self.evaluations}.")
    if not all(0 <= rate <= 1 for rate in self.rates):
      raise ValueError(f"rates must lie in [0, 1], got {self.rates}.")


PRESETS = {
  "smoke": Config(
    problem=Problem(dataset="digits", train=500, valid=100, test=500, hidden=(32,), epochs=4),
    rates=(0.0, 0.6),
    seeds=2,
    evaluations=2,
  ),
  "cpu": Config(),
}


@dataclasses.dataclass(frozen=True)
class DemoOptions:
  """How to run the demo.

  Attributes:
    preset: `cpu`, or `smoke` for a few seconds on the digits.
    folder: where table, figure and record go.
    engine: auto, vmap or map.
  """

  preset: str = "cpu"
  folder: pathlib.Path = pathlib.Path("runs/demo")
  engine: str = "auto"


def cell(config: Config) -> Cell:
  """Settings × noise rates of one loss."""
  steps = config.problem.steps
  points = grid(noise_rate=config.rates, **SETTINGS[config.loss])
  return Cell(noisy_task(config.problem, config.loss), steps, points, eval_every=steps // config.evaluations)


def cells(config: Config, seeds) -> dict[str, Cell]:
  """A cell per loss."""
  del seeds
  return {name: cell(dataclasses.replace(config, loss=name)) for name in LOSSES}


def summary(config: Config, trials: Trials) -> dict[str, np.ndarray]:
  """Of each loss and rate, `[seeds]`: accuracies at the selected and the last epoch, setting, diverged trials."""
  found = {}
  for name in LOSSES:
    metrics, by_rate = trials[name].metrics, lambda x: np.reshape(x, (len(config.rates), -1, *np.shape(x)[1:]))
    test = by_rate(metrics["test_accuracy"])
    valid = by_rate(np.where(np.isfinite(metrics["loss"]), metrics["noisy_valid_accuracy"], -1))
    diverged = by_rate(trials[name].diverged_at >= 0)
    for index, rate in enumerate(config.rates):
      chosen = select(valid[index])
      found[f"{name} {rate:g} selected"] = chosen.of(test[index])
      found[f"{name} {rate:g} last"] = test[index, chosen.setting, :, -1]
      found[f"{name} {rate:g} setting"] = np.full(len(trials.seeds), chosen.setting)
      found[f"{name} {rate:g} diverged"] = diverged[index].sum(0)
  return found


def table(config: Config, summary) -> list[dict]:
  """One row per loss and rate: accuracies, and differences to cross-entropy paired by seed."""
  rows = []
  for name, rate in itertools.product(LOSSES, config.rates):
    setting = int(summary[f"{name} {rate:g} setting"][0])
    row = {
      "loss": name,
      "noise_rate": rate,
      "setting": {key: float(values[setting]) for key, values in SETTINGS[name].items()},
      "diverged_trials": int(summary[f"{name} {rate:g} diverged"].sum()),
    }
    for when in WHEN:
      values, base = (summary[f"{loss} {rate:g} {when}"] for loss in (name, "cross_entropy"))
      row[when] = _mean_and_error(values)
      row[f"{when}_minus_cross_entropy"] = _mean_and_error(values - base)
      row[f"{when}_per_seed"] = values.tolist()
    rows.append(row)
  return rows


def figure(config: Config, summary, path: pathlib.Path) -> None:
  """Test accuracy against the noise rate, at the selected and the last epoch."""
  picture, axes = plots.panels(len(WHEN))
  for axis, when in zip(axes, WHEN):
    of = lambda name, when=when: np.stack([summary[f"{name} {rate:g} {when}"] for rate in config.rates], axis=1)
    plots.curves(axis, config.rates, {name: of(name) for name in LOSSES}, marker="o")
    axis.set(title=f"{when} epoch", xlabel="noise rate", xticks=config.rates, ylim=(0, 1))
  axes[0].set_ylabel("clean test accuracy")
  axes[1].legend(frameon=False)
  plots.save(picture, path)


def demo(options: DemoOptions) -> dict:
  """Runs the ablation; prints the table, writes trials, record and figure, and says where they are."""
  config = registry.preset(sys.modules[__name__], options.preset)
  with_engine = lambda config, seeds: {n: c._replace(engine=options.engine) for n, c in cells(config, seeds).items()}
  began = time.perf_counter()
  trials = run_cells(types.SimpleNamespace(cells=with_engine), config, range(config.seeds))
  seconds = time.perf_counter() - began
  trials.save(options.folder / "trials.npz")
  found = summary(config, trials)
  rows = table(config, found)
  record = {
    "title": "Noisy-label ablation",
    "preset": options.preset,
    "protocol": " ".join(__doc__.split("\n\n")[1].split()),
    "config": dataclasses.asdict(config),
    "settings": SETTINGS,
    "wall_seconds": seconds,
    "engines": {name: trials[name].engine for name in LOSSES},
    "rows": rows,
    **records.environment(),
  }
  records.write(options.folder / "record.json", record)
  figure(config, found, options.folder / "figure.png")
  shown = {"rows": _shown(rows), "keys": ("noise", "loss", "chosen setting"), "title": TITLE, "section": "noise"}
  (options.folder / "table.txt").write_text(tables.text(**shown), encoding="utf-8")
  tables.show(**shown)
  print(f"{sum(trials[name].diverged_at.size for name in LOSSES)} trials in {seconds:.0f} s")
  for name in ("table.txt", "figure.png", "record.json", "trials.npz"):
    print(f"{name.split('.')[0]:7} {options.folder / name}")
  return record


def _mean_and_error(values: np.ndarray) -> tuple[float, float]:
  return float(values.mean()), float(values.std(ddof=1) / np.sqrt(len(values)))


def _shown(rows: list[dict]) -> list[dict]:
  """The table's rows as text, by noise rate."""
  shown = []
  for row in sorted(rows, key=lambda row: (row["noise_rate"], LOSSES.index(row["loss"]))):
    words = lambda key, sign="", row=row: f"{row[key][0]:{sign}.3f} ± {row[key][1]:.3f}"
    paired = lambda when, row=row: "" if row["loss"] == "cross_entropy" else words(f"{when}_minus_cross_entropy", "+")
    line = {
      "noise": f"{row['noise_rate']:g}",
      "loss": row["loss"],
      "chosen setting": ", ".join(f"{key} {value:g}" for key, value in row["setting"].items()),
      "selected epoch": words("selected"),
      "difference": paired("selected"),
      "last epoch": words("last"),
      "its difference": paired("last"),
    }
    shown.append(line | ({"diverged": str(row["diverged_trials"])} if row["diverged_trials"] else {}))
  return shown
