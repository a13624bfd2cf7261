"""Bounds of activations: moving averages of what a channel's inputs were, turned into a bound once and then frozen."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxreg.checks import check_float, check_hyperparameter
from jaxreg.metrics.sizes import static_integer

__all__ = [
  "BOUND_RULES",
  "BoundState",
  "activation_bound_init",
  "activation_bound_update",
  "freeze_bounds",
  "mean_of_max_bound",
  "mean_plus_deviation_bound",
  "per_tensor_bounds",
  "scaled_mean_magnitude_bound",
  "scaled_root_mean_square_bound",
]


class BoundState(NamedTuple):
  """What is known of one layer's inputs, per channel, float32 `[channels]` each; zero inputs are not counted.

  Attributes:
    mean: moving average of the batches' means.
    mean_magnitude: of the means of `|x|`.
    mean_square: of the means of `x^2`.
    minimum: of the smallest inputs.
    maximum: of the largest inputs.
    bound: the frozen bound; -1 as long as inputs are not to be quantized.
  """

  mean: jax.Array
  mean_magnitude: jax.Array
  mean_square: jax.Array
  minimum: jax.Array
  maximum: jax.Array
  bound: jax.Array


def activation_bound_init(channels: int, *, dtype=jnp.float32) -> BoundState:
  """Statistics of no batch at all, and the bound -1, with which inputs pass as they are.

  >>> activation_bound_init(2).bound.tolist()
  [-1.0, -1.0]

  Args:
    channels: size of the inputs' last axis.
    dtype: of the statistics, at least float32.

  Returns:
    A `BoundState` of arrays `[channels]`.

  Raises:
    ValueError: when `channels` is not positive.

  Reference: Abdolrashidi et al., "Pareto-Optimal Quantized ResNet Is Mostly 4-bit", CVPR Workshops 2021 (calibration).
  """
  channels = static_integer("channels", channels, low=1)
  zeros = jnp.zeros(channels, jnp.promote_types(dtype, jnp.float32))
  return BoundState(zeros, zeros, zeros, zeros, zeros, zeros - 1)


def activation_bound_update(
  inputs: ArrayLike, *, state: BoundState, rate: ArrayLike = 0.1, axis_name: str | None = None
) -> BoundState:
  """Moves each statistic towards that of the batch, `m <- m + rate (batch - m)`, without correcting for the start at 0.

  Zeros, which a ReLU makes many, are left out; a channel without any other input keeps its statistics.

  >>> import jax.numpy as jnp
  >>> state = activation_bound_update(jnp.array([[1.0, 0.0], [3.0, 0.0]]), state=activation_bound_init(2), rate=0.5)
  >>> state.maximum.tolist(), state.mean.tolist()
  ([1.5, 0.0], [1.0, 0.0])

  Args:
    inputs: floating `[..., channels]`, one batch; no gradient passes.
    state: the statistics so far.
    rate: in [0, 1]; may be traced.
    axis_name: mapped axis or axes over which the batch is split, or None.

  Returns:
    The new state, with the same bound.

  Raises:
    ValueError: when `inputs` do not fit the state or `rate` is outside [0, 1].

  Reference: Abdolrashidi et al., "Pareto-Optimal Quantized ResNet Is Mostly 4-bit", CVPR Workshops 2021 (calibration);
    its code averages the devices' maxima, this is the maximum of the whole batch.
  """
  check_float("inputs", inputs)
  check_hyperparameter("rate", rate, low=0, high=1)
  if jnp.ndim(inputs) < 1 or jnp.shape(inputs)[-1:] != jnp.shape(state.bound):
    raise ValueError(f"inputs must end in the state's channels {jnp.shape(state.bound)}, got {jnp.shape(inputs)}.")
  dtype = state.bound.dtype
  wide = jax.lax.stop_gradient(jnp.asarray(inputs, dtype)).reshape(-1, inputs.shape[-1])
  active = wide != 0
  sums = [jnp.sum(active, axis=0, dtype=dtype), *(jnp.sum(part, axis=0) for part in (wide, jnp.abs(wide), wide**2))]
  ends = [-jnp.min(wide, axis=0, initial=jnp.inf, where=active), jnp.max(wide, axis=0, initial=-jnp.inf, where=active)]
  if axis_name is not None:
    sums, ends = jax.lax.psum(sums, axis_name), jax.lax.pmax(ends, axis_name)
  count, *totals = sums
  batch = [*(total / jnp.maximum(count, 1) for total in totals), -ends[0], ends[1]]
  move = lambda old, new: jnp.where(count > 0, old + rate * (jnp.where(count > 0, new, old) - old), old).astype(dtype)
  return BoundState(*(move(old, new) for old, new in zip(state[:5], batch)), state.bound)


def mean_of_max_bound(state: BoundState) -> jax.Array:
  """The larger magnitude of the averaged extremes, `max(|minimum|, |maximum|)`: the rule of the paper's networks.

  >>> import jax.numpy as jnp
  >>> state = activation_bound_update(jnp.array([[-3.0], [2.0]]), state=activation_bound_init(1), rate=1.0)
  >>> mean_of_max_bound(state).tolist()
  [3.0]

  Args:
    state: the statistics.

  Returns:
    `[channels]`.

  Reference: Abdolrashidi et al., "Pareto-Optimal Quantized ResNet Is Mostly 4-bit", CVPR Workshops 2021 (calibration).
  """
  return jnp.maximum(jnp.abs(state.minimum), jnp.abs(state.maximum))


def scaled_mean_magnitude_bound(state: BoundState, *, factor: ArrayLike = 3.0) -> jax.Array:
  """A multiple of the mean magnitude, `factor * mean |x|`.

  >>> import jax.numpy as jnp
  >>> state = activation_bound_update(jnp.array([[-3.0], [1.0]]), state=activation_bound_init(1), rate=1.0)
  >>> scaled_mean_magnitude_bound(state).tolist()
  [6.0]

  Args:
    state: the statistics.
    factor: non-negative; may be traced.

  Returns:
    `[channels]`.

  Raises:
    ValueError: when `factor` is negative.

  Reference: Abdolrashidi et al., "Pareto-Optimal Quantized ResNet Is Mostly 4-bit", CVPR Workshops 2021; one of the
    alternatives in its code.
  """
  check_hyperparameter("factor", factor, low=0)
  return factor * state.mean_magnitude


def scaled_root_mean_square_bound(state: BoundState, *, factor: ArrayLike = 3.0) -> jax.Array:
  """A multiple of the root mean square, `factor * sqrt(mean x^2)`.

  >>> import jax.numpy as jnp
  >>> state = activation_bound_update(jnp.array([[-2.0], [2.0]]), state=activation_bound_init(1), rate=1.0)
  >>> scaled_root_mean_square_bound(state).tolist()
  [6.0]

  Args:
    state: the statistics.
    factor: non-negative; may be traced.

  Returns:
    `[channels]`.

  Raises:
    ValueError: when `factor` is negative.

  Reference: Abdolrashidi et al., "Pareto-Optimal Quantized ResNet Is Mostly 4-bit", CVPR Workshops 2021; one of the
    alternatives in its code.
  """
  check_hyperparameter("factor", factor, low=0)
  return factor * jnp.sqrt(jnp.maximum(state.mean_square, 0))


def mean_plus_deviation_bound(state: BoundState, *, factor: ArrayLike = 3.0) -> jax.Array:
  """Mean and deviations, `|mean x| + factor * sqrt(mean x^2 - (mean x)^2)`.

  >>> import jax.numpy as jnp
  >>> state = activation_bound_update(jnp.array([[1.0], [3.0]]), state=activation_bound_init(1), rate=1.0)
  >>> mean_plus_deviation_bound(state).tolist()
  [5.0]

  Args:
    state: the statistics.
    factor: non-negative; may be traced.

  Returns:
    `[channels]`.

  Raises:
    ValueError: when `factor` is negative.

  Reference: Abdolrashidi et al., "Pareto-Optimal Quantized ResNet Is Mostly 4-bit", CVPR Workshops 2021; one of the
    alternatives in its code.
  """
  check_hyperparameter("factor", factor, low=0)
  return jnp.abs(state.mean) + factor * jnp.sqrt(jnp.maximum(state.mean_square - state.mean**2, 0))


BOUND_RULES = {
  "mean_of_max": mean_of_max_bound,
  "scaled_mean_magnitude": scaled_mean_magnitude_bound,
  "scaled_root_mean_square": scaled_root_mean_square_bound,
  "mean_plus_deviation": mean_plus_deviation_bound,
}


def freeze_bounds(
  stats: Any,
  *,
  when: ArrayLike = True,
  rule: Callable[[BoundState], jax.Array] = mean_of_max_bound,
  per_tensor: bool = True,
) -> Any:
  """The statistics of a whole network with every bound computed from them, when it is time, and as they are otherwise.

  Called after each training step with `when = (step == start)`, it is the single calibration of the paper; from then on
  the bounds stay, whatever the statistics do.

  >>> import jax.numpy as jnp
  >>> state = activation_bound_update(jnp.array([[2.0]]), state=activation_bound_init(1), rate=1.0)
  >>> [freeze_bounds({"layer": state}, when=when)["layer"].bound.tolist() for when in (False, True)]
  [[-1.0], [2.0]]

  Args:
    stats: a pytree with `BoundState` leaves, such as the collection `quant_stats` of a network.
    when: whether to compute the bounds; may be traced.
    rule: from statistics to a bound; `BOUND_RULES` has the usual ones.
    per_tensor: static; whether all channels of a layer get one bound, the largest of theirs: the form that integer
      products need, so that what is trained is what is deployed. The paper's code has one per channel.

  Returns:
    The same tree.

  Raises:
    ValueError: when a leaf is no `BoundState`.

  Reference: Abdolrashidi et al., "Pareto-Optimal Quantized ResNet Is Mostly 4-bit", CVPR Workshops 2021 (schedule).
  """
  of = (lambda state: _one_bound(rule(state))) if per_tensor else rule
  return _map_bounds(lambda state: jnp.where(when, of(state), state.bound), stats)


def per_tensor_bounds(stats: Any) -> Any:
  """The statistics of a whole network with one bound for all channels of a layer, the largest of theirs.

  Bounds per channel cannot be taken out of an integer product over the channels; this is what integer inference uses.

  >>> import jax.numpy as jnp
  >>> state = activation_bound_init(2)._replace(bound=jnp.array([1.0, 3.0]))
  >>> per_tensor_bounds({"layer": state})["layer"].bound.tolist()
  [3.0, 3.0]

  Args:
    stats: a pytree with `BoundState` leaves.

  Returns:
    The same tree.

  Raises:
    ValueError: when a leaf is no `BoundState`.

  Reference: Krishnamoorthi, "Quantizing deep convolutional networks for efficient inference: A whitepaper", 2018,
    Section 3.1.
  """
  return _map_bounds(lambda state: _one_bound(state.bound), stats)


def _one_bound(bounds):
  return jnp.full_like(bounds, jnp.max(bounds))


def _map_bounds(new_bound, stats):
  def one(state):
    if not isinstance(state, BoundState):
      raise ValueError(f"stats must be a tree of BoundState, got a leaf of type {type(state).__name__}.")
    return state._replace(bound=new_bound(state).astype(state.bound.dtype))

  return jax.tree.map(one, stats, is_leaf=lambda leaf: isinstance(leaf, BoundState))
