"""EQ-Net: one set of weights for all bit widths, regularized towards uniform laws, and mixed-precision search."""

import dataclasses
import functools
import pathlib
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from scipy import stats

from experiments.harness.claims import Claim
from jaxreg.data import bundled
from jaxreg.losses.progressive_guidance import progressive_guidance_loss
from jaxreg.metrics.weights import weight_moments
from jaxreg.models import MLP
from jaxreg.quantization import elastic, elastic_config, elastic_quantizer, search
from jaxreg.regularizers.weight_distribution import weight_distribution_penalty
from jaxreg.training import Task, grid, sweep

CARD = "11-eq_net"
BITS = (2, 4, 8)
# What is compared after training without quantization: weights of the penalties of kurtosis and skewness.
REGULARIZED = {"none": (0.0, 0.0), "WDR": (0.015, 1.0), "strong WDR": (0.1, 1.0)}
METHODS = ("regularized", "supernet", "dedicated")


@dataclasses.dataclass(frozen=True)
class Config:
  """A multilayer perceptron on digits.

  Attributes:
    method: `supernet` (all bit widths at once), `dedicated` (one bit width) or `regularized` (no quantization in
      training).
    hidden: widths of the hidden layers.
    regularized_hidden: those of the network that is quantized after training, in `measure`.
    batch_size: examples per step.
    steps: of the quantized networks, with Adam and a cosine schedule.
    pretraining_steps: of the same network in floating point before.
    regularized_steps: of SGD with momentum, in `measure`.
    sampled: configurations of the supernet whose accuracy is measured, three quarters of them to fit the predictor.
    fitting_steps: of the predictor, on all configurations at once.
    predictor: widths of its hidden layers.
    generations: of the genetic search.
    budget: average bits of weights and of inputs that it may use, at most.
  """

  method: str = "supernet"
  hidden: tuple[int, ...] = (64, 64, 64, 64)
  regularized_hidden: tuple[int, ...] = (64, 64, 64)
  batch_size: int = 64
  steps: int = 2000
  pretraining_steps: int = 500
  regularized_steps: int = 1500
  sampled: int = 400
  fitting_steps: int = 500
  predictor: tuple[int, ...] = (200,) * 6
  generations: int = 100
  budget: float = 3.0

  def __post_init__(self):
    if self.method not in METHODS:
      raise ValueError(f"method must be one of {', '.join(METHODS)}, got {self.method!r}.")


PRESETS = {
  "smoke": Config(
    hidden=(16, 16),
    regularized_hidden=(16, 16),
    steps=20,
    pretraining_steps=20,
    regularized_steps=20,
    sampled=40,
    fitting_steps=20,
    predictor=(16,),
    generations=5,
    budget=2.0,  # of a single inner layer
  ),
  "cpu": Config(),
}


class ElasticMLP(nn.Module):
  """Elastic dense layers with ReLUs between them."""

  features: Sequence[int]

  @nn.compact
  def __call__(self, inputs):
    hidden = inputs.reshape(inputs.shape[0], -1)
    for index, width in enumerate(self.features):
      hidden = elastic.ElasticDense(width, name=f"layer{index}", kernel_init=nn.initializers.he_normal())(hidden)
      hidden = nn.relu(hidden) if index < len(self.features) - 1 else hidden
    return hidden


@functools.cache
def _data():
  """800 training examples, 497 on which configurations are measured, 500 for the test."""
  return bundled.split(bundled.digits(), sizes=(800, 497, 500))


def build(config: Config) -> Task:
  """Hyperparameters are the learning rate and those of the method.

  `guidance` of the supernet; `bits` of dedicated networks, which ignore the others; `kurtosis_weight` and
  `skewness_weight` of regularized ones and of the supernet.
  """
  return {"regularized": _regularized, "supernet": _supernet, "dedicated": _dedicated}[config.method](config)


def _cross_entropy(logits, labels):
  return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def _accuracy(logits, labels):
  return jnp.mean(logits.argmax(-1) == labels)


# Networks that are quantized only after training.


