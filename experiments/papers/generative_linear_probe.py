"""Generative against discriminative linear probes: how many labelled examples each needs.

Naive Bayes and logistic regression in closed form, on simulated Gaussian classes and on digits; `run` trains the
discriminative probe by SGD. The preset `paper` is that probe on the features of a ResNet-50, which has no claims.
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
from jaxreg.data import bundled, tfds_stream
from jaxreg.data.gaussian_mixtures import (
  easy_covariance,
  gaussian_mixture,
  gaussian_mixture_bayes_error,
  gaussian_mixture_means,
)
from jaxreg.metrics import gaussian_probe, linear_probe
from jaxreg.metrics.sample_complexity import min_samples_to, probe_sample_curve
from jaxreg.training import HeldOut, Mean, Task, gradient_task, grid

CARD = "15-generative_linear_probe"
HEADS = {"nb": "naive Bayes", "lr": "logistic regression"}
# A user writes it with `jaxreg.data.write_tfds`: splits `train` and `test` of tensors `feature` [2048], penultimate
# features of a ResNet-50, and `label`.
CIFAR10_FEATURES = "cifar10_resnet50_features"


@dataclasses.dataclass(frozen=True)
class Config:
  """What is measured, and the probe that `run` trains.

  Attributes:
    features: `digits` (the pixels), or `cifar10_resnet50`, a data set of features that a user writes.
    num_features: their number in `cifar10_resnet50`.
    learning_rate: of SGD with momentum 0.9.
    batch_size: examples per step.
    epochs: passes over the training set; the rate falls tenfold after 60 % and 80 % of them.
    train: training examples of `cifar10_resnet50`.
    dims: numbers of features in the simulation, ascending; the first two and the last are in the claims.
    octaves: the simulation's sizes run from 4 to 4 · 2^octaves in steps of a quarter octave.
    simulated_tests: test examples of the simulation.
    simulated_repeats: training sets per seed in the simulation.
    digit_sizes: numbers of labelled digits, ascending; the fourth and the last are in the claims.
    digit_repeats: subsets per seed.
    data_dir: TFDS's folder, for `cifar10_resnet50`.
  """

  features: str = "digits"
  num_features: int = 2048
  learning_rate: float = 30.0
  batch_size: int = 256
  epochs: int = 100
  train: int = 50_000
  dims: tuple[int, ...] = (16, 32, 64, 128, 256)
  octaves: int = 9
  simulated_tests: int = 5000
  simulated_repeats: int = 5
  digit_sizes: tuple[int, ...] = (20, 40, 80, 160, 400, 1000)
  digit_repeats: int = 3
  data_dir: str | None = None

  def __post_init__(self):
    if self.features not in ("digits", "cifar10_resnet50"):
      raise ValueError(f"features must be digits or cifar10_resnet50, got {self.features!r}.")
    if len(self.dims) < 3 or list(self.dims) != sorted(self.dims):
      raise ValueError(f"dims must be at least three ascending numbers, got {self.dims}.")
    if len(self.digit_sizes) < 5 or not 10 <= min(self.digit_sizes) <= max(self.digit_sizes) <= 1000:
      raise ValueError(f"digit_sizes must be at least five numbers in [10, 1000], got {self.digit_sizes}.")

  @property
  def steps_per_epoch(self) -> int:
    return (1000 if self.features == "digits" else self.train) // self.batch_size

  @property
  def sizes(self) -> np.ndarray:
    """The simulation's numbers of examples."""
    return np.unique(np.round(4 * 2 ** (np.arange(4 * self.octaves + 1) / 4)).astype(np.int32))


PRESETS = {
  "smoke": Config(
    epochs=4, dims=(4, 8, 16), octaves=4, simulated_tests=500, simulated_repeats=2, digit_repeats=1,
    digit_sizes=(20, 30, 40, 50, 100),
  ),
  "cpu": Config(),
  "paper": Config(features="cifar10_resnet50"),
}  # fmt: skip


def task(config: Config) -> Task:
  """The discriminative probe by SGD, on features in [0, 1]; naive Bayes is fitted to the same batches beside it."""
  return _digits_task(config) if config.features == "digits" else _features_task(config)


def _optimizer(config: Config, hparams) -> optax.GradientTransformation:
  boundaries = {round(part * config.epochs) * config.steps_per_epoch: 0.1 for part in (0.6, 0.8)}
  schedule = optax.piecewise_constant_schedule(1.0, boundaries)
  return optax.chain(optax.trace(0.9), optax.scale_by_schedule(lambda step: -hparams["learning_rate"] * schedule(step)))


