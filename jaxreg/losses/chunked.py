"""Softmax-like losses over many classes, a chunk of classes at a time.

The logits may come from the output layer itself: then no `[batch, classes]` array exists at all, and the chunks'
logits are computed again in the backward pass. Given as an array, only its gradient is as large. The values are those
of `comp_sum_loss`, `ldr_kl_loss` and `stablemax_cross_entropy`, which themselves work with the classes sharded over a
mesh: under a sharded `jit` XLA then exchanges numbers per example only.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxreg.checks import as_array, check_float, check_integer_labels, counted_labels
from jaxreg.losses.comp_sum import of_negative_log
from jaxreg.losses.label_dro import NORMALIZATIONS, bounded_temperature, divisor, inverse_scale, lift
from jaxreg.losses.labelled_logits import Labelled, only_counted, widened
from jaxreg.losses.stablemax import remap

__all__ = ["OutputLayer", "chunked_comp_sum_loss", "chunked_ldr_kl_loss", "chunked_stablemax_cross_entropy"]

CHUNK = 8192


class OutputLayer(NamedTuple):
  """What the logits `features @ kernel + bias` are computed from.

  Attributes:
    features: floating `[..., features]`.
    kernel: floating `[features, classes]`.
    bias: floating `[classes]`, or None.
  """

  features: jax.Array
  kernel: jax.Array
  bias: jax.Array | None = None


def chunked_comp_sum_loss(
  outputs: ArrayLike | OutputLayer, labels: ArrayLike, *, tau: ArrayLike = 1.0, chunk_size: int = CHUNK
) -> jax.Array:
  """`comp_sum_loss` a chunk of classes at a time; cross-entropy at `tau = 1`.

  >>> import jax, jax.numpy as jnp
  >>> layer = OutputLayer(jnp.ones((2, 3)), jnp.arange(30.0).reshape(3, 10) / 100)
  >>> value = chunked_comp_sum_loss(layer, jnp.array([0, 9]), chunk_size=4)
  >>> logits = layer.features @ layer.kernel
  >>> bool(jnp.allclose(value, -jax.nn.log_softmax(logits)[jnp.arange(2), jnp.array([0, 9])], atol=1e-6))
  True

  Args:
    outputs: logits, floating `[..., classes]`, or the `OutputLayer` that gives them.
    labels: integers `[...]`.
    tau: non-negative scalar (or array broadcasting against `labels`); may be traced.
    chunk_size: static; how many classes at a time.

  Returns:
    `[...]`, the loss of each example. It has derivatives in reverse mode, with respect to `outputs` and `tau`.

  Raises:
    ValueError: when shapes do not fit or a hyperparameter is out of range.

  Reference: Mao, Mohri, Zhong, "Cross-Entropy Loss Functions: Theoretical Analysis and Applications", ICML 2023,
    the comp-sum family (Section 3).
  """
  outputs, batch = _prepare(outputs, labels, chunk_size)
  tau = batch.hyperparameter("tau", tau, low=0)
  log_sum, sums = _reduce(_terms_of_logits, chunk_size, batch.labels, {}, outputs)
  return batch.values(of_negative_log(_log1p_exp(log_sum, sums["own"]), tau))


def chunked_stablemax_cross_entropy(
  outputs: ArrayLike | OutputLayer, labels: ArrayLike, *, chunk_size: int = CHUNK
) -> jax.Array:
  """`stablemax_cross_entropy` a chunk of classes at a time.

  >>> import jax.numpy as jnp
  >>> round(float(chunked_stablemax_cross_entropy(jnp.zeros((1, 4)), jnp.array([2]), chunk_size=2)[0]), 3)
  1.386

  Args:
    outputs: logits, floating `[..., classes]`, or the `OutputLayer` that gives them.
    labels: integers `[...]`.
    chunk_size: static; how many classes at a time.

  Returns:
    `[...]`, the loss of each example. It has derivatives in reverse mode.

  Raises:
    ValueError: when shapes do not fit.

  Reference: Prieto, Barsbey, Mediano, Birdal, "Grokking at the Edge of Numerical Stability", ICLR 2025, Section 4.1.
  """
  outputs, batch = _prepare(outputs, labels, chunk_size)
  log_sum, sums = _reduce(_terms_of_stablemax, chunk_size, batch.labels, {}, outputs)
  return batch.values(_log1p_exp(log_sum, remap(sums["own"])))


def chunked_ldr_kl_loss(
  outputs: ArrayLike | OutputLayer,
  labels: ArrayLike,
  *,
  temperature: ArrayLike = 1.0,
  margin: ArrayLike = 0.0,
  normalize: str | None = None,
  chunk_size: int = CHUNK,
) -> jax.Array:
  """`ldr_kl_loss` a chunk of classes at a time; a normalisation takes a pass of its own.

  >>> import jax.numpy as jnp
  >>> chunked_ldr_kl_loss(jnp.zeros((1, 4)), jnp.array([2]), temperature=2.0, chunk_size=3).tolist()
  [0.0]

  Args:
    outputs: logits, floating `[..., classes]`, or the `OutputLayer` that gives them.
    labels: integers `[...]`.
    temperature: the paper's lambda, non-negative, 0 and infinity included; a scalar or `[...]`; may be traced.
    margin: non-negative scalar; may be traced.
    normalize: static; see `normalize_scores`.
    chunk_size: static; how many classes at a time.

  Returns:
    `[...]`, the loss of each example. It has derivatives in reverse mode.

  Raises:
    ValueError: when shapes do not fit or a hyperparameter is out of range.

  Reference: Zhu, Ying, Yang, "Label Distributionally Robust Losses for Multi-class Classification", ICML 2023, the
    LDR-KL loss.
  """
  if normalize not in NORMALIZATIONS:
    raise ValueError(f"normalize must be one of {NORMALIZATIONS}, got {normalize!r}.")
  outputs, batch = _prepare(outputs, labels, chunk_size)
  temperature = batch.hyperparameter("temperature", temperature, low=0)
  margin, labels = batch.hyperparameter("margin", margin, low=0), batch.labels
  classes, score = _classes(outputs), _SCORES[normalize]
  # Constants of the gradient: what is added to the scores' logits, and the score next to which the powers are summed.
  raised, own_logits = jnp.zeros((), temperature.dtype), _own_logits(outputs, labels)
  mean = jnp.ones((), temperature.dtype)
  if normalize == "l1_mean":
    mean = divisor(_reduce(_absolute, chunk_size, labels, {}, outputs)[1]["size"] / classes)
  elif normalize == "softplus_mean":
    sizes, _ = _reduce(_softplus_of_logits, chunk_size, labels, {}, outputs)
    raised = jax.lax.stop_gradient(lift(sizes.largest))
    mean = jnp.exp((sizes.largest + raised) + sizes.log_total) / classes
  reference = jax.lax.stop_gradient(score(own_logits + raised))
  temperature = bounded_temperature(jnp.broadcast_to(temperature, labels.shape), reference.dtype)
  rate, shift = inverse_scale(mean, temperature), margin / temperature
  rows = {"rate": rate, "shift": shift, "reference": reference, "raised": raised}
  log_sum, sums = _reduce(functools.partial(_terms_of_ldr, score), chunk_size, labels, rows, outputs)
  own = (reference - score(sums["own"] + raised)) * rate  # zero, with a derivative
  # The mean of exp(d / t), where d = 0 for the label, is 1 plus the mean of expm1(d / t). That keeps the digits which a
  # large t needs; where powers are too large for it, or almost all are lost beside 1, the logarithm of the sum does.
  excess = (sums["excess"] + jnp.expm1(own) * (sums["excess"] + (classes - 1))) / classes
  near = (sums["clipped"] == 0) & (excess > -0.5)
  log_mean = jnp.where(
    near,
    jnp.log1p(jnp.where(near, excess, 0)),
    _log1p_exp(log_sum, -own) - jnp.log(jnp.asarray(classes, reference.dtype)),
  )
  return batch.values(temperature * log_mean)


class _LogSum(NamedTuple):
  """`largest + log_total` in two parts, as each may be far larger than the other's digits."""

  largest: jax.Array  # a constant of the gradient, which reaches the exponents through `log_total`
  log_total: jax.Array


