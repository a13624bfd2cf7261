"""Memory and time of robust losses' gradients, by the number of steps of their attacks."""

import functools

import jax
import jax.numpy as jnp
import optax

from experiments.benchmarks import Options
from experiments.benchmarks.timing import interleaved
from jaxreg import adversarial, losses
from jaxreg.models import MLP

TITLE = "Robust losses, value and gradient in the parameters: time against cross-entropy's, memory by attack steps"
RADIUS, FEATURES, CLASSES, BATCH, WIDTH = 0.1, 784, 10, 256, 512
STEPS = (1, 10, 40)


def measure(options: Options):
  """Rows: one per loss."""
  model = MLP((32,) * 2 + (CLASSES,) if options.quick else (WIDTH, WIDTH, CLASSES))
  inputs = jax.random.uniform(jax.random.key(0), (BATCH, FEATURES))
  labels = jnp.arange(BATCH) % CLASSES
  params = model.init(jax.random.key(1), inputs)["params"]
  programs = {
    (name, steps): jax.jit(jax.value_and_grad(functools.partial(loss, steps=steps)))
    .lower(params, inputs, labels)
    .compile()
    for name, loss in _losses(lambda params, x: model.apply({"params": params}, x)).items()
    for steps in (STEPS if name != "cross-entropy" else STEPS[:1])
  }
  calls = {key: functools.partial(program, params, inputs, labels) for key, program in programs.items()}
  seconds = interleaved(calls, repeats=2 if options.quick else max(options.repeats, 7))
  rows = []
  for name in dict.fromkeys(name for name, _ in programs):
    row = {"loss": name}
    for steps in STEPS:
      if (name, steps) in programs:
        row[f"ms, {steps} steps"] = 1e3 * seconds[name, steps]
        row[f"MiB, {steps} steps"] = programs[name, steps].memory_analysis().temp_size_in_bytes / 2**20
    row["time of 10 steps / 11 × cross-entropy's"] = (
      seconds[name, 10] / (11 * seconds["cross-entropy", 1]) if (name, 10) in programs else None
    )
    rows.append(row)
  notes = [
    f"A perceptron of two hidden layers of {model.features[0]}, {BATCH} examples of {FEATURES} features, float32. MiB"
    " are the temporary memory of the compiled program. An attack of n steps takes at least n + 1 gradients."
  ]
  return rows, notes


def _losses(apply):
  """name -> `(params, inputs, labels, steps) -> scalar`."""
  entropy = optax.softmax_cross_entropy_with_integer_labels

  def attacked(params, x, objective, steps):
    options = dict(radius=RADIUS, step_size=RADIUS / 4, steps=steps, bounds=(0.0, 1.0))
    return adversarial.pgd(lambda moved: objective(apply(params, moved)), x, jax.random.key(2), **options)

  def trained_on_attacked(params, x, y, *, steps):
    return entropy(apply(params, attacked(params, x, lambda z: entropy(z, y), steps)), y).mean()

  def trades(params, x, y, *, steps):
    clean = apply(params, x)
    apart = lambda z: optax.losses.kl_divergence_with_log_targets(jax.nn.log_softmax(z), jax.nn.log_softmax(clean))
    return losses.trades_loss(clean, apply(params, attacked(params, x, apart, steps)), y).mean()

  def comp_sum(params, x, y, *, steps):
    clean = apply(params, x)
    moved = attacked(params, x, lambda z: losses.margin_shift_norm(clean, z, y), steps)
    return losses.smooth_adversarial_comp_sum_loss(clean, apply(params, moved), y).mean()

  def implicit(params, x, y, *, steps, hessian):
    loss_fn = lambda params, x: entropy(apply(params, x), y)
    box = dict(radius=RADIUS, barrier=1e-2)
    offset = adversarial.log_barrier_attack(
      lambda x: loss_fn(params, x), x, jax.random.key(2), steps=steps, optimizer=optax.adam(RADIUS / 4), **box
    )
    return adversarial.implicit_adversarial_loss(loss_fn, params, x, offset, hessian=hessian, **box).mean()

  def by_price(params, x, y, *, steps):
    return adversarial.robust_loss(
      lambda params, x: entropy(apply(params, x), y), params, x, price=100.0, steps=steps
    )[0].mean()  # fmt: skip

  return {
    "cross-entropy": lambda params, x, y, steps: entropy(apply(params, x), y).mean(),
    "adversarial training": trained_on_attacked,
    "TRADES": trades,
    "smooth adversarial comp-sum": comp_sum,
    "log-barrier, implicit term, diagonal": functools.partial(implicit, hessian="diagonal"),
    "log-barrier, implicit term, full": functools.partial(implicit, hessian="full"),
    "transport price": by_price,
  }
