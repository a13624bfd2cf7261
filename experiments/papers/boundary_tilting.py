"""Boundary tilting: adversarial examples of a linear classifier are as strong as its boundary is tilted.

The whole path of weight decay for two digits, with clean and with wrong labels, in closed geometry; networks with
several weight decays on ten digits.
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
from jaxreg.adversarial import (
  adversarial_distance,
  adversarial_strength,
  deviation_angle,
  local_distances,
  regularization_path,
  signed_distances,
)
from jaxreg.data import bundled
from jaxreg.models import MLP
from jaxreg.training import Task, gradient_task, grid

CARD = "23-boundary_tilting"
CLASSES = 10


@dataclasses.dataclass(frozen=True)
class Config:
  """Logistic regression on two digits, and networks on all ten, of the MNIST subset with pixels in [0, 1].

  Attributes:
    digits: the two classes.
    per_class: training images of each; the others are the test images.
    strengths: weight decays of the path, ascending, of at least three magnitudes.
    flipped: fraction of training labels that are wrong in the second path.
    weak: the weight decay of an overfitted boundary, one of `strengths`.
    strong: that of a regularized one.
    train: training images of the networks.
    valid: their validation images.
    test: their test images.
    hidden: widths of their hidden layers.
    weight_decays: those of the networks, ascending; `w` adds `w / 2 |kernels|^2` to the loss.
    learning_rate: of SGD with momentum 0.9.
    batch_size: images per step.
    steps: of training a network.
  """

  digits: tuple[int, int] = (3, 7)
  per_class: int = 300
  strengths: tuple[float, ...] = (1e-6, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
  flipped: float = 0.05
  weak: float = 1e-6
  strong: float = 1e-1
  train: int = 1000
  valid: int = 1000
  test: int = 2500
  hidden: tuple[int, ...] = (128,)
  weight_decays: tuple[float, ...] = (1e-5, 1e-4, 1e-3, 3e-3, 1e-2, 3e-2)
  learning_rate: float = 0.05
  batch_size: int = 100
  steps: int = 800

  def __post_init__(self):
    if list(self.strengths) != sorted(self.strengths) or not {self.weak, self.strong} <= set(self.strengths):
      raise ValueError(f"strengths must be ascending and hold {self.weak:g} and {self.strong:g}, got {self.strengths}.")


PRESETS = {
  "smoke": Config(
    per_class=40, strengths=(1e-6, 1e-1, 10.0), train=100, valid=100, test=200, hidden=(16,),
    weight_decays=(1e-5, 1e-2), batch_size=20, steps=20,
  ),
  "cpu": Config(),
}  # fmt: skip


def task(config: Config) -> Task:
  """A network on ten digits; the hyperparameter is `weight_decay`."""
  train, valid, test = bundled.split(bundled.mnist_subset(), sizes=(config.train, config.valid, config.test))
  model = MLP((*config.hidden, CLASSES))
  logits = lambda params, inputs: model.apply({"params": params}, inputs)

  def objective(params, extra, batch, context):
    loss = optax.softmax_cross_entropy_with_integer_labels(logits(params, batch["x"]), batch["y"]).mean()
    kernels = sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(params) if leaf.ndim > 1)
    return loss + context.hparams["weight_decay"] / 2 * kernels, (extra, {})

  def evaluate(params, extra, hparams):
    del extra, hparams
    error = lambda part: jnp.mean(logits(params, part["x"]).argmax(-1) != part["y"])
    distances = local_distances(functools.partial(logits, params), jnp.asarray(test["x"]), jnp.asarray(test["y"]))
    return {
      "train_error": error(train),
      "valid_error": error(valid),
      "test_error": error(test),
      "distance": jnp.mean(distances),
    }

  return gradient_task(
    lambda key, hparams: (model.init(key, jnp.asarray(train["x"][:1]))["params"], {}),
    objective,
    lambda hparams: optax.sgd(config.learning_rate, momentum=0.9),
    data=train,
    batch_size=config.batch_size,
    hparams={"weight_decay": config.weight_decays[0]},
    evaluate=evaluate,
    predict=lambda params, extra, inputs: logits(params, inputs),
    config=config,
  )


def cell(config: Config) -> Cell:
  """Networks with every weight decay."""
  return Cell(task(config), config.steps, grid(weight_decay=list(config.weight_decays)), eval_every=config.steps)


def cells(config: Config, seeds) -> dict[str, Cell]:
  """The networks, over the seeds."""
  del seeds
  return {"networks": cell(config)}


def measure(config: Config, seeds, trained) -> dict[str, np.ndarray]:
  """Angle (degrees), strength, adversarial distance and errors of every strength, `[seeds, strengths]`."""
  del trained
  # Boundaries of nearly separable classes are determined by small differences of margins.
  with jax.enable_x64(True):
    rows = [
      {f"{kind} {name}": value for kind, labels in _labels(config, seed).items() for name, value in labels.items()}
      for seed in seeds
    ]
  return {name: np.stack([np.asarray(row[name], np.float64) for row in rows]) for name in rows[0]}


def _labels(config: Config, seed: int) -> dict[str, dict]:
  train, test = _pair(config, seed)
  flipped = np.random.default_rng((seed, 1)).permutation(len(train["y"]))[: round(config.flipped * len(train["y"]))]
  wrong = np.array(train["y"])
  wrong[flipped] = 1 - wrong[flipped]
  strengths = np.asarray(config.strengths)
  return {
    kind: _path(train["x"], labels, test["x"], test["y"], strengths)
    for kind, labels in (("clean", train["y"]), ("flipped", wrong))
  }


def _pair(config: Config, seed: int):
  """Training and test images of the two digits as vectors; label 1 is the second digit."""
  data = bundled.mnist_subset()
  parts = [
    bundled.split({"x": data["x"][data["y"] == digit]}, sizes=(config.per_class, 500 - config.per_class), seed=seed)
    for digit in config.digits
  ]
  joined = [np.concatenate([part[index]["x"] for part in parts]) for index in (0, 1)]
  labels = [np.repeat([0, 1], [len(part[index]["x"]) for part in parts]) for index in (0, 1)]
  return [{"x": x.reshape(len(x), -1).astype(np.float64), "y": y} for x, y in zip(joined, labels)]


@jax.jit
def _path(inputs, labels, test_inputs, test_labels, strengths):
  path = regularization_path(inputs, labels, strengths=strengths)

  def measured(weights, bias):
    error = lambda x, y: jnp.mean(((signed_distances(x, weights, bias) > 0) != (y == 1)).astype(x.dtype))
    return {
      "angle": jnp.rad2deg(deviation_angle(inputs, labels, weights)),
      "strength": adversarial_strength(inputs, labels, weights, bias),
      "distance": adversarial_distance(inputs, labels, weights, bias),
      "train error": error(inputs, labels),
      "test error": error(test_inputs, test_labels),
    }

  # A boundary that was not found is not measured.
  found = jax.tree.map(lambda x: jnp.where(path.converged, x, jnp.nan), jax.vmap(measured)(path.weights, path.bias))
  return found | {"converged": path.converged}


def summary(config: Config, trials) -> dict[str, np.ndarray]:
  """What was measured of the paths, and the same of the networks, `[seeds, decays]`."""
  networks = trials["networks"]
  names = {"distance": "distance", "test_error": "test error", "valid_error": "valid error"}
  return {**trials.measured, **{f"network {ours}": networks.last(name).T for name, ours in names.items()}}


def _at(config: Config, strength: float) -> int:
  return config.strengths.index(strength)


def _chosen(summary) -> int:
  """The weight decay of the smallest validation error, a mean over seeds."""
  return int(summary["network valid error"].mean(axis=0).argmin())


def claims(config: Config) -> tuple[Claim, ...]:
  """On the path with clean labels, on that with wrong ones, and on networks."""
  weak, strong = _at(config, config.weak), _at(config, config.strong)
  first, second = config.digits
  path = (
    f"logistic regression, {first} against {second}, {config.per_class} training images of each, weight decay"
    f" {', '.join(f'{strength:g}' for strength in config.strengths)}"
  )
  wrong = f"{path}; {100 * config.flipped:g} % of the training labels wrong"
  network = "-".join(map(str, (784, *config.hidden, CLASSES)))
  networks = (
    f"MLP {network}, {config.train:,} training images, weight decay chosen by validation error of"
    f" {', '.join(f'{decay:g}' for decay in config.weight_decays)}"
  )
  return (
    Claim(
      "angle_falls",
      "Stronger weight decay tilts the boundary less, at every step of the path",
      f"smallest fall of the deviation angle (degrees) from one weight decay to the next; {path}",
      lambda s: -np.diff(s["clean angle"], axis=1).max(axis=1),
      at_least=0.0,
    ),
    Claim(
      "strong_without_decay",
      "Adversarial examples of a nearly unregularized boundary are strong",
      f"adversarial strength at weight decay {config.strengths[0]:g}; {path}",
      lambda s: s["clean strength"][:, 0],
      at_least=1.7,
      scale="log",
    ),
    Claim(
      "none_with_decay",
      "Under very strong weight decay there are no adversarial examples: mirror images are as far as the other class",
      f"adversarial strength at weight decay {config.strengths[-1]:g}; {path}",
      lambda s: s["clean strength"][:, -1],
      at_most=1.01,
      scale="log",
    ),
    Claim(
      "interior_optimum",
      "The test error is smallest at an intermediate tilt",
      f"test error at the better end of the path minus the smallest one between; {path}",
      lambda s: (
        np.minimum(s["clean test error"][:, 0], s["clean test error"][:, -1])
        - s["clean test error"][:, 1:-1].min(axis=1)
      ),
      at_least=0.0,
    ),
    Claim(
      "overfitting_is_strong",
      "With wrong labels the strongest adversarial examples are those of an overfitted boundary",
      f"adversarial strength at weight decay {config.weak:g} over that at {config.strong:g}; {wrong}",
      lambda s: s["flipped strength"][:, weak] / s["flipped strength"][:, strong],
      at_least=4.0,
      scale="log",
    ),
    Claim(
      "regularization_is_free",
      "Weight decay that removes the strong adversarial examples of an overfitted boundary also lowers the test error",
      f"test error at weight decay {config.weak:g} minus that at {config.strong:g}; {wrong}",
      lambda s: s["flipped test error"][:, weak] - s["flipped test error"][:, strong],
      at_least=0.03,
    ),
    Claim(
      "network_distance",
      "A network with tuned weight decay has its boundary farther from the test images than one with almost none",
      f"mean first-order distance of test images over that at weight decay {config.weight_decays[0]:g}; {networks}",
      lambda s: s["network distance"][:, _chosen(s)] / s["network distance"][:, 0],
      at_least=1.0,
      scale="log",
    ),
    Claim(
      "network_error",
      "A network with tuned weight decay errs less on test images than one with almost none",
      f"test error at weight decay {config.weight_decays[0]:g} minus that of the chosen one; {networks}",
      lambda s: s["network test error"][:, 0] - s["network test error"][:, _chosen(s)],
      at_least=0.0,
    ),
  )


DEVIATIONS = (
  "Logistic regression in place of a support vector machine (`regularization_path(loss='hinge')` is one), 300 images of"
  " each class in place of 3,000.",
  "The networks are multilayer perceptrons on 1,000 images in place of LeNet on 60,000, with a grid of weight decays"
  " of which the best by validation error is taken, in place of two.",
)
NOTES = (
  "That the strength does not depend on the accuracy needs no measurement: a direction in which no image varies tilts"
  " the boundary at will and changes no prediction. The tests of `tilted_normal` hold it.",
)


def figure(config: Config, summary, path) -> None:
  """Angle, strength and test error along the path, and the networks' distances against their errors."""
  picture, (left, middle, right, last) = plots.panels(4)
  strengths = np.asarray(config.strengths)
  for axis, name in ((left, "angle"), (middle, "strength"), (right, "test error")):
    groups = {kind: summary[f"{kind} {name}"] for kind in ("clean", "flipped")}
    labels = {"clean": "clean labels", "flipped": f"{100 * config.flipped:g} % wrong"}
    plots.curves(axis, strengths, {labels[kind]: values for kind, values in groups.items()}, marker="o")
    axis.set(xscale="log", xlabel="weight decay", title="{} against {}".format(*config.digits))
    axis.legend(frameon=False, fontsize=8)
  left.set_ylabel("deviation angle (degrees)")
  middle.set(ylabel="adversarial strength", yscale="log")
  right.set_ylabel("test error")
  decays = np.asarray(config.weight_decays)
  plots.curves(last, decays, {"distance": summary["network distance"]}, marker="o", color="C0")
  last.set(xscale="log", xlabel="weight decay", ylabel="mean distance to the boundary", title="networks, ten digits")
  other = last.twinx()
  plots.curves(other, decays, {"test error": summary["network test error"]}, marker="s", color="C1")
  other.set(ylabel="test error", ylim=(0, None))
  last.axvline(decays[_chosen(summary)], color="k", linestyle=":", linewidth=1)
  handles = [*last.get_lines()[:1], *other.get_lines()[:1]]
  last.legend(handles, ["distance", "test error"], frameon=False, fontsize=8, loc="center left")
  plots.save(picture, path)
