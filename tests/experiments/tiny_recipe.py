"""A recipe that trains in no time: linear regression, for the tests of the harness and as the smallest example."""

import dataclasses

import numpy as np

from experiments.harness import plots
from experiments.harness.claims import Claim
from experiments.harness.trials import Cell
from jaxreg.training import grid
from jaxreg.training.examples import least_squares

CARD = "00-tiny"


@dataclasses.dataclass(frozen=True)
class Config:
  """Linear regression.

  Attributes:
    features: number of inputs.
    steps: steps of gradient descent.
    rates: learning rates.
  """

  features: int = 4
  steps: int = 60
  rates: tuple[float, ...] = (0.001, 0.05)


PRESETS = {"smoke": Config(steps=20), "cpu": Config()}


def cell(config: Config) -> Cell:
  """All learning rates."""
  task = dataclasses.replace(least_squares(features=config.features), config=config)
  return Cell(task, config.steps, grid(learning_rate=config.rates), eval_every=config.steps // 2, engine="vmap")


def cells(config: Config, seeds) -> dict[str, Cell]:
  """The rates, and another run at the better one of them."""
  del seeds
  first = cell(config)

  def better(trials):
    mean = trials["rates"].last("distance").mean(1)
    return {"learning_rate": [trials["rates"].hparams["learning_rate"][mean.argmin()]]}

  return {"rates": first, "better rate": first._replace(points=better, keep_params=True)}


def measure(config: Config, seeds, trained) -> dict[str, np.ndarray]:
  """The norm of the weights."""
  del config
  weights = np.asarray(trained["better rate"].params["w"])
  return {"norm": np.linalg.norm(weights, axis=-1), "names": np.array(["é|\n"] * len(seeds))}


def summary(config: Config, trials) -> dict[str, np.ndarray]:
  """Distances from the truth at each rate."""
  rates = {f"rate {rate:g}": trials["rates"].at("distance", learning_rate=rate) for rate in config.rates}
  return {**rates, "norm": trials.measured["norm"]}


def claims(config: Config) -> tuple[Claim, ...]:
  """One that holds."""
  slow, fast = config.rates
  return (
    Claim(
      "faster",
      f"A learning rate of {fast:g} comes closer to the truth than {slow:g}",
      "distance from the truth at the last step, the slow rate minus the fast one",
      lambda m: (m[f"rate {slow:g}"] - m[f"rate {fast:g}"])[:, -1],
      at_least=0.0,
    ),
  )


def figure(config: Config, summary, path) -> None:
  """Distances over steps."""
  picture, axes = plots.panels(3)
  plots.bars(axes[0], {f"{rate:g}": summary[f"rate {rate:g}"][:, -1] for rate in config.rates})
  plots.curves(axes[1], [1, 2], {f"{rate:g}": summary[f"rate {rate:g}"] for rate in config.rates}, marker="o")
  plots.scatter(axes[2], {"runs": (summary["norm"], summary[f"rate {config.rates[1]:g}"][:, -1])})
  axes[1].set(xlabel="evaluation", ylabel="distance", title="linear regression")
  axes[1].legend()
  plots.save(picture, path)