def _log1p_exp(log_sum: _LogSum, own: jax.Array) -> jax.Array:
  """`log(1 + exp(log_sum - own))`."""
  return jax.nn.softplus((log_sum.largest - own) + log_sum.log_total)


_SCORES = {None: lambda z: z, "l1_mean": lambda z: z, "softplus_mean": jax.nn.softplus}
_LIMIT = 20.0  # exponents above it are left to the logarithm of the sum
_EXCLUDED = -1e30  # no exponent is below it, and its power is 0


# What is reduced: `(rows, logits [batch, chunk], is_label) -> (exponents or None, terms)`.


def _terms_of_logits(rows, logits, is_label):
  return jnp.where(is_label, _EXCLUDED, logits), {"own": jnp.where(is_label, logits, 0)}


def _terms_of_stablemax(rows, logits, is_label):
  return jnp.where(is_label, _EXCLUDED, remap(logits)), {"own": jnp.where(is_label, logits, 0)}


def _terms_of_ldr(score, rows, logits, is_label):
  exponents = (score(logits + rows["raised"][:, None]) - rows["reference"][:, None]) * rows["rate"][:, None] + rows[
    "shift"
  ][:, None]
  excess = jnp.where(is_label, 0, jnp.expm1(jnp.minimum(exponents, _LIMIT)))
  clipped = jnp.where(is_label, 0, exponents > _LIMIT).astype(logits.dtype)
  own = jnp.where(is_label, logits, 0)
  return jnp.where(is_label, _EXCLUDED, exponents), {"own": own, "excess": excess, "clipped": clipped}


