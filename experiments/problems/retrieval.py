"""Retrieval of unseen classes: embeddings trained on some classes, measured on others; any loss of embeddings.

The synthetic set has classes in a code, beside it nuisances that are large in some classes and small in others, and a
random non-linear map to the inputs. Every seed draws its own. Images are CUB-200 and Cars196 through TFDS, of which the
first half of the classes trains and the second is measured.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.problems.held_out import ONCE
from experiments.problems.image_crops import central_crop, random_crop, standardized
from jaxreg.data import tfds_stream
from jaxreg.metrics import retrieval
from jaxreg.models import ResNet
from jaxreg.training import HeldOut, Mean, Task, gradient_task

__all__ = ["Embedded", "Embedder", "Images", "Method", "Problem", "image_batch", "image_sets", "image_task", "task"]

CLASSES = {"caltech_birds2011": 200, "cars196": 196}
EXAMPLES = {"caltech_birds2011": 11_788, "cars196": 16_185}
CHUNK = 100  # images that are embedded at once for evaluation


class Embedded(NamedTuple):
  """What a loss may read of a batch.

  Attributes:
    inputs: `[batch, ...]`.
    hidden: `[batch, ...]`, what the head gets.
    embeddings: `[batch, features]`, not normalised.
    labels: integers `[batch]`, negative where an example does not count.
    features: `inputs -> hidden`.
    head: `hidden -> embeddings`.
  """

  inputs: jax.Array
  hidden: jax.Array
  embeddings: jax.Array
  labels: jax.Array
  features: Callable
  head: Callable


@dataclasses.dataclass(frozen=True)
class Problem:
  """The synthetic set and the training on it.

  Attributes:
    train_classes: classes that are trained on.
    test_classes: classes that are measured.
    skipped_classes: how many classes lie between both; so validation classes are training classes left out.
    all_classes: classes that are drawn; the same for every part of a set.
    samples: of each class.
    train_samples: of each training class that are trained on.
    noise: of the code, relative to the spread of the classes.
    nuisance: range of the nuisances' size.
    classes_per_batch, samples_per_class: a batch.
    batches: number of steps.
    hidden: widths of the hidden layers.
    embedding: number of outputs.
    learning_rate, weight_decay: of Adam, the decay in the gradient.
  """

  train_classes: int = 240
  test_classes: int = 60
  skipped_classes: int = 0
  all_classes: int = 300
  samples: int = 16
  train_samples: int = 10
  noise: float = 0.3
  nuisance: tuple[float, float] = (0.2, 2.2)
  classes_per_batch: int = 24
  samples_per_class: int = 5
  batches: int = 600
  hidden: tuple[int, ...] = (256, 256)
  embedding: int = 32
  learning_rate: float = 1e-3
  weight_decay: float = 1e-4

  def __post_init__(self):
    if self.train_classes + self.skipped_classes + self.test_classes > self.all_classes:
      raise ValueError(f"train, skipped and test classes must be at most {self.all_classes} together.")

  def validation(self, classes: int) -> "Problem":
    """The same set without its test classes; the last training classes are measured instead."""
    return dataclasses.replace(self, train_classes=self.train_classes - classes, test_classes=classes)


class Embedder(nn.Module):
  """A perceptron in two parts, between which examples can be mixed."""

  hidden: tuple[int, ...]
  embedding: int

  def setup(self):
    self.layers = [nn.Dense(width) for width in self.hidden]
    self.out = nn.Dense(self.embedding)

  def features(self, inputs):
    for layer in self.layers:
      inputs = nn.relu(layer(inputs))
    return inputs

  def head(self, hidden):
    return self.out(hidden)

  def __call__(self, inputs):
    return self.head(self.features(inputs))


@dataclasses.dataclass(frozen=True)
class Method:
  """What is static about a task: the problem and the name of the loss."""

  problem: Any
  loss: str


def task(
  problem: Problem,
  name: str,
  loss: Callable,
  hparams: Mapping[str, float],
  measure: Callable | None = None,
) -> Task:
  """Training on batches of `classes_per_batch` classes, so many samples of each.

  Args:
    problem: data, model and optimizer.
    name: of the loss, for the identity of runs.
    loss: `(key, Embedded, hparams, axis_name) -> [batch]`.
    hparams: of the loss, and their defaults.
    measure: `(embed, features, head, sets, hparams) -> metrics` beyond recall and OPIS.

  Returns:
    The task; its data are the numbers of the classes, for the samples differ between seeds.
  """
  model = Embedder(problem.hidden, problem.embedding)

  def init_params(key, hparams):
    del hparams
    data, network = jax.random.split(key)
    sets = draw(data, problem)
    params = model.init(network, sets["train"][0, :1])["params"]
    return params, sets

  def embedded(params, inputs, labels) -> Embedded:
    features = lambda x: model.apply({"params": params}, x, method="features")
    head = lambda h: model.apply({"params": params}, h, method="head")
    hidden = features(inputs)
    return Embedded(inputs, hidden, head(hidden), labels, features, head)

  def objective(params, extra, batch, context):
    choice, rest = jax.random.split(context.key)
    classes = batch["class"]
    uniform = jax.random.uniform(choice, (len(classes), problem.train_samples))
    chosen = jnp.argsort(uniform, axis=1)[:, : problem.samples_per_class]
    inputs = extra["train"][classes[:, None], chosen].reshape(-1, extra["train"].shape[-1])
    labels = jnp.repeat(classes, problem.samples_per_class)
    values = loss(rest, embedded(params, inputs, labels), context.hparams, context.axis_name)
    return jnp.mean(values), (extra, {})

  def evaluate(params, extra, hparams):
    count = problem.test_classes
    inputs = extra["test"].reshape(-1, extra["test"].shape[-1])
    labels = jnp.repeat(jnp.arange(count), problem.samples)
    embeddings = model.apply({"params": params}, inputs)
    found = {
      "recall_at_1": retrieval.recall_at_k(embeddings, labels),
      "opis": retrieval.opis(embeddings, labels, num_classes=count),
      "epsilon_opis": retrieval.epsilon_opis(embeddings, labels, num_classes=count),
      "map_at_r": retrieval.mean_average_precision_at_r(embeddings, labels, max_relevant=problem.samples - 1),
    }
    if measure is not None:
      train = extra["train"].reshape(-1, inputs.shape[-1])
      of_train = embedded(params, train, jnp.repeat(jnp.arange(problem.train_classes), problem.train_samples))
      found |= measure(of_train, embeddings, hparams)
    return found

  return gradient_task(
    init_params,
    objective,
    lambda hparams: optax.chain(optax.add_decayed_weights(problem.weight_decay), optax.adam(problem.learning_rate)),
    data={"class": np.arange(problem.train_classes, dtype=np.int32)},
    batch_size=problem.classes_per_batch,
    hparams=dict(hparams),
    evaluate=evaluate,
    predict=lambda params, extra, inputs: model.apply({"params": params}, inputs),
    config=Method(problem, name),
  )


def draw(key: jax.Array, problem: Problem) -> dict[str, jax.Array]:
  """`train` and `test`, `[classes, samples, 64]`; a seed's classes do not depend on which of them are trained on."""
  code, inputs = 12, 64
  keys = jax.random.split(key, 6)
  shape = (problem.all_classes, problem.samples, code)
  means = jax.random.normal(keys[0], (problem.all_classes, 1, code))
  low, high = problem.nuisance
  sizes = jax.random.uniform(keys[1], (problem.all_classes, 1, 1), minval=low, maxval=high)
  codes = [
    means + problem.noise * jax.random.normal(keys[2], shape),
    sizes * jax.random.normal(keys[3], shape),
  ]
  first = jax.random.normal(keys[4], (2 * code, inputs)) / np.sqrt(2 * code)
  second = jax.random.normal(keys[5], (inputs, inputs)) / np.sqrt(inputs)
  samples = jnp.tanh(jnp.concatenate(codes, axis=-1) @ first) @ second
  start = problem.train_classes + problem.skipped_classes
  return {
    "train": samples[: problem.train_classes, : problem.train_samples],
    "test": samples[start : start + problem.test_classes],
  }


