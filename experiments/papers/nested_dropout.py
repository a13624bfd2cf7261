"""Nested dropout and co-teaching: classifiers on few, ordered features resist wrong labels."""

import dataclasses
import functools
import pathlib
from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.harness import plots
from experiments.harness.claims import Claim
from experiments.harness.selection import select
from experiments.harness.trials import Cell, Trials
from experiments.problems import cifar10
from experiments.problems.held_out import ONCE, mean_over
from jaxreg.data import bundled, noise
from jaxreg.data.stream import tfds_stream
from jaxreg.layers.nested_dropout import keep_leading_channels, nested_cutoff_probabilities, sample_cutoff
from jaxreg.layers.per_example_noise import per_example_dropout
from jaxreg.losses.small_loss import coteaching_loss, forget_rate_schedule, select_small_losses
from jaxreg.metrics.classification import memorization_fractions
from jaxreg.metrics.nested_cutoff import accuracy_per_cutoff, best_cutoff
from jaxreg.models.mlp import MLP
from jaxreg.models.resnet import ResNet
from jaxreg.training import HeldOut, Task, gradient_task, grid

CARD = "07-nested_dropout"
METHODS = ("dropout", "nested", "coteaching", "nested_coteaching")
CLASSES = 10


@dataclasses.dataclass(frozen=True)
class Config:
  """Pairs of networks on images with wrong labels.

  Attributes:
    method: `dropout` (of the features; rate 0 is cross-entropy), `nested`, `coteaching`, or `nested_coteaching`:
      nested dropout, then co-teaching of both networks with nested dropout; what `run` and `sweep` train.
    model: `mlp` on the MNIST subset, or `resnet18` on CIFAR-10 from TFDS.
    train, valid, test: numbers of images; validation labels are right. A stream is tested on the whole test split.
    hidden: widths of the perceptron; the last one is that of the features.
    width: of the residual network's first stage; its features are eight times as wide.
    noise_rate: fraction of training labels that are replaced by another class.
    epochs: passes over the training set.
    alone: fraction of the epochs after which `nested_coteaching` begins to exchange examples.
    gradual: epochs over which `coteaching` comes to forget.
    batch_size: images per step.
    learning_rate: of Adam; of SGD for the residual network.
    learning_rates: those that every method chooses from.
    more_learning_rates: those that cross-entropy, which has no strength, chooses from besides.
    rates: of dropout, to choose from.
    sigmas: of nested dropout, to choose from.
    forget_rates: of co-teaching, to choose from.
    sigma: the one that claims are about.
    narrow_sigma: one that is too small.
    scored: channels with which the residual networks score examples; the perceptrons use the best on validation data.
    data_dir: TFDS's folder; None for its own default.
  """

  method: str = "nested_coteaching"
  model: str = "mlp"
  train: int = 3500
  valid: int = 500
  test: int = 1000
  hidden: tuple[int, ...] = (256, 128)
  width: int = 64
  noise_rate: float = 0.4
  epochs: int = 40
  alone: float = 0.5
  gradual: int = 10
  batch_size: int = 128
  learning_rate: float = 1e-3
  learning_rates: tuple[float, ...] = (1e-4, 3e-4, 1e-3)
  more_learning_rates: tuple[float, ...] = (3e-5, 2e-4, 3e-3)
  rates: tuple[float, ...] = (0.5, 0.7)
  sigmas: tuple[float, ...] = (10.0, 30.0)
  forget_rates: tuple[float, ...] = (0.4, 0.5)
  sigma: float = 10.0
  narrow_sigma: float = 3.0
  scored: int = 13
  data_dir: str | None = None

  def __post_init__(self):
    if self.method not in METHODS:
      raise ValueError(f"method must be one of {', '.join(METHODS)}, got {self.method!r}.")
    if self.model not in ("mlp", "resnet18"):
      raise ValueError(f"model must be mlp or resnet18, got {self.model!r}.")
    if not 1 < self.batch_size <= self.train:
      raise ValueError(f"batch_size must be in [2, {self.train}], got {self.batch_size}.")

  @property
  def steps_per_epoch(self) -> int:
    return self.train // self.batch_size

  @property
  def steps(self) -> int:
    return self.epochs * self.steps_per_epoch

  @property
  def channels(self) -> int:
    return self.hidden[-1] if self.model == "mlp" else 8 * self.width

  @property
  def alone_steps(self) -> int:
    """Steps before `nested_coteaching` begins to exchange examples."""
    return round(self.alone * self.epochs) * self.steps_per_epoch


