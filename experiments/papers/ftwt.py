"""Fire Together Wire Together: filters switched per image by heads that learn from the layer's own activations."""

import dataclasses
import functools
import pathlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from scipy import stats

from experiments.harness.claims import Claim
from jaxreg.data import bundled
from jaxreg.layers.loop_conv import loop_conv_general_dilated
from jaxreg.pruning.dynamic_pruning import MaskedConv, mask_accuracy, mask_prediction_loss, mass_mask, uniform_mask
from jaxreg.pruning.pruned_flops import ConvCost, dense_flops, dynamic_flops
from jaxreg.training import Task, grid, sweep

CARD = "33-ftwt"
# Of the network: name -> stride, and the pixels of the output.
LAYERS = {"conv0": (1, 64), "conv1": (2, 16), "conv2": (1, 16)}
CLAIMED = 0.9  # the mass of the main claim
UNIFORM = tuple(float(ratio) for ratio in np.round(np.arange(0, 0.95, 0.1), 1))


@dataclasses.dataclass(frozen=True)
class Config:
  """A small convolutional network on digits, trained whole and then with dynamic pruning.

  Attributes:
    train: training images of digits.
    test: as many others, for testing.
    filters: of the convolutions.
    batch_size: examples per step.
    dense_steps: steps without masks.
    steps: steps with masks, of which the first half trains the heads on their targets too.
    long_steps: the same in a second, longer run at the main mass, reported beside the claims.
    masses: of the targets.
    mode: `decoupled` or `joint`.
  """

  train: int = 1297
  test: int = 500
  filters: tuple[int, int, int] = (16, 24, 24)
  batch_size: int = 64
  dense_steps: int = 400
  steps: int = 600
  long_steps: int = 2000
  masses: tuple[float, ...] = (0.7, 0.8, CLAIMED, 0.95)
  mode: str = "decoupled"


