"""Pareto-optimal quantized networks: accuracy against the cost of inference over widths and numbers of bits."""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from experiments.harness.claims import Claim
from experiments.problems.quantized_networks import Problem, network, quantized_task
from jaxreg.metrics.network_cost import assign_bits, layer_table, quant_cost
from jaxreg.metrics.pareto import best_within_cost, pareto_front
from jaxreg.quantization.layers import PRECISIONS, Precision
from jaxreg.training import Task, sweep

CARD = "31-quantized_resnet"
STUDY = ("bfloat16", "W8A8", "W4A4, ends W8A8", "W2A2, ends W8A8")
FULL, EIGHT, FOUR, TWO = range(4)  # places in STUDY; residual networks are trained with the first three
COSTS = ("quadratic", "linear")

DIGITS = Problem()
GARMENTS = Problem(
  dataset="fashion_mnist",
  train=3000,
  test=4000,
  depth=(1, 1, 1),
  width=16,
  batch_size=64,
  steps=400,
  learning_rate=0.1,
  weight_decay=5e-4,
  warmup=0.05,
  cooldown=0.2,
  start=0.1,
)
# The official schedule at a batch of 2048: 250 epochs, of which 5 warm up and 50 cool down; bounds after 7,500 steps.
IMAGENET = Problem(
  dataset="imagenet2012",
  depth=50,
  width=64,
  batch_size=2048,
  steps=156_400,
  learning_rate=0.8,
  weight_decay=1e-4,
  warmup=0.02,
  cooldown=0.2,
  start=7500 / 156_400,
  classes=1000,
  precision="bfloat16",
)


@dataclasses.dataclass(frozen=True)
class Config:
  """The study.

  Attributes:
    problem: the network that `run` trains and `sweep` varies the precision of.
    precision: its precision, a name.
    mlp: the perceptron of the card's checks; its width is replaced.
    mlp_widths: neurons of the hidden layers.
    few: training examples for the generalization gap of the widest perceptron.
    resnet: the residual network; its width is replaced.
    resnet_widths: channels of the first stage.
    data_dir: TFDS's folder, for ImageNet.
  """

  problem: Problem = GARMENTS
  precision: str = "W4A4, ends W8A8"
  mlp: Problem = DIGITS
  mlp_widths: tuple[int, ...] = (4, 8, 16, 32)
  few: int = 300
  resnet: Problem = GARMENTS
  resnet_widths: tuple[int, ...] = (4, 8, 16)
  data_dir: str | None = None

  def __post_init__(self):
    if self.precision not in PRECISIONS:
      raise ValueError(f"precision must be one of {'; '.join(PRECISIONS)}, got {self.precision!r}.")


PRESETS = {
  "smoke": Config(
    problem=dataclasses.replace(DIGITS, width=4, steps=20),
    mlp=dataclasses.replace(DIGITS, steps=20),
    mlp_widths=(4,),
    few=1000,
    resnet=dataclasses.replace(GARMENTS, train=64, test=32, depth=(1,), batch_size=16, steps=4),
    resnet_widths=(2,),
  ),
  "cpu": Config(),
  "paper": Config(problem=IMAGENET),
}


def build(config: Config) -> Task:
  """The task of one network; hyperparameters are `learning_rate` and the numbers of bits."""
  return quantized_task(config.problem, PRECISIONS[config.precision], data_dir=config.data_dir)


def points(config: Config) -> dict[str, np.ndarray]:
  """The precisions that are compared."""
  return _points(config.problem)


def _studied(problem: Problem) -> tuple[str, ...]:
  return STUDY[: FOUR + 1] if problem.depth else STUDY


def _points(problem: Problem) -> dict[str, np.ndarray]:
  return {name: np.array([getattr(PRECISIONS[p], name) for p in _studied(problem)]) for name in Precision._fields}


