"""Policy gradient-driven noise masks: training on images under learned noise first, then on clean ones.

What the learned policy is worth beside an untrained one, uniform noise and no noise, and where its objective leads it.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.harness import plots
from experiments.harness.claims import Claim
from experiments.harness.selection import select
from experiments.harness.trials import Cell
from experiments.problems.distillation import index_data
from jaxreg.data import bundled
from jaxreg.layers import NoiseMaskPolicy
from jaxreg.losses import enlarge_noise_mask, noise_mask_loss, sample_noise_mask
from jaxreg.models import MLP
from jaxreg.training import Task, gradient_task

CARD = "34-noise_mask"
CLASSES, SIZE = 10, 14
# The kind of the mask is a hyperparameter, so that one program trains them all.
KINDS = {"clean": 0, "random": 1, "uniform": 2, "official": 3, "reinforce": 4}
NAMES = {
  "clean": "no mask",
  "random": "untrained policy",
  "uniform": "uniform noise",
  "official": "official objective",
  "reinforce": "REINFORCE",
}
BOUND = 3.0  # of the policy's logarithms under REINFORCE, which runs away without one


@dataclasses.dataclass(frozen=True)
class Config:
  """The MNIST subset, averaged to 14 × 14 pixels, of which half the images are negatives.

  Attributes:
    train: training images; which they are differs from seed to seed.
    few: fewer of them, for the last claim.
    valid: validation images.
    test: test images.
    hidden: widths of the classifier's hidden layers.
    policy_hidden: widths of the policy's backbone.
    grid: rows and columns of the mask.
    kernel_size: of the blur, in pixels.
    width: of the blur.
    heated: steps under masks.
    steps: all steps; the rest are without masks.
    batch_size: images per step.
    learning_rates: of SGD with momentum 0.9, at which every kind is tuned; a quarter of it for the official objective.
    last_rate: the rate of the steps without masks after those with.
    policy_rate: of the policy.
  """

  train: int = 1000
  few: int = 300
  valid: int = 500
  test: int = 2500
  hidden: tuple[int, ...] = (128, 128)
  policy_hidden: tuple[int, ...] = (32, 32)
  grid: int = 7
  kernel_size: int = 3
  width: float = 1.0
  heated: int = 1500
  steps: int = 2000
  batch_size: int = 64
  learning_rates: tuple[float, ...] = (0.0125, 0.025, 0.05, 0.1)
  last_rate: float = 0.01
  policy_rate: float = 0.005


PRESETS = {
  "smoke": Config(
    train=64, few=32, valid=32, test=64, hidden=(16,), policy_hidden=(8,), heated=8, steps=12, batch_size=16,
    learning_rates=(0.05, 0.1),
  ),
  "cpu": Config(),
}  # fmt: skip


def _images():
  """All images as vectors, standardised, and their labels."""
  data = bundled.mnist_subset()
  images = data["x"].reshape(-1, SIZE, 2, SIZE, 2).mean((2, 4))
  images = np.where(np.arange(len(images))[:, None, None] % 2, 1 - images, images)
  return ((images - images.mean()) / images.std()).astype(np.float32), data["y"].astype(np.int32)


def task(config: Config) -> Task:
  """Classifier and policy; hyperparameters are `kind` and `learning_rate`."""
  x, y = _images()
  classifier = MLP((*config.hidden, CLASSES))
  backbone = MLP(config.policy_hidden)
  policy = NoiseMaskPolicy(cells=config.grid**2, backbone=backbone)
  logits = lambda params, images: classifier.apply({"params": params["classifier"]}, images)

  def init(key, hparams):
    del hparams
    of_rows, of_classifier, of_policy = jax.random.split(key, 3)
    rows = jax.random.permutation(of_rows, len(y))
    train, valid, test, _ = jnp.split(rows, np.cumsum([config.train, config.valid, config.test]))
    variables = policy.init(of_policy, x[:2])
    params = {"classifier": classifier.init(of_classifier, x[:1])["params"], "policy": variables.pop("params")}
    return params, {"rows": {"train": train, "valid": valid, "test": test}, "policy": variables, "cost": jnp.zeros(())}

  def heated(params, extra, images, labels, context):
    kind = context.hparams["kind"]
    variables = {"params": params["policy"], **extra["policy"]}
    parameters, updated = policy.apply(variables, images, mutable=list(extra["policy"]))
    parameters = [_of_kind(kind, each) for each in parameters]
    mask = sample_noise_mask(context.key, *parameters)
    large = enlarge_noise_mask(mask, size=SIZE, kernel_size=config.kernel_size, width=config.width)
    found = logits(params, images * jnp.where(kind == KINDS["clean"], 1, large))
    official, terms = noise_mask_loss(*parameters, mask, found, labels)
    reinforce, _ = noise_mask_loss(
      *parameters, mask, found, labels, objective="reinforce", baseline=jax.lax.stop_gradient(extra["cost"])
    )
    learning = [kind == KINDS["official"], kind == KINDS["reinforce"]]
    loss = jnp.select(learning, [official, reinforce], terms.cross_entropy)
    started = jnp.where(context.step == 0, terms.cross_entropy, extra["cost"])
    cost = 0.95 * started + 0.05 * terms.cross_entropy
    return loss, {**extra, "policy": dict(updated), "cost": jax.lax.stop_gradient(cost)}

  def objective(params, extra, batch, context):
    rows = extra["rows"]["train"][batch["row"]]
    images, labels = jnp.asarray(x)[rows], jnp.asarray(y)[rows]
    plain = lambda: (
      optax.softmax_cross_entropy_with_integer_labels(logits(params, images), labels).mean(),
      extra,
    )
    masked = lambda: heated(params, extra, images, labels, context)
    loss, extra = jax.lax.cond(context.step < config.heated, masked, plain)
    return loss, (extra, {})

  def optimizer(hparams):
    of_kind = jnp.where(hparams["kind"] == KINDS["official"], 0.25, 1.0) * hparams["learning_rate"]
    after = lambda first, then: lambda step: jnp.where(step < config.heated, first, then)
    return optax.multi_transform(
      {
        "classifier": optax.sgd(after(of_kind, config.last_rate), momentum=0.9),
        "policy": optax.sgd(after(config.policy_rate, 0.0), momentum=0.9),
      },
      {"classifier": "classifier", "policy": "policy"},
    )

  def evaluate(params, extra, hparams):
    images = {name: jnp.asarray(x)[rows] for name, rows in extra["rows"].items()}
    right = lambda name: jnp.mean(logits(params, images[name]).argmax(-1) == jnp.asarray(y)[extra["rows"][name]])
    still = NoiseMaskPolicy(cells=config.grid**2, backbone=backbone, train=False)
    parameters = still.apply({"params": params["policy"], **extra["policy"]}, images["train"])
    means = [jnp.mean(jnp.exp(_of_kind(jnp.asarray(hparams["kind"]), each))) for each in parameters]
    return {"valid_accuracy": right("valid"), "test_accuracy": right("test"), "alpha": means[0], "beta": means[1]}

  return gradient_task(
    init,
    objective,
    optimizer,
    data=index_data(config.train),
    batch_size=config.batch_size,
    hparams={"kind": KINDS["official"], "learning_rate": config.learning_rates[0]},
    evaluate=evaluate,
    predict=lambda params, extra, inputs: logits(params, inputs),
    config=config,
  )


def _of_kind(kind, logarithms):
  """The logarithms of a mask's parameters, from those of the policy."""
  bounded = BOUND * jnp.tanh(logarithms / BOUND)
  return jnp.select(
    [kind == KINDS["uniform"], kind == KINDS["reinforce"]], [jnp.zeros_like(logarithms), bounded], logarithms
  )