@dataclasses.dataclass(frozen=True)
class Images:
  """Images of TFDS and the training on them.

  Attributes:
    dataset: `caltech_birds2011` (CUB-200) or `cars196`.
    size: pixels of a side.
    depth: of the residual network, a usual one or blocks of the stages.
    width: channels of its first stage.
    embedding: number of outputs.
    batch_size: images per step, of all classes; those of the measured half do not count.
    epochs: passes over the set.
    learning_rate, weight_decay: of Adam, the decay in the gradient.
    decay_every, decay: after so many epochs the rate is multiplied by `decay`.
    clip: gradients are clipped to this size, entry by entry.
    classes, examples: of the set.
  """

  dataset: str = "caltech_birds2011"
  size: int = 224
  depth: int | tuple[int, ...] = 50
  width: int = 64
  embedding: int = 512
  batch_size: int = 200
  epochs: int = 60
  learning_rate: float = 1e-4
  weight_decay: float = 1e-4
  decay_every: int = 5
  decay: float = 0.5
  clip: float = 10.0
  classes: int = 0
  examples: int = 0

  def __post_init__(self):
    if self.dataset not in CLASSES:
      raise ValueError(f"dataset must be one of {', '.join(CLASSES)}, got {self.dataset!r}.")

  @property
  def num_classes(self) -> int:
    return self.classes or CLASSES[self.dataset]

  @property
  def num_examples(self) -> int:
    return self.examples or EXAMPLES[self.dataset]

  @property
  def steps_per_epoch(self) -> int:
    return self.num_examples // self.batch_size

  @property
  def steps(self) -> int:
    return self.epochs * self.steps_per_epoch


