"""DHKD: a second head takes a teacher's logits, so that they do not spoil the classifier that cross-entropy trains."""

import dataclasses
import functools
import pathlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.harness import plots
from experiments.harness.claims import Claim
from experiments.harness.trials import Cell, Trials
from experiments.problems import cifar100
from experiments.problems.distillation import gaussian_classes, stepwise_sgd
from experiments.problems.held_out import ONCE, mean_over
from jaxreg.data.stream import tfds_stream
from jaxreg.layers import DualHead
from jaxreg.losses import distillation
from jaxreg.models import MLP, ResNet, ShuffleNetV2
from jaxreg.training import HeldOut, Task, TrainState, gradient_task
from jaxreg.transforms import aligned_value_and_grad

CARD = "47-dhkd"
# Which term of the objective a method has; its weight is alpha.
METHODS = {
  "KD": "main_kd",
  "one head, BinaryKL": "main_binary",
  "one head, BinaryKL-Norm": "main_norm",
  "dual head, BinaryKL": "auxiliary_binary",
  "dual head, BinaryKL-Norm": "auxiliary_norm",
}
TERMS = tuple(METHODS.values())
TEACHER_RATE = 0.05  # on CIFAR-100
CONFLICT_EXAMPLES = 1000  # on which gradients are compared


