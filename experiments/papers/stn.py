"""Self-tuning networks: hyperparameters tuned within one run through the network's best response.

On ridge regression, where the best response is known, and on MNIST against a grid of dropout rates.

The card's larger settings, not run here: CIFAR-10 with an AlexNet-like network of `BestResponseConv` layers and 15
hyperparameters (batch 128, SGD 0.01, warm-up 5 epochs), and Penn Treebank with two `BestResponseLSTMCell` layers of 650
units and 7 hyperparameters (batch 40, 70 steps, SGD 30 with clipping at 0.25).
"""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.harness import plots
from experiments.harness.claims import Claim
from experiments.harness.trials import Cell
from jaxreg.data import bundled
from jaxreg.layers import best_response, per_example_noise
from jaxreg.solvers import self_tuning
from jaxreg.solvers.self_tuning import Hyperparameter
from jaxreg.training import Task, TrainState, gradient_task, grid

CARD = "05-stn"
STARTS = (0.05, 0.5)
RIDGE_STARTS = (-5.0, 2.0)
DROPOUTS = ("input_dropout", "hidden_dropout")
SPACE = (
  Hyperparameter("input_dropout", init=0.05, low=0.0, high=0.9),
  Hyperparameter("hidden_dropout", init=0.05, low=0.0, high=0.9),
  Hyperparameter("brightness", init=0.05, low=0.0, high=1.0),
  # Discrete ones start in the middle of their step.
  Hyperparameter("cutout_length", init=2.5, low=0.0, high=8.0, discrete=True),
  Hyperparameter("cutout_holes", init=1.5, low=0.0, high=4.0, discrete=True),
)
IS_DROPOUT = np.array([spec.name in DROPOUTS for spec in SPACE])
RIDGE = (Hyperparameter("log_ridge", init=0.0),)
RIDGE_SIZE = 30  # features
TEST = 2000


@dataclasses.dataclass(frozen=True)
class Config:
  """Digits of MNIST at 14 × 14 pixels, and ridge regression whose best response is known.

  Attributes:
    train: training examples.
    valid: validation examples.
    hidden: widths of the hidden layers.
    batch_size: examples of a training step.
    valid_batch_size: examples of a validation step.
    cycles: of two training steps and one validation step.
    warmup: first cycles, which leave the hyperparameters alone.
    grid_rates: rates of input and of hidden dropout that the grid combines.
    random_points: settings of all hyperparameters that random search draws.
    ridge_cycles: cycles of ridge regression.
  """

  train: int = 1000
  valid: int = 2000
  hidden: tuple[int, ...] = (256, 256)
  batch_size: int = 50
  valid_batch_size: int = 100
  cycles: int = 800
  warmup: int = 50
  grid_rates: tuple[float, ...] = (0.0, 0.2, 0.4, 0.6, 0.8)
  random_points: int = 12
  ridge_cycles: int = 6000

  def __post_init__(self):
    if not 2 * self.batch_size <= self.train <= 5000 - TEST - self.valid:
      raise ValueError(f"train must lie in [2 batch_size, {5000 - TEST - self.valid}], got {self.train}.")


PRESETS = {
  "smoke": Config(
    train=100, valid=100, hidden=(16,), valid_batch_size=50, cycles=8, warmup=2, grid_rates=(0.0, 0.4),
    random_points=2, ridge_cycles=40,
  ),
  "cpu": Config(),
}  # fmt: skip


class Network(nn.Module):
  """Dense best-response layers with rectifiers; `noise(layer, values)` is applied to the inputs of every layer."""

  hidden: tuple[int, ...]

  @nn.compact
  def __call__(self, images, seen=None, noise=lambda layer, values: values):
    values = images.reshape(len(images), -1)
    for layer, width in enumerate((*self.hidden, 10)):
      values = best_response.BestResponseDense(width)(noise(layer, values), seen)
      values = nn.relu(values) if layer < len(self.hidden) else values
    return values


