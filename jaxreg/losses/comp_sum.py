"""Comp-sum losses: one parameter from sum-exponential over cross-entropy and GCE to mean absolute error."""

import jax
import jax.numpy as jnp
import optax

from jaxreg.checks import check_hyperparameter, check_integer_labels

__all__ = ["comp_sum_loss", "generalized_cross_entropy_loss"]


def comp_sum_loss(
  logits: jax.Array, labels: jax.Array, *, tau: float | jax.Array = 1.0, axis: int = -1, where: jax.Array | None = None
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
  check_integer_labels(logits, labels, axis=axis)
  check_hyperparameter("tau", tau, low=0)
  dtype = jnp.promote_types(logits.dtype, jnp.float32)
  where = None if where is None else jnp.broadcast_to(where, logits.shape)
  nll = optax.softmax_cross_entropy_with_integer_labels(logits.astype(dtype), labels, axis=axis, where=where)
  gap = 1 - jnp.asarray(tau, dtype)
  logistic = gap == 0
  safe = jnp.where(logistic, 1, gap)
  # The series at gap = 0 has the right derivative with respect to tau as well.
  value = jnp.where(logistic, nll + gap * nll**2 / 2, _expm1_with_tangent(safe * nll) / safe)
  return value.astype(logits.dtype)


def generalized_cross_entropy_loss(
  logits: jax.Array, labels: jax.Array, *, q: float | jax.Array = 0.7, axis: int = -1, where: jax.Array | None = None
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
  check_hyperparameter("q", q, low=0, high=1)
  return comp_sum_loss(logits, labels, tau=1 + q, axis=axis, where=where)


def _expm1_with_tangent(exponent: jax.Array) -> jax.Array:
  """`expm1`, continued by its tangent where it would leave the dtype's range."""
  limit = jnp.log(jnp.finfo(exponent.dtype).max) - 20
  inside = jnp.expm1(jnp.minimum(exponent, limit))
  return jnp.where(exponent > limit, jnp.exp(limit) * (1 + exponent - limit), inside)
