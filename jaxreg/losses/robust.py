"""Losses that tolerate wrong labels: bounded, symmetric, asymmetric and hinge losses, each one value per example."""

import jax
import jax.numpy as jnp
import optax

from jaxreg.checks import check_hyperparameter, check_integer_labels
from jaxreg.losses.softmax_family import of_label, softmax_row, softmax_statistics, with_label

__all__ = [
  "asymmetric_generalized_cross_entropy_loss",
  "asymmetric_unhinged_loss",
  "brier_loss",
  "crammer_singer_loss",
  "jensen_shannon_loss",
  "mean_absolute_error_loss",
  "nce_agce_loss",
  "nce_aul_loss",
  "nce_rce_loss",
  "normalized_cross_entropy_loss",
  "reverse_cross_entropy_loss",
  "robust_log_loss",
  "symmetric_cross_entropy_loss",
  "truncated_generalized_cross_entropy_loss",
  "weston_watkins_loss",
]

# log(1e-4), the usual stand-in for log 0 where reverse cross-entropy is a passive term.
_LOG_ZERO = -9.210340371976182


def truncated_generalized_cross_entropy_loss(
  logits: jax.Array,
  labels: jax.Array,
  *,
  q: float | jax.Array = 0.7,
  threshold: float | jax.Array = 0.5,
  axis: int = -1,
  where: jax.Array | None = None,
) -> jax.Array:
  """Generalized cross-entropy `(1 - max(p_y, k)^q) / q`, constant where the label's probability is below `k`.

  Examples below the threshold have no gradient, so warm up with `generalized_cross_entropy_loss`.

  >>> import jax.numpy as jnp
  >>> logits = jnp.log(jnp.array([[0.8, 0.2], [0.2, 0.8], [0.1, 0.9]]))
  >>> loss = truncated_generalized_cross_entropy_loss(logits, jnp.array([0, 0, 0]), q=1.0, threshold=0.5)
  >>> [round(value, 3) for value in loss.tolist()]
  [0.2, 0.5, 0.5]

  Args:
    logits: floating `[..., classes]`.
    labels: integers `[...]`.
    q: in [0, 1]; 0 is truncated cross-entropy; may be traced.
    threshold: the paper's k, in [0, 1); 0 truncates nothing; may be traced.
    axis: the axis of the classes.
    where: boolean, broadcasting against `logits`: the classes that take part, the label among them.

  Returns:
    `[...]`, the loss of each example.

  Raises:
    ValueError: when labels do not fit the logits or a hyperparameter is out of range.

  Reference: Zhang, Sabuncu, "Generalized Cross Entropy Loss for Training Deep Neural Networks with Noisy Labels",
    NeurIPS 2018, the truncated loss (Section 3.3).
  """
  check_hyperparameter("q", q, low=0, high=1)
  check_hyperparameter("threshold", threshold, low=0, high=1, open_high=True)
  log_p = _label_log_probability(logits, labels, axis, where)
  log_p = jnp.maximum(log_p, jnp.log(jnp.asarray(threshold, log_p.dtype)))
  q = jnp.asarray(q, log_p.dtype)
  safe = jnp.where(q > 0, q, 1)
  # The series at q = 0 has the right derivative with respect to q as well.
  value = jnp.where(q > 0, -jnp.expm1(safe * log_p) / safe, -log_p - q * log_p**2 / 2)
  return value.astype(logits.dtype)


