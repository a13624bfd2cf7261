"""DCDM: conjugate directions proposed by a network that learned one operator, on Poisson problems.

The paper's own setting is the pressure of smoke on 64^3 to 256^3 grids, networks of 15 and 23 three-dimensional
convolutions, 10,000 Lanczos vectors and 20,000 right-hand sides; this recipe trains on 32^2 and on 16^3 grids, and
tests on grids of up to four times the side.
"""

import dataclasses
import functools
import math
import pathlib
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.harness.claims import Claim
from jaxreg.layers.loop_conv import loop_conv_general_dilated
from jaxreg.losses.scaled_residual import scaled_residual_loss
from jaxreg.models.direction_unet import DirectionUNet
from jaxreg.solvers.conjugate_directions import solve_conjugate_directions
from jaxreg.solvers.lanczos import lanczos_decomposition, ritz_pairs, ritz_right_hand_sides
from jaxreg.solvers.poisson import poisson_matvec
from jaxreg.training import Task, sweep

CARD = "39-dcdm"
KINDS = {"Gaussian": 5, "integrated noise": 3, "constant": 1, "point": 1}
ONE_EACH = dict.fromkeys(KINDS, 1)
METHODS = ("CG", "DCDM", "DCDM, not orthogonal", "CG, obstacle", "DCDM, obstacle")
PREFIXES = {2: "", 3: "3-D "}  # of the names of measurements, by dimension


@dataclasses.dataclass(frozen=True)
class Config:
  """Training on one grid; tests on it, on the same grid with an obstacle, and on larger grids.

  Attributes:
    dimensions: of the grid, 2 or 3.
    side: cells along each side of the square or cubic grid, even.
    obstacle: side of the square or cube of cells that is removed, in a test only.
    larger: sides of the larger grids, which only a test sees, in multiples of `side`.
    lanczos_vectors: m; theta, the number of low Ritz vectors beyond half that are emphasised, is m / 20.
    examples: right-hand sides to train on.
    channels: filters of every convolution.
    convolutions: with ReLU, before, on and after the coarse level.
    batch_size: right-hand sides per step.
    steps: training steps.
    tolerance: relative residual at which a solve ends.
    iterations: the most that a solve may take, on a larger grid as many times more as its side is longer.
  """

  dimensions: int = 2
  side: int = 32
  obstacle: int = 6
  larger: tuple[int, ...] = (2, 4)
  lanczos_vectors: int = 300
  examples: int = 4000
  channels: int = 16
  convolutions: tuple[int, int, int] = (4, 6, 4)
  batch_size: int = 10
  steps: int = 1500
  tolerance: float = 1e-4
  iterations: int = 200

  def __post_init__(self):
    if self.dimensions not in PREFIXES:
      raise ValueError(f"dimensions must be 2 or 3, got {self.dimensions}.")

  @property
  def grid(self) -> tuple[int, ...]:
    return (self.side,) * self.dimensions


PRESETS = {
  "smoke": Config(
    side=8,
    obstacle=2,
    larger=(2,),
    lanczos_vectors=20,
    examples=40,
    channels=4,
    convolutions=(2, 2, 2),
    batch_size=4,
    steps=10,
    iterations=30,
  ),
  "cpu": Config(),
}


def three_dimensional(config: Config) -> Config:
  """The three-dimensional comparison that goes with a two-dimensional one: small where that is."""
  if config.side < PRESETS["cpu"].side:
    return dataclasses.replace(config, dimensions=3, side=4, larger=())
  return dataclasses.replace(config, dimensions=3, side=16, obstacle=4, channels=8, steps=1000)


