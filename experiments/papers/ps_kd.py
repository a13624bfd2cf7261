"""PS-KD: last epoch's predictions join the labels as targets, and calibrate an over-confident network."""

import dataclasses
import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.harness import plots
from experiments.harness.claims import Claim
from experiments.harness.trials import Cell, Trials
from experiments.problems import cifar100
from experiments.problems.distillation import gaussian_classes, index_data, stepwise_sgd
from experiments.problems.held_out import ONCE, mean_over
from jaxreg.data.stream import tfds_stream
from jaxreg.losses import refined_targets
from jaxreg.metrics import calibration
from jaxreg.models import MLP, PreActivationResNet
from jaxreg.training import HeldOut, Task, gradient_task

CARD = "26-ps_kd"
METRICS = ("error", "nll", "ece", "aurc", "eaurc")


@dataclasses.dataclass(frozen=True)
class Config:
  """Classification with targets that are refined from epoch to epoch.

  Attributes:
    model: `mlp` on a mixture of Gaussians drawn anew for every run, or `preactivation_resnet` on CIFAR-100 from TFDS.
    classes, features: of the mixture.
    norm: of its means.
    train, valid, test: numbers of examples; a stream is tested on the whole test split.
    hidden: widths of the MLP's hidden layers.
    stages, width: of the residual network.
    noise: standard deviation of what augments the mixture's inputs.
    alpha: PS-KD's alpha_T.
    smoothing: of the labels.
    weight_decay: coupled (L2), on all parameters.
    learning_rate: at the start.
    decay_at: fractions of training after which the learning rate falls tenfold.
    epochs: passes over the training set.
    batch_size: examples per step.
    alphas, smoothings: values of PS-KD and of label smoothing to choose from, the card's first.
    weight_decays: those that go with each of them.
    plain_decays: those of cross-entropy, as many as both together; `weight_decay` is a further one for all.
    data_dir: TFDS's folder; None for its own default.
  """

  model: str = "mlp"
  classes: int = 20
  features: int = 16
  norm: float = 2.55
  train: int = 2000
  valid: int = 1000
  test: int = 4000
  hidden: tuple[int, ...] = (256, 256)
  stages: tuple[int, ...] = (2, 2, 2, 2)
  width: int = 64
  noise: float = 0.3
  alpha: float = 0.8
  smoothing: float = 0.1
  weight_decay: float = 5e-4
  learning_rate: float = 0.1
  decay_at: tuple[float, ...] = (0.5, 0.75)
  epochs: int = 60
  batch_size: int = 100
  alphas: tuple[float, ...] = (0.8, 0.4)
  smoothings: tuple[float, ...] = (0.1, 0.2)
  weight_decays: tuple[float, ...] = (5e-3, 1e-2)
  plain_decays: tuple[float, ...] = (2e-3, 5e-3, 1e-2, 2e-2)
  data_dir: str | None = None

  def __post_init__(self):
    if self.model not in ("mlp", "preactivation_resnet"):
      raise ValueError(f"model must be mlp or preactivation_resnet, got {self.model!r}.")
    if not 1 <= self.batch_size <= self.train:
      raise ValueError(f"batch_size must be in [1, {self.train}], got {self.batch_size}.")
    pairs = len(self.weight_decays) * np.array([len(self.alphas), len(self.smoothings)])
    if not (pairs == len(self.plain_decays)).all():
      raise ValueError(f"every method must have as many settings, got {pairs} and {len(self.plain_decays)}.")

  @property
  def steps_per_epoch(self) -> int:
    return self.train // self.batch_size

  @property
  def steps(self) -> int:
    return self.epochs * self.steps_per_epoch


PRESETS = {
  "smoke": Config(train=400, valid=200, test=400, hidden=(32,), epochs=4),
  "cpu": Config(),
  "paper": Config(model="preactivation_resnet", classes=100, train=50_000, epochs=300, batch_size=128),
}


def task(config: Config) -> Task:
  """Training with PS-KD; hyperparameters are `alpha`, `smoothing`, `noise`, `learning_rate` and `weight_decay`.

  With `alpha` 0 it is training by cross-entropy, with label smoothing where `smoothing` is positive.
  """
  return _mixture_task(config) if config.model == "mlp" else _cifar_task(config)


def _hparams(config: Config, **changed: float) -> dict[str, float]:
  names = ("alpha", "learning_rate", "weight_decay")
  return {**{name: getattr(config, name) for name in names}, "smoothing": 0.0, **changed}


