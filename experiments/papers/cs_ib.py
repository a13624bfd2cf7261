"""Cauchy-Schwarz information bottleneck: regression that ignores wrong targets, from a compressed representation.

Friedman's function of ten inputs, with a tenth of the training targets far off, and with all of them right.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Mapping
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.harness import plots
from experiments.harness.claims import Claim
from experiments.harness.selection import select
from experiments.harness.trials import Cell, Trials
from jaxreg.adversarial import fgsm
from jaxreg.losses import conditional_cs_divergence, cs_mutual_information, normalized_cs_mutual_information
from jaxreg.metrics import compression_ratio, gaussian_information
from jaxreg.models import MLP
from jaxreg.training import Task, gradient_task, grid

CARD = "38-cs_ib"
FEATURES = 10
HPARAMS = {
  "method": 0,
  "weight_decay": 0.0,
  "delta": 1.0,
  "target_bandwidth": 1.0,
  "input_bandwidth": 1.0,
  "compression": 0.0,
}


class Method(NamedTuple):
  """A loss of a batch `(predictions, targets, inputs, hparams) -> scalar`, and what is tuned of it."""

  title: str
  loss: Callable
  points: Mapping[str, list]


def _mean_of(loss: Callable) -> Callable:
  return lambda predictions, targets, inputs, hparams: jnp.mean(loss(predictions - targets, hparams))


def _correntropy(predictions, targets, inputs, hparams):
  """The limit of the conditional divergence for narrow kernels of the inputs."""
  del inputs
  exponents = -(((predictions - targets) / hparams["target_bandwidth"]) ** 2) / 2
  return -2 * (jax.nn.logsumexp(exponents) - jnp.log(len(targets)))


def _cauchy_schwarz(predictions, targets, inputs, hparams):
  widths = {name: hparams[name] for name in ("input_bandwidth", "target_bandwidth")}
  return conditional_cs_divergence(predictions, targets, inputs, **widths)


# Each has nine settings; those of the card are squared error's first and the divergence's with bandwidth 1.
DECAYS = [0.0, 0.03, 0.1, 0.3, 1.0, 3.0, 5.0, 10.0, 20.0]
FEW_DECAYS = [0.0, 3.0, 6.0]
METHODS = {
  "squared": Method("squared error", _mean_of(lambda r, h: r**2), grid(weight_decay=DECAYS)),
  "absolute": Method("absolute error", _mean_of(lambda r, h: jnp.abs(r)), grid(weight_decay=DECAYS)),
  "huber": Method(
    "Huber",
    _mean_of(lambda r, h: optax.losses.huber_loss(r, delta=h["delta"])),
    grid(delta=[0.5, 0.2, 0.05], weight_decay=[3.0, 6.0, 10.0]),
  ),
  "correntropy": Method("correntropy", _correntropy, grid(target_bandwidth=[2.0, 1.0, 0.5], weight_decay=FEW_DECAYS)),
  "cauchy_schwarz": Method(
    "Cauchy-Schwarz", _cauchy_schwarz, grid(target_bandwidth=[2.0, 1.0, 0.5], weight_decay=FEW_DECAYS)
  ),
}
NUMBER = {loss: number for number, loss in enumerate(METHODS)}
PLAIN = {
  "squared": {"weight_decay": 0.0},
  "cauchy_schwarz": {"target_bandwidth": 1.0, "weight_decay": 0.0},
}
COMPRESSED = ("squared", "cauchy_schwarz")  # what is trained with the compression term


@dataclasses.dataclass(frozen=True)
class Config:
  """The comparison.

  Attributes:
    loss: what `run` and `sweep` train, one of `METHODS`.
    train: examples with wrong targets among them.
    clean_train: examples of the bottleneck, all of them right.
    valid, test: examples; the validation targets are as wrong as the training targets, the test targets are right.
    wrong: fraction of wrong targets.
    shifts: wrong targets are off by so many standard deviations, up or down, uniformly between the two.
    encoder, decoder: widths of the layers, the representation's and the output's last.
    batch_size: examples per step.
    learning_rate: of Adam.
    steps: of training.
    evaluations: of a run, evenly spread.
    weights: of the compression term, ascending from 0.
    weight: the one that the claims are about.
    radii: of the attacks, in standard deviations of the inputs.
  """

  loss: str = "cauchy_schwarz"
  train: int = 600
  clean_train: int = 300
  valid: int = 400
  test: int = 2000
  wrong: float = 0.1
  shifts: tuple[float, float] = (4.0, 8.0)
  encoder: tuple[int, ...] = (64, 64, 16)
  decoder: tuple[int, ...] = (64, 1)
  batch_size: int = 128
  learning_rate: float = 1e-3
  steps: int = 800
  evaluations: int = 16
  weights: tuple[float, ...] = (0.0, 1e-3, 1e-2, 0.03, 0.1, 0.5, 1.0)
  weight: float = 0.1
  radii: tuple[float, ...] = (0.1, 0.3)

  def __post_init__(self):
    if self.loss not in METHODS:
      raise ValueError(f"loss must be one of {', '.join(METHODS)}, got {self.loss!r}.")
    if self.weights[0] != 0 or self.weight not in self.weights:
      raise ValueError(f"weights must begin with 0 and hold {self.weight:g}, got {self.weights}.")


PRESETS = {
  "smoke": Config(
    train=64, clean_train=64, valid=40, test=100, encoder=(8, 4), decoder=(8, 1), batch_size=32, steps=8,
    evaluations=2, weights=(0.0, 0.1),
  ),
  "cpu": Config(),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Setting:
  """What is static about a task."""

  config: Config
  bottleneck: bool


class Network(nn.Module):
  """Predictions, and the representation that they are computed from."""

  encoder: tuple[int, ...]
  decoder: tuple[int, ...]

  @nn.compact
  def __call__(self, inputs):
    representation = MLP(self.encoder, name="encoder")(inputs)
    return MLP(self.decoder, name="decoder")(representation)[:, 0], representation


def data(config: Config, train: int) -> tuple[dict[str, np.ndarray], ...]:
  """Training, validation and test examples of Friedman's function with noise, in standard deviations."""
  rng = np.random.default_rng(0)
  parts = []
  for count in (train, config.valid, config.test):
    x = rng.uniform(size=(count, FEATURES))
    y = 10 * np.sin(np.pi * x[:, 0] * x[:, 1]) + 20 * (x[:, 2] - 0.5) ** 2 + 10 * x[:, 3] + 5 * x[:, 4]
    parts.append((x, y + rng.normal(size=count)))
  x, y = parts[0]
  units = [(values.mean(0), values.std(0)) for values in (x, y)]
  scaled = lambda values, unit: ((values - unit[0]) / unit[1]).astype(np.float32)
  return tuple({"x": scaled(x, units[0]), "y": scaled(y, units[1])} for x, y in parts)


