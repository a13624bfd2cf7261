"""What losses of softmax probabilities share: the label's entry, and statistics of a row with one gradient rule.

XLA's CPU backend reduces fast what arithmetic makes of a stored array, but not what a comparison with the label or a
selection makes of it; one entry per row is read, set or added to for nothing. So nothing here compares with the label.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from jaxreg.checks import as_array
from jaxreg.losses.labelled_logits import Labelled

__all__ = ["SoftmaxRow", "SoftmaxStatistics", "of_label", "softmax_row", "softmax_statistics", "with_label"]


def of_label(array: ArrayLike, labels: ArrayLike) -> jax.Array:
  """The label's entry of each row.

  >>> import jax.numpy as jnp
  >>> of_label(jnp.array([[1.0, 2.0], [3.0, 4.0]]), jnp.array([1, 0])).tolist()
  [[2.0], [3.0]]

  Args:
    array: `[..., classes]`.
    labels: integers `[...]`.

  Returns:
    `[..., 1]`.
  """
  array, labels = as_array("array", array), as_array("labels", labels)
  return jnp.take_along_axis(array, labels[..., None], axis=-1)


def with_label(array: ArrayLike, labels: ArrayLike, value: ArrayLike) -> jax.Array:
  """The array with the label's entry of each row replaced.

  >>> import jax.numpy as jnp
  >>> with_label(jnp.array([[1.0, 2.0], [3.0, 4.0]]), jnp.array([1, 0]), 0.0).tolist()
  [[1.0, 0.0], [0.0, 4.0]]

  Args:
    array: `[..., classes]`.
    labels: integers `[...]`.
    value: scalar or `[..., 1]`.

  Returns:
    `[..., classes]`.
  """
  array, labels = as_array("array", array), as_array("labels", labels)
  # Row by row under vmap: jnp.put_along_axis gathers the labels of all devices when the batch is sharded.
  replace = lambda row, label, value: row.at[label].set(value[0])
  for _ in range(labels.ndim):
    replace = jax.vmap(replace)
  value = as_array("value", value).astype(array.dtype)
  return replace(array, labels, jnp.broadcast_to(value, (*labels.shape, 1)))


class SoftmaxStatistics(NamedTuple):
  """What losses read from `p = softmax(logits)`, each `[...]`."""

  log_label: jax.Array  # log p_y
  log_sum: jax.Array  # sum_k log p_k
  square_error: jax.Array  # sum_k (p_k - [k = y])^2


class SoftmaxRow(NamedTuple):
  """`p = softmax(logits)` as its parts: the label's is `label`, class k's is `powers_k / total`."""

  powers: jax.Array  # exp(z - largest), 0 for the label, [..., classes]; the rest is [..., 1]
  total: jax.Array  # sum of all powers
  label: jax.Array  # p_y
  miss: jax.Array  # 1 - p_y without cancellation
  log_label: jax.Array  # log p_y
  classes: jax.Array | int


@jax.custom_jvp
def softmax_statistics(logits: ArrayLike, labels: ArrayLike, where: ArrayLike | None = None) -> SoftmaxStatistics:
  """Statistics of softmax rows whose joint gradient takes one pass: any smooth function of them costs a cross-entropy.

  Differentiating a function of them adds up to one multiple of p, one of p^2, a constant and an entry of the label.

  >>> import jax.numpy as jnp
  >>> statistics = softmax_statistics(jnp.zeros((1, 2)), jnp.array([0]))
  >>> [round(value.item(), 3) for value in statistics]
  [-0.693, -1.386, 0.5]

  Args:
    logits: float32 or float64 `[..., classes]`.
    labels: integers `[...]`.
    where: boolean `[..., classes]`: the classes that take part, the label among them; or None.

  Returns:
    `SoftmaxStatistics`.
  """
  return _statistics(softmax_row(logits, labels, where), logits, labels, where)[1]


def softmax_row(logits: ArrayLike, labels: ArrayLike, where: ArrayLike | None = None) -> SoftmaxRow:
  """The parts of the softmax that gradient rules are made of.

  >>> import jax.numpy as jnp
  >>> softmax_row(jnp.zeros((1, 4)), jnp.array([0])).miss.tolist()
  [[0.75]]

  Args:
    logits: float32 or float64 `[..., classes]`.
    labels: integers `[...]`.
    where: boolean `[..., classes]`: the classes that take part, the label among them; or None.

  Returns:
    `SoftmaxRow`.
  """
  own, classes = of_label(logits, labels), logits.shape[-1]
  if where is not None:
    logits, classes = jnp.where(where, logits, own), jnp.sum(where, axis=-1, keepdims=True)
  largest = jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
  powers = jnp.exp(logits - largest)
  powers = with_label(powers if where is None else jnp.where(where, powers, 0), labels, 0)
  rest, own_power = jnp.sum(powers, axis=-1, keepdims=True), jnp.exp(own - largest)
  total = rest + own_power
  # own_power is 1 when the label has the largest logit: then this is exactly -log1p(rest).
  log_label = (own - largest) - jnp.log1p(rest + (own_power - 1))
  return SoftmaxRow(powers, total, own_power / total, rest / total, log_label, classes)


def _statistics(row, logits, labels, where):
  # The plain sum, whose rounding is that of the logits themselves: a shared shift would take another array.
  total = jnp.sum(logits, axis=-1, keepdims=True, where=where)
  log_sum = total - row.classes * (of_label(logits, labels) - row.log_label)
  square = jnp.sum(row.powers * row.powers, axis=-1, keepdims=True) / row.total**2
  return square, SoftmaxStatistics(row.log_label[..., 0], log_sum[..., 0], (square + row.miss**2)[..., 0])


@softmax_statistics.defjvp
def _softmax_statistics_jvp(primals, tangents):
  logits, labels, where = primals
  row = softmax_row(logits, labels, where)
  square, statistics = _statistics(row, logits, labels, where)
  inner = square - row.label * row.miss  # sum_k p_k (p_k - [k = y])
  dot = tangents[0] if where is None else jnp.where(where, tangents[0], 0)
  own = of_label(dot, labels)
  others = jnp.sum(row.powers * dot, axis=-1, keepdims=True) / row.total
  squares = jnp.sum(row.powers * (row.powers * dot), axis=-1, keepdims=True) / row.total**2
  log_label = row.miss * own - others
  log_sum = jnp.sum(dot, axis=-1, keepdims=True) - row.classes * (row.label * own + others)
  square_error = 2 * (squares - inner * others - row.label * (row.miss + inner) * own)
  return statistics, SoftmaxStatistics(log_label[..., 0], log_sum[..., 0], square_error[..., 0])


def label_log_probability(batch: Labelled) -> jax.Array:
  """`log p_y` of each example, `[...]`."""
  return -optax.softmax_cross_entropy_with_integer_labels(batch.logits, batch.labels, where=batch.where)


def label_statistics(batch: Labelled) -> SoftmaxStatistics:
  """`softmax_statistics` of labelled logits."""
  return softmax_statistics(batch.logits, batch.labels, batch.where)
