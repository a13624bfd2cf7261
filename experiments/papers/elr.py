"""ELR: early-learning regularization keeps a network from memorising wrong labels."""

import dataclasses
import pathlib

import numpy as np

from experiments.harness.claims import Claim
from experiments.problems.noisy_classification import Problem, elr_plus_task, noisy_task
from jaxreg.training import Task, grid, sweep

CARD = "12-elr"
METHODS = {"elr": lambda problem: noisy_task(problem, "elr"), "elr_plus": elr_plus_task}
MNIST = Problem(dataset="mnist_subset", train=4000, test=1000, hidden=(128,), batch_size=100, epochs=60)


@dataclasses.dataclass(frozen=True)
class Config:
  """The comparison.

  Attributes:
    method: `elr`, or `elr_plus` with two networks, averaged weights and mixup; what `run` and `sweep` train.
    problem: data, model and optimizer.
    rates: noise rates of the claims.
    weight: ELR's weight; 0 is cross-entropy with the table of predictions that ELR would use.
    momentum: ELR's moving average.
  """

  method: str = "elr"
  problem: Problem = MNIST
  rates: tuple[float, ...] = (0.4, 0.6)
  weight: float = 3.0
  momentum: float = 0.7

  def __post_init__(self):
    if self.method not in METHODS:
      raise ValueError(f"method must be one of {', '.join(METHODS)}, got {self.method!r}.")


PRESETS = {
  "smoke": Config(problem=dataclasses.replace(MNIST, dataset="digits", train=500, hidden=(32,), epochs=3)),
  "cpu": Config(),
}


def build(config: Config) -> Task:
  """The task with ELR or ELR+."""
  task = METHODS[config.method](dataclasses.replace(config.problem, measure_training=True))
  return task.replace(hparams={**task.hparams, "weight": config.weight, "momentum": config.momentum})


def points(config: Config) -> dict[str, np.ndarray]:
  """Noise rates × weights."""
  return grid(noise_rate=config.rates, weight=[0.0, 1.0, config.weight, 7.0])


def run_options(config: Config) -> dict[str, int]:
  """Length of one run, evaluated every epoch."""
  every = config.problem.steps_per_epoch
  return {"steps": config.problem.steps, "log_every": every, "eval_every": every}


def measure(config: Config, seeds: list[int]) -> dict[str, np.ndarray]:
  """Of CE, ELR and ELR+ at each rate: curves `[seeds, epochs]` of accuracy, memorisation, correct targets."""
  result = sweep(
    build(config), grid(noise_rate=config.rates, weight=[0.0, config.weight]), seeds=seeds,
    steps=config.problem.steps, eval_every=config.problem.steps_per_epoch, label="elr",
  )  # fmt: skip
  plus = sweep(
    build(dataclasses.replace(config, method="elr_plus")), grid(noise_rate=config.rates, weight=[config.weight]),
    seeds=seeds, steps=config.problem.steps, eval_every=config.problem.steps_per_epoch, label="elr+",
  )  # fmt: skip
  measured = {
    f"ELR+ {rate:g} {metric}": plus.by_point(metric)[index]
    for index, rate in enumerate(config.rates)
    for metric in ("test_accuracy", "wrong_memorised", "targets_correct")
  }
  for index, (rate, name) in enumerate((rate, name) for rate in config.rates for name in ("CE", "ELR")):
    for metric in ("test_accuracy", "wrong_memorised", "targets_correct"):
      measured[f"{name} {rate:g} {metric}"] = result.by_point(metric)[index]
  return measured


def _gain(rate: float) -> Claim:
  return Claim(
    f"gain_{rate:g}",
    f"ELR generalises better than cross-entropy at noise {rate:g}",
    "clean test accuracy at the last epoch, ELR less cross-entropy, MNIST subset",
    lambda m: (m[f"ELR {rate:g} test_accuracy"] - m[f"CE {rate:g} test_accuracy"])[:, -1],
    at_least=0.07,
  )


def _forgets(rate: float) -> Claim:
  return Claim(
    f"memorised_{rate:g}",
    f"ELR memorises far fewer wrong labels at noise {rate:g}",
    "share of wrong training labels that are predicted at the last epoch, ELR less cross-entropy",
    lambda m: (m[f"ELR {rate:g} wrong_memorised"] - m[f"CE {rate:g} wrong_memorised"])[:, -1],
    at_most=-0.3,
  )


CLAIMS = (
  _gain(0.4),
  _gain(0.6),
  _forgets(0.4),
  _forgets(0.6),
  Claim(
    "targets",
    "ELR's targets correct labels",
    "share of training examples whose largest target is the clean label, noise 0.4",
    lambda m: m["ELR 0.4 targets_correct"][:, -1],
    at_least=0.78,
  ),
  Claim(
    "targets_gain",
    "and more than cross-entropy's own predictions would",
    "the same share, ELR less a run with weight 0",
    lambda m: (m["ELR 0.4 targets_correct"] - m["CE 0.4 targets_correct"])[:, -1],
    at_least=0.1,
  ),
  Claim(
    "early_peak",
    "cross-entropy learns the clean pattern early",
    "epoch of its best test accuracy, noise 0.4",
    lambda m: m["CE 0.4 test_accuracy"].argmax(1) + 1.0,
    at_most=10,
  ),
  Claim(
    "early_loss",
    "and then loses it",
    "its best less its last test accuracy, noise 0.4",
    lambda m: m["CE 0.4 test_accuracy"].max(1) - m["CE 0.4 test_accuracy"][:, -1],
    at_least=0.1,
  ),
)


NOTES = (
  "ELR+ (two networks, averaged weights, mixup, 40,000-step ramp of the average as published) is shown in the figure;"
  " the card states no claim for it at this scale.",
)


def figure(measurements: dict[str, np.ndarray], path: pathlib.Path) -> None:
  """Curves over epochs: test accuracy and memorised wrong labels, mean and range over seeds."""
  import matplotlib.pyplot as plt

  rates = sorted({name.split()[1] for name in measurements})
  picture, axes = plt.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
  titles = {
    "test_accuracy": "clean test accuracy",
    "wrong_memorised": "wrong labels memorised",
    "targets_correct": "targets agree with clean label",
  }
  for axis, (metric, title) in zip(axes, titles.items()):
    for color, name in (("C0", "CE"), ("C1", "ELR"), ("C2", "ELR+")):
      for style, rate in zip(("-", "--", ":"), rates):
        curves = measurements[f"{name} {rate} {metric}"]
        epochs = np.arange(1, curves.shape[1] + 1)
        axis.plot(epochs, curves.mean(0), style, color=color, label=f"{name}, noise {rate}")
        axis.fill_between(epochs, curves.min(0), curves.max(0), color=color, alpha=0.15, linewidth=0)
    axis.set(title=title, xlabel="epoch", ylim=(0, 1))
    axis.grid(alpha=0.3)
  axes[1].legend(frameon=False, fontsize=8)
  picture.savefig(path, dpi=120)
  plt.close(picture)
