"""Comp-sum losses: one parameter from optimisable to noise-robust, bounds on the error, and adversarial training."""

import dataclasses
import functools
import pathlib
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from scipy import special

from experiments.harness import plots
from experiments.harness.claims import Claim
from experiments.harness.trials import Cell, Trials
from experiments.problems import cifar10
from experiments.problems.held_out import ONCE, mean_over
from jaxreg.adversarial import attack_battery, margin_objective, pgd
from jaxreg.data import bundled
from jaxreg.data.stream import tfds_stream
from jaxreg.losses import adversarial, comp_sum, h_consistency
from jaxreg.models.mlp import MLP
from jaxreg.models.resnet import WideResNet
from jaxreg.training import HeldOut, Task, gradient_task, grid

CARD = "03-comp_sum"


@dataclasses.dataclass(frozen=True)
class Mixture:
  """Classes as Gaussians of one width around means drawn from a standard normal.

  Attributes:
    classes: number of classes, equally likely.
    features: number of inputs.
    noise: standard deviation around the means.
    train, test: numbers of examples.
    hidden: width of the network's hidden layer.
    epochs: passes over the training set.
  """

  classes: int = 100
  features: int = 32
  noise: float = 0.6
  train: int = 10_000
  test: int = 4_000
  hidden: int = 128
  epochs: int = 15


