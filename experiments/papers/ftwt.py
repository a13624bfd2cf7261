"""Fire Together Wire Together: filters switched per image by heads that learn from the layer's own activations."""

import dataclasses
import functools
import math
import pathlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from scipy import stats

from experiments.harness import plots
from experiments.harness.claims import Claim
from experiments.harness.trials import Cell, Trials
from jaxreg.data import bundled
from jaxreg.layers.loop_conv import loop_conv_general_dilated
from jaxreg.pruning.dynamic_pruning import MaskedConv, mask_accuracy, mask_prediction_loss, mass_mask, uniform_mask
from jaxreg.pruning.pruned_flops import ConvCost, dense_flops, dynamic_flops
from jaxreg.training import Task, gradient_task, grid

CARD = "33-ftwt"
# Of the network: name -> stride, and the pixels of the output.
LAYERS = {"conv0": (1, 64), "conv1": (2, 16), "conv2": (1, 16)}
UNIFORM = tuple(float(ratio) for ratio in np.round(np.arange(0, 0.95, 0.1), 1))


@dataclasses.dataclass(frozen=True)
class Config:
  """A small convolutional network on digits, trained unpruned and then with dynamic pruning.

  Attributes:
    train: training images of digits.
    test: as many others, for testing.
    filters: of the convolutions.
    batch_size: examples per step.
    dense_steps: steps without masks.
    steps: steps with masks, of which the first half trains the heads on their targets too.
    long_steps: the same in a second, longer run at the main mass, reported beside the claims.
    masses: of the targets, increasing.
    mass: the one of them that most claims are about.
    mode: `decoupled` or `joint`.
  """

  train: int = 1297
  test: int = 500
  filters: tuple[int, int, int] = (16, 24, 24)
  batch_size: int = 64
  dense_steps: int = 400
  steps: int = 600
  long_steps: int = 2000
  masses: tuple[float, ...] = (0.7, 0.8, 0.9, 0.95)
  mass: float = 0.9
  mode: str = "decoupled"

  def __post_init__(self):
    if self.mass not in self.masses:
      raise ValueError(f"mass must be one of masses {self.masses}, got {self.mass}.")

  @property
  def eval_every(self) -> int:
    return math.gcd(self.dense_steps, self.steps)


PRESETS = {
  "smoke": Config(train=128, test=32, filters=(4, 8, 8), dense_steps=4, steps=4, long_steps=4, masses=(0.7, 0.9)),
  "cpu": Config(),
}


class Network(nn.Module):
  """Three masked convolutions, a max pool and a linear classifier."""

  filters: tuple[int, ...]
  mode: str

  @nn.compact
  def __call__(self, images: jax.Array, **options) -> jax.Array:
    hidden = images
    for filters, (name, (stride, _)) in zip(self.filters, LAYERS.items(), strict=True):
      fast = {"conv_general_dilated": loop_conv_general_dilated}
      hidden = MaskedConv(filters, strides=stride, mode=self.mode, name=name, **fast)(hidden, **options)
    hidden = nn.max_pool(hidden, (2, 2), strides=(2, 2))
    return nn.Dense(10, name="classifier")(hidden.reshape(len(hidden), -1))


def cell(config: Config) -> Cell:
  """The masses of the targets: without and with masks."""
  at = grid(mass=config.masses)
  return Cell(task(config), config.dense_steps + config.steps, at, eval_every=config.eval_every)