PRESETS = {
  "smoke": Config(
    train=256, valid=64, test=64, hidden=(32, 16), epochs=2, gradual=2, rates=(0.5,), sigmas=(10.0,),
    forget_rates=(0.4,), learning_rates=(1e-3,), more_learning_rates=(),
  ),
  "cpu": Config(),
  "paper": Config(
    model="resnet18",
    train=50_000,
    noise_rate=0.2,
    epochs=450,
    alone=350 / 450,
    batch_size=320,
    learning_rate=0.1,
  ),
}  # fmt: skip


def cell(config: Config) -> Cell:
  """A method at its strengths, evaluated every epoch."""
  strength = {
    "dropout": {"dropout": config.rates},
    "nested": {"sigma": config.sigmas},
    "coteaching": {"forget_rate": config.forget_rates},
    "nested_coteaching": {"sigma": config.sigmas},
  }
  at = grid(**strength[config.method], learning_rate=[config.learning_rate])
  return Cell(task(config), config.steps, at, eval_every=config.steps_per_epoch)


class Network(NamedTuple):
  """What gives the features; the classifier on them is a matrix.

  Attributes:
    init: `key -> (params, statistics)`.
    features: `(params, statistics, inputs, train, axis_name) -> (features, statistics)`.
    pixels: images as the network takes them.
  """

  init: Callable
  features: Callable
  pixels: Callable


def _mlp(config: Config) -> Network:
  model = MLP(config.hidden)

  def features(params, statistics, inputs, train, axis_name=None):
    del train, axis_name
    return nn.relu(model.apply({"params": params}, inputs)), statistics

  size = _splits(config)[0]["x"].shape[1:]
  return Network(lambda key: (model.init(key, jnp.zeros((1, *size)))["params"], {}), features, lambda x: x)


class _Features(nn.Module):
  """In place of an output layer: the features as they are."""

  classes: int

  @nn.compact
  def __call__(self, features):
    return features


def _resnet(config: Config) -> Network:
  def model(axis_name=None):
    return ResNet.of_depth(18, classes=CLASSES, width=config.width, dense=_Features, axis_name=axis_name)

  def init(key):
    variables = model().init(key, jnp.zeros((1, 32, 32, 3)), train=False)
    return variables["params"], variables["batch_stats"]

  def features(params, statistics, inputs, train, axis_name=None):
    variables = {"params": params, "batch_stats": statistics}
    if not train:
      return model().apply(variables, inputs, train=False), statistics
    hidden, new = model(axis_name).apply(variables, inputs, train=True, mutable=["batch_stats"])
    return hidden, new["batch_stats"]

  return Network(init, features, lambda images: images.astype(jnp.float32) / 255)