def _regularized(config: Config) -> Task:
  train, _, test = _data()
  model = MLP((*config.regularized_hidden, 10), kernel_init=nn.initializers.he_normal())

  def predict(params, extra, inputs):
    del extra
    return model.apply({"params": params}, inputs)

  def objective(params, extra, batch, key, hparams, axis_name):
    del key, axis_name
    weights = {name: hparams[name] for name in ("kurtosis_weight", "skewness_weight")}
    penalty = weight_distribution_penalty(_later_kernels(params), **weights)
    return _cross_entropy(predict(params, extra, batch["x"]), batch["y"]) + penalty, (extra, {})

  def evaluate(params, extra, hparams):
    del hparams
    moments = [weight_moments(kernel) for kernel in _later_kernels(params)]
    metrics = {
      "kurtosis": jnp.mean(jnp.stack([one.kurtosis for one in moments])),
      "skewness": jnp.max(jnp.abs(jnp.stack([one.skewness for one in moments]))),
      "accuracy_float": _accuracy(predict(params, extra, test["x"]), test["y"]),
    }
    for bits, quantized in _quantized(params).items():
      metrics[f"accuracy_{bits}"] = _accuracy(predict(quantized, extra, test["x"]), test["y"])
    return metrics

  def optimizer(hparams):
    schedule = optax.cosine_decay_schedule(1.0, config.regularized_steps)
    return optax.chain(
      optax.trace(0.9), optax.scale_by_schedule(lambda step: -hparams["learning_rate"] * schedule(step))
    )

  return Task(
    init_params=lambda key, hparams: (model.init(key, jnp.asarray(train["x"][:1]))["params"], {}),
    objective=objective,
    optimizer=optimizer,
    data=train,
    batch_size=config.batch_size,
    hparams={"learning_rate": 0.05, "kurtosis_weight": 0.015, "skewness_weight": 1.0},
    evaluate_params=evaluate,
    predict=predict,
  )


def _layers(params):
  return sorted(params, key=lambda name: int(name.rsplit("_", 1)[1]))


def _later_kernels(params):
  return [params[name]["kernel"] for name in _layers(params)[1:]]


def _quantized(params):
  """Bits -> parameters with symmetric weights, one step for each layer; the first and the last layer keep 8 bits."""
  names, columns = _layers(params), (2, 3, 4, 8)
  scales = {
    name: elastic_quantizer.lsq_calibrate(params[name]["kernel"], bits=columns, symmetric=True).scale[0]
    for name in names
  }

  def quantize(name, bits):
    own = 8 if name in (names[0], names[-1]) else bits
    kernel = elastic_quantizer.lsq_quantize(params[name]["kernel"], scales[name][columns.index(own)], bits=own)
    return {**params[name], "kernel": kernel}

  return {bits: {name: quantize(name, bits) for name in names} for bits in columns[:-1]}


# Networks that are trained quantized.


@functools.cache
def _elastic_model(config: Config):
  model = ElasticMLP((*config.hidden, 10))
  return model, elastic_config.elastic_layers(model, jnp.zeros((1, 8, 8, 1)))


def _apply(config: Config, params, extra, inputs, forms: elastic.ElasticConfig):
  model, layers = _elastic_model(config)
  variables = {"params": params, "calibration": extra["calibration"]}
  return model.apply({**variables, "elastic": elastic_config.config_variables(forms, layers)}, inputs)


