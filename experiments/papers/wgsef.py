"""WGSEF: a group-sparse penalty whose parameter is the number of neurons that a layer may keep."""

import dataclasses
import math
import pathlib

import jax.numpy as jnp
import numpy as np
import optax

from experiments.harness import plots
from experiments.harness.claims import Claim
from experiments.harness.trials import Cell, Trials
from jaxreg.data import bundled
from jaxreg.models import MLP
from jaxreg.regularizers import group_sparsity, groups
from jaxreg.training import Task, gradient_task, grid
from jaxreg.transforms.proximal_steps import proximal

CARD = "49-wgsef"
PENALTIES = ("none", "wgsef", "group_lasso")


@dataclasses.dataclass(frozen=True)
class Config:
  """Training of a network with one sparse hidden layer on digits.

  Attributes:
    penalty: `none`, `wgsef` or `group_lasso`, on the hidden neurons (incoming weights and bias).
    hidden: number of neurons to start with.
    batch_size: examples per step.
    steps: proximal steps.
    tuning_steps: further steps without the penalty; neurons that are zero stay so.
    keeps: numbers of neurons to keep, increasing.
    strength: of the penalty, fixed beforehand.
    strengths: number of strengths tried for group lasso.
  """

  penalty: str = "wgsef"
  hidden: int = 64
  batch_size: int = 64
  steps: int = 2000
  tuning_steps: int = 1000
  keeps: tuple[int, ...] = (8, 16)
  strength: float = 0.1
  strengths: int = 24

  def __post_init__(self):
    if self.penalty not in PENALTIES:
      raise ValueError(f"penalty must be one of {', '.join(PENALTIES)}, got {self.penalty!r}.")
    if not all(1 <= keep <= self.hidden for keep in self.keeps):
      raise ValueError(f"keeps must lie in [1, {self.hidden}], got {self.keeps}.")

  @property
  def eval_every(self) -> int:
    return math.gcd(self.steps, self.tuning_steps)


PRESETS = {"smoke": Config(hidden=32, steps=40, tuning_steps=20, strengths=2), "cpu": Config()}


def cell(config: Config) -> Cell:
  """One penalty over numbers of neurons × strengths: the proximal steps and the tuning steps."""
  at = grid(k=config.keeps, strength=[0.01, 0.03, 0.1, 0.3])
  return Cell(task(config), config.steps + config.tuning_steps, at, eval_every=config.eval_every)


def task(config: Config) -> Task:
  """Proximal SGD; hyperparameters are `learning_rate`, `strength` and `k`."""
  train, test = bundled.split(bundled.digits(), sizes=(1000, 797))
  model = MLP((config.hidden, 10))

  def predict(params, extra, inputs):
    del extra
    return model.apply({"params": params}, inputs)

  def objective(params, extra, batch, context):
    del context
    logits = predict(params, extra, batch["x"])
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"]).mean(), (extra, {})

  def accuracy(params):
    return jnp.mean(predict(params, {}, test["x"]).argmax(-1) == test["y"])

  def evaluate(params, extra, hparams):
    norms = groups.group_norms(params["Dense_0"], kind="neuron")
    kept = jnp.argsort(jnp.argsort(-norms)) < hparams["k"]
    ids, _ = groups.resolve_groups("neuron", params["Dense_0"])
    pruned = {**params, "Dense_0": groups.scale_groups(params["Dense_0"], ids, kept.astype(jnp.float32))}
    return {
      "test_accuracy": accuracy(params),
      "active_neurons": jnp.sum(norms > 0),
      "pruned_accuracy": accuracy(pruned),
    }

  def optimizer(hparams):
    sgd = optax.sgd(hparams["learning_rate"])
    if config.penalty == "none":
      return sgd

    def prox(layer, size):
      ids, count = groups.resolve_groups("neuron", layer)
      options = {"lam": size * hparams["strength"], "num_groups": count}
      if config.penalty == "wgsef":
        return group_sparsity.prox_wgsef(layer, ids, k=hparams["k"], **options)
      return group_sparsity.prox_group_lasso(layer, ids, **options)

    # A ReLU neuron whose incoming weights and bias are zero has no gradient: without the penalty it stays zero.
    schedule = lambda step: hparams["learning_rate"] * (step < config.steps)
    return optax.chain(sgd, proximal({"Dense_0": prox, "Dense_1": None}, schedule))

  return gradient_task(
    lambda key, hparams: (model.init(key, jnp.asarray(train["x"][:1]))["params"], {}),
    objective,
    optimizer,
    data=train,
    batch_size=config.batch_size,
    hparams={"learning_rate": 0.1, "strength": config.strength, "k": 16},
    evaluate=evaluate,
    predict=predict,
    config=config,
  )