def task(config: Config) -> Task:
  """Dense training, then FTWT; the hyperparameter is the targets' `mass`."""
  train, test = bundled.split(bundled.digits(), sizes=(config.train, config.test))
  model = Network(config.filters, config.mode)
  costs = layer_costs(config)

  def apply(params, extra, images, mutable=(), **options):
    return model.apply({"params": params, "batch_stats": extra["batch_stats"]}, images, mutable=mutable, **options)

  def init_params(key, hparams):
    target = functools.partial(mass_mask, mass=hparams["mass"])
    variables = model.init(key, jnp.asarray(train["x"][:1]), target=target, train=False)
    return variables["params"], {"batch_stats": variables["batch_stats"]}

  def objective(params, extra, batch, context):
    target = functools.partial(mass_mask, mass=context.hparams["mass"])

    def losses(masks):
      options = dict(target=target, train=True, masks=masks, mutable=["batch_stats", "pruning"])
      logits, new = apply(params, extra, batch["x"], **options)
      task_loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"]).mean()
      mask_loss = mask_prediction_loss(*records(new["pruning"], "logits", "targets")).mean()
      return task_loss, mask_loss, new["batch_stats"]

    dense = context.step < config.dense_steps
    weight = (~dense) & (context.step < config.dense_steps + config.steps // 2)
    task_loss, mask_loss, batch_stats = jax.lax.cond(dense, lambda: losses("none"), lambda: losses("head"))
    metrics = {"task_loss": task_loss, "mask_loss": mask_loss}
    return task_loss + weight * mask_loss, ({"batch_stats": batch_stats}, metrics)

  def optimizer(hparams):
    del hparams
    rate = optax.join_schedules(
      [optax.cosine_decay_schedule(0.1, config.dense_steps), optax.constant_schedule(0.02)], [config.dense_steps]
    )
    backbone = optax.chain(optax.add_decayed_weights(5e-4), optax.sgd(rate, momentum=0.9))
    # Without masks the heads have no gradient, and Adam leaves them where they are.
    return optax.multi_transform({"backbone": backbone, "head": optax.adam(0.03)}, _kinds)

  def measured(params, extra, target, masks):
    logits, new = apply(params, extra, test["x"], ["pruning"], target=target, train=False, masks=masks)
    (active,) = records(new["pruning"], "mask")
    spent = jnp.mean(dynamic_flops([jnp.sum(mask, axis=-1) for mask in active], costs)) / dense_flops(costs)
    return jnp.mean(logits.argmax(-1) == test["y"]), spent, new["pruning"]

  def evaluate(params, extra, hparams):
    target = functools.partial(mass_mask, mass=hparams["mass"])
    accuracy, spent, new = measured(params, extra, target, "head")
    oracle_accuracy, oracle_spent, _ = measured(params, extra, target, "target")
    logits, targets = records(new, "logits", "targets")
    rates = [jnp.mean(layer, axis=0) for layer in targets]
    constant = jnp.mean(jnp.stack([jnp.mean(jnp.maximum(rate, 1 - rate)) for rate in rates]))
    at = lambda ratio: measured(params, extra, functools.partial(uniform_mask, prune_ratio=ratio), "target")[:2]
    uniform_accuracy, uniform_spent = jax.lax.map(at, jnp.asarray(UNIFORM))
    return {
      "dense_accuracy": measured(params, extra, target, "none")[0],
      "accuracy": accuracy,
      "spent": spent,
      "oracle_accuracy": oracle_accuracy,
      "oracle_spent": oracle_spent,
      "mask_accuracy": jnp.mean(mask_accuracy(logits, targets)),
      "constant_mask_accuracy": constant,
      **{f"uniform_accuracy_{index}": uniform_accuracy[index] for index in range(len(UNIFORM))},
      **{f"uniform_spent_{index}": uniform_spent[index] for index in range(len(UNIFORM))},
    }

  def predict(params, extra, inputs):
    # The targets, which inference does not need, are not computed: nothing reads them.
    return apply(params, extra, inputs, target=functools.partial(mass_mask, mass=config.mass), train=False)[0]

  return gradient_task(
    init_params,
    objective,
    optimizer,
    data=train,
    batch_size=config.batch_size,
    hparams={"mass": config.mass},
    evaluate=evaluate,
    predict=predict,
    config=config,
  )


def layer_costs(config: Config) -> list[ConvCost]:
  """The sizes of the convolutions."""
  inputs = (1, *config.filters)
  return [ConvCost(*sizes, 9, pixels) for *sizes, (_, pixels) in zip(inputs, config.filters, LAYERS.values())]


def records(pruning, *names: str) -> list[list[jax.Array]]:
  """What the layers sowed under each name, in the order of the layers."""
  return [[pruning[layer][name] for layer in LAYERS] for name in names]


def _kinds(params):
  return jax.tree_util.tree_map_with_path(
    lambda path, _: "head" if any(getattr(step, "key", None) == "head" for step in path) else "backbone", params
  )


def cells(config: Config, seeds) -> dict[str, Cell]:
  """All masses; the main one for longer, unless the steps are the same."""
  del seeds
  trained = {"masses": cell(config)}
  if config.long_steps != config.steps:
    longer = cell(dataclasses.replace(config, steps=config.long_steps))
    trained["longer"] = longer._replace(points=grid(mass=[config.mass]))
  return trained


def summary(config: Config, trials: Trials) -> dict[str, np.ndarray]:
  """Accuracies and fractions of multiplications `[seeds, masses]`, before (`start`) and after the masks' training."""
  table = trials["masses"]
  before = config.dense_steps // config.eval_every - 1
  start = lambda name: table.metrics[name][:, :, before].T
  found = {f"start {name}": start(name) for name in ("dense_accuracy", "oracle_accuracy", "oracle_spent")}
  for name in ("accuracy", "spent", "oracle_spent", "mask_accuracy", "constant_mask_accuracy"):
    found[name] = table.last(name).T
  for name in ("uniform_accuracy", "uniform_spent"):
    found[f"start {name}"] = np.stack([start(f"{name}_{index}")[:, 0] for index in range(len(UNIFORM))], axis=1)
  longer = trials.cells.get("longer", table)
  for name in ("accuracy", "spent", "oracle_spent", "mask_accuracy"):
    found[f"long {name}"] = longer.at(name, mass=config.mass)[:, -1]
  return found


def rank_correlation(masses, spent: np.ndarray) -> np.ndarray:
  """Spearman's correlation of the masses with the multiplications `[seeds, masses]`, `[seeds]`."""
  return np.array([stats.spearmanr(masses, row).statistic for row in spent])


def uniform_at(m) -> np.ndarray:
  """The accuracy of uniform oracle masks at the multiplications of the oracle masks by mass, `[seeds, masses]`."""
  rows = zip(m["start oracle_spent"], m["start uniform_spent"], m["start uniform_accuracy"])
  return np.stack([np.interp(at, spent[::-1], accuracy[::-1]) for at, spent, accuracy in rows])


def claims(config: Config) -> tuple[Claim, ...]:
  """Accuracy at fewer multiplications, because heads predict masks; and what the mass does."""
  main = lambda m, name: m[name][:, config.masses.index(config.mass)]
  setting = f"after {config.steps} FTWT steps with masks from the heads, mass {config.mass:g}, digits"
  return (
    Claim(
      "accuracy",
      "A network whose filters are switched per image stays as accurate as the unpruned one",
      f"test accuracy of the unpruned network minus that {setting}",
      lambda m: main(m, "start dense_accuracy") - main(m, "accuracy"),
      at_most=0.015,
    ),
    Claim(
      "cheaper",
      "A network whose filters are switched per image needs fewer multiplications than the unpruned one",
      f"mean multiplications of the convolutions per test image relative to all, {setting}",
      lambda m: main(m, "spent"),
      at_most=0.9,
    ),
    Claim(
      "predicts",
      "The heads predict from a layer's input which of its filters an image will excite",
      f"mask accuracy minus that of the best constant mask of each filter, {setting}",
      lambda m: main(m, "mask_accuracy") - main(m, "constant_mask_accuracy"),
      at_least=0.03,
    ),
    Claim(
      "budget",
      "The mass of the targets sets the budget of multiplications, and it is known before the heads are trained",
      f"Spearman's correlation of the masses {', '.join(f'{mass:g}' for mass in config.masses)} with the oracle's"
      " fractions of multiplications before training and with the heads' after it, the lesser of both",
      lambda m: np.minimum(*(rank_correlation(config.masses, m[name]) for name in ("start oracle_spent", "spent"))),
      at_least=1.0,
    ),
    Claim(
      "mass",
      "Filters are better chosen by mass than in equal numbers per layer",
      "test accuracy of the unpruned network under oracle masks by mass minus that by number at equal multiplications,"
      " mean over the masses, digits",
      lambda m: np.mean(m["start oracle_accuracy"] - uniform_at(m), axis=1),
      at_least=0.0,
    ),
  )


DEVIATIONS = (
  "Multiplications are counted, not saved: training and this evaluation compute all filters and multiply by masks."
  " What a gathered computation saves in time is in the benchmark `ftwt`. Heads and classifier are not counted.",
)


def notes(config: Config) -> tuple[str, ...]:
  """What is reported besides, and what the data leave to gain."""
  return (
    f"Reported, not gated: after {config.long_steps:,} instead of {config.steps} steps the fraction of multiplications,"
    " beside the oracle's (figure).",
    "On digits the masks of a layer depend little on the image: the best constant mask is right for about 85 % of the"
    " filters at the mass 0.9, which leaves the heads little to gain.",
  )


def figure(config: Config, summary: dict[str, np.ndarray], path: pathlib.Path) -> None:
  """Accuracy against multiplications, the budget curve, and the accuracy of the masks."""
  picture, (left, middle, right) = plots.panels(3)
  for name, label, style in (
    ("start uniform", "by number, oracle, no training", "C2v--"),
    ("start oracle", "by mass, oracle, no training", "C0s--"),
    ("", "FTWT, heads", "C3o-"),
  ):
    spent, accuracy = (summary[f"{name}_{what}".removeprefix("_")].mean(0) for what in ("spent", "accuracy"))
    left.plot(spent, accuracy, style, label=label)
  plots.scatter(left, {"FTWT, longer": (summary["long spent"], summary["long accuracy"])}, marker="*", color="C1")
  left.axhline(summary["start dense_accuracy"].mean(), color="k", linestyle=":", label="unpruned")
  low = min(summary["start oracle_accuracy"].min(), summary["accuracy"].min())
  left.set(xlabel="fraction of multiplications", ylabel="test accuracy", title="digits, means")
  left.set_ylim(max(low - 0.05, 0), 1.005)
  budgets = {
    "oracle, before training": summary["start oracle_spent"],
    "oracle, after training": summary["oracle_spent"],
    "heads, after training": summary["spent"],
  }
  masks = {"heads": summary["mask_accuracy"], "best constant mask": summary["constant_mask_accuracy"]}
  plots.curves(middle, config.masses, budgets, marker="o")
  plots.curves(right, config.masses, masks, marker="o")
  middle.set(xlabel="mass", ylabel="fraction of multiplications", title="the budget")
  right.set(xlabel="mass", ylabel="fraction of filters predicted right", title="masks on test images")
  for axis, name in ((middle, "long spent"), (right, "long mask_accuracy")):
    plots.scatter(axis, {"heads, longer": (np.full_like(summary[name], config.mass), summary[name])}, marker="*")
  for axis in (left, middle, right):
    axis.legend(frameon=False, fontsize=8)
  plots.save(picture, path)