def training_set(config: Config) -> np.ndarray:
  """Right-hand sides from Ritz vectors of the grid without obstacle, `[examples, *grid]`."""
  return np.asarray(_training_set(config.grid, config.lanczos_vectors, config.examples))


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _training_set(grid: tuple[int, ...], vectors: int, examples: int) -> jax.Array:
  keys = jax.random.split(jax.random.key(0))
  start = poisson_matvec(jax.random.normal(keys[0], grid))
  pairs = ritz_pairs(lanczos_decomposition(poisson_matvec, start, steps=vectors))
  return ritz_right_hand_sides(keys[1], *pairs, count=examples, extra=vectors // 20)


def held_out_right_hand_sides(key: jax.Array, grid: tuple[int, ...], kinds: Mapping[str, int] = KINDS) -> jax.Array:
  """As many of each kind as `kinds` says, in its order, of norm 1, `[count, *grid]`."""
  keys, axes = jax.random.split(key, 3), tuple(range(1, len(grid) + 1))
  noise = jax.random.normal(keys[1], (kinds["integrated noise"], *grid))
  points = jax.random.randint(keys[2], (kinds["point"],), 0, math.prod(grid))
  sides = {
    "Gaussian": jax.random.normal(keys[0], (kinds["Gaussian"], *grid)),
    "integrated noise": functools.reduce(jnp.cumsum, axes, noise),
    "constant": jnp.ones((kinds["constant"], *grid)),
    "point": jax.nn.one_hot(points, math.prod(grid)).reshape(-1, *grid),
  }
  sides = jnp.concatenate([sides[kind] for kind in kinds])
  return sides / jnp.sqrt(jnp.sum(sides**2, axes, keepdims=True))


def build(config: Config) -> Task:
  """The network on the scaled residual; the hyperparameter is `learning_rate`. Solves are its evaluation."""
  model = network(config)

  def predict(params, extra, inputs):
    del extra
    return model.apply({"params": params}, inputs)

  def objective(params, extra, batch, key, hparams, axis_name):
    del key, hparams, axis_name
    return scaled_residual_loss(predict(params, {}, batch["x"]), batch["x"], matvec=poisson_matvec).mean(), (extra, {})

  def init_params(key, hparams):
    del hparams
    keys = jax.random.split(key)
    tests = {"test": held_out_right_hand_sides(keys[1], config.grid)}
    for times in config.larger:
      grid = tuple(times * size for size in config.grid)
      tests[f"test_{times}"] = held_out_right_hand_sides(jax.random.fold_in(key, times), grid, ONE_EACH)
    return model.init(keys[0], tests["test"][:1])["params"], tests

  def evaluate(params, extra, hparams):
    del hparams
    propose = lambda residual: predict(params, {}, residual[None])[0]
    sides, mask = extra["test"], _without_obstacle(config)
    masks = jnp.repeat(jnp.stack([jnp.ones_like(mask), mask]), len(sides), axis=0)
    metrics = {}
    for name, direction, orthogonalize in (
      ("CG", lambda residual: residual, 2),
      ("DCDM", propose, 2),
      ("DCDM, not orthogonal", propose, 0),
    ):
      result = _solves(config, jnp.concatenate([sides, sides]), masks, direction, orthogonalize)
      metrics |= _iterations(name, jax.tree.map(lambda leaf: leaf[: len(sides)], result))
      metrics |= _iterations(f"{name}, obstacle", jax.tree.map(lambda leaf: leaf[len(sides) :], result))
      for times in config.larger if orthogonalize else ():
        larger = extra[f"test_{times}"]
        result = _solves(config, larger, jnp.ones_like(larger, bool), direction, orthogonalize)
        metrics |= _iterations(f"{name}, side x {times}", result, ONE_EACH)
    metrics["one step"] = jnp.sqrt(
      scaled_residual_loss(predict(params, {}, extra["test"]), extra["test"], matvec=poisson_matvec)
    ).mean()
    return metrics

  return Task(
    init_params=init_params,
    objective=objective,
    optimizer=lambda hparams: optax.adam(optax.cosine_decay_schedule(hparams["learning_rate"], config.steps)),
    data={"x": training_set(config)},
    batch_size=config.batch_size,
    hparams={"learning_rate": 1e-3},
    evaluate_params=evaluate,
    predict=predict,
  )


def network(config: Config) -> DirectionUNet:
  """What proposes the directions."""
  before, coarse, after = config.convolutions
  counts = {"fine_before": before, "coarse": coarse, "fine_after": after}
  options = {"channels": config.channels, "conv_general_dilated": loop_conv_general_dilated}
  return DirectionUNet(dimensions=config.dimensions, **options, **counts)


def _without_obstacle(config: Config) -> jax.Array:
  """The cells of the grid that the obstacle in its middle leaves, `[*grid]`."""
  middle = slice((config.side - config.obstacle) // 2, (config.side + config.obstacle) // 2)
  return jnp.ones(config.grid, bool).at[(middle,) * config.dimensions].set(False)


def _solves(config: Config, sides: jax.Array, masks: jax.Array, direction: Callable, orthogonalize: int):
  """Results of all right-hand sides, each on the cells of its mask, one after another."""
  steps = config.iterations * sides.shape[-1] // config.side

  def solve(problem):
    b, mask = problem
    inside = lambda residual: jnp.where(mask, direction(residual), 0)  # the network knows of no obstacle
    options = dict(steps=steps, tolerance=config.tolerance, orthogonalize=orthogonalize)
    return solve_conjugate_directions(functools.partial(poisson_matvec, mask=mask), b, inside, **options)

  return jax.lax.map(solve, (jnp.where(masks, sides, 0), masks))


def _iterations(name: str, result, kinds: Mapping[str, int] = KINDS) -> dict[str, jax.Array]:
  """Median, mean and the mean of each kind, and the share that converged."""
  counts = result.iterations.astype(jnp.float32)
  metrics = {
    f"{name} median": jnp.median(counts),
    f"{name} mean": counts.mean(),
    f"{name} converged": result.converged.mean(),
  }
  ends = np.cumsum(list(kinds.values()))
  for kind, count, end in zip(kinds, kinds.values(), ends):
    metrics[f"{name} {kind}"] = counts[end - count : end].mean()
  return metrics


def points(config: Config) -> dict[str, np.ndarray]:
  """Learning rates."""
  del config
  return {"learning_rate": np.array([1e-4, 1e-3])}


def run_options(config: Config) -> dict[str, int]:
  """Length of one run."""
  return {"steps": config.steps, "log_every": max(config.steps // 15, 1), "eval_every": config.steps}


def measure(config: Config, seeds: list[int]) -> dict[str, np.ndarray]:
  """Iterations of every method, `[seeds]`, and the last step's training loss; those of three dimensions have a prefix.

  The sides of the grids, in multiples of the one of training, are `[seeds, grids]`.
  """
  measured = {}
  for part in (config, three_dimensional(config)):
    prefix = PREFIXES[part.dimensions]
    # Together, trials make convolutions with groups, which a CPU takes far longer for: not worth measuring.
    engine = "map" if jax.default_backend() == "cpu" else "auto"
    label = f"{prefix}direction network"
    result = sweep(build(part), {}, seeds=seeds, steps=part.steps, eval_every=part.steps, engine=engine, label=label)
    measured |= {prefix + name: result.by_point(name)[0, :, -1] for name in result.metrics}
    measured[f"{prefix}sides"] = np.tile((1, *part.larger), (len(seeds), 1))
  return measured


CLAIMS = (
  Claim(
    "fewer_iterations",
    "directions from a trained network need far fewer iterations than conjugate gradients",
    "median iterations to a relative residual of 1e-4 over those of CG; 32 x 32, ten right-hand sides",
    lambda m: m["DCDM median"] / m["CG median"],
    at_most=0.35,
  ),
  Claim(
    "orthogonalization",
    "and making them A-orthogonal to the last two helps",
    "mean iterations without orthogonalization less those with it",
    lambda m: m["DCDM, not orthogonal mean"] - m["DCDM mean"],
    at_least=0.0,
  ),
  Claim(
    "one_step",
    "one application of the network, without iterating, does not solve the system",
    "mean relative residual after one step of the best length",
    lambda m: m["one step"],
    at_least=1e-3,
  ),
  Claim(
    "obstacle_converges",
    "an obstacle that training has not seen does not break convergence",
    "share of right-hand sides that converge with a removed block of 6 x 6 cells",
    lambda m: m["DCDM, obstacle converged"],
    at_least=1.0,
  ),
  Claim(
    "obstacle_iterations",
    "and costs little of the gain",
    "mean iterations with the obstacle over those of CG with it",
    lambda m: m["DCDM, obstacle mean"] / m["CG, obstacle mean"],
    at_most=0.6,
  ),
  Claim(
    "fewer_iterations_3d",
    "in three dimensions, too, the directions need far fewer iterations than conjugate gradients",
    "median iterations to a relative residual of 1e-4 over those of CG; 16 x 16 x 16, ten right-hand sides",
    lambda m: m["3-D DCDM median"] / m["3-D CG median"],
    at_most=0.5,
  ),
  Claim(
    "obstacle_converges_3d",
    "and an unseen obstacle does not break convergence",
    "share of right-hand sides that converge with a removed cube of 4 x 4 x 4 cells",
    lambda m: m["3-D DCDM, obstacle converged"],
    at_least=1.0,
  ),
)
NOTES = (
  "Counted are iterations, not time: one of DCDM costs about fifteen convolutions more (`bench dcdm` has the times).",
  "Reported, not gated: iterations on empty grids of two and four times the side of training, with the same network and"
  " one right-hand side of each kind.",
  "In two dimensions the networks do not carry over to four times the side, where they need more iterations than CG on"
  " the mean (some solves may have ended at the limit of 800).",
  "In three dimensions the network has 8 channels and trains for 1,000 steps; the card's check is of two dimensions.",
)


def figure(measurements: dict[str, np.ndarray], path: pathlib.Path) -> None:
  """Iterations by method and kind of right-hand side, without and with the obstacle, and on larger grids."""
  import matplotlib.pyplot as plt

  picture, axes = plt.subplots(2, 3, figsize=(14, 7.4), layout="constrained")
  for row, (dimensions, prefix) in zip(axes, PREFIXES.items()):
    of_dimension = {name.removeprefix(prefix): v for name, v in measurements.items() if name.startswith(prefix)}
    _draw_kinds(row[0], of_dimension, METHODS[:3], f"{dimensions}-D, grid of training")
    _draw_kinds(row[1], of_dimension, METHODS[3:], f"{dimensions}-D, unseen obstacle")
    _draw_larger(row[2], of_dimension, f"{dimensions}-D, larger grids, mean of the kinds")
  picture.savefig(path, dpi=110)
  plt.close(picture)


def _draw_kinds(axis, m, names, title):
  width = 0.8 / len(names)
  for index, name in enumerate(names):
    values = np.stack([m[f"{name} {kind}"] for kind in KINDS])
    places = np.arange(len(KINDS)) + (index - (len(names) - 1) / 2) * width
    axis.bar(places, values.mean(1), 0.9 * width, alpha=0.7, label=name.replace(", obstacle", ""))
    axis.plot(places[:, None] + np.zeros_like(values), values, "k.", markersize=3)
  axis.set(xticks=range(len(KINDS)), title=title, ylabel="iterations to a relative residual of 1e-4")
  axis.set_xticklabels([kind.replace(" ", "\n") for kind in KINDS])
  axis.margins(y=0.2)
  axis.legend(frameon=False, loc="upper center", ncols=len(names))


def _draw_larger(axis, m, title):
  sides = m["sides"][0]
  for name in METHODS[:2]:
    grids = [name, *(f"{name}, side x {times}" for times in sides[1:])]
    values = np.stack([np.mean([m[f"{grid} {kind}"] for kind in KINDS], axis=0) for grid in grids])
    (line,) = axis.plot(sides, values.mean(1), "o-", label=name)
    axis.plot(sides, values, ".", color=line.get_color(), alpha=0.5, markersize=4)
  axis.set_xscale("log", base=2)
  axis.set(xticks=sides, xticklabels=[f"{times}" for times in sides], ylim=(0, None), title=title)
  axis.set(xlabel="side of the grid / side of training", ylabel="iterations to a relative residual of 1e-4")
  axis.legend(frameon=False)
