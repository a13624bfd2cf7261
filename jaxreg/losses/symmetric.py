"""Bounded losses that tolerate wrong labels, symmetric ones and those near to them; one value per example.

A loss is symmetric when its sum over all labels is constant.
"""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxreg.losses.labelled_logits import labelled
from jaxreg.losses.softmax_family import label_log_probability, label_statistics, of_label, softmax_row

__all__ = [
  "brier_loss",
  "jensen_shannon_loss",
  "mean_absolute_error_loss",
  "reverse_cross_entropy_loss",
  "robust_log_loss",
  "symmetric_cross_entropy_loss",
]

# log(1e-4), the usual stand-in for log 0 where reverse cross-entropy is a passive term.
LOG_ZERO = -9.210340371976182


def symmetric_cross_entropy_loss(
  logits: ArrayLike,
  labels: ArrayLike,
  *,
  balance: ArrayLike = 0.5,
  log_zero: ArrayLike = -4.0,
  axis: int = -1,
  where: ArrayLike | None = None,
) -> jax.Array:
  """SCE: `-(1 - b) log p_y - b A (1 - p_y)`, cross-entropy and reverse cross-entropy, weighted `1 - b` and `b`.

  >>> import jax.numpy as jnp
  >>> symmetric_cross_entropy_loss(jnp.zeros((1, 4)), jnp.array([2]), balance=1.0).tolist()
  [3.0]

  Args:
    logits: floating `[..., classes]`.
    labels: integers `[...]`.
    balance: b in [0, 1]; the paper's alpha and beta are `1 - b` and `b` up to a common factor; may be traced.
    log_zero: the paper's A, at most 0: stands for the logarithm of the label distribution's zeros; may be traced.
    axis: the axis of the classes.
    where: boolean, broadcasting against `logits`: the classes that take part, the label among them.

  Returns:
    `[...]`, the loss of each example.

  Raises:
    ValueError: when labels do not fit the logits or a hyperparameter is out of range.

  Reference: Wang, Ma, Chen, Luo, Yi, Bailey, "Symmetric Cross Entropy for Robust Learning with Noisy Labels", ICCV
    2019, the SL loss.
  """
  batch = labelled(logits, labels, axis=axis, where=where)
  balance = batch.hyperparameter("balance", balance, low=0, high=1)
  log_zero = batch.hyperparameter("log_zero", log_zero, high=0)
  log_p = label_log_probability(batch)
  return batch.values(-(1 - balance) * log_p + balance * log_zero * jnp.expm1(log_p))


def mean_absolute_error_loss(
  logits: ArrayLike, labels: ArrayLike, *, axis: int = -1, where: ArrayLike | None = None
) -> jax.Array:
  """MAE: `sum_k |p_k - [k = y]| = 2 (1 - p_y)`, the L1 distance between the softmax and the one-hot label.

  Its sum over all labels is constant (a symmetric loss): robust to uniform label noise, and slow to train.

  >>> import jax.numpy as jnp
  >>> mean_absolute_error_loss(jnp.zeros((1, 4)), jnp.array([2])).tolist()
  [1.5]

  Args:
    logits: floating `[..., classes]`.
    labels: integers `[...]`.
    axis: the axis of the classes.
    where: boolean, broadcasting against `logits`: the classes that take part, the label among them.

  Returns:
    `[...]`, the loss of each example, in [0, 2].

  Raises:
    ValueError: when labels do not fit the logits.

  Reference: Ghosh, Kumar, Sastry, "Robust Loss Functions under Label Noise for Deep Neural Networks", AAAI 2017, the
    MAE loss.
  """
  batch = labelled(logits, labels, axis=axis, where=where)
  return batch.values(-2 * jnp.expm1(label_log_probability(batch)))


