"""Selection of examples with small losses, which are more often labelled right, and co-teaching on top of it."""

import numbers
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from jaxreg.checks import as_array, check_float, check_hyperparameter, check_same_shape, example_mask
from jaxreg.losses.labelled_logits import labelled, narrowed

__all__ = [
  "coteaching_loss",
  "forget_rate_schedule",
  "select_small_losses",
  "small_loss_indices",
  "small_loss_weights",
]


def small_loss_weights(
  values: ArrayLike, *, forget_rate: ArrayLike, where: ArrayLike | None = None, axis_name: str | None = None
) -> jax.Array:
  """1 for the examples with the smallest losses, 0 for the fraction `forget_rate` with the largest.

  Weights for any loss: `sum(w * loss) / sum(w)`. They are constants: no gradient flows to what scored the examples.
  Of `n` examples `floor((1 - forget_rate) n)` are kept, as the official code has it, but at least one. A loss that is
  not a number counts as the largest; ties are broken by position.

  >>> import jax.numpy as jnp
  >>> small_loss_weights(jnp.array([3.0, 1.0, 2.0, 5.0]), forget_rate=0.5).tolist()
  [0.0, 1.0, 1.0, 0.0]

  Args:
    values: floating `[examples]`, a loss of each.
    forget_rate: in [0, 1], a scalar; may be traced. `(1 - forget_rate) n` is computed in float64 for a Python number,
      in the dtype of the values otherwise.
    where: boolean `[examples]`, the examples that count: the others have weight 0.
    axis_name: static; under `pmap` or `shard_map`, the axis that splits the batch: the smallest of the whole batch are
      selected, not of each part.

  Returns:
    `[examples]`, zeros and ones in the dtype of the values.

  Raises:
    ValueError: when shapes or dtypes do not fit or the rate is outside [0, 1].

  Reference: Han, Yao, Yu, Niu, Xu, Hu, Tsang, Sugiyama, "Co-teaching: Robust Training of Deep Neural Networks with
    Extremely Noisy Labels", NeurIPS 2018, Algorithm 1.
  """
  values = as_array("values", values)
  check_float("values", values)
  if values.ndim != 1:
    raise ValueError(f"values must be [examples], got shape {values.shape}; use vmap for more.")
  check_hyperparameter("forget_rate", forget_rate, low=0, high=1, shape=())
  values = jax.lax.stop_gradient(values)
  counted = example_mask(where, values.shape)
  order = jnp.where(counted, jnp.where(jnp.isnan(values), jnp.inf, values), jnp.inf)
  start = 0
  if axis_name is not None:
    start = jax.lax.axis_index(axis_name) * len(values)
    order, all_counted = jax.lax.all_gather((order, counted), axis_name, tiled=True)
  else:
    all_counted = counted
  # Those that do not count come last, after the infinite ones that do.
  rank = jnp.argsort(jnp.lexsort((order, ~all_counted)))
  kept = _kept(forget_rate, len(order), None if where is None else jnp.sum(all_counted), values.dtype)
  rank = jax.lax.dynamic_slice_in_dim(rank, start, len(values))
  return jnp.where(counted & (rank < kept), 1, 0).astype(values.dtype)


def small_loss_indices(values: ArrayLike, *, count: int) -> jax.Array:
  """The positions of the `count` smallest losses, smallest first.

  >>> import jax.numpy as jnp
  >>> small_loss_indices(jnp.array([3.0, 1.0, 2.0]), count=2).tolist()
  [1, 2]

  Args:
    values: floating `[examples]`.
    count: static, in [1, examples].

  Returns:
    Integers `[count]`.

  Raises:
    ValueError: when values do not fit or there are not that many.

  Reference: Han et al., NeurIPS 2018, Algorithm 1.
  """
  values = as_array("values", values)
  check_float("values", values)
  if values.ndim != 1:
    raise ValueError(f"values must be [examples], got shape {values.shape}; use vmap for more.")
  if not 1 <= count <= len(values):
    raise ValueError(f"count must lie in [1, {len(values)}], the number of values, got {count}.")
  return jnp.argsort(jax.lax.stop_gradient(values))[:count]


def select_small_losses(
  values: ArrayLike,
  scores: ArrayLike,
  *,
  forget_rate: ArrayLike,
  where: ArrayLike | None = None,
  axis_name: str | None = None,
) -> jax.Array:
  """The losses of the examples whose scores are smallest, scaled to the mean of those; 0 for the others.

  The mean over the examples that count is the mean loss of the examples kept. With one network's losses as values and
  another's as scores it is half of co-teaching: on one batch (`coteaching_loss`), or on halves of it, each scored by
  one network for the other.

  >>> import jax.numpy as jnp
  >>> select_small_losses(jnp.array([3.0, 1.0, 2.0, 5.0]), jnp.array([0.1, 0.9, 0.2, 0.8]), forget_rate=0.5).tolist()
  [6.0, 0.0, 4.0, 0.0]

  Args:
    values: floating `[examples]`, what is minimised.
    scores: floating `[examples]`, by which examples are chosen; constants.
    forget_rate: in [0, 1]; see `small_loss_weights`.
    where: boolean `[examples]`, the examples that count: the others have loss 0.
    axis_name: static; see `small_loss_weights`.

  Returns:
    `[examples]`, in the dtype of the values.

  Raises:
    ValueError: when shapes or dtypes do not fit or the rate is outside [0, 1].

  Reference: Han et al., NeurIPS 2018, Algorithm 1.
  """
  values, scores = as_array("values", values), as_array("scores", scores)
  check_float("values", values)
  check_same_shape(values=values, scores=scores)
  weights = small_loss_weights(scores, forget_rate=forget_rate, where=where, axis_name=axis_name)
  wide = values.astype(jnp.promote_types(values.dtype, jnp.float32))
  total = _summed(example_mask(where, values.shape), wide.dtype, axis_name)
  scale = total / jnp.maximum(_summed(weights, wide.dtype, axis_name), 1)
  return narrowed(jnp.where(weights > 0, wide, 0) * scale, values.dtype)


