"""A training step of an output layer over very many classes: what the Z-loss in factored form saves."""

import functools
import gc

import jax
import jax.numpy as jnp
import numpy as np
import optax
import threadpoolctl

from experiments.benchmarks import Options
from experiments.benchmarks.timing import interleaved
from jaxreg.losses import spherical
from jaxreg.solvers.factored_output import factored_init, factored_value_and_grad, stabilize_factored

TITLE = "Output layers with very many classes: a step (inputs' gradient and SGD on the weights), batch 200, float32"
BATCH, SAMPLES, RATE = 200, 8192, 1e-3
_cross_entropy = optax.softmax_cross_entropy_with_integer_labels
AIMS = {"full softmax": 40, "two-level softmax": 4}


def measure(options: Options):
  """Rows: one per layer, number of classes and features, with milliseconds and the ratio to the factored Z-loss."""
  sizes = ((1000, 16), (4000, 16)) if options.quick else ((10_000, 128), (100_000, 128), (800_000, 128),
                                                          (10_000, 512), (100_000, 512), (800_000, 512))  # fmt: skip
  rows, notes = [], [
    "Times are the fastest of several calls in turn, weights donated and changed in place; LAPACK on one thread (its"
    " threads wait for each other on a busy machine).",
    f"Sampled softmax: {SAMPLES} uniformly drawn classes shared by the batch. Two-level softmax: sqrt(classes) clusters"
    " of equal size, visited example by example, or (gathered) for all examples at once.",
    "Classes are drawn from a Zipf law (exponent 1), as words are. The factored step's stabilization, due every 100"
    " steps, is not in the fastest call; its row is a hundredth of one that resets one direction.",
  ]  # fmt: skip
  with threadpoolctl.threadpool_limits(1, user_api="blas"):
    for classes, features in sizes:
      needed = 4 * (3 * classes * features + 4 * BATCH * classes)
      if needed > _free_bytes():
        notes.append(f"Skipped {classes} classes, {features} features: a dense step needs {needed / 2**30:.1f} GiB.")
        continue
      rows += _measure(classes, features, options)
  for name, aim in AIMS.items():
    reached = [row for row in rows if row["layer"] == name and row["classes"] >= 800_000]
    notes += [f"{name}, {row['features']} features: {row['ratio']:.0f} times the factored step; the aim is {aim}."
              for row in reached]  # fmt: skip
  return rows, notes


def _measure(classes: int, features: int, options: Options):
  """The layers one after another, each next to the factored one, so that their weights are not in memory together."""
  rng = np.random.default_rng(0)
  inputs = jax.device_put(rng.normal(size=(BATCH, features)).astype(np.float32))
  frequency = 1 / np.arange(1, classes + 1)
  labels = jax.device_put(rng.choice(classes, BATCH, p=frequency / frequency.sum()).astype(np.int32))
  seconds = {}
  factored = _factored(classes, features, inputs, labels)
  for name, make in LAYERS.items():
    call = make(classes, features, inputs, labels)
    best = interleaved({"factored": factored, name: call}, repeats=2 if options.quick else options.repeats)
    seconds[name] = best[name]
    seconds["factored Z-loss"] = min(seconds.get("factored Z-loss", np.inf), best["factored"])
    del call
    gc.collect()
  own = seconds["factored Z-loss"]
  seconds["stabilization / 100"] = _stabilization(classes, features) / 100
  size = {"classes": classes, "features": features}
  return [{"layer": n, **size, "ms": 1e3 * s, "ratio": s / own} for n, s in seconds.items()]


def _carried(step, weights, *arguments):
  """Calls that thread the weights, which are donated, as in training."""
  step = jax.jit(step, donate_argnums=0)
  carry = [weights]

  def call():
    value, gradient, carry[0] = step(carry[0], *arguments)
    return value, gradient, carry[0]

  return call


def _factored(classes, features, inputs, labels):
  loss = functools.partial(spherical.z_loss_from_statistics, classes=classes)
  make = jax.jit(functools.partial(factored_init, classes=classes, features=features, scale=0.1))
  return _carried(factored_value_and_grad(loss), make(jax.random.key(0)), inputs, labels, RATE)


def _stabilization(classes, features) -> float:
  """Seconds to reset one of the directions of the mixing."""
  state = jax.jit(functools.partial(factored_init, classes=classes, features=features))(jax.random.key(0))
  change = jax.jit(stabilize_factored, donate_argnums=0)
  carry = [state]

  def call():
    mixing = carry[0].mixing.at[0, 0].set(10.0)
    carry[0] = change(carry[0]._replace(mixing=mixing))
    return carry[0]

  return interleaved({"only": call}, repeats=2)["only"]