def _losses(config: Config, logits, labels, ids, table, context):
  """Each example's loss, and the new table: PS-KD's, of labels that are smoothed first if asked for."""
  hparams = context.hparams
  alpha = refined_targets.ps_kd_alpha(
    context.step, final=hparams["alpha"], epochs=config.epochs, steps_per_epoch=config.steps_per_epoch
  )
  values, table = refined_targets.ps_kd_loss(logits, labels, ids, state=table, alpha=alpha, axis_name=context.axis_name)
  uniform = -jnp.mean(jax.nn.log_softmax(logits.astype(jnp.float32)), axis=-1)
  return (1 - hparams["smoothing"]) * values + hparams["smoothing"] * uniform, table


def _optimizer(config: Config, hparams) -> optax.GradientTransformation:
  return stepwise_sgd(hparams, config.steps, decay_at=config.decay_at, nesterov=True)


def _mixture_task(config: Config) -> Task:
  model = MLP((*config.hidden, config.classes), kernel_init=jax.nn.initializers.he_normal())
  sizes = {name: getattr(config, name) for name in ("train", "valid", "test")}

  def predict(params, extra, inputs):
    del extra
    return model.apply({"params": params}, inputs)

  def init_params(key, hparams):
    del hparams
    of_data, of_params = jax.random.split(key)
    data = gaussian_classes(of_data, classes=config.classes, features=config.features, norm=config.norm, sizes=sizes)
    params = model.init(of_params, jnp.zeros((1, config.features)))["params"]
    return params, {"data": data, "table": refined_targets.ps_kd_init(config.train, config.classes)}

  def objective(params, extra, batch, context):
    part = {name: values[batch["row"]] for name, values in extra["data"]["train"].items()}
    inputs = part["x"] + context.hparams["noise"] * jax.random.normal(context.key, part["x"].shape)
    logits = predict(params, extra, inputs)
    losses, table = _losses(config, logits, part["y"], batch["id"], extra["table"], context)
    return jnp.mean(losses), ({**extra, "table": table}, {})

  def evaluate(params, extra, hparams):
    del hparams
    train, valid, test = (extra["data"][name] for name in sizes)
    return {
      "train_error": jnp.mean(predict(params, extra, train["x"]).argmax(-1) != train["y"]),
      **{f"valid_{name}": value for name, value in _measured(predict(params, extra, valid["x"]), valid["y"]).items()},
      **{f"test_{name}": value for name, value in _measured(predict(params, extra, test["x"]), test["y"]).items()},
    }

  return gradient_task(
    init_params,
    objective,
    functools.partial(_optimizer, config),
    data=index_data(config.train),
    batch_size=config.batch_size,
    hparams=_hparams(config, noise=config.noise),
    evaluate=evaluate,
    predict=predict,
    config=config,
  )


def _measured(logits, labels) -> dict[str, jax.Array]:
  """`METRICS`, of one part."""
  probabilities = jax.nn.softmax(logits)
  return {
    "error": jnp.mean(logits.argmax(-1) != labels),
    "nll": calibration.negative_log_likelihood(logits, labels),
    "ece": calibration.expected_calibration_error(probabilities, labels),
    "aurc": calibration.area_under_risk_coverage(probabilities, labels),
    "eaurc": calibration.excess_area_under_risk_coverage(probabilities, labels),
  }


def _cifar_task(config: Config) -> Task:
  """A pre-activation ResNet on CIFAR-100 with the usual shifts and reflections; held out is the test split."""

  def network(axis_name=None):
    return PreActivationResNet(config.stages, config.classes, width=config.width, axis_name=axis_name)

  def init_params(key, hparams):
    del hparams
    variables = network().init(key, jnp.zeros((1, 32, 32, 3)), train=False)
    table = refined_targets.ps_kd_init(config.train, config.classes)
    return variables["params"], {"batch_stats": variables["batch_stats"], "table": table}

  def pixels(params, images):
    return cifar100.standardized(images, jax.tree.leaves(params)[0].dtype)

  def predict(params, extra, inputs):
    variables = {"params": params, "batch_stats": extra["batch_stats"]}
    return network().apply(variables, pixels(params, inputs), train=False)

  def objective(params, extra, batch, context):
    variables = {"params": params, "batch_stats": extra["batch_stats"]}
    logits, new = network(context.axis_name).apply(
      variables, pixels(params, batch["image"]), train=True, mutable=["batch_stats"]
    )
    losses, table = _losses(config, logits, batch["label"], batch["id"], extra["table"], context)
    return jnp.mean(losses.astype(jnp.float32)), ({**new, "table": table}, {})

  def measure(state, batch, hparams):
    del hparams
    logits = predict(state.params, state.extra, batch["image"])
    nll = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
    return mean_over(batch, test_error=logits.argmax(-1) != batch["label"], test_nll=nll)

  stream = functools.partial(tfds_stream, "cifar100", batch_size=config.batch_size, data_dir=config.data_dir)
  return gradient_task(
    init_params,
    objective,
    functools.partial(_optimizer, config),
    data=functools.partial(stream, split="train", seed=0, transform=cifar100.augment),
    batch_size=config.batch_size,
    hparams=_hparams(config),
    predict=predict,
    held_out=HeldOut(functools.partial(stream, split="test", transform=cifar100.plain, **ONCE), measure),
    config=config,
    cast=("image",),
  )