def task(config: Config) -> Task:
  """One self-tuning run; a step is a cycle. With the hyperparameter `augment` 0 there are two dropout rates to tune.

  Without augmentation the network sees nothing of its parameters, which then stay where they are.
  """
  train, valid, test = _digits(config.train, config.valid)
  model = Network(config.hidden)

  def seen_of(position, augment):
    seen = self_tuning.response_inputs(SPACE, position)
    return jnp.where(IS_DROPOUT, seen, augment * seen)

  def init(key, hparams):
    tuning, start = self_tuning.tuning_init(SPACE), jnp.asarray(hparams["dropout_start"], jnp.float32)
    starts = [self_tuning.unconstrain_hyperparameter(start, low=spec.low, high=spec.high) for spec in SPACE]
    tuning = tuning._replace(position=jnp.where(IS_DROPOUT, jnp.stack(starts), tuning.position))
    params = model.init(jax.random.fold_in(key, 0), train["x"][:1], tuning.position)["params"]
    extra = {"augment": jnp.asarray(hparams["augment"], jnp.float32), **_start(tuning)}
    return TrainState.create(key, params, extra, optimizer(hparams).init(params))

  def optimizer(hparams):
    return optax.sgd(hparams["learning_rate"], momentum=0.9)

  def train_loss(augment, params, seen, hyperparameters, batch, key):
    values = {name: value * (1 if name in DROPOUTS else augment) for name, value in hyperparameters.items()}
    logits = _noisy_logits(model, params, seen_of(seen, augment), values, batch["x"], key)
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"])

  def valid_loss(augment, params, seen, batch):
    logits = model.apply({"params": params}, batch["x"], seen_of(seen, augment))
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"])

  def step(state, batch, hparams):
    chosen = jax.random.randint(jax.random.fold_in(state.step_key(), 1), (config.valid_batch_size,), 0, config.valid)
    validation = jax.tree.map(lambda leaf: jnp.asarray(leaf)[chosen][None], valid)
    halves = jax.tree.map(lambda leaf: leaf.reshape(2, -1, *leaf.shape[1:]), batch)
    hparams = {**hparams, "tuning_rate": hparams["tuning_rate"] * (state.step >= config.warmup)}
    losses = [functools.partial(loss, state.extra["augment"]) for loss in (train_loss, valid_loss)]
    return _cycle(state, hparams, SPACE, losses, optimizer(hparams), halves, validation)

  def predict(state, inputs):
    seen = seen_of(state.extra["tuning"].position, state.extra["augment"])
    return model.apply({"params": state.params}, inputs, seen)

  def evaluate(state, hparams):
    del hparams
    tuning = state.extra["tuning"]
    values = self_tuning.constrain_hyperparameters(SPACE, tuning.position)
    scales = {f"scale of {spec.name}": jax.nn.softplus(tuning.raw_scale[i]) for i, spec in enumerate(SPACE)}
    return {**_scores(lambda part: predict(state, part["x"]), valid, test), **values, **scales}

  return Task(
    init,
    step,
    data=train,
    batch_size=2 * config.batch_size,
    hparams={"learning_rate": 0.01, "tuning_rate": 0.01, "entropy_weight": 1e-3, "dropout_start": 0.05, "augment": 1.0},
    evaluate=evaluate,
    predict=predict,
    config=config,
  )


def fixed_task(config: Config) -> Task:
  """Training with fixed hyperparameters, for as many steps as a self-tuning run takes on the training loss."""
  train, valid, test = _digits(config.train, config.valid)
  model = Network(config.hidden)

  def objective(params, extra, batch, context):
    logits = _noisy_logits(model, params, None, context.hparams, batch["x"], context.key)
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"]).mean(), (extra, {})

  def predict(params, extra, inputs):
    del extra
    return model.apply({"params": params}, inputs)

  return gradient_task(
    lambda key, hparams: (model.init(key, train["x"][:1])["params"], {}),
    objective,
    lambda hparams: optax.sgd(hparams["learning_rate"], momentum=0.9),
    data=train,
    batch_size=config.batch_size,
    hparams={"learning_rate": 0.01, **{spec.name: spec.init for spec in SPACE}},
    evaluate=lambda params, extra, hparams: _scores(lambda part: predict(params, extra, part["x"]), valid, test),
    predict=predict,
    config=config,
  )


