"""Solver heuristics: a neural ODE that a solver's own error estimates make cheap to solve.

The card's larger settings are MNIST (784 inputs, batch 512, 75 epochs, tolerance 1.4e-8 in float64) and the latent ODE
of PhysioNet.
"""

import dataclasses
import pathlib
import time

import diffrax
import jax
import jax.numpy as jnp
import lineax
import numpy as np
import optax

from experiments.claims import Claim
from jaxreg.data import bundled
from jaxreg.models import MLP
from jaxreg.solvers.solver_cost import solve_with_cost, stability_size
from jaxreg.solvers.taylor_regularization import solution_derivative
from jaxreg.training import Task, grid

CARD = "25-ode_heuristics"
REGULARIZERS = ("none", "error", "stiffness", "steer", "taylor")
ADJOINTS = {"checkpoint": diffrax.RecursiveCheckpointAdjoint, "direct": diffrax.DirectAdjoint}
# name -> (regularizer, its weight at the start and at the end of training)
VARIANTS = {
  "vanilla": ("none", 0.0, 0.0),
  "error": ("error", 1.0, 0.1),
  "stiffness": ("stiffness", 0.1, 0.1),
  "STEER": ("steer", 0.0, 0.0),
  "Taylor 0.01": ("taylor", 0.01, 0.01),
  "Taylor 0.1": ("taylor", 0.1, 0.1),
}


@dataclasses.dataclass(frozen=True)
class Config:
  """A classifier of digits whose only nonlinear part is an ODE from time 0 to 1.

  Attributes:
    regularizer: `none`; `error` (sum of scaled errors times step sizes); `stiffness` (sum of stiffness estimates over
      the stability size); `steer` (a random end time within `end_range` of 1); `taylor` (the integral of the mean
      square of the solution's derivative of order `derivative`).
    hidden: width of the vector field's hidden layer.
    tolerance: relative and absolute, of the solver; in float32 at least 1e-5.
    max_steps: bound of the solver's steps.
    train: number of training examples, of 1,797; the others are the test set, solved as one batch.
    batch_size: examples per step.
    steps: training steps.
    parts: evaluations of `measure` along the training.
    learning_rate: Adam's.
    derivative: order of the derivative that `taylor` penalizes.
    end_range: half the width of the range of `steer`.
    adjoint: `checkpoint`, or `direct` for `pmap` and for sweeps with the `map` engine.
    variants: what `measure` compares.
    paths: paths of the spiral SDE in `measure`; 0 leaves it out.
  """

  regularizer: str = "error"
  hidden: int = 64
  tolerance: float = 1e-6
  max_steps: int = 64
  train: int = 1300
  batch_size: int = 128
  steps: int = 300
  parts: int = 10
  learning_rate: float = 3e-3
  derivative: int = 3
  end_range: float = 0.5
  adjoint: str = "checkpoint"
  variants: tuple[str, ...] = tuple(VARIANTS)
  paths: int = 100

  def __post_init__(self):
    if self.regularizer not in REGULARIZERS:
      raise ValueError(f"regularizer must be one of {', '.join(REGULARIZERS)}, got {self.regularizer!r}.")
    if self.adjoint not in ADJOINTS:
      raise ValueError(f"adjoint must be one of {', '.join(ADJOINTS)}, got {self.adjoint!r}.")


PRESETS = {
  "smoke": Config(  # the direct adjoint compiles faster
    steps=6,
    parts=3,
    batch_size=16,
    tolerance=1e-3,
    max_steps=8,
    adjoint="direct",
    variants=("vanilla", "error"),
    paths=0,
  ),
  "cpu": Config(),
}