def cell(config: Config, kinds=tuple(KINDS)) -> Cell:
  """Kinds of masks × learning rates."""
  points = [(KINDS[kind], rate) for kind in kinds for rate in config.learning_rates]
  return Cell(task(config), config.steps, dict(zip(("kind", "learning_rate"), zip(*points))), engine="map")


def cells(config: Config, seeds) -> dict[str, Cell]:
  """All kinds with many training images; two with few."""
  del seeds
  return {"many": cell(config), "few": cell(dataclasses.replace(config, train=config.few), ("clean", "official"))}


def summary(config: Config, trials) -> dict[str, np.ndarray]:
  """`[seeds]`, by number of images and kind, at the learning rate of the best mean validation accuracy."""
  del config
  found = {}
  for name in ("many", "few"):
    table = trials[name]
    for kind, number in KINDS.items():
      points = table.hparams["kind"] == number
      if not points.any():
        continue
      chosen = select(table.metrics["valid_accuracy"][points])
      found |= {f"{name} {kind} {metric}": chosen.of(values[points]) for metric, values in table.metrics.items()}
      found[f"{name} {kind} point"] = np.full(len(table.seeds), chosen.setting)
  return found


def claims(config: Config) -> tuple[Claim, ...]:
  """The card's, and what the learned policy is worth beside noise that nothing has learned."""
  network = "-".join(map(str, (SIZE**2, *config.hidden, CLASSES)))
  after = config.steps - config.heated
  setting = (
    f"MNIST subset at {SIZE} × {SIZE}, half of it negatives, MLP {network}, {config.heated:,} steps and {after} more at"
    f" rate {config.last_rate:g}, the first rate of each by validation images among {len(config.learning_rates)}"
  )
  many = f"test accuracy, {config.train:,} training images, {setting}"
  minus = lambda a, b, number="many": lambda s: s[f"{number} {a} test_accuracy"] - s[f"{number} {b} test_accuracy"]
  return (
    Claim(
      "gain",
      "Training under the official objective's masks first makes a better classifier than as many clean steps",
      f"difference of {many}",
      minus("official", "clean"),
      at_least=0.005,
    ),
    Claim(
      "over_random",
      "The masks of the trained policy are at least as good as those of an untrained one",
      f"difference of {many}",
      minus("official", "random"),
      at_least=0.0,
    ),
    Claim(
      "over_uniform",
      "The masks of the trained policy are better than uniform noise, which depends on no image",
      f"difference of {many}",
      minus("official", "uniform"),
      at_least=0.0,
    ),
    Claim(
      "reinforce",
      "The policy gradient proper makes a better classifier than uniform noise",
      f"difference of {many}, logarithms of its parameters within {BOUND:g}",
      minus("reinforce", "uniform"),
      at_least=0.0,
    ),
    Claim(
      "collapse_alpha",
      "The official objective leads the policy to uniform noise: the first parameter becomes 1",
      f"|mean alpha - 1| over training images after training; {setting}",
      lambda s: np.abs(s["many official alpha"] - 1),
      at_most=0.1,
    ),
    Claim(
      "collapse_beta",
      "The official objective leads the policy to uniform noise: the second parameter becomes 1",
      f"|mean beta - 1| over training images after training; {setting}",
      lambda s: np.abs(s["many official beta"] - 1),
      at_most=0.1,
    ),
    Claim(
      "few_images",
      "With few training images masks do not help",
      f"difference of test accuracy, official objective minus no mask, {config.few} training images, {setting}",
      minus("official", "clean", "few"),
      at_most=0.0,
    ),
  )


