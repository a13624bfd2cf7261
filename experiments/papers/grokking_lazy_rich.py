"""Grokking as the transition from lazy to rich training: a committee machine learns a quadratic function."""

import dataclasses
import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.harness.claims import Claim
from jaxreg.kernels.committee import (
  CommitteeStatistics,
  committee,
  committee_initial_ntk,
  committee_ntk,
  committee_risk,
  committee_statistics,
)
from jaxreg.kernels.gradient_flow import kernel_regression
from jaxreg.kernels.lazy_rich_dmft import committee_dmft
from jaxreg.kernels.lazy_training import lazy_learning_rate
from jaxreg.metrics.lazy_rich import kernel_alignment, relative_motion
from jaxreg.training import Task, grid, sweep

CARD = "28-grokking_lazy_rich"
SCALES = (0.25, 1.0, 4.0, 16.0)
CURVATURES = (0.05, 0.25, 1.0)
BY_SCALE, BY_CURVATURE = "scale {:g} curvature 0.25", "scale 1 curvature {:g}"
# What a run keeps of its start and of its path.
TRACKED = (
  *("initial_train", "initial_test", "initial_linear", "initial_alignment"),
  *("fitted_at", "peak_test", "peak_linear", "kernel_error"),
)
# Mean-field theory and the networks laid over it.
THEORY = {"kappa": 2.0, "neurons": 2, "steps": 10}
DYNAMICS = {"output_scale": 1.0, "curvature": 0.5, "learning_rate": 0.15}


@dataclasses.dataclass(frozen=True)
class Config:
  """Full-batch gradient descent on the polynomial regression problem.

  Attributes:
    features: dimension D of the inputs, `N(0, I / D)`.
    neurons: width N.
    examples: size P of the training set, drawn anew for every seed like the teacher and the weights.
    held_out: inputs on which the kernel's alignment is measured.
    steps: steps of one run.
    early_steps: the steps that the figure shows in detail.
    few: a training set too small to generalise, in `measure`.
    many: one that generalises at once, in `measure`.
    dimensions: of the networks compared with mean-field theory.
    draws: networks per seed and dimension there.
    samples: Monte Carlo samples of the theory.
  """

  features: int = 50
  neurons: int = 100
  examples: int = 250
  held_out: int = 500
  steps: int = 30_000
  early_steps: int = 500
  few: int = 60
  many: int = 1000
  dimensions: tuple[int, ...] = (50, 200, 800)
  draws: int = 16
  samples: int = 4096

  @property
  def learning_rate(self) -> float:
    """0.3 of the largest stable step of the linear part of the kernel."""
    return 0.6 / (1 + (self.examples / self.features) ** 0.5) ** 2


PRESETS = {
  "smoke": Config(
    features=8, neurons=6, examples=20, held_out=30, steps=60, early_steps=20, few=20, many=20, dimensions=(20,),
    draws=2, samples=256,
  ),
  "cpu": Config(),
}  # fmt: skip


