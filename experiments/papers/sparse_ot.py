"""Sparsity-constrained transport: plans with k non-zeros per column, colour transfer, a router of experts.

The paper's own setting is a V-MoE B/32 with 32 experts, pre-trained on JFT-300M; this recipe trains a small mixture of
experts on image patches.
"""

import dataclasses
import functools
import math
import pathlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.optimize
import scipy.sparse

from experiments.harness.claims import Claim
from jaxreg.data import bundled
from jaxreg.layers.expert_router import SparseTransportRouter, expert_capacity
from jaxreg.solvers.sparse_transport import solve_sparse_transport
from jaxreg.training import Task, sweep

CARD = "41-sparse_ot"
ROUTERS = ("sparse_transport", "top_1")


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


def build(config: Config) -> Task:
  """A mixture of experts on images; the hyperparameter is `learning_rate`."""
  images = bundled.mnist_subset() if config.dataset == "mnist_subset" else bundled.digits()
  train, test = bundled.split(images, sizes=config.sizes)
  model = PatchClassifier(config)

  def predict(params, extra, inputs):
    del extra
    return model.apply({"params": params}, inputs)

  def objective(params, extra, batch, key, hparams, axis_name):
    del key, hparams, axis_name
    losses = optax.softmax_cross_entropy_with_integer_labels(predict(params, extra, batch["x"]), batch["y"])
    return losses.mean(), (extra, {})

  def evaluate(params, extra, hparams):
    del extra, hparams
    logits, state = model.apply({"params": params}, test["x"], mutable="intermediates")
    sown = {name: value[0] for name, value in state["intermediates"]["MixtureOfExperts_0"].items() if name != "router"}
    return {"test_accuracy": jnp.mean(logits.argmax(-1) == test["y"]), **sown}

  return Task(
    init_params=lambda key, hparams: (model.init(key, jnp.asarray(train["x"][:1]))["params"], {}),
    objective=objective,
    optimizer=lambda hparams: optax.adam(optax.cosine_decay_schedule(hparams["learning_rate"], config.steps)),
    data=train,
    batch_size=config.batch_size,
    hparams={"learning_rate": 3e-3},
    evaluate_params=evaluate,
    predict=predict,
  )


def points(config: Config) -> dict[str, np.ndarray]:
  """Learning rates."""
  del config
  return {"learning_rate": np.array([1e-3, 3e-3, 1e-2])}


