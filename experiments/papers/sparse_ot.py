"""Sparsity-constrained transport: plans with k non-zeros per column, colour transfer, a router of experts.

In closed form: transport between two clouds of points for every k, and between the colours of two photographs. By
training: a mixture of experts with either of two routers, on image patches. The paper's own setting is a V-MoE B/32
with 32 experts, pre-trained on JFT-300M.
"""

import dataclasses
import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.optimize
import scipy.sparse

from experiments.harness import plots
from experiments.harness.claims import Claim
from experiments.harness.trials import Cell
from jaxreg.data import bundled
from jaxreg.layers.expert_router import SparseTransportRouter, expert_capacity
from jaxreg.solvers.sparse_transport import repair_sparse_transport, solve_sparse_transport
from jaxreg.training import Task, gradient_task

CARD = "41-sparse_ot"
ROUTERS = ("sparse_transport", "top_1")
COLOUR_SUPPORT, COLOUR_WEIGHT = 2, 0.1  # k, and the weight of quadratic regularization, of colour transfer
REPAIRS = (1, 2, 4, 8, 16)  # further non-zeros per column that a repair may use
ADDED = "added after the plan of the potential had 15 % of its mass in wrong rows, which the claims above do not see"


@dataclasses.dataclass(frozen=True)
class Config:
  """Transport between two clouds of points and two photographs' colours, and a mixture of experts.

  Attributes:
    points: points of either cloud.
    supports: numbers of non-zeros per column, k; the first is 1, the last `points`.
    solver_steps: Adam's steps on the semi-dual.
    colours: k-means colours of a photograph.
    pixels: pixels of a photograph that k-means sees.
    router: `sparse_transport` or `top_1`; what `run` and `sweep` train.
    dataset: `mnist_subset` or `digits`.
    sizes: images for training and test.
    patch: side of a patch, which is a token, in pixels.
    features: width of a token.
    experts: number of experts, each with one hidden layer of `2 * features`.
    group: images whose tokens are routed together.
    batch_size: images per step.
    steps: training steps.
  """

  points: int = 32
  supports: tuple[int, ...] = (1, 2, 4, 8, 32)
  solver_steps: int = 2000
  colours: int = 128
  pixels: int = 5000
  router: str = "sparse_transport"
  dataset: str = "mnist_subset"
  sizes: tuple[int, int] = (4000, 1000)
  patch: int = 7
  features: int = 32
  experts: int = 8
  group: int = 8
  batch_size: int = 64
  steps: int = 1500

  def __post_init__(self):
    if self.router not in ROUTERS:
      raise ValueError(f"router must be one of {', '.join(ROUTERS)}, got {self.router!r}.")
    if self.supports[0] != 1 or self.supports[-1] != self.points:
      raise ValueError(f"supports must go from 1 to {self.points}, got {self.supports}.")


PRESETS = {
  "smoke": Config(
    points=4, supports=(1, 4), solver_steps=200, colours=4, pixels=300, dataset="digits", sizes=(400, 100),
    patch=4, features=8, experts=4, group=4, batch_size=16, steps=10,
  ),
  "cpu": Config(),
}  # fmt: skip


