"""Grokking at the edge of numerical stability: orthogonal gradients and StableMax without weight decay."""

import dataclasses
import pathlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.harness.claims import Claim
from jaxreg.data import algorithmic
from jaxreg.losses.stablemax import stablemax_cross_entropy
from jaxreg.metrics import grokking
from jaxreg.models import MLP
from jaxreg.training import Task, grid, sweep
from jaxreg.transforms.orthogonal_gradient import orthogonalize_gradients

CARD = "40-grokking_stability"
LOSSES = {
  "cross_entropy": optax.softmax_cross_entropy_with_integer_labels,
  "stablemax": stablemax_cross_entropy,
}


@dataclasses.dataclass(frozen=True)
class Config:
  """One training problem; `measure` varies loss and gradient.

  Attributes:
    data: `addition` modulo `modulus`, or `parity` of 3 of 30 bits.
    modulus: of the addition.
    train_fraction: share of the examples that is trained on; the split is drawn from the run's key.
    hidden: widths of the hidden layers; no layer has a bias.
    loss: `cross_entropy` or `stablemax`.
    orthogonal: whether gradients are made orthogonal to the weights.
    epsilon: Adam's, outside the square root.
    steps: full-batch steps.
    parity_steps: full-batch steps of the parity problem in `measure`.
  """

  data: str = "addition"
  modulus: int = 59
  train_fraction: float = 0.5
  hidden: tuple[int, ...] = (200, 200)
  loss: str = "cross_entropy"
  orthogonal: bool = True
  epsilon: float = 1e-8
  steps: int = 300
  parity_steps: int = 5000

  def __post_init__(self):
    if self.data not in ("addition", "parity"):
      raise ValueError(f"data must be addition or parity, got {self.data!r}.")
    if self.loss not in LOSSES:
      raise ValueError(f"loss must be one of {', '.join(LOSSES)}, got {self.loss!r}.")
    if not 0 < self.train_fraction < 1:
      raise ValueError(f"train_fraction must lie in (0, 1), got {self.train_fraction}.")


PRESETS = {"smoke": Config(modulus=7, hidden=(16,), steps=20, parity_steps=20), "cpu": Config()}


def build(config: Config) -> Task:
  """Full-batch training of a bias-free network on an algorithmic data set."""
  if config.data == "addition":
    parts = algorithmic.modular_arithmetic(jax.random.key(0), modulus=config.modulus, train_fraction=0.5)
  else:
    parts = algorithmic.sparse_parity(jax.random.key(0), num_bits=30, num_relevant=3, train_size=1000, test_size=1000)
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

  def objective(params, extra, batch, key, hparams, axis_name):
    del key, hparams, axis_name
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

  return Task(
    init_params=init_params,
    objective=objective,
    optimizer=optimizer,
    data={"x": np.asarray(inputs), "y": np.asarray(labels)},
    batch_size=None,
    hparams={"learning_rate": 1e-2},
    evaluate_params=evaluate,
    predict=predict,
  )


def points(config: Config) -> dict[str, np.ndarray]:
  """Learning rates."""
  del config
  return grid(learning_rate=[1e-3, 3e-3, 1e-2])


