"""StableMax: softmax with a piecewise linear and reciprocal map in place of the exponential, and its cross-entropy."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxreg.checks import as_array, check_float, check_same_shape
from jaxreg.losses.labelled_logits import classes_last, labelled, narrowed

__all__ = ["log_stablemax", "stablemax", "stablemax_cross_entropy", "stablemax_cross_entropy_with_soft_labels"]

# Below every remapped logit (they lie within +-710 even in float64), so that its exponential is 0.
_EXCLUDED = -1e4


def stablemax(logits: ArrayLike, *, axis: int = -1, where: ArrayLike | None = None) -> jax.Array:
  """StableMax probabilities `s(z_i) / sum_j s(z_j)`, with `s(z) = 1 + z` for `z >= 0` and `1 / (1 - z)` for `z < 0`.

  It never saturates exponentially: a gap between two logits is forgotten only when it is itself lost to rounding. It is
  not invariant to adding a constant to all logits.

  >>> import jax.numpy as jnp
  >>> [round(p, 3) for p in stablemax(jnp.array([1.0, 0.0, -1.0])).tolist()]
  [0.571, 0.286, 0.143]

  Args:
    logits: floating array with the classes along `axis`.
    axis: the axis of the classes.
    where: boolean, broadcasting against `logits`: the classes that take part; the others have probability 0.

  Returns:
    Probabilities, shaped like `logits` and of its dtype.

  Raises:
    ValueError: when `logits` is not floating point.

  Reference: Prieto, Barsbey, Mediano, Birdal, "Grokking at the Edge of Numerical Stability", ICLR 2025, Definition 4.
  """
  z, included = classes_last(logits, axis=axis, where=where)
  ratio = _ratio_to_largest(z, included, _largest(z, included))
  total = jnp.sum(ratio, axis=-1, keepdims=True)
  # A row without any class has total 0.
  return jnp.moveaxis(ratio / jnp.where(total > 0, total, 1), -1, axis).astype(jnp.result_type(logits))


def log_stablemax(logits: ArrayLike, *, axis: int = -1, where: ArrayLike | None = None) -> jax.Array:
  """Logarithm of StableMax, `log_softmax(g(z))` with the remapped logits `g(z) = sign(z) log(1 + |z|)`.

  >>> import jax, jax.numpy as jnp
  >>> logits = jnp.array([3.0, 0.0, -3.0])
  >>> remapped = jnp.log(jnp.array([4.0, 1.0, 0.25]))
  >>> bool(jnp.allclose(log_stablemax(logits), jax.nn.log_softmax(remapped)))
  True

  Args:
    logits: floating array with the classes along `axis`.
    axis: the axis of the classes.
    where: boolean, broadcasting against `logits`: the classes that take part; the others get `-inf`.

  Returns:
    Log-probabilities, shaped like `logits` and of its dtype.

  Raises:
    ValueError: when `logits` is not floating point.

  Reference: Prieto, Barsbey, Mediano, Birdal, "Grokking at the Edge of Numerical Stability", ICLR 2025, Proposition 1.
  """
  z, included = classes_last(logits, axis=axis, where=where)
  log_probabilities = _log_probabilities(z, included)
  if included is not None:
    log_probabilities = jnp.where(included, log_probabilities, -jnp.inf)
  return jnp.moveaxis(log_probabilities, -1, axis).astype(jnp.result_type(logits))


def stablemax_cross_entropy(
  logits: ArrayLike, labels: ArrayLike, *, axis: int = -1, where: ArrayLike | None = None
) -> jax.Array:
  """StableMax cross-entropy (StCE) of integer labels, `log(1 + sum_{k != y} s(z_k) / s(z_y))`.

  The gradient is `(q_k - [k = y]) / (1 + |z_k|)` with `q = stablemax(z)`. Both are computed without the difference
  `1 - q_y`, so that neither rounds to zero however confident the prediction is.

  >>> import jax.numpy as jnp
  >>> round(float(stablemax_cross_entropy(jnp.array([[20.0, 0.0, 0.0]]), jnp.array([0]))[0]), 3)
  0.091

  Args:
    logits: floating `[..., classes]`.
    labels: integers `[...]`.
    axis: the axis of the classes.
    where: boolean, broadcasting against `logits`: the classes that take part; the label's class always does.

  Returns:
    `[...]`, the loss of each example in the dtype of `logits`.

  Raises:
    ValueError: when labels do not fit the logits.

  Reference: Prieto, Barsbey, Mediano, Birdal, "Grokking at the Edge of Numerical Stability", ICLR 2025, Section 4.1.
  """
  batch = labelled(logits, labels, axis=axis, where=where)
  return batch.values(_cross_entropy(batch.logits, batch.labels, batch.where))


def stablemax_cross_entropy_with_soft_labels(
  logits: ArrayLike, labels: ArrayLike, *, axis: int = -1, where: ArrayLike | None = None
) -> jax.Array:
  """StableMax cross-entropy of dense targets, `-sum_k t_k log stablemax(z)_k`.

  >>> import jax.numpy as jnp
  >>> round(float(stablemax_cross_entropy_with_soft_labels(jnp.zeros((1, 2)), jnp.array([[0.5, 0.5]]))[0]), 3)
  0.693

  Args:
    logits: floating `[..., classes]`.
    labels: target weights, shaped like `logits`; usually a distribution along `axis`.
    axis: the axis of the classes.
    where: boolean, broadcasting against `logits`: the classes that take part.

  Returns:
    `[...]`, the loss of each example in the dtype of `logits`.

  Raises:
    ValueError: when `logits` or `labels` are not floating point or their shapes differ.

  Reference: Prieto, Barsbey, Mediano, Birdal, "Grokking at the Edge of Numerical Stability", ICLR 2025, Section 4.1.
  """
  logits, labels = as_array("logits", logits), as_array("labels", labels)
  check_float("labels", labels)
  check_same_shape(logits=logits, labels=labels)
  z, included = classes_last(logits, axis=axis, where=where)
  terms = jnp.moveaxis(labels, axis, -1).astype(z.dtype) * _log_probabilities(z, included)
  return narrowed(-jnp.sum(terms, axis=-1, where=included), logits.dtype)


def remap(z):
  """`sign(z) log(1 + |z|)`; the sign form itself has derivative 0 instead of 1 at zero."""
  positive = z >= 0
  return jnp.where(positive, jnp.log1p(jnp.where(positive, z, 0)), -jnp.log1p(-jnp.where(positive, 0, z)))


def _log_probabilities(z, included):
  remapped = remap(z)
  if included is not None:
    remapped = jnp.where(included, remapped, _EXCLUDED)
  return jax.nn.log_softmax(remapped, axis=-1)


def _largest(z, included):
  return jax.lax.stop_gradient(jnp.max(z, axis=-1, keepdims=True, where=included, initial=jnp.finfo(z.dtype).min))


def _ratio_to_largest(z, included, largest):
  """`s(z) / s(largest)`, in [0, 1] whatever the size of the logits."""
  ratio = _ratio(z, largest)
  return ratio if included is None else jnp.where(included, ratio, 0)


def _ratio(z, largest):
  """`s(z) / s(largest)` with one division, exactly 1 for equal logits of any size."""
  positive = z >= 0
  numerator = jnp.where(positive, 1 + jnp.where(positive, z, 0), 1 - jnp.minimum(largest, 0))
  denominator = (1 + jnp.maximum(largest, 0)) * jnp.where(positive, 1, 1 - jnp.where(positive, 0, z))
  return numerator / denominator


def _parts(z, labels, included):
  """What loss and gradient share: the largest and the label's logit, the other classes' ratios and the label's own."""
  of_label = labels[..., None] == jnp.arange(z.shape[-1], dtype=jnp.int32)
  label_logit = jnp.take_along_axis(z, labels[..., None], axis=-1)
  largest = jnp.maximum(_largest(z, included), jax.lax.stop_gradient(label_logit))
  others = jnp.where(of_label, 0, _ratio_to_largest(z, included, largest))
  own = _ratio(label_logit, largest)
  return of_label, label_logit, largest, others, own


@jax.custom_jvp
def _cross_entropy(z, labels, included):
  return _value(*_parts(z, labels, included)[1:])


def _value(label_logit, largest, others, own):
  rest = jnp.sum(others, axis=-1, keepdims=True)
  # own is 1 when the label has the largest logit: then this is exactly log1p(rest).
  return (jnp.log1p(rest + (own - 1)) + (remap(largest) - remap(label_logit)))[..., 0]


@_cross_entropy.defjvp
def _cross_entropy_jvp(primals, tangents):
  z, labels, included = primals
  of_label, label_logit, largest, others, own = _parts(z, labels, included)
  rest = jnp.sum(others, axis=-1, keepdims=True)
  gradient = jnp.where(of_label, -rest, others) / ((rest + own) * (1 + jnp.abs(z)))
  return _value(label_logit, largest, others, own), jnp.sum(gradient * tangents[0], axis=-1)