def task(config: Config, *, bottleneck: bool) -> Task:
  """A network for the loss of number `method`: among wrong targets, or with the compression term and right targets.

  Wrong targets are drawn from the run's key: at one seed all losses see the same.
  """
  train, valid, test = data(config, config.clean_train if bottleneck else config.train)
  network = Network(config.encoder, config.decoder)
  forward = lambda params, inputs: network.apply({"params": params}, inputs)
  wrong = 0.0 if bottleneck else config.wrong

  def init_params(key, hparams):
    keys = jax.random.split(key, 3)
    params = network.init(keys[0], jnp.zeros((1, FEATURES)))["params"]
    return params, {
      "targets": shifted(keys[1], train["y"], wrong, config.shifts),
      "valid_targets": shifted(keys[2], valid["y"], wrong, config.shifts),
    }

  def objective(params, extra, batch, context):
    hparams, targets = context.hparams, extra["targets"][batch["id"]]
    predictions, representations = forward(params, batch["x"])
    losses = [method.loss for method in METHODS.values()]
    total = jax.lax.switch(hparams["method"], losses, predictions, targets, batch["x"], hparams)
    if bottleneck:
      total += hparams["compression"] * normalized_cs_mutual_information(representations, batch["x"], **_widths(config))
    return total, (extra, {})

  return gradient_task(
    init_params,
    objective,
    lambda hparams: optax.adamw(config.learning_rate, weight_decay=hparams["weight_decay"]),
    data={"x": train["x"]},
    batch_size=config.batch_size,
    hparams={**HPARAMS, "method": NUMBER[config.loss]},
    evaluate=functools.partial(_evaluate, config, forward, valid, test, bottleneck),
    predict=lambda params, extra, inputs: forward(params, inputs)[0],
    config=Setting(config, bottleneck),
  )


