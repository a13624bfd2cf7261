"""Quantization-aware training of classifiers whose bits are hyperparameters: one program for all precisions."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from experiments.problems.held_out import ONCE, mean_over
from experiments.problems.image_crops import central_crop, random_crop, standardized
from jaxreg.data import bundled, fashion_mnist, tfds_stream
from jaxreg.layers.loop_conv import loop_conv_general_dilated
from jaxreg.models.quantized_resnet import quant_resnet
from jaxreg.quantization.bounds import freeze_bounds
from jaxreg.quantization.integer import IntegerConv, IntegerDense
from jaxreg.quantization.layers import Precision, QConv, QDense
from jaxreg.training import HeldOut, Task, gradient_task

__all__ = ["Problem", "QMLP", "Setting", "network", "quantized_task", "schedule"]

CHUNK = 1000  # examples that are evaluated at once

DATASETS = ("digits", "fashion_mnist", "mnist_subset", "imagenet2012")


@dataclasses.dataclass(frozen=True)
class Problem:
  """One network and its training; the precision is a hyperparameter.

  Attributes:
    dataset: `digits`; `fashion_mnist` or `mnist_subset`, 14 × 14 pixels, means of four; or `imagenet2012` through TFDS.
    train, test: numbers of examples; not used for ImageNet.
    depth: blocks of the stages of a residual network, a usual depth, or () for three hidden layers.
    bottleneck: whether blocks of given stages are bottlenecks.
    width: channels of the first stage, or neurons of a hidden layer.
    batch_size: examples per step.
    steps: length of training.
    learning_rate: at its highest.
    weight_decay: in the loss, on parameters of rank above one.
    warmup, cooldown: fractions of training in which the rate rises, and falls once more to zero.
    start: fraction of training after which the bounds of activations are computed and frozen.
    size: ImageNet's images, pixels.
    classes: number of classes.
    precision: dtype in which everything but the fake quantization computes.
  """

  dataset: str = "digits"
  train: int = 1000
  test: int = 797
  depth: int | tuple[int, ...] = ()
  bottleneck: bool = False
  width: int = 32
  batch_size: int = 64
  steps: int = 1200
  learning_rate: float = 0.05
  weight_decay: float = 5e-4
  warmup: float = 0.0
  cooldown: float = 0.0
  start: float = 0.25
  size: int = 224
  classes: int = 10
  precision: str = "float32"

  def __post_init__(self):
    if self.dataset not in DATASETS:
      raise ValueError(f"dataset must be one of {', '.join(DATASETS)}, got {self.dataset!r}.")
    if not 0 <= self.start <= 1 or min(self.warmup, self.cooldown) < 0 or self.warmup + self.cooldown > 1:
      raise ValueError("start, and warmup and cooldown together, must be fractions of training.")

  @property
  def image(self) -> tuple[int, int, int]:
    return {"digits": (8, 8, 1), "imagenet2012": (self.size, self.size, 3)}.get(self.dataset, (14, 14, 1))


class QMLP(nn.Module):
  """Three hidden layers in low precision, the first and the last layer in a higher one."""

  width: int
  classes: int
  precision: Precision
  dense: Callable = QDense

  @nn.compact
  def __call__(self, inputs, *, train: bool):
    del train
    p, hidden = self.precision, inputs.reshape(inputs.shape[0], -1)
    ends, inner = (p.end_weights, p.end_activations), (p.weights, p.activations)
    for index, (features, bits) in enumerate([(self.width, ends), *[(self.width, inner)] * 2, (self.classes, ends)]):
      layer = self.dense(features, weight_bits=bits[0], act_bits=bits[1], signed=index == 0, name=f"dense{index}")
      hidden = layer(hidden)
      hidden = nn.relu(hidden) if index < 3 else hidden
    return hidden


def network(problem: Problem, precision: Precision, *, axis_name=None, conv=None, dense=QDense) -> nn.Module:
  """The network of a problem; with `IntegerConv` and `IntegerDense` the same one for integer inference."""
  if conv is None:
    small = problem.dataset != "imagenet2012"
    conv = functools.partial(QConv, conv_general_dilated=loop_conv_general_dilated) if small else QConv
    # As in the paper's code.
    conv, dense = (functools.partial(layer, from_first_batch=False) for layer in (conv, dense))
  if not problem.depth:
    return QMLP(problem.width, problem.classes, precision, dense=functools.partial(dense, axis_name=axis_name))
  shared = dict(classes=problem.classes, width=problem.width, conv=conv, dense=dense, axis_name=axis_name)
  images = dict(large_images=problem.dataset == "imagenet2012", bottleneck=problem.bottleneck)
  return quant_resnet(problem.depth, precision, **images, **shared)


def schedule(problem: Problem) -> Callable:
  """The learning rate relative to its highest value: a cosine, times a linear rise, times a linear fall to zero."""
  warm, cool = (fraction * problem.steps for fraction in (problem.warmup, problem.cooldown))

  def rate(step):
    past = jnp.clip((step - warm) / (problem.steps - warm - cool), 0, 1)
    cosine = (1 - 0.001) * (1 + jnp.cos(jnp.pi * past)) / 2 + 0.001
    rise = jnp.minimum(1, step / warm) if warm else 1
    return cosine * rise * (jnp.minimum(1, (problem.steps - step) / cool) if cool else 1)

  return rate


@dataclasses.dataclass(frozen=True)
class Setting:
  """What is static about a task: the problem, the default (on ImageNet the only) precision, and where the data are."""

  problem: Problem
  precision: Precision
  data_dir: str | None = None


@functools.lru_cache(maxsize=16)
def quantized_task(problem: Problem, precision: Precision, *, data_dir: str | None = None) -> Task:
  """The task; hyperparameters are `learning_rate` and the four numbers of bits, whose defaults are `precision`.

  On ImageNet, which is read from a stream and so cannot be swept, the bits are static: a smaller program. Held out is
  its validation split.
  """
  start, streamed = round(problem.start * problem.steps), problem.dataset == "imagenet2012"
  bits_of = (lambda hparams: precision) if streamed else _precision

  def init_params(key, hparams):
    model = network(problem, bits_of(hparams))
    return _pop(model.init(key, jnp.zeros((1, *problem.image)), train=False))

  def predict(params, extra, inputs, bits=precision, **layers):
    model = network(problem, bits, **layers)
    return model.apply({"params": params, **extra}, standardized(params, inputs), train=False)

  def objective(params, extra, batch, context):
    model = network(problem, bits_of(context.hparams), axis_name=context.axis_name)
    images, labels = standardized(params, batch[entry]), batch["label" if streamed else "y"]
    logits, new = model.apply({"params": params, **extra}, images, train=True, mutable=list(extra))
    losses = optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), labels)
    kernels = [leaf for leaf in jax.tree.leaves(params) if leaf.ndim > 1]
    decay = sum(jnp.sum(jnp.square(kernel.astype(jnp.float32))) for kernel in kernels)
    # One bound per channel, as in the paper's code; integer inference takes the largest of them for the layer.
    due = context.step + 1 == start
    new = {**new, "quant_stats": freeze_bounds(new["quant_stats"], when=due, per_tensor=False)}
    return losses.mean() + problem.weight_decay / 2 * decay, (new, {})

  def evaluate(params, extra, hparams):
    bits = _precision(hparams)
    low = Precision(*(jnp.minimum(number, 8) for number in bits))
    train, test = _splits(problem)
    plain = functools.partial(predict, params, extra, bits=bits)
    integer = functools.partial(predict, params, extra, bits=low, conv=IntegerConv, dense=IntegerDense)
    return {
      "train_accuracy": _accuracy(plain, train),
      "test_accuracy": _accuracy(plain, test),
      "integer_test_accuracy": _accuracy(integer, test),
    }

  def measure(state, batch, hparams):
    del hparams
    logits = predict(state.params, state.extra, batch["image"])
    return mean_over(batch, valid_accuracy=logits.argmax(-1) == batch["label"])

  if streamed:
    entry, hparams = "image", {"learning_rate": problem.learning_rate}
    stream = functools.partial(tfds_stream, "imagenet2012", batch_size=problem.batch_size, data_dir=data_dir)
    crops = [functools.partial(crop, size=problem.size) for crop in (random_crop, central_crop)]
    source = {
      "data": functools.partial(stream, split="train", seed=0, transform=crops[0]),
      "held_out": HeldOut(functools.partial(stream, split="validation", transform=crops[1], **ONCE), measure),
    }
  else:
    entry, hparams = "x", {"learning_rate": problem.learning_rate, **precision._asdict()}
    source = {"data": _splits(problem)[0], "evaluate": evaluate}
  return gradient_task(
    init_params,
    objective,
    lambda hparams: optax.sgd(
      lambda step: hparams["learning_rate"] * schedule(problem)(step), momentum=0.9, nesterov=bool(problem.depth)
    ),
    batch_size=problem.batch_size,
    hparams=hparams,
    predict=predict,
    config=Setting(problem, precision, data_dir),
    precision=problem.precision,
    cast=(entry,),
    **source,
  )


def _precision(hparams) -> Precision:
  return Precision(*(jnp.asarray(hparams[name]) for name in Precision._fields))


def _pop(variables) -> tuple[Any, dict]:
  return variables["params"], {name: value for name, value in variables.items() if name != "params"}


def _accuracy(predict: Callable, part: dict) -> jax.Array:
  inputs, labels = (jnp.asarray(part[name]) for name in "xy")
  right = lambda pair: jnp.mean(predict(pair[0]).argmax(-1) == pair[1])
  if len(labels) <= CHUNK or len(labels) % CHUNK:
    return right((inputs, labels))
  return jnp.mean(jax.lax.map(right, tuple(x.reshape(-1, CHUNK, *x.shape[1:]) for x in (inputs, labels))))


@functools.lru_cache(maxsize=8)
def _splits(problem: Problem) -> tuple[dict, dict]:
  sizes = problem.train, problem.test
  if problem.dataset == "digits":
    return bundled.split(bundled.digits(), sizes=sizes)
  small = lambda x: x.reshape(len(x), 14, 2, 14, 2, 1).mean((2, 4))
  if problem.dataset == "mnist_subset":
    parts = bundled.split(bundled.mnist_subset(), sizes=sizes)
  else:
    parts = _garments(sizes)
  return bundled.standardize(*({"x": small(part["x"]), "y": part["y"]} for part in parts))


def _garments(sizes: Sequence[int]) -> tuple[dict, dict]:
  """The first images of Fashion-MNIST's own parts."""
  parts = fashion_mnist()
  if any(len(part["y"]) < size for part, size in zip(parts, sizes)):
    raise ValueError(f"train and test must be at most {[len(part['y']) for part in parts]}, got {sizes}.")
  return tuple({name: value[:size] for name, value in part.items()} for part, size in zip(parts, sizes))
