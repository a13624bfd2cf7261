"""The noisy-label ablation: five losses on equal terms over noise rates and seeds (the demo).

Every loss gets the same model, data, optimizer, number of epochs and number of hyperparameter settings. The setting
and the epoch are selected by accuracy on a validation split whose labels are as noisy as the training labels; test
labels are never used for it. Differences to cross-entropy are paired by seed: at one seed and rate all losses see the
same initial parameters, batches and wrong labels.
"""

import dataclasses
import pathlib

import numpy as np
from rich.console import Console
from rich.table import Table

from experiments.harness import records
from experiments.problems.noisy_classification import Problem, noisy_task
from jaxreg.training import Task, grid, sweep

LOSSES = ("cross_entropy", "gce", "ldr_kl", "aldr_kl", "elr")
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
    rates: noise rates; a share `rate * 9 / 10` of the labels ends up wrong.
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


def build(config: Config) -> Task:
  """The task of one loss."""
  return noisy_task(config.problem, config.loss)


def points(config: Config) -> dict[str, np.ndarray]:
  """Settings × noise rates of one loss."""
  return grid(noise_rate=config.rates, **SETTINGS[config.loss])


def run_options(config: Config) -> dict[str, int]:
  """Length of one run."""
  every = config.problem.steps // config.evaluations
  return {"steps": config.problem.steps, "log_every": every, "eval_every": every}


def demo(options: DemoOptions) -> dict:
  """Runs the ablation; prints the table, writes record and figure, and says where they are."""
  from experiments.harness import registry

  config = registry.preset(_module(), options.preset)
  results = {}
  for name in LOSSES:
    one = dataclasses.replace(config, loss=name)
    results[name] = sweep(
      build(one),
      points(one),
      seeds=range(config.seeds),
      steps=config.problem.steps,
      eval_every=config.problem.steps // config.evaluations,
      engine=options.engine,
      label=f"{name:14}",
    )
  record = {
    "title": "Noisy-label ablation",
    "preset": options.preset,
    "protocol": " ".join(__doc__.split("\n\n")[1].split()),
    "config": dataclasses.asdict(config),
    "settings": SETTINGS,
    "wall_seconds": sum(result.seconds for result in results.values()),
    "compile_seconds": sum(result.compile_seconds for result in results.values()),
    "engines": {name: result.engine for name, result in results.items()},
    "rows": summarize(config, results),
    **records.environment(),
  }
  records.write(options.folder / "record.json", record)
  figure(record, options.folder / "figure.png")
  table = _table(record)
  (options.folder / "table.txt").write_text(_text(table), encoding="utf-8")
  Console().print(table)
  print(
    f"{sum(len(result.seeds) for result in results.values())} trials in {record['wall_seconds']:.0f} s"
    f" ({record['compile_seconds']:.0f} s compiling and choosing engines)"
  )
  for name in ("table.txt", "figure.png", "record.json"):
    print(f"{name.split('.')[0]:7} {options.folder / name}")
  return record


def summarize(config: Config, results) -> list[dict]:
  """One row per loss and rate: accuracies at the selected and the last epoch, and the paired difference."""
  chosen = {}
  for name, result in results.items():
    shape = (len(config.rates), -1, config.seeds, config.evaluations)
    test = result.metrics["test_accuracy"].reshape(shape)
    valid = np.where(np.isfinite(result.metrics["loss"]), result.metrics["noisy_valid_accuracy"], -1).reshape(shape)
    diverged = (result.diverged_at >= 0).reshape(shape[:3])
    for index, rate in enumerate(config.rates):
      # A setting is chosen once for all seeds, by its best mean validation accuracy over epochs; the epoch by seed.
      setting = int(valid[index].max(axis=-1).mean(axis=-1).argmax())
      epochs = valid[index, setting].argmax(axis=-1)
      chosen[name, rate] = {
        "setting": {key: float(values[setting]) for key, values in SETTINGS[name].items()},
        "selected": test[index, setting, np.arange(config.seeds), epochs],
        "last": test[index, setting, :, -1],
        "diverged": int(diverged[index].sum()),
      }
  rows = []
  for (name, rate), result in chosen.items():
    base = chosen["cross_entropy", rate]
    row = {"loss": name, "noise_rate": rate, "setting": result["setting"], "diverged_trials": result["diverged"]}
    for when in ("selected", "last"):
      row[when] = _mean_and_error(result[when])
      row[f"{when}_minus_cross_entropy"] = _mean_and_error(result[when] - base[when])
      row[f"{when}_per_seed"] = result[when].tolist()
    rows.append(row)
  return rows


def figure(record: dict, path: pathlib.Path) -> None:
  """Test accuracy against the noise rate, at the selected and the last epoch."""
  import matplotlib.pyplot as plt

  rates = sorted({row["noise_rate"] for row in record["rows"]})
  picture, axes = plt.subplots(1, 2, figsize=(9, 3.8), sharey=True, layout="constrained")
  for axis, when in zip(axes, ("selected", "last")):
    for name in LOSSES:
      rows = [row for row in record["rows"] if row["loss"] == name]
      means, errors = zip(*(row[when] for row in rows))
      axis.errorbar([row["noise_rate"] for row in rows], means, errors, marker="o", capsize=3, label=name)
    axis.set(title=f"{when} epoch", xlabel="noise rate", xticks=rates)
    axis.grid(alpha=0.3)
  axes[0].set_ylabel("clean test accuracy")
  axes[1].legend(frameon=False)
  path.parent.mkdir(parents=True, exist_ok=True)
  picture.savefig(path, dpi=120)
  plt.close(picture)


def _module():
  import sys

  return sys.modules[__name__]


def _mean_and_error(values: np.ndarray) -> tuple[float, float]:
  return float(values.mean()), float(values.std(ddof=1) / np.sqrt(len(values)))


def _table(record: dict) -> Table:
  table = Table(title="Clean test accuracy, mean ± standard error over seeds (difference to cross-entropy, paired)")
  for column in ("noise", "loss", "chosen setting", "selected epoch", "difference", "last epoch", "difference"):
    table.add_column(column)
  for row in sorted(record["rows"], key=lambda row: (row["noise_rate"], LOSSES.index(row["loss"]))):
    cell = lambda key, sign="", row=row: f"{row[key][0]:{sign}.3f} ± {row[key][1]:.3f}"
    same = row["loss"] == "cross_entropy"
    table.add_row(
      f"{row['noise_rate']:g}",
      row["loss"] + (f" ({row['diverged_trials']} diverged)" if row["diverged_trials"] else ""),
      ", ".join(f"{key} {value:g}" for key, value in row["setting"].items()),
      cell("selected"),
      "" if same else cell("selected_minus_cross_entropy", "+"),
      cell("last"),
      "" if same else cell("last_minus_cross_entropy", "+"),
      end_section=row["loss"] == LOSSES[-1],
    )
  return table


def _text(table: Table) -> str:
  import io

  console = Console(file=io.StringIO(), width=140)
  console.print(table)
  return console.file.getvalue()