def paper_batch(config: Config) -> dict[str, jax.ShapeDtypeStruct]:
  """One global batch of the stream."""
  return cifar100.batch_shapes(config.batch_size)


def reduced(config: Config) -> Config:
  """The same network with one block a stage, at a small width."""
  return dataclasses.replace(config, stages=(1, 1), width=4, batch_size=16, train=128, epochs=3)


def paper_sets(config: Config) -> dict[str, dict]:
  """A generated CIFAR-100."""
  del config
  return cifar100.generated_set(examples=128)


def cell(config: Config) -> Cell:
  """PS-KD's alpha at the end × weight decay."""
  points = {"alpha": [0.0, config.alpha / 2, config.alpha], "weight_decay": [config.weight_decay] * 3}
  return Cell(task(config), config.steps, points, log_every=config.steps_per_epoch)


def settings(config: Config) -> dict[str, list[dict[str, float]]]:
  """method -> settings to choose from, equally many; the first is the card's, at the card's weight decay."""
  plain = {"alpha": 0.0, "smoothing": 0.0, "weight_decay": config.weight_decay, "noise": config.noise}

  def own(name, values):
    tuned = [{name: value, "weight_decay": decay} for value in values for decay in config.weight_decays]
    return [{**plain, **changed} for changed in ({name: values[0]}, *tuned)]

  return {
    "cross-entropy": [{**plain, "weight_decay": decay} for decay in (config.weight_decay, *config.plain_decays)],
    "label smoothing": own("smoothing", config.smoothings),
    "PS-KD": own("alpha", config.alphas),
  }


def cells(config: Config, seeds) -> dict[str, Cell]:
  """All settings of all methods, and cross-entropy and PS-KD without augmentation."""
  del seeds
  if config.model != "mlp":
    raise ValueError("the claims of ps_kd are about a mixture; train its preset `paper` with `run`.")
  methods = settings(config)
  bare = [{**methods[name][0], "noise": 0.0} for name in ("cross-entropy", "PS-KD")]
  every = [setting for several in methods.values() for setting in several] + bare
  points = {name: [setting[name] for setting in every] for name in every[0]}
  return {"mixture": cell(config)._replace(points=points, engine="map")}


def summary(config: Config, trials: Trials) -> dict[str, np.ndarray]:
  """`NAME METRIC` on test data, `[seeds]`: at the card's setting, `tuned NAME`, and `bare NAME` without augmentation.

  Tuned is the setting with the lowest mean NLL on validation data.
  """
  table = trials["mixture"]
  at = lambda part, setting: {m: table.at(f"{part}_{m}", **setting)[:, -1] for m in METRICS}
  found = {}
  for name, several in settings(config).items():
    best = min(several, key=lambda setting: at("valid", setting)["nll"].mean())
    chosen = {name: several[0], f"tuned {name}": best}
    if name != "label smoothing":
      chosen[f"bare {name}"] = {**several[0], "noise": 0.0}
    found |= {f"{key} {m}": v for key, setting in chosen.items() for m, v in at("test", setting).items()}
    found[f"tuned {name} setting"] = np.full(len(table.seeds), several.index(best))
  return found


def _difference(metric: str, one: str, other: str):
  return lambda s: s[f"{one} {metric}"] - s[f"{other} {metric}"]


def _ratio(metric: str, one: str, other: str):
  return lambda s: s[f"{one} {metric}"] / s[f"{other} {metric}"]


