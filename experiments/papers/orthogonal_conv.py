"""Orthogonal convolutions: which kernels descent finds, at which image sizes they stay isometries, what they resist."""

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
from jaxreg.adversarial.attacks import pgd
from jaxreg.data import bundled
from jaxreg.layers.loop_conv import loop_conv_general_dilated
from jaxreg.layers.max_min_activation import max_min
from jaxreg.metrics.conv_spectrum import (
  certified_radius,
  conv_singular_values,
  isometry_bounds,
  orthogonality_error,
  orthogonality_spectral_constant,
)
from jaxreg.regularizers.orthogonal_conv import orthogonal_conv_penalty, orthogonal_penalty
from jaxreg.training import Task, gradient_task

CARD = "50-orthogonal_conv"
# Inputs, outputs, kernel size, stride.
NON_SQUARE = ((8, 4, 3, 1), (8, 16, 3, 1), (4, 8, 3, 2))
SQUARE = ((8, 8, 3, 1), (4, 16, 3, 2))
REACHED = 1e-4  # the penalty of a kernel that descent has made orthogonal
LARGE = 8  # pixels from which the spectral error is to have saturated
# Of the network: name -> stride, and the size of the output in pixels.
LAYERS = {"conv0": (1, 8), "conv1": (2, 4), "conv2": (2, 2)}
STRIDES = {**{f"{name}/kernel": stride for name, (stride, _) in LAYERS.items()}, "head/kernel": None}
KEPT = 0.01  # clean accuracy that a weight may cost


@dataclasses.dataclass(frozen=True)
class Config:
  """The three experiments.

  Attributes:
    shapes: inputs, outputs, kernel size and stride of the kernels.
    descent_steps: steps of Adam on the penalty alone; the last quarter has a tenth of the learning rate.
    sizes: output sizes in pixels at which a nearly orthogonal kernel is measured.
    train: training images of digits.
    test: as many others, for testing.
    channels: of the network's convolutions.
    steps: training steps of a network.
    batch_size: examples per step.
    weights: of the penalty, increasing, 0 first.
    radius: of the l2 attack, for pixels in [0, 1].
    attack_steps: steps of the attack, of 2.5 / attack_steps of the radius.
  """

  shapes: tuple[tuple[int, int, int, int], ...] = (*NON_SQUARE, *SQUARE)
  descent_steps: int = 2000
  sizes: tuple[int, ...] = (4, 8, 16, 32, 64)
  train: int = 1297
  test: int = 500
  channels: tuple[int, int, int] = (16, 32, 64)
  steps: int = 1000
  batch_size: int = 64
  weights: tuple[float, ...] = (0.0, 0.01, 1.0, 10.0)
  radius: float = 0.5
  attack_steps: int = 20

  def __post_init__(self):
    if self.weights[0] != 0 or list(self.weights) != sorted(self.weights):
      raise ValueError(f"weights must increase from 0, got {self.weights}.")


PRESETS = {
  "smoke": Config(
    shapes=(NON_SQUARE[0], SQUARE[0]),
    descent_steps=20,
    sizes=(4, 8),
    train=128,
    test=32,
    channels=(4, 4, 8),
    steps=4,
    weights=(0.0, 1.0),
    attack_steps=2,
  ),
  "cpu": Config(),
}


class Network(nn.Module):
  """Three circular convolutions with MaxMin, and a linear head: 1-Lipschitz when all kernels are orthogonal."""

  channels: tuple[int, ...]

  @nn.compact
  def __call__(self, images: jax.Array) -> jax.Array:
    hidden = images
    for outputs, (name, (stride, _)) in zip(self.channels, LAYERS.items(), strict=True):
      options = {"padding": "CIRCULAR", "conv_general_dilated": loop_conv_general_dilated, "name": name}
      hidden = max_min(nn.Conv(outputs, (3, 3), strides=stride, **options)(hidden))
    return nn.Dense(10, name="head")(hidden.reshape(len(hidden), -1))


