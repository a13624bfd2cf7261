"""EnsLoss, which draws a random calibrated loss at every step.

The gradient of a margin loss is known from its derivatives at the margins of the batch. EnsLoss draws those derivatives
such that some convex, classification-calibrated loss has them, and never names the loss.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxreg.checks import as_array, check_float, check_hyperparameter, check_same_shape
from jaxreg.losses.binary_margin import MARGIN_LOSSES, binary_margins, log_limit

__all__ = [
  "ensloss",
  "ensloss_derivatives",
  "inverse_box_cox",
  "is_calibrated_derivative",
  "random_margin_loss_mixture",
]


def inverse_box_cox(values: ArrayLike, *, box_cox: ArrayLike = 0.0) -> jax.Array:
  """The inverse Box-Cox transform `max(1 + lambda x, 0)^(1 / lambda)`, and `exp(x)` at `lambda = 0`.

  Of standard normal values it makes the positive draws of EnsLoss. Where it would leave the dtype's range (`lambda < 0`
  and `1 + lambda x` near or below 0) it is a large finite number with gradient 0.

  >>> import jax.numpy as jnp
  >>> values = jnp.array([0.0, 1.0, -3.0])
  >>> [inverse_box_cox(values, box_cox=power).round(3).tolist() for power in (1.0, 0.5)]
  [[1.0, 2.0, 0.0], [1.0, 2.25, 0.0]]

  Args:
    values: floating `[...]`.
    box_cox: lambda, a real number (or array broadcasting against `values`); may be traced.

  Returns:
    `[...]`, non-negative.

  Raises:
    ValueError: when values are not floating or `box_cox` is not finite.

  Reference: Dai, "EnsLoss: Stochastic Calibrated Loss Ensembles for Preventing Overfitting in Classification",
    ICML 2025; the transform is that of the official code.
  """
  values = as_array("values", values)
  check_float("values", values)
  _check_finite("box_cox", box_cox, values.shape)
  dtype = jnp.promote_types(values.dtype, jnp.float32)
  return _inverse_box_cox(values.astype(dtype), jnp.asarray(box_cox, dtype)).astype(values.dtype)


def ensloss_derivatives(
  margins: ArrayLike,
  key: jax.Array | None = None,
  *,
  noise: ArrayLike | None = None,
  box_cox: ArrayLike = 0.0,
  clamp: ArrayLike = 1.0,
  tail_power: ArrayLike = 1.0,
  offset: ArrayLike = 1e-6,
  where: ArrayLike | None = None,
) -> jax.Array:
  """Random derivatives `d_i = phi'(m_i)` of some convex, calibrated loss `phi`, at the margins of a batch.

  With `u` the inverse Box-Cox transform of standard normal noise, `v = sort(max(-u, -clamp))` is assigned by rank, the
  most negative value to the smallest margin; `d = v / max(m, 1)^tail_power - offset`. The clamp and the offset, and the
  order of all this, are those of the official code. Couples the examples of the batch; no gradient flows through.

  >>> import jax.numpy as jnp
  >>> margins = jnp.array([4.0, -1.0, 0.5])
  >>> d = ensloss_derivatives(margins, noise=jnp.array([-1.0, 2.0, -2.0]))
  >>> [round(value, 3) for value in d.tolist()], bool(is_calibrated_derivative(margins, d))
  ([-0.034, -1.0, -0.368], True)

  Args:
    margins: floating `[batch]`, `m_i = y_i f(x_i)` with `y_i` in {-1, 1}.
    key: threefry key; a new one at every step, else the loss is a fixed one. Exactly one of key and noise is given.
    noise: floating `[batch]`, in any order: used in place of standard normal draws.
    box_cox: lambda of the transform, a real number; may be traced, and so may the others.
    clamp: the steepest slope, positive.
    tail_power: non-negative; above 1 the tail is integrable by itself, whatever is drawn.
    offset: non-negative; what is subtracted so that no derivative is 0.
    where: boolean `[batch]`, the examples that count: the others take part in no ranking and have derivative 0.

  Returns:
    `[batch]`, in `[-clamp - offset, -offset]` and non-decreasing in the margin.

  Raises:
    ValueError: when shapes do not fit, a hyperparameter is out of range, or not exactly one of key and noise is given.

  Reference: Dai, "EnsLoss: Stochastic Calibrated Loss Ensembles for Preventing Overfitting in Classification",
    ICML 2025, the algorithm (conditions for a calibrated convex loss in terms of its derivative).
  """
  margins = as_array("margins", margins)
  check_float("margins", margins)
  if margins.ndim != 1:
    raise ValueError(f"margins must have one axis, of the batch, got shape {margins.shape}; use vmap for more.")
  batch = binary_margins(margins, jnp.ones(margins.shape, jnp.int32), where)
  options = dict(box_cox=box_cox, clamp=clamp, tail_power=tail_power, offset=offset)
  return batch.values(_derivatives(batch, key, noise, None, **options))


def ensloss(
  logits: ArrayLike,
  labels: ArrayLike,
  key: jax.Array | None = None,
  *,
  noise: ArrayLike | None = None,
  box_cox: ArrayLike = 0.0,
  clamp: ArrayLike = 1.0,
  tail_power: ArrayLike = 1.0,
  offset: ArrayLike = 1e-6,
  where: ArrayLike | None = None,
  axis_name: str | None = None,
) -> jax.Array:
  """EnsLoss for binary classification: `stop_gradient(d_i) m_i` with margins `m` and random derivatives `d`.

  Take the mean: its gradient in logit i is `y_i d_i / batch`, a step on a random calibrated loss. **The values are not
  values of a loss**: they mean nothing by themselves and are no good for monitoring; watch the accuracy. `d` ranks the
  margins of the batch and so couples its examples: under `pmap` or `shard_map` pass `axis_name`, and margins are ranked
  and noise is drawn for the global batch, from the first device's key. The method is for two classes only.

  >>> import jax, jax.numpy as jnp
  >>> logits, labels = jnp.array([2.0, -1.0, 0.5]), jnp.array([1, 0, 0])
  >>> gradient = jax.grad(lambda z: ensloss(z, labels, jax.random.key(0)).mean())(logits)
  >>> jnp.sign(gradient).tolist()
  [-1.0, 1.0, 1.0]

  Args:
    logits: floating `[batch]` or `[batch, 1]`, positive for class 1.
    labels: integers `[batch]`, 0 or 1; examples with others do not count.
    key: threefry key; a new one at every step, else the loss is a fixed one. Exactly one of key and noise is given.
    noise: floating `[batch]` in place of standard normal draws; with `axis_name` each device's part of it.
    box_cox: lambda of the inverse Box-Cox transform, a real number; may be traced, and so may the other numbers.
    clamp: the steepest slope, positive.
    tail_power: non-negative power of the margin by which derivatives fall beyond margin 1.
    offset: non-negative; what is subtracted so that no derivative is 0.
    where: boolean `[batch]`, the examples that count: the others take part in no ranking and have loss 0.
    axis_name: static; the mapped axis that splits the batch, if any.

  Returns:
    `[batch]`.

  Raises:
    ValueError: when shapes do not fit, a hyperparameter is out of range, or not exactly one of key and noise is given.

  Reference: Dai, "EnsLoss: Stochastic Calibrated Loss Ensembles for Preventing Overfitting in Classification",
    ICML 2025, the algorithm.
  """
  batch = binary_margins(logits, labels, where)
  if batch.margins.ndim != 1:
    raise ValueError(f"logits must be [batch] or [batch, 1] with labels [batch], got shape {jnp.shape(logits)}.")
  options = dict(box_cox=box_cox, clamp=clamp, tail_power=tail_power, offset=offset)
  return batch.values(_derivatives(batch, key, noise, axis_name, **options) * batch.margins)


def is_calibrated_derivative(margins: ArrayLike, derivatives: ArrayLike) -> jax.Array:
  """Whether some convex, classification-calibrated, non-increasing loss may have these derivatives.

  That is: non-decreasing in the margin, nowhere positive, and negative at the margin closest to 0. At equal margins any
  order will do (a convex function has many slopes at a kink).

  >>> import jax.numpy as jnp
  >>> margins = jnp.array([1.0, -1.0, 0.2])
  >>> [bool(is_calibrated_derivative(margins, d)) for d in (-jnp.array([0.1, 1.0, 0.5]), -jnp.array([1.0, 0.1, 0.5]))]
  [True, False]

  Args:
    margins: floating `[batch]`.
    derivatives: floating `[batch]`.

  Returns:
    Boolean scalar; False when anything is NaN.

  Raises:
    ValueError: when arguments are not floating `[batch]` arrays of one shape, or empty.

  Reference: Bartlett, Jordan, McAuliffe, "Convexity, Classification, and Risk Bounds", JASA 2006, Theorem 2 (convex
    losses); Dai, "EnsLoss", ICML 2025, states it for derivatives.
  """
  check_float("margins", margins)
  check_float("derivatives", derivatives)
  check_same_shape(margins=margins, derivatives=derivatives)
  if jnp.ndim(margins) != 1 or not jnp.size(margins):
    raise ValueError(f"margins must have one axis and not be empty, got shape {jnp.shape(margins)}; use vmap for more.")
  margins, derivatives = jnp.asarray(margins), jnp.asarray(derivatives)
  ordered = derivatives[jnp.lexsort((derivatives, margins))]
  at_zero = derivatives[jnp.argmin(jnp.abs(margins))]
  shaped = jnp.all(ordered[1:] >= ordered[:-1]) & jnp.all(derivatives <= 0) & (at_zero < 0)
  return shaped & ~jnp.any(jnp.isnan(margins))


def random_margin_loss_mixture(
  logits: ArrayLike,
  labels: ArrayLike,
  key: jax.Array,
  *,
  losses: tuple[str, ...] = ("logistic", "hinge", "exponential", "squared_hinge"),
  axis_name: str | None = None,
) -> jax.Array:
  """One of a few fixed calibrated losses, drawn anew for the whole batch: the finite counterpart of EnsLoss.

  Values of different draws are not on one scale. Under `pmap` or `shard_map` pass `axis_name`, and all devices take the
  first device's draw.

  >>> import jax, jax.numpy as jnp
  >>> logits, labels = jnp.array([0.5, -2.0]), jnp.array([1, 0])
  >>> random_margin_loss_mixture(logits, labels, jax.random.key(0), losses=("hinge",)).tolist()
  [0.5, 0.0]

  Args:
    logits: floating `[...]` or `[..., 1]`, positive for class 1.
    labels: integers `[...]`, 0 or 1.
    key: threefry key; a new one at every step.
    losses: static; names in `MARGIN_LOSSES`.
    axis_name: static; the mapped axis that splits the batch, if any.

  Returns:
    `[...]`.

  Raises:
    ValueError: when labels do not fit the logits or a name is unknown.

  Reference: a baseline for Dai, "EnsLoss", ICML 2025; not part of the paper.
  """
  if not losses or not set(losses) <= set(MARGIN_LOSSES):
    raise ValueError(f"losses must be some of {', '.join(MARGIN_LOSSES)}, got {losses!r}.")
  index = jax.random.randint(_first_key(key, axis_name), (), 0, len(losses))
  return jax.lax.switch(
    index, [MARGIN_LOSSES[name] for name in losses], as_array("logits", logits), as_array("labels", labels)
  )


def _derivatives(batch, key, noise, axis_name, *, box_cox, clamp, tail_power, offset):
  """The derivatives at this device's margins."""
  _check_finite("box_cox", box_cox)
  check_hyperparameter("clamp", clamp, low=0, open_low=True, shape=())
  check_hyperparameter("tail_power", tail_power, low=0, shape=())
  check_hyperparameter("offset", offset, low=0, shape=())
  if (key is None) == (noise is None):
    raise ValueError(f"exactly one of key and noise must be given, got {'neither' if key is None else 'both'}.")
  if noise is not None:
    check_float("noise", noise)
    check_same_shape(margins=batch.margins, noise=noise)
  margins, counted = jax.lax.stop_gradient(batch.margins), batch.counted
  dtype, own = margins.dtype, margins.shape[0]
  box_cox, clamp, tail_power, offset = (jnp.asarray(x, dtype) for x in (box_cox, clamp, tail_power, offset))
  if axis_name is not None:
    margins, counted = jax.lax.all_gather((margins, counted), axis_name, tiled=True)
  if noise is None:
    noise = jax.random.normal(_first_key(key, axis_name), margins.shape, dtype)
  elif axis_name is not None:
    noise = jax.lax.all_gather(noise, axis_name, tiled=True)
  slopes = -jnp.minimum(_inverse_box_cox(jnp.asarray(noise, dtype), box_cox), clamp)
  # What does not count comes last in both orders.
  slopes = jnp.sort(jnp.where(counted, slopes, jnp.inf))
  order = jnp.lexsort((margins, ~counted))
  ranked = jnp.zeros_like(margins).at[order].set(slopes, unique_indices=True)
  derivatives = ranked / jnp.maximum(margins, 1) ** tail_power - offset
  if axis_name is not None:
    derivatives = jax.lax.dynamic_slice_in_dim(derivatives, jax.lax.axis_index(axis_name) * own, own)
  return jax.lax.stop_gradient(jnp.where(batch.counted, derivatives, 0))


def _inverse_box_cox(values, power):
  # Below this the product with a value of ordinary size may be subnormal, and the limit is exact in every digit.
  exponential = jnp.abs(power) < 1e-30
  safe = jnp.where(exponential, 1, power)
  inside = exponential | (safe * values > -1)
  exponent = jnp.where(exponential, values, jnp.log1p(jnp.where(inside & ~exponential, safe * values, 0)) / safe)
  limit = log_limit(values.dtype)
  beyond = jnp.where(safe > 0, 0, jnp.exp(limit))
  return jnp.where(inside, jnp.exp(jnp.minimum(exponent, limit)), beyond)


def _first_key(key, axis_name):
  """The first device's key: tasks give every device its own."""
  if axis_name is None:
    return key
  if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
    return jax.lax.all_gather(key, axis_name)[0]
  # Typed keys cannot be gathered inside shard_map.
  words = jax.lax.all_gather(jax.random.key_data(key), axis_name)[0]
  return jax.random.wrap_key_data(words, impl=jax.random.key_impl(key))


def _check_finite(name, value, shape=()):
  check_hyperparameter(name, value, low=-np.inf, high=np.inf, open_low=True, open_high=True, shape=shape)