def claims(config: Config) -> tuple[Claim, ...]:
  """The card's, at its setting; the same signs without augmentation; and whether anything is left after tuning."""
  data = f"{config.classes} Gaussians, MLP, alpha_T {config.alpha:g}, weight decay {config.weight_decay:g} for both"
  pair, bare, tuned = (
    tuple(f"{prefix}{name}" for name in ("PS-KD", "cross-entropy")) for prefix in ("", "bare ", "tuned ")
  )
  without = f"{data}, inputs without noise"
  chosen = (
    f"{config.classes} Gaussians, MLP; each method's setting the best of {len(config.plain_decays) + 1} by the NLL on"
    " validation data"
  )
  return (
    Claim(
      "nll",
      "PS-KD lowers the NLL of an over-confident network",
      f"test NLL, PS-KD over cross-entropy, {data}",
      _ratio("nll", *pair),
      at_most=0.85,
      scale="log",
    ),
    Claim(
      "ece",
      "PS-KD lowers the calibration error of an over-confident network",
      f"test ECE in 10 bins, PS-KD over cross-entropy, {data}",
      _ratio("ece", *pair),
      at_most=0.6,
      scale="log",
    ),
    Claim(
      "aurc",
      "PS-KD ranks its errors behind what it has right better than cross-entropy does",
      f"test AURC, PS-KD minus cross-entropy, {data}",
      _difference("aurc", *pair),
      at_most=0.0,
    ),
    Claim(
      "error",
      "PS-KD costs an over-confident network no accuracy",
      f"test error, PS-KD minus cross-entropy, {data}",
      _difference("error", *pair),
      at_most=0.003,
    ),
    *(
      Claim(
        f"bare_{metric}",
        f"PS-KD lowers the {title} of a network that fits its training set without augmentation",
        f"test {title}, PS-KD minus cross-entropy, {without}",
        _difference(metric, *bare),
        at_most=0.0,
      )
      for metric, title in (("nll", "NLL"), ("ece", "ECE"), ("aurc", "AURC"))
    ),
    *(
      Claim(
        f"tuned_{metric}",
        f"PS-KD with its settings tuned has a lower {title} than cross-entropy with its weight decay tuned",
        f"test {title}, PS-KD minus cross-entropy, {chosen}",
        _difference(metric, *tuned),
        at_most=0.0,
      )
      for metric, title in (("nll", "NLL"), ("ece", "ECE"), ("error", "error"))
    ),
  )


DEVIATIONS = (
  "A perceptron on a mixture of Gaussians drawn anew for every seed, instead of residual networks on CIFAR-100; the"
  " preset `paper` is the PreAct ResNet-18 on CIFAR-100 with the official hyperparameters.",
  "The table starts with zeros, which stand for `no prediction yet`: an example's target is its label at its first"
  " visit. The official code starts it with the labels and sets them in the first epoch; the targets are the same.",
  "Rows of the table are divided by their sums when they are read, which only matters for a table in bfloat16.",
  "Of equally confident examples AURC counts the mean over their orders; the official code takes the order of an"
  " unstable sort.",
  "Metrics are those of the last epoch; the official code picks the epoch with the best test accuracy.",
  "In the preset `paper` the final normalisation layer of He et al. (2016) stands before the output layer; some ports"
  " of the network leave it out.",
)


def notes(config: Config) -> tuple[str, ...]:
  """How settings were chosen."""
  decays = ", ".join(f"{decay:g}" for decay in (config.weight_decay, *config.plain_decays))
  return (
    f"Settings: cross-entropy with the weight decays {decays}; PS-KD with alpha_T {config.alphas[0]:g} at"
    f" {config.weight_decay:g} and {', '.join(map('{:g}'.format, config.alphas))} at"
    f" {', '.join(map('{:g}'.format, config.weight_decays))}; label smoothing likewise, with"
    f" {', '.join(map('{:g}'.format, config.smoothings))}. The grids were laid with seeds 0 to 3, in which ten to forty"
    " times the card's weight decay helped every method more than PS-KD helped at the card's.",
    "Label smoothing is reported in the figure, not gated.",
  )


def figure(config: Config, summary: dict[str, np.ndarray], path: pathlib.Path) -> None:
  """Error, NLL and ECE of the three methods, at the card's setting and tuned."""
  del config
  picture, axes = plots.panels(3)
  names = ("cross-entropy", "label smoothing", "PS-KD")
  for axis, (metric, title) in zip(axes, (("error", "test error"), ("nll", "test NLL"), ("ece", "test ECE"))):
    groups = {f"{name}\n{at}": summary[f"{prefix}{name} {metric}"]
              for at, prefix in (("card", ""), ("tuned", "tuned ")) for name in names}  # fmt: skip
    plots.bars(axis, groups, colors=["C0", "C1", "C2"] * 2)
    axis.set(title=title)
  plots.save(picture, path)