def cells(config: Config, seeds) -> dict[str, Cell]:
  """Dense, with WGSEF at every number of neurons, and with group lasso at every strength."""
  del seeds
  of = lambda penalty, at: cell(dataclasses.replace(config, penalty=penalty))._replace(points=at)
  return {
    "none": of("none", {"k": config.keeps}),
    "wgsef": of("wgsef", {"k": config.keeps}),
    "group_lasso": of("group_lasso", {"strength": np.geomspace(0.003, 0.3, config.strengths)}),
  }


def summary(config: Config, trials: Trials) -> dict[str, np.ndarray]:
  """For dense, WGSEF and group lasso at each k: accuracies before and after tuning, active neurons, `[seeds]`."""
  before = config.steps // config.eval_every - 1
  dense, sparse, lasso = (trials[name] for name in ("none", "wgsef", "group_lasso"))
  active = lasso.metrics["active_neurons"][:, :, before]
  any_k = dense.at("test_accuracy", k=config.keeps[0])
  found = {
    "dense before": any_k[:, before],
    "dense after": any_k[:, -1],
    "lasso path neurons": active.T,
    "lasso path accuracy": lasso.last("test_accuracy").T,
  }
  for k in config.keeps:
    chosen, column = weakest(active, k), np.arange(active.shape[1])
    found |= {
      f"k {k} wgsef neurons": sparse.at("active_neurons", k=k)[:, before],
      f"k {k} wgsef before": sparse.at("test_accuracy", k=k)[:, before],
      f"k {k} wgsef after": sparse.at("test_accuracy", k=k)[:, -1],
      f"k {k} lasso neurons": active[chosen, column],
      f"k {k} lasso before": lasso.metrics["test_accuracy"][chosen, column, before],
      f"k {k} lasso after": lasso.metrics["test_accuracy"][chosen, column, -1],
      f"k {k} pruned": dense.at("pruned_accuracy", k=k)[:, before],
    }
  return found


def weakest(active: np.ndarray, k: int) -> np.ndarray:
  """Per seed the first (weakest) of the strengths that leaves at most k neurons, else the one that leaves fewest."""
  enough = active <= k
  return np.where(enough.any(0), enough.argmax(0), active.argmin(0))


def claims(config: Config) -> tuple[Claim, ...]:
  """At every k that WGSEF keeps it at little cost; at the largest, comparisons with lasso and pruning."""
  k = config.keeps[-1]
  pruned = f"test accuracy of {{}} with {k} neurons before tuning minus that of the dense network pruned by magnitude"
  return (
    *(claim for k in config.keeps for claim in _of(config, k)),
    Claim(
      f"lasso_{k}",
      f"WGSEF is as accurate as group lasso at {k} neurons, without lasso's search for the strength",
      f"tuned test accuracy, WGSEF minus the weakest group lasso (of {config.strengths} strengths) with at most {k}"
      " neurons",
      lambda m: m[f"k {k} wgsef after"] - m[f"k {k} lasso after"],
      at_least=-0.01,
    ),
    Claim(
      "pruning_wgsef",
      f"WGSEF beats pruning the dense network by magnitude to {k} neurons",
      pruned.format("WGSEF"),
      lambda m: m[f"k {k} wgsef before"] - m[f"k {k} pruned"],
      at_least=0.1,
    ),
    Claim(
      "pruning_lasso",
      f"Group lasso beats pruning the dense network by magnitude to {k} neurons",
      pruned.format("group lasso"),
      lambda m: m[f"k {k} lasso before"] - m[f"k {k} pruned"],
      at_least=0.1,
    ),
  )