@dataclasses.dataclass(frozen=True)
class Config:
  """Adversarial training on images, which `run` and `sweep` train, and what `verify` compares besides.

  Attributes:
    method: `standard`, `trades` or `adversarial_comp_sum`.
    model: `mlp` on the MNIST subset, or `wide_resnet` on CIFAR-10 from TFDS.
    train, test: numbers of images; a stream is tested on the whole test split.
    hidden: width of the MLP's hidden layer.
    depth, widen, width: size of the wide residual network.
    radius, step_size: of the attack in training, in l_inf, for pixels in [0, 1].
    attack_steps: steps of the attack in training.
    test_steps: steps of the attacks that measure.
    restarts: of the battery of attacks.
    tau: the member of the family in adversarial training.
    nu: weight of the margins' shift.
    weight: of the divergence in TRADES.
    nus, weights: from which each method's best is chosen, in the claims that say so; as many of both.
    learning_rate: at the start of the cosine schedule.
    weight_decay: coupled (L2), on all parameters.
    epochs: passes over the training set.
    batch_size: examples per step.
    taus: the members of the family in the comparisons.
    separated: the task with many classes, of which accuracy by tau is measured.
    overlapping: the task on which the bound is evaluated with the true label distribution.
    data_dir: TFDS's folder; None for its own default.
  """

  method: str = "adversarial_comp_sum"
  model: str = "mlp"
  train: int = 4000
  test: int = 1000
  hidden: int = 128
  depth: int = 28
  widen: int = 10
  width: int = 16
  radius: float = 0.06
  step_size: float = 0.02
  attack_steps: int = 5
  test_steps: int = 40
  restarts: int = 2
  tau: float = 0.4
  nu: float = 0.5
  weight: float = 6.0
  nus: tuple[float, ...] = (0.125, 0.25, 0.5, 1.0)
  weights: tuple[float, ...] = (1.0, 2.0, 4.0, 6.0)
  learning_rate: float = 0.05
  weight_decay: float = 0.0
  epochs: int = 8
  batch_size: int = 128
  taus: tuple[float, ...] = (0.0, 0.5, 1.0, 1.5, 2.0)
  separated: Mixture = Mixture()
  overlapping: Mixture = Mixture(classes=10, features=8, noise=1.0)
  data_dir: str | None = None

  def __post_init__(self):
    if self.method not in METHODS:
      raise ValueError(f"method must be one of {', '.join(METHODS)}, got {self.method!r}.")
    if self.model not in ("mlp", "wide_resnet"):
      raise ValueError(f"model must be mlp or wide_resnet, got {self.model!r}.")
    if not 1 <= self.batch_size <= self.train:
      raise ValueError(f"batch_size must be in [1, {self.train}], got {self.batch_size}.")

  @property
  def steps(self) -> int:
    return self.epochs * (self.train // self.batch_size)


class Method(NamedTuple):
  """A way to train: what the attack maximises (None: no attack), and what is minimised.

  Attributes:
    attacked: `(logits, adversarial_logits, labels) -> [batch]`, or None.
    loss: `(logits, adversarial_logits, labels, hparams) -> [batch]`.
  """

  attacked: Callable | None
  loss: Callable


def _divergence(logits, adversarial_logits, labels):
  del labels
  attacked, clean = jax.nn.log_softmax(adversarial_logits), jax.nn.log_softmax(logits)
  return optax.losses.kl_divergence_with_log_targets(attacked, clean)


METHODS = {
  "standard": Method(None, lambda z, _, y, h: optax.softmax_cross_entropy_with_integer_labels(z, y)),
  "trades": Method(_divergence, lambda z, moved, y, h: adversarial.trades_loss(z, moved, y, weight=h["weight"])),
  "adversarial_comp_sum": Method(
    adversarial.margin_shift_norm,
    lambda z, moved, y, h: adversarial.smooth_adversarial_comp_sum_loss(
      z, moved, y, tau=h["tau"], rho=h["rho"], nu=h["nu"]
    ),
  ),
}

_SMALL = Mixture(classes=8, features=8, train=512, test=256, hidden=16, epochs=1)
PRESETS = {
  "smoke": Config(
    train=512, test=128, hidden=16, test_steps=5, restarts=1, epochs=2, separated=_SMALL, overlapping=_SMALL
  ),
  "cpu": Config(),
  "paper": Config(
    model="wide_resnet",
    train=50_000,
    radius=8 / 255,
    step_size=2 / 255,
    attack_steps=10,
    test_steps=10,
    nu=1.0,
    learning_rate=0.1,
    weight_decay=1e-4,
    epochs=200,
    batch_size=1024,
  ),
}


def cell(config: Config) -> Cell:
  """Members of the family × weights of the margins' shift, or the radii of the attack for the other methods."""
  epoch, half = config.steps // config.epochs, max(config.epochs // 2, 1)
  if config.method == "adversarial_comp_sum":
    at = grid(tau=[0.0, config.tau, 1.0], nu=[config.nu / 2, config.nu])
  else:
    at = grid(radius=[config.radius / 2, config.radius])
  steps = config.epochs // half * half * epoch
  return Cell(task(config), steps, at, eval_every=half * epoch, log_every=epoch)


def task(config: Config) -> Task:
  """Training against the attack; hyperparameters are those of the attack, of the losses and `learning_rate`."""
  return _mnist_task(config) if config.model == "mlp" else _cifar_task(config)


def _hparams(config: Config) -> dict[str, float]:
  names = ("learning_rate", "radius", "step_size", "tau", "nu", "weight")
  return {**{name: getattr(config, name) for name in names}, "rho": 1.0}


def _robust_losses(config: Config, forward: Callable, extra, inputs, labels, context):
  """The method's loss of each example, with `forward(extra, inputs, train) -> (logits, extra)`; and the new extra.

  The attack sees the network as it is when it predicts; the loss is of the network as it is when it trains.
  """
  method, hparams = METHODS[config.method], context.hparams
  logits, new = forward(extra, inputs, True)
  if method.attacked is None:
    return method.loss(logits, None, labels, hparams), new
  clean = jax.lax.stop_gradient(forward(extra, inputs, False)[0])
  found = pgd(
    lambda x: method.attacked(clean, forward(extra, x, False)[0], labels),
    inputs,
    context.key,
    radius=hparams["radius"],
    step_size=hparams["step_size"],
    steps=config.attack_steps,
    bounds=(0.0, 1.0),
    start_radius=1e-3,  # neither objective has a gradient at the inputs themselves
  )
  attacked, new = forward(new, found, True)
  return method.loss(logits, attacked, labels, hparams), new


def _strongest(config: Config, logits_of: Callable, inputs, labels, radius):
  """Inputs that an attack on the margin finds from a random start, with steps that add up to 2.5 radii."""
  options = {"step_size": 2.5 * radius / config.test_steps, "steps": config.test_steps, "bounds": (0.0, 1.0)}
  against_margin = lambda x: margin_objective(logits_of(x), labels)
  return pgd(against_margin, jnp.asarray(inputs), jax.random.key(0), radius=radius, **options)


def _sgd(hparams, steps: int, weight_decay: float = 0.0) -> optax.GradientTransformation:
  schedule = optax.cosine_decay_schedule(1.0, steps)
  return optax.chain(
    optax.clip_by_global_norm(5.0),  # the gradients of tau < 1 have no bound
    optax.add_decayed_weights(weight_decay),
    optax.trace(0.9, nesterov=True),
    optax.scale_by_schedule(lambda step: -hparams["learning_rate"] * schedule(step)),
  )


def _mnist_task(config: Config) -> Task:
  train, test = bundled.split(_mnist(), sizes=(config.train, config.test))
  model = MLP((config.hidden, 10))

  def predict(params, extra, inputs):
    del extra
    return model.apply({"params": params}, inputs)

  def objective(params, extra, batch, context):
    forward = lambda extra, inputs, train: (predict(params, extra, inputs), extra)
    values, extra = _robust_losses(config, forward, extra, batch["x"], batch["y"], context)
    return jnp.mean(values), (extra, {})

  def evaluate(params, extra, hparams):
    logits_of = functools.partial(predict, params, extra)
    found = _strongest(config, logits_of, test["x"], test["y"], hparams["radius"])
    correct = lambda inputs: jnp.mean(logits_of(inputs).argmax(-1) == test["y"])
    withstood = attack_battery(
      logits_of, jnp.asarray(test["x"]), jnp.asarray(test["y"]), jax.random.key(0), radius=hparams["radius"],
      steps=config.test_steps, restarts=config.restarts, bounds=(0.0, 1.0),
    )  # fmt: skip
    return {
      "clean_accuracy": correct(test["x"]),
      "robust_accuracy": correct(found),
      "battery_accuracy": jnp.mean(withstood["all"]),
    }

  return gradient_task(
    lambda key, hparams: (model.init(key, jnp.zeros((1, *train["x"].shape[1:])))["params"], {}),
    objective,
    lambda hparams: _sgd(hparams, config.steps, config.weight_decay),
    data=train,
    batch_size=config.batch_size,
    hparams=_hparams(config),
    evaluate=evaluate,
    predict=predict,
    config=config,
  )


_mnist = functools.cache(bundled.mnist_subset)


def _cifar_task(config: Config) -> Task:
  """A wide residual network on CIFAR-10 with the usual shifts and reflections; held out is the test split."""

  def network(axis_name=None):
    return WideResNet(depth=config.depth, widen=config.widen, classes=10, width=config.width, axis_name=axis_name)

  def init_params(key, hparams):
    del hparams
    variables = network().init(key, jnp.zeros((1, 32, 32, 3)), train=False)
    return variables["params"], {"batch_stats": variables["batch_stats"]}

  def logits_of(params, extra, pixels):
    return network().apply({"params": params, **extra}, pixels, train=False)

  def predict(params, extra, inputs):
    return logits_of(params, extra, _pixels(params, inputs))

  def objective(params, extra, batch, context):
    def forward(extra, inputs, train):
      if not train:
        return logits_of(params, extra, inputs), extra
      return network(context.axis_name).apply({"params": params, **extra}, inputs, train=True, mutable=["batch_stats"])

    inputs = _pixels(params, batch["image"])
    values, extra = _robust_losses(config, forward, extra, inputs, batch["label"], context)
    return jnp.mean(values), (extra, {})

  def measure(state, batch, hparams):
    logits = functools.partial(logits_of, state.params, state.extra)
    inputs, labels = _pixels(state.params, batch["image"]), batch["label"]
    found = _strongest(config, logits, inputs, labels, hparams["radius"])
    correct = lambda inputs: logits(inputs).argmax(-1) == labels
    return mean_over(batch, clean_accuracy=correct(inputs), robust_accuracy=correct(found))

  stream = functools.partial(tfds_stream, "cifar10", batch_size=config.batch_size, data_dir=config.data_dir)
  return gradient_task(
    init_params,
    objective,
    lambda hparams: _sgd(hparams, config.steps, config.weight_decay),
    data=functools.partial(stream, split="train", seed=0, transform=cifar10.augment),
    batch_size=config.batch_size,
    hparams=_hparams(config),
    predict=predict,
    held_out=HeldOut(functools.partial(stream, split="test", **ONCE), measure),
    config=config,
    cast=("image",),
  )


def _pixels(params, images):
  """Images in [0, 1], in the dtype of the parameters."""
  return images.astype(jax.tree.leaves(params)[0].dtype) / 255


def paper_batch(config: Config) -> dict[str, jax.ShapeDtypeStruct]:
  """One global batch of the stream."""
  return cifar10.batch_shapes(config.batch_size)


def reduced(config: Config) -> Config:
  """The same network with one block a stage, at the least width, and shorter attacks."""
  small = {"depth": 10, "widen": 1, "width": 2, "attack_steps": 1, "test_steps": 2}
  return dataclasses.replace(config, **small, batch_size=8, train=64, epochs=3)


def paper_sets(config: Config) -> dict[str, dict]:
  """A generated CIFAR-10."""
  del config
  return cifar10.generated_set(range(10), examples=64)


def mixture_task(config: Config, mixture: Mixture) -> Task:
  """Comp-sum losses on a mixture of Gaussians; hyperparameters are `tau` and `learning_rate`."""
  train, test, truth = _draw(mixture)
  model = MLP((mixture.hidden, mixture.classes))

  def predict(params, extra, inputs):
    del extra
    return model.apply({"params": params}, inputs)

  def objective(params, extra, batch, context):
    values = comp_sum.comp_sum_loss(predict(params, extra, batch["x"]), batch["y"], tau=context.hparams["tau"])
    return jnp.mean(values), (extra, {})

  def evaluate(params, extra, hparams):
    logits = predict(params, extra, test["x"])
    return {"accuracy": jnp.mean(logits.argmax(-1) == test["y"]), **_bound(logits, truth, hparams["tau"])}

  return gradient_task(
    lambda key, hparams: (model.init(key, jnp.asarray(train["x"][:1]))["params"], {}),
    objective,
    lambda hparams: _sgd(hparams, _mixture_steps(config, mixture)),
    data=train,
    batch_size=config.batch_size,
    hparams={"learning_rate": config.learning_rate, "tau": 1.0},
    evaluate=evaluate,
    predict=predict,
    config=mixture,
  )


def _mixture_steps(config: Config, mixture: Mixture) -> int:
  return mixture.epochs * (mixture.train // config.batch_size)


@functools.lru_cache(maxsize=4)
def _draw(mixture: Mixture):
  """Training and test examples, and the true probabilities of the classes at the test inputs."""
  rng = np.random.default_rng(0)
  means = rng.normal(size=(mixture.classes, mixture.features))
  labels = rng.integers(0, mixture.classes, mixture.train + mixture.test)
  inputs = means[labels] + mixture.noise * rng.normal(size=(labels.size, mixture.features))
  distances = ((inputs[mixture.train :, None] - means) ** 2).sum(-1)
  truth = special.softmax(-distances / (2 * mixture.noise**2), axis=-1).astype(np.float32)
  data = {"x": inputs.astype(np.float32), "y": labels.astype(np.int32)}
  train, test = ({name: part[rows] for name, part in data.items()} for rows in np.s_[: mixture.train, mixture.train :])
  return train, test, truth


def _bound(logits, truth, tau) -> dict[str, jax.Array]:
  """Regrets of the zero-one loss and of the comp-sum loss at the inputs, and the bound on the former by the latter.

  For a complete set of functions the surrogate's regret and minimizability gap add up to the mean conditional regret.
  """
  chosen = jnp.take_along_axis(jnp.asarray(truth), logits.argmax(-1)[:, None], axis=-1)[:, 0]
  risk = comp_sum.comp_sum_loss_with_soft_labels(logits, jnp.asarray(truth), tau=tau)
  regret = jnp.mean(risk - h_consistency.bayes_conditional_risk(jnp.asarray(truth), tau=tau))
  return {
    "error_regret": jnp.mean(truth.max(-1) - chosen),
    "loss_regret": regret,
    "error_bound": h_consistency.h_consistency_gamma(regret, tau=tau, classes=truth.shape[-1]),
  }


def variants(config: Config) -> dict[str, tuple[str, dict[str, float]]]:
  """name -> method and hyperparameters: what is compared under attack.

  Comp-sum with tau = 1 and nu = 0 is cross-entropy, so that standard training needs no program of its own.
  """
  return {
    "standard": ("adversarial_comp_sum", {"tau": 1.0, "nu": 0.0}),
    **{f"TRADES {weight:g}": ("trades", {"weight": weight}) for weight in config.weights},
    **{f"comp-sum {nu:g}": ("adversarial_comp_sum", {"tau": config.tau, "nu": nu}) for nu in config.nus},
  }


def cells(config: Config, seeds) -> dict[str, Cell]:
  """The losses by tau on both mixtures, and the methods under attack."""
  del seeds
  trained = {}
  # Programs so short that choosing their engine would take longer than running them.
  for name, mixture in (("separated", config.separated), ("overlapping", config.overlapping)):
    steps = _mixture_steps(config, mixture)
    trained[name] = Cell(mixture_task(config, mixture), steps, {"tau": config.taus}, engine="map")
  for method in ("trades", "adversarial_comp_sum"):
    compared = [values for own, values in variants(config).values() if own == method]
    at = {name: [values[name] for values in compared] for name in compared[0]}
    trained[method] = Cell(task(dataclasses.replace(config, method=method)), config.steps, at, engine="map")
  return trained


def summary(config: Config, trials: Trials) -> dict[str, np.ndarray]:
  """Accuracies by tau and the bound, `[seeds, taus]`; clean and robust accuracies of the methods, `[seeds]`."""
  found = {
    f"{name} {metric}": trials[name].last(metric).T
    for name in ("separated", "overlapping")
    for metric in ("accuracy", "error_regret", "error_bound")
  }
  for label, (method, hparams) in variants(config).items():
    for metric in ("clean", "robust", "battery"):
      found[f"{label} {metric}"] = trials[method].at(f"{metric}_accuracy", **hparams)[:, -1]
    found[f"{label} both"] = (found[f"{label} clean"] + found[f"{label} battery"]) / 2
  for method, label, values in (("TRADES", "TRADES {:g}", config.weights), ("comp-sum", "comp-sum {:g}", config.nus)):
    best = max(values, key=lambda value, label=label: found[f"{label.format(value)} both"].mean())
    found |= {
      f"best {method} {metric}": found[f"{label.format(best)} {metric}"] for metric in ("clean", "battery", "both")
    }
    found[f"best {method} value"] = np.full(len(trials.seeds), best)
  return found


def claims(config: Config) -> tuple[Claim, ...]:
  """Which members of the family can be optimised, what adversarial comp-sum losses resist, and the bound."""
  many = config.separated
  mixture = (
    f"mixture of {many.classes} Gaussians, MLP {many.features}-{many.hidden}-{many.classes}, {many.epochs} epochs"
  )
  data = "MNIST subset" if config.model == "mlp" else "CIFAR-10"
  own = f"adversarial comp-sum with tau {config.tau:g}, nu {config.nu:g}"
  ours, trades = f"comp-sum {config.nu:g}", f"TRADES {config.weight:g}"
  battery = f"all attacks of `attack_battery`, {config.restarts} restarts of {config.test_steps} steps"
  chosen = (
    f"each the best of {len(config.nus)} weights ({', '.join(f'{x:g}' for x in config.weights)} of TRADES,"
    f" {', '.join(f'{x:g}' for x in config.nus)} of nu) by the mean of both accuracies on the test, over all seeds"
  )
  added = "30 November 2026: added when there was a battery of attacks, after the claim with one attack was known."
  attack = f"{data}, l_inf {config.radius:.3g}, margin attack of {config.test_steps} steps"
  at = lambda m, tau: m["separated accuracy"][:, config.taus.index(tau)]
  return (
    Claim(
      "logistic",
      f"Cross-entropy (tau = 1) learns {many.classes} separated classes",
      f"test accuracy with tau = 1, {mixture}",
      lambda m: at(m, 1.0),
      at_least=0.98,
    ),
    Claim(
      "absolute",
      f"Mean absolute error (tau = 2) does not learn {many.classes} separated classes: with many classes its gradient"
      " vanishes at the start",
      f"test accuracy with tau = 2, {mixture}",
      lambda m: at(m, 2.0),
      at_most=0.60,
    ),
    Claim(
      "exponential",
      f"Cross-entropy is no worse than the sum-exponential loss (tau = 0) on {many.classes} separated classes",
      f"test accuracy with tau = 1 minus that with tau = 0, {mixture}",
      lambda m: at(m, 1.0) - at(m, 0.0),
      at_least=-0.01,
    ),
    Claim(
      "robust",
      "The smooth adversarial comp-sum loss makes a network robust",
      f"robust test accuracy, {own}, minus that of standard training, {attack}",
      lambda m: m[f"{ours} robust"] - m["standard robust"],
      at_least=0.10,
    ),
    Claim(
      "robust_trades",
      "The smooth adversarial comp-sum loss makes a network as robust as TRADES does",
      f"robust test accuracy, {own}, minus that of TRADES with weight {config.weight:g}, {attack}",
      lambda m: m[f"{ours} robust"] - m[f"{trades} robust"],
      at_least=-0.03,
    ),
    Claim(
      "clean_trades",
      "The smooth adversarial comp-sum loss gives a higher accuracy without attack than TRADES",
      f"clean test accuracy, {own}, minus that of TRADES with weight {config.weight:g}, {data}",
      lambda m: m[f"{ours} clean"] - m[f"{trades} clean"],
      at_least=0.01,
    ),
    Claim(
      "robust_battery",
      "The robustness of the smooth adversarial comp-sum loss withstands stronger attacks",
      f"robust test accuracy, {own}, minus that of standard training, {data}, l_inf {config.radius:.3g}, {battery}",
      lambda m: m[f"{ours} battery"] - m["standard battery"],
      at_least=0.10,
      amended=added,
    ),
    Claim(
      "tuned_trades",
      "With the weights of both tuned, adversarial comp-sum losses are at least as good as TRADES with and without an"
      " attack",
      f"mean of clean and robust test accuracy, difference, {data}, l_inf {config.radius:.3g}, {battery}; {chosen}",
      lambda m: m["best comp-sum both"] - m["best TRADES both"],
      at_least=0.0,
      amended=added,
    ),
    Claim(
      "bound",
      "The H-consistency bound on the excess error holds after training, for every tau",
      f"bound minus zero-one regret, least over tau, with the true label distribution at {config.overlapping.test:,}"
      f" inputs, {config.overlapping.classes} Gaussians",
      lambda m: (m["overlapping error_bound"] - m["overlapping error_regret"]).min(1),
      at_least=0.0,
    ),
  )


DEVIATIONS = (
  "The card leaves open and we took from its first check: batch 128, cosine schedule, Nesterov momentum 0.9 and"
  " clipping at 5 for the robust networks; the measuring attack starts at random in the ball, with steps that add up to"
  " 2.5 radii.",
)
NOTES = (
  "Reported, not gated: every weight nu of adversarial comp-sum and every weight of TRADES, means over seeds (figure).",
  "The bound is a theorem about conditional regrets, so its check is one of the implementation; the figure shows how"
  " tight it is.",
)


def figure(config: Config, summary: dict[str, np.ndarray], path: pathlib.Path) -> None:
  """Accuracy by tau; clean against robust accuracy; the bound beside the excess error that it bounds."""
  picture, (left, middle, right) = plots.panels(3)
  plots.curves(left, config.taus, {"comp-sum": summary["separated accuracy"]}, marker="o")
  left.set(xlabel="tau", ylabel="test accuracy", ylim=(0, 1.05), title=f"{config.separated.classes} Gaussians")
  scattered = {"standard": ["standard"]}
  scattered["TRADES, weight"] = [f"TRADES {weight:g}" for weight in config.weights]
  scattered["adv. comp-sum, nu"] = [f"comp-sum {nu:g}" for nu in config.nus]
  for index, (label, names) in enumerate(scattered.items()):
    clean, robust = ([summary[f"{name} {metric}"].mean() for name in names] for metric in ("clean", "battery"))
    middle.plot(clean, robust, "o-", color=f"C{index}", label=label)
    for x, y, name in zip(clean, robust, names):
      middle.annotate(
        name.split()[-1] if len(names) > 1 else "", (x, y), textcoords="offset points", xytext=(4, 3), fontsize=7
      )
  middle.set(
    xlabel="clean test accuracy", ylabel="robust test accuracy, all attacks", title=f"l_inf {config.radius:.3g}"
  )
  bounds = {"bound": summary["overlapping error_bound"], "zero-one regret": summary["overlapping error_regret"]}
  plots.curves(right, config.taus, bounds, marker="o")
  right.set(xlabel="tau", yscale="log", title=f"{config.overlapping.classes} overlapping Gaussians")
  for axis in (middle, right):
    axis.legend(frameon=False, fontsize=8)
  plots.save(picture, path)