def brier_loss(logits: ArrayLike, labels: ArrayLike, *, axis: int = -1, where: ArrayLike | None = None) -> jax.Array:
  """MSE on probabilities (Brier score): `sum_k (p_k - [k = y])^2` with `p = softmax(logits)`.

  >>> import jax.numpy as jnp
  >>> brier_loss(jnp.zeros((1, 4)), jnp.array([2])).tolist()
  [0.75]

  Args:
    logits: floating `[..., classes]`.
    labels: integers `[...]`.
    axis: the axis of the classes.
    where: boolean, broadcasting against `logits`: the classes that take part, the label among them.

  Returns:
    `[...]`, the loss of each example, in [0, 2].

  Raises:
    ValueError: when labels do not fit the logits.

  Reference: Ghosh, Kumar, Sastry, "Robust Loss Functions under Label Noise for Deep Neural Networks", AAAI 2017, the
    MSE loss.
  """
  batch = labelled(logits, labels, axis=axis, where=where)
  return batch.values(label_statistics(batch).square_error)


def jensen_shannon_loss(
  logits: ArrayLike,
  labels: ArrayLike,
  *,
  label_weight: ArrayLike = 0.5,
  axis: int = -1,
  where: ArrayLike | None = None,
) -> jax.Array:
  """JS: `(w KL(e_y || m) + (1 - w) KL(p || m)) / (-(1 - w) log(1 - w))` with the mixture `m = w e_y + (1 - w) p`.

  The scaling makes `w -> 0` cross-entropy and `w -> 1` half of MAE, `1 - p_y`.

  >>> import jax.numpy as jnp
  >>> logits, labels = jnp.array([[2.0, 0.0], [0.0, 2.0]]), jnp.array([0, 0])
  >>> [round(value, 2) for value in jensen_shannon_loss(logits, labels, label_weight=0.5).tolist()]
  [0.12, 1.45]

  Args:
    logits: floating `[..., classes]`.
    labels: integers `[...]`.
    label_weight: the paper's pi_1, in (0, 1); may be traced.
    axis: the axis of the classes.
    where: boolean, broadcasting against `logits`: the classes that take part, the label among them.

  Returns:
    `[...]`, the loss of each example; bounded.

  Raises:
    ValueError: when labels do not fit the logits or `label_weight` is out of range.

  Reference: Englesson, Azizpour, "Generalized Jensen-Shannon Divergence Loss for Learning with Noisy Labels", NeurIPS
    2021, the JS loss.
  """
  batch = labelled(logits, labels, axis=axis, where=where)
  weight = batch.hyperparameter("label_weight", label_weight, low=0, high=1, open_low=True, open_high=True)
  log_p = label_log_probability(batch)
  log_weight, log_rest = jnp.log(weight), jnp.log1p(-weight)
  log_mixture = jnp.logaddexp(log_weight, log_rest + log_p)
  # log(m_y / p_y) of its own: as a difference of logarithms it would drown in rounding for small weights.
  log_ratio = jnp.logaddexp(log_rest, log_weight - log_p)
  divergence = -weight * log_mixture + (1 - weight) * (jnp.expm1(log_p) * log_rest - jnp.exp(log_p) * log_ratio)
  return batch.values(divergence / -((1 - weight) * log_rest))


def reverse_cross_entropy_loss(
  logits: ArrayLike,
  labels: ArrayLike,
  *,
  log_zero: ArrayLike = LOG_ZERO,
  axis: int = -1,
  where: ArrayLike | None = None,
) -> jax.Array:
  """RCE: `-sum_k p_k log [k = y] = -A (1 - p_y)` with a finite `A` in place of `log 0`.

  >>> import jax.numpy as jnp
  >>> reverse_cross_entropy_loss(jnp.zeros((1, 4)), jnp.array([2]), log_zero=-4.0).tolist()
  [3.0]

  Args:
    logits: floating `[..., classes]`.
    labels: integers `[...]`.
    log_zero: the papers' A, at most 0; may be traced. The default is `log(1e-4)`.
    axis: the axis of the classes.
    where: boolean, broadcasting against `logits`: the classes that take part, the label among them.

  Returns:
    `[...]`, the loss of each example, in `[0, -log_zero]`.

  Raises:
    ValueError: when labels do not fit the logits or `log_zero` is positive.

  Reference: Wang, Ma, Chen, Luo, Yi, Bailey, "Symmetric Cross Entropy for Robust Learning with Noisy Labels", ICCV
    2019, the RCE loss.
  """
  batch = labelled(logits, labels, axis=axis, where=where)
  return batch.values(reverse_cross_entropy(batch, label_log_probability(batch), log_zero))