def build(config: Config) -> Task:
  """Gradient descent with step `eta N / a^2`.

  Hyperparameters are `output_scale`, `curvature`, `learning_rate`, and `centring`: the share of the initial network
  that is subtracted from the outputs, 1 for the centred network.
  """

  def init_params(key, hparams):
    options = {name: hparams[name] for name in ("output_scale", "curvature")}
    sizes = (config.examples, config.held_out, config.neurons)
    inputs, held_out, weights, teacher = _draw(key, config.features, sizes)
    outputs, targets = committee(weights, inputs, **options), _targets(inputs, teacher)
    offset = hparams["centring"] * outputs
    statistics = jax.tree.map(lambda leaf: (1 - hparams["centring"]) * leaf, committee_statistics(weights))
    terms = committee_risk(statistics, teacher, **options)
    extra = {
      **jax.tree.map(jnp.float32, {**options, "centring": hparams["centring"]}),
      "inputs": inputs,
      "targets": targets,
      "teacher": teacher,
      "held_out": held_out,
      "initial": weights,
      "offset": offset,
      "initial_train": jnp.mean((outputs - offset - targets) ** 2),
      "initial_test": sum(terms),
      "initial_linear": terms.linear,
      "initial_alignment": _alignment(weights, held_out, teacher, hparams["curvature"]),
      "step": jnp.float32(0),
      "fitted_at": jnp.float32(config.steps),
      "peak_test": jnp.float32(0),
      "peak_linear": jnp.float32(0),
      "kernel_error": _kernel_error(inputs, targets, teacher, hparams["curvature"]),
    }
    return weights, extra

  def risk(params, extra):
    now, before = committee_statistics(params), committee_statistics(extra["initial"])
    statistics = jax.tree.map(lambda a, b: a - extra["centring"] * b, now, before)
    return committee_risk(
      statistics, extra["teacher"], output_scale=extra["output_scale"], curvature=extra["curvature"]
    )

  def objective(params, extra, batch, key, hparams, axis_name):
    # The examples of a seed are in `extra`, drawn like its weights; `data` is only what `predict` is tried on.
    del batch, key, axis_name
    options = {name: hparams[name] for name in ("output_scale", "curvature")}
    errors = committee(params, extra["inputs"], **options) - extra["offset"] - extra["targets"]
    train, terms = jnp.mean(errors**2), risk(jax.lax.stop_gradient(params), extra)
    below, fitted = train < extra["initial_train"], train <= 0.1 * extra["initial_train"]
    peak = lambda name, value: jnp.where(below, jnp.maximum(extra[name], value), extra[name])
    extra = {
      **extra,
      "step": extra["step"] + 1,
      "fitted_at": jnp.where(fitted, jnp.minimum(extra["fitted_at"], extra["step"]), extra["fitted_at"]),
      "peak_test": peak("peak_test", sum(terms)),
      "peak_linear": peak("peak_linear", terms.linear),
    }
    return jnp.sum(errors**2) / 2, (jax.lax.stop_gradient(extra), {})

  def predict(params, extra, inputs):
    network = functools.partial(committee, output_scale=extra["output_scale"], curvature=extra["curvature"])
    return network(params, inputs) - extra["centring"] * network(extra["initial"], inputs)

  def evaluate(params, extra, hparams):
    del hparams
    terms = risk(params, extra)
    return {
      "train": jnp.mean((predict(params, extra, extra["inputs"]) - extra["targets"]) ** 2),
      "test": sum(terms),
      **terms._asdict(),
      "alignment": _alignment(params, extra["held_out"], extra["teacher"], extra["curvature"]),
      "motion": relative_motion(params, extra["initial"]),
      "norm": jnp.linalg.norm(params) / jnp.linalg.norm(extra["initial"]),
      **{name: extra[name] for name in TRACKED},
    }

  def optimizer(hparams):
    scale = hparams["output_scale"]
    return optax.sgd(lazy_learning_rate(hparams["learning_rate"], output_scale=scale) * config.neurons)

  examples = np.random.default_rng(0).normal(size=(config.examples, config.features)) / config.features**0.5
  return Task(
    init_params=init_params,
    objective=objective,
    optimizer=optimizer,
    data={"x": examples.astype(np.float32)},
    batch_size=None,
    hparams={"output_scale": 1.0, "curvature": 0.25, "learning_rate": config.learning_rate, "centring": 1.0},
    evaluate_params=evaluate,
    predict=predict,
  )


def _draw(key, features, sizes):
  """Training and further inputs from `N(0, I / D)`, standard normal weights, and a teacher of length `sqrt(D)`."""
  # One draw, because the generator compiles slowly.
  *inputs, weights, teacher = jnp.split(jax.random.normal(key, (sum(sizes) + 1, features)), np.cumsum(sizes))
  return *(x / features**0.5 for x in inputs), weights, teacher[0] * features**0.5 / jnp.linalg.norm(teacher)


def _targets(inputs, teacher):
  return jnp.matmul(inputs, teacher, precision="highest") ** 2 / 2


def _kernel_error(inputs, targets, teacher, curvature):
  """Population risk of regression with the wide network's initial kernel: its predictor is a quadratic form as well."""
  coefficients = kernel_regression(committee_initial_ntk(inputs, inputs, curvature=curvature), targets)
  moment = 2 * curvature * jnp.matmul(inputs.T * coefficients, inputs, precision="highest")
  statistics = CommitteeStatistics(jnp.matmul(inputs.T, coefficients, precision="highest"), moment)
  return sum(committee_risk(statistics, teacher, curvature=curvature))