class MixtureOfExperts(nn.Module):
  """A residual layer of experts on tokens `[groups, tokens, features]`; every expert sees all, the weights select.

  Attributes:
    experts: number of experts.
    router: `sparse_transport`, or `top_1`: every token goes to its best expert, however full that is.
  """

  experts: int
  router: str

  @nn.compact
  def __call__(self, tokens: jax.Array) -> jax.Array:
    features = tokens.shape[-1]
    if self.router == "sparse_transport":
      combine = SparseTransportRouter(self.experts, multiple_of=1, name="router")(tokens).combine
    else:
      scores = jax.nn.softmax(nn.Dense(self.experts, use_bias=False, name="router")(tokens))
      combine = scores * jax.nn.one_hot(scores.argmax(-1), self.experts)
    loads = jnp.sum(combine > 0, -2)
    capacity = expert_capacity(tokens.shape[-2], self.experts, multiple_of=1)
    self.sow("intermediates", "load", loads.max() / capacity)
    self.sow("intermediates", "overflow", jnp.mean(jnp.sum(nn.relu(loads - capacity), -1)) / tokens.shape[-2])
    self.sow("intermediates", "unserved", jnp.mean(combine.max(-1) == 0))
    kernel = nn.initializers.lecun_normal(batch_axis=0)
    enter = self.param("enter", kernel, (self.experts, features, 2 * features))
    leave = self.param("leave", kernel, (self.experts, 2 * features, features))
    outputs = jnp.einsum("gtef,efd->gted", nn.relu(jnp.einsum("gtd,edf->gtef", tokens, enter)), leave)
    return tokens + jnp.einsum("gted,gte->gtd", outputs, combine)