def ridge_task(config: Config) -> Task:
  """The penalty of ridge regression tuned by a structured linear network, on data drawn with the run's key."""
  layer = best_response.BestResponseDense(1, use_bias=False)

  def optimizer(hparams):
    return optax.adam(hparams["learning_rate"])

  def init(key, hparams):
    truth_key, train_key, valid_key, layer_key = jax.random.split(jax.random.fold_in(key, 0), 4)
    truth = jax.random.normal(truth_key, (RIDGE_SIZE,)) / jnp.sqrt(float(RIDGE_SIZE))
    data = {"train": _regression(train_key, truth, 40), "valid": _regression(valid_key, truth, 400)}
    # Here and not when evaluating: initial states are made one by one, and a batch of decompositions on several virtual
    # devices can wait for threads for ever.
    data["spectrum"] = _spectrum(data["train"])
    start = jnp.asarray(hparams["start"], jnp.float32)[None]
    extra = {"data": data, **_start(self_tuning.tuning_init(RIDGE)._replace(position=start))}
    params = layer.init(layer_key, data["train"]["x"], start)["params"]
    return TrainState.create(key, params, extra, optimizer(hparams).init(params))

  def error(params, seen, batch):
    return jnp.square(layer.apply({"params": params}, batch["x"], seen)[:, 0] - batch["y"])

  def train_loss(params, seen, hyperparameters, batch, key):
    del key
    weights = jax.vmap(lambda one: best_response.materialize_best_response(params, one)["kernel"])(seen)
    return error(params, seen, batch) + jnp.exp(hyperparameters["log_ridge"]) * jnp.sum(weights**2, (1, 2))

  def step(state, batch, hparams):
    del batch
    train, valid = (jax.tree.map(lambda leaf: leaf[None], state.extra["data"][name]) for name in ("train", "valid"))
    twice = jax.tree.map(lambda leaf: jnp.concatenate([leaf, leaf]), train)
    return _cycle(state, hparams, RIDGE, (train_loss, error), optimizer(hparams), twice, valid)

  def predict(state, inputs):
    return layer.apply({"params": state.params}, inputs, state.extra["tuning"].position)[:, 0]

  def evaluate(state, hparams):
    del hparams
    tuning, data = state.extra["tuning"], state.extra["data"]
    (position,) = tuning.position
    losses = jax.vmap(lambda at: _ridge_valid_loss(data, at))
    candidates = jnp.linspace(-8.0, 4.0, 481)
    on_grid, own = losses(candidates), losses(position[None])[0]
    exact = _ridge_weights(data["spectrum"], position)
    fitted = best_response.materialize_best_response(state.params, tuning.position)["kernel"][:, 0]
    return {
      "position": position,
      "scale": jax.nn.softplus(tuning.raw_scale[0]),
      "best": candidates[jnp.argmin(on_grid)],
      "loss_ratio": own / jnp.min(on_grid),
      "response_error": jnp.linalg.norm(fitted - exact) / jnp.linalg.norm(exact),
    }

  return Task(
    init,
    step,
    data={"x": np.zeros((1, RIDGE_SIZE), np.float32)},  # the runs draw their own
    batch_size=None,
    hparams={"learning_rate": 0.02, "tuning_rate": 0.01, "entropy_weight": 1e-3, "start": 2.0},
    evaluate=evaluate,
    predict=predict,
    config=config,
  )