def task(config: Config) -> Task:
  """Two networks that are trained at once, on the same batches and wrong labels, from different initial parameters.

  Hyperparameters: `learning_rate`, `noise_rate`, and those of the methods: `dropout`, `sigma`, `forget_rate`.
  """
  network = _mlp(config) if config.model == "mlp" else _resnet(config)
  names = ("x", "y") if config.model == "mlp" else ("image", "label")

  def init_params(key, hparams):
    del hparams

    def one(key):
      params, statistics = network.init(key)
      kernel = nn.initializers.lecun_normal()(jax.random.fold_in(key, 1), (config.channels, CLASSES))
      return {"network": params, "kernel": kernel}, statistics

    params, statistics = jax.vmap(one)(jax.random.split(key, 2))
    count = config.channels if config.model == "mlp" else config.scored
    return params, {"statistics": statistics, "count": jnp.int32(count), "noise": jax.random.fold_in(key, 2)}

  def labels_of(extra, ids, labels, rate):
    """The wrong labels, the same at every visit."""
    draw = lambda id, label: noise.symmetric_noise(
      jax.random.fold_in(extra["noise"], id), label[None], rate=rate, num_classes=CLASSES, include_true=False
    )[0]
    return jax.vmap(draw)(ids, labels)

  def features_of(params, extra, inputs, train, axis_name=None):
    """Features `[2, batch, channels]` of both networks, each for its own inputs `[2, batch, ...]`, and statistics."""
    each = lambda params, statistics, inputs: network.features(params, statistics, inputs, train, axis_name)
    arguments = params["network"], extra["statistics"], inputs
    if config.model == "mlp":
      return jax.vmap(each)(*arguments)
    # Mapped convolutions become grouped ones, which XLA does not split over devices.
    found = [each(*jax.tree.map(lambda leaf, net=net: leaf[net], arguments)) for net in range(2)]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *found)

  def both(inputs):
    return jnp.broadcast_to(inputs, (2, *inputs.shape))

  def logits_of(features, params):
    return jnp.einsum("nbk,nkc->nbc", features, params["kernel"])

  def alone(params, extra, inputs, labels, context):
    """The mean losses of two networks that know nothing of each other, with dropout of their features."""
    features, statistics = features_of(params, extra, both(inputs), True, context.axis_name)
    keys = jax.random.split(context.key, 2)
    if config.method == "dropout":
      features = jax.vmap(lambda h, key: per_example_dropout(key, h, rate=context.hparams["dropout"]))(features, keys)
    else:
      p = nested_cutoff_probabilities(config.channels, sigma=context.hparams["sigma"])
      features = jax.vmap(lambda h, key: keep_leading_channels(h, sample_cutoff(key, p)))(features, keys)
    each = optax.softmax_cross_entropy_with_integer_labels(logits_of(features, params), both(labels))
    return jnp.sum(jnp.mean(each, axis=-1)), statistics

  def exchanged(params, extra, inputs, labels, context):
    """Co-teaching on the whole batch."""
    features, statistics = features_of(params, extra, both(inputs), True, context.axis_name)
    schedule = forget_rate_schedule(forget_rate=context.hparams["forget_rate"], num_gradual=config.gradual)
    rate = schedule(context.step // config.steps_per_epoch)
    values = coteaching_loss(*logits_of(features, params), labels, forget_rate=rate, axis_name=context.axis_name)
    return sum(jnp.mean(v) for v in values), statistics

  def together(params, extra, inputs, labels, context):
    """Each network scores one half of the batch for the other; both have the same cut-off; statistics are frozen."""
    size = inputs.shape[0] // 2
    halves = lambda x: x[: 2 * size].reshape(2, size, *x.shape[1:])
    given = lambda x: x[::-1]  # what the other network scored
    inputs, labels = halves(inputs), halves(labels)
    scored = keep_leading_channels(features_of(params, extra, inputs, False)[0], extra["count"])
    scores = optax.softmax_cross_entropy_with_integer_labels(logits_of(scored, params), labels)
    p = nested_cutoff_probabilities(config.channels, sigma=context.hparams["sigma"])
    count = sample_cutoff(context.key, p)
    features = keep_leading_channels(features_of(params, extra, given(inputs), False)[0], count)
    each = optax.softmax_cross_entropy_with_integer_labels(logits_of(features, params), given(labels))
    options = dict(forget_rate=context.hparams["forget_rate"], axis_name=context.axis_name)
    values = [select_small_losses(*pair, **options) for pair in zip(each, given(scores))]
    return sum(jnp.mean(v) for v in values), extra["statistics"]

  def objective(params, extra, batch, context):
    inputs, labels = network.pixels(batch[names[0]]), batch[names[1]]
    labels = labels_of(extra, batch["id"], labels, context.hparams["noise_rate"])
    arguments = (params, extra, inputs, labels, context)
    if config.method == "nested_coteaching":
      first = context.step < config.alone_steps
      loss, statistics = jax.lax.cond(first, lambda: alone(*arguments), lambda: together(*arguments))
    else:
      loss, statistics = (exchanged if config.method == "coteaching" else alone)(*arguments)
    return loss, ({**extra, "statistics": statistics}, {})

  def per_cutoff(params, extra, inputs, labels):
    """Accuracies by cut-off, of each network and of both, `[3, channels]`; only all channels if dropout is not nested.

    `[3, 1]` then.
    """
    features, _ = features_of(params, extra, both(inputs), False)
    if not config.method.startswith("nested"):
      logits = logits_of(features, params)
      logits = jnp.concatenate([logits, logits.mean(0, keepdims=True)])
      return jnp.mean(logits.argmax(-1) == labels, axis=-1)[:, None]
    each = jax.vmap(accuracy_per_cutoff, (0, 0, None))(features, params["kernel"], labels)
    return jnp.concatenate([each, accuracy_per_cutoff(features, params["kernel"], labels)[None]])

  def validated(params, extra, context):
    """After an epoch the cut-off with which examples are scored is the best one on validation data."""
    if config.method != "nested_coteaching" or config.model != "mlp":
      return params, extra
    _, valid, _ = _splits(config)
    ends = (context.step + 1) % config.steps_per_epoch == 0
    best = lambda: best_cutoff(per_cutoff(params, extra, valid["x"], valid["y"])[2]).astype(jnp.int32)
    return params, {**extra, "count": jax.lax.cond(ends, best, lambda: extra["count"])}

  def evaluate(params, extra, hparams):
    train, valid, test = _splits(config)
    on_valid, on_test = (per_cutoff(params, extra, part["x"], part["y"]) for part in (valid, test))
    best = best_cutoff(on_valid) if config.method.startswith("nested") else jnp.ones(3, jnp.int32)
    at_best = lambda accuracies: jnp.take_along_axis(accuracies, best[:, None] - 1, axis=1)[:, 0]
    on_valid, on_test = at_best(on_valid), at_best(on_test)
    count = best[2] if config.method.startswith("nested") else config.channels
    logits = predict(params, {**extra, "count": count}, train["x"])
    noisy = labels_of(extra, jnp.arange(config.train), jnp.asarray(train["y"]), hparams["noise_rate"])
    return {
      "valid_accuracy": jnp.mean(on_valid[:2]),
      "test_accuracy": jnp.mean(on_test[:2]),
      "pair_valid_accuracy": on_valid[2],
      "pair_test_accuracy": on_test[2],
      "kept_fraction": count / config.channels,
      "wrong_memorised": memorization_fractions(logits, noisy, jnp.asarray(train["y"])).memorized,
    }

  def predict(params, extra, inputs):
    """The mean logits of both networks with the channels that examples are scored with."""
    features, _ = features_of(params, extra, both(network.pixels(inputs)), False)
    if config.method.startswith("nested"):
      features = keep_leading_channels(features, extra["count"])
    return jnp.mean(logits_of(features, params), axis=0)

  def measure(state, batch, hparams):
    del hparams
    features, _ = features_of(state.params, state.extra, both(network.pixels(batch["image"])), False)
    right = lambda count: (
      logits_of(keep_leading_channels(features, count), state.params).mean(0).argmax(-1) == batch["label"]
    )
    counts = sorted({min(count, config.channels) for count in (config.scored, 32, 128, config.channels)})
    return mean_over(batch, **{f"pair_accuracy_{count}": right(jnp.int32(count)) for count in counts})

  common = dict(
    init_params=init_params,
    objective=objective,
    optimizer=functools.partial(_optimizer, config),
    batch_size=config.batch_size,
    hparams={
      "learning_rate": config.learning_rate,
      "noise_rate": config.noise_rate,
      "dropout": 0.0,
      "sigma": config.sigma,
      "forget_rate": config.noise_rate,
    },
    after_update=validated,
    predict=predict,
    config=config,
  )
  if config.model == "mlp":
    return gradient_task(data=_splits(config)[0], evaluate=evaluate, **common)
  stream = functools.partial(tfds_stream, "cifar10", batch_size=config.batch_size, data_dir=config.data_dir)
  return gradient_task(
    data=functools.partial(stream, split="train", seed=0, transform=cifar10.augment),
    held_out=HeldOut(functools.partial(stream, split="test", **ONCE), measure),
    cast=("image",),
    **common,
  )


def _optimizer(config: Config, hparams) -> optax.GradientTransformation:
  """Adam, whose learning rate falls tenfold when examples are exchanged; or SGD as for CIFAR."""
  nested = config.method == "nested_coteaching"
  if config.model == "mlp":
    schedule = optax.piecewise_constant_schedule(1.0, {config.alone_steps: 0.1} if nested else {})
    return optax.chain(
      optax.scale_by_adam(), optax.scale_by_schedule(lambda step: -hparams["learning_rate"] * schedule(step))
    )
  epoch, warm = config.steps_per_epoch, min(6000, config.alone_steps // 10)
  first = optax.piecewise_constant_schedule(1.0, {200 * epoch: 0.1, 300 * epoch: 0.1})
  second = optax.piecewise_constant_schedule(0.01, {50 * epoch: 0.1})
  schedule = lambda step: jnp.where(
    step < config.alone_steps, jnp.minimum(step / max(warm, 1), 1) * first(step), second(step - config.alone_steps)
  )
  return optax.chain(
    optax.add_decayed_weights(5e-4),
    optax.trace(0.9),
    optax.scale_by_schedule(lambda step: -hparams["learning_rate"] * schedule(step)),
  )


@functools.lru_cache(maxsize=4)
def _splits(config: Config):
  return bundled.split(bundled.mnist_subset(), sizes=(config.train, config.valid, config.test))


def paper_batch(config: Config) -> dict[str, jax.ShapeDtypeStruct]:
  """One global batch of the stream."""
  return cifar10.batch_shapes(config.batch_size)


def reduced(config: Config) -> Config:
  """The same networks at the least width; five of ten steps exchange examples."""
  return dataclasses.replace(config, width=2, batch_size=8, train=8, epochs=10, alone=0.5)


def paper_sets(config: Config) -> dict[str, dict]:
  """A generated CIFAR-10."""
  del config
  return cifar10.generated_set(range(10), examples=64)


def cells(config: Config, seeds) -> dict[str, Cell]:
  """Every method at as many settings: strengths and learning rates; and nested dropout with the narrow sigma."""
  del seeds
  rates = config.learning_rates
  points = {
    "cross-entropy": ("dropout", grid(dropout=[0.0], learning_rate=(*rates, *config.more_learning_rates))),
    "dropout": ("dropout", grid(dropout=config.rates, learning_rate=rates)),
    "nested": ("nested", grid(sigma=config.sigmas, learning_rate=rates)),
    "narrow": ("nested", grid(sigma=[config.narrow_sigma], learning_rate=[config.learning_rate])),
    "co-teaching": ("coteaching", grid(forget_rate=config.forget_rates, learning_rate=rates)),
    "nested co-teaching": ("nested_coteaching", grid(sigma=config.sigmas, learning_rate=rates)),
  }
  return {
    name: Cell(
      task(dataclasses.replace(config, method=method)), config.steps, at, eval_every=config.steps_per_epoch
    )
    for name, (method, at) in points.items()
  }  # fmt: skip


COMPARED = ("cross-entropy", "dropout", "nested", "co-teaching", "nested co-teaching")


def summary(config: Config, trials: Trials) -> dict[str, np.ndarray]:
  """Of each method at the setting that is best on validation data: curves `[seeds, epochs]`, and the setting.

  `shared` has those at the best strength with the config's learning rate.
  """
  measured = {}
  for name in COMPARED:
    found = trials[name]
    for kind in ("", "pair_"):
      valid, test = (found.metrics[f"{kind}{split}_accuracy"] for split in ("valid", "test"))
      setting = select(valid[..., -1:]).setting
      measured[f"{name} {kind}accuracy"] = test[setting]
      measured[f"{name} {kind}stopped"] = select(valid).of(test)
      shared = np.isclose(found.hparams["learning_rate"], config.learning_rate)
      measured[f"{name} {kind}shared"] = test[shared][select(valid[shared][..., -1:]).setting][:, -1]
    for metric in ("wrong_memorised", "kept_fraction"):
      measured[f"{name} {metric}"] = found.metrics[metric][setting]
    for hparam in ("learning_rate", "dropout", "sigma", "forget_rate"):
      measured[f"{name} {hparam}"] = np.full(len(trials.seeds), found.hparams[hparam][setting])
  at = {"learning_rate": config.learning_rate}
  for sigma, cell in ((config.narrow_sigma, "narrow"), *((sigma, "nested") for sigma in config.sigmas)):
    measured[f"sigma {sigma:g}"] = trials[cell].at("test_accuracy", sigma=sigma, **at)[:, -1]
  return measured


def claims(config: Config) -> tuple[Claim, ...]:
  """That nested dropout resists wrong labels, and that co-teaching adds to it."""
  rate = config.noise_rate
  data = f"MNIST subset, {rate:g} of the training labels wrong"
  chosen = "strengths and learning rates chosen on clean validation images, equally many settings"
  strength = f"strengths chosen on clean validation images, learning rate {config.learning_rate:g} for both"
  one, pair = "clean test accuracy of one network", "clean test accuracy of the mean logits of two networks"
  last = lambda name, kind="": lambda m: m[f"{name} {kind}accuracy"][:, -1]
  difference = lambda one, other: lambda m: one(m) - other(m)
  found = (
    Claim(
      "over_cross_entropy",
      f"With one learning rate for both, nested dropout generalises better than cross-entropy on {rate:g} wrong labels",
      f"{one} at the last epoch, nested dropout minus cross-entropy, {data}, {strength}",
      lambda m: m["nested shared"] - m["cross-entropy shared"],
      at_least=0.08,
    ),
    Claim(
      "over_tuned_cross_entropy",
      f"Nested dropout generalises better than cross-entropy on {rate:g} wrong labels when both are tuned",
      f"{one} at the last epoch, nested dropout minus cross-entropy, {data}, {chosen}",
      difference(last("nested"), last("cross-entropy")),
      at_least=0.08,
    ),
    Claim(
      "over_dropout",
      f"Nested dropout generalises better than ordinary dropout of the features on {rate:g} wrong labels",
      f"{one} at the last epoch, nested minus ordinary dropout, {data}, {chosen}",
      difference(last("nested"), last("dropout")),
      at_least=0.05,
    ),
    Claim(
      "over_early_stopping",
      "Nested dropout at the last epoch is at least as good as cross-entropy stopped at its best epoch",
      f"{one}, nested dropout at the last epoch minus cross-entropy at the epoch that is best on the validation images,"
      f" {data}, {chosen}",
      difference(last("nested"), lambda m: m["cross-entropy stopped"]),
      at_least=0.0,
    ),
    Claim(
      "coteaching_adds",
      "Co-teaching after nested dropout improves on nested dropout alone",
      f"{pair} at the last epoch, nested co-teaching minus nested dropout, {data}, {chosen}",
      difference(last("nested co-teaching", "pair_"), last("nested", "pair_")),
      at_least=0.03,
    ),
    Claim(
      "over_coteaching",
      "Co-teaching after nested dropout loses nothing against co-teaching without it",
      f"{pair} at the last epoch, nested co-teaching minus co-teaching, {data}, {chosen}",
      difference(last("nested co-teaching", "pair_"), last("co-teaching", "pair_")),
      at_least=-0.005,
    ),
    Claim(
      "few_channels",
      "Nested dropout needs few of the features: the best number on validation data is a small fraction of them",
      f"best number of features over all {config.channels}, two networks with nested dropout, {data}, {chosen}",
      lambda m: m["nested kept_fraction"][:, -1],
      at_most=0.3,
    ),
    Claim(
      "narrow_hurts",
      f"A cut-off distribution that is too narrow (sigma {config.narrow_sigma:g}) loses accuracy",
      f"{one} at the last epoch, sigma {config.sigma:g} minus sigma {config.narrow_sigma:g}, {data}, learning rate"
      f" {config.learning_rate:g}",
      lambda m: m[f"sigma {config.sigma:g}"] - m[f"sigma {config.narrow_sigma:g}"],
      at_least=0.1,
    ),
  )
  reason = (
    "on 29 November 2026: cross-entropy alone had been offered the learning rate 1e-4, and it came out as {}; now every"
    " method has the same rates and as many settings, and the seeds are new"
  )
  return tuple(
    claim._replace(amended=reason.format(BEFORE[claim.name])) if claim.name in BEFORE else claim for claim in found
  )


DEVIATIONS = (
  "Perceptrons on an MNIST subset with Adam instead of ResNet-18 on CIFAR with SGD, which is the `paper` preset.",
  "Both stages are one run: the learning rate falls when examples are exchanged, and both networks have seen the same"
  " batches and wrong labels, from different initial parameters; the official code trains the networks apart and on"
  " Clothing1M on different subsets.",
  "At least one example of a batch is kept, where the official code's truncation could keep none.",
  "The official co-teaching divides the mean over the examples kept by their number once more; here it is the mean.",
  "The best number of channels may be one; the official code takes it for all channels then.",
  "The `paper` preset scores examples with 13 channels throughout, the number of the released CIFAR-10 networks, and"
  " reports accuracy at a few numbers of channels; choosing it needs a validation split, which CIFAR-10 does not have.",
)


# What came out before the grids were equal: seeds 100 to 104, mean and interval.
BEFORE = {
  "over_tuned_cross_entropy": "-0.013 [-0.025, 0.000], not reproduced",
  "over_dropout": "-0.016 [-0.021, -0.010], not reproduced",
  "over_early_stopping": "-0.015 [-0.022, -0.007], not reproduced",
  "coteaching_adds": "0.019 [0.012, 0.026], not reproduced",
  "over_coteaching": "-0.005 [-0.016, 0.006], undecided",
  "few_channels": "0.20 [0.07, 0.33], undecided",
}
NOTES = (
  "A small learning rate acts as early stopping here: 40 epochs with 1e-4 do not suffice to memorise wrong labels.",
  "The claims with one learning rate were reproduced (0.142 [0.129, 0.155]) and undecided (0.167 [0.095, 0.240]) with"
  " seeds 100 to 104.",
)


def figure(config: Config, summary: dict[str, np.ndarray], path: pathlib.Path) -> None:
  """Accuracy over epochs, at the last one, memorised labels, and accuracy by sigma."""
  names = COMPARED
  epochs = np.arange(1, config.epochs + 1)
  picture, axes = plots.panels(4)
  plots.curves(axes[0], epochs, {name: summary[f"{name} pair_accuracy"] for name in names})
  axes[0].set(title="two networks", xlabel="epoch", ylabel="clean test accuracy", ylim=(0.4, 1))
  axes[0].legend(frameon=False, fontsize=8, loc="lower left")
  plots.curves(axes[1], epochs, {name: summary[f"{name} wrong_memorised"] for name in names})
  axes[1].set(title="wrong labels memorised", xlabel="epoch", ylim=(0, 1))
  last = {name.replace(" ", "\n"): summary[f"{name} accuracy"][:, -1] for name in names}
  stopped = {"cross-entropy,\nstopped": summary["cross-entropy stopped"]}
  plots.bars(axes[2], {**stopped, **last})
  axes[2].set(title="one network, last epoch", ylabel="clean test accuracy", ylim=(0.4, 1))
  sigmas = (config.narrow_sigma, *config.sigmas)
  plots.bars(axes[3], {f"{sigma:g}": summary[f"sigma {sigma:g}"] for sigma in sigmas})
  axes[3].set(title="nested dropout by sigma", xlabel="sigma", ylim=(0.4, 1))
  plots.save(picture, path)