class PatchClassifier(nn.Module):
  """Patches as tokens, one mixture of experts, the mean over the tokens, a linear layer."""

  config: Config

  @nn.compact
  def __call__(self, images: jax.Array) -> jax.Array:
    config, count = self.config, images.shape[0]
    patch = (config.patch, config.patch)
    tokens = nn.Conv(config.features, patch, strides=patch)(images).reshape(count, -1, config.features)
    tokens = nn.relu(tokens + self.param("places", nn.initializers.normal(0.5), tokens.shape[1:]))
    group = math.gcd(count, config.group)
    routed = MixtureOfExperts(config.experts, config.router)(tokens.reshape(count // group, -1, config.features))
    return nn.Dense(10)(nn.relu(routed).reshape(count, -1, config.features).mean(1))


def task(config: Config) -> Task:
  """A mixture of experts on images; the hyperparameter is `learning_rate`."""
  images = bundled.mnist_subset() if config.dataset == "mnist_subset" else bundled.digits()
  train, test = bundled.split(images, sizes=config.sizes)
  model = PatchClassifier(config)

  def predict(params, extra, inputs):
    del extra
    return model.apply({"params": params}, inputs)

  def objective(params, extra, batch, context):
    del context
    losses = optax.softmax_cross_entropy_with_integer_labels(predict(params, extra, batch["x"]), batch["y"])
    return losses.mean(), (extra, {})

  def evaluate(params, extra, hparams):
    del extra, hparams
    logits, state = model.apply({"params": params}, test["x"], mutable="intermediates")
    sown = {name: value[0] for name, value in state["intermediates"]["MixtureOfExperts_0"].items() if name != "router"}
    return {"test_accuracy": jnp.mean(logits.argmax(-1) == test["y"]), **sown}

  return gradient_task(
    lambda key, hparams: (model.init(key, jnp.asarray(train["x"][:1]))["params"], {}),
    objective,
    lambda hparams: optax.adam(optax.cosine_decay_schedule(hparams["learning_rate"], config.steps)),
    data=train,
    batch_size=config.batch_size,
    hparams={"learning_rate": 3e-3},
    evaluate=evaluate,
    predict=predict,
    config=config,
  )


def cell(config: Config) -> Cell:
  """One run; learning rates vary."""
  points = {"learning_rate": np.array([1e-3, 3e-3, 1e-2])}
  return Cell(task(config), config.steps, points, log_every=max(config.steps // 10, 1))


def cells(config: Config, seeds) -> dict[str, Cell]:
  """Both routers."""
  del seeds
  return {router: cell(dataclasses.replace(config, router=router))._replace(points={}) for router in ROUTERS}


@functools.partial(jax.jit, static_argnames=("k", "steps"))
def solve(cost, a, b, *, k: int, steps: int, regularization=1.0):
  """All steps of Adam, with the card's schedule for costs of mean 1, on a batch of problems."""
  optimizer = optax.adam(optax.cosine_decay_schedule(0.05, steps))
  options = dict(regularization=regularization, steps=steps, tolerance=0.0, optimizer=optimizer)
  return solve_sparse_transport(cost, a, b, k=k, row_potential=jnp.zeros_like(a), **options)


@functools.partial(jax.jit, static_argnames=("k", "extra", "steps"))
def repair(cost, a, b, row_potential, *, k: int, extra: int, steps: int):
  """Plans with the rows' masses and a few more non-zeros in some columns, on a batch of problems."""
  options = dict(steps=steps, tolerance=1e-3)
  return repair_sparse_transport(cost, a, b, row_potential, k=k, extra=extra, **options)


def squared_distances(x: np.ndarray, y: np.ndarray) -> np.ndarray:
  """Between rows, divided by their mean."""
  cost = np.sum((x[..., :, None, :] - y[..., None, :, :]) ** 2, -1)
  return cost / cost.mean((-2, -1), keepdims=True)


def linear_program(cost: np.ndarray, a: np.ndarray, b: np.ndarray) -> float:
  """The value of transport without regularization."""
  eye, ones = scipy.sparse.eye_array, lambda size: np.ones((1, size))
  rows, columns = scipy.sparse.kron(eye(a.size), ones(b.size)), scipy.sparse.kron(ones(a.size), eye(b.size))
  marginals = scipy.sparse.vstack([rows, columns], format="csr")
  return scipy.optimize.linprog(cost.ravel(), A_eq=marginals, b_eq=np.concatenate([a, b])).fun


def measure(config: Config, seeds, trained) -> dict[str, np.ndarray]:
  """Interpolation in k and colour transfer, `[seeds, …]`."""
  del trained
  with jax.enable_x64(True):  # the values of large k differ by less than float32 resolves
    return {**_interpolation(config, seeds), **_colour_transfer(config, seeds)}


def _interpolation(config: Config, seeds) -> dict[str, np.ndarray]:
  """Values, non-zeros per column, residuals and iterations for every k, `[seeds, supports]`."""
  n = config.points
  clouds = [np.random.default_rng(seed).normal(size=(2, n, 2)) for seed in seeds]
  cost = squared_distances(*np.moveaxis([[x, 0.5 * y + 2.0] for x, y in clouds], 1, 0))
  uniform = np.full((len(seeds), n), 1 / n)
  rows, plans = [], []
  for k in config.supports:
    result = jax.device_get(solve(cost, uniform, uniform, k=k, steps=config.solver_steps))
    best = np.maximum(result.history.max(-1), result.value)
    reached = np.maximum.accumulate(result.history, -1) >= best[:, None] - 1e-3
    # Entries below rounding are no part of the support.
    support = np.count_nonzero(result.plan > 1e-9 / n, axis=-2)
    iterations = np.where(reached.any(-1), reached.argmax(-1), config.solver_steps)
    rows.append((best, support.mean(-1), support.max(-1), result.residual, iterations))
    plans.append(result.plan != 0)
  names = ("value", "support", "largest support", "residual", "iterations")
  measured = {f"k {name}": np.stack([row[index] for row in rows], -1) for index, name in enumerate(names)}
  assigned = [each[scipy.optimize.linear_sum_assignment(each)].mean() for each in cost]
  measured["assignment value"] = np.array(assigned) + 0.5 / n
  measured["k plans"] = np.stack(plans, 1)
  return measured


def _colour_transfer(config: Config, seeds) -> dict[str, np.ndarray]:
  """Fraction of non-zeros and transport cost relative to the linear program's, for k = 2 and for all colours."""
  problems = [_colours(config, seed) for seed in seeds]
  cost, a, b = (np.stack(parts) for parts in zip(*problems))
  optimum = np.array([linear_program(*problem) for problem in problems])
  measured = {}
  sparse = solve(cost, a, b, k=COLOUR_SUPPORT, steps=config.solver_steps)
  quadratic = solve(cost, a, b, k=config.colours, steps=config.solver_steps, regularization=COLOUR_WEIGHT)
  plans = {"sparse": sparse.plan, "quadratic": quadratic.plan}
  measured["colours repaired extra"], plans["repaired"] = _repaired(config, cost, a, b, sparse.row_potential)
  for name, plan in ((name, np.asarray(plan)) for name, plan in plans.items()):
    measured[f"colours {name} density"] = np.mean(plan > 0, (-2, -1))
    measured[f"colours {name} cost"] = np.sum(plan * cost, (-2, -1)) / optimum
    measured[f"colours {name} wrong mass"] = np.abs(plan.sum(-1) - a).sum(-1) / 2
  return measured


def _repaired(config: Config, cost, a, b, row_potential):
  """With the fewest further non-zeros per column that certify a plan: how many, `[seeds]`, and the plans."""
  counts = sorted({min(count, config.colours - COLOUR_SUPPORT) for count in REPAIRS})
  options = dict(k=COLOUR_SUPPORT, steps=config.solver_steps)
  found = [jax.device_get(repair(cost, a, b, row_potential, extra=count, **options)) for count in counts]
  certified = np.stack([result.certified for result in found[:-1]] + [np.ones(len(cost), bool)])
  first = certified.argmax(0)
  return np.array(counts)[first], np.stack([found[index].plan[seed] for seed, index in enumerate(first)])


def _colours(config: Config, seed: int):
  """Squared distances between the k-means colours of the two photographs, and the fractions of the pixels."""
  from sklearn.cluster import KMeans

  rng = np.random.default_rng(seed)
  centres, fractions = [], []
  for photograph in bundled.photographs():
    pixels = rng.choice(photograph.reshape(-1, 3), config.pixels, replace=False)
    clusters = KMeans(config.colours, n_init=1, random_state=seed).fit(pixels)
    centres.append(clusters.cluster_centers_.astype(np.float64))
    fractions.append(np.bincount(clusters.labels_, minlength=config.colours) / config.pixels)
  return squared_distances(*centres), *fractions


def summary(config: Config, trials) -> dict[str, np.ndarray]:
  """What was measured of plans, and of either router its accuracy and the tokens of its experts."""
  del config
  names = ("test_accuracy", "load", "overflow", "unserved")
  return trials.measured | {f"{router} {name}": trials[router].last(name)[0] for router in ROUTERS for name in names}


def claims(config: Config) -> tuple[Claim, ...]:
  """On the interpolation in k, on colour transfer, and on the routers."""
  ks, supports = np.array(config.supports), ", ".join(map(str, config.supports))
  middle = ks[len(ks) // 2]
  points = f"{config.points} points"
  colours = f"two photographs with {config.colours} colours each"
  images = f"{config.sizes[1]:,} test images, {config.experts} experts, {config.steps:,} steps"

  def iterations(summary, k):
    return summary["k iterations"][:, list(ks).index(k)].astype(float)

  def spread_beyond_support(summary):
    """The largest difference to the quadratic value among the k that its support does not exceed."""
    beyond = ks >= summary["k largest support"][:, -1:]
    return np.max(np.abs(summary["k value"] - summary["k value"][:, -1:]) * beyond, 1)

  return (
    Claim(
      "unregularized",
      "Sparsity-constrained transport with k = 1 is optimal transport without regularization",
      f"semi-dual maximum minus (assignment value + gamma / 2 |b|^2), absolute; {points}, float64",
      lambda s: np.abs(s["k value"][:, 0] - s["assignment value"]),
      at_most=1e-6,
    ),
    Claim(
      "cardinality",
      "No column of a sparsity-constrained plan has more than k non-zeros",
      f"largest excess over k = {supports}; {points}",
      lambda s: np.max(s["k largest support"] - ks, 1).clip(0).astype(float),
      at_most=0.0,
    ),
    Claim(
      "denser",
      "Sparsity-constrained plans grow denser with k",
      f"smallest increase of the mean number of non-zeros per column from one k to the next of {supports}; {points}",
      lambda s: np.min(np.diff(s["k support"], axis=1), 1),
      at_least=0.0,
    ),
    Claim(
      "monotone",
      "The value of sparsity-constrained transport falls with k",
      f"largest increase of the value from one k to the next of {supports}; {points}",
      lambda s: np.max(np.diff(s["k value"], axis=1), 1),
      at_most=1e-6,
    ),
    Claim(
      "quadratic",
      "The value of sparsity-constrained transport is that of quadratic regularization from the k on that exceeds the"
      " support of the quadratically regularized plan",
      f"largest difference to the value at k = {ks[-1]} among these k of {supports}; {points}",
      spread_beyond_support,
      at_most=1e-6,
    ),
    Claim(
      "smoother",
      "The semi-dual of sparsity-constrained transport is maximised faster with larger k",
      f"iterations to the best value within 1e-3, k = 1 over k = {middle}; {points}",
      lambda s: iterations(s, 1) / np.maximum(iterations(s, middle), 1),
      at_least=3.0,
    ),
    Claim(
      "colours_density",
      f"Colour transfer with k = {COLOUR_SUPPORT} has the sparsity asked for",
      f"fraction of non-zeros minus {COLOUR_SUPPORT} / {config.colours}; {colours}",
      lambda s: s["colours sparse density"] - COLOUR_SUPPORT / config.colours,
      at_most=0.0,
    ),
    Claim(
      "colours_denser",
      f"Colour transfer has denser plans with quadratic regularization than with k = {COLOUR_SUPPORT}",
      f"fraction of non-zeros, quadratic (gamma {COLOUR_WEIGHT:g}) minus k = {COLOUR_SUPPORT}; {colours}",
      lambda s: s["colours quadratic density"] - s["colours sparse density"],
      at_least=0.0,
    ),
    Claim(
      "colours_cost",
      f"Colour transfer with k = {COLOUR_SUPPORT} costs nearly as little as unregularized transport",
      f"relative difference of the transport cost to the linear program's; {colours}",
      lambda s: np.abs(s["colours sparse cost"] - 1),
      at_most=0.05,
    ),
    Claim(
      "colours_feasible",
      f"Colour transfer with k = {COLOUR_SUPPORT} has the rows' masses after a repair of its plan",
      "mass in wrong rows of the repaired plan, as a fraction of all; the fewest further non-zeros per column out of"
      f" {', '.join(map(str, REPAIRS))} that certify it; {colours}",
      lambda s: s["colours repaired wrong mass"],
      at_most=1e-3,
      amended=ADDED,
    ),
    Claim(
      "colours_repaired_cost",
      f"Repaired plans of colour transfer with k = {COLOUR_SUPPORT} cost nearly as little as unregularized transport",
      f"relative difference of the repaired plan's transport cost to the linear program's; {colours}",
      lambda s: np.abs(s["colours repaired cost"] - 1),
      at_most=0.05,
      amended=ADDED,
    ),
    Claim(
      "colours_repaired_density",
      f"Repaired plans of colour transfer with k = {COLOUR_SUPPORT} stay sparser than quadratic regularization",
      f"fraction of non-zeros, repaired over quadratic (gamma {COLOUR_WEIGHT:g}); {colours}",
      lambda s: s["colours repaired density"] / s["colours quadratic density"],
      at_most=1.0,
      amended=ADDED,
    ),
    Claim(
      "balanced",
      "The sparse-transport router never gives an expert more tokens than its capacity",
      f"tokens of the fullest expert over the capacity; {images}",
      lambda s: s["sparse_transport load"],
      at_most=1.0,
    ),
    Claim(
      "overflow",
      "The top-1 router without auxiliary loss gives experts more tokens than their capacity",
      f"fraction of the tokens beyond the experts' capacity; {images}",
      lambda s: s["top_1 overflow"],
      at_least=0.1,
    ),
    Claim(
      "accuracy",
      "The balance of the sparse-transport router costs no accuracy against the top-1 router",
      f"test accuracy, sparse transport minus top-1 (whose overflow is served all the same); {images}",
      lambda s: s["sparse_transport test_accuracy"] - s["top_1 test_accuracy"],
      at_least=-0.01,
    ),
  )


NOTES = (
  "Where the maximum of the semi-dual is at a kink, no potential gives a plan with the right rows: the residual (second"
  " panel) and the fraction of the colours' mass in wrong rows (fifth panel) say how far it is from one. A repaired"
  " plan keeps the k + extra best rows of every column and solves transport with a squared 2-norm on them; the fifth"
  " panel shows its non-zeros, its cost, its wrong mass, and the extra it needed. Plans of generic masses have at least"
  " rows + columns - 1, so that k = 2 in every column leaves no choice. The quadratic plans have gamma"
  " 0.1, the others gamma 1, which spreads more.",
  "Top-1 is given every token that it wants; an implementation with a buffer would drop its overflow. Tokens that no"
  " expert of the sparse-transport router takes pass through the residual connection.",
)


def figure(config: Config, summary, path) -> None:
  """Value, support and iterations against k; plans; tokens per expert and accuracy of the routers."""
  picture, axes = plots.panels(6)
  ks = config.supports
  named = {"value": "value", "support": "non-zeros per column", "iterations": "iterations to within 1e-3"}
  for axis, (name, label) in zip(axes, named.items()):
    plots.curves(axis, ks, {label: summary[f"k {name}"]}, marker=".")
    axis.set_xscale("log", base=2)
    axis.set(xlabel="k", ylabel=label, xticks=ks, xticklabels=ks)
  axes[0].axhline(summary["assignment value"][0], color="k", linestyle=":", label="unregularized, first seed")
  axes[0].legend(frameon=False, fontsize=8)
  twin = axes[1].twinx()
  plots.curves(twin, ks, {"residual": summary["k residual"]}, color="C3", linestyle="--")
  twin.set_ylabel("residual of the rows", color="C3")
  axes[2].set_yscale("log")
  plans, shown = summary["k plans"][0], (0, len(ks) // 2, -1)
  axes[3].imshow(np.hstack([plans[index] for index in shown]), cmap="Greys", aspect="auto")
  title = f"non-zeros of the plans, k = {', '.join(str(ks[index]) for index in shown)}"
  axes[3].set(xticks=[], yticks=[], title=title, xlabel="columns")
  bars = {
    f"{label}\n{plan}": summary[f"colours {name} {metric}"] * factor
    for metric, label, factor in (("density", "non-zeros", config.colours), ("cost", "cost / LP", 1))
    for name, plan in (("sparse", f"k = {COLOUR_SUPPORT}"), ("repaired", "repaired"), ("quadratic", "quadratic"))
  }
  bars |= {
    f"wrong mass\n{plan}": summary[f"colours {name} wrong mass"]
    for name, plan in (("sparse", f"k = {COLOUR_SUPPORT}"), ("repaired", "repaired"))
  }
  plots.bars(axes[4], bars | {"extra": summary["colours repaired extra"].astype(float)})
  axes[4].set(title="colour transfer (non-zeros per column)")
  bars = {
    f"{label}\n{router.replace('_', ' ').replace('sparse ', '')}": summary[f"{router} {name}"]
    for name, label in (("test_accuracy", "accuracy"), ("load", "fullest"), ("unserved", "unserved"))
    for router in ROUTERS
  }
  plots.bars(axes[5], bars)
  axes[5].set(title="routers (fullest expert / capacity)")
  for axis in axes[4:]:
    axis.tick_params(axis="x", labelsize=6)
  plots.save(picture, path)