def _start(tuning):
  """What a run changes besides the network."""
  return {"tuning": tuning, "tuning_opt_states": tuple(optax.adam(1.0).init(leaf) for leaf in tuning)}


def _cycle(state, hparams, space, losses, optimizer, train_batches, valid_batches):
  """A cycle of the self-tuner whose network is in `params` and whose hyperparameters are in `extra`."""
  adam = optax.adam(hparams["tuning_rate"])
  options = {"position_optimizer": adam, "scale_optimizer": adam, "entropy_weight": hparams["entropy_weight"]}
  tuner = self_tuning.self_tuner(space, *losses, optimizer=optimizer, **options)
  tuned = self_tuning.SelfTuningState(
    state.params, state.extra["tuning"], state.opt_state, *state.extra["tuning_opt_states"]
  )
  tuned, (loss, valid_loss) = tuner.cycle(tuned, train_batches, valid_batches, state.step_key())
  opt_states = tuned.position_opt_state, tuned.scale_opt_state
  extra = {**state.extra, "tuning": tuned.tuning, "tuning_opt_states": opt_states}
  state = state.advance(params=tuned.params, opt_state=tuned.opt_state, extra=extra)
  return state, {"loss": loss, "valid_batch_loss": valid_loss}


def _noisy_logits(model, params, seen, hyperparameters, images, key):
  """Logits of augmented images with dropout."""
  keys = jax.random.split(key, 3)
  images = per_example_noise.per_example_color_jitter(keys[0], images, brightness=hyperparameters["brightness"])
  squares = {"length": hyperparameters["cutout_length"], "holes": hyperparameters["cutout_holes"]}
  images = per_example_noise.per_example_cutout(keys[1], images, max_holes=3, **squares)

  def noise(layer, values):
    rate = hyperparameters[DROPOUTS[min(layer, 1)]]
    return per_example_noise.per_example_dropout(jax.random.fold_in(keys[2], layer), values, rate=rate)

  return model.apply({"params": params}, images, seen, noise)


def _scores(logits, valid, test):
  def losses(part):
    return optax.softmax_cross_entropy_with_integer_labels(logits(part), part["y"]).mean()

  accuracy = jnp.mean(logits(test).argmax(-1) == test["y"])
  return {"valid_loss": losses(valid), "test_loss": losses(test), "test_accuracy": accuracy}


@functools.cache
def _digits(train, valid):
  """Pixels averaged in squares of 2 × 2: with 28 × 28 the grid of fixed rates would take four times as long."""
  data = bundled.mnist_subset()
  images = data["x"].reshape(-1, 14, 2, 14, 2, 1).mean((2, 4))
  return bundled.split({"x": images, "y": data["y"]}, sizes=(train, valid, TEST))


def _regression(key, truth, examples):
  inputs_key, noise_key = jax.random.split(key)
  inputs = jax.random.normal(inputs_key, (examples, len(truth)))
  return {"x": inputs, "y": inputs @ truth + 0.7 * jax.random.normal(noise_key, (examples,))}


def _spectrum(part):
  inputs, targets = part["x"], part["y"]
  values, vectors = jnp.linalg.eigh(inputs.T @ inputs / len(targets))
  return values, vectors, vectors.T @ (inputs.T @ targets) / len(targets)


def _ridge_weights(spectrum, log_ridge):
  """The minimum of `mean (y - x w)^2 + exp(log_ridge) |w|^2`."""
  values, vectors, targets = spectrum
  return vectors @ (targets / (values + jnp.exp(log_ridge)))


def _ridge_valid_loss(data, log_ridge):
  return jnp.mean(jnp.square(data["valid"]["x"] @ _ridge_weights(data["spectrum"], log_ridge) - data["valid"]["y"]))