def image_task(
  images: Images, name: str, loss: Callable, hparams: Mapping[str, float], *, data_dir: str | None = None
) -> Task:
  """The training on images; the whole second half of the classes is one batch of held-out data.

  The network ends in an average over places and a linear layer, so that mixing what they get is mixing embeddings
  before they are normalised: `hidden` are the embeddings, and the head is the identity.
  """
  stages = dict(depth=images.depth) if isinstance(images.depth, int) else None
  build = functools.partial(ResNet.of_depth, **stages) if stages else functools.partial(ResNet, stages=images.depth)

  def model(axis_name=None):
    return build(classes=images.embedding, width=images.width, large_images=True, axis_name=axis_name)

  half, shape = images.num_classes // 2, (images.size, images.size, 3)

  def init_params(key, hparams):
    del hparams
    variables = model().init(key, jnp.zeros((1, *shape)), train=False)
    return variables["params"], {"batch_stats": variables["batch_stats"]}

  def objective(params, extra, batch, context):
    network = model(context.axis_name)
    inputs = standardized(params, batch["image"])
    embeddings, new = network.apply({"params": params, **extra}, inputs, train=True, mutable=["batch_stats"])
    labels = jnp.where(batch["label"] < half, batch["label"], -1)
    identity = lambda hidden: hidden
    whole = Embedded(inputs, embeddings, embeddings, labels, identity, identity)
    values = loss(context.key, whole, context.hparams, context.axis_name)
    return Mean(jnp.sum(values), jnp.sum(labels >= 0)), (dict(new), {})

  def predict(params, extra, inputs):
    return model().apply({"params": params, **extra}, standardized(params, inputs), train=False)

  def measure(state, batch, hparams):
    del hparams
    pictures, count = batch["image"], len(batch["label"])
    pad = -count % CHUNK
    chunks = jnp.pad(pictures, ((0, pad), (0, 0), (0, 0), (0, 0))).reshape(-1, CHUNK, *shape)
    embeddings = jax.lax.map(lambda part: predict(state.params, state.extra, part), chunks)
    embeddings = embeddings.reshape(-1, images.embedding)[:count].astype(jnp.float32)
    labels = jnp.where(batch["valid"], batch["label"] - half, -1)
    recall = retrieval.recall_at_k(embeddings, labels)
    pairs = dict(num_pairs=min(5_000_000, 100 * count), key=jax.random.key(0))
    score = retrieval.opis(embeddings, labels, num_classes=images.num_classes - half, **pairs)
    return {"recall_at_1": Mean(recall, jnp.float32(1)), "opis": Mean(score, jnp.float32(1))}

  def optimizer(hparams):
    scale = lambda step: images.decay ** (step // (images.decay_every * images.steps_per_epoch))
    return optax.chain(
      optax.clip(images.clip),
      optax.add_decayed_weights(images.weight_decay),
      optax.scale_by_adam(),
      optax.scale_by_schedule(lambda step: -hparams["learning_rate"] * scale(step)),
    )

  stream = functools.partial(tfds_stream, images.dataset, "train+test", data_dir=data_dir)
  crops = (
    functools.partial(random_crop, size=images.size, smallest=0.16),
    functools.partial(central_crop, size=images.size),
  )
  return gradient_task(
    init_params,
    objective,
    optimizer,
    data=functools.partial(stream, batch_size=images.batch_size, seed=0, transform=crops[0]),
    batch_size=images.batch_size,
    hparams={"learning_rate": images.learning_rate, **hparams},
    predict=predict,
    held_out=HeldOut(
      functools.partial(stream, batch_size=_whole(images.num_examples), transform=crops[1], **ONCE), measure
    ),
    config=Method(images, name),
    cast=("image",),
  )


def image_batch(images: Images) -> dict[str, jax.ShapeDtypeStruct]:
  """One global batch of the stream."""
  integers = jax.ShapeDtypeStruct((images.batch_size,), jnp.int32)
  pictures = jax.ShapeDtypeStruct((images.batch_size, images.size, images.size, 3), jnp.uint8)
  return {"image": pictures, "label": integers, "id": integers}


def reduced_images(images: Images) -> Images:
  """A small network of the same kinds of layers on few small images."""
  small = dict(size=16, depth=(1,), width=4, embedding=8, batch_size=16, classes=8, examples=40)
  return dataclasses.replace(images, **small)


def image_sets(images: Images) -> dict[str, dict]:
  """Random pictures of different sizes, in the splits and with the entries of TFDS's set."""
  rng = np.random.default_rng(0)

  def split(examples):
    pictures = [rng.integers(0, 256, (20 + index % 5, 24, 3), np.uint8) for index in range(examples)]
    boxes = np.tile(np.float32([0, 0, 1, 1]), (examples, 1))
    masks = {} if images.dataset == "cars196" else {"segmentation_mask": [picture[..., :1] for picture in pictures]}
    return {"image": pictures, "label": np.arange(examples) % images.num_classes, "bbox": boxes, **masks}

  return {images.dataset: {"train": split(24), "test": split(images.num_examples - 24)}}


def _whole(examples: int) -> int:
  """All examples in one batch, whose size the devices of a large mesh divide."""
  return -(-examples // 64) * 64