def cell(config: Config) -> Cell:
  """The weights of the penalty."""
  return Cell(task(config), config.steps, {"weight": config.weights}, log_every=max(config.steps // 10, 1))


def task(config: Config) -> Task:
  """Cross-entropy on digits plus the penalty of all layers; hyperparameters are `learning_rate` and `weight`."""
  train, test = bundled.split(bundled.digits(), sizes=(config.train, config.test))
  model = Network(config.channels)

  def predict(params, extra, inputs):
    del extra
    return model.apply({"params": params}, inputs)

  def objective(params, extra, batch, context):
    logits = predict(params, extra, batch["x"])
    task_loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"]).mean()
    penalty = orthogonal_penalty(params, STRIDES)
    return task_loss + context.hparams["weight"] * penalty, (extra, {"task_loss": task_loss, "penalty": penalty})

  def evaluate(params, extra, hparams):
    del hparams
    losses = lambda x: optax.softmax_cross_entropy_with_integer_labels(predict(params, extra, x), test["y"])
    step_size = 2.5 * config.radius / config.attack_steps
    attack = dict(radius=config.radius, step_size=step_size, steps=config.attack_steps, norm="l2", bounds=(0.0, 1.0))
    attacked = pgd(losses, jnp.asarray(test["x"]), jax.random.key(0), **attack)
    return {
      "test_accuracy": jnp.mean(predict(params, extra, test["x"]).argmax(-1) == test["y"]),
      "attacked_accuracy": jnp.mean(predict(params, extra, attacked).argmax(-1) == test["y"]),
    }

  return gradient_task(
    lambda key, hparams: (model.init(key, jnp.asarray(train["x"][:1]))["params"], {}),
    objective,
    lambda hparams: optax.adam(hparams["learning_rate"]),
    data=train,
    batch_size=config.batch_size,
    hparams={"learning_rate": 1e-3, "weight": 1.0},
    evaluate=evaluate,
    predict=predict,
    config=config,
  )


def layer_norms(params) -> dict[str, jax.Array]:
  """The largest singular value of each layer."""
  norms = {
    name: jnp.max(conv_singular_values(params[name]["kernel"], size=size, stride=stride))
    for name, (stride, size) in LAYERS.items()
  }
  return {**norms, "head": jnp.linalg.norm(params["head"]["kernel"], 2)}


def certify(config: Config, params) -> dict[str, np.ndarray]:
  """The Lipschitz bounds and certified accuracies of trained networks, `[trials]`."""
  _, test = bundled.split(bundled.digits(), sizes=(config.train, config.test))

  # Not part of `evaluate`: batches of singular values can stall XLA's threads when a sweep uses several CPU devices.
  @jax.jit
  def audit(params):
    product = jnp.prod(jnp.stack(list(layer_norms(params).values())))
    logits = Network(config.channels).apply({"params": params}, jnp.asarray(test["x"]))
    certified = certified_radius(logits, lipschitz_constant=product) >= config.radius
    return product, jnp.mean((logits.argmax(-1) == test["y"]) & certified)

  trials = len(jax.tree.leaves(params)[0])
  bounds, certified = zip(*[audit(jax.tree.map(lambda leaf, t=t: leaf[t], params)) for t in range(trials)])
  return {"lipschitz_bound": np.asarray(bounds), "certified_accuracy": np.asarray(certified)}


def cells(config: Config, seeds) -> dict[str, Cell]:
  """Networks at all weights, whose Lipschitz bounds `measure` computes."""
  del seeds
  # Convolutions: under `vmap` they are grouped, and take minutes to compile.
  return {"robustness": cell(config)._replace(engine="map", keep_params=True)}


@functools.partial(jax.jit, static_argnames=("shape", "steps"))
def descend(keys, shape, steps):
  """Adam on `L_orth`: the last kernel and value, and the kernel when the value first fell below 1e-4, per key."""
  inputs, outputs, size, stride = shape
  penalty = functools.partial(orthogonal_conv_penalty, stride=stride)
  optimizer = optax.adam(optax.piecewise_constant_schedule(0.01, {steps * 3 // 4: 0.1}))
  deviation = 1 / (size * np.sqrt(max(inputs, outputs / stride**2)))

  def run(key):
    start = deviation * jax.random.normal(key, (size, size, inputs, outputs))

    def step(carry, _):
      kernel, state, near, passed = carry
      value, gradient = jax.value_and_grad(penalty)(kernel)
      near, passed = jnp.where(passed, near, kernel), passed | (value <= REACHED)
      updates, state = optimizer.update(gradient, state)
      return (optax.apply_updates(kernel, updates), state, near, passed), None

    carry = start, optimizer.init(start), start, jnp.bool_(False)
    (kernel, _, near, _), _ = jax.lax.scan(step, carry, None, length=steps)
    return kernel, penalty(kernel), near

  return jax.lax.map(run, keys)


def landscape(config: Config, seeds: list[int]) -> dict[str, np.ndarray]:
  """What descent reaches and the extreme singular values, `[seeds, shapes]`; and nearly orthogonal kernels."""
  keys = jax.vmap(jax.random.key)(np.asarray(seeds))
  found = {shape: descend(keys, shape, config.descent_steps) for shape in config.shapes}
  ends = {
    shape: np.asarray(jax.vmap(functools.partial(_ends, stride=shape[3]))(kernels))
    for shape, (kernels, _, _) in found.items()
  }
  return {
    "descent penalty": np.stack([np.asarray(value) for _, value, _ in found.values()], axis=1),
    "descent smallest": np.stack([end[:, 0] for end in ends.values()], axis=1),
    "descent largest": np.stack([end[:, 1] for end in ends.values()], axis=1),
    "near": {shape: np.asarray(found[shape][2]) for shape in config.shapes if not is_square(shape)},
  }


def is_square(shape) -> bool:
  """Whether the convolution has as many outputs as inputs, counting the stride's subsampling."""
  inputs, outputs, _, stride = shape
  return outputs == inputs * stride**2


def _ends(kernel, stride):
  values = conv_singular_values(kernel, size=8, stride=stride)
  return jnp.stack([jnp.min(values), jnp.max(values)])


def scalability(config: Config, near: dict) -> dict[str, np.ndarray]:
  """Errors of kernels with a penalty of about 1e-4 at each image size, `[seeds, shapes, sizes]`, and their bounds."""
  measured = {"scale penalty": [], "scale bound": [], "scale spectral": [], "scale frobenius": []}
  with jax.enable_x64(True):
    for (inputs, outputs, size, stride), kernels in near.items():
      kernels = jnp.asarray(kernels, jnp.float64)
      value = jax.vmap(functools.partial(orthogonal_conv_penalty, stride=stride))(kernels)
      alpha = orthogonality_spectral_constant(outputs=outputs, inputs=inputs, kernel_size=size, stride=stride)
      errors = [jax.jit(jax.vmap(functools.partial(_errors, size=n, stride=stride)))(kernels) for n in config.sizes]
      measured["scale penalty"].append(value)
      # The upper bound on the singular values is sqrt(1 + e).
      measured["scale bound"].append(isometry_bounds(value, spectral_constant=alpha)[1] ** 2 - 1)
      measured["scale spectral"].append(np.stack([error.spectral for error in errors], axis=1))
      per_pixel = [error.frobenius / n for error, n in zip(errors, config.sizes)]
      measured["scale frobenius"].append(np.stack(per_pixel, axis=1))
  return {name: np.stack([np.asarray(each) for each in values], axis=1) for name, values in measured.items()}


def _errors(kernel, size, stride):
  return orthogonality_error(conv_singular_values(kernel, size=size, stride=stride))


def measure(config: Config, seeds, trained) -> dict[str, np.ndarray]:
  """Kernels that descent finds, their errors by image size, and bounds of the trained networks `[seeds, weights]`."""
  found = landscape(config, seeds)
  near = found.pop("near")
  audited = certify(config, jax.tree.map(np.asarray, trained["robustness"].params))
  audited = {name: value.reshape(len(config.weights), len(seeds)).T for name, value in audited.items()}
  return {**found, **scalability(config, near), **audited}


def summary(config: Config, trials: Trials) -> dict[str, np.ndarray]:
  """What was measured, and accuracies `[seeds, weights]` without and under attack."""
  del config
  accuracies = ("test_accuracy", "attacked_accuracy")
  return {**trials.measured, **{name: trials["robustness"].last(name).T for name in accuracies}}


def reached(config: Config, m, square: bool) -> np.ndarray:
  """The fraction of shapes whose runs reached the threshold, per seed."""
  columns = [is_square(shape) == square for shape in config.shapes]
  return np.mean(m["descent penalty"][:, columns] <= REACHED, axis=1)


def largest_kept(m) -> int:
  """The largest weight whose clean accuracy, averaged over seeds, is within a point of that without penalty."""
  clean = m["test_accuracy"].mean(0)
  return int(np.flatnonzero(clean >= clean[0] - KEPT).max())


def _change_beyond(config: Config, m) -> np.ndarray:
  errors = m["scale spectral"][..., np.asarray(config.sizes) >= LARGE]
  return (errors.max(-1) / errors.min(-1) - 1).max(-1)


def _frobenius_spread(config: Config, m) -> np.ndarray:
  # The identity holds where the input is at least twice the kernel minus one; the others are shown, not judged.
  spreads = []
  shapes = [shape for shape in config.shapes if not is_square(shape)]
  for index, (_, _, size, stride) in enumerate(shapes):
    values = m["scale frobenius"][:, index, stride * np.asarray(config.sizes) >= 2 * size - 1]
    spreads.append(values.max(-1) / values.min(-1) - 1)
  return np.max(spreads, axis=0)


def claims(config: Config) -> tuple[Claim, ...]:
  """What descent finds, how the penalty scales with images, and what it does to a network."""
  named = lambda square: ", ".join(
    f"({','.join(map(str, shape))})" for shape in config.shapes if is_square(shape) == square
  )
  pixels = f"{config.sizes[0]} to {config.sizes[-1]} pixels"
  descent = f"reach {REACHED:g} from a random start, Adam, {config.descent_steps:,} steps"
  weights = ", ".join(f"{weight:g}" for weight in config.weights)
  return (
    Claim(
      "landscape",
      "Descent on the penalty alone finds orthogonal kernels when the convolution is not square",
      f"fraction of the shapes {named(False)} (inputs, outputs, kernel, stride) that {descent}",
      lambda m: reached(config, m, square=False),
      at_least=0.95,
    ),
    Claim(
      "square",
      "Descent on the penalty alone often fails to find orthogonal kernels when the convolution is square",
      f"fraction of the shapes {named(False)} that {descent}, minus that of the square shapes {named(True)}",
      lambda m: reached(config, m, square=False) - reached(config, m, square=True),
      at_least=0.3,
    ),
    Claim(
      "bound",
      "A kernel with a small penalty is nearly an isometry at every image size",
      f"largest ratio of the spectral error to its bound sqrt(alpha L_orth), L_orth about {REACHED:g}, {pixels}",
      lambda m: (m["scale spectral"].max(-1) / m["scale bound"]).max(-1),
      at_most=1.0,
    ),
    Claim(
      "saturates",
      "A kernel with a small penalty stays nearly as much of an isometry as images grow",
      f"relative change of the spectral error between {LARGE} and {config.sizes[-1]} pixels, the largest of the shapes"
      f" {named(False)}",
      lambda m: _change_beyond(config, m),
      at_most=0.2,
    ),
    Claim(
      "frobenius",
      "The penalty is the Frobenius error per pixel, whatever the image size",
      "relative spread of the Frobenius error over the size, inputs of at least 2 k - 1 pixels, float64",
      lambda m: _frobenius_spread(config, m),
      at_most=1e-5,
    ),
    Claim(
      "lipschitz",
      "The weight of the penalty tunes the network's Lipschitz bound",
      f"least log-ratio of the products of largest singular values at neighbouring weights {weights}",
      lambda m: -np.diff(np.log(m["lipschitz_bound"]), axis=1).max(1),
      at_least=0.0,
    ),
    Claim(
      "robust",
      "The penalty makes a network more robust at no loss of accuracy",
      f"accuracy under PGD (l2, radius {config.radius:g}, {config.attack_steps} steps) at the largest weight that costs"
      f" at most {100 * KEPT:g} point of clean accuracy, minus that without penalty; digits",
      lambda m: (m["attacked_accuracy"] - m["attacked_accuracy"][:, :1])[:, largest_kept(m)],
      at_least=0.03,
    ),
  )


DEVIATIONS = (
  "The penalty is squared, less its minimum, with padding floor((k - 1) / S) S. Wang et al.'s code takes the norm"
  " (`orthogonal_conv_defect_norm`) without the offset and has padding 1 whatever kernel and stride, which accepts"
  " kernels that are not orthogonal; their weights are not comparable with those here.",
  "Digits of 8 × 8 pixels and three convolutions with MaxMin and a linear head, instead of CIFAR-10, Imagenette and"
  " ImageNet with VGG-like and residual networks. No paper preset.",
  "All kernels are penalized with one weight, not divided by their sizes, the first convolution and the head"
  " (flattened form) among them; Wang et al. leave out the first convolution and flatten 1 × 1 and downsampling ones.",
  "Kernels of the network start from flax's default (normal, by fan-in), not from orthogonal ones, and layers have"
  " biases; batch normalization is left out.",
  "Descent on the penalty alone is shown for five shapes and 3 × 3 kernels, Adam at 0.01 and 0.001 in the last"
  " quarter; the paper's grid of shapes is not known.",
  "The weight of the robustness claim is the largest whose mean clean accuracy on the test images is within a point of"
  " that without penalty; attack and accuracy are measured on the same images.",
)
NOTES = (
  "The identity of penalty and Frobenius error needs inputs of at least 2 k - 1 pixels: at stride 1 a 4-pixel image is"
  " too small, and is left out of that claim.",
  "The penalty covers all four layers, the linear head among them. Certified accuracy (the fraction of test images"
  " that are right and provably stay so within the attack's radius) is reported in the figure, not gated.",
)


def figure(config: Config, summary: dict[str, np.ndarray], path: pathlib.Path) -> None:
  """What descent reaches, errors against image size, accuracies and Lipschitz bound against the weight."""
  picture, (left, middle, right, last) = plots.panels(4)
  names = [f"{inputs}→{outputs}\nstride {stride}" for inputs, outputs, _, stride in config.shapes]
  for square, label in ((False, "not square"), (True, "square")):
    columns = [index for index, shape in enumerate(config.shapes) if is_square(shape) == square]
    values = np.maximum(summary["descent penalty"][:, columns], 1e-8)
    plots.scatter(left, {label: (np.broadcast_to(columns, values.shape).ravel(), values.ravel())})
  left.axhline(REACHED, color="k", linestyle=":", linewidth=1)
  left.set(yscale="log", ylabel="$L_{orth}$ after descent", title="kernels, 3×3")
  left.set_xticks(range(len(names)), names, fontsize=8)
  tall_or_wide = [name.replace("\n", ", ") for name, shape in zip(names, config.shapes) if not is_square(shape)]
  for index, name in enumerate(tall_or_wide):
    plots.curves(middle, config.sizes, {name: summary["scale spectral"][:, index]}, marker=".", color=f"C{index}")
    middle.axhline(summary["scale bound"][:, index].max(), color=f"C{index}", linestyle=":")
  middle.plot([], [], "k:", label=r"bound $\sqrt{\alpha L_{orth}}$")
  middle.set(xscale="log", yscale="log", xlabel="output size in pixels", ylabel=r"largest $|\sigma^2 - 1|$")
  middle.set(xticks=config.sizes, xticklabels=config.sizes, title=f"kernels with $L_{{orth}}$ about {REACHED:g}")
  middle.minorticks_off()
  accuracies = {
    "clean": summary["test_accuracy"],
    f"PGD, l2, {config.radius:g}": summary["attacked_accuracy"],
    f"certified, l2, {config.radius:g}": summary["certified_accuracy"],
  }
  places = range(len(config.weights))
  plots.curves(right, places, accuracies, marker="o")
  right.set(ylabel="test accuracy", ylim=(-0.03, 1.03), title="digits, 3 convolutions + head")
  plots.curves(last, places, {"digits": summary["lipschitz_bound"]}, marker="s", color="k")
  last.set(yscale="log", title="product of largest singular values")
  for axis in (right, last):
    axis.set(xticks=places, xticklabels=[f"{weight:g}" for weight in config.weights], xlabel="weight of the penalty")
  for axis in (left, middle, right):
    axis.legend(frameon=False, fontsize=8)
  plots.save(picture, path)