def symmetric_cross_entropy_loss(
  logits: jax.Array,
  labels: jax.Array,
  *,
  balance: float | jax.Array = 0.5,
  log_zero: float | jax.Array = -4.0,
  axis: int = -1,
  where: jax.Array | None = None,
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
  check_hyperparameter("balance", balance, low=0, high=1)
  check_hyperparameter("log_zero", log_zero, high=0)
  log_p = _label_log_probability(logits, labels, axis, where)
  value = -(1 - balance) * log_p + balance * log_zero * jnp.expm1(log_p)
  return value.astype(logits.dtype)


def mean_absolute_error_loss(
  logits: jax.Array, labels: jax.Array, *, axis: int = -1, where: jax.Array | None = None
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
  return (-2 * jnp.expm1(_label_log_probability(logits, labels, axis, where))).astype(logits.dtype)


def brier_loss(logits: jax.Array, labels: jax.Array, *, axis: int = -1, where: jax.Array | None = None) -> jax.Array:
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
  return _statistics(logits, labels, axis, where).square_error.astype(logits.dtype)


def jensen_shannon_loss(
  logits: jax.Array,
  labels: jax.Array,
  *,
  label_weight: float | jax.Array = 0.5,
  axis: int = -1,
  where: jax.Array | None = None,
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
  check_hyperparameter("label_weight", label_weight, low=0, high=1, open_low=True, open_high=True)
  log_p = _label_log_probability(logits, labels, axis, where)
  weight = jnp.asarray(label_weight, log_p.dtype)
  log_weight, log_rest = jnp.log(weight), jnp.log1p(-weight)
  log_mixture = jnp.logaddexp(log_weight, log_rest + log_p)
  # log(m_y / p_y) of its own: as a difference of logarithms it would drown in rounding for small weights.
  log_ratio = jnp.logaddexp(log_rest, log_weight - log_p)
  divergence = -weight * log_mixture + (1 - weight) * (jnp.expm1(log_p) * log_rest - jnp.exp(log_p) * log_ratio)
  return (divergence / -((1 - weight) * log_rest)).astype(logits.dtype)


def normalized_cross_entropy_loss(
  logits: jax.Array, labels: jax.Array, *, axis: int = -1, where: jax.Array | None = None
) -> jax.Array:
  """NCE: `log p_y / sum_k log p_k`, cross-entropy as a share of its sum over all labels.

  >>> import jax.numpy as jnp
  >>> normalized_cross_entropy_loss(jnp.zeros((1, 4)), jnp.array([2])).tolist()
  [0.25]

  Args:
    logits: floating `[..., classes]`, two classes at least.
    labels: integers `[...]`.
    axis: the axis of the classes.
    where: boolean, broadcasting against `logits`: the classes that take part, the label among them.

  Returns:
    `[...]`, the loss of each example, in [0, 1]; its sum over all labels is 1. Zero when one class only takes part.

  Raises:
    ValueError: when labels do not fit the logits.

  Reference: Ma, Huang, Wang, Romano, Erfani, Bailey, "Normalized Loss Functions for Deep Learning with Noisy Labels",
    ICML 2020, the NCE loss.
  """
  return _nce(_statistics(logits, labels, axis, where)).astype(logits.dtype)


def reverse_cross_entropy_loss(
  logits: jax.Array,
  labels: jax.Array,
  *,
  log_zero: float | jax.Array = _LOG_ZERO,
  axis: int = -1,
  where: jax.Array | None = None,
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
  return _rce(_label_log_probability(logits, labels, axis, where), log_zero).astype(logits.dtype)


def asymmetric_generalized_cross_entropy_loss(
  logits: jax.Array,
  labels: jax.Array,
  *,
  offset: float | jax.Array = 1.0,
  q: float | jax.Array = 2.0,
  axis: int = -1,
  where: jax.Array | None = None,
) -> jax.Array:
  """AGCE: `((a + 1)^q - (a + p_y)^q) / q`; generalized cross-entropy at `a = 0`, `1 - p_y` at `q = 1`.

  >>> import jax.numpy as jnp
  >>> loss = asymmetric_generalized_cross_entropy_loss(jnp.zeros((1, 2)), jnp.array([0]), offset=1.0, q=2.0)
  >>> round(loss.item(), 3)
  0.875

  Args:
    logits: floating `[..., classes]`.
    labels: integers `[...]`.
    offset: the paper's a, non-negative; may be traced.
    q: positive; may be traced.
    axis: the axis of the classes.
    where: boolean, broadcasting against `logits`: the classes that take part, the label among them.

  Returns:
    `[...]`, the loss of each example.

  Raises:
    ValueError: when labels do not fit the logits or a hyperparameter is out of range.

  Reference: Zhou, Liu, Jiang, Gao, Ji, "Asymmetric Loss Functions for Learning with Noisy Labels", ICML 2021, the AGCE
    loss.
  """
  return _agce(_label_log_probability(logits, labels, axis, where), offset, q).astype(logits.dtype)


def asymmetric_unhinged_loss(
  logits: jax.Array,
  labels: jax.Array,
  *,
  offset: float | jax.Array = 1.5,
  q: float | jax.Array = 0.9,
  axis: int = -1,
  where: jax.Array | None = None,
) -> jax.Array:
  """AUL: `((a - p_y)^q - (a - 1)^q) / q`; `1 - p_y` at `q = 1`.

  >>> import jax.numpy as jnp
  >>> loss = asymmetric_unhinged_loss(jnp.zeros((1, 2)), jnp.array([0]), offset=2.0, q=2.0)
  >>> round(loss.item(), 3)
  0.625

  Args:
    logits: floating `[..., classes]`.
    labels: integers `[...]`.
    offset: the paper's a, greater than 1; may be traced.
    q: positive; may be traced.
    axis: the axis of the classes.
    where: boolean, broadcasting against `logits`: the classes that take part, the label among them.

  Returns:
    `[...]`, the loss of each example.

  Raises:
    ValueError: when labels do not fit the logits or a hyperparameter is out of range.

  Reference: Zhou, Liu, Jiang, Gao, Ji, "Asymmetric Loss Functions for Learning with Noisy Labels", ICML 2021, the AUL
    loss.
  """
  return _aul(_label_log_probability(logits, labels, axis, where), offset, q).astype(logits.dtype)


def nce_rce_loss(
  logits: jax.Array,
  labels: jax.Array,
  *,
  active_weight: float | jax.Array = 1.0,
  passive_weight: float | jax.Array = 1.0,
  log_zero: float | jax.Array = _LOG_ZERO,
  axis: int = -1,
  where: jax.Array | None = None,
) -> jax.Array:
  """NCE+RCE: `active_weight * NCE + passive_weight * RCE`, a symmetric loss that trains better than either part.

  >>> import jax.numpy as jnp
  >>> nce_rce_loss(jnp.zeros((1, 4)), jnp.array([2]), active_weight=2.0, log_zero=-4.0).tolist()
  [3.5]

  Args:
    logits: floating `[..., classes]`, two classes at least.
    labels: integers `[...]`.
    active_weight: the paper's alpha, non-negative; may be traced.
    passive_weight: the paper's beta, non-negative; may be traced.
    log_zero: see `reverse_cross_entropy_loss`.
    axis: the axis of the classes.
    where: boolean, broadcasting against `logits`: the classes that take part, the label among them.

  Returns:
    `[...]`, the loss of each example.

  Raises:
    ValueError: when labels do not fit the logits or a hyperparameter is out of range.

  Reference: Ma, Huang, Wang, Romano, Erfani, Bailey, "Normalized Loss Functions for Deep Learning with Noisy Labels",
    ICML 2020, active passive loss (Section 4).
  """
  statistics = _statistics(logits, labels, axis, where)
  passive = _rce(statistics.log_label, log_zero)
  return _active_passive(_nce(statistics), passive, active_weight, passive_weight).astype(logits.dtype)


def nce_agce_loss(
  logits: jax.Array,
  labels: jax.Array,
  *,
  active_weight: float | jax.Array = 1.0,
  passive_weight: float | jax.Array = 1.0,
  offset: float | jax.Array = 3.0,
  q: float | jax.Array = 1.5,
  axis: int = -1,
  where: jax.Array | None = None,
) -> jax.Array:
  """NCE+AGCE: `active_weight * NCE + passive_weight * AGCE`.

  >>> import jax.numpy as jnp
  >>> nce_agce_loss(jnp.zeros((1, 4)), jnp.array([2]), passive_weight=0.0).tolist()
  [0.25]

  Args:
    logits: floating `[..., classes]`, two classes at least.
    labels: integers `[...]`.
    active_weight: the paper's alpha, non-negative; may be traced.
    passive_weight: the paper's beta, non-negative; may be traced.
    offset: see `asymmetric_generalized_cross_entropy_loss`.
    q: see `asymmetric_generalized_cross_entropy_loss`.
    axis: the axis of the classes.
    where: boolean, broadcasting against `logits`: the classes that take part, the label among them.

  Returns:
    `[...]`, the loss of each example.

  Raises:
    ValueError: when labels do not fit the logits or a hyperparameter is out of range.

  Reference: Zhou, Liu, Jiang, Gao, Ji, "Asymmetric Loss Functions for Learning with Noisy Labels", ICML 2021, NCE+AGCE.
  """
  statistics = _statistics(logits, labels, axis, where)
  passive = _agce(statistics.log_label, offset, q)
  return _active_passive(_nce(statistics), passive, active_weight, passive_weight).astype(logits.dtype)


def nce_aul_loss(
  logits: jax.Array,
  labels: jax.Array,
  *,
  active_weight: float | jax.Array = 1.0,
  passive_weight: float | jax.Array = 1.0,
  offset: float | jax.Array = 6.0,
  q: float | jax.Array = 1.5,
  axis: int = -1,
  where: jax.Array | None = None,
) -> jax.Array:
  """NCE+AUL: `active_weight * NCE + passive_weight * AUL`.

  >>> import jax.numpy as jnp
  >>> nce_aul_loss(jnp.zeros((1, 4)), jnp.array([2]), passive_weight=0.0).tolist()
  [0.25]

  Args:
    logits: floating `[..., classes]`, two classes at least.
    labels: integers `[...]`.
    active_weight: the paper's alpha, non-negative; may be traced.
    passive_weight: the paper's beta, non-negative; may be traced.
    offset: see `asymmetric_unhinged_loss`.
    q: see `asymmetric_unhinged_loss`.
    axis: the axis of the classes.
    where: boolean, broadcasting against `logits`: the classes that take part, the label among them.

  Returns:
    `[...]`, the loss of each example.

  Raises:
    ValueError: when labels do not fit the logits or a hyperparameter is out of range.

  Reference: Zhou, Liu, Jiang, Gao, Ji, "Asymmetric Loss Functions for Learning with Noisy Labels", ICML 2021, NCE+AUL.
  """
  statistics = _statistics(logits, labels, axis, where)
  passive = _aul(statistics.log_label, offset, q)
  return _active_passive(_nce(statistics), passive, active_weight, passive_weight).astype(logits.dtype)


def crammer_singer_loss(
  logits: jax.Array,
  labels: jax.Array,
  *,
  margin: float | jax.Array = 1.0,
  axis: int = -1,
  where: jax.Array | None = None,
) -> jax.Array:
  """Crammer-Singer hinge: `max(0, margin + max_{k != y} f_k - f_y)`; at margin 1 `optax.losses.multiclass_hinge_loss`.

  >>> import jax.numpy as jnp
  >>> crammer_singer_loss(jnp.array([[3.0, 1.0, 2.5]]), jnp.array([0]), margin=1.0).tolist()
  [0.5]

  Args:
    logits: floating `[..., classes]`.
    labels: integers `[...]`.
    margin: non-negative; may be traced.
    axis: the axis of the classes.
    where: boolean, broadcasting against `logits`: the classes that take part, the label among them.

  Returns:
    `[...]`, the loss of each example.

  Raises:
    ValueError: when labels do not fit the logits or `margin` is negative.

  Reference: Crammer, Singer, "On the Algorithmic Implementation of Multiclass Kernel-based Vector Machines", JMLR 2001.
  """
  check_hyperparameter("margin", margin, low=0)
  wide, where = _classes_last(logits, labels, axis, where)
  wide = wide if where is None else jnp.where(where, wide, jnp.finfo(wide.dtype).min)
  violation = margin + (_largest_other(wide, labels) - of_label(wide, labels))[..., 0]
  return jax.nn.relu(violation).astype(logits.dtype)


def weston_watkins_loss(
  logits: jax.Array,
  labels: jax.Array,
  *,
  margin: float | jax.Array = 1.0,
  axis: int = -1,
  where: jax.Array | None = None,
) -> jax.Array:
  """Weston-Watkins hinge: `mean_k max(0, margin + f_k - f_y)`, where the label itself counts as 0.

  The mean is over all classes, as in Zhu, Ying and Yang's comparison; the original sums.

  >>> import jax.numpy as jnp
  >>> weston_watkins_loss(jnp.array([[3.0, 1.0, 2.5, 3.0]]), jnp.array([0]), margin=1.0).tolist()
  [0.375]

  Args:
    logits: floating `[..., classes]`.
    labels: integers `[...]`.
    margin: non-negative; may be traced.
    axis: the axis of the classes.
    where: boolean, broadcasting against `logits`: the classes that take part, the label among them.

  Returns:
    `[...]`, the loss of each example.

  Raises:
    ValueError: when labels do not fit the logits or `margin` is negative.

  Reference: Weston, Watkins, "Support Vector Machines for Multi-class Pattern Recognition", ESANN 1999.
  """
  check_hyperparameter("margin", margin, low=0)
  wide, where = _classes_last(logits, labels, axis, where)
  count = wide.shape[-1]
  if where is not None:
    wide, count = jnp.where(where, wide, jnp.finfo(wide.dtype).min), jnp.sum(where, axis=-1)
  return (_violations(wide, labels, jnp.asarray(margin, wide.dtype)) / count).astype(logits.dtype)


def robust_log_loss(
  logits: jax.Array,
  labels: jax.Array,
  *,
  alpha: float | jax.Array = 0.01,
  axis: int = -1,
  where: jax.Array | None = None,
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
  check_hyperparameter("alpha", alpha, low=0, open_low=True)
  wide, where = _classes_last(logits, labels, axis, where)
  return _robust_log(wide, jnp.asarray(alpha, wide.dtype), labels, where).astype(logits.dtype)


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


@jax.custom_jvp
def _violations(wide, labels, margin):
  """`sum_{k != y} max(0, margin + f_k - f_y)`."""
  return jnp.sum(_violation(wide, labels, margin), axis=-1)


def _violation(wide, labels, margin):
  return with_label(jax.nn.relu(margin + wide - of_label(wide, labels)), labels, 0)


@_violations.defjvp
def _violations_jvp(primals, tangents):
  violation = _violation(*primals)
  violating = (violation > 0).astype(violation.dtype)
  shift = tangents[2] - of_label(tangents[0], primals[1])[..., 0]
  dot = jnp.sum(violating * tangents[0], axis=-1) + jnp.sum(violating, axis=-1) * shift
  return jnp.sum(violation, axis=-1), dot


@jax.custom_jvp
def _largest_other(wide, labels):
  return jnp.max(with_label(wide, labels, jnp.finfo(wide.dtype).min), axis=-1, keepdims=True)


@_largest_other.defjvp
def _largest_other_jvp(primals, tangents):
  """Equal shares for ties, as in jnp.max, whose own rule is slow on a CPU."""
  wide, labels = primals
  largest = _largest_other(wide, labels)
  ties = with_label((wide == largest).astype(wide.dtype), labels, 0)
  share = 1 / jnp.maximum(jnp.sum(ties, axis=-1, keepdims=True), 1)
  return largest, jnp.sum(ties * tangents[0], axis=-1, keepdims=True) * share


def _wide(logits, labels, axis):
  """Checked logits in the dtype of the computation."""
  check_integer_labels(logits, labels, axis=axis)
  return jnp.asarray(logits, jnp.promote_types(logits.dtype, jnp.float32))


def _label_log_probability(logits, labels, axis, where):
  wide = _wide(logits, labels, axis)
  if where is not None:
    where = jnp.broadcast_to(where, logits.shape)
  return -optax.softmax_cross_entropy_with_integer_labels(wide, labels, axis=axis, where=where)


def _classes_last(logits, labels, axis, where):
  """Wide logits and the class mask, both `[..., classes]`."""
  wide = jnp.moveaxis(_wide(logits, labels, axis), axis, -1)
  if where is not None:
    where = jnp.moveaxis(jnp.broadcast_to(where, logits.shape), axis, -1)
  return wide, where


def _statistics(logits, labels, axis, where):
  wide, where = _classes_last(logits, labels, axis, where)
  return softmax_statistics(wide, jnp.asarray(labels), where)


def _nce(statistics):
  return statistics.log_label / jnp.where(statistics.log_sum < 0, statistics.log_sum, -1)


def _rce(log_p, log_zero):
  check_hyperparameter("log_zero", log_zero, high=0)
  return log_zero * jnp.expm1(log_p)


def _agce(log_p, offset, q):
  check_hyperparameter("offset", offset, low=0)
  check_hyperparameter("q", q, low=0, open_low=True)
  offset = jnp.asarray(offset, log_p.dtype)
  log_ratio = jnp.logaddexp(jnp.log(offset), log_p) - jnp.log1p(offset)
  return -jnp.expm1(q * log_ratio) * jnp.exp(q * jnp.log1p(offset)) / q


def _aul(log_p, offset, q):
  check_hyperparameter("offset", offset, low=1, open_low=True)
  check_hyperparameter("q", q, low=0, open_low=True)
  rest = jnp.asarray(offset, log_p.dtype) - 1
  return jnp.expm1(q * jnp.log1p(-jnp.expm1(log_p) / rest)) * jnp.exp(q * jnp.log(rest)) / q


def _active_passive(active, passive, active_weight, passive_weight):
  check_hyperparameter("active_weight", active_weight, low=0)
  check_hyperparameter("passive_weight", passive_weight, low=0)
  return active_weight * active + passive_weight * passive