PRESETS = {
  "smoke": Config(train=128, test=32, filters=(4, 8, 8), dense_steps=4, steps=4, long_steps=4, masses=(0.7, CLAIMED)),
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


def build(config: Config) -> Task:
  """Dense training, then FTWT; the hyperparameter is the targets' `mass`."""
  train, test = bundled.split(bundled.digits(), sizes=(config.train, config.test))
  model = Network(config.filters, config.mode)
  costs = layer_costs(config)

  def apply(params, extra, images, mutable=(), **options):
    return model.apply({"params": params, "batch_stats": extra["batch_stats"]}, images, mutable=mutable, **options)

  def init_params(key, hparams):
    target = functools.partial(mass_mask, mass=hparams["mass"])
    variables = model.init(key, jnp.asarray(train["x"][:1]), target=target, train=False)
    return variables["params"], {"batch_stats": variables["batch_stats"], "step": jnp.int32(0)}

  def objective(params, extra, batch, key, hparams, axis_name):
    del key, axis_name
    target = functools.partial(mass_mask, mass=hparams["mass"])

    def losses(masks):
      options = dict(target=target, train=True, masks=masks, mutable=["batch_stats", "pruning"])
      logits, new = apply(params, extra, batch["x"], **options)
      task_loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"]).mean()
      mask_loss = mask_prediction_loss(*records(new["pruning"], "logits", "targets")).mean()
      return task_loss, mask_loss, new["batch_stats"]

    dense = extra["step"] < config.dense_steps
    weight = (~dense) & (extra["step"] < config.dense_steps + config.steps // 2)
    task_loss, mask_loss, batch_stats = jax.lax.cond(dense, lambda: losses("none"), lambda: losses("head"))
    extra = {"batch_stats": batch_stats, "step": extra["step"] + 1}
    return task_loss + weight * mask_loss, (extra, {"task_loss": task_loss, "mask_loss": mask_loss})

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
    share = jnp.mean(dynamic_flops([jnp.sum(mask, axis=-1) for mask in active], costs)) / dense_flops(costs)
    return jnp.mean(logits.argmax(-1) == test["y"]), share, new["pruning"]

  def evaluate(params, extra, hparams):
    target = functools.partial(mass_mask, mass=hparams["mass"])
    accuracy, share, new = measured(params, extra, target, "head")
    oracle_accuracy, oracle_share, _ = measured(params, extra, target, "target")
    logits, targets = records(new, "logits", "targets")
    rates = [jnp.mean(layer, axis=0) for layer in targets]
    constant = jnp.mean(jnp.stack([jnp.mean(jnp.maximum(rate, 1 - rate)) for rate in rates]))
    at = lambda ratio: measured(params, extra, functools.partial(uniform_mask, prune_ratio=ratio), "target")[:2]
    uniform_accuracy, uniform_share = jax.lax.map(at, jnp.asarray(UNIFORM))
    return {
      "dense_accuracy": measured(params, extra, target, "none")[0],
      "accuracy": accuracy,
      "share": share,
      "oracle_accuracy": oracle_accuracy,
      "oracle_share": oracle_share,
      "mask_accuracy": jnp.mean(mask_accuracy(logits, targets)),
      "constant_mask_accuracy": constant,
      **{f"uniform_accuracy_{index}": uniform_accuracy[index] for index in range(len(UNIFORM))},
      **{f"uniform_share_{index}": uniform_share[index] for index in range(len(UNIFORM))},
    }

  def predict(params, extra, inputs):
    # The targets, which inference does not need, are not computed: nothing reads them.
    return apply(params, extra, inputs, target=functools.partial(mass_mask, mass=CLAIMED), train=False)[0]

  return Task(
    init_params=init_params,
    objective=objective,
    optimizer=optimizer,
    data=train,
    batch_size=config.batch_size,
    hparams={"mass": CLAIMED},
    evaluate_params=evaluate,
    predict=predict,
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


def points(config: Config) -> dict[str, np.ndarray]:
  """The masses of the targets."""
  return grid(mass=config.masses)


def run_options(config: Config) -> dict[str, int]:
  """Length of one run: without and with masks."""
  every = int(np.gcd(config.dense_steps, config.steps))
  return {"steps": config.dense_steps + config.steps, "log_every": every, "eval_every": every}


def measure(config: Config, seeds: list[int]) -> dict[str, np.ndarray]:
  """Accuracies and shares of multiplications, `[seeds, masses]`, before (`start`) and after the training of masks."""
  measured = {"masses": np.tile(np.asarray(config.masses), (len(seeds), 1))}
  result, start = _sweep(config, config.masses, seeds, "masses")
  for name in ("dense_accuracy", "oracle_accuracy", "oracle_share"):
    measured[f"start {name}"] = result.by_point(name)[:, :, start].T
  for name in ("accuracy", "share", "oracle_share", "mask_accuracy", "constant_mask_accuracy"):
    measured[name] = result.by_point(name)[:, :, -1].T
  for name in ("uniform_accuracy", "uniform_share"):
    curve = [result.by_point(f"{name}_{index}")[0, :, start] for index in range(len(UNIFORM))]
    measured[f"start {name}"] = np.stack(curve, axis=1)
  claimed = config.masses.index(CLAIMED)
  if config.long_steps != config.steps:  # else the run above is it
    longer, claimed = dataclasses.replace(config, steps=config.long_steps), 0
    result, _ = _sweep(longer, (CLAIMED,), seeds, "longer")
  for name in ("accuracy", "share", "oracle_share", "mask_accuracy"):
    measured[f"long {name}"] = result.by_point(name)[claimed, :, -1]
  return measured


def _sweep(config: Config, masses, seeds: list[int], label: str):
  """The result, and the index of the evaluation at the end of dense training."""
  options = {key: value for key, value in run_options(config).items() if key != "log_every"}
  result = sweep(build(config), grid(mass=masses), seeds=seeds, label=label, **options)
  return result, config.dense_steps // options["eval_every"] - 1


def main_mass(m, name: str) -> np.ndarray:
  """A measurement at the main mass, `[seeds]`."""
  return m[name][:, np.argmin(np.abs(m["masses"][0] - CLAIMED))]


def rank_correlation(m, name: str) -> np.ndarray:
  """Spearman's correlation of a share with the mass, `[seeds]`."""
  return np.array([stats.spearmanr(masses, shares).statistic for masses, shares in zip(m["masses"], m[name])])


def uniform_at(m) -> np.ndarray:
  """The accuracy of uniform oracle masks at the multiplications of the oracle masks by mass, `[seeds, masses]`."""
  rows = zip(m["start oracle_share"], m["start uniform_share"], m["start uniform_accuracy"])
  return np.stack([np.interp(at, share[::-1], accuracy[::-1]) for at, share, accuracy in rows])


CLAIMS = (
  Claim(
    "accuracy",
    "a network whose filters are switched per image stays as accurate as the whole one",
    "test accuracy before less that after 600 FTWT steps with masks from the heads, mass 0.9, digits",
    lambda m: main_mass(m, "start dense_accuracy") - main_mass(m, "accuracy"),
    at_most=0.015,
  ),
  Claim(
    "cheaper",
    "at fewer multiplications",
    "mean multiplications of the convolutions per test image relative to all, the same runs",
    lambda m: main_mass(m, "share"),
    at_most=0.9,
  ),
  Claim(
    "predicts",
    "because the heads predict from its input which filters of a layer an image will excite",
    "mask accuracy less that of the best constant mask of each filter, the same runs",
    lambda m: main_mass(m, "mask_accuracy") - main_mass(m, "constant_mask_accuracy"),
    at_least=0.03,
  ),
  Claim(
    "budget",
    "the mass sets the budget, and it is known before training",
    "Spearman's correlation of the masses 0.7, 0.8, 0.9, 0.95 with the oracle's shares of multiplications before"
    " training and with the heads' after it, the lesser of both",
    lambda m: np.minimum(rank_correlation(m, "start oracle_share"), rank_correlation(m, "share")),
    at_least=1.0,
  ),
  Claim(
    "mass",
    "filters are better chosen by mass than in equal numbers",
    "accuracy of the dense network under oracle masks by mass less that by number at equal multiplications, mean over"
    " the masses",
    lambda m: np.mean(m["start oracle_accuracy"] - uniform_at(m), axis=1),
    at_least=0.0,
  ),
)
NOTES = (
  "Multiplications are counted, not saved: training and this evaluation compute all filters and multiply by masks."
  " What a gathered computation saves in time is in the benchmark `ftwt`. Heads and classifier are not counted.",
  "Reported, not gated: after 2,000 instead of 600 steps the share of multiplications, beside the oracle's (figure).",
  "On digits the masks of a layer depend little on the image: the best constant mask is right for about 85 % of the"
  " filters at the mass 0.9, which leaves the heads little to gain.",
)


def figure(measurements: dict[str, np.ndarray], path: pathlib.Path) -> None:
  """Accuracy against multiplications, the budget curve, and the accuracy of the masks."""
  import matplotlib.pyplot as plt

  m = measurements
  picture, (left, middle, right) = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
  left.plot(m["start uniform_share"].mean(0), m["start uniform_accuracy"].mean(0), "v--", color="C2", alpha=0.6)
  left.plot(m["start oracle_share"].mean(0), m["start oracle_accuracy"].mean(0), "s--", color="C0", alpha=0.6)
  left.plot(m["share"].mean(0), m["accuracy"].mean(0), "o-", color="C3")
  left.plot(m["long share"], m["long accuracy"], "*", color="C1")
  left.plot(m["share"], m["accuracy"], ".", color="C3", alpha=0.4, markersize=4)
  left.axhline(m["start dense_accuracy"].mean(), color="k", linestyle=":")
  left.set(xlabel="share of multiplications", ylabel="test accuracy", title="digits")
  low = min(m["start oracle_accuracy"].min(), m["accuracy"].min())
  left.set_ylim(max(low - 0.05, 0), 1.005)
  names = ["by number, oracle, no training", "by mass, oracle, no training", "FTWT, heads (points: seeds)"]
  left.legend([*names, "FTWT, longer"], frameon=False, fontsize=8)
  for name, label, style in (
    ("start oracle_share", "oracle, before training", "C0s--"),
    ("oracle_share", "oracle, after training", "C4d:"),
    ("share", "heads, after training", "C3o-"),
  ):
    middle.plot(m["masses"][0], m[name].mean(0), style, label=label)
    middle.plot(m["masses"][0], m[name].T, style[:2] + ".", alpha=0.4, markersize=3)
  middle.plot(np.full_like(m["long share"], CLAIMED), m["long share"], "C1*", label="heads, longer")
  middle.set(xlabel="mass", ylabel="share of multiplications", title="the budget")
  middle.legend(frameon=False, fontsize=8)
  for name, label, color in (
    ("mask_accuracy", "heads", "C3"),
    ("constant_mask_accuracy", "best constant mask", "k"),
  ):
    right.plot(m["masses"][0], m[name].mean(0), "o-", color=color, label=label)
    right.plot(m["masses"][0], m[name].T, ".", color=color, alpha=0.4, markersize=3)
  right.plot(np.full_like(m["long share"], CLAIMED), m["long mask_accuracy"], "C1*", label="heads, longer")
  right.set(xlabel="mass", ylabel="share of filters predicted right", title="masks on test images")
  right.legend(frameon=False, fontsize=8)
  picture.savefig(path, dpi=120)
  plt.close(picture)
