"""Z-loss: a loss of standardized logits whose exact step on a huge output layer does not know the number of classes."""

import ast
import dataclasses
import functools
import pathlib
import re
import sysconfig
import time

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import threadpoolctl

from experiments.harness import plots
from experiments.harness.claims import Claim
from experiments.harness.trials import Cell, CellTrials, Trials
from experiments.problems.held_out import ONCE, mean_over
from jaxreg.data import tfds_stream
from jaxreg.layers.factored_output import FactoredOutput
from jaxreg.losses import spherical
from jaxreg.metrics.classification import top_k_accuracy
from jaxreg.models import MLP
from jaxreg.solvers.factored_output import factored_init, factored_value_and_grad, factored_weights
from jaxreg.training import HeldOut, Task, gradient_task, grid

CARD = "10-z_loss"
TOP = (1, 5, 10, 50)
# name -> what it is called in tables.
LOSSES = {
  "z": "Z-loss",
  "taylor": "log-Taylor-softmax",
  "spherical": "log-spherical-softmax",
  "squared": "squared error",
  "cross_entropy": "log-softmax",
}
_DENSE = {
  "z": spherical.z_loss,
  "taylor": spherical.taylor_softmax_loss,
  "spherical": spherical.spherical_softmax_loss,
  "squared": spherical.one_hot_squared_error_loss,
  "cross_entropy": optax.softmax_cross_entropy_with_integer_labels,
}


@dataclasses.dataclass(frozen=True)
class Config:
  """Classification with many classes.

  Attributes:
    task: `clusters`: points around the means of classes with Zipf frequencies; `docstrings`: the next word in the
      docstrings of Python's standard library; `one_billion_words`: the same for n-grams of the One Billion Word
      benchmark, read as a data set `one_billion_word_ngrams` with `tokens`, integers `[context]`, and an integer
      `label`, in splits `train` and `test`, which the user tokenizes and writes with `jaxreg.data.write_tfds`.
    loss: `z`, `taylor`, `spherical`, `squared` or `cross_entropy`; for text `z` (by the factored layer) or
      `cross_entropy`.
    classes: number of classes or size of the vocabulary.
    features: length of the inputs of `clusters`, or of a word's embedding.
    hidden: widths of the hidden layers.
    context: words before the one to predict.
    train: training examples of `clusters`; text has as many as there are.
    test: test examples of `clusters`.
    batch_size: examples per step.
    epochs: passes over the training set.
    steps: steps of one run on a stream.
    learning_rates: of the optimizer, of which each loss may choose.
    output_rates: of the factored layer's SGD, of which the Z-loss may choose.
    locations: of the Z-loss for text, of which it may choose.
    text_classes, text_features, text_hidden, text_epochs, text_learning_rates, text_output_rates: the same of the
      comparison on docstrings that `verify` makes beside that on clusters.
    text_softmax_rates: learning rates of which log-softmax may choose there, as many as the Z-loss has settings.
    files: files of the standard library whose docstrings are read, from the first; None for all.
    timing_logs: logarithms to base 2 of the numbers of classes to time.
    timing_repeats: steps of which the fastest counts; a fifth of them for the dense layer.
    data_dir: TFDS's folder, for `one_billion_words`.
  """

  task: str = "clusters"
  loss: str = "z"
  classes: int = 1000
  features: int = 32
  hidden: tuple[int, ...] = (128,)
  context: int = 4
  train: int = 20_000
  test: int = 4_000
  batch_size: int = 200
  epochs: int = 12
  steps: int = 100_000
  learning_rates: tuple[float, ...] = (3e-3, 1e-2)
  output_rates: tuple[float, ...] = (0.3, 3.0)
  locations: tuple[float, ...] = (0.0, 3.0)
  text_classes: int = 4096
  text_features: int = 64
  text_hidden: tuple[int, ...] = (128, 64)
  text_epochs: int = 2
  text_learning_rates: tuple[float, ...] = (1e-3, 3e-3)
  text_output_rates: tuple[float, ...] = (0.3, 3.0)
  text_softmax_rates: tuple[float, ...] = (3e-4, 5e-4, 1e-3, 2e-3, 3e-3, 5e-3, 1e-2, 2e-2)
  files: int | None = None
  timing_logs: tuple[int, ...] = (12, 14, 16, 18)
  timing_repeats: int = 30
  data_dir: str | None = None

  def __post_init__(self):
    if self.task not in ("clusters", "docstrings", "one_billion_words"):
      raise ValueError(f"task must be clusters, docstrings or one_billion_words, got {self.task!r}.")
    if self.loss not in LOSSES or (self.task != "clusters" and self.loss not in ("z", "cross_entropy")):
      raise ValueError(f"loss must be one of {', '.join(LOSSES)} (for text z or cross_entropy), got {self.loss!r}.")
    if self.classes <= max(TOP):
      raise ValueError(f"classes must be more than {max(TOP)}, got {self.classes}.")
    if len(self.text_softmax_rates) != self.text_settings:
      raise ValueError(
        f"text_softmax_rates must be as many as the Z-loss has settings ({self.text_settings}), got"
        f" {len(self.text_softmax_rates)}."
      )

  @property
  def text_settings(self) -> int:
    """Settings of the Z-loss on text."""
    return len(self.text_learning_rates) * len(self.text_output_rates) * len(self.locations)