def shifted(key, targets, rate, shifts) -> jax.Array:
  """Targets, a fraction of which is off by a uniform distance in `shifts`, up or down."""
  keys = jax.random.split(key, 3)
  hit = jax.random.permutation(keys[0], len(targets)) < round(rate * len(targets))
  distance = jax.random.uniform(keys[1], targets.shape, minval=shifts[0], maxval=shifts[1])
  return targets + jnp.where(hit, distance * jax.random.rademacher(keys[2], targets.shape), 0)


def _widths(config: Config) -> dict[str, float]:
  """Bandwidths of the compression term: square roots of the dimensions."""
  return {"input_bandwidth": FEATURES**0.5, "representation_bandwidth": config.encoder[-1] ** 0.5}


def _evaluate(config, forward, valid, test, bottleneck, params, extra, hparams):
  del hparams
  root_mean_square = lambda inputs: jnp.sqrt(jnp.mean((forward(params, inputs)[0] - test["y"]) ** 2))
  residuals = forward(params, valid["x"])[0] - extra["valid_targets"]
  inputs = jnp.asarray(test["x"])
  metrics = {"valid_error": jnp.median(jnp.abs(residuals)), "test_error": root_mean_square(inputs)}
  if not bottleneck:
    return metrics
  predictions, representations = forward(params, inputs)
  squares = lambda x: (forward(params, x)[0] - test["y"]) ** 2
  for radius in config.radii:
    metrics[f"attacked {radius:g}"] = root_mean_square(fgsm(squares, inputs, radius=radius))
  return metrics | {
    "relevance": gaussian_information(predictions, jnp.asarray(test["y"])),
    "information": cs_mutual_information(representations, inputs, chunk_size=250, **_widths(config)),
  }


def points(loss: str) -> dict[str, list]:
  """All hyperparameters of a loss's settings."""
  tuned = METHODS[loss].points
  count = len(next(iter(tuned.values())))
  return {name: [value] * count for name, value in HPARAMS.items()} | {"method": [NUMBER[loss]] * count} | dict(tuned)


def cell(config: Config) -> Cell:
  """One loss among wrong targets, at all its settings."""
  every = config.steps // config.evaluations
  return Cell(task(config, bottleneck=False), config.steps, points(config.loss), eval_every=every)


def cells(config: Config, seeds) -> dict[str, Cell]:
  """Every loss among wrong targets; the bottleneck with every weight."""
  del seeds
  each = [points(loss) for loss in METHODS]
  joined = {name: [value for part in each for value in part[name]] for name in HPARAMS}
  at = grid(method=[NUMBER[loss] for loss in COMPRESSED], compression=list(config.weights))
  return {
    "wrong targets": cell(config)._replace(points=joined),
    "bottleneck": Cell(task(config, bottleneck=True), config.steps, at),
  }


def summary(config: Config, trials: Trials) -> dict[str, np.ndarray]:
  """Test errors at the end, when chosen, and over time; and what the bottleneck's weights did, `[seeds, weights]`."""
  found = {}
  cell = trials["wrong targets"]
  for loss, number in NUMBER.items():
    valid, test = (cell.metrics[name][cell.hparams["method"] == number] for name in ("valid_error", "test_error"))
    chosen = select(-valid)
    found[f"{loss} chosen"] = chosen.of(test)
    found[f"{loss} curve"] = test[chosen.setting]
  for loss, hparams in PLAIN.items():
    found[f"plain {loss}"] = cell.at("test_error", method=NUMBER[loss], **hparams)
  cell = trials["bottleneck"]
  for loss in COMPRESSED:
    for name in ("test_error", "relevance", "information", *(f"attacked {radius:g}" for radius in config.radii)):
      found[f"{loss} {name}"] = cell.last(name)[cell.hparams["method"] == NUMBER[loss]].T
    information = found[f"{loss} information"]
    ratios = compression_ratio(information, np.broadcast_to(information[:, :1], information.shape))
    found[f"{loss} compression"] = np.asarray(ratios)
  return found