def _absolute(rows, logits, is_label):
  return None, {"size": logits * jnp.sign(logits)}  # with derivative 0 at 0


def _softplus_of_logits(rows, logits, is_label):
  """The logarithm of softplus, which far below zero is an exponential."""
  floor = -20.0 if logits.dtype == jnp.float32 else -40.0
  small = logits < floor
  return jnp.where(small, logits, jnp.log(jax.nn.softplus(jnp.where(small, 0, logits)))), {}


def _prepare(outputs, labels, chunk_size) -> tuple[jax.Array | OutputLayer, Labelled]:
  """Checked outputs, in which examples that do not count are zeros, and what `labelled` says of them."""
  if not 1 <= chunk_size:
    raise ValueError(f"chunk_size must be positive, got {chunk_size}.")
  if isinstance(outputs, OutputLayer):
    outputs = OutputLayer(*(leaf if leaf is None else as_array(name, leaf) for name, leaf in outputs._asdict().items()))
    _check_layer(outputs)
  else:
    outputs = as_array("logits", outputs)
  labels, logits = as_array("labels", labels), jax.eval_shape(_logits, outputs)
  check_integer_labels(logits, labels)
  labels, counted = counted_labels(labels, logits.shape[-1])
  if isinstance(outputs, OutputLayer):  # what is no number would reach the kernel's gradient
    outputs = outputs._replace(features=jnp.where(counted[..., None], outputs.features, 0))
  else:
    outputs = only_counted(outputs, counted)
  return outputs, Labelled(logits, labels, None, counted, logits.dtype)


def _check_layer(outputs):
  features, kernel, bias = outputs
  check_float("features", features)
  check_float("kernel", kernel)
  if jnp.ndim(kernel) != 2 or jnp.ndim(features) < 1 or jnp.shape(features)[-1] != jnp.shape(kernel)[0]:
    raise ValueError(
      f"kernel must be [features, classes] for features of shape {jnp.shape(features)}, got {jnp.shape(kernel)}."
    )
  if bias is not None and jnp.shape(bias) != jnp.shape(kernel)[1:]:
    raise ValueError(f"bias must have the shape {jnp.shape(kernel)[1:]}, got {jnp.shape(bias)}.")


def _logits(outputs):
  if not isinstance(outputs, OutputLayer):
    return jnp.asarray(outputs)
  logits = outputs.features @ outputs.kernel
  return logits if outputs.bias is None else logits + outputs.bias


def _classes(outputs):
  return (outputs.kernel if isinstance(outputs, OutputLayer) else outputs).shape[-1]


def _own_logits(outputs, labels):
  """The label's logits."""
  if not isinstance(outputs, OutputLayer):
    return widened(jnp.take_along_axis(outputs, labels[..., None], axis=-1)[..., 0])
  kernel = jnp.moveaxis(outputs.kernel[:, labels], 0, -1)
  logits = jnp.einsum("...f,...f->...", outputs.features, kernel)
  return widened(logits if outputs.bias is None else logits + outputs.bias[labels])


def _reduce(terms, chunk_size: int, labels, rows, outputs):
  """The `_LogSum` of the exponents over the classes, or None, and the sums of the other terms, each `[...]`."""
  flat = lambda leaf: jnp.broadcast_to(leaf, labels.shape).reshape(-1)
  rows = jax.tree.map(flat, rows)
  if isinstance(outputs, OutputLayer):
    outputs = outputs._replace(features=outputs.features.reshape(-1, outputs.features.shape[-1]))
  else:
    outputs = outputs.reshape(-1, outputs.shape[-1])
  chunk_size = min(chunk_size, _classes(outputs))
  return jax.tree.map(
    lambda leaf: leaf.reshape(labels.shape), _reduce_flat(terms, chunk_size, flat(labels), rows, outputs)
  )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _reduce_flat(terms, chunk_size, labels, rows, outputs):
  def body(index, carry):
    part, columns, new = _chunk(index, chunk_size, outputs)
    exponents, sums = _masked(terms, labels, rows, part, columns, new)
    return _add(carry, exponents, sums)

  shapes = jax.eval_shape(lambda: _masked(terms, labels, rows, *_chunk(0, chunk_size, outputs)))
  empty = jax.tree.map(lambda x: jnp.zeros(x.shape[:1], x.dtype), shapes)
  start = None if empty[0] is None else (jnp.full_like(empty[0], _EXCLUDED), empty[0])
  exponents, sums = jax.lax.fori_loop(0, _count(outputs, chunk_size), body, (start, empty[1]))
  return (None if exponents is None else _LogSum(exponents[0], jnp.log(exponents[1]))), sums