def _alignment(weights, inputs, teacher, curvature):
  kernel = committee_ntk(inputs, inputs, committee_statistics(weights), curvature=curvature)
  return kernel_alignment(kernel, _targets(inputs, teacher))


def points(config: Config) -> dict[str, np.ndarray]:
  """Output scales × curvatures: laziness × alignment."""
  return grid(output_scale=SCALES, curvature=CURVATURES)


def run_options(config: Config) -> dict[str, int]:
  """Length of one run."""
  every = max(config.steps // 60, 1)
  return {"steps": config.steps, "log_every": every, "eval_every": every}


def measure(config: Config, seeds: list[int]) -> dict[str, np.ndarray]:
  """Losses, times and statistics of centred and uncentred networks, and their distance from mean-field theory."""
  by_scale = {BY_SCALE.format(scale): (scale, 0.25, 1.0) for scale in SCALES}
  by_curvature = {BY_CURVATURE.format(curvature): (1.0, curvature, 1.0) for curvature in CURVATURES}
  measured = _runs(config, {**by_scale, **by_curvature, "grokking": (2.0, 0.25, 0.0)}, seeds)
  for name, examples in (("few", config.few), ("many", config.many)):
    measured |= _runs(dataclasses.replace(config, examples=examples), {name: (0.5, 0.25, 0.0)}, seeds)
  return measured | _theory(config, seeds)


def _runs(config: Config, settings: dict[str, tuple[float, float, float]], seeds) -> dict[str, np.ndarray]:
  """Final metrics `[seeds]` and, for several settings, curves `[seeds, evaluations]` of each."""
  at = dict(zip(("output_scale", "curvature", "centring"), np.array(list(settings.values())).T))
  # One trial after another, so that the short sweep retraces the long one to the last bit.
  run = functools.partial(sweep, build(config), at, seeds=seeds, engine="map")
  every = run_options(config)["eval_every"]
  late = run(steps=config.steps, eval_every=every, label=f"P = {config.examples}")
  measured = {
    f"{setting} final {name}": late.by_point(name)[index, :, -1]
    for index, setting in enumerate(settings)
    for name in late.metrics
  }
  if len(settings) == 1:
    return measured
  early = run(steps=config.early_steps, eval_every=max(config.early_steps // 50, 1), label="the start in detail")
  after = late.steps > early.steps[-1]
  times = np.concatenate([[0], early.steps, late.steps[after]])
  for index, setting in enumerate(settings):
    measured[f"{setting} step"] = np.tile(times, (len(seeds), 1))
    for name in ("train", "test", "linear", "alignment"):
      start, first, rest = (
        result.by_point(key)[index] for result, key in ((late, f"initial_{name}"), (early, name), (late, name))
      )
      measured[f"{setting} {name}"] = np.concatenate([start[:, :1], first, rest[:, after]], 1)
  return measured


@functools.partial(jax.jit, static_argnames=("features", "draws"))
def simulate(seed, *, features: int, draws: int) -> jax.Array:
  """Losses `[2, steps + 1]` on training set and population, of networks of finite dimension, averaged over draws."""
  options = {name: DYNAMICS[name] for name in ("output_scale", "curvature")}
  neurons, examples = THEORY["neurons"], round(THEORY["kappa"] * features)
  step = lazy_learning_rate(DYNAMICS["learning_rate"], output_scale=options["output_scale"]) * neurons

  def draw(key):
    inputs, weights, teacher = _draw(key, features, (examples, neurons))
    targets = _targets(inputs, teacher)
    errors = lambda weights: committee(weights, inputs, **options) - targets

    def advance(weights, _):
      test = sum(committee_risk(committee_statistics(weights), teacher, **options))
      loss, gradient = jax.value_and_grad(lambda w: jnp.sum(errors(w) ** 2) / 2)(weights)
      return weights - step * gradient, jnp.stack([2 * loss / examples, test])

    return jax.lax.scan(advance, weights, None, length=THEORY["steps"] + 1)[1].T

  return jnp.mean(jax.lax.map(draw, jax.random.split(jax.random.key(seed), draws)), axis=0)


def _theory(config: Config, seeds: list[int]) -> dict[str, np.ndarray]:
  """The losses of theory and networks, `[seeds, steps + 1]`, and the largest relative difference at each dimension."""
  solution = committee_dmft(jax.random.key(0), samples=config.samples, **THEORY, **DYNAMICS)
  theory = np.stack([solution.train_loss, solution.test_loss])
  measured = {}
  for index, name in enumerate(("train", "test")):
    measured[f"theory {name}"] = np.tile(theory[index], (len(seeds), 1))
  gaps = []
  for features in config.dimensions:
    networks = np.stack([simulate(seed, features=features, draws=config.draws) for seed in seeds])
    gaps.append(np.abs(networks / theory - 1).max((1, 2)))
    for index, name in enumerate(("train", "test")):
      measured[f"dimension {features} {name}"] = networks[:, index]
  return measured | {"theory gap": np.stack(gaps, 1)}


def _along(name: str, values, form: str):
  """The changes of a final value between neighbouring settings: `[settings - 1, seeds]`."""
  return lambda m: np.diff(np.stack([m[f"{form.format(value)} final {name}"] for value in values]), axis=0)


SETTING = "D = 50, N = 100, 30,000 steps"


def _claim(name, sentence, measured, value, **bound):
  return Claim(name, sentence, f"{measured}; {SETTING}", value, **bound)


CLAIMS = (
  _claim(
    "fit_scale",
    "the lazier, the later the training set is fitted",
    "smallest change of the first step with 10 % of the initial training loss, output scales 0.25, 1, 4, 16,"
    " curvature 0.25, P = 250, centred",
    lambda m: _along("fitted_at", SCALES, BY_SCALE)(m).min(0),
    at_least=0.0,
  ),
  _claim(
    "test_scale",
    "and the worse the network generalises in the end",
    "smallest change of the final population loss between the same scales",
    lambda m: _along("test", SCALES, BY_SCALE)(m).min(0),
    at_least=0.0,
  ),
  _claim(
    "rich",
    "a rich network learns the function",
    "final population loss at scale 0.25",
    lambda m: m["scale 0.25 curvature 0.25 final test"],
    at_most=0.05,
  ),
  _claim(
    "lazy",
    "a lazy one hardly beats its initial kernel",
    "final population loss at scale 16 relative to kernel regression with the wide network's initial kernel",
    lambda m: m["scale 16 curvature 0.25 final test"] / m["scale 16 curvature 0.25 final kernel_error"],
    at_least=0.7,
  ),
  _claim(
    "motion",
    "and moves its weights less",
    "largest change of the relative distance from initialisation between the same scales",
    lambda m: _along("motion", SCALES, BY_SCALE)(m).max(0),
    at_most=0.0,
  ),
  _claim(
    "fit_curvature",
    "the better the initial kernel is aligned with the task, the sooner the training set is fitted",
    "largest change of the first step with 10 % of the initial training loss, curvatures 0.05, 0.25, 1, scale 1,"
    " P = 250, centred",
    lambda m: _along("fitted_at", CURVATURES, BY_CURVATURE)(m).max(0),
    at_most=0.0,
  ),
  _claim(
    "test_curvature",
    "but the worse the network generalises in the end",
    "smallest change of the final population loss between the same curvatures",
    lambda m: _along("test", CURVATURES, BY_CURVATURE)(m).min(0),
    at_least=0.0,
  ),
  _claim(
    "alignment",
    "curvature is alignment",
    "smallest change of the initial kernel's alignment on 500 held-out inputs between the same curvatures",
    lambda m: _along("initial_alignment", CURVATURES, BY_CURVATURE)(m).min(0),
    at_least=0.0,
  ),
  _claim(
    "overfits_first",
    "grokking: the population loss first rises while the training loss falls",
    "largest population loss while the training loss is below its start, relative to its start, scale 2,"
    " curvature 0.25, P = 250, not centred",
    lambda m: m["grokking final peak_test"] / m["grokking final initial_test"],
    at_least=1.1,
  ),
  _claim(
    "linear_rises",
    "because power goes into linear functions",
    "largest linear term of the population loss in the same runs",
    lambda m: m["grokking final peak_linear"],
    at_least=0.1,
  ),
  _claim(
    "linear_ends",
    "which later vanish",
    "the linear term at the end",
    lambda m: m["grokking final linear"],
    at_most=0.01,
  ),
  _claim(
    "generalises",
    "and the network generalises in the end",
    "population loss at the end",
    lambda m: m["grokking final test"],
    at_most=0.02,
  ),
  _claim(
    "norm_grows",
    "with weights larger than at the start, so that no decay of weights explains it",
    "norm of the weights at the end relative to the start",
    lambda m: m["grokking final norm"],
    at_least=1.0,
  ),
  _claim(
    "few",
    "with few examples it never generalises",
    "final population loss, P = 60, scale 0.5, curvature 0.25, not centred",
    lambda m: m["few final test"],
    at_least=0.5,
  ),
  _claim(
    "many_never_worse",
    "with many it does so at once",
    "largest population loss while the training loss is below its start, relative to its start, P = 1,000, same scale",
    lambda m: m["many final peak_test"] / m["many final initial_test"],
    at_most=1.0,
  ),
  _claim(
    "many_generalises",
    "and perfectly",
    "final population loss in the same runs",
    lambda m: m["many final test"],
    at_most=0.001,
  ),
  Claim(
    "theory",
    "networks follow the mean-field theory",
    "largest relative difference of training and population loss over ten steps, mean of 16 networks with D = 800;"
    " kappa 2, N = 2, scale 1, curvature 0.5",
    lambda m: m["theory gap"][:, -1],
    at_most=0.05,
  ),
)
NOTES = (
  "The claim on mean-field theory is this library's, with equations derived for it; the others are the card's.",
  "The first steps in the figure come from a second, shorter sweep of the same seeds, which retraces the long one.",
)


def figure(measurements: dict[str, np.ndarray], path: pathlib.Path) -> None:
  """Grokking of one setting, the population loss along scales and curvatures, and theory against networks."""
  import matplotlib.pyplot as plt

  m = measurements
  picture, axes = plt.subplots(2, 2, figsize=(11, 8), layout="constrained")
  _draw_grokking(axes[0, 0], m)
  for axis, values, form, name in (
    (axes[0, 1], SCALES, BY_SCALE, "output scale"),
    (axes[1, 0], CURVATURES, BY_CURVATURE, "curvature"),
  ):
    for index, value in enumerate(values):
      key = form.format(value)
      _draw_curves(axis, m[f"{key} step"], m[f"{key} test"], f"C{index}", f"{name} {value:g}")
      _draw_curves(axis, m[f"{key} step"], m[f"{key} train"], f"C{index}", None, linestyle=":")
    axis.set(title=f"{name}: population (solid) and training loss (dotted)", ylim=(1e-4, 2))
  _draw_theory(axes[1, 1], m)
  picture.savefig(path, dpi=120)
  plt.close(picture)


def _draw_curves(axis, steps, values, color, label, linestyle="-") -> None:
  axis.plot(steps[0], values.mean(0), color=color, label=label, linestyle=linestyle)
  axis.fill_between(steps[0], values.min(0), values.max(0), color=color, alpha=0.15, linewidth=0)
  axis.set(xscale="symlog", yscale="log", xlabel="step")
  axis.set_xlim(left=0)
  axis.legend(frameon=False, fontsize=8, loc="lower left")


def _draw_grokking(axis, m) -> None:
  for index, (name, label) in enumerate(
    (("train", "training loss"), ("test", "population loss"), ("linear", "its linear term"))
  ):
    _draw_curves(axis, m["grokking step"], m[f"grokking {name}"], f"C{index}", label)
  _draw_curves(axis, m["grokking step"], m["grokking alignment"], "C3", "alignment of the kernel")
  axis.set(title="grokking: scale 2, not centred (mean and range of seeds)", ylim=(1e-4, 2))


def _draw_theory(axis, m) -> None:
  dimensions = sorted(int(name.split()[1]) for name in m if name.startswith("dimension") and name.endswith("test"))
  for color, name, label in (("C0", "train", "training"), ("C1", "test", "population")):
    steps = np.arange(m[f"theory {name}"].shape[1])
    axis.plot(steps, m[f"theory {name}"][0], color=color, label=f"{label} loss, theory")
    for features, marker in zip(dimensions, "x+o"):
      values = m[f"dimension {features} {name}"]
      label = f"networks, D = {features}" if name == "test" else None
      axis.errorbar(steps, values.mean(0), values.std(0), fmt=marker, color=color, markersize=5, fillstyle="none",
                    linewidth=0.8, label=label)  # fmt: skip
  axis.set(xlabel="step", title="mean-field theory and networks (spread of seeds)", ylim=(0, 1.6))
  axis.legend(frameon=False, fontsize=8, ncols=2)