def claims(config: Config) -> tuple[Claim, ...]:
  """Among wrong targets, with the card's settings and with tuned ones; and with the compression term."""
  data = f"Friedman's function, {config.train} training examples, {100 * config.wrong:g} % of their targets wrong"
  clean = f"Friedman's function, {config.clean_train} training examples"
  plain = f"test RMSE after {config.steps} steps, bandwidths 1, over that of squared error, both without weight decay"
  tuned = "of each nine settings and the epoch by the median error on validation data that are as wrong"
  at = config.weights.index(config.weight)

  def ratio(name, numerator, denominator, sentence, measured, at_most, amended=""):
    value = lambda s: numerator(s) / denominator(s)
    return Claim(name, sentence, measured, value, at_most=at_most, scale="log", amended=amended)

  wider = (
    "30 November 2026, after the first run (seeds 100 to 159): larger bandwidths, and for the Huber loss larger weight"
    " decay, in place of the smallest, for the best were at the ends of the grids; new seeds."
  )
  chosen = lambda loss: lambda s: s[f"{loss} chosen"]
  last, ours = lambda s: s["plain cauchy_schwarz"][:, -1], chosen("cauchy_schwarz")
  against = {
    "squared": ("squared error with tuned weight decay", 0.8),
    "huber": ("the Huber loss with tuned threshold and weight decay", 1.0),
    "absolute": ("absolute error with tuned weight decay", 1.0),
    "correntropy": (
      "the correntropy loss, its limit without kernels of the inputs, with tuned bandwidth and weight decay",
      1.0,
    ),
  }
  return (
    ratio(
      "wrong_targets", last, lambda s: s["plain squared"][:, -1],
      "Among far wrong targets the conditional divergence errs less than half as much as squared error",
      f"{plain}; {data}", 0.5,
    ),
    ratio(
      "early_stopping", last, lambda s: s["plain squared"].min(axis=1),
      "Nor does it help squared error to stop when its test error is smallest",
      f"{plain} at its best evaluation on the test set; {data}", 0.8,
    ),
    *(
      ratio(
        f"against_{loss}", ours, chosen(loss),
        f"Among far wrong targets the conditional divergence errs less than {title}",
        f"test RMSE over that of {METHODS[loss].title}, {tuned}; {data}", bound, wider,
      )
      for loss, (title, bound) in against.items()
    ),
    Claim(
      "compresses",
      "The compression term takes away two fifths of what the representation says of the inputs",
      f"compression ratio of the Cauchy-Schwarz mutual information, weight {config.weight:g} against 0; {clean}",
      lambda s: s["cauchy_schwarz compression"][:, at],
      at_least=0.4,
    ),
    ratio(
      "at_no_cost",
      lambda s: s["cauchy_schwarz test_error"][:, at], lambda s: s["cauchy_schwarz test_error"][:, 0],
      "Compression costs next to no accuracy",
      f"test RMSE, weight {config.weight:g} over 0; {clean}", 1.05,
    ),
  )  # fmt: skip


