"""Self-distillation: what ground truth does to the regularization that grows from round to round.

Kernel regression in closed form: harm and gain over the rounds at several weights of the ground truth, and the limit.
Networks: the weight that one student without ground truth estimates against a grid of weights.
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
from jaxreg.data import bundled
from jaxreg.data.noise import symmetric_noise
from jaxreg.kernels import self_distillation as distill
from jaxreg.kernels.gradient_flow import class_targets, kernel_regression
from jaxreg.kernels.rbf import rbf_kernel
from jaxreg.losses.distillation import self_distillation_squared_loss
from jaxreg.models import MLP
from jaxreg.training import Task, gradient_task

CARD = "14-self_distillation"
RIDGES = {"strong": 1.0, "weak": 0.1}
LIMIT = {"ridge": 1.0, "target_weight": 0.5}
WEIGHTS = (0.0, 0.25, 0.5)  # of the ground truth in kernel regression
GRID = (0.0, 0.25, 0.5, 0.75)  # of the ground truth for networks
ROUNDS = 6
VALIDATION = 200  # clean


@dataclasses.dataclass(frozen=True)
class Config:
  """Kernel regression and networks on digits with wrong labels.

  Attributes:
    kernel_train: training examples of kernel regression.
    kernel_noise: fraction of their labels replaced by uniform ones.
    gamma: of the kernel `exp(-gamma |x - x'|^2)` of pixels in [0, 1].
    limit_rounds: rounds after which the fit is compared with its limit.
    train: training examples of networks, drawn with seed 0.
    noise_rate: fraction of their labels replaced by uniform ones, drawn with the run's key.
    hidden: widths of the hidden layers.
    learning_rate: of Adam.
    batch_size: examples per step.
    epochs: passes over the training set in each round.
    rounds: of networks; the first has no teacher.
  """

  kernel_train: int = 300
  kernel_noise: float = 0.3
  gamma: float = 0.3
  limit_rounds: int = 30
  train: int = 1000
  noise_rate: float = 0.4
  hidden: tuple[int, ...] = (128, 128)
  learning_rate: float = 1e-3
  batch_size: int = 64
  epochs: int = 60
  rounds: int = 2

  def __post_init__(self):
    if not 1 <= self.kernel_train <= 1500 or not self.batch_size <= self.train <= 1500:
      raise ValueError(
        f"kernel_train must lie in [1, 1500] and train in [batch_size, 1500], got {self.kernel_train}, {self.train}."
      )
    if self.rounds < 2:
      raise ValueError(f"rounds must be at least 2, got {self.rounds}.")

  @property
  def round_steps(self) -> int:
    return self.epochs * (self.train // self.batch_size)


PRESETS = {
  "smoke": Config(kernel_train=100, train=256, hidden=(32,), epochs=4),
  "cpu": Config(),
}


def task(config: Config) -> Task:
  """All rounds as one run: a network, then a new one of the same kind with the one before as its teacher.

  At the end of a round the student becomes the teacher, and student and optimizer start anew.
  """
  train, valid, test = _network_data(config)
  model = MLP((*config.hidden, 10))
  logits = lambda params, inputs: model.apply({"params": params}, inputs)
  fresh = lambda key: model.init(key, jnp.zeros((1, *train["x"].shape[1:])))["params"]

  def init_params(key, hparams):
    params, noise = jax.random.split(key)
    labels = symmetric_noise(noise, train["y"], rate=hparams["noise_rate"], num_classes=10)
    params = fresh(params)
    return params, {"labels": labels, "first": params, "teacher": params}

  def objective(params, extra, batch, context):
    labels = extra["labels"][batch["id"]]
    weight = jnp.where(context.step < config.round_steps, 1.0, context.hparams["target_weight"])
    student, teacher = logits(params, batch["x"]), logits(extra["teacher"], batch["x"])
    loss = self_distillation_squared_loss(student, teacher, labels, target_weight=weight)
    return jnp.mean(loss), (extra, {})

  def evaluate(params, extra, hparams):
    del hparams
    probabilities = lambda params, part: jax.nn.softmax(logits(params, part["x"]))
    estimate = distill.optimal_target_weight(
      probabilities(extra["first"], valid), probabilities(params, valid), jax.nn.one_hot(valid["y"], 10),
      low=-jnp.inf, high=jnp.inf,
    )  # fmt: skip
    return {
      "valid_error": _error(probabilities(params, valid), valid["y"]),
      "first_valid_error": _error(probabilities(extra["first"], valid), valid["y"]),
      "test_error": _error(probabilities(params, test), test["y"]),
      "test_accuracy": jnp.mean(probabilities(params, test).argmax(-1) == test["y"]),
      "estimated_weight": estimate,  # of value when this round was trained with weight 0
    }

  optimizer = lambda hparams: optax.adam(hparams["learning_rate"])
  within = gradient_task(
    init_params,
    objective,
    optimizer,
    data=train,
    batch_size=config.batch_size,
    hparams={"target_weight": 0.25, "noise_rate": config.noise_rate, "learning_rate": config.learning_rate},
    evaluate=evaluate,
    predict=lambda params, extra, inputs: jax.nn.softmax(logits(params, inputs)),
    config=config,
  )

  def next_round(state, hparams):
    index = state.step // config.round_steps
    first = jax.tree.map(lambda a, b: jnp.where(index == 1, a, b), state.params, state.extra["first"])
    params = fresh(jax.random.fold_in(jax.random.fold_in(state.key, 2), index))
    extra = {**state.extra, "first": first, "teacher": state.params}
    return state._replace(params=params, extra=extra, opt_state=optimizer(hparams).init(params))

  def step(state, batch, hparams):
    ends = (state.step > 0) & (state.step % config.round_steps == 0)
    state = jax.lax.cond(ends, lambda state: next_round(state, hparams), lambda state: state, state)
    return within.step(state, batch, hparams)

  return dataclasses.replace(within, step=step, make_step=None)


def _error(predictions, labels):
  return jnp.mean((predictions - jax.nn.one_hot(labels, 10)) ** 2)


@functools.lru_cache(maxsize=2)
def _network_data(config: Config):
  return bundled.split(bundled.digits(), sizes=(config.train, VALIDATION, 1797 - config.train - VALIDATION))


def cell(config: Config) -> Cell:
  """All rounds; the weight of the ground truth varies."""
  return Cell(
    task(config),
    steps=config.rounds * config.round_steps,
    points={"target_weight": [*GRID, 1.0]},
    eval_every=config.round_steps,
    log_every=max(config.round_steps // 4, 1),
  )


def cells(config: Config, seeds) -> dict[str, Cell]:
  """A grid of weights, and the weights that the students without ground truth estimate."""
  del seeds
  # In turn: side by side, every step would also compute the next round's initial parameters.
  base = cell(config)._replace(eval_every=None, engine="map")
  # Every seed's estimate with every seed, of which each seed's own is kept: points do not vary over seeds.
  estimated = lambda trials: {"target_weight": list(np.clip(_estimates(trials), 0, 1))}
  return {"grid": base._replace(points={"target_weight": list(GRID)}), "estimated": base._replace(points=estimated)}


def _estimates(trials) -> np.ndarray:
  return trials["grid"].last("estimated_weight")[GRID.index(0.0)]


def measure(config: Config, seeds, trained) -> dict[str, np.ndarray]:
  """Errors and accuracies of all rounds of kernel regression, `[seeds, rounds]`."""
  del trained
  with jax.enable_x64(True):  # the rounds come within 1e-9 of their limit
    by_seed = [_kernel_rounds(config, seed) for seed in seeds]
  return {name: np.stack([one[name] for one in by_seed]) for name in by_seed[0]}


def _kernel_rounds(config: Config, seed: int) -> dict[str, np.ndarray]:
  train, valid, test = bundled.split(
    bundled.digits(), sizes=(config.kernel_train, VALIDATION, 1797 - config.kernel_train - VALIDATION), seed=seed
  )
  noisy = symmetric_noise(jax.random.key(seed), jnp.asarray(train["y"]), rate=config.kernel_noise, num_classes=10)
  flat = [jnp.asarray(part["x"].reshape(-1, 64), float) for part in (train, valid, test)]
  grams = [rbf_kernel(inputs, flat[0], gamma=config.gamma) for inputs in flat]
  truths = [class_targets(jnp.asarray(part["y"]), num_classes=10, dtype=float) for part in (valid, test)]
  targets = class_targets(noisy, num_classes=10, dtype=float)
  measured = {}
  for name, ridge in RIDGES.items():
    errors, accuracies, weights = _all_weights(grams, targets, truths, ridge)
    for weight, error, accuracy in zip((*WEIGHTS, "best"), errors, accuracies):
      measured[f"{name} error, {weight}"] = np.asarray(error)
      measured[f"{name} accuracy, {weight}"] = np.asarray(accuracy)
    measured[f"{name} best weights"] = np.asarray(weights)
  measured["distance to limit"] = np.asarray(_distance_to_limit(grams[0], targets, config.limit_rounds))
  return measured


def _all_weights(grams, targets, truths, ridge):
  """Test errors and accuracies `[weights, rounds]`, and the best weights of the rounds after the first."""
  best, weights = _best_rounds(grams, targets, truths[0], ridge)
  coefficients = jnp.concatenate([_fixed_rounds(grams[0], targets, ridge), best[None]])
  return *_test_scores(grams[2], coefficients, truths[1]), weights


@jax.jit
def _fixed_rounds(gram, targets, ridge):
  rounds = lambda weight: distill.self_distilled_regression(
    gram, targets, ridge=ridge, target_weight=weight, rounds=ROUNDS
  )
  return jax.vmap(rounds)(jnp.asarray(WEIGHTS)).coefficients


@jax.jit
def _test_scores(cross, coefficients, truth):
  predictions = cross @ coefficients
  errors = jnp.mean((predictions - truth) ** 2, axis=(-2, -1))
  return errors, jnp.mean(predictions.argmax(-1) == truth.argmax(-1), axis=-1)


@jax.jit
def _refit(gram, targets, fitted, ridge, weight):
  return kernel_regression(gram, weight * targets + (1 - weight) * fitted, ridge=ridge)


@jax.jit
def _best_weight(cross, first, distilled, truth):
  return distill.optimal_target_weight(cross @ first, cross @ distilled, truth)


def _best_rounds(grams, targets, truth, ridge):
  """Coefficients of all rounds at the weights that are best on validation data, and these weights."""
  gram, cross, _ = grams
  weights = []

  def train(index, teacher, weight):
    return _refit(gram, targets, targets if teacher is None else gram @ teacher, ridge, weight)

  def best_weight(models):
    weights.append(_best_weight(cross, models[0], train(0, models[-1], 0.0), truth))
    return weights[-1]

  models = distill.iterated_distillation(train, rounds=ROUNDS, target_weight=best_weight)
  return jnp.stack(models), jnp.stack(weights)


@functools.partial(jax.jit, static_argnums=2)
def _distance_to_limit(gram, targets, rounds):
  """Relative distance of the last round from ridge regression with the effective ridge."""
  fitted = distill.self_distilled_regression(gram, targets, rounds=rounds, **LIMIT).fitted[-1]
  limit = gram @ kernel_regression(gram, targets, ridge=distill.effective_ridge(*LIMIT.values()))
  return jnp.linalg.norm(fitted - limit) / jnp.linalg.norm(limit)


def summary(config: Config, trials) -> dict[str, np.ndarray]:
  """What was measured of kernel regression, and errors of networks, `[seeds]`."""
  del config
  grid, estimated = trials["grid"], trials["estimated"]
  summed = {**trials.measured, "network estimate": _estimates(trials)}
  summed["network first"] = grid.last("first_valid_error")[0]
  for name in ("valid_error", "test_error"):
    summed |= {f"network {name}, {weight}": values for weight, values in zip(GRID, grid.last(name))}
    summed[f"network {name}, estimated"] = np.diagonal(estimated.last(name))
  return summed


def _smallest_gap(summary):
  last = [summary[f"strong error, {weight}"][:, -1] for weight in (*WEIGHTS, "best")]
  return np.min([a - b for a, b in zip(last, last[1:])], axis=0)


def _gain(weight):
  return lambda s: s[f"weak accuracy, {weight}"][:, -1] - s[f"weak accuracy, {weight}"][:, 0]


def claims(config: Config) -> tuple[Claim, ...]:
  """On the harm, the gain and the limit of kernel regression, and on the estimated weight for networks."""
  digits = f"{config.kernel_train} digits with {100 * config.kernel_noise:g} % label noise"
  network = "-".join(map(str, (64, *config.hidden, 10)))
  strong, weak = RIDGES.values()
  weights = ", ".join(map("{:g}".format, WEIGHTS))
  gain = f"test accuracy at round {ROUNDS} minus that at round 1, weight {{:g}}, ridge {weak:g}, {digits}"
  return (
    Claim(
      "dampened",
      "The more ground truth, the less harm self-distillation does to an over-regularized kernel regression",
      f"smallest difference of the test MSE at round {ROUNDS} between neighbours among weights {weights} and the best"
      f" one, ridge {strong:g}, {digits}",
      _smallest_gap,
      at_least=0.0,
    ),
    Claim(
      "amplified",
      "Self-distillation without ground truth raises the error of an over-regularized kernel regression by a third",
      f"test MSE at round {ROUNDS} over that at round 1, weight 0, ridge {strong:g}, {digits}",
      lambda s: s["strong error, 0.0"][:, -1] / s["strong error, 0.0"][:, 0],
      at_least=1.3,
    ),
    Claim(
      "gain without ground truth",
      "An under-regularized kernel regression gains accuracy from self-distillation without ground truth",
      gain.format(0.0),
      _gain(0.0),
      at_least=0.05,
    ),
    Claim(
      "gain with ground truth",
      "An under-regularized kernel regression also gains accuracy from self-distillation with ground truth",
      gain.format(0.25),
      _gain(0.25),
      at_least=0.03,
    ),
    Claim(
      "limit",
      "Self-distilled kernel regression converges to ridge regression with the ridge divided by the weight",
      f"relative distance of the fit after {config.limit_rounds} rounds to that limit, weight"
      f" {LIMIT['target_weight']:g}, ridge {LIMIT['ridge']:g}, {digits}",
      lambda s: s["distance to limit"],
      at_most=1e-6,
    ),
    Claim(
      "estimate for networks",
      "One student trained without ground truth gives a weight for networks as good as a grid search finds",
      f"validation MSE of the student at the estimated weight over the best of weights {', '.join(map(str, GRID))}, MLP"
      f" {network} on {config.train} digits with {100 * config.noise_rate:g} % label noise, {VALIDATION} clean ones for"
      " validation",
      lambda s: s["network valid_error, estimated"] / np.min([s[f"network valid_error, {w}"] for w in GRID], axis=0),
      at_most=1.01,
    ),
  )


NOTES = (
  "Reported, not gated: the round of the least test MSE at ridge 0.1 (the card expects 4 or 5 at weight 0, the last one"
  " at weights 0.25 and 0.5), in the figure; the estimated weights of networks, which are noisy and often negative.",
)
DEVIATIONS = (
  "The card leaves open how many digits the network is trained on (here 1,000), the batch size (64) and the learning"
  " rate (1e-3, the official default); they were fixed before the run.",
)


def figure(config: Config, summary, path) -> None:
  """Errors over the rounds of kernel regression for both ridges, and of networks over the weights."""
  del config
  picture, axes = plots.panels(4)
  rounds = np.arange(1, ROUNDS + 1)
  panels = (("strong error", "test MSE"), ("weak error", "test MSE"), ("weak accuracy", "test accuracy"))
  for axis, (name, label) in zip(axes, panels):
    plots.curves(axis, rounds, {f"weight {weight}": summary[f"{name}, {weight}"] for weight in (*WEIGHTS, "best")})
    ridge = RIDGES[name.split()[0]]
    axis.set(xlabel="round", ylabel=label, title=f"kernel regression, ridge {ridge:g}", xticks=rounds)
  axes[0].legend(frameon=False)
  bars = {"no\nteacher": summary["network first"]}
  bars |= {f"{weight}": summary[f"network valid_error, {weight}"] for weight in (*GRID, "estimated")}
  plots.bars(axes[3], bars)
  axes[3].set(xlabel="weight", ylabel="validation MSE", title="networks, round 2")
  plots.save(picture, path)