def cell(config: Config) -> Cell:
  """One self-tuning run, in cycles; starts of the dropout rates × speeds of tuning vary."""
  every = max(1, config.cycles // 20)
  at = grid(dropout_start=STARTS, tuning_rate=[0.003, 0.01])
  return Cell(task(config), config.cycles, at, eval_every=every)


def cells(config: Config, seeds) -> dict[str, Cell]:
  """Self-tuning from two starts and with augmentation, the grid and random search, and ridge regression."""
  del seeds
  runs = {"dropout_start": np.array([*STARTS, STARTS[0]]), "augment": np.array([0.0, 0.0, 1.0])}
  ridge, every = {"start": np.array(RIDGE_STARTS)}, max(1, config.ridge_cycles // 20)
  return {
    "self-tuning": cell(config)._replace(points=runs),
    "fixed": Cell(fixed_task(config), 2 * config.cycles, _fixed_points(config)),
    "ridge": Cell(ridge_task(config), config.ridge_cycles, ridge, eval_every=every),
  }


def _fixed_points(config):
  """The grid of dropout rates without augmentation, and uniform draws of all hyperparameters."""
  rates, rng = grid(input_dropout=config.grid_rates, hidden_dropout=config.grid_rates), np.random.default_rng(0)
  values = {}
  for spec in SPACE:
    drawn = rng.uniform(spec.low, spec.high, config.random_points)
    chosen = rates.get(spec.name, np.zeros(len(config.grid_rates) ** 2))
    values[spec.name] = np.concatenate([chosen, np.floor(drawn) if spec.discrete else drawn])
  return values


def summary(config: Config, trials) -> dict[str, np.ndarray]:
  """Of the self-tuning runs and of ridge regression along the run, of fixed hyperparameters `[seeds, points]`."""
  tuned, fixed, ridge = trials["self-tuning"], trials["fixed"], trials["ridge"]
  summed = {}
  for name in (*(spec.name for spec in SPACE), "valid_loss", "test_accuracy"):
    for run, values in zip((*(f"start {start:g}" for start in STARTS), "all"), tuned.metrics[name]):
      summed[f"{run} {name}"] = values
  for name in ("valid_loss", "test_accuracy"):
    parts = np.split(fixed.last(name).T, [len(config.grid_rates) ** 2], axis=1)
    summed[f"grid {name}"], summed[f"random {name}"] = parts
  summed |= {f"ridge from {start:g}": values for start, values in zip(RIDGE_STARTS, ridge.metrics["position"])}
  summed["ridge best"] = ridge.last("best")[0]
  for name in ("loss_ratio", "response_error"):
    summed[f"ridge {name}"], summed[f"ridge first {name}"] = (ridge.metrics[name][:, :, i].max(0) for i in (-1, 0))
  return summed


def _ridge_distance(s):
  return np.max([np.abs(s[f"ridge from {start:g}"][:, -1] - s["ridge best"]) for start in RIDGE_STARTS], axis=0)


def _start_distance(s):
  return np.max(
    [np.abs(np.subtract(*(s[f"start {at:g} {name}"][:, -1] for at in STARTS))) for name in DROPOUTS], axis=0
  )


def claims(config: Config) -> tuple[Claim, ...]:
  """On ridge regression, whose answer is known, and on two dropout rates for MNIST."""
  ridge = (
    f"ridge regression of {RIDGE_SIZE} features, the worse of the starts {RIDGE_STARTS[0]:g} and {RIDGE_STARTS[1]:g}"
  )
  count, low, high = len(config.grid_rates), *STARTS
  mnist = f"{config.train:,} MNIST images, {config.cycles} cycles of two training steps and one validation step"
  return (
    Claim(
      "ridge_optimum",
      "Self-tuning finds the penalty of ridge regression that validates best, from below and from above",
      f"distance of the final log penalty to the best one on a grid; {ridge}",
      _ridge_distance,
      at_most=0.35,
    ),
    Claim(
      "ridge_loss",
      "Ridge regression with the penalty that self-tuning found validates like ridge regression with the best penalty",
      f"validation loss of exact ridge regression at the penalty found, relative to the grid's best; {ridge}",
      lambda s: s["ridge loss_ratio"],
      at_most=1.01,
    ),
    Claim(
      "ridge_response",
      "The weights of a self-tuning linear network at the penalty that it found are the best response",
      f"relative distance of the network's weights to exact ridge regression's; {ridge}",
      lambda s: s["ridge response_error"],
      at_most=0.1,
    ),
    Claim(
      "grid",
      "One self-tuning run is as good as the best of a grid of fixed dropout rates",
      f"final validation loss, start {low:g}, relative to the best of {count} × {count} fixed rates trained for as many"
      f" training steps; {mnist}",
      lambda s: s[f"start {low:g} valid_loss"][:, -1] / s["grid valid_loss"].min(1),
      at_most=1.03,
    ),
    Claim(
      "starts",
      "Self-tuned dropout rates end alike wherever they start",
      f"distance of the final rates from starts {low:g} and {high:g}, the larger of the two rates' distances; {mnist}",
      _start_distance,
      at_most=0.1,
    ),
  )


NOTES = (
  "Reported, not gated: all five hyperparameters (two dropout rates, brightness, and the discrete length and number of"
  " cutout's holes) tuned in one run, against random search over the same five. A self-tuning run costs about as much"
  " as three runs with fixed hyperparameters: two branches in every layer, and the validation steps.",
)
DEVIATIONS = (
  "MNIST at 14 × 14 pixels, batches of 50 and 800 cycles: the card leaves them open, and the grid takes 125 runs.",
)


def figure(config: Config, summary, path) -> None:
  """Schedules, validation losses against the baselines, and ridge regression's penalty."""
  del config
  picture, (left, right, search, ridge) = plots.panels(4)
  values = {
    f"{name.replace('_', ' ')} from {at:g}": summary[f"start {at:g} {name}"] for name in DROPOUTS for at in STARTS
  }
  _along_the_run(left, values)
  left.set(ylabel="rate", title="two dropout rates tuned")
  _along_the_run(
    right, {f"{at.name.replace('_', ' ')} / {at.high:g}": summary[f"all {at.name}"] / at.high for at in SPACE}
  )
  right.set(ylabel="fraction of the range", title="five tuned in one run")
  _draw_search(search, summary)
  _along_the_run(
    ridge, {f"from {at:g}": summary[f"ridge from {at:g}"] - summary["ridge best"][:, None] for at in RIDGE_STARTS}
  )
  ridge.set(ylabel="log penalty minus the best", title="ridge regression")
  plots.save(picture, path)


def _along_the_run(axis, values):
  count = next(iter(values.values())).shape[-1]
  plots.curves(axis, np.arange(1, count + 1) / count, values)
  axis.set(xlabel="fraction of the run")
  axis.legend(frameon=False, fontsize=8)


def _draw_search(axis, s):
  """Best loss so far, the mean of 500 orders of the runs; a self-tuning run costs as much as three."""
  rng = np.random.default_rng(0)
  for name, label in (("grid", "grid, 2 rates"), ("random", "random search, all 5")):
    losses = s[f"{name} valid_loss"]
    orders = np.stack([losses[:, rng.permutation(losses.shape[1])] for _ in range(500)])
    best = np.minimum.accumulate(orders, axis=-1).mean(0)
    plots.curves(axis, np.arange(1, losses.shape[1] + 1), {f"{label}: best so far": best})
  for name, label in ((f"start {STARTS[0]:g}", "2 rates"), ("all", "all 5")):
    losses = s[f"{name} valid_loss"][:, -1]
    plots.scatter(axis, {f"self-tuned, {label}": (np.full(len(losses), 3.0), losses)})
  axis.set(xlabel="runs' worth of computation", ylabel="validation loss", xscale="log", title="search at equal budget")
  axis.legend(frameon=False, fontsize=8)