def coteaching_loss(
  logits: ArrayLike,
  other_logits: ArrayLike,
  labels: ArrayLike,
  *,
  forget_rate: ArrayLike,
  loss: Callable | None = None,
  where: ArrayLike | None = None,
  axis_name: str | None = None,
) -> tuple[jax.Array, jax.Array]:
  """The losses of two networks, each on the examples that are easy for the other.

  The values are scaled so that their mean over the examples that count is the mean loss of the examples kept. A step on
  the sum of both means trains both networks, for no gradient flows through the selection.

  >>> import jax.numpy as jnp
  >>> logits, other = jnp.array([[2.0, 0.0], [0.0, 0.0]]), jnp.array([[0.0, 0.0], [0.0, 3.0]])
  >>> first, second = coteaching_loss(logits, other, jnp.array([0, 1]), forget_rate=0.5)
  >>> print(first.round(3), second.round(3))
  [0.    1.386] [1.386 0.   ]

  Args:
    logits: floating `[examples, classes]`, of one network.
    other_logits: `[examples, classes]`, of the other.
    labels: integers `[examples]`; those outside `[0, classes)` count for nothing.
    forget_rate: in [0, 1]; see `small_loss_weights` and `forget_rate_schedule`.
    loss: static; `loss(logits, labels) -> [examples]`, any of this library; default cross-entropy.
    where: boolean `[examples]`, the examples that count.
    axis_name: static; see `small_loss_weights`.

  Returns:
    The losses of the two networks, `[examples]` each.

  Raises:
    ValueError: when shapes or dtypes do not fit or the rate is outside [0, 1].

  Reference: Han et al., NeurIPS 2018, Algorithm 1.
  """
  loss = loss or optax.softmax_cross_entropy_with_integer_labels
  batch = labelled(logits, labels)
  if batch.labels.ndim != 1:
    raise ValueError(f"logits must be [examples, classes], got shape {batch.logits.shape}; use vmap for more.")
  other = batch.other_logits("other_logits", other_logits)
  if where is not None:
    batch = batch._replace(counted=batch.counted & example_mask(where, batch.labels.shape))
  counted = batch.counted
  safe = lambda logits: loss(jnp.where(counted[:, None], logits, 0), batch.labels)
  first, second = safe(batch.logits), safe(other)
  options = dict(forget_rate=forget_rate, where=counted, axis_name=axis_name)
  select = lambda values, scores: batch.values(select_small_losses(values, scores, **options))
  return select(first, second), select(second, first)


def forget_rate_schedule(*, forget_rate: ArrayLike, num_gradual: int, exponent: ArrayLike = 1.0) -> Callable:
  """The fraction of a batch that is forgotten, by epoch: it rises from 0 over the first epochs and then stays.

  `forget_rate^exponent e / (num_gradual - 1)` at epoch `e < num_gradual`, counted from 0, then `forget_rate`: with an
  exponent other than 1 it jumps there, as in the official code.

  >>> schedule = forget_rate_schedule(forget_rate=0.4, num_gradual=5)
  >>> [round(float(schedule(epoch)), 3) for epoch in range(6)]
  [0.0, 0.1, 0.2, 0.3, 0.4, 0.4]

  Args:
    forget_rate: in [0, 1], for example the noise rate; may be traced.
    num_gradual: static, non-negative; the number of epochs that take part in the rise. With 0 the rate is constant.
    exponent: positive, a scalar; may be traced.

  Returns:
    `epoch -> rate`, whose epoch may be traced.

  Raises:
    ValueError: when an argument is out of range.

  Reference: Han et al., NeurIPS 2018, Section 4, and the official code.
  """
  check_hyperparameter("forget_rate", forget_rate, low=0, high=1, shape=())
  check_hyperparameter("exponent", exponent, low=0, open_low=True, shape=())
  if num_gradual < 0:
    raise ValueError(f"num_gradual must be non-negative, got {num_gradual}.")

  def schedule(epoch):
    dtype = jnp.promote_types(jnp.result_type(forget_rate, exponent, float), jnp.float32)
    rate = jnp.asarray(forget_rate, dtype)
    gradual = rate**exponent * jnp.asarray(epoch, dtype) / max(num_gradual - 1, 1)
    return jnp.where(jnp.asarray(epoch) < num_gradual, gradual, rate)

  return schedule


def _kept(forget_rate, examples: int, counted, dtype):
  """How many examples are kept; at least one."""
  if isinstance(forget_rate, (numbers.Real, np.floating)):
    kept = np.maximum([int((1 - float(forget_rate)) * number) for number in range(examples + 1)], 1)
    return kept[examples] if counted is None else jnp.asarray(kept)[counted]
  wide = jnp.promote_types(dtype, jnp.float32)
  number = jnp.asarray(examples if counted is None else counted, wide)
  return jnp.maximum(jnp.floor((1 - jnp.asarray(forget_rate, wide)) * number), 1)


def _summed(values, dtype, axis_name):
  total = jnp.sum(values.astype(dtype))
  return total if axis_name is None else jax.lax.psum(total, axis_name)