def _of(config: Config, k: int) -> tuple[Claim, ...]:
  return (
    Claim(
      f"reached_{k}",
      f"WGSEF leaves exactly the {k} of {config.hidden} neurons asked for, with one strength and no search",
      f"absolute difference of active neurons and k after {config.steps:,} proximal steps, strength"
      f" {config.strength:g}",
      lambda m: np.abs(m[f"k {k} wgsef neurons"] - k),
      at_most=0.0,
    ),
    Claim(
      f"accuracy_{k}",
      f"WGSEF with {k} of {config.hidden} neurons loses little accuracy against the dense network",
      f"test accuracy of the dense network minus the sparse one's after {config.steps:,} steps, before tuning",
      lambda m: m["dense before"] - m[f"k {k} wgsef before"],
      at_most=0.04,
    ),
    Claim(
      f"tuned_{k}",
      f"After tuning on its support WGSEF with {k} of {config.hidden} neurons is nearly as accurate as the dense"
      " network",
      f"test accuracy of the dense network minus the sparse one's after {config.tuning_steps:,} further steps of both"
      " without penalty",
      lambda m: m["dense after"] - m[f"k {k} wgsef after"],
      at_most=0.02,
    ),
  )


DEVIATIONS = (
  "There is no official code and the paper's text was not at hand: penalty and proximal operator were derived from its"
  " abstract and the sparse envelope of Beck and Refael. Where the paper puts the weights of the groups is not known;"
  " here all are 1.",
  "A perceptron on digits with one sparse layer; by its reviews the paper prunes filters of LeNet, VGG16, ResNet18 and"
  " MobileNetV1 on Fashion-MNIST and CIFAR-10. No paper preset.",
  "Plain proximal gradient steps with a constant learning rate and batch size; by the reviews the paper adds"
  " half-space projections (AdaHSPG+), and its proof of convergence asks for decreasing steps or growing batches.",
  "The proximal operator sorts its breakpoints, O(m log m), instead of the paper's selection in linear time.",
  "A group is a neuron's incoming weights and bias; outgoing weights are not penalized, so that the network may"
  " rescale. The paper prunes several layers at once.",
  "Group lasso's strength is the weakest of a geometric grid that leaves at most k neurons, chosen for each seed after"
  " training.",
)


def notes(config: Config) -> tuple[str, ...]:
  """What keeps a run from k."""
  lam = 0.1 * config.strength  # the default learning rate times the strength
  return (
    "A run that ends one group above k is stuck where the ratio of the (k+1)-th to the k-th group norm exceeds"
    f" lam / (1 + lam) for the proximal step lam = {lam:g}: the weak group is then shrunk no faster than the gradient"
    " regrows it. A larger strength or a ramp would remove it, at a cost in accuracy; the strength was fixed beforehand"
    f" at {config.strength:g}.",
  )


def figure(config: Config, summary: dict[str, np.ndarray], path: pathlib.Path) -> None:
  """Accuracy against neurons: the group lasso path, WGSEF and pruning at each k, one marker per seed."""
  joined = lambda key: np.concatenate([summary[f"k {k} {key}"] for k in config.keeps])
  reached = joined("wgsef neurons")
  picture, (axis,) = plots.panels(width=6, height=4)
  lasso = summary["lasso path neurons"].ravel(), summary["lasso path accuracy"].ravel()
  plots.scatter(axis, {f"group lasso, {config.strengths} strengths (tuned)": lasso}, alpha=0.3)
  plots.scatter(axis, {"WGSEF before tuning": (reached, joined("wgsef before"))}, marker="v")
  plots.scatter(axis, {"WGSEF tuned": (reached, joined("wgsef after"))}, marker="^")
  places = np.repeat(config.keeps, len(summary["dense after"]))
  plots.scatter(axis, {"dense, pruned by magnitude": (places, joined("pruned"))}, marker="x")
  axis.axhline(summary["dense after"].mean(), color="k", linestyle=":", label=f"dense, {config.hidden} neurons")
  axis.set(xlabel="active hidden neurons", ylabel="test accuracy", title="digits")
  axis.legend(frameon=False, fontsize=8)
  plots.save(picture, path)
