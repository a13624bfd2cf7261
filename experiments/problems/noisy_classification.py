"""Classification with noisy labels, the task that several recipes share: same model, data and optimizer, any loss."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from jaxreg.data import bundled, mixing, noise
from jaxreg.losses import comp_sum, early_learning, label_dro
from jaxreg.metrics import classification
from jaxreg.models import MLP
from jaxreg.training import Task, gradient_task

ACTIVATIONS = {"relu": nn.relu, "tanh": nn.tanh}
HPARAMS = {"learning_rate": 0.05, "noise_rate": 0.4}
_RAMP = 40_000 / (200 * 352)  # ELR+'s ramp as a fraction of its training on CIFAR-10: 200 epochs of 45,000 / 128 steps


class LossPart(NamedTuple):
  """A loss as the task uses it; stateless ones keep an empty state.

  Attributes:
    init: `(num_examples, num_classes, hparams) -> state`.
    apply: `(logits, labels, ids, state, hparams, axis_name) -> (values, state)`.
    hparams: default hyperparameters.
  """

  init: Callable
  apply: Callable
  hparams: Mapping[str, float]


def _stateless(loss: Callable, **hparams: float) -> LossPart:
  def apply(logits, labels, ids, state, hparams, axis_name):
    del ids, axis_name
    return loss(logits, labels, hparams), state

  return LossPart(lambda *_: {}, apply, hparams)


def _ldr(normalize: str | None) -> LossPart:
  return _stateless(
    lambda logits, labels, h: label_dro.ldr_kl_loss(
      logits, labels, temperature=h["temperature"], margin=h["margin"], normalize=normalize
    ),
    temperature=10.0,
    margin=0.1,
  )


LOSSES: dict[str, LossPart] = {
  "cross_entropy": _stateless(lambda z, y, h: optax.softmax_cross_entropy_with_integer_labels(z, y)),
  "gce": _stateless(lambda z, y, h: comp_sum.generalized_cross_entropy_loss(z, y, q=h["q"]), q=0.7),
  "ldr_kl": _ldr("l1_mean"),
  "ldr_kl_softplus": _ldr("softplus_mean"),
  "ldr_kl_raw": _ldr(None),
  "aldr_kl": LossPart(
    lambda examples, classes, h: label_dro.aldr_kl_init(examples, temperature=h["temperature"]),
    lambda z, y, ids, state, h, axis_name: label_dro.aldr_kl_loss(
      z,
      y,
      ids,
      state=state,
      initial_temperature=h["temperature"],
      alpha=h["alpha"],
      margin=h["margin"],
      normalize="l1_mean",
      axis_name=axis_name,
    ),
    {"temperature": 10.0, "alpha": 2.0, "margin": 0.1},
  ),
  "elr": LossPart(
    lambda examples, classes, h: early_learning.elr_init(examples, classes),
    lambda z, y, ids, state, h, axis_name: early_learning.elr_loss(
      z, y, ids, state=state, momentum=h["momentum"], weight=h["weight"], axis_name=axis_name
    ),
    {"momentum": 0.7, "weight": 3.0},
  ),
}


@dataclasses.dataclass(frozen=True)
class Problem:
  """What is held equal between losses.

  Attributes:
    dataset: `digits` (standardised 8 × 8) or `mnist_subset` (5,000 images in [0, 1]).
    train, valid, test: numbers of examples; the validation labels are as noisy as the training labels.
    hidden: widths of the hidden layers.
    activation: `relu` or `tanh`.
    batch_size: examples per step.
    epochs: passes over the training set.
    weight_decay: coupled (L2), on all parameters.
    decay_at: fractions of training after which the learning rate falls tenfold.
    split_seed: seed of the split, the same for every run.
    measure_training: whether to evaluate on the training set too (memorised labels).
  """

  dataset: str = "mnist_subset"
  train: int = 4000
  valid: int = 0
  test: int = 1000
  hidden: tuple[int, ...] = (128,)
  activation: str = "relu"
  batch_size: int = 100
  epochs: int = 60
  weight_decay: float = 0.0
  decay_at: tuple[float, ...] = ()
  split_seed: int = 0
  measure_training: bool = False

  def __post_init__(self):
    if self.dataset not in ("digits", "mnist_subset"):
      raise ValueError(f"dataset must be digits or mnist_subset, got {self.dataset!r}.")
    if self.activation not in ACTIVATIONS:
      raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {self.activation!r}.")
    if self.epochs < 1 or not 1 <= self.batch_size <= self.train:
      raise ValueError(
        f"epochs must be positive and batch_size in [1, {self.train}], got {self.epochs}, {self.batch_size}."
      )

  @property
  def name(self) -> str:
    """What the data are called in claims."""
    return {"digits": "digits", "mnist_subset": "MNIST subset"}[self.dataset]

  @property
  def steps_per_epoch(self) -> int:
    return self.train // self.batch_size

  @property
  def steps(self) -> int:
    return self.epochs * self.steps_per_epoch


@dataclasses.dataclass(frozen=True)
class Method:
  """What is static about a task: the problem, and one of `LOSSES` or `elr_plus`."""

  problem: Problem
  loss: str


def noisy_task(problem: Problem, loss: str) -> Task:
  """The task; hyperparameters are `learning_rate`, `noise_rate` (uniform over all classes) and those of the loss.

  The noise is drawn from the run's key, so that all losses see the same wrong labels at the same seed and rate.
  """
  if loss not in LOSSES:
    raise ValueError(f"loss must be one of {', '.join(LOSSES)}, got {loss!r}.")
  part, predict = LOSSES[loss], functools.partial(_predict, problem)

  def objective(params, extra, batch, context):
    logits = predict(params, extra, batch["x"])
    labels = extra["labels"][batch["id"]]
    values, state = part.apply(logits, labels, batch["id"], extra["loss"], context.hparams, context.axis_name)
    return jnp.mean(values), ({**extra, "loss": state}, {})

  return gradient_task(
    functools.partial(_init_params, problem, part),
    objective,
    functools.partial(_optimizer, problem),
    data={"x": _splits(problem)[0]["x"]},
    batch_size=problem.batch_size,
    hparams={**HPARAMS, **part.hparams},
    evaluate=functools.partial(evaluate, problem, predict),
    predict=predict,
    config=Method(problem, loss),
  )


def elr_plus_task(problem: Problem) -> Task:
  """ELR+: two networks on mixed batches, each with targets from the other's averaged weights; predicts with both.

  Both networks see the same batches and wrong labels, differ in initial parameters and mixing, and step at once.
  Hyperparameters beyond those of ELR: `ema` and `ema_ramp` (steps, see `averaging`) of the averaged weights, `alpha` of
  mixup.
  """
  part, one = LOSSES["elr"], functools.partial(_predict, problem)
  train, classes = _splits(problem)[0], _classes(problem)

  def init_params(key, hparams):
    first, extra = _init_params(problem, part, key, hparams)
    second, _ = _init_params(problem, part, jax.random.fold_in(key, 1), hparams)
    pair = jax.tree.map(lambda a, b: jnp.stack([a, b]), first, second)
    tables = jax.tree.map(lambda table: jnp.stack([table, table]), extra["loss"])
    return pair, {**extra, "loss": tables, "averaged": pair}

  def objective(params, extra, batch, context):
    hparams, one_hot = context.hparams, jax.nn.one_hot(extra["labels"][batch["id"]], classes)

    def loss(params, teacher, table, key):
      inputs, soft, coefficient, permutation = mixing.mixup(key, batch["x"], one_hot, alpha=hparams["alpha"])
      values, table = early_learning.elr_plus_loss(
        one(params, {}, inputs),
        soft,
        one(teacher, {}, batch["x"]),
        batch["id"],
        state=table,
        permutation=permutation,
        coefficient=coefficient,
        momentum=hparams["momentum"],
        weight=hparams["weight"],
        axis_name=context.axis_name,
      )
      return jnp.mean(values), table

    teachers = jax.tree.map(lambda leaf: leaf[::-1], extra["averaged"])
    losses, tables = jax.vmap(loss)(params, teachers, extra["loss"], jax.random.split(context.key, 2))
    return jnp.sum(losses), ({**extra, "loss": tables}, {})

  def average(params, extra, context):
    fraction = 1 - averaging(context.step, context.hparams["ema"], context.hparams["ema_ramp"])
    return params, {**extra, "averaged": optax.incremental_update(params, extra["averaged"], fraction)}

  def predict(params, extra, inputs):
    return jnp.mean(jax.vmap(one, (0, None, None))(params, extra, inputs), axis=0)

  return gradient_task(
    init_params,
    objective,
    functools.partial(_optimizer, problem),
    data={"x": train["x"]},
    batch_size=problem.batch_size,
    hparams={**HPARAMS, **part.hparams, "ema": 0.997, "ema_ramp": float(round(_RAMP * problem.steps)), "alpha": 1.0},
    after_update=average,
    evaluate=functools.partial(evaluate, problem, predict),
    predict=predict,
    config=Method(problem, "elr_plus"),
  )


def averaging(step, ema, ramp):
  """The momentum of ELR+'s averaged weights after a step, counted from 0.

  `ema` times a ramp of that many steps (CIFAR); with a ramp of 0, `min(1 - 1 / (step + 1), ema)`: the mean of all
  weights so far until that would remember longer than `ema` does (Clothing1M, WebVision).
  """
  with_ramp = ema * early_learning.sigmoid_rampup(step + 1, length=ramp)
  return jnp.where(jnp.asarray(ramp) > 0, with_ramp, jnp.minimum(1 - 1 / (step + 1), ema))


def _classes(problem: Problem) -> int:
  return int(_splits(problem)[0]["y"].max()) + 1


def _model(problem: Problem) -> MLP:
  activation, init = ACTIVATIONS[problem.activation], nn.initializers.xavier_normal()
  return MLP((*problem.hidden, _classes(problem)), activation=activation, kernel_init=init)


def _init_params(problem: Problem, part: LossPart, key, hparams):
  train, valid, _ = _splits(problem)
  keys, classes = jax.random.split(key, 3), _classes(problem)

  def corrupt(key, labels):
    return noise.symmetric_noise(key, jnp.asarray(labels), rate=hparams["noise_rate"], num_classes=classes)

  params = _model(problem).init(keys[0], jnp.zeros((1, *train["x"].shape[1:])))["params"]
  extra = {"labels": corrupt(keys[1], train["y"]), "loss": part.init(problem.train, classes, hparams)}
  if problem.valid:
    extra["valid_labels"] = corrupt(keys[2], valid["y"])
  return params, extra


def _predict(problem: Problem, params, extra, inputs):
  del extra
  return _model(problem).apply({"params": params}, inputs)


def _optimizer(problem: Problem, hparams):
  boundaries = {int(fraction * problem.steps): 0.1 for fraction in problem.decay_at}
  schedule = optax.piecewise_constant_schedule(1.0, boundaries)
  return optax.chain(
    optax.add_decayed_weights(problem.weight_decay),
    optax.trace(0.9),
    optax.scale_by_schedule(lambda step: -hparams["learning_rate"] * schedule(step)),
  )


def evaluate(problem: Problem, predict: Callable, params, extra, hparams) -> dict[str, jax.Array]:
  """Clean test accuracy; accuracy on the noisy validation split if there is one; training metrics if asked for."""
  del hparams
  train, valid, test = _splits(problem)
  accuracy = lambda inputs, labels: jnp.mean(predict(params, extra, inputs).argmax(-1) == labels)
  metrics = {"test_accuracy": accuracy(test["x"], test["y"])}
  if problem.valid:
    metrics["noisy_valid_accuracy"] = accuracy(valid["x"], extra["valid_labels"])
  if problem.measure_training:
    logits = predict(params, extra, train["x"])
    metrics |= training_metrics(logits, train["y"], extra["labels"], extra["loss"])
  return metrics


def training_metrics(logits, clean, noisy, state: Any) -> dict[str, jax.Array]:
  """What became of the wrong labels, and what a per-example table of the loss knows about them."""
  fractions = classification.memorization_fractions(logits, noisy, jnp.asarray(clean))
  metrics = {"wrong_corrected": fractions.correct, "wrong_memorised": fractions.memorized}
  if isinstance(state, label_dro.ALDRState):
    metrics["temperature_auroc"] = classification.area_under_roc(state.temperature, clean != noisy)
  if isinstance(state, early_learning.ELRState):
    metrics["targets_correct"] = jnp.mean(state.targets.argmax(-1) == clean)
  return metrics


@functools.lru_cache(maxsize=8)
def _splits(problem: Problem):
  data = bundled.digits() if problem.dataset == "digits" else bundled.mnist_subset()
  parts = bundled.split(data, sizes=(problem.train, problem.valid, problem.test), seed=problem.split_seed)
  return bundled.standardize(*parts) if problem.dataset == "digits" else parts