def _elastic_task(config: Config, objective) -> Task:
  """A task that starts from a network pretrained in floating point, the same for either method at a seed."""
  train, _, test = _data()
  model, layers = _elastic_model(config)
  uniform = functools.partial(elastic_config.uniform_config, len(layers))

  def init_params(key, hparams):
    del hparams
    keys = jax.random.split(key)
    variables = model.init(keys[0], jnp.asarray(train["x"][:1]))
    params = _pretrain(config, keys[1], variables["params"])
    variables = elastic.calibrate_elastic(model, {**variables, "params": params}, jnp.asarray(train["x"][:256]))
    return variables["params"], {"calibration": variables["calibration"]}

  def evaluate(params, extra, hparams):
    del hparams
    configs = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(uniform(bits=bits) for bits in BITS))
    measure = lambda forms: _accuracy(_apply(config, params, extra, test["x"], forms), test["y"])
    return {f"accuracy_{bits}": value for bits, value in zip(BITS, jax.lax.map(measure, configs))}

  def optimizer(hparams):
    schedule = optax.cosine_decay_schedule(1.0, config.steps)
    rate = lambda step: -hparams["learning_rate"] * schedule(step)
    return optax.chain(optax.clip(1.0), optax.scale_by_adam(), optax.scale_by_schedule(rate))

  return Task(
    init_params=init_params,
    objective=objective,
    optimizer=optimizer,
    data=train,
    batch_size=config.batch_size,
    hparams={"learning_rate": 1e-3, "guidance": 0.5, "kurtosis_weight": 0.015, "skewness_weight": 1.0, "bits": 4},
    evaluate_params=evaluate,
    predict=lambda params, extra, inputs: _apply(config, params, extra, inputs, uniform(bits=BITS[-1])),
  )


def _pretrain(config: Config, key, params):
  train, _, _ = _data()
  inputs, labels = jnp.asarray(train["x"].reshape(len(train["y"]), -1)), jnp.asarray(train["y"])
  tx = optax.adam(1e-3)

  def loss(params, batch):
    hidden = inputs[batch]
    for index in range(len(config.hidden) + 1):
      layer = params[f"layer{index}"]
      hidden = (nn.relu(hidden) if index else hidden) @ layer["kernel"] + layer["bias"]
    return _cross_entropy(hidden, labels[batch])

  def step(carry, key):
    params, state = carry
    updates, state = tx.update(jax.grad(loss)(params, jax.random.choice(key, len(labels), (config.batch_size,))), state)
    return (optax.apply_updates(params, updates), state), None

  return jax.lax.scan(step, (params, tx.init(params)), jax.random.split(key, config.pretraining_steps))[0][0]


def _supernet(config: Config) -> Task:
  _, layers = _elastic_model(config)
  uniform = functools.partial(elastic_config.uniform_config, len(layers))

  def objective(params, extra, batch, key, hparams, axis_name):
    del axis_name
    keys = jax.random.split(key, 3)
    forms = (
      elastic_config.sample_forms(keys[0], uniform(bits=max(BITS), end_bits=max(BITS))),
      elastic_config.sample_config(keys[1], len(layers), candidates=BITS),
      elastic_config.sample_forms(keys[2], uniform(bits=min(BITS))),
    )
    forms = jax.tree.map(lambda *leaves: jnp.stack(leaves), *forms)
    logits = jax.vmap(lambda own: _apply(config, params, extra, batch["x"], own))(forms)
    losses = progressive_guidance_loss(*logits, batch["y"], guidance=hparams["guidance"])
    kernels = [params[f"layer{index}"]["kernel"] for index in range(1, len(layers))]
    weights = {name: hparams[name] for name in ("kurtosis_weight", "skewness_weight")}
    return losses.mean() + weight_distribution_penalty(kernels, **weights), (extra, {})

  return _elastic_task(config, objective)


def _dedicated(config: Config) -> Task:
  _, layers = _elastic_model(config)

  def objective(params, extra, batch, key, hparams, axis_name):
    del key, axis_name
    forms = elastic_config.uniform_config(len(layers), bits=jnp.asarray(hparams["bits"], jnp.int32))
    return _cross_entropy(_apply(config, params, extra, batch["x"], forms), batch["y"]), (extra, {})

  return _elastic_task(config, objective)


def points(config: Config) -> dict[str, np.ndarray]:
  """What `measure` compares of the method."""
  if config.method == "supernet":
    return grid(guidance=[0.5, 0.0])
  if config.method == "dedicated":
    return grid(bits=BITS)
  kurtosis, skewness = np.array(list(REGULARIZED.values())).T
  return {"kurtosis_weight": kurtosis, "skewness_weight": skewness}