def penalty_weight(step, config: Config, start, end):
  """The weight in a step's epoch, from `start` in the first geometrically towards `end` after the last."""
  per_epoch = config.train // config.batch_size
  return start * (end / jnp.maximum(start, 1e-30)) ** ((step // per_epoch) / (config.steps / per_epoch))


def build(config: Config) -> Task:
  """Adam; hyperparameters are the penalty's weight at the start and at the end."""
  train, test = bundled.split(bundled.digits(), sizes=(config.train, 1797 - config.train))
  dtype = jnp.result_type(float)
  train, test = ({"x": part["x"].reshape(-1, 64).astype(dtype), "y": part["y"]} for part in (train, test))
  field, head = MLP((config.hidden, 64), activation=jnp.tanh), MLP((10,))
  # Below, error estimates in float32 would be rounding errors.
  tolerance = max(config.tolerance, 100 * float(jnp.finfo(dtype).eps))
  solver = diffrax.Tsit5()

  def vector_field(t, state, params):
    time = jnp.broadcast_to(jnp.asarray(t, state.dtype), (state.shape[0], 1))
    return jnp.tanh(field.apply({"params": params}, jnp.concatenate([state, time], axis=1)))

  def with_derivative(t, state, params):
    """Beside the solution the integral of its derivative's mean square."""
    values, _ = state
    derivative = solution_derivative(vector_field, t, values, params, order=config.derivative)
    return vector_field(t, values, params), jnp.mean(jnp.square(derivative))

  def setting(function, end, state, params):
    # Of the solution alone: what is integrated beside it shall not ask for steps.
    norm = lambda tree: jnp.sqrt(jnp.mean(jnp.square(jax.tree.leaves(tree)[0])))
    controller = diffrax.PIDController(rtol=tolerance, atol=tolerance, norm=norm)
    arguments = diffrax.ODETerm(function), solver, 0.0, end, None, state, params
    return arguments, {
      "stepsize_controller": controller,
      "max_steps": config.max_steps,
      "adjoint": ADJOINTS[config.adjoint](),
    }

  def solve(params, inputs, end=1.0):
    arguments, options = setting(vector_field, end, inputs, params["field"])
    return diffrax.diffeqsolve(*arguments, **options)

  def solve_and_penalty(params, inputs, key):
    """The final state, and what is added to the loss."""
    if config.regularizer in ("error", "stiffness"):
      arguments, options = setting(vector_field, 1.0, inputs, params["field"])
      solution, cost = solve_with_cost(*arguments, **options)
      size = stability_size(solver)
      return solution.ys[0], cost.error_sum if config.regularizer == "error" else cost.stiffness_sum / size
    if config.regularizer == "taylor":
      arguments, options = setting(with_derivative, 1.0, (inputs, jnp.zeros((), inputs.dtype)), params["field"])
      state, integral = diffrax.diffeqsolve(*arguments, **options).ys
      return state[0], integral[0]
    half = config.end_range if config.regularizer == "steer" else 0.0
    end = jax.random.uniform(key, (), inputs.dtype, 1 - half, 1 + half) if half else 1.0
    return solve(params, inputs, end).ys[0], jnp.zeros((), inputs.dtype)

  def init_params(key, hparams):
    del hparams
    one, two = jax.random.split(key)
    params = {
      "field": field.init(one, jnp.zeros((1, 65)))["params"],
      "head": head.init(two, jnp.zeros((1, 64)))["params"],
    }
    return jax.tree.map(lambda x: x.astype(dtype), params), {"step": jnp.int32(0)}

  def objective(params, extra, batch, key, hparams, axis_name):
    del axis_name
    state, penalty = solve_and_penalty(params, batch["x"], key)
    logits = head.apply({"params": params["head"]}, state)
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"]).mean()
    weight = penalty_weight(extra["step"], config, hparams["weight"], hparams["final_weight"])
    return loss + weight.astype(loss.dtype) * penalty, ({"step": extra["step"] + 1}, {"penalty": penalty})

  def predict(params, extra, inputs):
    del extra
    inputs = inputs.reshape(inputs.shape[0], -1).astype(params["head"]["Dense_0"]["kernel"].dtype)
    return head.apply({"params": params["head"]}, solve(params, inputs).ys[0])

  def evaluate(params, extra, hparams):
    del extra, hparams
    solution = solve(params, jnp.asarray(test["x"]))
    logits = head.apply({"params": params["head"]}, solution.ys[0])
    return {
      "test_accuracy": jnp.mean(logits.argmax(-1) == test["y"]),
      "test_loss": optax.softmax_cross_entropy_with_integer_labels(logits, test["y"]).mean(),
      # Six for each step, accepted or not, and one before the first.
      "evaluations": 6 * solution.stats["num_steps"] + 1,
    }

  start, end = next(weights for name, *weights in VARIANTS.values() if name == config.regularizer)
  return Task(
    init_params=init_params,
    objective=objective,
    optimizer=lambda hparams: optax.adam(config.learning_rate),
    data=train,
    batch_size=config.batch_size,
    hparams={"weight": start, "final_weight": end},
    evaluate_params=evaluate,
    predict=predict,
  )


def points(config: Config) -> dict[str, np.ndarray]:
  """Constant weights around the one of the claims."""
  return grid(weight=[0.1, 1.0, 10.0], final_weight=[0.1])


def run_options(config: Config) -> dict[str, int]:
  """Length of one run."""
  every = config.steps // config.parts
  return {"steps": config.steps, "log_every": every, "eval_every": every}


def measure(config: Config, seeds: list[int]) -> dict[str, np.ndarray]:
  """Of every variant, `[seeds]`: evaluations, test loss and accuracy, milliseconds of a training step and a prediction.

  Programs are compiled before anything is timed, and the variants take turns. A training step is timed over the last
  third of the training, a prediction is the median of many of the whole test set. `equal` is the unregularized model
  where, along its training, it first had the test loss that the one with regularized error ends with.
  """
  with jax.enable_x64(True):
    regularizers = dict.fromkeys(VARIANTS[name][0] for name in config.variants)
    tasks = {name: build(dataclasses.replace(config, regularizer=name)) for name in regularizers}
    programs = {name: _program(task, config.steps // config.parts) for name, task in tasks.items()}
    evaluate = jax.jit(lambda params: tasks["none"].evaluate_params(params, {}, {}))
    results = [_compare(config, tasks, programs, evaluate, seed) for seed in seeds]
  measured = {name: np.array([result[name] for result in results]) for name in results[0]}
  return measured | (_spiral(config, seeds) if config.paths else {})


def _program(task: Task, count: int):
  """`count` training steps on batches drawn afresh, compiled."""

  def run(state, key, hparams):
    def step(state, key):
      ids = jax.random.choice(key, len(task.data["y"]), (task.batch_size,), replace=False)
      batch = {name: jnp.asarray(values)[ids] for name, values in task.data.items()}
      return task.step(state, batch, hparams)[0], None

    return jax.lax.scan(step, state, jax.random.split(key, count))[0]

  hparams = {"weight": 0.0, "final_weight": 0.0}
  key = jax.random.key(0)
  return jax.jit(run).lower(task.init(key, hparams), key, hparams).compile()


def _compare(config: Config, tasks, programs, evaluate, seed: int) -> dict[str, float]:
  """All variants with one seed."""
  trained = {name: _train(config, tasks, programs, evaluate, VARIANTS[name], seed) for name in config.variants}
  timed = {name: run["params"][-1] for name, run in trained.items()}
  result = {}
  for name, run in trained.items():
    result |= {f"{name} {metric}": run[metric][-1] for metric in ("test_loss", "test_accuracy", "evaluations")}
    result[f"{name} training"] = run["training"]
  vanilla, aim = trained["vanilla"], trained["error"]["test_loss"][-1]
  reached = next((i for i, loss in enumerate(vanilla["test_loss"]) if loss <= aim), config.parts - 1)
  timed["equal"] = vanilla["params"][reached]
  result |= {f"equal {metric}": vanilla[metric][reached] for metric in ("test_loss", "evaluations")}
  return result | {f"{name} prediction": seconds for name, seconds in _time(evaluate, timed).items()}


def _train(config: Config, tasks, programs, evaluate, variant, seed: int) -> dict:
  """Parameters and metrics along the training of one variant, and milliseconds of a step in its last third."""
  regularizer, *weights = variant
  hparams = dict(zip(("weight", "final_weight"), weights))
  key = jax.random.key(seed)
  state = tasks[regularizer].init(key, hparams)
  run = {"params": [], "test_loss": [], "test_accuracy": [], "evaluations": []}
  seconds = []
  for part in jax.random.split(jax.random.fold_in(key, 1), config.parts):
    began = time.perf_counter()
    state = jax.block_until_ready(programs[regularizer](state, part, hparams))
    seconds.append(time.perf_counter() - began)
    run["params"].append(state.params)
    for name, value in jax.device_get(evaluate(state.params)).items():
      run[name].append(float(value))
  last = seconds[-max(config.parts // 3, 1) :]
  return run | {"training": 1000 * float(np.median(last)) / (config.steps // config.parts)}


def _time(evaluate, parameters: dict, repeats: int = 20) -> dict[str, float]:
  """Median milliseconds of a prediction with each of some parameters, which take turns."""
  times = {name: [] for name in parameters}
  for _ in range(repeats):
    for name, params in parameters.items():
      began = time.perf_counter()
      jax.block_until_ready(evaluate(params))
      times[name].append(1000 * (time.perf_counter() - began))
  return {name: float(np.median(values)) for name, values in times.items()}


def _spiral(config: Config, seeds: list[int], steps: int = 250) -> dict[str, np.ndarray]:
  """A neural SDE of a noisy spiral, without and with the error's penalty: loss and drift evaluations, `[seeds]`."""
  times = np.linspace(0, 1, 31)[1:]
  means, variances = _spiral_moments(times)
  drift, diffusion = MLP((50, 2), activation=jnp.tanh), MLP((2,))
  # The learnt drift is that of the Stratonovich equation, which SPaRK solves.
  vector_field = lambda t, y, params: drift.apply({"params": params["drift"]}, y**3)
  noise = lambda t, y, params: lineax.DiagonalLinearOperator(diffusion.apply({"params": params["diffusion"]}, y))
  controller = diffrax.PIDController(rtol=0.3, atol=0.3, pcoeff=0.1, icoeff=0.3, dtmin=1e-3)

  def losses(params, key):
    path = diffrax.VirtualBrownianTree(0.0, 1.0, 5e-4, (config.paths, 2), key, diffrax.SpaceTimeLevyArea)
    terms = diffrax.MultiTerm(diffrax.ODETerm(vector_field), diffrax.ControlTerm(noise, path))
    start = jnp.tile(jnp.array([2.0, 0.0]), (config.paths, 1))
    solution, cost = solve_with_cost(
      terms, diffrax.SPaRK(), 0.0, 1.0, 0.05, start, params,
      saveat=diffrax.SaveAt(ts=times), stepsize_controller=controller, max_steps=256,
    )  # fmt: skip
    loss = jnp.mean((solution.ys.mean(1) - means) ** 2) + jnp.mean((solution.ys.var(1) - variances) ** 2)
    return loss, cost.error_sum, 3 * solution.stats["num_steps"]  # three stages

  optimizer = optax.adabelief(0.01)

  @jax.jit
  def train(key, weight):
    one, two, three, four = jax.random.split(key, 4)
    params = {name: module.init(at, jnp.zeros((1, 2)))["params"]
              for name, module, at in (("drift", drift, one), ("diffusion", diffusion, two))}  # fmt: skip

    def penalized(params, key):
      loss, error, _ = losses(params, key)
      return loss + weight * error

    def step(carry, key):
      params, state = carry
      updates, state = optimizer.update(jax.grad(penalized)(params, key), state, params)
      return (optax.apply_updates(params, updates), state), None

    (params, _), _ = jax.lax.scan(step, (params, optimizer.init(params)), jax.random.split(three, steps))
    loss, _, evaluations = jax.lax.map(lambda key: losses(params, key), jax.random.split(four, 10))
    return loss.mean(), evaluations.astype(jnp.float32).mean()

  measured = {}
  for name, weight in (("vanilla", 0.0), ("error", 0.2)):
    results = np.array([jax.device_get(train(jax.random.key(seed), jnp.float32(weight))) for seed in seeds])
    measured |= {f"spiral {name} loss": results[:, 0], f"spiral {name} evaluations": results[:, 1]}
  return measured


def _spiral_moments(times: np.ndarray, paths: int = 5000, steps: int = 600) -> tuple[np.ndarray, np.ndarray]:
  """Means and variances `[times, 2]` of `dx = A x^3 dt + 0.2 x dW` (Ito) from (2, 0), by the Euler-Maruyama method."""
  random = np.random.default_rng(0)
  matrix = np.array([[-0.1, 2.0], [-2.0, -0.1]])
  x, moments = np.tile([2.0, 0.0], (paths, 1)), []
  for index in range(1, steps + 1):
    x = x + x**3 @ matrix.T / steps + 0.2 * x * random.normal(size=x.shape) / np.sqrt(steps)
    if index % (steps // len(times)) == 0:
      moments.append((x.mean(0), x.var(0)))
  return tuple(np.array(moments).swapaxes(0, 1))


def _ratio(metric: str, name: str, base: str = "vanilla"):
  return lambda m: m[f"{name} {metric}"] / m[f"{base} {metric}"]


_SETTING = "digits, Tsit5, tolerance 1e-6 in float64, 300 steps, weight 1 falling to 0.1"
CLAIMS = (
  Claim(
    "evaluations",
    "regularizing the solver's error estimate saves evaluations of the vector field",
    f"evaluations for the test set as one batch over the unregularized model's, {_SETTING}",
    _ratio("evaluations", "error"),
    at_most=0.7,
  ),
  Claim(
    "half_the_evaluations",
    "half of them, at equal test loss",
    "the same over the unregularized model's where its test loss first was the regularized one's final one",
    _ratio("evaluations", "error", "equal"),
    at_most=0.5,
  ),
  Claim(
    "half_the_time",
    "and half of the time of a prediction",
    "median time of the test set as one batch, over that of the unregularized model of equal test loss, in one run",
    _ratio("prediction", "error", "equal"),
    at_most=0.5,
  ),
  Claim(
    "accuracy",
    "at little loss of accuracy",
    "test accuracy of the unregularized model less the regularized one's",
    lambda m: m["vanilla test_accuracy"] - m["error test_accuracy"],
    at_most=0.02,
  ),
  Claim(
    "loss",
    "and no loss of likelihood",
    "test cross-entropy of the regularized model less the unregularized one's",
    lambda m: m["error test_loss"] - m["vanilla test_loss"],
    at_most=0.02,
  ),
  Claim(
    "training",
    "training is no slower",
    "median time of a step in the last 90 steps, over the unregularized model's in the same run",
    _ratio("training", "error"),
    at_most=1.05,
  ),
)
NOTES = (
  "Reported, not gated: STEER (end time uniform in [0.5, 1.5]), the stiffness estimate alone (constant weight 0.1 on"
  " its sum over the stability size), the mean square of the third derivative by Taylor mode (constant weights 0.01"
  " and 0.1), none of them tuned; and the spiral SDE, where the error's weight is 0.2.",
  "Equal test loss is a point of the unregularized model's own training, which goes on to a lower loss.",
)


def figure(measurements: dict[str, np.ndarray], path: pathlib.Path) -> None:
  """Test loss against evaluations; times relative to the unregularized model's; the spiral."""
  import matplotlib.pyplot as plt

  m = measurements
  names = [name.removesuffix(" training") for name in m if name.endswith(" training")]
  picture, (left, middle, right) = plt.subplots(1, 3, figsize=(13, 4), width_ratios=(3, 3, 2), layout="constrained")
  for index, name in enumerate(names):
    left.plot(m[f"{name} evaluations"], m[f"{name} test_loss"], "o", color=f"C{index}", label=name, alpha=0.7)
  left.set(xlabel="evaluations of the vector field", ylabel="test cross-entropy", title="digits, one marker per seed")
  left.legend(frameon=False, fontsize=8)
  left.grid(alpha=0.3)
  for offset, metric in ((-0.2, "training"), (0.2, "prediction")):
    values = np.stack([m[f"{name} {metric}"] / m[f"vanilla {metric}"] for name in names])
    places = np.arange(len(names)) + offset
    middle.bar(places, values.mean(1), 0.38, alpha=0.7, label=f"{metric} step" if offset < 0 else metric)
    middle.plot(places[:, None] + np.zeros_like(values), values, "k.", markersize=3)
  middle.axhline(1, color="k", linewidth=0.8)
  middle.set(xticks=range(len(names)), yscale="log", title="time over the unregularized model's")
  middle.set_xticklabels([name.replace(" ", "\n") for name in names], fontsize=8)
  middle.legend(frameon=False, fontsize=8)
  for index, name in enumerate(name for name in names if f"spiral {name} loss" in m):
    right.plot(m[f"spiral {name} evaluations"], m[f"spiral {name} loss"], "o", color=f"C{index}", label=name, alpha=0.7)
  right.set(xlabel="evaluations of the drift", ylabel="loss of the moments", title="spiral SDE")
  if right.lines:
    right.set_yscale("log")
    right.legend(frameon=False, fontsize=8)
  picture.savefig(path, dpi=120)
  plt.close(picture)
