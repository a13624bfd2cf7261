"""Comp-sum losses: one parameter from sum-exponential over cross-entropy and GCE to mean absolute error."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxreg.checks import as_array, check_float, check_hyperparameter, check_same_shape
from jaxreg.losses.labelled_logits import classes_last, labelled, narrowed, widened
from jaxreg.losses.softmax_family import label_log_probability, label_statistics

__all__ = [
  "comp_sum_loss",
  "comp_sum_loss_with_soft_labels",
  "comp_sum_outer",
  "generalized_cross_entropy_loss",
  "truncated_generalized_cross_entropy_loss",
]


def comp_sum_loss(
  logits: ArrayLike, labels: ArrayLike, *, tau: ArrayLike = 1.0, axis: int = -1, where: ArrayLike | None = None
) -> jax.Array:
  """The comp-sum loss `(p_y^(tau - 1) - 1) / (1 - tau)` with `p = softmax(logits)`, and `-log p_y` at `tau = 1`.

  `tau = 0` is the sum-exponential loss, `1 < tau < 2` generalized cross-entropy with `q = tau - 1`, `tau = 2` half of
  the L1 distance between `p` and the one-hot label. For `tau < 1` a value beyond the dtype's range is replaced by its
  tangent's, so that value and gradient stay finite.

  >>> import jax.numpy as jnp
  >>> logits, labels = jnp.array([[0.0, 0.0], [2.0, 0.0]]), jnp.array([0, 1])
  >>> [round(value, 3) for value in comp_sum_loss(logits, labels, tau=2.0).tolist()]
  [0.5, 0.881]

  Args:
    logits: floating `[..., classes]`.
    labels: integers `[...]`.
    tau: non-negative scalar (or array broadcasting against `labels`); may be traced.
    axis: the axis of the classes.
    where: boolean, broadcasting against `logits`: the classes that take part.

  Returns:
    `[...]`, the loss of each example.

  Raises:
    ValueError: when labels do not fit the logits or `tau` is negative.

  Reference: Mao, Mohri, Zhong, "Cross-Entropy Loss Functions: Theoretical Analysis and Applications", ICML 2023,
    the comp-sum family (Section 3).
  """
  batch = labelled(logits, labels, axis=axis, where=where)
  tau = batch.hyperparameter("tau", tau, low=0)
  # Not rounded to the size of the logits, as the difference of a log-sum-exp and the label's logit would be.
  return batch.values(of_negative_log(-label_statistics(batch).log_label, tau))


def comp_sum_loss_with_soft_labels(
  logits: ArrayLike, labels: ArrayLike, *, tau: ArrayLike = 1.0, axis: int = -1, where: ArrayLike | None = None
) -> jax.Array:
  """The comp-sum loss of a label distribution, `sum_y labels_y (p_y^(tau - 1) - 1) / (1 - tau)`, `p = softmax(logits)`.

  >>> import jax.numpy as jnp
  >>> logits, labels = jnp.array([[2.0, 0.0]]), jnp.array([[0.5, 0.5]])
  >>> comp_sum_loss_with_soft_labels(logits, labels, tau=2.0).tolist()
  [0.5]

  Args:
    logits: floating `[..., classes]`.
    labels: floating `[..., classes]`, the weight of every class.
    tau: non-negative scalar (or array broadcasting against the leading axes); may be traced.
    axis: the axis of the classes.
    where: boolean, broadcasting against `logits`: the classes that take part.

  Returns:
    `[...]`, the loss of each example.

  Raises:
    ValueError: when labels do not fit the logits or `tau` is negative.

  Reference: Mao, Mohri, Zhong, "Cross-Entropy Loss Functions: Theoretical Analysis and Applications", ICML 2023,
    the conditional risk of the comp-sum family (Section 3).
  """
  logits, labels = as_array("logits", logits), as_array("labels", labels)
  check_float("labels", labels)
  check_same_shape(logits=logits, labels=labels)
  wide, where = classes_last(logits, axis=axis, where=where)
  check_hyperparameter("tau", tau, low=0, shape=wide.shape[:-1])
  nll = -jax.nn.log_softmax(wide, where=where)
  if where is not None:  # what takes no part is infinitely unlikely
    nll = jnp.where(where, nll, 0)
  losses = of_negative_log(nll, jnp.expand_dims(tau, -1) if jnp.ndim(tau) else tau)
  labels = jnp.moveaxis(labels, axis, -1).astype(wide.dtype)
  return narrowed(jnp.sum(labels * losses, axis=-1, where=where), logits.dtype)


def comp_sum_outer(values: ArrayLike, *, tau: ArrayLike) -> jax.Array:
  """The outer function `Phi(u) = ((1 + u)^(1 - tau) - 1) / (1 - tau)` of the family, and `log(1 + u)` at `tau = 1`.

  It is increasing, concave and 1-Lipschitz; comp-sum losses are `Phi(sum_{k != y} exp(z_k - z_y))`.

  >>> import jax.numpy as jnp
  >>> [round(float(comp_sum_outer(jnp.array(3.0), tau=tau)), 3) for tau in (0.0, 1.0, 2.0)]
  [3.0, 1.386, 0.75]

  Args:
    values: non-negative, floating `[...]`.
    tau: non-negative scalar (or array broadcasting against `values`); may be traced.

  Returns:
    `[...]`.

  Raises:
    ValueError: when `values` are not floating point or `tau` is negative.

  Reference: Mao, Mohri, Zhong, "Cross-Entropy Loss Functions: Theoretical Analysis and Applications", ICML 2023,
    the functions composed with the sum (Section 3).
  """
  values = as_array("values", values)
  check_float("values", values)
  check_hyperparameter("tau", tau, low=0, shape=values.shape)
  return narrowed(of_negative_log(jnp.log1p(widened(values)), tau), values.dtype)


def generalized_cross_entropy_loss(
  logits: ArrayLike, labels: ArrayLike, *, q: ArrayLike = 0.7, axis: int = -1, where: ArrayLike | None = None
) -> jax.Array:
  """Generalized cross-entropy `(1 - p_y^q) / q`: the comp-sum loss at `tau = 1 + q`.

  >>> import jax.numpy as jnp
  >>> generalized_cross_entropy_loss(jnp.zeros((1, 4)), jnp.array([1]), q=1.0).tolist()
  [0.75]

  Args:
    logits: floating `[..., classes]`.
    labels: integers `[...]`.
    q: in [0, 1]; 0 is cross-entropy, 1 is `1 - p_y`; may be traced.
    axis: the axis of the classes.
    where: boolean, broadcasting against `logits`: the classes that take part.

  Returns:
    `[...]`, the loss of each example.

  Raises:
    ValueError: when labels do not fit the logits or `q` is outside [0, 1].

  Reference: Zhang, Sabuncu, "Generalized Cross Entropy Loss for Training Deep Neural Networks with Noisy Labels",
    NeurIPS 2018, equation 6.
  """
  batch = labelled(logits, labels, axis=axis, where=where)
  q = batch.hyperparameter("q", q, low=0, high=1)
  return batch.values(power_of_negative_log(-label_statistics(batch).log_label, -q))


def of_negative_log(nll: ArrayLike, tau) -> jax.Array:
  """`(exp((1 - tau) nll) - 1) / (1 - tau)`, and `nll` at `tau = 1`."""
  return power_of_negative_log(nll, 1 - jnp.asarray(tau, nll.dtype))


def power_of_negative_log(nll: jax.Array, gap) -> jax.Array:
  """`(exp(gap nll) - 1) / gap`, and `nll` at `gap = 0`, with the right derivatives in both."""
  exponent = gap * nll
  # The derivative in the gap would cancel; next to zero it comes from the series of expm1(x) / x.
  small = jnp.abs(exponent) < 0.1
  x = jnp.where(small, exponent, 0)
  series = 1.0
  for order in range(11, 1, -1):
    series = 1 + series * x / order
  safe = jnp.where(gap == 0, 1, gap)
  return jnp.where(small, nll * series, _expm1_with_tangent(jnp.where(small, 1, exponent)) / safe)


def _expm1_with_tangent(exponent: jax.Array) -> jax.Array:
  """`expm1`, continued by its tangent where it would leave the dtype's range."""
  limit = jnp.log(jnp.finfo(exponent.dtype).max) - 20
  inside = jnp.expm1(jnp.minimum(exponent, limit))
  return jnp.where(exponent > limit, jnp.exp(limit) * (1 + exponent - limit), inside)


def truncated_generalized_cross_entropy_loss(
  logits: ArrayLike,
  labels: ArrayLike,
  *,
  q: ArrayLike = 0.7,
  threshold: ArrayLike = 0.5,
  axis: int = -1,
  where: ArrayLike | None = None,
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
  batch = labelled(logits, labels, axis=axis, where=where)
  q = batch.hyperparameter("q", q, low=0, high=1)
  threshold = batch.hyperparameter("threshold", threshold, low=0, high=1, open_high=True)
  log_p = jnp.maximum(label_log_probability(batch), jnp.log(threshold))
  return batch.values(power_of_negative_log(-log_p, -q))
