"""Grokking at the edge of numerical stability: orthogonal gradients and StableMax without weight decay."""

import dataclasses
import pathlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.harness import plots
from experiments.harness.claims import Claim
from experiments.harness.trials import Cell, Trials
from jaxreg.data import algorithmic
from jaxreg.losses.stablemax import stablemax_cross_entropy
from jaxreg.metrics import grokking
from jaxreg.models import MLP
from jaxreg.training import Task, gradient_task, grid
from jaxreg.transforms.orthogonal_gradient import orthogonalize_gradients

CARD = "40-grokking_stability"
LOSSES = {
  "cross_entropy": optax.softmax_cross_entropy_with_integer_labels,
  "stablemax": stablemax_cross_entropy,
}


@dataclasses.dataclass(frozen=True)
class Config:
  """One training problem, and what `verify` compares: two losses and two gradients on either of the problems.

  Attributes:
    data: `addition` modulo `modulus`, or `parity` of `relevant` of `bits` bits.
    modulus: of the addition.
    bits, relevant: of the parity.
    train_fraction: fraction of the examples that is trained on; the split is drawn from the run's key.
    hidden: widths of the hidden layers; no layer has a bias.
    loss: `cross_entropy` or `stablemax`.
    orthogonal: whether gradients are made orthogonal to the weights.
    epsilon: Adam's, outside the square root.
    steps: full-batch steps.
    parity_steps, parity_hidden, parity_epsilon: the same of the parity problem that `verify` compares on.
  """

  data: str = "addition"
  modulus: int = 59
  bits: int = 30
  relevant: int = 3
  train_fraction: float = 0.5
  hidden: tuple[int, ...] = (200, 200)
  loss: str = "cross_entropy"
  orthogonal: bool = True
  epsilon: float = 1e-8
  steps: int = 300
  parity_steps: int = 5000
  parity_hidden: tuple[int, ...] = (128, 128)
  parity_epsilon: float = 1e-18

  def __post_init__(self):
    if self.data not in ("addition", "parity"):
      raise ValueError(f"data must be addition or parity, got {self.data!r}.")
    if self.loss not in LOSSES:
      raise ValueError(f"loss must be one of {', '.join(LOSSES)}, got {self.loss!r}.")
    if not 0 < self.train_fraction < 1:
      raise ValueError(f"train_fraction must lie in (0, 1), got {self.train_fraction}.")


PRESETS = {
  "smoke": Config(modulus=7, hidden=(16,), steps=20, parity_steps=20, parity_hidden=(16,)),
  "cpu": Config(),
}