@dataclasses.dataclass(frozen=True)
class Config:
  """Distillation of a fixed teacher into a smaller student.

  Attributes:
    model: `mlp` on warped Gaussian classes, or `shufflenet` on CIFAR-100 from TFDS with a ResNet 32×4 as its teacher,
      which the same run trains before the student.
    classes, features: of the mixture.
    norm: of its means.
    warped: number of inputs after the mixture's features went through a fixed random map.
    train, valid, test: numbers of examples; a stream is tested on the whole test split.
    draws: data sets, each with its teacher; every run has one of them, by its seed.
    teacher_hidden, hidden: widths of the hidden layers of teacher and student.
    blocks, width: of the convolutional teacher, a stage's blocks and the first width.
    student_blocks, widths, last: of the convolutional student.
    auxiliary_hidden: width of the auxiliary head's hidden layer; None for a linear head.
    align: whether what contradicts cross-entropy in the distillation's gradient is projected out.
    alpha: weight of the distillation.
    temperature: of the losses class by class.
    kd_temperature: of KD through the softmax.
    learning_rate, weight_decay: of SGD.
    decay_at: fractions of training after which the learning rate falls tenfold.
    clip: the largest norm of the gradient; None clips nothing.
    epochs: passes over the training set, of teacher and of student.
    batch_size: examples per step.
    alphas: weights to choose from.
    weight_decays: what cross-entropy alone has to choose from, as many.
    data_dir: TFDS's folder; None for its own default.
  """

  model: str = "mlp"
  classes: int = 50
  features: int = 24
  norm: float = 4.5
  warped: int = 48
  train: int = 4000
  valid: int = 1000
  test: int = 4000
  draws: int = 4
  teacher_hidden: tuple[int, ...] = (256, 256)
  hidden: tuple[int, ...] = (32, 32)
  blocks: int = 5
  width: int = 64
  student_blocks: tuple[int, ...] = (3, 7, 3)
  widths: tuple[int, ...] = (116, 232, 464)
  last: int = 1024
  auxiliary_hidden: int | None = None
  align: bool = False
  alpha: float = 1.0
  temperature: float = 2.0
  kd_temperature: float = 4.0
  learning_rate: float = 0.05
  weight_decay: float = 5e-4
  decay_at: tuple[float, ...] = (0.6, 0.8)
  clip: float | None = 5.0
  epochs: int = 40
  batch_size: int = 64
  alphas: tuple[float, ...] = (0.3, 1.0, 3.0)
  weight_decays: tuple[float, ...] = (5e-4, 5e-3, 1e-2)
  data_dir: str | None = None

  def __post_init__(self):
    if self.model not in ("mlp", "shufflenet"):
      raise ValueError(f"model must be mlp or shufflenet, got {self.model!r}.")
    if not 1 <= self.batch_size <= self.train:
      raise ValueError(f"batch_size must be in [1, {self.train}], got {self.batch_size}.")
    if len(self.alphas) != len(self.weight_decays) or self.alpha not in self.alphas:
      raise ValueError("alphas and weight_decays must be equally many, with alpha among the former.")

  @property
  def steps(self) -> int:
    """Of the student."""
    return self.epochs * (self.train // self.batch_size)


PRESETS = {
  "smoke": Config(
    classes=10, train=320, valid=100, test=200, draws=2, teacher_hidden=(32,), hidden=(16, 8), epochs=3
  ),
  "cpu": Config(),
  "paper": Config(
    model="shufflenet", classes=100, train=50_000, auxiliary_hidden=200, align=True, learning_rate=0.01,
    decay_at=(150 / 240, 180 / 240, 210 / 240), clip=None, epochs=240,
  ),
}  # fmt: skip


def task(config: Config) -> Task:
  """The student; hyperparameters are the weights of `TERMS` and of cross-entropy (`gamma`) and those of SGD."""
  return _mixture_task(config) if config.model == "mlp" else _cifar_task(config)


def _hparams(config: Config) -> dict[str, float]:
  weights = {**dict.fromkeys(TERMS, 0.0), "auxiliary_norm": config.alpha, "gamma": 1.0}
  return {**weights, "learning_rate": config.learning_rate, "weight_decay": config.weight_decay}


def _terms(config: Config, logits, teacher, labels, hparams) -> tuple[jax.Array, jax.Array]:
  """The loss of the labels and that of the teacher, means over the batch; logits of both heads."""
  of = {"main": logits.main, "auxiliary": logits.auxiliary}
  losses = {
    "kd": functools.partial(distillation.softmax_kd_loss, temperature=config.kd_temperature),
    "binary": functools.partial(distillation.binary_kl_loss, temperature=config.temperature),
    "norm": functools.partial(distillation.binary_kl_norm_loss, temperature=config.temperature),
  }
  distilled = 0.0
  for term in TERMS:
    head, loss = term.split("_")
    distilled += hparams[term] * jnp.mean(losses[loss](of[head].astype(jnp.float32), teacher.astype(jnp.float32)))
  cross_entropy = optax.softmax_cross_entropy_with_integer_labels(logits.main.astype(jnp.float32), labels)
  return hparams["gamma"] * jnp.mean(cross_entropy), distilled


def _optimizer(config: Config, hparams) -> optax.GradientTransformation:
  return stepwise_sgd(hparams, config.steps, decay_at=config.decay_at, clip=config.clip)


class Student(nn.Module):
  """A perceptron with two heads."""

  hidden: tuple[int, ...]
  classes: int

  def setup(self):
    self.backbone = MLP(self.hidden)
    self.head = DualHead(self.classes)

  def __call__(self, inputs):
    return self.head(nn.relu(self.backbone(inputs)), train=True)


def _mixture_task(config: Config) -> Task:
  train, parts, teacher_accuracy = _taught(config)
  model = Student(config.hidden, config.classes)
  logits_of = lambda params, inputs: model.apply({"params": params}, inputs)

  def init_params(key, hparams):
    del hparams
    of_draw, of_params = jax.random.split(key)
    params = model.init(of_params, jnp.zeros((1, config.warped)))["params"]
    return params, {"draw": jax.random.randint(of_draw, (), 0, config.draws)}

  def objective(params, extra, batch, context):
    inputs, labels, teacher = (batch[name][:, extra["draw"]] for name in ("x", "y", "teacher"))
    terms = _terms(config, logits_of(params, inputs), teacher, labels, context.hparams)
    return sum(terms), (extra, {})

  def evaluate(params, extra, hparams):
    del hparams
    own = lambda values: jnp.asarray(values)[extra["draw"]]
    accuracy = lambda part: jnp.mean(logits_of(params, own(part["x"])).main.argmax(-1) == own(part["y"]))
    some = {name: own(np.moveaxis(values[:CONFLICT_EXAMPLES], 1, 0)) for name, values in train.items()}
    return {
      **{f"{name}_accuracy": accuracy(part) for name, part in parts.items()},
      "teacher_accuracy": own(teacher_accuracy),
      **_conflict(config, lambda params: logits_of(params, some["x"]), params, some),
    }

  return gradient_task(
    init_params,
    objective,
    functools.partial(_optimizer, config),
    data=train,
    batch_size=config.batch_size,
    hparams=_hparams(config),
    evaluate=evaluate,
    predict=lambda params, extra, inputs: logits_of(params, inputs).main,
    config=config,
  )


def _conflict(config: Config, logits_of, params, part) -> dict[str, jax.Array]:
  """Cosines between the gradients of cross-entropy and of BinaryKL, both through the main head."""

  def gradient(loss):
    return jax.grad(lambda params: jnp.mean(loss(logits_of(params).main)))(params)

  cross_entropy = gradient(lambda z: optax.softmax_cross_entropy_with_integer_labels(z, part["y"]))
  binary = gradient(lambda z: distillation.binary_kl_loss(z, part["teacher"], temperature=config.temperature))

  def cosine(one, two):
    norms = optax.tree.norm(one) * optax.tree.norm(two)
    return optax.tree.vdot(one, two) / jnp.where(norms == 0, 1, norms)

  return {
    "head_cosine": cosine(cross_entropy["head"]["main"], binary["head"]["main"]),
    "backbone_cosine": cosine(cross_entropy["backbone"], binary["backbone"]),
  }


@functools.lru_cache(maxsize=4)
def _taught(config: Config):
  """Training data `[examples, draws, ...]` with the teachers' logits, other parts `[draws, examples, ...]`, accuracies.

  A teacher sees the training set only, and is trained as the students are, by cross-entropy.
  """
  model = MLP((*config.teacher_hidden, config.classes))
  sizes = {name: getattr(config, name) for name in ("train", "valid", "test")}
  hparams = {"learning_rate": config.learning_rate, "weight_decay": config.weight_decay}
  optimizer, per_epoch = _optimizer(config, hparams), config.train // config.batch_size

  def draw(key):
    keys = jax.random.split(key, 4)
    parts = gaussian_classes(keys[0], classes=config.classes, features=config.features, norm=config.norm, sizes=sizes)
    first = jax.random.normal(keys[1], (config.features, config.warped)) / jnp.sqrt(config.features)
    second = jax.random.normal(keys[2], (config.warped, config.warped)) / jnp.sqrt(config.warped)
    parts = {name: {**part, "x": jnp.tanh(part["x"] @ first) @ second} for name, part in parts.items()}
    return parts, _trained(keys[3], parts["train"])

  def _trained(key, part):
    params = model.init(key, part["x"][:1])["params"]

    def loss(params, rows):
      logits = model.apply({"params": params}, part["x"][rows])
      return optax.softmax_cross_entropy_with_integer_labels(logits, part["y"][rows]).mean()

    def step(carry, rows):
      params, state = carry
      updates, state = optimizer.update(jax.grad(loss)(params, rows), state, params)
      return (optax.apply_updates(params, updates), state), None

    order = jax.vmap(lambda key: jax.random.permutation(key, config.train))(jax.random.split(key, config.epochs))
    rows = order[:, : per_epoch * config.batch_size].reshape(-1, config.batch_size)
    return jax.lax.scan(step, (params, optimizer.init(params)), rows)[0][0]

  def measured(key):
    parts, params = draw(key)
    logits = {name: model.apply({"params": params}, part["x"]) for name, part in parts.items()}
    return parts, logits["train"], jnp.mean(logits["test"].argmax(-1) == parts["test"]["y"])

  keys = jax.random.split(jax.random.key(0), config.draws)
  parts, logits, accuracies = jax.device_get(jax.jit(lambda keys: jax.lax.map(measured, keys))(keys))
  train = {name: np.moveaxis(values, 0, 1) for name, values in {**parts["train"], "teacher": logits}.items()}
  return train, {name: parts[name] for name in ("valid", "test")}, accuracies


def _cifar_task(config: Config) -> Task:
  """A ResNet 32×4 is trained first, then the ShuffleNetV2 that it teaches, both for all epochs; held out: test split.

  The student has half of the run's steps. Its two losses give two gradients, which are aligned if the config says so.
  """

  def teacher_net():
    return ResNet((config.blocks,) * 3, config.classes, width=config.width, stem_width=config.width // 2)

  def student_net(train):
    head = lambda classes, name: functools.partial(
      DualHead(classes, hidden=config.auxiliary_hidden, name=name), train=train
    )
    return ShuffleNetV2(config.classes, config.student_blocks, config.widths, last=config.last, dense=head)

  pixels = lambda params, images: cifar100.standardized(images, jax.tree.leaves(params)[0].dtype)
  variables = lambda params, extra, who: {"params": params[who], "batch_stats": extra[who]}

  def optimizer(who, hparams):
    rate = TEACHER_RATE if who == "teacher" else hparams["learning_rate"]
    return _optimizer(config, {**hparams, "learning_rate": rate})

  def init(key, hparams):
    images, keys = jnp.zeros((1, 32, 32, 3)), jax.random.split(jax.random.fold_in(key, 0))
    made = {
      "teacher": teacher_net().init(keys[0], images, train=False),
      "student": student_net(False).init(keys[1], images, train=False),
    }
    params, extra = ({who: one[name] for who, one in made.items()} for name in ("params", "batch_stats"))
    return TrainState.create(key, params, extra, {who: optimizer(who, hparams).init(params[who]) for who in made})

  def teacher_losses(params, extra, batch, key, hparams):
    del key, hparams
    logits, new = teacher_net().apply(
      variables(params, extra, "teacher"), pixels(params, batch["image"]), train=True, mutable=["batch_stats"]
    )
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean()
    return (loss, jnp.zeros(())), {**extra, "teacher": new["batch_stats"]}

  def student_losses(params, extra, batch, key, hparams):
    images = pixels(params, batch["image"])
    teacher = teacher_net().apply(variables(params, extra, "teacher"), images, train=False)
    logits, new = student_net(True).apply(
      variables(params, extra, "student"), images, train=True, mutable=["batch_stats"], rngs={"dropout": key}
    )
    terms = _terms(config, logits, jax.lax.stop_gradient(teacher), batch["label"], hparams)
    return terms, {**extra, "student": new["batch_stats"]}

  def step(state, batch, hparams):
    def phase(who, losses):
      def train(state):
        of_own = lambda own: losses({**state.params, who: own}, state.extra, batch, state.step_key(), hparams)
        function = aligned_value_and_grad(of_own, align=config.align, has_aux=True)
        ((first, second), extra), gradient = function(state.params[who])
        updates, new = optimizer(who, hparams).update(gradient, state.opt_state[who], state.params[who])
        params = {**state.params, who: optax.apply_updates(state.params[who], updates)}
        return state.advance(params=params, extra=extra, opt_state={**state.opt_state, who: new}), {
          "loss": first + second
        }

      return train

    return jax.lax.cond(
      state.step < config.steps, phase("teacher", teacher_losses), phase("student", student_losses), state
    )

  def predict(state, inputs):
    own = variables(state.params, state.extra, "student")
    return student_net(False).apply(own, pixels(state.params, inputs), train=False).main

  def measure(state, batch, hparams):
    del hparams
    right = lambda logits: logits.argmax(-1) == batch["label"]
    own = variables(state.params, state.extra, "teacher")
    teacher = teacher_net().apply(own, pixels(state.params, batch["image"]), train=False)
    return mean_over(batch, test_accuracy=right(predict(state, batch["image"])), teacher_accuracy=right(teacher))

  stream = functools.partial(tfds_stream, "cifar100", batch_size=config.batch_size, data_dir=config.data_dir)
  return Task(
    init=init,
    step=step,
    data=functools.partial(stream, split="train", seed=0, transform=cifar100.augment),
    batch_size=config.batch_size,
    hparams=_hparams(config),
    predict=predict,
    held_out=HeldOut(functools.partial(stream, split="test", transform=cifar100.plain, **ONCE), measure),
    config=config,
  )


def paper_batch(config: Config) -> dict[str, jax.ShapeDtypeStruct]:
  """One global batch of the stream."""
  return cifar100.batch_shapes(config.batch_size)


def reduced(config: Config) -> Config:
  """The same networks with one block a stage in the teacher, at small widths; five steps for each of them."""
  small = {"blocks": 1, "width": 4, "student_blocks": (1, 1), "widths": (8, 16), "last": 16, "auxiliary_hidden": 8}
  return dataclasses.replace(config, **small, batch_size=16, train=80, epochs=1)


def paper_sets(config: Config) -> dict[str, dict]:
  """A generated CIFAR-100."""
  del config
  return cifar100.generated_set(examples=80)


def cell(config: Config) -> Cell:
  """The dual head with BinaryKL-Norm over its weights; on CIFAR-100 after the teacher's training."""
  steps = config.steps * (1 if config.model == "mlp" else 2)
  return Cell(task(config), steps, {"auxiliary_norm": list(config.alphas)}, log_every=steps // config.epochs)


def settings(config: Config) -> dict[str, list[dict[str, float]]]:
  """method -> settings to choose from, equally many (of BinaryKL alone, a baseline of the paper, the card's only)."""
  none = {**dict.fromkeys(TERMS, 0.0), "gamma": 1.0, "weight_decay": config.weight_decay}
  return {
    "cross-entropy": [{**none, "weight_decay": decay} for decay in config.weight_decays],
    **{name: [{**none, term: alpha} for alpha in config.alphas] for name, term in METHODS.items()},
    "BinaryKL alone": [{**none, "gamma": 0.0, "main_binary": config.alpha}],
  }


def cells(config: Config, seeds) -> dict[str, Cell]:
  """All methods at all their settings."""
  del seeds
  if config.model != "mlp":
    raise ValueError("the claims of dhkd are about a mixture; train its preset `paper` with `run`.")
  every = [setting for several in settings(config).values() for setting in several]
  points = {name: [setting[name] for setting in every] for name in every[0]}
  return {"mixture": cell(config)._replace(points=points, engine="map")}


def _card_setting(config: Config, name: str) -> int:
  if name == "cross-entropy":
    return config.weight_decays.index(config.weight_decay)
  return 0 if name == "BinaryKL alone" else config.alphas.index(config.alpha)


def summary(config: Config, trials: Trials) -> dict[str, np.ndarray]:
  """Test accuracies `[seeds]` of each method at the card's setting and, `tuned NAME`, at the one validated best."""
  table = trials["mixture"]
  at = lambda metric, setting: table.at(metric, **setting)[:, -1]
  found = {"teacher": table.metrics["teacher_accuracy"][0, :, -1]}
  for name, several in settings(config).items():
    best = max(several, key=lambda setting: at("valid_accuracy", setting).mean())
    card = several[_card_setting(config, name)]
    found |= {name: at("test_accuracy", card), f"tuned {name}": at("test_accuracy", best)}
    found |= {f"{name} {part}": at(f"{part}_cosine", card) for part in ("head", "backbone")}
    found[f"tuned {name} setting"] = np.full(len(table.seeds), several.index(best))
  return found


def claims(config: Config) -> tuple[Claim, ...]:
  """The card's; the paper's about one head; and what is left of them when all methods are tuned."""
  data = f"{config.classes} warped Gaussian classes, student {'-'.join(map(str, config.hidden))}"
  weights = f"alpha {config.alpha:g}, temperature {config.temperature:g}"
  chosen = f"{data}; each method's setting the best of {len(config.alphas)} by validation accuracy"
  norm, binary, one = "dual head, BinaryKL-Norm", "dual head, BinaryKL", "one head, BinaryKL"
  minus = lambda a, b, prefix="": lambda s: s[f"{prefix}{a}"] - s[f"{prefix}{b}"]
  return (
    Claim(
      "gain",
      "A student with two heads that distils by BinaryKL-Norm is more accurate than one trained by cross-entropy",
      f"test accuracy, dual head with BinaryKL-Norm minus cross-entropy, {data}, {weights}",
      minus(norm, "cross-entropy"),
      at_least=0.015,
    ),
    Claim(
      "two heads",
      "BinaryKL on a head of its own makes a more accurate student than BinaryKL on the head of cross-entropy",
      f"test accuracy, dual head minus one head, both with BinaryKL, {data}, {weights}",
      minus(binary, one),
      at_least=0.002,
    ),
    Claim(
      "conflict",
      "Cross-entropy and BinaryKL conflict more in the classifier than in the backbone",
      "cosine of their gradients, both through the main head of the trained dual-head student, in the backbone minus"
      f" in the main classifier, {CONFLICT_EXAMPLES:,} training examples, {data}",
      lambda s: s[f"{norm} backbone"] - s[f"{norm} head"],
      at_least=0.1,
    ),
    Claim(
      "collapse",
      "Cross-entropy and BinaryKL together on one head make a less accurate student than either of them alone",
      f"test accuracy, one head with both minus the worse of the two alone, {data}, {weights}",
      lambda s: s[one] - np.minimum(s["cross-entropy"], s["BinaryKL alone"]),
      at_most=0.0,
    ),
    Claim(
      "tuned gain",
      "With tuned settings, two heads with BinaryKL-Norm are more accurate than cross-entropy",
      f"test accuracy, dual head with BinaryKL-Norm minus cross-entropy, {chosen}",
      minus(norm, "cross-entropy", "tuned "),
      at_least=0.0,
    ),
    Claim(
      "tuned two heads",
      "With tuned settings, BinaryKL is better on a head of its own than on the head of cross-entropy",
      f"test accuracy, dual head minus one head, both with BinaryKL, {chosen}",
      minus(binary, one, "tuned "),
      at_least=0.0,
    ),
    Claim(
      "tuned KD",
      "With tuned settings, two heads with BinaryKL-Norm are more accurate than KD through the softmax",
      f"test accuracy, dual head with BinaryKL-Norm minus KD at temperature {config.kd_temperature:g}, {chosen}",
      minus(norm, "KD", "tuned "),
      at_least=0.0,
    ),
  )


DEVIATIONS = (
  "Perceptrons on warped Gaussian classes instead of convolutional networks on CIFAR-100; the preset `paper` is ResNet"
  " 32×4 to ShuffleNetV2 with the official hyperparameters, the non-linear auxiliary head and aligned gradients. The"
  " collapse of one head, if there is one, is decided there.",
  "The losses are in closed form, finite where the official code's clamped probabilities give infinite float32 losses.",
  "Four data sets with a teacher each; a seed decides which of them a run has, its initial parameters and its batches.",
  "In the preset `paper` one run trains the teacher and then the student, each for 240 epochs; the teacher's learning"
  " rate is 0.05. The official code loads a teacher that was trained elsewhere.",
  "Metrics are those of the last epoch; the official code picks the epoch with the best test accuracy.",
)


def notes(config: Config) -> tuple[str, ...]:
  """How settings were chosen."""
  alphas, decays = (", ".join(map("{:g}".format, values)) for values in (config.alphas, config.weight_decays))
  return (
    f"Settings: every distillation with the weights {alphas} at weight decay {config.weight_decay:g}, cross-entropy"
    f" with the weight decays {decays}.",
    "Reported, not gated: BinaryKL-Norm on one head, and the teachers (figure).",
  )


def figure(config: Config, summary: dict[str, np.ndarray], path: pathlib.Path) -> None:
  """Test accuracies at the card's setting and tuned; cosines of the gradients in classifier and backbone."""
  del config
  picture, axes = plots.panels(3, width=5)
  names = ("cross-entropy", "BinaryKL alone", *METHODS)
  short = lambda name: name.replace("one head, ", "one head\n").replace("dual head, ", "dual head\n")
  for axis, (prefix, title) in zip(axes, (("", "the card's setting"), ("tuned ", "tuned"))):
    kept = [name for name in names if not (prefix and name == "BinaryKL alone")]
    plots.bars(axis, {**{short(name): summary[f"{prefix}{name}"] for name in kept}, "teacher": summary["teacher"]})
    lowest = min(summary[f"{prefix}{name}"].min() for name in kept)
    axis.set(title=f"test accuracy, {title}", ylim=(lowest - 0.02, summary["teacher"].max() + 0.01))
  cosines = {
    f"{name}\n{part}": summary[f"{key} {part}"]
    for name, key in (("cross-entropy", "cross-entropy"), ("one head", "one head, BinaryKL"),
                      ("dual head", "dual head, BinaryKL-Norm"))
    for part in ("head", "backbone")
  }  # fmt: skip
  plots.bars(axes[2], cosines, colors=["C0", "C1"] * 3)
  axes[2].set_title("cosine of the gradients of CE and BinaryKL")
  plots.save(picture, path)
