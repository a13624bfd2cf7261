"""Forward and backward of every classification loss against optax's cross-entropy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.benchmarks import Options
from experiments.benchmarks.timing import interleaved
from jaxreg import losses

TITLE = "Losses: forward and backward against optax.softmax_cross_entropy_with_integer_labels, float32"
AIM = 1.5
EXAMPLES = 100_000

_STATELESS = {
  "comp_sum tau=0.5": functools.partial(losses.comp_sum_loss, tau=0.5),
  "comp_sum tau=1.5": functools.partial(losses.comp_sum_loss, tau=1.5),
  "generalized_cross_entropy": losses.generalized_cross_entropy_loss,
  "ldr_kl": losses.ldr_kl_loss,
  "ldr_kl l1_mean": functools.partial(losses.ldr_kl_loss, margin=0.1, normalize="l1_mean"),
  "ldr_kl softplus_mean": functools.partial(losses.ldr_kl_loss, margin=0.1, normalize="softplus_mean"),
  "stablemax_cross_entropy": losses.stablemax_cross_entropy,
  "truncated_generalized_cross_entropy": losses.truncated_generalized_cross_entropy_loss,
  "symmetric_cross_entropy": losses.symmetric_cross_entropy_loss,
  "mean_absolute_error": losses.mean_absolute_error_loss,
  "brier": losses.brier_loss,
  "jensen_shannon": losses.jensen_shannon_loss,
  "normalized_cross_entropy": losses.normalized_cross_entropy_loss,
  "reverse_cross_entropy": losses.reverse_cross_entropy_loss,
  "asymmetric_generalized_cross_entropy": losses.asymmetric_generalized_cross_entropy_loss,
  "asymmetric_unhinged": losses.asymmetric_unhinged_loss,
  "nce_rce": losses.nce_rce_loss,
  "nce_agce": losses.nce_agce_loss,
  "nce_aul": losses.nce_aul_loss,
  "crammer_singer": losses.crammer_singer_loss,
  "weston_watkins": losses.weston_watkins_loss,
  "robust_log": losses.robust_log_loss,
}


def measure(options: Options):
  """Rows: one per loss and size, with milliseconds and the ratio to the cross-entropy."""
  sizes = ((64, 100), (16, 1000)) if options.quick else ((4096, 1000), (512, 50_000))
  rows = [row for size in sizes for row in _measure(*size, options)]
  slower = sorted({row["loss"] for row in rows if row["ratio"] > AIM})
  notes = [
    "Each time is that of jit(value_and_grad(mean loss)) with respect to the logits, the fastest of interleaved calls.",
    f"Above {AIM} times the cross-entropy: {', '.join(slower) if slower else 'none'}.",
  ]
  return rows, notes


def _measure(batch: int, classes: int, options: Options):
  rng = np.random.default_rng(0)
  logits = jax.device_put(3 * rng.normal(size=(batch, classes)).astype(np.float32))
  labels = jax.device_put(rng.integers(0, classes, batch).astype(np.int32))
  calls = {"cross-entropy (optax)": _stateless(optax.softmax_cross_entropy_with_integer_labels, logits, labels)}
  calls |= {name: _stateless(loss, logits, labels) for name, loss in _STATELESS.items()}
  aldr = functools.partial(losses.aldr_kl_loss, initial_temperature=1.0)
  ids = jax.device_put(rng.permutation(EXAMPLES)[:batch].astype(np.int32))
  calls["aldr_kl"] = _stateful(aldr, logits, labels, ids, losses.aldr_kl_init(EXAMPLES, temperature=1.0))
  calls["elr"] = _stateful(losses.elr_loss, logits, labels, jnp.arange(batch), losses.elr_init(batch, classes))
  seconds = interleaved(calls, repeats=2 if options.quick else max(options.repeats, 10))
  reference = next(iter(seconds.values()))
  return [
    {"loss": name, "batch": batch, "classes": classes, "ms": 1e3 * time, "ratio": time / reference}
    for name, time in seconds.items()
  ]


def _stateless(loss, logits, labels):
  step = jax.jit(jax.value_and_grad(lambda z, y: loss(z, y).mean()))
  return lambda: step(logits, labels)


def _stateful(loss, logits, labels, ids, state):
  """Calls that thread the state, whose buffers are updated in place as in training."""

  @functools.partial(jax.jit, donate_argnums=1)
  def step(z, state, y, ids):
    def mean(z):
      values, new = loss(z, y, ids, state=state)
      return values.mean(), new

    (value, state), gradient = jax.value_and_grad(mean, has_aux=True)(z)
    return value, gradient, state

  carry = [state]

  def call():
    value, gradient, carry[0] = step(logits, carry[0], labels, ids)
    return value, gradient, carry[0]

  return call