def _weights(classes, features):
  return jax.jit(lambda key: 0.1 * jax.random.normal(key, (classes, features)))(jax.random.key(0))


def _dense(loss):
  def make(classes, features, inputs, labels):
    def step(weights, inputs, labels):
      mean = lambda weights, inputs: loss(inputs @ weights.T, labels).mean()
      value, (on_weights, on_inputs) = jax.value_and_grad(mean, (0, 1))(weights, inputs)
      return value, on_inputs, weights - RATE * on_weights

    return _carried(step, _weights(classes, features), inputs, labels)

  return make


def _sampled(classes, features, inputs, labels):
  """Softmax over the label and a drawn set of classes; the step changes their rows alone."""

  def step(carry, inputs, labels):
    weights, key = carry
    key, own = jax.random.split(key)
    sample = jax.random.randint(own, (min(SAMPLES, classes),), 0, classes)
    rows = jnp.concatenate([labels, sample])

    def mean(chosen, inputs):
      target = jnp.sum(chosen[:BATCH] * inputs, axis=-1, keepdims=True)
      drawn = jnp.where(sample == labels[:, None], -jnp.inf, inputs @ chosen[BATCH:].T)
      return jnp.mean(jax.nn.logsumexp(jnp.concatenate([target, drawn], axis=1), axis=1) - target[:, 0])

    value, (on_rows, on_inputs) = jax.value_and_grad(mean, (0, 1))(weights[rows], inputs)
    return value, on_inputs, (weights.at[rows].add(-RATE * on_rows), key)

  return _carried(step, (_weights(classes, features), jax.random.key(1)), inputs, labels)


def _clusters(classes, features):
  """Weights of sqrt(classes) clusters and of the classes in each, and the number of those."""
  clusters = int(np.ceil(np.sqrt(classes)))
  size = -(-classes // clusters)
  leaves = _weights(clusters * size, features).reshape(clusters, size, features)
  return (_weights(clusters, features), leaves), size


def _two_level_gathered(classes, features, inputs, labels):
  """Softmax over clusters, then over the classes of the label's cluster; each example gathers its cluster's weights."""
  weights, size = _clusters(classes, features)

  def step(weights, inputs, labels):
    top, leaves = weights
    cluster, place = labels // size, labels % size

    def mean(top, own, inputs):
      within = jnp.einsum("bd,bcd->bc", inputs, own)
      return jnp.mean(_cross_entropy(inputs @ top.T, cluster) + _cross_entropy(within, place))

    value, (on_top, on_own, on_inputs) = jax.value_and_grad(mean, (0, 1, 2))(top, leaves[cluster], inputs)
    return value, on_inputs, (top - RATE * on_top, leaves.at[cluster].add(-RATE * on_own))

  return _carried(step, weights, inputs, labels)


def _two_level(classes, features, inputs, labels):
  """The same step, example by example: a cluster's weights stay in the cache, and rank-one updates are in place."""
  weights, size = _clusters(classes, features)

  def step(weights, inputs, labels):
    top, leaves = weights
    cluster, place = labels // size, labels % size

    def first(top, inputs):
      return _cross_entropy(inputs @ top.T, cluster).mean()

    def second(example):
      hidden, cluster, place = example
      own = leaves[cluster]
      logits = own @ hidden
      value, on_logits = jax.value_and_grad(_cross_entropy)(logits, place)
      return value / BATCH, on_logits / BATCH, (on_logits / BATCH) @ own

    value, (on_top, on_inputs) = jax.value_and_grad(first, (0, 1))(top, inputs)
    within, on_logits, on_hidden = jax.lax.map(second, (inputs, cluster, place))

    def update(index, leaves):
      change = RATE * on_logits[index][:, None] * inputs[index]
      return leaves.at[cluster[index]].add(-change)

    leaves = jax.lax.fori_loop(0, BATCH, update, leaves)
    return value + within.sum(), on_inputs + on_hidden, (top - RATE * on_top, leaves)

  return _carried(step, weights, inputs, labels)


LAYERS = {
  "full softmax": _dense(_cross_entropy),
  "dense Z-loss": _dense(spherical.z_loss),
  "sampled softmax": _sampled,
  "two-level softmax": _two_level,
  "two-level softmax, gathered": _two_level_gathered,
}


def _free_bytes() -> int:
  """Of the machine, less a reserve; of an accelerator when there is one."""
  limits = jax.devices()[0].memory_stats()
  if limits:
    return limits["bytes_limit"] - limits["bytes_in_use"]
  with open("/proc/meminfo") as file:
    available = next(int(line.split()[1]) for line in file if line.startswith("MemAvailable"))
  return 1024 * available - 2**30