def cell(config: Config) -> Cell:
  """One problem, loss and gradient over learning rates, evaluated ten times."""
  at = grid(learning_rate=[1e-3, 3e-3, 1e-2])
  return Cell(task(config), config.steps, at, eval_every=max(config.steps // 10, 1))


def task(config: Config) -> Task:
  """Full-batch training of a bias-free network on an algorithmic data set."""
  if config.data == "addition":
    parts = algorithmic.modular_arithmetic(jax.random.key(0), modulus=config.modulus, train_fraction=0.5)
  else:
    options = {"num_bits": config.bits, "num_relevant": config.relevant, "train_size": 1000, "test_size": 1000}
    parts = algorithmic.sparse_parity(jax.random.key(0), **options)
  data = {name: np.concatenate([part[name] for part in parts]) for name in ("x", "y")}
  inputs, labels = jnp.asarray(data["x"], jnp.float32), jnp.asarray(data["y"])
  train_size = round(config.train_fraction * len(labels))
  model = MLP(
    (*config.hidden, int(data["y"].max()) + 1),
    use_bias=False,
    kernel_init=nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform"),  # uniform in ±1/sqrt(fan_in)
  )
  loss = LOSSES[config.loss]

  def predict(params, extra, inputs):
    del extra
    return model.apply({"params": params}, inputs)

  def init_params(key, hparams):
    del hparams
    order = jax.random.permutation(jax.random.fold_in(key, 1), len(labels))
    return model.init(key, inputs[:1])["params"], {"train": order[:train_size], "test": order[train_size:]}

  def train_losses(params, extra, batch):
    logits = predict(params, extra, batch["x"][extra["train"]])
    return loss(logits, batch["y"][extra["train"]]), logits

  def objective(params, extra, batch, context):
    del context
    values, _ = train_losses(params, extra, batch)
    return values.mean(), (extra, {})

  def evaluate(params, extra, hparams):
    del hparams
    everything = {"x": inputs, "y": labels}
    (_, (values, logits)), gradients = jax.value_and_grad(
      lambda p: (lambda v, z: (v.mean(), (v, z)))(*train_losses(p, extra, everything)), has_aux=True
    )(params)
    last = f"Dense_{len(config.hidden)}"
    test = predict(params, extra, inputs[extra["test"]]).argmax(-1) == labels[extra["test"]]
    return {
      "train_accuracy": jnp.mean(logits.argmax(-1) == labels[extra["train"]]),
      "test_accuracy": jnp.mean(test),
      "collapse": grokking.softmax_collapse_fraction(logits),
      "zero_losses": grokking.zero_loss_fraction(values),
      "alignment": grokking.nlm_alignment(gradients, params)[last]["kernel"],
      "output_norm": grokking.tensor_norms(params)[last]["kernel"],
    }

  def optimizer(hparams):
    adamw = optax.adamw(hparams["learning_rate"], b1=0.9, b2=0.999, eps=config.epsilon, weight_decay=0.0)
    return optax.chain(orthogonalize_gradients(), adamw) if config.orthogonal else adamw

  return gradient_task(
    init_params,
    objective,
    optimizer,
    data={"x": np.asarray(inputs), "y": np.asarray(labels)},
    batch_size=None,
    hparams={"learning_rate": 1e-2},
    evaluate=evaluate,
    predict=predict,
    config=config,
  )


def cells(config: Config, seeds) -> dict[str, Cell]:
  """Addition without and with orthogonal gradients, parity with either loss, at the default learning rate."""
  del seeds
  addition = dataclasses.replace(config, data="addition", loss="cross_entropy")
  parity = dataclasses.replace(
    config,
    data="parity",
    train_fraction=0.5,
    hidden=config.parity_hidden,
    epsilon=config.parity_epsilon,
    steps=config.parity_steps,
    orthogonal=False,
  )
  compared = {
    "addition AdamW": dataclasses.replace(addition, orthogonal=False),
    "addition ⟂AdamW": dataclasses.replace(addition, orthogonal=True),
    "parity CE": dataclasses.replace(parity, loss="cross_entropy"),
    "parity StableMax": dataclasses.replace(parity, loss="stablemax"),
  }
  return {name: cell(one)._replace(points={}) for name, one in compared.items()}


def summary(config: Config, trials: Trials) -> dict[str, np.ndarray]:
  """Curves `[seeds, evaluations]` of every metric for each problem and method, and their steps."""
  del config
  found = {}
  for name, table in trials.cells.items():
    found |= {f"{name} {metric}": table.at(metric) for metric in table.metrics}
    found[f"{name} steps"] = np.tile(table.steps, (len(trials.seeds), 1))
  return found


def claims(config: Config) -> tuple[Claim, ...]:
  """Orthogonal gradients against naive loss minimisation, StableMax against the collapse of softmax."""
  addition = f"addition modulo {config.modulus}, a fraction {config.train_fraction:g} of the pairs, no weight decay"
  parity = f"parity of {config.relevant} of {config.bits} bits"
  return (
    Claim(
      "orthogonal",
      f"AdamW on gradients orthogonal to the weights (⟂AdamW) generalises on modular addition within {config.steps}"
      " steps",
      f"test accuracy of ⟂AdamW after {config.steps} full-batch steps, {addition}",
      lambda m: m["addition ⟂AdamW test_accuracy"][:, -1],
      at_least=0.95,
    ),
    Claim(
      "delay",
      f"AdamW has not begun to generalise after {config.steps} steps on modular addition",
      f"test accuracy of AdamW after {config.steps} full-batch steps, {addition}",
      lambda m: m["addition AdamW test_accuracy"][:, -1],
      at_most=0.1,
    ),
    Claim(
      "alignment",
      "AdamW's descent direction has aligned with the weights on modular addition (naive loss minimisation)",
      f"cosine of -gradient and weights of AdamW's output layer after {config.steps} full-batch steps, {addition}",
      lambda m: m["addition AdamW alignment"][:, -1],
      at_least=0.7,
    ),
    Claim(
      "stablemax",
      "StableMax generalises better than softmax on sparse parity without regularisation",
      f"test accuracy after {config.parity_steps:,} full-batch steps, {parity}, StableMax minus cross-entropy",
      lambda m: (m["parity StableMax test_accuracy"] - m["parity CE test_accuracy"])[:, -1],
      at_least=0.08,
    ),
    Claim(
      "collapse",
      f"Softmax has collapsed on many training examples of sparse parity after {config.parity_steps:,} steps",
      f"fraction of training examples with softmax collapse in float32 under cross-entropy, {parity}",
      lambda m: m["parity CE collapse"][:, -1],
      at_least=0.3,
    ),
    Claim(
      "no_zero_losses",
      f"StableMax's losses have not vanished on any example of sparse parity after {config.parity_steps:,} steps",
      f"fraction of training examples whose StableMax loss is exactly 0, {parity}",
      lambda m: m["parity StableMax zero_losses"][:, -1],
      at_most=0.0,
    ),
  )


DEVIATIONS = (
  "Addition modulo 59 with half of the pairs for 300 steps, and the parity of 3 of 30 bits for 5,000 steps; the paper"
  " has modulus 113 with 40 % of the pairs and 3 of 43 bits, for up to 100,000 steps, and beside them products,"
  " subtraction by a transformer, and MNIST.",
  "⟂AdamW projects each tensor by itself and restores the length of its gradient, as the official code does; the"
  " paper's Equation 12 is one projection of all parameters without that (`orthogonalize_gradients(per_leaf=False,"
  " renormalize=False)`).",
  "On addition AdamW and ⟂AdamW both have beta2 0.999 and epsilon 1e-8, which the official wrapper ends up with"
  " whatever is configured; without the projection the official runs have epsilon 1e-25 to 1e-30.",
  "Everything is float32, StableMax included, which the official code computes in float64, as it does its evaluations;"
  " its comparison of float16, float32 and float64 softmax is not run here.",
  "The split into training and test examples is drawn anew for each seed. The official loop permutes the samples at"
  " every epoch, which changes only rounding in full batches.",
)
NOTES = (
  "Alignment is measured on the gradient before projection; it is high under ⟂AdamW as well (about 0.98), whose step"
  " does not follow it. With AdamW it is the direction that is followed.",
)


def figure(config: Config, summary: dict[str, np.ndarray], path: pathlib.Path) -> None:
  """Accuracy curves of both problems, and what goes wrong: alignment and losses of zero."""
  panels = (
    ("addition", ("AdamW", "⟂AdamW"), "test_accuracy", f"test accuracy, addition mod {config.modulus}"),
    ("addition", ("AdamW", "⟂AdamW"), "alignment", "cosine(-gradient, weights), output layer"),
    ("parity", ("CE", "StableMax"), "test_accuracy", "test accuracy, parity"),
    ("parity", ("CE", "StableMax"), "zero_losses", "training losses that are exactly 0, parity"),
  )
  picture, axes = plots.panels(len(panels), width=3.75)
  for axis, (problem, methods, metric, title) in zip(axes, panels):
    steps = summary[f"{problem} {methods[0]} steps"][0]
    found = {name.replace("⟂", r"$\perp$"): summary[f"{problem} {name} {metric}"] for name in methods}
    plots.curves(axis, steps, found, marker=".")
    axis.set_title(title, fontsize=10)
    axis.set(xlabel="step", ylim=(-0.3 if metric == "alignment" else -0.03, 1.03))
    axis.legend(frameon=False)
  plots.save(picture, path)
