"""Grokking as the transition from lazy to rich training: a committee machine learns a quadratic function.

Networks of several output scales (laziness) and curvatures (alignment), one that groks, two with few and with many
examples; and the first steps of high-dimensional networks against mean-field theory.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.harness import plots
from experiments.harness.claims import Claim
from experiments.harness.trials import Cell
from jaxreg.kernels.committee_machine import (
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
from jaxreg.training import Task, gradient_task, grid

CARD = "28-grokking_lazy_rich"
SCALES = (0.25, 1.0, 4.0, 16.0)
CURVATURES = (0.05, 0.25, 1.0)
BY_SCALE, BY_CURVATURE = "scale {:g} curvature 0.25", "scale 1 curvature {:g}"
# Name -> output scale, curvature, centring.
SETTINGS = {
  **{BY_SCALE.format(scale): (scale, 0.25, 1.0) for scale in SCALES},
  **{BY_CURVATURE.format(curvature): (1.0, curvature, 1.0) for curvature in CURVATURES},
  "grokking": (2.0, 0.25, 0.0),
}
SIZED = (0.5, 0.25, 0.0)  # with few and with many examples
# What a run keeps of its start and of its path.
TRACKED = (
  *("initial_train", "initial_test", "initial_linear", "initial_alignment"),
  *("fitted_at", "peak_test", "peak_linear", "kernel_error"),
)
LOSSES = ("train", "test")
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
    few: a training set too small to generalise, in `cells`.
    many: one that generalises at once, in `cells`.
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


def task(config: Config) -> Task:
  """Gradient descent with step `eta N / a^2`.

  Hyperparameters are `output_scale`, `curvature`, `learning_rate`, and `centring`: the fraction of the initial
  network that is subtracted from the outputs, 1 for the centred network.
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

  def objective(params, extra, batch, context):
    # The examples of a seed are in `extra`, drawn like its weights; `data` is only what `predict` is tried on.
    del batch
    options = {name: context.hparams[name] for name in ("output_scale", "curvature")}
    errors = committee(params, extra["inputs"], **options) - extra["offset"] - extra["targets"]
    train, terms = jnp.mean(errors**2), risk(jax.lax.stop_gradient(params), extra)
    below, fitted = train < extra["initial_train"], train <= 0.1 * extra["initial_train"]
    peak = lambda name, value: jnp.where(below, jnp.maximum(extra[name], value), extra[name])
    extra = {
      **extra,
      "fitted_at": jnp.where(fitted, jnp.minimum(extra["fitted_at"], context.step), extra["fitted_at"]),
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
  return gradient_task(
    init_params,
    objective,
    optimizer,
    data={"x": examples.astype(np.float32)},
    batch_size=None,
    hparams={"output_scale": 1.0, "curvature": 0.25, "learning_rate": config.learning_rate, "centring": 1.0},
    evaluate=evaluate,
    predict=predict,
    config=config,
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


def cell(config: Config) -> Cell:
  """One run; output scales × curvatures vary: laziness × alignment."""
  every = max(config.steps // 60, 1)
  return Cell(task(config), config.steps, grid(output_scale=SCALES, curvature=CURVATURES), eval_every=every)


def cells(config: Config, seeds) -> dict[str, Cell]:
  """The settings, their first steps in detail, and a training set of few and one of many examples."""
  del seeds
  points = lambda *settings: dict(zip(("output_scale", "curvature", "centring"), np.array(settings).T))
  # One trial after another, so that the short sweep retraces the long one to the last bit.
  long = cell(config)._replace(points=points(*SETTINGS.values()), engine="map")
  detail = max(config.early_steps // 50, 1)
  of = lambda count: long._replace(task=task(dataclasses.replace(config, examples=count)), points=points(SIZED))
  return {
    "settings": long,
    "start": long._replace(steps=config.early_steps, eval_every=detail),
    "few": of(config.few),
    "many": of(config.many),
  }


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


def measure(config: Config, seeds, trained) -> dict[str, np.ndarray]:
  """The losses of theory and networks, `[seeds, steps + 1]`, and the largest relative difference at each dimension."""
  del trained
  solution = committee_dmft(jax.random.key(0), samples=config.samples, **THEORY, **DYNAMICS)
  theory = np.stack([solution.train_loss, solution.test_loss])
  measured, gaps = {f"theory {name}": np.tile(loss, (len(seeds), 1)) for name, loss in zip(LOSSES, theory)}, []
  for features in config.dimensions:
    networks = np.stack([simulate(seed, features=features, draws=config.draws) for seed in seeds])
    gaps.append(np.abs(networks / theory - 1).max((1, 2)))
    measured |= {f"dimension {features} {name}": networks[:, index] for index, name in enumerate(LOSSES)}
  return measured | {"theory gap": np.stack(gaps, 1)}


def summary(config: Config, trials) -> dict[str, np.ndarray]:
  """Final metrics `[seeds]`, the settings' curves `[seeds, evaluations]` from the start on, and what was measured."""
  del config
  late, early = trials["settings"], trials["start"]
  finals = {setting: (late, index) for index, setting in enumerate(SETTINGS)}
  finals |= {name: (trials[name], 0) for name in ("few", "many")}
  summed = dict(trials.measured)
  for setting, (cell, index) in finals.items():
    summed |= {f"{setting} final {name}": values[index, :, -1] for name, values in cell.metrics.items()}
  after = late.steps > early.steps[-1]
  times = np.concatenate([[0], early.steps, late.steps[after]])
  for index, setting in enumerate(SETTINGS):
    summed[f"{setting} step"] = np.tile(times, (len(trials.seeds), 1))
    for name in ("train", "test", "linear", "alignment"):
      start, first = late.metrics[f"initial_{name}"][index, :, :1], early.metrics[name][index]
      summed[f"{setting} {name}"] = np.concatenate([start, first, late.metrics[name][index][:, after]], 1)
  return summed


def _along(name: str, values, form: str):
  """The changes of a final value between neighbouring settings: `[settings - 1, seeds]`."""
  return lambda s: np.diff(np.stack([s[f"{form.format(value)} final {name}"] for value in values]), axis=0)


def claims(config: Config) -> tuple[Claim, ...]:
  """On laziness, alignment, grokking, the number of examples, and mean-field theory."""
  network = f"D = {config.features}, N = {config.neurons}, {config.steps:,} steps"
  full = f"P = {config.examples}"
  scales = f"output scales {', '.join(map('{:g}'.format, SCALES))}, curvature 0.25, {full}, centred; {network}"
  curvatures = f"curvatures {', '.join(map('{:g}'.format, CURVATURES))}, scale 1, {full}, centred; {network}"
  at = lambda scale: f"scale {scale:g}, curvature 0.25, {full}, centred; {network}"
  grokking = f"scale 2, curvature 0.25, {full}, not centred; {network}"
  sized = lambda count: f"scale 0.5, curvature 0.25, P = {count:,}, not centred; {network}"
  fitted = "change of the first step with 10 % of the initial training loss between neighbouring"
  final = lambda setting, name: lambda s: s[f"{setting} final {name}"]
  over = lambda setting, name, base: lambda s: s[f"{setting} final {name}"] / s[f"{setting} final {base}"]
  rich, lazy = BY_SCALE.format(SCALES[0]), BY_SCALE.format(SCALES[-1])
  peak = "largest population loss while the training loss is below its start, relative to its start"
  return (
    Claim(
      "fit_scale",
      "The lazier a network is, the later it fits the training set",
      f"smallest {fitted} {scales}",
      lambda s: _along("fitted_at", SCALES, BY_SCALE)(s).min(0),
      at_least=0.0,
    ),
    Claim(
      "test_scale",
      "The lazier a network is, the worse it generalises in the end",
      f"smallest change of the final population loss between neighbouring {scales}",
      lambda s: _along("test", SCALES, BY_SCALE)(s).min(0),
      at_least=0.0,
    ),
    Claim(
      "rich",
      "A rich network learns the quadratic function",
      f"final population loss; {at(SCALES[0])}",
      final(rich, "test"),
      at_most=0.05,
    ),
    Claim(
      "lazy",
      "A lazy network hardly beats regression with its initial kernel",
      f"final population loss relative to kernel regression with the wide network's initial kernel; {at(SCALES[-1])}",
      over(lazy, "test", "kernel_error"),
      at_least=0.7,
    ),
    Claim(
      "motion",
      "The lazier a network is, the less it moves its weights",
      f"largest change of the relative distance from initialisation between neighbouring {scales}",
      lambda s: _along("motion", SCALES, BY_SCALE)(s).max(0),
      at_most=0.0,
    ),
    Claim(
      "fit_curvature",
      "The better the initial kernel is aligned with the task, the sooner a network fits the training set",
      f"largest {fitted} {curvatures}",
      lambda s: _along("fitted_at", CURVATURES, BY_CURVATURE)(s).max(0),
      at_most=0.0,
    ),
    Claim(
      "test_curvature",
      "The better the initial kernel is aligned with the task, the worse a network generalises in the end",
      f"smallest change of the final population loss between neighbouring {curvatures}",
      lambda s: _along("test", CURVATURES, BY_CURVATURE)(s).min(0),
      at_least=0.0,
    ),
    Claim(
      "alignment",
      "Curvature raises the alignment of the initial kernel with the task",
      f"smallest change of the initial kernel's alignment on {config.held_out} held-out inputs between neighbouring"
      f" {curvatures}",
      lambda s: _along("initial_alignment", CURVATURES, BY_CURVATURE)(s).min(0),
      at_least=0.0,
    ),
    Claim(
      "overfits_first",
      "In grokking the population loss first rises while the training loss falls",
      f"{peak}; {grokking}",
      over("grokking", "peak_test", "initial_test"),
      at_least=1.1,
    ),
    Claim(
      "linear_rises",
      "In grokking the linear term of the population loss rises at first",
      f"largest linear term of the population loss while the training loss is below its start; {grokking}",
      final("grokking", "peak_linear"),
      at_least=0.1,
    ),
    Claim(
      "linear_ends",
      "In grokking the linear term of the population loss vanishes in the end",
      f"linear term of the population loss at the end; {grokking}",
      final("grokking", "linear"),
      at_most=0.01,
    ),
    Claim(
      "generalises",
      "A network that groks generalises in the end",
      f"population loss at the end; {grokking}",
      final("grokking", "test"),
      at_most=0.02,
    ),
    Claim(
      "norm_grows",
      "A network that groks ends with larger weights than at the start, so that no decay of weights explains it",
      f"norm of the weights at the end relative to the start; {grokking}",
      final("grokking", "norm"),
      at_least=1.0,
    ),
    Claim(
      "few",
      "A network with few examples never generalises",
      f"final population loss; {sized(config.few)}",
      final("few", "test"),
      at_least=0.5,
    ),
    Claim(
      "many_never_worse",
      "A network with many examples generalises without a rise of the population loss",
      f"{peak}; {sized(config.many)}",
      over("many", "peak_test", "initial_test"),
      at_most=1.0,
    ),
    Claim(
      "many_generalises",
      "A network with many examples generalises perfectly",
      f"final population loss; {sized(config.many)}",
      final("many", "test"),
      at_most=0.001,
    ),
    Claim(
      "theory",
      "High-dimensional networks follow the mean-field theory",
      f"largest relative difference of training and population loss over {THEORY['steps']} steps, mean of"
      f" {config.draws} networks with D = {config.dimensions[-1]}; kappa {THEORY['kappa']:g}, N = {THEORY['neurons']},"
      f" scale {DYNAMICS['output_scale']:g}, curvature {DYNAMICS['curvature']:g}",
      lambda s: s["theory gap"][:, -1],
      at_most=0.05,
    ),
  )


NOTES = (
  "The claim on mean-field theory is this library's, with equations derived for it; the others are the card's.",
  "The first steps in the figure come from a second, shorter sweep of the same seeds, which retraces the long one.",
)


def figure(config: Config, summary, path) -> None:
  """Grokking of one setting, the population loss along scales and curvatures, and theory against networks."""
  picture, (first, *axes, last) = plots.panels(4, width=5)
  steps = summary["grokking step"][0]
  names = {"train": "training loss", "test": "population loss", "linear": "its linear term", "alignment": "alignment"}
  plots.curves(first, steps, {label: summary[f"grokking {name}"] for name, label in names.items()})
  first.set(title="grokking: scale 2, not centred")
  for axis, values, form, name in zip(axes, (SCALES, CURVATURES), (BY_SCALE, BY_CURVATURE), ("scale", "curvature")):
    for index, key in enumerate(map(form.format, values)):
      style = {"color": f"C{index}"}
      plots.curves(axis, steps, {f"{name} {values[index]:g}": summary[f"{key} test"]}, **style)
      plots.curves(axis, steps, {None: summary[f"{key} train"]}, linestyle=":", **style)
    axis.set(title=f"{name}: population (solid) and training loss (dotted)")
  for axis in (first, *axes):
    axis.set(xscale="symlog", yscale="log", xlabel="step", ylim=(1e-4, 2))
    axis.set_xlim(left=0)
  steps = np.arange(THEORY["steps"] + 1)
  for color, name in zip(("C0", "C1"), LOSSES):
    last.plot(steps, summary[f"theory {name}"][0], color=color, label=f"{names[name]}, theory")
    for features, marker in zip(config.dimensions, "x+o"):
      losses = {f"networks, D = {features}": summary[f"dimension {features} {name}"]}
      plots.curves(last, steps, losses, color=color, marker=marker, linestyle="", fillstyle="none")
  last.set(xlabel="step", title="mean-field theory and networks", ylim=(0, 1.6))
  for axis in (first, *axes, last):
    axis.legend(frameon=False, fontsize=8)
  plots.save(picture, path)
