"""Active losses, passive losses, and their weighted sums, against wrong labels; one value per example.

An active loss (normalized cross-entropy) only asks for a large probability of the label, a passive one (reverse
cross-entropy, asymmetric losses) also for small ones of the other classes.
"""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxreg.losses.labelled_logits import labelled
from jaxreg.losses.softmax_family import label_log_probability, label_statistics
from jaxreg.losses.symmetric import LOG_ZERO, reverse_cross_entropy

__all__ = [
  "asymmetric_generalized_cross_entropy_loss",
  "asymmetric_unhinged_loss",
  "nce_agce_loss",
  "nce_aul_loss",
  "nce_rce_loss",
  "normalized_cross_entropy_loss",
]


def normalized_cross_entropy_loss(
  logits: ArrayLike, labels: ArrayLike, *, axis: int = -1, where: ArrayLike | None = None
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
  batch = labelled(logits, labels, axis=axis, where=where)
  return batch.values(_nce(label_statistics(batch)))


def asymmetric_generalized_cross_entropy_loss(
  logits: ArrayLike,
  labels: ArrayLike,
  *,
  offset: ArrayLike = 1.0,
  q: ArrayLike = 2.0,
  axis: int = -1,
  where: ArrayLike | None = None,
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
  batch = labelled(logits, labels, axis=axis, where=where)
  return batch.values(_agce(batch, label_log_probability(batch), offset, q))


def asymmetric_unhinged_loss(
  logits: ArrayLike,
  labels: ArrayLike,
  *,
  offset: ArrayLike = 1.5,
  q: ArrayLike = 0.9,
  axis: int = -1,
  where: ArrayLike | None = None,
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
  batch = labelled(logits, labels, axis=axis, where=where)
  return batch.values(_aul(batch, label_log_probability(batch), offset, q))


def nce_rce_loss(
  logits: ArrayLike,
  labels: ArrayLike,
  *,
  active_weight: ArrayLike = 1.0,
  passive_weight: ArrayLike = 1.0,
  log_zero: ArrayLike = LOG_ZERO,
  axis: int = -1,
  where: ArrayLike | None = None,
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
  batch = labelled(logits, labels, axis=axis, where=where)
  statistics = label_statistics(batch)
  passive = reverse_cross_entropy(batch, statistics.log_label, log_zero)
  return _active_passive(batch, _nce(statistics), passive, active_weight, passive_weight)


def nce_agce_loss(
  logits: ArrayLike,
  labels: ArrayLike,
  *,
  active_weight: ArrayLike = 1.0,
  passive_weight: ArrayLike = 1.0,
  offset: ArrayLike = 3.0,
  q: ArrayLike = 1.5,
  axis: int = -1,
  where: ArrayLike | None = None,
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
  batch = labelled(logits, labels, axis=axis, where=where)
  statistics = label_statistics(batch)
  passive = _agce(batch, statistics.log_label, offset, q)
  return _active_passive(batch, _nce(statistics), passive, active_weight, passive_weight)


def nce_aul_loss(
  logits: ArrayLike,
  labels: ArrayLike,
  *,
  active_weight: ArrayLike = 1.0,
  passive_weight: ArrayLike = 1.0,
  offset: ArrayLike = 6.0,
  q: ArrayLike = 1.5,
  axis: int = -1,
  where: ArrayLike | None = None,
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
  batch = labelled(logits, labels, axis=axis, where=where)
  statistics = label_statistics(batch)
  passive = _aul(batch, statistics.log_label, offset, q)
  return _active_passive(batch, _nce(statistics), passive, active_weight, passive_weight)


def _nce(statistics):
  return statistics.log_label / jnp.where(statistics.log_sum < 0, statistics.log_sum, -1)


def _agce(batch, log_p, offset, q):
  offset = batch.hyperparameter("offset", offset, low=0)
  q = batch.hyperparameter("q", q, low=0, open_low=True)
  log_ratio = jnp.logaddexp(jnp.log(offset), log_p) - jnp.log1p(offset)
  return -jnp.expm1(q * log_ratio) * jnp.exp(q * jnp.log1p(offset)) / q


def _aul(batch, log_p, offset, q):
  batch.hyperparameter("offset", offset, low=1, open_low=True)
  q = batch.hyperparameter("q", q, low=0, open_low=True)
  rest = jnp.asarray(offset - 1, log_p.dtype)  # exact where the offset is a number, however close to 1
  # exp(q log(offset - p)) - exp(q log(offset - 1)), factored at the larger of the two so that neither part overflows.
  log_rest, log_growth = jnp.log(rest), jnp.log1p(-jnp.expm1(log_p) / rest)
  return -jnp.expm1(-q * log_growth) * jnp.exp(q * (log_rest + log_growth)) / q


def _active_passive(batch, active, passive, active_weight, passive_weight):
  active_weight = batch.hyperparameter("active_weight", active_weight, low=0)
  passive_weight = batch.hyperparameter("passive_weight", passive_weight, low=0)
  return batch.values(active_weight * active + passive_weight * passive)