def _initial_probe(features: int) -> dict[str, jax.Array]:
  return {"weights": jnp.zeros((10, features)), "bias": jnp.zeros(10)}


def _logits(params, features):
  return linear_probe.probe_logits(linear_probe.LinearProbe(**params), features)


def _cross_entropy(params, features, labels):
  return optax.softmax_cross_entropy_with_integer_labels(_logits(params, features), labels)


def _digits_task(config: Config) -> Task:
  train, test = _digits()

  def evaluate(params, extra, hparams):
    del extra, hparams
    bayes = _fit_bayes(jnp.asarray(train["x"]), jnp.asarray(train["y"]), None, num_classes=10)
    right = lambda logits: jnp.mean(logits.argmax(-1) == test["y"])
    return {
      "test_accuracy": right(_logits(params, test["x"])),
      "naive_bayes_accuracy": right(linear_probe.probe_logits(bayes, test["x"])),
    }

  return gradient_task(
    lambda key, hparams: (_initial_probe(64), {}),
    lambda params, extra, batch, context: (_cross_entropy(params, batch["x"], batch["y"]).mean(), (extra, {})),
    functools.partial(_optimizer, config),
    data=train,
    batch_size=config.batch_size,
    hparams={"learning_rate": config.learning_rate},
    evaluate=evaluate,
    predict=lambda params, extra, inputs: _logits(params, inputs),
    config=config,
  )


@functools.lru_cache(maxsize=1)
def _digits():
  """1,000 and 797 digits as vectors, scaled by the ranges of the former."""
  train, test = bundled.split(bundled.digits(), sizes=(1000, 797))
  flat = [part["x"].reshape(-1, 64) for part in (train, test)]
  low, high = flat[0].min(axis=0), flat[0].max(axis=0)
  scaled = [(x - low) / np.where(high > low, high - low, 1) for x in flat]
  return {**train, "x": scaled[0]}, {**test, "x": scaled[1]}


def _features_task(config: Config) -> Task:
  """Ranges and the statistics of naive Bayes grow with the stream; later epochs repeat the examples of the first.

  Counts of repeated examples grow in proportion, so that the fit is that of one pass.
  """

  def init_params(key, hparams):
    del key, hparams
    extra = {
      "stats": gaussian_probe.empty_stats(10, config.num_features),
      "low": jnp.full(config.num_features, jnp.inf),
      "high": jnp.full(config.num_features, -jnp.inf),
    }
    return _initial_probe(config.num_features), extra

  def scale(extra, features):
    width = jnp.where(extra["high"] > extra["low"], extra["high"] - extra["low"], 1)
    return linear_probe.minmax_scale(linear_probe.MinMaxScaling(extra["low"], width), features)

  def objective(params, extra, batch, context):
    features, labels, axis_name = batch["feature"], batch["label"], context.axis_name
    low, high = features.min(axis=0), features.max(axis=0)
    if axis_name is not None:
      low, high = jax.lax.pmin(low, axis_name), jax.lax.pmax(high, axis_name)
    new = gaussian_probe.gaussian_stats(features, labels, num_classes=10, axis_name=axis_name)
    extra = {
      "stats": gaussian_probe.merge_stats(extra["stats"], new),
      "low": jnp.minimum(extra["low"], low).astype(jnp.float32),
      "high": jnp.maximum(extra["high"], high).astype(jnp.float32),
    }
    scores = gaussian_probe.gaussian_scores(extra["stats"], features, relative_floor=1e-6)
    scaled = scale(extra, features)
    metrics = {
      "train_accuracy": jnp.mean(_logits(params, scaled).argmax(-1) == labels),
      "naive_bayes_accuracy": jnp.mean(scores.argmax(-1) == labels),
    }
    return _cross_entropy(params, scaled, labels).mean(), (extra, metrics)

  def measure_held_out(state, batch, hparams):
    del hparams
    labels, valid = batch["label"], batch["valid"].astype(jnp.float32)
    scaled = scale(state.extra, batch["feature"])
    scores = gaussian_probe.gaussian_scores(state.extra["stats"], batch["feature"], relative_floor=1e-6)
    measured = {
      "test_loss": _cross_entropy(state.params, scaled, labels),
      "test_error": _logits(state.params, scaled).argmax(-1) != labels,
      "naive_bayes_test_error": scores.argmax(-1) != labels,
    }
    return {name: Mean(jnp.sum(valid * values), jnp.sum(valid)) for name, values in measured.items()}

  stream = functools.partial(tfds_stream, CIFAR10_FEATURES, batch_size=config.batch_size, data_dir=config.data_dir)
  return gradient_task(
    init_params,
    objective,
    functools.partial(_optimizer, config),
    data=functools.partial(stream, "train", seed=0),
    batch_size=config.batch_size,
    hparams={"learning_rate": config.learning_rate},
    predict=lambda params, extra, inputs: _logits(params, scale(extra, inputs)),
    held_out=HeldOut(
      functools.partial(stream, "test", seed=None, num_epochs=1, drop_remainder=False), measure_held_out
    ),
    config=config,
    cast=("feature",),
  )