def run_options(config: Config) -> dict[str, int]:
  """Length of one run."""
  return {"steps": config.steps, "log_every": max(config.steps // 10, 1), "eval_every": config.steps}


@functools.partial(jax.jit, static_argnames=("k", "steps"))
def solve(cost, a, b, *, k: int, steps: int, regularization=1.0):
  """All steps of Adam, with the card's schedule for costs of mean 1, on a batch of problems."""
  optimizer = optax.adam(optax.cosine_decay_schedule(0.05, steps))
  options = dict(regularization=regularization, steps=steps, tolerance=0.0, optimizer=optimizer)
  return solve_sparse_transport(cost, a, b, k=k, **options)


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


def measure(config: Config, seeds: list[int]) -> dict[str, np.ndarray]:
  """Interpolation in k, colour transfer and the mixture of experts, `[seeds, …]`."""
  with jax.enable_x64(True):  # the values of large k differ by less than float32 resolves
    measured = {**_interpolation(config, seeds), **_colour_transfer(config, seeds)}
  for router in ROUTERS:
    task = build(dataclasses.replace(config, router=router))
    result = sweep(task, {}, seeds=seeds, steps=config.steps, eval_every=config.steps, label=router)
    for name in ("test_accuracy", "load", "overflow", "unserved"):
      measured[f"{router} {name}"] = result.by_point(name)[0, :, -1]
  return measured


def _interpolation(config: Config, seeds: list[int]) -> dict[str, np.ndarray]:
  """Values, non-zeros per column, residuals and iterations for every k, `[seeds, supports]`."""
  n = config.points
  clouds = [np.random.default_rng(seed).normal(size=(2, n, 2)) for seed in seeds]
  cost = squared_distances(*np.moveaxis([[x, 0.5 * y + 2.0] for x, y in clouds], 1, 0))
  uniform = np.full((len(seeds), n), 1 / n)
  rows = []
  for k in config.supports:
    result = jax.device_get(solve(cost, uniform, uniform, k=k, steps=config.solver_steps))
    best = np.maximum(result.history.max(-1), result.value)
    reached = np.maximum.accumulate(result.history, -1) >= best[:, None] - 1e-3
    # Entries below rounding are no part of the support.
    support = np.count_nonzero(result.plan > 1e-9 / n, axis=-2)
    iterations = np.where(reached.any(-1), reached.argmax(-1), config.solver_steps)
    rows.append((best, support.mean(-1), support.max(-1), result.residual, iterations, np.abs(result.plan)[0]))
  names = ("value", "support", "largest support", "residual", "iterations")
  measured = {f"k {name}": np.stack([row[index] for row in rows], -1) for index, name in enumerate(names)}
  assigned = [each[scipy.optimize.linear_sum_assignment(each)].mean() for each in cost]
  measured["k"] = np.tile(config.supports, (len(seeds), 1))
  measured["assignment value"] = np.array(assigned) + 0.5 / n
  measured["plans"] = np.tile(np.stack([row[-1] for row in rows]), (len(seeds), 1, 1, 1))
  return measured


def _colour_transfer(config: Config, seeds: list[int]) -> dict[str, np.ndarray]:
  """Share of non-zeros and transport cost relative to the linear program's, for k = 2 and for all colours."""
  problems = [_colours(config, seed) for seed in seeds]
  cost, a, b = (np.stack(parts) for parts in zip(*problems))
  optimum = np.array([linear_program(*problem) for problem in problems])
  measured = {}
  for name, k, regularization in (("sparse", 2, 1.0), ("quadratic", config.colours, 0.1)):
    result = solve(cost, a, b, k=k, steps=config.solver_steps, regularization=regularization)
    plan = np.asarray(result.plan)
    measured[f"colours {name} density"] = np.mean(plan > 0, (-2, -1))
    measured[f"colours {name} cost"] = np.sum(plan * cost, (-2, -1)) / optimum
    measured[f"colours {name} residual"] = np.asarray(result.residual)
    measured[f"colours {name} wrong mass"] = np.abs(plan.sum(-1) - a).sum(-1) / 2
  measured["colours"] = np.full(len(seeds), config.colours)
  return measured


def _colours(config: Config, seed: int):
  """Squared distances between the k-means colours of the two photographs, and the shares of the pixels."""
  from sklearn.cluster import KMeans

  rng = np.random.default_rng(seed)
  centres, shares = [], []
  for photograph in bundled.photographs():
    pixels = rng.choice(photograph.reshape(-1, 3), config.pixels, replace=False)
    clusters = KMeans(config.colours, n_init=1, random_state=seed).fit(pixels)
    centres.append(clusters.cluster_centers_.astype(np.float64))
    shares.append(np.bincount(clusters.labels_, minlength=config.colours) / config.pixels)
  return squared_distances(*centres), *shares


def _between(m, name: str, first: int, second: int) -> np.ndarray:
  """The ratio of two columns, by k."""
  at = lambda k: m[name][:, list(m["k"][0]).index(k)].astype(float)
  return at(first) / np.maximum(at(second), 1)


def _spread_beyond_support(m) -> np.ndarray:
  """The largest difference to the quadratic value among the k that its support does not exceed."""
  beyond = m["k"] >= m["k largest support"][:, -1:]
  return np.max(np.abs(m["k value"] - m["k value"][:, -1:]) * beyond, 1)


CLAIMS = (
  Claim(
    "unregularized",
    "k = 1 is optimal transport without regularization",
    "semi-dual maximum less (assignment value + gamma / 2 |b|^2), absolute; 32 points, float64",
    lambda m: np.abs(m["k value"][:, 0] - m["assignment value"]),
    at_most=1e-6,
  ),
  Claim(
    "cardinality",
    "no column has more than k non-zeros",
    "largest excess over k = 1, 2, 4, 8, 32",
    lambda m: np.max(m["k largest support"] - m["k"], 1).clip(0).astype(float),
    at_most=0.0,
  ),
  Claim(
    "denser",
    "plans grow denser with k",
    "smallest increase of the mean number of non-zeros per column from one k to the next",
    lambda m: np.min(np.diff(m["k support"], axis=1), 1),
    at_least=0.0,
  ),
  Claim(
    "monotone",
    "and the value falls",
    "largest increase of the value from one k to the next",
    lambda m: np.max(np.diff(m["k value"], axis=1), 1),
    at_most=1e-6,
  ),
  Claim(
    "quadratic",
    "until k exceeds the support of the quadratically regularized plan: from there it stays the same",
    "largest difference to the value at k = 32 among these k",
    _spread_beyond_support,
    at_most=1e-6,
  ),
  Claim(
    "smoother",
    "larger k converges faster",
    "iterations to the best value within 1e-3, k = 1 over k = 4",
    lambda m: _between(m, "k iterations", 1, 4),
    at_least=3.0,
  ),
  Claim(
    "colours_density",
    "colour transfer with k = 2 has the sparsity asked for",
    "share of non-zeros less 2 / 128, photographs with 128 colours",
    lambda m: m["colours sparse density"] - 2 / m["colours"],
    at_most=0.0,
  ),
  Claim(
    "colours_denser",
    "quadratic regularization has denser plans",
    "share of non-zeros, quadratic (gamma 0.1) less k = 2",
    lambda m: m["colours quadratic density"] - m["colours sparse density"],
    at_least=0.0,
  ),
  Claim(
    "colours_cost",
    "at nearly the cost of unregularized transport",
    "relative difference of the transport cost at k = 2 to the linear program's",
    lambda m: np.abs(m["colours sparse cost"] - 1),
    at_most=0.05,
  ),
  Claim(
    "balanced",
    "the sparse-transport router never gives an expert more tokens than its capacity",
    "tokens of the fullest expert over the capacity, test images, 8 experts",
    lambda m: m["sparse_transport load"],
    at_most=1.0,
  ),
  Claim(
    "overflow",
    "the top-1 router without auxiliary loss does",
    "share of the tokens beyond the experts' capacity",
    lambda m: m["top_1 overflow"],
    at_least=0.1,
  ),
  Claim(
    "accuracy",
    "balance costs no accuracy",
    "test accuracy, sparse transport less top-1 (whose overflow is served all the same)",
    lambda m: m["sparse_transport test_accuracy"] - m["top_1 test_accuracy"],
    at_least=-0.01,
  ),
)
NOTES = (
  "Where the maximum of the semi-dual is at a kink, no potential gives a plan with the right rows: the residual (top"
  " middle panel) and the share of the colours' mass in wrong rows (bottom middle) say how far it is from one.",
  "Top-1 is given every token that it wants; an implementation with a buffer would drop its overflow. Tokens that no"
  " expert of the sparse-transport router takes pass through the residual connection.",
)


def figure(measurements: dict[str, np.ndarray], path: pathlib.Path) -> None:
  """Value, support and iterations against k; plans; tokens per expert and accuracy of the routers."""
  import matplotlib.pyplot as plt

  m = measurements
  picture, axes = plt.subplots(2, 3, figsize=(12, 7), layout="constrained")
  ks = m["k"][0]
  for axis, name, label in zip(
    axes[0], ("k value", "k support", "k iterations"), ("value", "non-zeros per column", "iterations to within 1e-3")
  ):
    axis.semilogx(ks, m[name].T, ".-", color="C0", alpha=0.5, base=2)
    axis.set(xlabel="k", ylabel=label, xticks=ks, xticklabels=ks)
    axis.grid(alpha=0.3)
  axes[0, 0].axhline(m["assignment value"][0], color="k", linestyle=":", label="unregularized, first seed")
  axes[0, 0].legend(frameon=False, fontsize=8)
  twin = axes[0, 1].twinx()
  twin.semilogx(ks, m["k residual"].mean(0), "x--", color="C3", base=2)
  twin.set_ylabel("residual of the rows, mean over seeds", color="C3")
  twin.set(xticks=ks, xticklabels=ks)
  axes[0, 2].set_yscale("log")
  plans = m["plans"][0]
  axes[1, 0].imshow(np.hstack([plans[0], plans[len(ks) // 2], plans[-1]]) > 0, cmap="Greys", aspect="auto")
  axes[1, 0].set(
    xticks=[], yticks=[], title=f"non-zeros of the plans, k = {ks[0]}, {ks[len(ks) // 2]}, {ks[-1]}", xlabel="columns"
  )
  for index in (1, 2):
    axes[1, 0].axvline(index * plans.shape[-1] - 0.5, color="C0")
  count = m["colours"]
  bars = {
    "non-zeros\nk = 2": m["colours sparse density"] * count,
    "non-zeros\nquadratic": m["colours quadratic density"] * count,
    "cost / LP\nk = 2": m["colours sparse cost"],
    "cost / LP\nquadratic": m["colours quadratic cost"],
    "wrong mass\nk = 2": m["colours sparse wrong mass"],
  }
  _bars(axes[1, 1], bars, "colour transfer (non-zeros per column)")
  bars = {
    f"{label}\n{router.replace('_', ' ').replace('sparse ', '')}": m[f"{router} {name}"]
    for name, label in (("test_accuracy", "accuracy"), ("load", "fullest"), ("unserved", "unserved"))
    for router in ROUTERS
  }
  _bars(axes[1, 2], bars, "routers (fullest expert / capacity)")
  picture.savefig(path, dpi=120)
  plt.close(picture)


def _bars(axis, bars: dict[str, np.ndarray], title: str) -> None:
  """Means as bars with their values, seeds as dots."""
  values, places = np.stack(list(bars.values())), np.arange(len(bars))
  drawn = axis.bar(places, values.mean(1), 0.5, alpha=0.7)
  axis.bar_label(drawn, fmt="%.3g", padding=6, fontsize=8)
  axis.plot(places[:, None] + np.zeros_like(values), values, "k.", markersize=3)
  axis.set(xticks=places, title=title, ylim=(0, 1.15 * values.max()))
  axis.set_xticklabels(list(bars), fontsize=7)