def run_options(config: Config) -> dict[str, int]:
  """Length of one run."""
  every = max(config.steps // 10, 1)
  return {"steps": config.steps, "log_every": every, "eval_every": every}


def measure(config: Config, seeds: list[int]) -> dict[str, np.ndarray]:
  """Curves `[seeds, evaluations]` of every metric for each problem and method."""
  addition = dataclasses.replace(config, data="addition", loss="cross_entropy")
  parity = dataclasses.replace(
    config, data="parity", train_fraction=0.5, hidden=(128, 128) if config.steps > 100 else config.hidden,
    epsilon=1e-18, steps=config.parity_steps, orthogonal=False,
  )  # fmt: skip
  runs = {
    "addition AdamW": dataclasses.replace(addition, orthogonal=False),
    "addition ⟂AdamW": dataclasses.replace(addition, orthogonal=True),
    "parity CE": dataclasses.replace(parity, loss="cross_entropy"),
    "parity StableMax": dataclasses.replace(parity, loss="stablemax"),
  }
  measured = {}
  for name, one in runs.items():
    options = {key: value for key, value in run_options(one).items() if key != "log_every"}
    result = sweep(build(one), {}, seeds=seeds, label=name, **options)
    measured |= {f"{name} {metric}": values for metric, values in result.metrics.items()}
    measured[f"{name} steps"] = np.tile(result.steps, (len(seeds), 1))
  return measured


CLAIMS = (
  Claim(
    "orthogonal",
    "⟂AdamW removes the delay of generalisation",
    "test accuracy after 300 full-batch steps, addition modulo 59, half of the pairs, no weight decay",
    lambda m: m["addition ⟂AdamW test_accuracy"][:, -1],
    at_least=0.95,
  ),
  Claim(
    "delay",
    "where AdamW has not begun to generalise",
    "the same for AdamW",
    lambda m: m["addition AdamW test_accuracy"][:, -1],
    at_most=0.1,
  ),
  Claim(
    "alignment",
    "AdamW's descent direction has aligned with the weights (naive loss minimisation)",
    "cosine of -gradient and weights of AdamW's output layer after 300 steps",
    lambda m: m["addition AdamW alignment"][:, -1],
    at_least=0.7,
  ),
  Claim(
    "stablemax",
    "StableMax generalises better than softmax without regularisation",
    "test accuracy after 5,000 full-batch steps, parity of 3 of 30 bits, StableMax less cross-entropy",
    lambda m: (m["parity StableMax test_accuracy"] - m["parity CE test_accuracy"])[:, -1],
    at_least=0.08,
  ),
  Claim(
    "collapse",
    "softmax has collapsed on many examples by then",
    "share of training examples with softmax collapse in float32 under cross-entropy",
    lambda m: m["parity CE collapse"][:, -1],
    at_least=0.3,
  ),
  Claim(
    "no_zero_losses",
    "StableMax's losses never vanish",
    "share of training examples whose StableMax loss is exactly 0",
    lambda m: m["parity StableMax zero_losses"][:, -1],
    at_most=0.0,
  ),
)


NOTES = (
  "Alignment is measured on the gradient before projection; it is high under ⟂AdamW as well (about 0.98), whose step"
  " does not follow it. With AdamW it is the direction that is followed.",
)


def figure(measurements: dict[str, np.ndarray], path: pathlib.Path) -> None:
  """Accuracy curves of both problems, and what goes wrong: alignment and collapse."""
  import matplotlib.pyplot as plt

  panels = (
    ("addition", ("AdamW", "⟂AdamW"), "test_accuracy", "test accuracy, addition mod 59"),
    ("addition", ("AdamW", "⟂AdamW"), "alignment", "cosine(-gradient, weights), output layer"),
    ("parity", ("CE", "StableMax"), "test_accuracy", "test accuracy, parity"),
    ("parity", ("CE", "StableMax"), "zero_losses", "training losses that are exactly 0, parity"),
  )
  picture, axes = plt.subplots(1, 4, figsize=(15, 3.5), layout="constrained")
  for axis, (problem, methods, metric, title) in zip(axes, panels):
    for method in methods:
      curves, steps = (measurements[f"{problem} {method} {what}"] for what in (metric, "steps"))
      axis.plot(steps[0], curves.mean(0), marker=".", label=method.replace("⟂", r"$\perp$"))
      axis.fill_between(steps[0], curves.min(0), curves.max(0), alpha=0.2, linewidth=0)
    axis.set_title(title, fontsize=10)
    axis.set(xlabel="step", ylim=(-0.3 if metric == "alignment" else -0.03, 1.03))
    axis.grid(alpha=0.3)
    axis.legend(frameon=False)
  picture.savefig(path, dpi=120)
  plt.close(picture)