DEVIATIONS = (
  "Small perceptrons on digits, half of them negatives, in place of residual networks on medical images, which no data"
  " set library prepares unasked.",
  "The classifier's rate is a quarter for the official objective, which multiplies its gradient by about the logarithm"
  " of the number of cells; the baseline without masks has the same steps, the same fall of the rate and a grid alike.",
  f"Under REINFORCE the policy's logarithms are bounded by {BOUND:g} times a hyperbolic tangent, and the baseline is a"
  " running mean of the cost.",
  "Plain SGD in phase one without the step decay of the rate and the cosine of the policy's, and no weight decay.",
)


def figure(config: Config, summary, path) -> None:
  """Accuracies by kind of mask, with many images and with few, and the policy's parameters."""
  picture, (left, middle, right) = plots.panels(3)
  plots.bars(left, {name: summary[f"many {kind} test_accuracy"] for kind, name in NAMES.items()})
  left.set(ylabel="test accuracy", title=f"{config.train:,} training images", ylim=_close(summary, "many"))
  plots.bars(middle, {NAMES[kind]: summary[f"few {kind} test_accuracy"] for kind in ("clean", "official")})
  middle.set(ylabel="test accuracy", title=f"{config.few} training images", ylim=_close(summary, "few"))
  groups = {
    f"{NAMES[kind]}\n{name}": summary[f"many {kind} {name}"]
    for kind in ("random", "official", "reinforce")
    for name in ("alpha", "beta")
  }
  plots.bars(right, groups)
  right.axhline(1, color="k", linestyle=":", linewidth=1)
  right.set(ylabel="mean parameter", title="policy after training", yscale="log")
  for axis in (left, middle, right):
    axis.tick_params(axis="x", rotation=60)
  plots.save(picture, path)


def _close(summary, name: str) -> tuple[float, float]:
  """Limits of an axis around accuracies that differ little."""
  values = np.concatenate([v for key, v in summary.items() if key.startswith(name) and key.endswith("test_accuracy")])
  margin = 0.1 * max(float(np.ptp(values)), 1e-3)
  return float(values.min()) - margin, float(values.max()) + margin
