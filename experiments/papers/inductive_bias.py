"""Required inductive bias: how improbable is it that a random hypothesis that fits also generalises?

Kernel hypothesis spaces in closed form, on functions of four to six dimensions and on digits; trained networks on the
same digits.
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
from jaxreg.data import bundled
from jaxreg.kernels.hypothesis_space import (
  error_law,
  error_moments,
  hypothesis_posterior,
  saddlepoint_inductive_bias,
  sample_hypothesis_errors,
)
from jaxreg.kernels.rbf import rbf_kernel
from jaxreg.metrics.inductive_bias import fit_scaled_chi2, required_inductive_bias, scaled_chi2_inductive_bias
from jaxreg.models import MLP
from jaxreg.training import Task, gradient_task, grid

CARD = "27-inductive_bias"
DIMENSIONS = (4, 5, 6)
CLASSES = 10
# Targets of the tail's comparison, in units of the mean error.
FRACTIONS = (0.5, 0.2)
# And those of the figure.
CURVE = tuple(np.geomspace(0.05, 1.0, 16).round(3).tolist())


@dataclasses.dataclass(frozen=True)
class Config:
  """Kernel hypothesis spaces on a ridge function and on digits, and networks on digits.

  Attributes:
    examples: training inputs of the ridge function.
    tests: its test inputs.
    bandwidth: of its kernel.
    target: its test error, in units of the variance of its labels.
    draws: hypotheses sampled from a kernel space.
    digits: training images.
    digits_tests: test images.
    digits_bandwidth: of the kernel of pixels in [0, 1].
    digits_target: their test error, mean squared against one-hot labels.
    networks: networks trained per seed.
    hidden: widths of their hidden layers.
    steps: full-batch steps of Adam.
    jitter: added to the diagonal of kernel matrices.
  """

  examples: int = 100
  tests: int = 60
  bandwidth: float = 0.5
  target: float = 0.05
  draws: int = 1500
  digits: int = 300
  digits_tests: int = 200
  digits_bandwidth: float = 2.0
  digits_target: float = 0.04
  networks: int = 60
  hidden: tuple[int, ...] = (16, 16)
  steps: int = 300
  jitter: float = 1e-6


PRESETS = {
  "smoke": Config(examples=30, tests=20, draws=24, digits=60, digits_tests=40, networks=24, steps=10),
  "cpu": Config(),
}


def task(config: Config) -> Task:
  """Networks on one-hot digits; hyperparameters are `split`, which decides the examples, and `learning_rate`."""
  data = bundled.digits()
  model = MLP((*config.hidden, CLASSES))

  def init_params(key, hparams):
    train, test = _split(config, hparams["split"])
    return model.init(key, jnp.asarray(data["x"][:1]))["params"], {"train": train, "test": test}

  def predict(params, extra, inputs):
    del extra
    return model.apply({"params": params}, inputs)

  def errors(params, inputs, labels):
    outputs = predict(params, {}, inputs)
    return jnp.mean((outputs - jax.nn.one_hot(labels, CLASSES)) ** 2), jnp.mean(outputs.argmax(-1) == labels)

  def objective(params, extra, batch, context):
    del context
    ids = extra["train"]
    return errors(params, batch["x"][ids], batch["y"][ids])[0], (extra, {})

  def evaluate(params, extra, hparams):
    del hparams
    x, y = jnp.asarray(data["x"]), jnp.asarray(data["y"])
    error, accuracy = errors(params, x[extra["test"]], y[extra["test"]])
    train_error, _ = errors(params, x[extra["train"]], y[extra["train"]])
    return {"test_error": error, "test_accuracy": accuracy, "train_error": train_error}

  return gradient_task(
    init_params,
    objective,
    lambda hparams: optax.adam(hparams["learning_rate"]),
    data=data,
    batch_size=None,
    hparams={"split": 0, "learning_rate": 1e-3},
    evaluate=evaluate,
    predict=predict,
    config=config,
  )


def _split(config: Config, seed):
  """Ids of training and test images."""
  order = jnp.argsort(jax.random.bits(jax.random.key(seed), bundled.digits()["y"].shape))
  return order[: config.digits], order[config.digits : config.digits + config.digits_tests]


def cell(config: Config) -> Cell:
  """One network; splits of the data vary."""
  every = max(config.steps // 10, 1)
  return Cell(task(config), config.steps, grid(split=[0, 1, 2]), eval_every=every)


def cells(config: Config, seeds) -> dict[str, Cell]:
  """Many networks on the split of every seed, together, because they are tiny."""
  options = {"points": {"split": list(seeds)}, "seeds": range(config.networks), "engine": "vmap", "eval_every": None}
  return {"networks": cell(config)._replace(**options)}


def ridge_function(seed: int, dimension: int, config: Config):
  """Inputs from the cube `[-1, 1]^d` and `sin(3 u . x)` with a random unit vector u, in units of its deviation."""
  rng = np.random.default_rng((seed, dimension))
  direction = rng.normal(size=dimension)
  inputs = rng.uniform(-1, 1, (config.examples + config.tests, dimension))
  outputs = np.sin(3 * inputs @ direction / np.linalg.norm(direction))[:, None]
  outputs = outputs / outputs.std()
  # Features that are all zero change no distance, and one compiled program serves all dimensions.
  inputs = np.pad(inputs, ((0, 0), (0, max(DIMENSIONS) - dimension)))
  return inputs[: config.examples], outputs[: config.examples], inputs[config.examples :], outputs[config.examples :]


@functools.partial(jax.jit, static_argnames="samples")
def kernel_space(key, inputs, targets, tests, test_targets, *, bandwidth, jitter, samples: int):
  """The distribution of the test errors of interpolating Gaussian hypotheses, and a sample of them."""
  kernel = functools.partial(rbf_kernel, gamma=1 / (2 * bandwidth**2))
  posterior = hypothesis_posterior(
    kernel(inputs, inputs), kernel(tests, inputs), kernel(tests, tests), targets, jitter=jitter
  )
  distribution = error_law(posterior, test_targets)
  return distribution, sample_hypothesis_errors(key, distribution, samples=samples)


@jax.jit
def saddlepoint_biases(distribution, targets):
  """The biases at several targets."""
  return jax.lax.map(lambda target: saddlepoint_inductive_bias(distribution, target), targets)


def tails(distribution, errors, targets):
  """Biases at `targets` by the distribution fitted to the errors, and by the saddlepoint."""
  fitted = scaled_chi2_inductive_bias(targets, fit_scaled_chi2(errors))
  return np.asarray(fitted), np.asarray(saddlepoint_biases(distribution, targets))


def measure(config: Config, seeds, trained) -> dict[str, np.ndarray]:
  """Biases that kernel spaces and trained networks require, `[seeds]`, and what the figure shows of them."""
  errors = trained["networks"].by_point("test_error")[:, :, -1]
  # The covariance of hypotheses is a difference of nearly equal matrices.
  with jax.enable_x64(True):
    rows = [_ridge_rows(config, seed) | _digits_row(config, seed) for seed in seeds]
    for row, each in zip(rows, jnp.asarray(errors, np.float64), strict=True):
      row["network bias"] = required_inductive_bias(each, config.digits_target)
  return {name: np.stack([np.asarray(row[name], np.float64) for row in rows]) for name in rows[0]}


def _ridge_rows(config: Config, seed: int) -> dict:
  row = {}
  for dimension in DIMENSIONS:
    distribution, errors = kernel_space(
      jax.random.key(seed),
      *map(jnp.asarray, ridge_function(seed, dimension, config)),
      bandwidth=config.bandwidth,
      jitter=config.jitter,
      samples=config.draws,
    )
    mean, _ = error_moments(distribution)
    targets = jnp.concatenate([jnp.array([config.target]), mean * jnp.array(FRACTIONS + CURVE)])
    fitted, saddlepoint = tails(distribution, errors, targets)
    row[f"bias {dimension}"] = fitted[0]
    row[f"saddlepoint bias {dimension}"] = saddlepoint[0]
    for index, fraction in enumerate(FRACTIONS, start=1):
      row[f"tail {fraction:g} {dimension}"] = abs(fitted[index] / saddlepoint[index] - 1)
    row[f"curve {dimension}"] = np.stack([fitted, saddlepoint])[:, 1 + len(FRACTIONS) :]
    row[f"smallest {dimension}"] = errors.min() / mean
  return row


def _digits_row(config: Config, seed: int) -> dict:
  data = bundled.digits()
  images, labels = data["x"].reshape(len(data["y"]), -1).astype(np.float64), np.eye(CLASSES)[data["y"]]
  train, test = (np.asarray(ids) for ids in _split(config, seed))
  distribution, errors = kernel_space(
    jax.random.key(seed),
    *(jnp.asarray(array) for array in (images[train], labels[train], images[test], labels[test])),
    bandwidth=config.digits_bandwidth,
    jitter=config.jitter,
    samples=config.draws,
  )
  fitted, saddlepoint = tails(distribution, errors, jnp.array([config.digits_target]))
  return {"kernel bias": fitted[0], "kernel saddlepoint bias": saddlepoint[0], "kernel errors": errors}


def summary(config: Config, trials) -> dict[str, np.ndarray]:
  """What was measured of kernel spaces, and the same of the networks."""
  networks = trials["networks"]
  return {
    **trials.measured,
    "network errors": networks.last("test_error"),
    "network train error": networks.last("train_error").mean(1),
    "network accuracy": networks.last("test_accuracy").mean(1),
  }


def _tail(fraction: float):
  return lambda s: np.stack([s[f"tail {fraction:g} {dimension}"] for dimension in DIMENSIONS]).max(0)


def claims(config: Config) -> tuple[Claim, ...]:
  """On dimensions, on networks, and on the tail of the fitted distribution."""
  ridge = (
    f"sin(3 u.x) on a cube, {config.examples} training and {config.tests} test inputs, Gaussian kernel of bandwidth"
    f" {config.bandwidth:g}, {config.draws:,} hypotheses"
  )
  digits = (
    f"digits, {config.digits} training and {config.digits_tests} test images, mean squared error"
    f" {config.digits_target:g} against one-hot labels"
  )
  network = "-".join(map(str, (64, *config.hidden, CLASSES)))
  dimensions = [
    Claim(
      f"dimension_{high}",
      f"A task of {high} dimensions requires more inductive bias than one of {low}",
      f"nats required in {high} dimensions minus those in {low}; {ridge}, test error {config.target:g}",
      lambda s, low=low, high=high: s[f"bias {high}"] - s[f"bias {low}"],
      at_least=bound,
    )
    for low, high, bound in zip(DIMENSIONS, DIMENSIONS[1:], (10.0, 0.0))
  ]
  tails = [
    Claim(
      name,
      f"The distribution fitted to sampled errors gives the bias required at {fraction:g} of the mean error within"
      f" {100 * bound:.0f} %",
      "largest relative difference of fitted and saddlepoint bias over four to six dimensions, at"
      f" {fraction:g} of the mean error; {ridge}",
      _tail(fraction),
      at_most=bound,
    )
    for name, fraction, bound in zip(("tail_half", "tail_fifth"), FRACTIONS, (0.1, 0.3))
  ]
  networks = Claim(
    "networks",
    "Neural networks encode a large inductive bias relative to a generic kernel space",
    f"nats required by a Gaussian kernel of bandwidth {config.digits_bandwidth:g} minus those required by"
    f" {config.networks} trained networks {network}; {digits}",
    lambda s: s["kernel bias"] - s["network bias"],
    at_least=100.0,
  )
  return (*dimensions, networks, *tails)


NOTES = (
  "Biases depend on target, test set, training set, bandwidth and scale of labels; at bandwidth 4 the kernel space of"
  " the digits needs no bias either (the card's pilot), so the bandwidth is part of the claim.",
  "The fitted distribution underestimates the bias deep in the tail; the saddlepoint values, which need no sampling,"
  " are in the figure beside it.",
)


def figure(config: Config, summary, path) -> None:
  """Bias by dimension, the lower tail by fit and saddlepoint, and the errors of kernel space and networks."""
  picture, (left, middle, right) = plots.panels(3)
  for name, marker, label in (("bias", "o", "fitted distribution"), ("saddlepoint bias", "x", "saddlepoint")):
    values = np.stack([summary[f"{name} {dimension}"] for dimension in DIMENSIONS], axis=1)
    plots.curves(left, DIMENSIONS, {label: values}, marker=marker)
  left.set(xticks=DIMENSIONS, xlabel="dimensions", ylabel="required bias (nats)", title="ridge function")
  for index, dimension in enumerate(DIMENSIONS):
    fitted, saddlepoint = np.moveaxis(summary[f"curve {dimension}"], 1, 0)
    plots.curves(middle, CURVE, {f"d = {dimension}": fitted}, color=f"C{index}")
    plots.curves(middle, CURVE, {None: saddlepoint}, color=f"C{index}", linestyle=":")
    middle.axvline(summary[f"smallest {dimension}"].mean(), color=f"C{index}", linewidth=0.6, alpha=0.6)
  middle.set(xscale="log", yscale="log", xlabel="test error / mean error", ylabel="required bias (nats)")
  middle.set_ylim(bottom=0.3)
  middle.set_title("fitted (solid), saddlepoint (dotted),\nsmallest sampled error (vertical)", fontsize=10)
  for name, label in (("kernel", "kernel space"), ("network", "trained networks")):
    errors, bias = summary[f"{name} errors"].ravel(), summary[f"{name} bias"].mean()
    right.hist(errors, bins=40, density=True, alpha=0.6, label=f"{label}: {bias:.0f} nats to target")
  right.axvline(config.digits_target, color="k", linestyle=":", label="target")
  right.set(xlabel="test error", ylabel="density", title="digits", yscale="log", ylim=(0.05, 3e3))
  for axis in (left, middle, right):
    axis.legend(frameon=False, fontsize=8)
  plots.save(picture, path)