def robust_log_loss(
  logits: ArrayLike,
  labels: ArrayLike,
  *,
  alpha: ArrayLike = 0.01,
  axis: int = -1,
  where: ArrayLike | None = None,
) -> jax.Array:
  """RLL: `log((a + 1) / a) - log(a + p_y) + sum_{k != y} log(a + p_k) / (classes - 1)`, bounded and symmetric.

  >>> import jax.numpy as jnp
  >>> loss = robust_log_loss(jnp.array([[9.0, 0.0], [0.0, 0.0]]), jnp.array([0, 0]), alpha=0.1)
  >>> [round(value, 2) for value in loss.tolist()]
  [0.0, 2.4]

  Args:
    logits: floating `[..., classes]`, two classes at least.
    labels: integers `[...]`.
    alpha: positive; may be traced.
    axis: the axis of the classes.
    where: boolean, broadcasting against `logits`: the classes that take part, the label among them.

  Returns:
    `[...]`, the loss of each example, non-negative; its sum over all labels is `classes * log((a + 1) / a)`.

  Raises:
    ValueError: when labels do not fit the logits or `alpha` is not positive.

  Reference: Patel, Sastry, "Memorization in Deep Neural Networks: Does the Loss Function Matter?", PAKDD 2021, the RLL
    loss.
  """
  batch = labelled(logits, labels, axis=axis, where=where)
  alpha = batch.hyperparameter("alpha", alpha, low=0, open_low=True, scalar=True)
  return batch.values(_robust_log(batch.logits, alpha, batch.labels, batch.where))


@jax.custom_jvp
def _robust_log(wide, alpha, labels, where):
  return _robust_log_value(softmax_row(wide, labels, where), alpha)


def _robust_log_value(row, alpha):
  others = jnp.sum(jnp.log1p(row.powers * (1 / (row.total * alpha))), axis=-1, keepdims=True)
  count = jnp.maximum(row.classes - 1, 1)
  return (others / count + jnp.log1p(alpha) - jnp.log(alpha + row.label))[..., 0]


@_robust_log.defjvp
def _robust_log_jvp(primals, tangents):
  wide, alpha, labels, where = primals
  row = softmax_row(wide, labels, where)
  count = jnp.maximum(row.classes - 1, 1)
  # Elasticities p / (alpha + p): mean of the other classes', and the label's. Written so that sum and gradient share no
  # array but the powers, which XLA would store.
  total = jnp.sum(row.powers / (row.powers + alpha * row.total), axis=-1, keepdims=True) / count
  own = row.label / (alpha + row.label)
  gradient = row.powers * (1 / (count * row.powers + count * alpha * row.total) - (total - own) / row.total)
  dot = jnp.sum(gradient * tangents[0], axis=-1, keepdims=True)
  dot -= (own + row.label * (total - own)) * of_label(tangents[0], labels)
  dot += (1 / (1 + alpha) - 1 / (alpha + row.label) - total / alpha) * tangents[1]
  return _robust_log_value(row, alpha), dot[..., 0]


def reverse_cross_entropy(batch, log_p, log_zero):
  """The loss as a function of `log p_y`."""
  return batch.hyperparameter("log_zero", log_zero, high=0) * jnp.expm1(log_p)