def run_options(config: Config) -> dict[str, int]:
  """Length of one run."""
  steps = config.problem.steps
  return {"steps": steps, "log_every": max(steps // 10, 1), "eval_every": steps}


def paper_batch(config: Config) -> dict[str, jax.ShapeDtypeStruct]:
  """One global batch of the stream."""
  problem = config.problem
  labels = jax.ShapeDtypeStruct((problem.batch_size,), jnp.int32)
  images = jax.ShapeDtypeStruct((problem.batch_size, *problem.image), jnp.uint8)
  return {"image": images, "label": labels, "id": labels}


def reduced(config: Config) -> Config:
  """A small network of the same kinds of layers."""
  small = dict(depth=(1,), bottleneck=True, width=2, batch_size=16, steps=10, start=0.5, size=16)
  return dataclasses.replace(config, problem=dataclasses.replace(config.problem, **small))


def paper_sets(config: Config) -> dict[str, dict]:
  """Random pictures of different sizes."""
  rng = np.random.default_rng(0)
  images = [rng.integers(0, 256, (20 + index % 5, 24, 3), np.uint8) for index in range(32)]
  return {"imagenet2012": {"train": {"image": images, "label": np.arange(32) % config.problem.classes}}}


def measure(config: Config, seeds: list[int]) -> dict[str, np.ndarray]:
  """Accuracies and costs of both families, and of the perceptron with few examples, `[seeds, precisions, widths]`."""
  few = dataclasses.replace(config.mlp, train=config.few)
  return {
    **_family(config.mlp, config.mlp_widths, "mlp", seeds),
    **_family(few, config.mlp_widths[-1:], "few", seeds),
    **_family(config.resnet, config.resnet_widths, "resnet", seeds),
  }


def _family(problem: Problem, widths, name: str, seeds) -> dict[str, np.ndarray]:
  parts = [_trained(dataclasses.replace(problem, width=width), name, seeds) for width in widths]
  measured = {f"{name} {key}": np.stack([part[key] for part in parts], axis=-1) for key in parts[0]}
  return {**measured, f"{name} widths": np.tile(widths, (len(seeds), 1))}


def _trained(problem: Problem, name: str, seeds) -> dict[str, np.ndarray]:
  """One width at every precision: accuracies `[seeds, precisions]`, and the costs, alike for all seeds."""
  task = quantized_task(problem, PRECISIONS["bfloat16"])
  # Convolutions mapped over trials are slow on a CPU, small matrix products are not.
  engine = "map" if problem.depth and jax.default_backend() == "cpu" else "vmap"
  label = f"{name} {problem.width}"
  result = sweep(task, _points(problem), seeds=seeds, steps=problem.steps, engine=engine, label=label)
  accuracies = {key: result.by_point(f"{key}_accuracy")[:, :, -1].T for key in ("train", "test", "integer_test")}
  return {**accuracies, **_costs(problem, len(seeds))}


def _costs(problem: Problem, seeds: int) -> dict[str, np.ndarray]:
  image = jax.ShapeDtypeStruct((1, *problem.image), jnp.float32)
  table = layer_table(network(problem, PRECISIONS["bfloat16"]), image, train=False)
  costs = [quant_cost(assign_bits(table, PRECISIONS[name])) for name in _studied(problem)]
  return {key: np.tile([float(getattr(c, key)) for c in costs], (seeds, 1)) for key in (*COSTS, "memory")}


def gains(m: dict[str, np.ndarray], family: str, cost: str) -> np.ndarray:
  """By how much the best 4-bit network of no greater cost beats each bfloat16 one, `[seeds, widths]`."""
  costs, test = m[f"{family} {cost}"], m[f"{family} test"]
  best = best_within_cost(costs[:, FOUR], test[:, FOUR], costs[:, FULL])
  return np.asarray(best, np.float64) - test[:, FULL]


def dominance(m: dict[str, np.ndarray], family: str, cost: str) -> np.ndarray:
  """The gain at the worst of the widths: dominance when it is not negative."""
  return gains(m, family, cost).min(axis=-1)


def loss_of(m: dict[str, np.ndarray], family: str, precision: int) -> np.ndarray:
  """Test accuracy that the widest network loses to its bfloat16 form."""
  test = m[f"{family} test"][:, :, -1]
  return test[:, FULL] - test[:, precision]


def gap(m: dict[str, np.ndarray], family: str) -> np.ndarray:
  """Training less test accuracy of the widest network, `[seeds, precisions]`."""
  return (m[f"{family} train"] - m[f"{family} test"])[:, :, -1]


CLAIMS = (
  Claim(
    "mlp_dominance",
    "for every bfloat16 perceptron there is a 4-bit one that costs no more and is as good",
    "digits; best 4-bit test accuracy within the bfloat16 network's quadratic cost, less its own; worst of four widths",
    lambda m: dominance(m, "mlp", "quadratic"),
    at_least=-0.005,
  ),
  Claim(
    "mlp_dominance_linear",
    "also when cost is linear in the bits",
    "the same with the linear cost",
    lambda m: dominance(m, "mlp", "linear"),
    at_least=-0.005,
  ),
  Claim(
    "mlp_eight_bits",
    "8 bits cost less than a point of accuracy",
    "digits, 32 neurons; test accuracy in bfloat16 less W8A8",
    lambda m: loss_of(m, "mlp", EIGHT),
    at_most=0.01,
  ),
  Claim(
    "mlp_four_bits",
    "and so do 4 bits between layers of 8",
    "digits, 32 neurons; test accuracy in bfloat16 less W4A4 with 8-bit ends",
    lambda m: loss_of(m, "mlp", FOUR),
    at_most=0.01,
  ),
  Claim(
    "mlp_two_bits",
    "2 bits are too few",
    "digits, 32 neurons; test accuracy in bfloat16 less W2A2 with 8-bit ends",
    lambda m: loss_of(m, "mlp", TWO),
    at_least=0.0,
  ),
  Claim(
    "mlp_gap",
    "the generalization gap does not grow with quantization",
    "digits, 32 neurons, 300 training examples; training less test accuracy, 4-bit less bfloat16",
    lambda m: gap(m, "few")[:, FOUR] - gap(m, "few")[:, FULL],
    at_most=0.005,
  ),
  Claim(
    "resnet_dominance",
    "for every bfloat16 residual network there is a 4-bit one that costs no more and is as good",
    "Fashion-MNIST, 14 × 14; as for the perceptrons, quadratic cost",
    lambda m: dominance(m, "resnet", "quadratic"),
    at_least=-0.005,
  ),
  Claim(
    "resnet_dominance_covered",
    "and a better one, where the 4-bit networks that were tried cost nearly as much",
    "the same at the narrowest width, whose cost lies between those of the 4-bit networks",
    lambda m: gains(m, "resnet", "quadratic")[:, 0],
    at_least=0.0,
  ),
  Claim(
    "resnet_dominance_linear",
    "also when cost is linear in the bits",
    "the same with the linear cost",
    lambda m: dominance(m, "resnet", "linear"),
    at_least=-0.005,
  ),
  Claim(
    "resnet_gap",
    "the residual network's generalization gap does not grow with quantization",
    "Fashion-MNIST, widest network; training less test accuracy, 4-bit less bfloat16",
    lambda m: gap(m, "resnet")[:, FOUR] - gap(m, "resnet")[:, FULL],
    at_most=0.005,
  ),
  Claim(
    "resnet_integer",
    "8-bit integer inference, with one bound for all channels of a layer, costs less than a point",
    "Fashion-MNIST, widest network; test accuracy of W8A8 as trained less that of its integer form",
    lambda m: (m["resnet test"] - m["resnet integer_test"])[:, EIGHT, -1],
    at_most=0.01,
  ),
)
NOTES = (
  "bfloat16 means operands rounded to bfloat16 and sums in float32; the quantized networks compute in float32 on their"
  " grids. The claims on residual networks, and that on integer inference, are this library's own, set before the run;"
  " margins are those of the card's checks on perceptrons.",
  "Dominance is judged seed by seed at the worst width, which is stricter than on means over seeds. The widest bfloat16"
  " networks have no rival of their cost: the 4-bit ones of the grid cost less than half as much, so that there 4 bits"
  " at equal width must do.",
  "It is there that 4-bit residual networks fall behind. They train for 400 steps, about nine epochs, where the paper's"
  " take 250; that this is the reason is a guess.",
  "Reported, not gated: the loss of integer inference at 4 and 2 bits, whose training relied on bounds per channel;"
  " the curves of W8A8 and W2A2.",
)


def table(measurements: dict[str, np.ndarray]) -> list[dict]:
  """The study: every network's costs and size, and its accuracies, mean ± standard deviation over seeds."""
  names = {"resnet": "residual network", "mlp": "perceptron"}
  return [row for family, name in names.items() for row in _rows(measurements, family, name)]


def _rows(m, family, name):
  costs = {cost: m[f"{family} {cost}"][0] for cost in (*COSTS, "memory")}
  mean = m[f"{family} test"].mean(0)
  fronts = {cost: np.asarray(pareto_front(costs[cost].ravel(), mean.ravel())).reshape(mean.shape) for cost in COSTS}
  percent = lambda values: f"{100 * values.mean():.1f} ± {100 * values.std(ddof=1) if len(values) > 1 else 0:.1f}"
  for width, channels in enumerate(m[f"{family} widths"][0]):
    for precision, bits in enumerate(STUDY[: len(mean)]):
      at = (slice(None), precision, width)
      yield {
        "network": name,
        "width": int(channels),
        "precision": bits,
        **{f"{cost} cost": f"{costs[cost][at[1:]]:,.0f}" for cost in COSTS},
        "size, bits": f"{costs['memory'][at[1:]]:,.0f}",
        "training accuracy, %": percent(m[f"{family} train"][at]),
        "test accuracy, %": percent(m[f"{family} test"][at]),
        "integer inference, %": percent(m[f"{family} integer_test"][at]) if precision >= EIGHT else "",
        "on the front of": ", ".join(cost for cost in COSTS if fronts[cost][at[1:]]),
      }


def figure(measurements: dict[str, np.ndarray], path: pathlib.Path) -> None:
  """Test accuracy against both costs, the generalization gap by precision, and the loss of integer inference."""
  import matplotlib.pyplot as plt

  picture, axes = plt.subplots(2, 3, figsize=(14, 8), layout="constrained")
  for row, family in enumerate(("resnet", "mlp")):
    for place, cost in zip(axes[row], COSTS):
      _draw_curves(place, measurements, family, cost)
  _draw_gaps(axes[0, 2], measurements)
  _draw_integer(axes[1, 2], measurements)
  axes[1, 0].legend(frameon=False, fontsize=8, loc="lower right")
  picture.savefig(path, dpi=120)
  plt.close(picture)


def _draw_curves(place, m, family, cost):
  costs, test = m[f"{family} {cost}"][0], 100 * m[f"{family} test"]
  mean, deviation = test.mean(0), test.std(0)
  front = np.asarray(pareto_front(costs.ravel(), mean.ravel())).reshape(costs.shape)
  for index, name in enumerate(STUDY[: len(costs)]):
    place.errorbar(costs[index], mean[index], deviation[index], capsize=2, marker="o", markersize=3, label=name)
  place.plot(costs[front], mean[front], "o", markersize=9, markerfacecolor="none", color="k", label="Pareto front")
  title = {"resnet": "residual networks, Fashion-MNIST", "mlp": "perceptrons, digits"}[family]
  unit = "multiplications × bits × bits" if cost == "quadratic" else "multiplications × tier of bits"
  place.set(xscale="log", xlabel=f"{cost} cost ({unit})", ylabel="test accuracy, %", title=title)
  place.xaxis.set_minor_formatter("")


def _draw_gaps(place, m):
  for offset, family, label in ((-0.2, "resnet", "residual network"), (0.2, "few", "perceptron, few examples")):
    values = 100 * gap(m, family)
    _bars(place, np.arange(values.shape[1]) + offset, values, label)
  _name_precisions(place, STUDY, "training less test accuracy, points", "generalization gap, widest networks")


def _draw_integer(place, m):
  for offset, family, label in ((-0.2, "resnet", "residual network"), (0.2, "mlp", "perceptron")):
    values = 100 * (m[f"{family} test"] - m[f"{family} integer_test"])[:, EIGHT:, -1]
    _bars(place, np.arange(values.shape[1]) + offset, values, label)
  _name_precisions(place, STUDY[EIGHT:], "accuracy lost, points", "integer inference, one bound per layer")


def _bars(place, at, values, label):
  place.bar(at, values.mean(0), 0.36, alpha=0.7, label=label)
  place.plot(at[:, None] + np.zeros_like(values.T), values.T, "k.", markersize=3)


def _name_precisions(place, names, ylabel, title):
  place.axhline(0, color="k", linewidth=0.5)
  place.set(xticks=range(len(names)), xticklabels=[n.replace(", ", "\n") for n in names], ylabel=ylabel, title=title)
  place.tick_params(axis="x", labelsize=8)
  place.margins(y=0.25)
  place.legend(frameon=False, fontsize=8)