PRESETS = {
  "smoke": Config(
    train=2000,
    test=500,
    epochs=3,
    learning_rates=(1e-2,),
    text_classes=300,
    text_epochs=1,
    text_learning_rates=(3e-3,),
    text_output_rates=(0.3,),
    text_softmax_rates=(1e-3, 3e-3),
    files=10,
    timing_logs=(8, 10),
    timing_repeats=5,
  ),
  "cpu": Config(),
  "paper": Config(
    task="one_billion_words",
    classes=793_471,
    features=512,
    hidden=(2048, 2048, 512),
    context=10,
    learning_rates=(0.01,),
    output_rates=(0.01,),
  ),
}


def cell(config: Config) -> Cell:
  """The settings that a loss may choose from; on clusters all losses are points of one program."""
  if config.task == "clusters":
    at = grid(loss=range(len(LOSSES)), learning_rate=config.learning_rates)
    return Cell(_clusters_task(config), _clusters_steps(config), at)
  at = grid(learning_rate=config.learning_rates)
  if config.loss == "z":
    at = grid(learning_rate=config.learning_rates, output_rate=config.output_rates, location=config.locations)
  if config.task == "one_billion_words":
    steps = config.steps
    return Cell(_text_task(config), steps, at, eval_every=steps // 10, log_every=steps // 100)
  examples = len(docstring_ngrams(config.classes, config.context, config.files)[0]["x"])
  return Cell(_text_task(config), config.epochs * (examples // config.batch_size), at)


def _clusters_steps(config: Config) -> int:
  return config.epochs * (config.train // config.batch_size)


def _clusters_task(config: Config) -> Task:
  """The inputs are the class's mean, drawn from the run's key, and the deviation from it, which is the data.

  Hyperparameters are `learning_rate` and the number of the `loss` in `LOSSES`.
  """
  train, test = _cluster_deviations(config)
  model = MLP((*config.hidden, config.classes))

  def init_params(key, hparams):
    del hparams
    keys = jax.random.split(key)
    means = jax.random.normal(keys[1], (config.classes, config.features))
    return model.init(keys[0], jnp.zeros((1, config.features)))["params"], {"means": means}

  def predict(params, extra, inputs):
    del extra
    return model.apply({"params": params}, inputs)

  def objective(params, extra, batch, context):
    logits = predict(params, extra, extra["means"][batch["y"]] + batch["x"])
    # All losses in one program: compiling each takes longer than training with it.
    values = jax.lax.switch(context.hparams["loss"], [_DENSE[loss] for loss in LOSSES], logits, batch["y"])
    return values.mean(), (extra, {})

  def evaluate(params, extra, hparams):
    del hparams
    logits = predict(params, extra, extra["means"][test["y"]] + test["x"])
    return _top_accuracies("top", logits, test["y"])

  decay = optax.cosine_decay_schedule(1.0, _clusters_steps(config))
  return gradient_task(
    init_params,
    objective,
    lambda hparams: optax.adam(lambda step: hparams["learning_rate"] * decay(step)),
    data=train,
    batch_size=config.batch_size,
    hparams={"learning_rate": config.learning_rates[-1], "loss": list(LOSSES).index(config.loss)},
    evaluate=evaluate,
    predict=predict,
    config=config,
  )


def _top_accuracies(name: str, logits, labels) -> dict[str, jax.Array]:
  accuracies = jax.vmap(lambda k: top_k_accuracy(logits, labels, k=k))(jnp.array(TOP))
  return {f"{name}{k}": accuracy for k, accuracy in zip(TOP, accuracies)}


@functools.lru_cache(maxsize=4)
def _cluster_deviations(config: Config):
  rng = np.random.default_rng(0)
  frequency = np.arange(1, config.classes + 1) ** -0.7

  def draw(examples):
    labels = rng.choice(config.classes, examples, p=frequency / frequency.sum()).astype(np.int32)
    return {"x": rng.normal(size=(examples, config.features)).astype(np.float32), "y": labels}

  return draw(config.train), draw(config.test)


class WordNetwork(nn.Module):
  """Embeddings of the words before, side by side, and hidden layers.

  Attributes:
    classes: size of the vocabulary.
    features: length of an embedding.
    hidden: widths of the layers, with ReLU.
  """

  classes: int
  features: int
  hidden: tuple[int, ...]

  @nn.compact
  def __call__(self, tokens: jax.Array) -> jax.Array:
    return nn.relu(MLP(self.hidden)(nn.Embed(self.classes, self.features)(tokens)))


def _text_task(config: Config) -> Task:
  """The Z-loss trains the factored layer inside of the objective, cross-entropy a dense one by the optimizer.

  Hyperparameters are `learning_rate`, and with the Z-loss `output_rate` and `location`.
  """
  entry = "tokens" if config.task == "one_billion_words" else "x"
  body = WordNetwork(config.classes, config.features, config.hidden)
  dense = nn.Dense(config.classes)

  def output(location, axis_name):
    loss = functools.partial(spherical.z_loss_from_statistics, classes=config.classes, location=location)
    return FactoredOutput(config.classes, loss=loss, scale=0.01, axis_name=axis_name)

  def init_params(key, hparams):
    keys = jax.random.split(key)
    hidden = jnp.zeros((1, config.hidden[-1]))
    params = {"body": body.init(keys[0], jnp.zeros((1, config.context), jnp.int32))["params"]}
    if config.loss == "z":
      return params, output(hparams["location"], None).init(keys[1], hidden, jnp.zeros(1, jnp.int32))
    return {**params, "output": dense.init(keys[1], hidden)["params"]}, {}

  def predict(params, extra, inputs):
    hidden = body.apply({"params": params["body"]}, inputs)
    if config.loss == "z":
      return hidden @ factored_weights(extra["factored"]["state"]).T
    return dense.apply({"params": params["output"]}, hidden)

  def objective(params, extra, batch, context):
    tokens, labels, hparams = batch[entry], batch["label"], context.hparams
    if config.loss == "cross_entropy":
      logits = predict(params, extra, tokens)
      return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), (extra, {})
    hidden = body.apply({"params": params["body"]}, tokens)
    losses, extra = output(hparams["location"], context.axis_name).apply(
      extra, hidden, labels, hparams["output_rate"], mutable=["factored"]
    )
    return losses.mean(), (extra, {})

  output_hparams = {"output_rate": config.output_rates[0], "location": config.locations[0]}
  common = {
    "batch_size": config.batch_size,
    "hparams": {"learning_rate": config.learning_rates[0], **(output_hparams if config.loss == "z" else {})},
    "predict": predict,
    "config": config,
    "cast": (entry,),
  }
  if config.task == "one_billion_words":
    # Plain SGD, as in the authors' example: Adam's moments of the embeddings would take 3 GiB.
    sgd = lambda hparams: optax.sgd(hparams["learning_rate"])
    return gradient_task(init_params, objective, sgd, **common, **_billion_words(config, predict))
  train, valid, test = docstring_ngrams(config.classes, config.context, config.files)

  def evaluate(params, extra, hparams):
    del hparams
    measured = {}
    for name, part in (("valid", valid), ("test", test)):
      logits = predict(params, extra, part["x"])
      measured |= _top_accuracies(f"{name}_top", logits, part["label"])
    return measured

  adam = lambda hparams: optax.adam(hparams["learning_rate"])
  return gradient_task(init_params, objective, adam, **common, data=train, evaluate=evaluate)


def _billion_words(config: Config, predict):
  """The stream of training n-grams, and top-k accuracies on those of the test split."""
  name, options = "one_billion_word_ngrams", {"batch_size": config.batch_size, "data_dir": config.data_dir}

  def measure(state, batch, hparams):
    del hparams
    logits = predict(state.params, state.extra, batch["tokens"])
    of = lambda k: jax.vmap(functools.partial(top_k_accuracy, k=k))(logits, batch["label"])
    return mean_over(batch, **{f"test_top{k}": of(k) for k in TOP})

  return {
    "data": functools.partial(tfds_stream, name, "train", seed=0, **options),
    "held_out": HeldOut(functools.partial(tfds_stream, name, "test", **ONCE, **options), measure),
  }


@functools.lru_cache(maxsize=4)
def docstring_ngrams(vocabulary: int, context: int, files: int | None = None):
  """Training, validation and test n-grams of the docstrings of the standard library's modules.

  The corpus is what the running Python ships with: all docstrings in the files `*.py` of its library's top folder, in
  order of file and line, as lower-case words. It differs between versions of Python. The last two of every ten
  docstrings are for validation and testing. Words beyond the most frequent share the last number of the vocabulary;
  they occur in contexts, and are not predicted.
  """
  words = [re.findall(r"[a-z]+", text.lower()) for text in _docstrings(files)]
  splits = ([], [], [])
  for index, text in enumerate(words):
    splits[max(0, index % 10 - 7)].append(text)
  known, counts = np.unique([word for text in splits[0] for word in text], return_counts=True)
  frequent = known[np.argsort(-counts, kind="stable")][: vocabulary - 1]
  number = {word: index for index, word in enumerate(frequent)}
  return tuple(_ngrams(texts, number, vocabulary - 1, context) for texts in splits)


def _ngrams(texts, number, unknown, context):
  contexts, labels = [], []
  for text in texts:
    tokens = [unknown] * context + [number.get(word, unknown) for word in text]
    for end in range(context, len(tokens)):
      if tokens[end] != unknown:
        contexts.append(tokens[end - context : end])
        labels.append(tokens[end])
  return {"x": np.array(contexts, np.int32), "label": np.array(labels, np.int32)}


def _docstrings(files):
  for path in sorted(pathlib.Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[:files]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
      if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        text = ast.get_docstring(node)
        if text:
          yield text


def paper_batch(config: Config) -> dict[str, jax.ShapeDtypeStruct]:
  """One global batch of the stream."""
  shapes = {"tokens": (config.batch_size, config.context), "label": (config.batch_size,), "id": (config.batch_size,)}
  return {name: jax.ShapeDtypeStruct(shape, jnp.int32) for name, shape in shapes.items()}


def reduced(config: Config) -> Config:
  """The same network at a small width and vocabulary."""
  return dataclasses.replace(config, classes=100, features=8, hidden=(16, 16, 8), batch_size=16)


def paper_sets(config: Config) -> dict[str, dict]:
  """Generated n-grams, with every word of the vocabulary among the labels."""
  rng = np.random.default_rng(0)

  def split(examples):
    tokens = rng.integers(0, config.classes, (examples, config.context), np.int32)
    return {"tokens": tokens, "label": np.resize(np.arange(config.classes), examples)}

  return {"one_billion_word_ngrams": {"train": split(200), "test": split(50)}}


def cells(config: Config, seeds) -> dict[str, Cell]:
  """All losses on clusters; Z-loss and log-softmax on docstrings."""
  del seeds
  if config.task == "one_billion_words":
    raise ValueError("the claims of z_loss are about clusters and docstrings; train its preset `paper` with `run`.")
  clusters = dataclasses.replace(config, task="clusters")
  trained = {"clusters": clusters, **{f"text {loss}": _text_config(config, loss) for loss in ("z", "cross_entropy")}}
  return {name: cell(own)._replace(engine="map") for name, own in trained.items()}


def _text_config(config: Config, loss: str) -> Config:
  sizes = ("classes", "features", "hidden", "epochs", "learning_rates", "output_rates")
  own = {name: getattr(config, f"text_{name}") for name in sizes}
  if loss == "cross_entropy":
    own["learning_rates"] = config.text_softmax_rates
  return dataclasses.replace(config, task="docstrings", loss=loss, **own)


def measure(config: Config, seeds, trained) -> dict[str, np.ndarray]:
  """Milliseconds `[seeds, sizes]` of a step of the output layer with 64 features and a batch of 32.

  A step is the gradient in the inputs and the weights' update; the fastest of several, in turn with the dense layer's.
  And `error`, by how much the weights that both make differ.
  """
  del trained
  measured = {name: np.zeros((len(seeds), len(config.timing_logs))) for name in ("factored ms", "dense ms", "error")}
  # LAPACK's own threads wait for each other on a busy machine, for many times what the small solves take.
  with threadpoolctl.threadpool_limits(1, user_api="blas"):
    for column, log in enumerate(config.timing_logs):
      factored, dense = output_steps(2**log)
      for row, seed in enumerate(seeds):
        fast, slow, error = _time(factored, dense, 2**log, seed, config.timing_repeats)
        measured["factored ms"][row, column] = 1e3 * fast
        measured["dense ms"][row, column] = 1e3 * slow
        measured["error"][row, column] = error
  return measured


def output_steps(classes: int):
  """A step of the factored and of the dense Z-loss layer, jitted, with the weights donated."""
  loss = functools.partial(spherical.z_loss_from_statistics, classes=classes)

  def dense(weights, inputs, labels, rate):
    value, (on_weights, on_inputs) = jax.value_and_grad(
      lambda weights, inputs: spherical.z_loss(inputs @ weights.T, labels).mean(), argnums=(0, 1)
    )(weights, inputs)
    return value, on_inputs, weights - rate * on_weights

  return jax.jit(factored_value_and_grad(loss), donate_argnums=0), jax.jit(dense, donate_argnums=0)


def _time(factored, dense, classes, seed, repeats, *, features=64, examples=32, rate=0.1):
  """Seconds of both, and the relative difference of the changes that they made to equal weights in as many steps."""
  keys = jax.random.split(jax.random.key(seed), 3)
  inputs = jax.random.normal(keys[0], (examples, features))
  labels = jax.random.randint(keys[1], (examples,), 0, classes)
  state = factored_init(keys[2], classes, features, scale=0.1)
  first = np.asarray(factored_weights(state))
  weights = jnp.array(first)
  few = max(repeats // 5, 2)

  def step(function, state):
    began = time.perf_counter()
    _, _, state = jax.block_until_ready(function(state, inputs, labels, rate))
    return time.perf_counter() - began, state

  seconds = {"factored": [], "dense": []}
  for _ in range(few + 1):  # the first ones compile
    spent, state = step(factored, state)
    seconds["factored"].append(spent)
    spent, weights = step(dense, weights)
    seconds["dense"].append(spent)
  change = np.asarray(weights) - first
  error = np.linalg.norm(np.asarray(factored_weights(state)) - first - change) / np.linalg.norm(change)
  for _ in range(repeats):
    spent, state = step(factored, state)
    seconds["factored"].append(spent)
  return min(seconds["factored"][1:]), min(seconds["dense"][1:]), error


def summary(config: Config, trials: Trials) -> dict[str, np.ndarray]:
  """What `measure` timed, and top-k accuracies `[seeds, k]` of each loss, of clusters and of text."""
  del config
  table = trials["clusters"]
  tops, found = _tops(table, "top"), dict(trials.measured)
  for index, loss in enumerate(LOSSES):  # the learning rate with the best top-5 accuracy, mean of the seeds
    own = tops[table.hparams["loss"] == index]
    found[f"clusters {loss}"] = own[own[..., TOP.index(5)].mean(1).argmax()]
  for loss in ("z", "cross_entropy"):
    table = trials[f"text {loss}"]
    found[f"text {loss}"] = chosen_on_validation(_tops(table, "valid_top"), _tops(table, "test_top"))
  return found


def _tops(table: CellTrials, name: str) -> np.ndarray:
  """Accuracies `[points, seeds, k]` at the end."""
  return np.stack([table.last(f"{name}{k}") for k in TOP], axis=-1)


def chosen_on_validation(valid: np.ndarray, test: np.ndarray) -> np.ndarray:
  """Test accuracies `[seeds, k]` of the point whose mean over seeds is best on the validation part, for each k."""
  chosen = valid.mean(1).argmax(0)
  return np.stack([test[point, :, k] for k, point in enumerate(chosen)], axis=-1)


def _top5(summary, loss: str) -> np.ndarray:
  return summary[f"clusters {loss}"][:, TOP.index(5)]


def claims(config: Config) -> tuple[Claim, ...]:
  """The factored layer is fast and exact; the Z-loss is the best of its family, and against log-softmax at each k."""
  fewest, most = f"2^{config.timing_logs[0]}", f"2^{config.timing_logs[-1]}"
  layer = "64 features, batch 32, float32"
  return (
    Claim(
      "flat",
      f"A step of the factored layer takes about as long with {most} classes as with {fewest}",
      f"ratio of the times with {most} and with {fewest} classes, {layer}",
      lambda m: m["factored ms"][:, -1] / m["factored ms"][:, 0],
      at_most=3.0,
    ),
    Claim(
      "speedup",
      f"A step of the factored layer with {most} classes is far faster than the dense layer's with the same loss",
      f"dense over factored time with {most} classes, {layer}",
      lambda m: m["dense ms"][:, -1] / m["factored ms"][:, -1],
      at_least=50.0,
    ),
    Claim(
      "exact",
      "The factored layer makes the same steps as the dense layer",
      f"largest difference of the weights' changes after at least three steps, relative to the change (norms), {layer}",
      lambda m: m["error"].max(axis=1),
      at_most=1e-3,
    ),
    Claim(
      "spherical",
      f"The Z-loss is more accurate than log-Taylor-softmax and squared error on {config.classes:,} clusters",
      "top-5 test accuracy, Z-loss minus the best of log-Taylor-softmax and squared error; learning rates chosen for"
      " each loss",
      lambda m: _top5(m, "z") - np.maximum(_top5(m, "taylor"), _top5(m, "squared")),
      at_least=0.2,
    ),
    Claim(
      "top_k",
      "On text the Z-loss is at least as good as log-softmax at some k of 10 and 50",
      "largest difference of the top-k test accuracies over k, Z-loss minus log-softmax, next word in docstrings; each"
      f" loss's setting the best of {config.text_settings} on a validation part, for each k",
      lambda m: (m["text z"] - m["text cross_entropy"])[:, TOP.index(10) :].max(axis=1),
      at_least=0.0,
      amended="the condition is the old one; with 8 settings for the Z-loss against 2 for log-softmax it came out as"
      " 0.0056 [0.0001, 0.0112], reproduced, until 29 November 2026. Taking the better k for each seed favours the"
      " Z-loss: the claims that follow, one for each k, are those to read.",
    ),
    *(_on_text(config, index, k) for index, k in enumerate(TOP)),
  )


def _on_text(config: Config, index: int, k: int) -> Claim:
  return Claim(
    f"text_top_{k}",
    f"On text the Z-loss names the next word among its first {k} at least as often as log-softmax"
    if k > 1
    else "On text the Z-loss names the next word at least as often as log-softmax",
    f"top-{k} test accuracy, Z-loss minus log-softmax, next word in docstrings; each loss's setting the best of"
    f" {config.text_settings} on a validation part",
    lambda m: (m["text z"] - m["text cross_entropy"])[:, index],
    at_least=0.0,
    amended="added on 29 November 2026, with its siblings, beside the claim that takes the better of k 10 and 50 for"
    " each seed.",
  )


def notes(config: Config) -> tuple[str, ...]:
  """What is chosen how, and what varies."""
  return (
    "Reported, not gated: on clusters log-softmax against the Z-loss at top-1, 5, 10 and 50; in the card's pilot"
    " log-softmax won at every k. The claims on text are an addition: the card asks to report this comparison only.",
    "On clusters each loss's learning rate is the one of two with the best top-5 test accuracy; on text settings are"
    f" chosen on a validation part for each k: by the Z-loss among {config.text_settings} (learning rate of Adam × that"
    " of the output layer × location), by log-softmax among as many learning rates.",
    "The text is the docstrings of the standard library of the Python that ran, so it changes with the version of"
    " Python.",
    "The deviations of the clusters' points are the same for all seeds; means, parameters and batches are not.",
  )


DEVIATIONS = (
  "The official code is Theano with C++ and CUDA, and does not run today; its NumPy functions gave the golden values.",
  "Clusters and docstrings with 4,096 words instead of Penn Treebank (10,000) and One Billion Word (793,471); the"
  " preset `paper` is for the latter, once the user has written its n-grams.",
  "Times are those of one jitted step of the output layer on a CPU, 64 features and batches of 32, against a dense"
  " layer with the same loss; the paper times epochs on a GPU against log-softmax and hierarchical softmax.",
  "Losses are means over the batch; the official example sums the Z-loss and averages its log-softmax, so that its"
  " learning rates are not comparable.",
  "On clusters all layers are dense and trained by Adam. On text the Z-loss's output layer is the factored one, which"
  " only plain SGD can step; log-softmax trains all layers by Adam. The preset `paper` uses SGD throughout, as the"
  " official example does.",
  "The mean is subtracted before squares are summed, and the gradient at equal logits is 0, where the official code's"
  " is not a number.",
  "Weight decay of the factored layer also reaches `Q` and the column sums, which the official code leaves out; no"
  " preset decays weights.",
)


def figure(config: Config, summary: dict[str, np.ndarray], path: pathlib.Path) -> None:
  """Times against the number of classes; top-k accuracies of the losses on clusters and on text."""
  picture, axes = plots.panels(3)
  times = {f"{name} Z-loss layer": summary[f"{name} ms"] for name in ("dense", "factored")}
  plots.curves(axes[0], 2.0 ** np.array(config.timing_logs), times, marker="o")
  axes[0].set_xscale("log", base=2)
  axes[0].set(
    xlabel="classes", ylabel="milliseconds per step", title="output layer, 64 features, batch 32", yscale="log"
  )
  for axis, problem in zip(axes[1:], ("clusters", "text")):
    tops = {LOSSES[loss]: summary[f"{problem} {loss}"] for loss in LOSSES if f"{problem} {loss}" in summary}
    plots.curves(axis, range(len(TOP)), tops, marker="o")
    axis.set(xticks=range(len(TOP)), xticklabels=[f"top {k}" for k in TOP], ylabel="test accuracy", ylim=(0, 1.05))
  axes[1].set_title(f"clusters, {config.classes:,} classes")
  axes[2].set_title("next word of docstrings")
  for axis in axes:  # below: inside they would cover a curve
    axis.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=2)
  plots.save(picture, path)