def _add(carry, exponents, sums):
  """The sum of exponentials relative to the largest exponent so far, and the plain sums."""
  if exponents is not None:
    largest, total = carry[0]
    new = jnp.maximum(largest, exponents.max(-1))
    carry = (new, total * jnp.exp(largest - new) + jnp.exp(exponents - new[:, None]).sum(-1)), carry[1]
  return carry[0], jax.tree.map(lambda old, part: old + part.sum(-1), carry[1], sums)


def _count(outputs, chunk_size):
  return -(-_classes(outputs) // chunk_size)


def _chunk(index, chunk_size, outputs):
  """The part of the outputs with the chunk's classes, their numbers, and which were not in the chunk before."""
  start = jnp.minimum(index * chunk_size, _classes(outputs) - chunk_size)  # the last chunk may overlap
  columns = start + jnp.arange(chunk_size)
  return (
    _map_classes(lambda x: jax.lax.dynamic_slice_in_dim(x, start, chunk_size, -1), outputs),
    columns,
    (columns >= index * chunk_size),
  )


def _map_classes(function, outputs, *others):
  """Applies a function to what has an axis of classes."""
  if isinstance(outputs, OutputLayer):
    mapped = jax.tree.map(function, outputs[1:], *(other[1:] for other in others))
    return OutputLayer(outputs.features, *mapped)
  return function(outputs, *others)


def _masked(terms, labels, rows, part, columns, new):
  exponents, sums = terms(rows, widened(_logits(part)), columns == labels[:, None])
  if exponents is not None:
    exponents = jnp.where(new, exponents, _EXCLUDED)
  return exponents, jax.tree.map(lambda term: jnp.where(new, term, 0), sums)


def _forward(terms, chunk_size, labels, rows, outputs):
  result = _reduce_flat(terms, chunk_size, labels, rows, outputs)
  return result, (labels, rows, outputs, result[0])


def _backward(terms, chunk_size, residuals, cotangents):
  labels, rows, outputs, log_sum = residuals
  log_sum_dot, sums_dot = cotangents

  def body(index, carry):
    rows_bar, outputs_bar = carry
    part, columns, new = _chunk(index, chunk_size, outputs)
    (exponents, sums), pull = jax.vjp(lambda r, p: _masked(terms, labels, r, p, columns, new), rows, part)
    weights = None
    if exponents is not None:
      powers = jnp.exp(exponents - log_sum.largest[:, None] - log_sum.log_total[:, None])
      weights = log_sum_dot.log_total[:, None] * powers
    bars = jax.tree.map(lambda bar, term: jnp.broadcast_to(bar[:, None], term.shape), sums_dot, sums)
    rows_part, outputs_part = pull((weights, bars))
    return jax.tree.map(jnp.add, rows_bar, rows_part), _accumulate(outputs_bar, outputs_part, columns[0])

  zeros = jax.tree.map(jnp.zeros_like, (rows, outputs))
  if isinstance(outputs, OutputLayer):  # many small parts are added up
    zeros = zeros[0], zeros[1]._replace(features=widened(zeros[1].features))
  rows_bar, outputs_bar = jax.lax.fori_loop(0, _count(outputs, chunk_size), body, zeros)
  return None, rows_bar, jax.tree.map(lambda bar, x: bar.astype(x.dtype), outputs_bar, outputs)


def _accumulate(total: Any, part: Any, start):
  """Adds the chunk's gradients in place; that of the features gathers over all chunks."""

  def add(whole, piece):
    old = jax.lax.dynamic_slice_in_dim(whole, start, piece.shape[-1], -1)
    return jax.lax.dynamic_update_slice_in_dim(whole, old + piece, start, -1)

  added = _map_classes(add, total, part)
  return added._replace(features=total.features + part.features) if isinstance(total, OutputLayer) else added


_reduce_flat.defvjp(_forward, _backward)
