"""Weights of the examples in adversarial training: exact ones of a robust objective, and those of earlier methods."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxreg.checks import (
  as_array,
  check_float,
  check_hyperparameter,
  check_same_shape,
  check_state,
  dtype_of,
  example_mask,
)
from jaxreg.losses.labelled_logits import labelled, narrowed, widened
from jaxreg.metrics.sizes import static_integer

__all__ = [
  "LogMeanExpState",
  "gairat_weights",
  "kl_dro_loss",
  "kl_dro_weights",
  "log_mean_exp_init",
  "log_mean_exp_update",
  "mail_weights",
]

_FORMS = ("tanh", "sigmoid", "discrete")


class LogMeanExpState(NamedTuple):
  """The logarithm of the tracked mean of `exp(loss / temperature)`, a scalar; -inf before the first batch."""

  log_mean: jax.Array


def kl_dro_loss(
  losses: ArrayLike, *, temperature: ArrayLike, where: ArrayLike | None = None, axis_name: str | None = None
) -> jax.Array:
  """The worst reweighted mean at a price: `max_w sum_i w_i l_i - r KL(w || uniform) = r log mean_i exp(l_i / r)`.

  The weights w are a distribution over the examples. They are the loss's gradient, `kl_dro_weights`: do not weight
  the losses by them as well. A large temperature gives the mean of the losses, a small one their maximum.

  >>> import jax, jax.numpy as jnp
  >>> losses = jnp.array([1.0, 2.0, 4.0])
  >>> [round(kl_dro_loss(losses, temperature=r).item(), 3) for r in (1e-3, 1.0, 1e6)]
  [3.999, 3.071, 2.333]

  Args:
    losses: floating `[...]`, one per example.
    temperature: r, positive scalar in units of the losses; may be traced.
    where: boolean `[...]`, the examples that count; the losses of the others are not read.
    axis_name: static; under `pmap` or `shard_map`, the axis that splits the batch: the value is that of all devices'
      examples, and the mean over the devices of their parameter gradients (`pmean`) is its gradient.

  Returns:
    Scalar, of the losses' dtype; 0 without examples.

  Raises:
    ValueError: when `losses` are not floating point, `where` does not fit them, or the temperature is not positive.

  Reference: Sow, Lin, Wang, Liang, "Doubly Robust Instance-Reweighted Adversarial Training", ICLR 2024, the objective
    with its maximum over the weights in closed form.
  """
  losses, temperature, counted = _prepared(losses, temperature, where)
  largest, _, log_mean, _ = _log_mean_exp(widened(losses), temperature, counted, axis_name)
  return narrowed(largest + temperature * log_mean, losses.dtype)


def kl_dro_weights(
  losses: ArrayLike, *, temperature: ArrayLike, where: ArrayLike | None = None, axis_name: str | None = None
) -> jax.Array:
  """The weights that attain `kl_dro_loss`: `softmax(l / r)` over the examples.

  >>> import jax.numpy as jnp
  >>> weights = kl_dro_weights(jnp.array([1.0, 2.0, 4.0]), temperature=1.0)
  >>> [round(weight, 3) for weight in weights.tolist()]
  [0.042, 0.114, 0.844]

  Args:
    losses: floating `[...]`, one per example.
    temperature: as in `kl_dro_loss`.
    where: as in `kl_dro_loss`.
    axis_name: as in `kl_dro_loss`; the weights of all devices together have sum 1.

  Returns:
    `[...]` of sum 1, of the losses' dtype; 0 for examples that do not count. Differentiable: a weighted loss takes
    them through `stop_gradient`.

  Raises:
    ValueError: as `kl_dro_loss`.

  Reference: Sow, Lin, Wang, Liang, "Doubly Robust Instance-Reweighted Adversarial Training", ICLR 2024, the maximiser
    of the objective over the weights.
  """
  losses, temperature, counted = _prepared(losses, temperature, where)
  _, relative, log_mean, count = _log_mean_exp(widened(losses), temperature, counted, axis_name)
  return narrowed(jnp.where(counted, jnp.exp(relative - log_mean) / count, 0), losses.dtype)


def log_mean_exp_init() -> LogMeanExpState:
  """The state of `log_mean_exp_update` before the first batch.

  >>> log_mean_exp_init().log_mean.item()
  -inf

  Returns:
    `LogMeanExpState`; the first batch replaces it whatever the rate.

  Reference: Sow, Lin, Wang, Liang, "Doubly Robust Instance-Reweighted Adversarial Training", ICLR 2024, the algorithm's
    initial step.
  """
  return LogMeanExpState(jnp.full((), -jnp.inf, jnp.result_type(float)))


def log_mean_exp_update(
  losses: ArrayLike,
  state: LogMeanExpState,
  *,
  temperature: ArrayLike,
  rate: ArrayLike,
  previous_losses: ArrayLike | None = None,
  floor: ArrayLike = 1.0,
  where: ArrayLike | None = None,
  axis_name: str | None = None,
) -> tuple[jax.Array, LogMeanExpState]:
  """Weights of a batch whose normaliser is tracked over the batches, `exp(l_i / r) / (batch u_t)`.

  `u_t = (1 - rate) u_{t-1} + rate g_t` with `g_t = mean_i exp(l_i / r)` of the batch, in logarithms. With
  `previous_losses` the change of g between the two parameters is added to the old value first, `u_t = (1 - rate)
  (u_{t-1} + g_t - g'_t) + rate g_t`, which noise could make negative: it is at least `floor rate g_t`. At rate 1 the
  weights are `kl_dro_weights`, which for a small batch are biased estimates of those over the data set. The objective's
  gradient is that of `sum(weights * losses)`. Start anew from `log_mean_exp_init` when the temperature changes.

  >>> import jax.numpy as jnp
  >>> state = log_mean_exp_init()
  >>> for losses in (jnp.array([0.0, 1.0]), jnp.array([2.0, 3.0])):
  ...   weights, state = log_mean_exp_update(losses, state, temperature=1.0, rate=0.5)
  ...   print([round(weight, 3) for weight in weights.tolist()])
  [0.269, 0.731]
  [0.474, 1.288]

  Args:
    losses: floating `[...]`, one per example of the batch, at the current parameters.
    state: from `log_mean_exp_init` or the step before; keep it in checkpoints.
    temperature: as in `kl_dro_loss`.
    rate: eta, scalar in (0, 1], the weight of the new batch; may be traced.
    previous_losses: `[...]`, the losses of the same examples at the parameters of the step before; the first batch's
      are not used.
    floor: scalar in (0, 1], for the corrected mean; may be traced.
    where: as in `kl_dro_loss`; a batch without examples leaves the state as it is.
    axis_name: as in `kl_dro_loss`; the means are those of all devices' examples, and every device has the same state.
      The devices' parameter gradients are then to be added (`psum`).

  Returns:
    The weights `[...]`, of the losses' dtype, at most 1 / rate (1 / (floor rate) of the corrected mean), constant under
    differentiation, 0 for examples that do not count; and the state.

  Raises:
    ValueError: as `kl_dro_loss`, or when `previous_losses` do not fit the losses or the rate is out of range.

  Reference: Sow, Lin, Wang, Liang, "Doubly Robust Instance-Reweighted Adversarial Training", ICLR 2024, the algorithm's
    moving average; the corrected one is that of stochastically corrected stochastic compositional gradient descent.
  """
  check_state(state, LogMeanExpState)
  losses, temperature, counted = _prepared(losses, temperature, where)
  check_hyperparameter("rate", rate, low=0, high=1, open_low=True, shape=())
  check_hyperparameter("floor", floor, low=0, high=1, open_low=True, shape=())
  wide = jax.lax.stop_gradient(widened(losses))
  temperature = jax.lax.stop_gradient(temperature)
  largest, relative, log_mean, count = _log_mean_exp(wide, temperature, counted, axis_name)
  log_batch = largest / temperature + log_mean
  fixed = lambda value: jax.lax.stop_gradient(jnp.asarray(value, wide.dtype))
  old, rate, floor = fixed(state.log_mean), fixed(rate), fixed(floor)
  if previous_losses is None:
    log_new = jnp.logaddexp(jnp.log1p(-rate) + old, jnp.log(rate) + log_batch)
  else:
    previous = as_array("previous_losses", previous_losses)
    check_float("previous_losses", previous)
    check_same_shape(losses=losses, previous_losses=previous)
    before, _, before_mean, _ = _log_mean_exp(fixed(widened(previous)), temperature, counted, axis_name)
    log_new = _corrected(old, log_batch, before / temperature + before_mean, rate, floor)
  log_new = jnp.where(old == -jnp.inf, log_batch, log_new)
  # As differences of moderate numbers: losses over a small temperature would have no digits left for them.
  weights = jnp.where(counted, jnp.exp(relative - log_mean - (log_new - log_batch)) / count, 0)
  some = _total(jnp.sum(counted.astype(wide.dtype)), axis_name) > 0
  log_new = jnp.where(some, log_new, old).astype(state.log_mean.dtype)
  return narrowed(weights, losses.dtype), LogMeanExpState(log_new)


def gairat_weights(
  steps_survived: ArrayLike,
  *,
  steps: int,
  scale: ArrayLike = -1.0,
  form: str = "tanh",
  where: ArrayLike | None = None,
  axis_name: str | None = None,
) -> jax.Array:
  """Larger weights for examples that an attack turns in fewer steps, with mean 1 over the batch.

  `(1 + tanh(z)) / 2` or `sigmoid(z)` with `z = scale + 5 (1 - k / floor(steps / 2))`, or `(steps + 1 - k) / (steps +
  1)`, then divided by their mean.

  >>> import jax.numpy as jnp
  >>> weights = gairat_weights(jnp.array([0, 10]), steps=10, form="discrete")
  >>> [round(weight, 3) for weight in weights.tolist()]
  [1.833, 0.167]

  Args:
    steps_survived: k, integers `[...]` in [0, steps]: at how many of the attack's steps the example was classified
      correctly before the step; values outside count as the nearest.
    steps: of the attack, at least 2; static.
    scale: the method's Lambda, scalar; larger values treat the examples more alike; may be traced.
    form: `tanh`, `sigmoid` or `discrete`; static.
    where: boolean `[...]`, the examples that count.
    axis_name: static; under `pmap` or `shard_map`, the axis that splits the batch, over which the mean runs.

  Returns:
    float32 `[...]` (float64 where that is the default), 0 for examples that do not count.

  Raises:
    ValueError: when `steps_survived` are no integers, or another argument does not fit.

  Reference: Zhang, Zhu, Niu, Han, Sugiyama, Kankanhalli, "Geometry-aware Instance-reweighted Adversarial Training",
    ICLR 2021, Equation 6, and the forms of its official code.
  """
  if not jnp.issubdtype(dtype_of("steps_survived", steps_survived), jnp.integer):
    raise ValueError(f"steps_survived must be integers, got dtype {jnp.result_type(steps_survived)}.")
  steps = static_integer("steps", steps, low=2)
  check_hyperparameter("scale", scale, shape=())
  if form not in _FORMS:
    raise ValueError(f"form must be one of {', '.join(_FORMS)}, got {form!r}.")
  survived = as_array("steps_survived", steps_survived)
  counted = example_mask(where, survived.shape)
  survived = jnp.clip(survived, 0, steps).astype(jnp.result_type(float))
  hardness = jnp.asarray(scale, survived.dtype) + 5 * (1 - survived / (steps // 2))
  if form == "discrete":
    log_weights = jnp.log(steps + 1 - survived)
  else:  # (1 + tanh(z)) / 2 is the sigmoid of 2 z
    log_weights = jax.nn.log_sigmoid(2 * hardness if form == "tanh" else hardness)
  _, relative, log_mean, _ = _log_mean_exp(log_weights, jnp.ones((), survived.dtype), counted, axis_name)
  return jnp.where(counted, jnp.exp(relative - log_mean), 0)


def mail_weights(logits: ArrayLike, labels: ArrayLike, *, bias: ArrayLike = -0.5, slope: ArrayLike = 10.0) -> jax.Array:
  """Larger weights for examples of small probability margin, `3 sigmoid(slope (max_{k != y} p_k - p_y + bias))`.

  >>> import jax.numpy as jnp
  >>> weights = mail_weights(jnp.array([[2.0, 0.0], [0.0, 2.0]]), jnp.array([0, 0]))
  >>> [round(weight, 4) for weight in weights.tolist()]
  [0.0, 2.7956]

  Args:
    logits: of the attacked inputs, floating `[..., classes]`.
    labels: integers `[...]`.
    bias: scalar, added to the margin; may be traced.
    slope: non-negative scalar; may be traced.

  Returns:
    `[...]` in (0, 3), of the logits' dtype, constant under differentiation and not normalised; 0 for labels that are no
    class.

  Raises:
    ValueError: when labels do not fit the logits or a hyperparameter is out of range.

  Reference: Wang, Liu, Han, Liu, Gong, Niu, Zhou, Sugiyama, "Probabilistic Margins for Instance Reweighting in
    Adversarial Training", NeurIPS 2021, the weights of the probabilistic margin; the factor 3 is the official code's.
  """
  batch = labelled(logits, labels)
  bias = batch.hyperparameter("bias", bias, scalar=True)
  slope = batch.hyperparameter("slope", slope, low=0, scalar=True)
  probabilities = jax.nn.softmax(batch.logits, axis=-1)
  own = jnp.arange(probabilities.shape[-1]) == batch.labels[..., None]
  rival = jnp.max(probabilities, axis=-1, where=~own, initial=0)
  margin = rival - jnp.sum(probabilities, axis=-1, where=own)
  return jax.lax.stop_gradient(batch.values(3 * jax.nn.sigmoid(slope * (margin + bias))))


def _prepared(losses, temperature, where):
  """Checked losses, the temperature in the dtype of the computation, and the mask of the examples."""
  losses = as_array("losses", losses)
  check_float("losses", losses)
  check_hyperparameter("temperature", temperature, low=0, open_low=True, shape=())
  counted = example_mask(where, losses.shape)
  # What is under the mask may be no number, and neither values nor gradients may see it.
  losses = jnp.where(counted, losses, 0)
  return losses, jnp.asarray(temperature, jnp.promote_types(losses.dtype, jnp.float32)), counted


def _log_mean_exp(losses, temperature, counted, axis_name):
  """The largest loss; `z = (losses - largest) / temperature`; the logarithm of the mean of `exp(z)`; the count."""
  largest = jax.lax.stop_gradient(jnp.max(losses, where=counted, initial=-jnp.inf))
  if axis_name is not None:
    largest = jax.lax.pmax(largest, axis_name)
  count = jnp.maximum(_total(jnp.sum(counted.astype(losses.dtype)), axis_name), 1)
  relative = jnp.where(counted, losses - jnp.where(largest == -jnp.inf, 0, largest), 0) / temperature
  mean = lambda values: _total(jnp.sum(values, where=counted), axis_name) / count
  # Of nearly equal losses the mean of exp(z) - 1 keeps the digits, of others that of exp(z).
  growth = mean(jnp.expm1(relative))
  near = growth > -0.5
  log_mean = jnp.where(
    near, jnp.log1p(jnp.where(near, growth, 0)), jnp.log(jnp.where(near, 1, mean(jnp.exp(relative))))
  )
  return jnp.where(largest == -jnp.inf, 0, largest), relative, log_mean, count


def _corrected(log_old, log_batch, log_before, rate, floor):
  """`log(max((1 - rate) (u + g - g') + rate g, floor rate g))`."""
  top = jnp.maximum(jnp.maximum(log_old, log_batch), log_before)
  moved = jnp.exp(log_old - top) + (jnp.exp(log_batch - top) - jnp.exp(log_before - top))
  log_moved = jnp.log1p(-rate) + top + jnp.log(jnp.abs(moved))
  log_own = jnp.log(rate) + log_batch
  left = jnp.maximum(-jnp.expm1(log_moved - log_own), floor)
  return jnp.where(moved >= 0, jnp.logaddexp(log_moved, log_own), log_own + jnp.log(left))


def _total(value, axis_name):
  return value if axis_name is None else jax.lax.psum(value, axis_name)