def paper_batch(config: Config) -> dict[str, jax.ShapeDtypeStruct]:
  """One global batch of the stream."""
  return {
    "feature": jax.ShapeDtypeStruct((config.batch_size, config.num_features), jnp.float32),
    "label": jax.ShapeDtypeStruct((config.batch_size,), jnp.int32),
    "id": jax.ShapeDtypeStruct((config.batch_size,), jnp.int32),
  }


def reduced(config: Config) -> Config:
  """Fewer features and examples."""
  return dataclasses.replace(config, num_features=16, batch_size=16, train=64, epochs=3)


def paper_sets(config: Config) -> dict[str, dict]:
  """Random non-negative features; the last test batch is not full."""
  rng = np.random.default_rng(0)

  def examples(count):
    features = np.maximum(rng.normal(size=(count, config.num_features)), 0).astype(np.float32)
    return {"feature": features, "label": np.resize(np.arange(10), count)}

  return {CIFAR10_FEATURES: {"train": examples(64), "test": examples(24)}}


def cell(config: Config) -> Cell:
  """One run with evaluations at four equidistant times; learning rates vary."""
  every = max(1, config.epochs * config.steps_per_epoch // 4)
  return Cell(
    task(config), 4 * every, grid(learning_rate=[config.learning_rate / 30, config.learning_rate]), eval_every=every
  )


def measure(config: Config, seeds, trained) -> dict[str, np.ndarray]:
  """Examples needed in the simulation `[seeds, dims]`; test errors on digits `[seeds, sizes]`.

  A number of examples that was not enough even at the largest size counts as that size.
  """
  del trained
  if config.features != "digits":
    raise ValueError(
      f"the claims are about digits and simulations, so features must be digits, got {config.features!r}."
    )
  simulated = [_simulate(config, n, seeds) for n in config.dims]
  curves = _digit_curves(config, seeds)
  measured = {f"{head} examples needed": np.stack([each[head] for each in simulated], axis=1) for head in HEADS}
  return measured | {f"{head} digits error": values for head, values in curves.items()}


def _fit_bayes(features, labels, where, *, num_classes):
  stats = gaussian_probe.gaussian_stats(features, labels, num_classes=num_classes, where=where)
  return gaussian_probe.stats_to_linear(stats)


def _heads(num_classes: int) -> dict:
  logistic = lambda x, y, where: linear_probe.logistic_probe(x, y, num_classes=num_classes, where=where)
  return {"nb": functools.partial(_fit_bayes, num_classes=num_classes), "lr": logistic}


def _simulate(config: Config, num_features: int, seeds) -> dict[str, np.ndarray]:
  """Smallest size whose error, a mean over the training sets, is within 0.01 of the Bayes error, per head `[seeds]`."""
  means, covariance = gaussian_mixture_means(2, num_features), easy_covariance(num_features)
  target = float(gaussian_mixture_bayes_error(means, covariance)) + 0.01
  largest = int(config.sizes[-1])
  draw = jax.jit(
    jax.vmap(lambda key: gaussian_mixture(key, means, covariance, num_examples=largest + config.simulated_tests))
  )

  def needed(seed):
    keys = jax.random.split(jax.random.key(seed), config.simulated_repeats)
    data = draw(keys)
    pools, tests = (jax.tree.map(lambda x: x[:, cut], data) for cut in (np.s_[:largest], np.s_[largest:]))
    curve = {head: np.ones(len(config.sizes)) for head in HEADS}
    for index, size in enumerate(config.sizes):
      # Small subsets are taken of a part of the pool, in a quarter of the time.
      part = jax.tree.map(lambda x, rows=512 if size <= 512 else largest: x[:, :rows], pools)
      for head, errors in _errors_at(keys, jnp.full(len(keys), size), part, tests).items():
        curve[head][index] = np.mean(errors)
      if all((errors < target).any() for errors in curve.values()):
        break
    return [min(float(min_samples_to(errors, config.sizes, target=target)), largest) for errors in curve.values()]

  return dict(zip(HEADS, np.array([needed(seed) for seed in seeds]).T))


@jax.jit
def _errors_at(keys, sizes, pools, tests) -> dict[str, jax.Array]:
  """Test errors of each head with a subset of each pool, one after another."""

  def errors(part):
    key, size, pool, test = part
    curve = probe_sample_curve(
      key, pool["x"], pool["y"], test["x"], test["y"],
      sizes=size[None], heads=_heads(2), num_classes=2, repeats=1, minmax=False,
    )  # fmt: skip
    return jax.tree.map(jnp.squeeze, curve)

  return jax.lax.map(errors, (keys, sizes, pools, tests))


def _digit_curves(config: Config, seeds) -> dict[str, np.ndarray]:
  train, test = _digits()
  options = dict(heads=_heads(10), num_classes=10, repeats=config.digit_repeats)
  run = jax.jit(
    lambda key: probe_sample_curve(
      key, train["x"], train["y"], test["x"], test["y"], sizes=np.asarray(config.digit_sizes), **options
    )
  )
  curves = [run(jax.random.key(seed)) for seed in seeds]
  return {head: np.stack([np.asarray(curve[head]).mean(axis=0) for curve in curves]) for head in HEADS}


def _fall(summary, head: str) -> np.ndarray:
  errors = summary[f"{head} digits error"]
  return errors[:, 3] - errors[:, -1]


def claims(config: Config) -> tuple[Claim, ...]:
  """On the growth of the number of examples with that of features, and on the asymptote."""
  simulation = (
    "two Gaussian classes with independent features, within 0.01 of the Bayes error, mean of"
    f" {config.simulated_repeats} training sets"
  )
  first, second, *_, last = config.dims
  return (
    Claim(
      "bayes_is_flat",
      "The examples that naive Bayes needs do not grow with the number of features",
      f"examples needed at {last} features over those at {first}; {simulation}",
      lambda s: s["nb examples needed"][:, -1] / s["nb examples needed"][:, 0],
      at_most=1.5,
    ),
    Claim(
      "logistic_grows",
      "The examples that logistic regression needs grow with the number of features",
      f"examples needed at {last} features over those at {second}; {simulation}; C = 1",
      lambda s: s["lr examples needed"][:, -1] / s["lr examples needed"][:, 1],
      at_least=2.5,
    ),
    Claim(
      "apart",
      "Logistic regression needs several times as many examples as naive Bayes at every number of features",
      "smallest ratio, logistic regression over naive Bayes, of examples needed at"
      f" {', '.join(map(str, config.dims))} features; {simulation}; C = 1",
      lambda s: (s["lr examples needed"] / s["nb examples needed"]).min(axis=1),
      at_least=3.0,
    ),
    Claim(
      "asymptote",
      "On digits, too, naive Bayes is near its own asymptote with fewer labels than logistic regression",
      f"fall of the test error from {config.digit_sizes[3]} to {config.digit_sizes[-1]:,} labelled digits, naive Bayes"
      " minus half of logistic regression's",
      lambda s: _fall(s, "nb") - 0.5 * _fall(s, "lr"),
      at_most=0.0,
    ),
  )


NOTES = (
  "Reported, not gated: whether naive Bayes beats logistic regression with few labels. On digits, with C = 1, see the"
  " figure; the paper reports the crossing for features of supervised pre-training.",
)


def figure(config: Config, summary, path) -> None:
  """Examples needed against features with both rates of the theory; error on digits against labels."""
  picture, (left, right) = plots.panels(2)
  dims, labelled = np.array(config.dims), np.array(config.digit_sizes)
  plots.curves(left, dims, {name: summary[f"{head} examples needed"] for head, name in HEADS.items()}, marker="o")
  for head, label, style, rate in (("lr", "∝ n", ":", dims), ("nb", "∝ log n", "--", np.log(dims))):
    scale = summary[f"{head} examples needed"].mean(axis=0)[-1] / rate[-1]
    left.plot(dims, scale * rate, style, color="k", linewidth=1, label=label)
  left.set(
    xlabel="features n", ylabel="examples needed", yscale="log", title="simulation; theory through the last point"
  )
  plots.curves(right, labelled, {name: summary[f"{head} digits error"] for head, name in HEADS.items()}, marker="o")
  right.set(xlabel="labelled digits", ylabel="test error", ylim=(0, None), title="digits")
  for axis, places in ((left, dims), (right, labelled)):
    axis.set_xscale("log")
    axis.set_xticks(places, [f"{place}" for place in places])
    axis.minorticks_off()
    axis.legend(frameon=False)
  plots.save(picture, path)
