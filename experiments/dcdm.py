"""DCDM: conjugate directions proposed by a network that learned one operator, on Poisson problems.

The paper's own setting is the pressure of smoke on 64^3 to 256^3 grids, networks of 15 and 23 three-dimensional
convolutions, 10,000 Lanczos vectors and 20,000 right-hand sides; this recipe solves two-dimensional problems.
"""

import dataclasses
import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.claims import Claim
from jaxreg.losses.scaled_residual import scaled_residual_loss
from jaxreg.models.direction_unet import DirectionUNet
from jaxreg.solvers.conjugate_directions import solve_conjugate_directions
from jaxreg.solvers.lanczos import lanczos_decomposition, ritz_pairs, ritz_right_hand_sides
from jaxreg.solvers.poisson import poisson_matvec
from jaxreg.training import Task, sweep

CARD = "39-dcdm"
KINDS = {"Gaussian": 5, "integrated noise": 3, "constant": 1, "point": 1}
METHODS = ("CG", "DCDM", "DCDM, not orthogonal", "CG, obstacle", "DCDM, obstacle")


@dataclasses.dataclass(frozen=True)
class Config:
  """Training on one grid, tests on it and on the same grid with an obstacle.

  Attributes:
    side: cells along each side of the square grid, even.
    obstacle: side of the square of cells that is removed, in a test only.
    lanczos_vectors: m; theta, the number of low Ritz vectors beyond half that are emphasised, is m / 20.
    examples: right-hand sides to train on.
    channels: filters of every convolution.
    convolutions: with ReLU, before, on and after the coarse level.
    batch_size: right-hand sides per step.
    steps: training steps.
    tolerance: relative residual at which a solve ends.
    iterations: the most that a solve may take.
  """

  side: int = 32
  obstacle: int = 6
  lanczos_vectors: int = 300
  examples: int = 4000
  channels: int = 16
  convolutions: tuple[int, int, int] = (4, 6, 4)
  batch_size: int = 10
  steps: int = 1500
  tolerance: float = 1e-4
  iterations: int = 200


PRESETS = {
  "smoke": Config(
    side=8,
    obstacle=2,
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


def training_set(config: Config) -> np.ndarray:
  """Right-hand sides from Ritz vectors of the grid without obstacle, `[examples, side, side]`."""
  return np.asarray(_training_set(config.side, config.lanczos_vectors, config.examples))


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _training_set(side: int, vectors: int, examples: int) -> jax.Array:
  keys = jax.random.split(jax.random.key(0))
  start = poisson_matvec(jax.random.normal(keys[0], (side, side)))
  pairs = ritz_pairs(lanczos_decomposition(poisson_matvec, start, steps=vectors))
  return ritz_right_hand_sides(keys[1], *pairs, count=examples, extra=vectors // 20)


def held_out_right_hand_sides(key: jax.Array, side: int) -> jax.Array:
  """Those that `KINDS` counts, of norm 1, `[10, side, side]`."""
  keys = jax.random.split(key, 3)
  gaussian = jax.random.normal(keys[0], (KINDS["Gaussian"], side, side))
  noise = jax.random.normal(keys[1], (KINDS["integrated noise"], side, side))
  integrated = jnp.cumsum(jnp.cumsum(noise, 1), 2)
  point = jax.nn.one_hot(jax.random.randint(keys[2], (1,), 0, side * side), side * side).reshape(1, side, side)
  sides = jnp.concatenate([gaussian, integrated, jnp.ones((1, side, side)), point])
  return sides / jnp.sqrt(jnp.sum(sides**2, (1, 2), keepdims=True))


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
    sides = held_out_right_hand_sides(keys[1], config.side)
    return model.init(keys[0], sides[:1])["params"], {"test": sides}

  def evaluate(params, extra, hparams):
    del hparams
    propose = lambda residual: predict(params, {}, residual[None])[0]
    sides = extra["test"]
    metrics = {}
    for name, direction, orthogonalize in (
      ("CG", lambda residual: residual, 2),
      ("DCDM", propose, 2),
      ("DCDM, not orthogonal", propose, 0),
    ):
      result = _solves(config, sides, direction, orthogonalize)
      metrics |= _iterations(name, jax.tree.map(lambda leaf: leaf[: len(sides)], result))
      metrics |= _iterations(f"{name}, obstacle", jax.tree.map(lambda leaf: leaf[len(sides) :], result))
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
  return DirectionUNet(channels=config.channels, fine_before=before, coarse=coarse, fine_after=after)


def _solves(config: Config, sides: jax.Array, direction, orthogonalize: int):
  """Results of all right-hand sides on the grid of training, then on the grid with the obstacle."""
  middle = (slice((config.side - config.obstacle) // 2, (config.side + config.obstacle) // 2),) * 2
  whole = jnp.ones((config.side, config.side), bool)
  masks = jnp.repeat(jnp.stack([whole, whole.at[middle].set(False)]), len(sides), axis=0)

  def solve(problem):
    b, mask = problem
    inside = lambda residual: jnp.where(mask, direction(residual), 0)  # the network knows of no obstacle
    options = dict(steps=config.iterations, tolerance=config.tolerance, orthogonalize=orthogonalize)
    return solve_conjugate_directions(functools.partial(poisson_matvec, mask=mask), b, inside, **options)

  return jax.lax.map(solve, (jnp.where(masks, jnp.concatenate([sides, sides]), 0), masks))


def _iterations(name: str, result) -> dict[str, jax.Array]:
  """Median, mean and the mean of each kind, and the share that converged."""
  counts = result.iterations.astype(jnp.float32)
  metrics = {
    f"{name} median": jnp.median(counts),
    f"{name} mean": counts.mean(),
    f"{name} converged": result.converged.mean(),
  }
  ends = np.cumsum(list(KINDS.values()))
  for kind, count, end in zip(KINDS, KINDS.values(), ends):
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
  """Iterations of every method, `[seeds]`, and the last step's training loss."""
  result = sweep(build(config), {}, seeds=seeds, label="direction network", steps=config.steps, eval_every=config.steps)
  return {name: result.by_point(name)[0, :, -1] for name in result.metrics}


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
)
NOTES = (
  "Counted are iterations, not time: one of DCDM costs about fifteen convolutions more (`bench dcdm` has the times).",
)


def figure(measurements: dict[str, np.ndarray], path: pathlib.Path) -> None:
  """Iterations by method and kind of right-hand side, without and with the obstacle."""
  import matplotlib.pyplot as plt

  picture, axes = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
  for axis, names, title in ((axes[0], METHODS[:3], "grid of training"), (axes[1], METHODS[3:], "unseen obstacle")):
    width = 0.8 / len(names)
    for index, name in enumerate(names):
      values = np.stack([measurements[f"{name} {kind}"] for kind in KINDS])
      places = np.arange(len(KINDS)) + (index - (len(names) - 1) / 2) * width
      axis.bar(places, values.mean(1), 0.9 * width, alpha=0.7, label=name.replace(", obstacle", ""))
      axis.plot(places[:, None] + np.zeros_like(values), values, "k.", markersize=3)
    axis.set(xticks=range(len(KINDS)), title=title, ylabel="iterations to a relative residual of 1e-4")
    axis.set_xticklabels([kind.replace(" ", "\n") for kind in KINDS])
    axis.legend(frameon=False)
  picture.savefig(path, dpi=120)
  plt.close(picture)