def run_options(config: Config) -> dict[str, int]:
  """Length of one run."""
  steps = config.regularized_steps if config.method == "regularized" else config.steps
  return {"steps": steps, "log_every": steps // 2, "eval_every": steps}


# Accuracy of configurations, its predictor, and the search.


CHUNK = 40  # configurations that are measured at a time


def _measure_program(config: Config):
  """`(params, configs) -> (accuracy on the held-out part, on the test)` of `CHUNK` configurations."""
  _, held_out, test = _data()
  # What calibration finds: inputs of all layers are non-negative, digits or outputs of ReLUs.
  signs = {"weight_quantizer": {"signed": jnp.bool_(True)}, "input_quantizer": {"signed": jnp.bool_(False)}}
  extra = {"calibration": {f"layer{index}": signs for index in range(len(config.hidden) + 1)}}
  inputs = np.concatenate([held_out["x"], test["x"]])
  count = len(held_out["y"])

  def one(params, own):
    logits = _apply(config, params, extra, inputs, own)
    return _accuracy(logits[:count], held_out["y"]), _accuracy(logits[count:], test["y"])

  program = jax.jit(jax.vmap(one, (None, 0)))

  def measure(params, configs):
    size = len(configs.weight_bits)
    padded = jax.tree.map(lambda leaf: np.resize(leaf, (-(-size // CHUNK) * CHUNK, *leaf.shape[1:])), configs)
    starts = range(0, size, CHUNK)
    chunks = [program(params, jax.tree.map(lambda leaf, at=at: leaf[at : at + CHUNK], padded)) for at in starts]
    return [np.concatenate(part)[:size] for part in zip(*chunks)]

  return measure


def _search_program(config: Config):
  """`(key, configs, accuracies) -> (predictions of the rest, configuration found)`; the first ones are fitted."""
  _, layers = _elastic_model(config)
  weights, inputs = [layer.weights for layer in layers], [layer.inputs for layer in layers]

  @jax.jit
  def program(key, configs, accuracies):
    features, fitted = jax.vmap(search.encode_config)(configs), 3 * config.sampled // 4
    predict = _fit_predictor(config, jax.random.fold_in(key, 0), features[:fitted], accuracies[:fitted])
    found, _ = search.evolve_bits(
      jax.random.fold_in(key, 1),
      lambda own: predict(search.encode_config(own)),
      config=elastic_config.uniform_config(len(layers), bits=min(BITS)),
      weight_sizes=weights,
      act_sizes=inputs,
      target=config.budget,
      candidates=BITS,
      generations=config.generations,
    )
    return predict(features[fitted:]), found

  return program


def _fit_predictor(config: Config, key, features, accuracies):
  model = search.AccuracyPredictor(base=jnp.mean(accuracies), hidden=config.predictor)
  tx = optax.adamw(4e-4, weight_decay=1e-5)

  def step(carry, _):
    variables, state = carry
    loss = lambda variables: optax.huber_loss(model.apply(variables, features), accuracies).mean()
    updates, state = tx.update(jax.grad(loss)(variables), state, variables)
    return (optax.apply_updates(variables, updates), state), None

  variables = model.init(key, features)
  variables = jax.lax.scan(step, (variables, tx.init(variables)), None, length=config.fitting_steps)[0][0]
  return functools.partial(model.apply, variables)


def _sample_configs(seed: int, count: int, layers: int, form=None) -> elastic.ElasticConfig:
  """Bits for each layer and one form, drawn or given, for all layers of a configuration; NumPy arrays."""
  rng = np.random.default_rng(seed)
  bits = rng.choice(np.array(BITS, np.int32), (2, count, layers))
  bits[..., [0, -1]] = max(BITS)
  forms = rng.integers(0, 2, (3, count, 1)).astype(bool) if form is None else np.reshape(form, (3, 1, 1))
  return elastic.ElasticConfig(*bits, *np.broadcast_to(forms, (3, count, layers)))


def _in_budget(config: Config, seed: int) -> elastic.ElasticConfig:
  """The first random configurations with one step per tensor and symmetric grids whose averages are in the budget."""
  _, layers = _elastic_model(config)
  configs = _sample_configs(seed, 5000, len(layers), form=(False, True, True))
  average = lambda bits, sizes: bits[:, 1:-1] @ np.array(sizes[1:-1]) / sum(sizes[1:-1])
  averages = np.stack(
    [
      average(configs.weight_bits, [layer.weights for layer in layers]),
      average(configs.act_bits, [layer.inputs for layer in layers]),
    ]
  )
  inside = np.flatnonzero(((averages <= config.budget) & (averages > config.budget - 0.5)).all(0))[:CHUNK]
  return jax.tree.map(lambda leaf: leaf[inside], configs)


def measure(config: Config, seeds: list[int]) -> dict[str, np.ndarray]:
  """Accuracies of the three methods, `[seeds]`, and for each supernet the predictor's Kendall tau and the search."""

  def run(method, **options):
    own = dataclasses.replace(config, method=method)
    steps = run_options(own)["steps"]
    # Networks so small that choosing the engine would take longer than running them.
    return sweep(build(own), points(own), seeds=seeds, steps=steps, engine="map", label=method, **options)

  measured = {}
  result = run("regularized")
  for index, name in enumerate(REGULARIZED):
    for metric in ("kurtosis", "skewness", "accuracy_float", "accuracy_4", "accuracy_3", "accuracy_2"):
      measured[f"{name}: {metric}"] = result.by_point(metric)[index, :, -1]
  dedicated, supernet = run("dedicated"), run("supernet", keep_params=True)
  for index, bits in enumerate(BITS):
    values = supernet.by_point(f"accuracy_{bits}")[..., -1]
    measured[f"dedicated {bits}"] = dedicated.by_point(f"accuracy_{bits}")[index, :, -1]
    measured[f"supernet {bits}"], measured[f"hard labels {bits}"] = values
  return measured | _study(config, supernet, seeds)


def _study(config: Config, supernet, seeds: list[int]) -> dict[str, np.ndarray]:
  """Predicted and measured accuracy of configurations that were not fitted, the search, and others in its budget."""
  accuracies_of, predict_and_search = _measure_program(config), _search_program(config)
  layers, others, results = len(config.hidden) + 1, _in_budget(config, 0), []
  for index, seed in enumerate(seeds):  # the first point, which is guided
    params = jax.tree.map(lambda leaf, index=index: leaf[index], supernet.params)
    configs = _sample_configs(seed, config.sampled, layers)
    accuracies, _ = accuracies_of(params, configs)
    predictions, found = predict_and_search(jax.random.key(seed), configs, accuracies)
    actual = accuracies[-len(predictions) :]
    results.append(
      {
        "predictions": predictions,
        "accuracies": actual,
        "kendall": stats.kendalltau(predictions, actual).statistic,
        "pearson": np.corrcoef(predictions, actual)[0, 1],
        "found": accuracies_of(params, jax.tree.map(lambda leaf: np.asarray(leaf)[None], found))[1][0],
        "found bits": np.stack([found.weight_bits, found.act_bits]),
        "in budget": accuracies_of(params, others)[1].mean(),
      }
    )
  return {name: np.stack([result[name] for result in results]) for name in results[0]}


CLAIMS = (
  Claim(
    "regularized_2",
    "weights drawn to uniform laws survive quantization to 2 bits after training",
    "test accuracy with 2-bit inner weights, kurtosis and skewness weights 0.015 and 1, less without",
    lambda m: m["WDR: accuracy_2"] - m["none: accuracy_2"],
    at_least=0.01,
  ),
  Claim(
    "regularized_float",
    "at no cost in floating point",
    "test accuracy in floating point without the penalties less with",
    lambda m: m["none: accuracy_float"] - m["WDR: accuracy_float"],
    at_most=0.005,
  ),
  Claim(
    "kurtosis",
    "the kurtosis comes closer to that of a uniform law",
    "|kurtosis - 1.8| with the penalties, as a share of that without",
    lambda m: np.abs(m["WDR: kurtosis"] - 1.8) / np.abs(m["none: kurtosis"] - 1.8),
    at_most=0.5,
  ),
  Claim(
    "skewness",
    "and the skewness vanishes",
    "largest |skewness| of a regularized layer",
    lambda m: m["WDR: skewness"],
    at_most=0.02,
  ),
  *(
    Claim(
      f"supernet_{bits}",
      f"one supernet is nearly as accurate as a network trained for {bits} bits",
      f"test accuracy of the dedicated network less the supernet's, weights and inputs with {bits} bits",
      lambda m, bits=bits: m[f"dedicated {bits}"] - m[f"supernet {bits}"],
      at_most=bound,
    )
    for bits, bound in ((8, 0.02), (4, 0.02), (2, 0.04))
  ),
  Claim(
    "guidance",
    "progressive guidance beats hard labels at 2 bits",
    "test accuracy of the supernet at 2 bits, guided less hard labels",
    lambda m: m["supernet 2"] - m["hard labels 2"],
    at_least=0.0,
  ),
  Claim(
    "predictor",
    "a small network ranks the supernet's configurations",
    "Kendall's tau of predicted and measured accuracy, 100 configurations that were not fitted",
    lambda m: m["kendall"],
    at_least=0.6,
  ),
)
NOTES = (
  "Reported, not gated: Pearson's correlation of the predictor, and the accuracy of the configuration that the genetic"
  " search finds for at most 3 bits on average, beside the mean of random configurations in the same budget.",
  "The measured accuracies of almost all configurations lie within three points, which is fifteen of the 497 examples:"
  " a good part of their ranking is chance.",
  "The card leaves rates, batch size and the split open: 800 digits to train, 497 on which configurations are measured,"
  " 500 for the test, batches of 64, SGD at 0.05 for the first part and Adam at 0.001 for the others, fixed before the"
  " run. Rates of tables and weights are the same, as in the official code.",
)


def figure(measurements: dict[str, np.ndarray], path: pathlib.Path) -> None:
  """Accuracy against bits after training and in training, the predictor, and the search."""
  import matplotlib.pyplot as plt

  m = measurements
  picture, axes = plt.subplots(2, 2, figsize=(10, 7.5), layout="constrained")
  _bars(
    axes[0, 0],
    {name: [m[f"{name}: accuracy_{bits}"] for bits in (2, 3, 4, "float")] for name in REGULARIZED},
    ["2 bits", "3 bits", "4 bits", "float"],
  )
  axes[0, 0].set(title="inner weights quantized after training", ylabel="test accuracy")
  _bars(
    axes[0, 1],
    {name: [m[f"{name} {bits}"] for bits in BITS] for name in ("dedicated", "supernet", "hard labels")},
    [f"{bits} bits" for bits in BITS],
  )
  axes[0, 1].set(title="weights and inputs quantized in training", ylabel="test accuracy")
  axes[1, 0].plot(m["predictions"].T, m["accuracies"].T, ".", markersize=4, alpha=0.6)
  axes[1, 0].set(
    title=f"configurations not fitted, a colour per seed; tau {m['kendall'].mean():.2f}",
    xlabel="predicted accuracy",
    ylabel="measured accuracy",
  )
  _bars(axes[1, 1], {"search": [m["found"]], "mean of random": [m["in budget"]]}, ["at most 3 bits on average"])
  axes[1, 1].set(title="mixed precision", ylabel="test accuracy")
  picture.savefig(path, dpi=120)
  plt.close(picture)


def _bars(axis, groups, labels):
  """A bar per name at each label, with the seeds as dots; the axis starts below the lowest."""
  width = 0.8 / len(groups)
  for index, (name, values) in enumerate(groups.items()):
    values = np.stack(values)
    places = np.arange(len(labels)) + (index - (len(groups) - 1) / 2) * width
    axis.bar(places, values.mean(1), 0.9 * width, alpha=0.7, label=name)
    axis.plot(places[:, None] + np.zeros_like(values), values, "k.", markersize=3)
  lowest = min(np.min(values) for values in groups.values())
  axis.set(xticks=range(len(labels)), xticklabels=labels, ylim=(max(0, lowest - 0.02), 1))
  axis.legend(frameon=False, ncols=len(groups), loc="lower center", bbox_to_anchor=(0.5, -0.25))