DEVIATIONS = (
  "Friedman's function in place of housing, air and image data, with the small network and the short training of the"
  " card's checks.",
  "Targets are columns, so that the estimator is the paper's; the official training script passes vectors, for which"
  " its function is squared error.",
  "The compression term has bandwidths of the square roots of the dimensions, where the official code takes 1 for all:"
  " in ten dimensions it would penalise the spread of the representation.",
)
NOTES = (
  "Sixty seeds, chosen from the spread of the first run's first ten, after which only the comparison with the"
  " correntropy loss was undecided.",
  "The correntropy loss takes time linear in the batch and does about as well: the kernel of the inputs, which is what"
  " the conditional divergence adds to it, makes next to no difference here.",
  "Weight decay is tuned for every loss: without it none of them is near its best, and they are far from one another.",
  "The compression term costs accuracy with squared error as the prediction term just as much. Normalised information"
  " also falls when the representation spreads: with a weight of 0.1 its information about itself was up to four times"
  " as large (eight pilots), and with small weights some runs end with more information about the inputs than without"
  " the term. The card's check saw no cost, in two seeds.",
  "Reported, not gated, in the table: test RMSE under the fast gradient attack. It grows with the weight of the"
  " compression, by as much as without an attack or more, against what the paper reports; the card's check saw no"
  " effect.",
  "The validation data hold wrong targets too, so that settings are chosen by the median absolute error.",
)


def table(config: Config, summary: dict[str, np.ndarray]) -> list[dict]:
  """What every weight of the compression term did, mean ± standard deviation over seeds."""

  def shown(name, index):
    values = summary[name][:, index]
    return f"{values.mean():.3f} ± {values.std(ddof=1) if len(values) > 1 else 0.0:.3f}"

  return [
    {
      "prediction term": METHODS[loss].title,
      "weight of compression": f"{weight:g}",
      "compression ratio": shown(f"{loss} compression", index),
      "test RMSE": shown(f"{loss} test_error", index),
      "bits about the target": shown(f"{loss} relevance", index),
      **{f"RMSE under attack of {radius:g}": shown(f"{loss} attacked {radius:g}", index) for radius in config.radii},
    }
    for loss in COMPRESSED
    for index, weight in enumerate(config.weights)
  ]


def figure(config: Config, summary: dict[str, np.ndarray], path: pathlib.Path) -> None:
  """Errors among wrong targets, chosen and over time; the information plane; errors under attack."""
  picture, (bars, curves, plane, attacks) = plots.panels(4)
  plots.bars(bars, {method.title.replace(" ", "\n"): summary[f"{loss} chosen"] for loss, method in METHODS.items()})
  bars.set(ylabel="test RMSE", title=f"{100 * config.wrong:g} % wrong targets, tuned", ylim=(0, None))
  steps = config.steps // config.evaluations * (1 + np.arange(summary["squared curve"].shape[1]))
  plots.curves(curves, steps, {"squared error, no weight decay": summary["plain squared"]}, color="k", linestyle=":")
  plots.curves(curves, steps, {method.title: summary[f"{loss} curve"] for loss, method in METHODS.items()})
  curves.set(xlabel="step", ylabel="test RMSE", title="at the chosen settings", yscale="log", ylim=(0.2, 6))
  curves.legend(frameon=False, fontsize=7, ncols=2, loc="upper center")
  for index, loss in enumerate(COMPRESSED):
    ratios, bits = summary[f"{loss} compression"], summary[f"{loss} relevance"]
    plots.scatter(plane, {METHODS[loss].title: (ratios.ravel(), bits.ravel())}, color=f"C{index}")
    plane.plot(ratios.mean(0), bits.mean(0), color=f"C{index}", linewidth=1)
    for number, radius in enumerate((0, *config.radii)):
      errors = summary[f"{loss} attacked {radius:g}" if radius else f"{loss} test_error"]
      style = ("-", "--", ":")[number % 3]
      label = f"{METHODS[loss].title}, attack {radius:g}" if radius else METHODS[loss].title
      plots.curves(attacks, range(len(config.weights)), {label: errors}, color=f"C{index}", linestyle=style)
  plane.set(xlabel="compression ratio of I(x; t)", ylabel="I(y; t) in bits", title="right targets, all weights")
  plane.legend(frameon=False, fontsize=8)
  attacks.set(xlabel="weight of the compression term", ylabel="test RMSE", title="right targets", ylim=(0, 2))
  attacks.set_xticks(range(len(config.weights)), [f"{weight:g}" for weight in config.weights])
  attacks.legend(frameon=False, fontsize=7, ncols=2, loc="upper center")
  plots.save(picture, path)
