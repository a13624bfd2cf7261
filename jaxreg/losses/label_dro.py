"""Label-distributionally robust losses: LDR-KL with one temperature, ALDR-KL with one that adapts to each example."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxreg.checks import as_array, check_float, check_hyperparameter, check_state
from jaxreg.losses.example_table import gather_rows, only_examples, table_ids, update_rows
from jaxreg.losses.labelled_logits import classes_last, labelled, narrowed, widened
from jaxreg.losses.softmax_family import of_label, with_label

__all__ = [
  "ALDRState",
  "NORMALIZATIONS",
  "aldr_fixed_point",
  "aldr_kl_init",
  "aldr_kl_loss",
  "ldr_kl_loss",
  "ldr_weights",
  "normalize_scores",
]

NORMALIZATIONS = (None, "l1_mean", "softplus_mean")
# Below every score.
_EXCLUDED = -1e30


class ALDRState(NamedTuple):
  """The temperature of every example, `[examples]`, and the one that they start from."""

  temperature: jax.Array
  initial: jax.Array | None = None  # the paper's lambda_0, a scalar


def normalize_scores(logits: ArrayLike, *, normalize: str | None, where: ArrayLike | None = None) -> jax.Array:
  """Bounded scores: `z / mean|z|` (`l1_mean`) or `softplus(z) / mean(softplus(z))` (`softplus_mean`).

  The mean is over the last axis. Where that of `|z|` is zero, or so small that its square underflows (1e-19 in
  float32), the row is not divided.

  >>> import jax.numpy as jnp
  >>> print(normalize_scores(jnp.array([[3.0, -1.0]]), normalize="l1_mean"))
  [[ 1.5 -0.5]]

  Args:
    logits: floating `[..., classes]`.
    normalize: static; None, `l1_mean` or `softplus_mean`.
    where: boolean, broadcasting against `logits`: the classes that take part.

  Returns:
    `[..., classes]`.

  Raises:
    ValueError: for another `normalize`.
  """
  if normalize not in NORMALIZATIONS:
    raise ValueError(f"normalize must be one of {NORMALIZATIONS}, got {normalize!r}.")
  logits = as_array("logits", logits)
  wide, where = classes_last(logits, where=where)
  scores, mean = _positive_scores(lifted(wide, normalize, where), normalize, where)
  return narrowed(scores / mean, logits.dtype)


def ldr_kl_loss(
  logits: ArrayLike,
  labels: ArrayLike,
  *,
  temperature: ArrayLike = 1.0,
  margin: ArrayLike = 0.0,
  normalize: str | None = None,
  axis: int = -1,
  where: ArrayLike | None = None,
) -> jax.Array:
  """LDR-KL: `t log mean_k exp((f_k - f_y + margin [k != y]) / t)`, `f` the (normalised) logits.

  The mean is over all classes. At `t = 1` and no margin it is cross-entropy less `log(classes)`; `t -> 0` gives the
  Crammer-Singer hinge and `t = inf` a linear loss that is symmetric, hence robust to uniform label noise, for bounded
  scores: normalise them.

  >>> import jax.numpy as jnp
  >>> logits, labels = jnp.array([[2.0, 0.0, -1.0]]), jnp.array([1])
  >>> [round(ldr_kl_loss(logits, labels, temperature=t, margin=0.1).item(), 2) for t in (0.0, 1.0, float("inf"))]
  [2.1, 1.16, 0.4]

  Args:
    logits: floating `[..., classes]`.
    labels: integers `[...]`.
    temperature: the paper's lambda, non-negative, 0 and infinity included; a scalar or `[...]`; may be traced.
    margin: non-negative scalar; may be traced.
    normalize: static; see `normalize_scores`.
    axis: the axis of the classes.
    where: boolean, broadcasting against `logits`: the classes that take part; must include the label.

  Returns:
    `[...]`, the loss of each example.

  Raises:
    ValueError: when shapes do not fit or a hyperparameter is out of range.

  Reference: Zhu, Ying, Yang, "Label Distributionally Robust Losses for Multi-class Classification", ICML 2023, the
    LDR-KL loss.
  """
  if normalize not in NORMALIZATIONS:
    raise ValueError(f"normalize must be one of {NORMALIZATIONS}, got {normalize!r}.")
  batch = labelled(logits, labels, axis=axis, where=where)
  temperature = batch.hyperparameter("temperature", temperature, low=0)
  margin = batch.hyperparameter("margin", margin, low=0, scalar=True)
  temperature = jnp.broadcast_to(temperature, batch.labels.shape)
  wide = lifted(batch.logits, normalize, batch.where)
  return batch.values(_ldr_kl(normalize, wide, batch.labels, temperature, margin, batch.where))


def ldr_weights(
  logits: ArrayLike, labels: ArrayLike, *, temperature: ArrayLike = 1.0, margin: ArrayLike = 0.0
) -> jax.Array:
  """The worst-case label distribution `p*` at which LDR-KL takes its maximum: `softmax((f - f_y + margin) / t)`.

  >>> import jax.numpy as jnp
  >>> print(ldr_weights(jnp.array([[1.0, 1.0]]), jnp.array([0]), temperature=2.0))
  [[0.5 0.5]]

  Args:
    logits: floating `[..., classes]`, normalised if the loss is to be.
    labels: integers `[...]`.
    temperature: non-negative, 0 and infinity included; a scalar or `[...]`.
    margin: non-negative scalar.

  Returns:
    `[..., classes]`, of sum 1; zeros for a label outside `[0, classes)`.

  Raises:
    ValueError: when shapes do not fit or a hyperparameter is out of range.

  Reference: Zhu, Ying, Yang, ICML 2023, the maximiser of the LDR-KL loss.
  """
  batch = labelled(logits, labels)
  temperature = batch.hyperparameter("temperature", temperature, low=0)
  margin = batch.hyperparameter("margin", margin, low=0, scalar=True)
  temperature = jnp.broadcast_to(temperature, batch.labels.shape)
  _, parts = _forward(None, batch.logits, batch.labels, temperature, margin, None)
  weights = with_label(parts.powers * parts.factor, batch.labels, parts.own_weight)
  return jnp.where(batch.counted[..., None], weights, 0).astype(batch.dtype)


def aldr_kl_init(num_examples: int, *, temperature: ArrayLike, dtype=jnp.float32) -> ALDRState:
  """Every example at the initial temperature.

  >>> aldr_kl_init(5, temperature=10.0).temperature.shape
  (5,)

  Args:
    num_examples: size of the data set; ids index it.
    temperature: the paper's lambda_0, positive; may be traced.
    dtype: storage dtype.

  Returns:
    An `ALDRState`.
  """
  check_hyperparameter("temperature", temperature, low=0, open_low=True, shape=())
  wide = jnp.promote_types(dtype, jnp.float32)
  return ALDRState(jnp.full((num_examples,), temperature, dtype), jnp.asarray(temperature, wide))


def aldr_kl_loss(
  logits: ArrayLike,
  labels: ArrayLike,
  ids: ArrayLike,
  *,
  state: ALDRState,
  initial_temperature: ArrayLike | None = None,
  alpha: ArrayLike = 2.0,
  margin: ArrayLike = 0.1,
  normalize: str | None = "l1_mean",
  floor: ArrayLike = 1e-5,
  where: ArrayLike | None = None,
  unique_ids: bool = False,
  axis_name: str | None = None,
) -> tuple[jax.Array, ALDRState]:
  """ALDR-KL: LDR-KL whose temperature falls for examples that are predicted with confidence, one update per visit.

  `t <- t0 - t0 KL(p || uniform) / (alpha log K)`, with `p` the softmax of `f / t` (without margin, lifted by `floor`
  and renormalised) and no gradient; the loss is LDR-KL at the new `t` less `alpha log K (t - t0)^2 / (2 t0)`.

  >>> import jax.numpy as jnp
  >>> state, labels = aldr_kl_init(4, temperature=1.0), jnp.array([0, 1])
  >>> logits = jnp.array([[5.0, 0.0, -5.0], [0.0, 0.0, 0.0]])
  >>> for ids in (jnp.array([0, 1]), jnp.array([2, 3])):
  ...   values, state = aldr_kl_loss(logits, labels, ids, state=state)
  >>> values.shape, (state.temperature < 1).tolist()
  ((2,), [True, False, True, False])

  Args:
    logits: floating `[..., classes]`.
    labels: integers `[...]`.
    ids: integers `[...]`, each example's index in the data set; see `update_rows` for those outside the table and
      those that occur twice. An example outside the table is at the initial temperature.
    state: from `aldr_kl_init` or the step before; keep it in checkpoints.
    initial_temperature: only for a state made by hand, which does not hold it: the paper's lambda_0, positive.
    alpha: greater than 1; temperatures stay in `[t0 (1 - 1 / alpha), t0]`.
    margin: non-negative.
    normalize: static; see `normalize_scores`.
    floor: non-negative, added to every probability in the update.
    where: boolean `[...]`, the examples that count: the others have loss 0 and change no temperature, as have those
      whose label is outside `[0, classes)`.
    unique_ids: static; see `update_rows`.
    axis_name: static; under `pmap` or `shard_map`, the axis that splits the batch.

  Returns:
    The loss of each example `[...]`, and the new state.

  Raises:
    ValueError: when shapes do not fit or a hyperparameter is out of range.

  Reference: Zhu, Ying, Yang, ICML 2023, the ALDR-KL loss; the update follows the official code.
  """
  if normalize not in NORMALIZATIONS:
    raise ValueError(f"normalize must be one of {NORMALIZATIONS}, got {normalize!r}.")
  check_state(state, ALDRState)
  batch = only_examples(labelled(logits, labels), where)
  start = state.initial if initial_temperature is None else initial_temperature
  if start is None:
    raise ValueError("initial_temperature must be given for a state that does not hold it; aldr_kl_init makes one.")
  start = batch.hyperparameter("initial_temperature", start, low=0, open_low=True, scalar=True)
  alpha = batch.hyperparameter("alpha", alpha, low=1, open_low=True, scalar=True)
  margin = batch.hyperparameter("margin", margin, low=0, scalar=True)
  floor = batch.hyperparameter("floor", floor, low=0, scalar=True)
  table = as_array("state", state.temperature)
  ids = table_ids(ids, batch.labels.shape, table.shape[0], batch.counted)
  old = gather_rows(table, ids, default=start)
  wide = lifted(batch.logits, normalize, None)
  scores, mean = jax.lax.stop_gradient(_positive_scores(wide, normalize, None))
  log_classes = jnp.log(jnp.asarray(batch.logits.shape[-1], scores.dtype))
  new = _adapted(scores, inverse_scale(mean[..., 0], old), start, alpha, log_classes, floor)
  values = _ldr_kl(normalize, wide, batch.labels, new, margin, None)
  values -= alpha * log_classes / (2 * start) * (new - start) ** 2
  table = update_rows(table, ids, new, unique_ids=unique_ids, axis_name=axis_name)
  return batch.values(values), state._replace(temperature=table)


def aldr_fixed_point(
  differences: ArrayLike,
  *,
  initial_temperature: ArrayLike,
  alpha: ArrayLike = 2.0,
  iterations: int = 200,
) -> jax.Array:
  """The largest solution of `t = t0 - t0 KL(softmax(d / t) || uniform) / (alpha log K)`, by iteration from `t0`.

  >>> import jax.numpy as jnp
  >>> aldr_fixed_point(jnp.zeros((1, 3)), initial_temperature=2.0).tolist()
  [2.0]

  Args:
    differences: `[..., classes]`, scores less the label's score, with or without the margin.
    initial_temperature: positive.
    alpha: greater than 1.
    iterations: static; the iterates decrease monotonically.

  Returns:
    `[...]`, in `[t0 (1 - 1 / alpha), t0]`.

  Raises:
    ValueError: when a hyperparameter is out of range.

  Reference: Zhu, Ying, Yang, ICML 2023, stationarity in lambda of the ALDR-KL objective.
  """
  differences = as_array("differences", differences)
  check_float("differences", differences)
  check_hyperparameter("initial_temperature", initial_temperature, low=0, open_low=True, shape=())
  check_hyperparameter("alpha", alpha, low=1, open_low=True, shape=())
  wide = widened(differences)
  start = jnp.asarray(initial_temperature, wide.dtype)
  log_classes = jnp.log(jnp.asarray(differences.shape[-1], wide.dtype))
  update = lambda _, t: _adapted(wide, 1 / t, start, alpha, log_classes, 0.0)
  first = jnp.broadcast_to(start, differences.shape[:-1])
  return jax.lax.fori_loop(0, iterations, update, first).astype(differences.dtype)


def _adapted(scores, rate, start, alpha, log_classes, floor):
  """The temperature that belongs to the current prediction, `softmax(rate * scores)`."""
  powers = jnp.exp((scores - jnp.max(scores, axis=-1, keepdims=True)) * rate[..., None])
  total = jnp.sum(powers, axis=-1, keepdims=True)
  probabilities = (powers / total + floor) / (1 + scores.shape[-1] * floor)
  ratio = jnp.maximum(scores.shape[-1] * probabilities, jnp.finfo(scores.dtype).tiny)
  divergence = jnp.sum(probabilities * jnp.log(ratio), axis=-1)
  # With one class there is nothing to diverge from.
  fall = jnp.where(log_classes > 0, divergence / (alpha * jnp.where(log_classes > 0, log_classes, 1)), 0)
  return jnp.maximum(start - start * fall, 0)


def _positive_scores(logits, normalize, where):
  """Scores and the mean by which they are divided; a row of zeros, or next to it, is divided by one."""
  if normalize is None:
    return logits, jnp.ones((*logits.shape[:-1], 1), logits.dtype)
  if normalize == "l1_mean":
    scores = logits
    mean = jnp.mean(jnp.abs(logits), axis=-1, keepdims=True, where=where)
  else:
    # jax.nn.softplus also looks after infinities, at twice the time.
    scores = jnp.maximum(logits, 0) + jnp.log1p(jnp.exp(-jnp.abs(logits)))
    mean = jnp.mean(scores, axis=-1, keepdims=True, where=where)
  return scores, divisor(mean)


def lifted(logits, normalize, where):
  """Logits whose softplus does not underflow: where all are far below zero it is an exponential, of any scale."""
  if normalize != "softplus_mean":
    return logits
  largest = jnp.max(logits, axis=-1, keepdims=True, where=where, initial=-jnp.inf)
  return logits + lift(jax.lax.stop_gradient(largest))


def lift(largest):
  """What is added to a row of logits so that its largest is not below the point where softplus is exp to rounding."""
  floor = -20.0 if largest.dtype == jnp.float32 else -40.0
  return jnp.where(largest < floor, floor - largest, 0)


def divisor(mean):
  """The mean by which scores are divided: one in place of zero, or next to it."""
  # The derivative divides by the mean twice, which XLA may turn into a division by its square.
  return jnp.where(mean <= jnp.sqrt(jnp.finfo(mean.dtype).tiny), 1, mean)


class _Parts(NamedTuple):
  """What loss, gradient and weights share; `[..., 1]` where not said otherwise.

  The weight of class k is `powers_k * factor`, that of the label `own_weight`.
  """

  scores: jax.Array  # before the division by their mean, [..., classes]
  powers: jax.Array  # exp((scores - largest) / (mean t)), 0 for the label, [..., classes]
  largest: jax.Array  # of the scores
  best: jax.Array  # d that goes with it
  top: jax.Array  # the larger of `best` and the label's d, 0
  factor: jax.Array
  own_weight: jax.Array
  rest: jax.Array  # sum of the other classes' weights, 1 - own_weight without cancellation
  mean: jax.Array  # what the scores are divided by
  lead: jax.Array | None  # mean of the normalised scores less the label's under the weights
  log_mean: jax.Array  # log mean exp((d - top) / t)


def _forward(normalize, logits, labels, temperature, margin, where):
  dtype = logits.dtype
  temperature = bounded_temperature(temperature, dtype)[..., None]
  scores, mean = _positive_scores(logits, normalize, where)
  own = of_label(scores, labels)
  classes = logits.shape[-1]
  if where is not None:
    scores, classes = jnp.where(where, scores, own), jnp.sum(where, axis=-1, keepdims=True)
  largest = _largest(scores, own, labels, temperature, margin, where)
  exponent = (scores - largest) * inverse_scale(mean, temperature)
  powers = jnp.exp(jnp.where(exponent > 0, 0, exponent))  # only the label's can be positive
  powers = with_label(powers if where is None else jnp.where(where, powers, 0), labels, 0)
  best = (largest - own) / mean + margin
  top = jnp.maximum(best, 0)
  factor, own_power = jnp.exp((best - top) / temperature), jnp.exp(-top / temperature)
  total_power = jnp.sum(powers, axis=-1, keepdims=True)
  rest = factor * total_power
  total = rest + own_power
  factor, own_weight, rest = factor / total, own_power / total, rest / total

  def lead():
    """The mean of the scores less the label's under the weights, as they enter d."""
    # The rounding of the plain product is that of the scores themselves, and XLA sums it faster than a shifted one.
    return factor * (jnp.sum(powers * scores, axis=-1, keepdims=True) - own * total_power) / mean

  normalized = None if normalize is None else lead()

  def shares():
    """The mean of (d - top) / t under equal weights and under the weights themselves."""
    # Relative to the largest: XLA would store a difference that two sums share.
    differences = jnp.sum(scores - largest, axis=-1, keepdims=True) + scores.shape[-1] * (largest - own)
    uniform = differences / (mean * classes) + margin * (1 - 1 / classes)
    tilted = (lead() if normalize is None else normalized) + margin * rest
    return (uniform - top) / temperature, (tilted - top) / temperature

  log_mean = _log_mean(total / classes, classes, shares)
  value = (top + temperature * log_mean)[..., 0]
  return value, _Parts(scores, powers, largest, best, top, factor, own_weight, rest, mean, normalized, log_mean)


def _largest(scores, own, labels, temperature, margin, where):
  """The largest score; without the label's where that and a margin much above t make all other powers vanish.

  The second maximum takes a copy of the scores, so it is not computed when no example needs it.
  """
  scores, own = jax.lax.stop_gradient((scores, own))
  largest = jnp.max(scores, axis=-1, keepdims=True)
  if where is not None:
    scores = jnp.where(where, scores, _EXCLUDED)
  vanish = (largest == own) & (margin > 50 * temperature)
  others = lambda: jnp.max(with_label(scores, labels, _EXCLUDED), axis=-1, keepdims=True)
  return jnp.where(vanish, jax.lax.cond(jnp.any(vanish), others, lambda: largest), largest)


def bounded_temperature(temperature, dtype):
  """Bounds inside which the formula with division and multiplication by t covers t = 0 and t = inf to rounding."""
  big = 1e12 if dtype == jnp.float32 else 1e18
  return jnp.clip(temperature, 1 / big**2, big)


def inverse_scale(mean, temperature):
  """`1 / (mean * temperature)`, neither zero nor infinite."""
  limits = jnp.finfo(mean.dtype)
  return jnp.clip(1 / mean / temperature, limits.tiny, limits.max)


def _log_mean(average_power, classes, means):
  """`log mean exp(x)`, from the mean of exp(x) and a function: the means of x under equal weights and weights exp(x).

  log(1 + small) loses the digits that multiplying by a large t would need. The derivative of log mean exp(u x) in u is
  the mean of x under weights exp(u x): where that hardly changes from u = 0 to 1, its trapezoid is the better value.
  That takes a variance below the threshold and hence, the largest x being 0, a logarithm not far below 0.
  """
  threshold = 1e-5 if average_power.dtype == jnp.float32 else 1e-10
  direct = jnp.log(average_power)

  def trapezoid():
    start, end = means()
    return jnp.where(end - start < threshold, (start + end) / 2, direct)

  return jax.lax.cond(jnp.any(direct > -2 * jnp.sqrt(classes * threshold)), trapezoid, lambda: direct)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _ldr_kl(normalize, logits, labels, temperature, margin, where):
  return _forward(normalize, logits, labels, temperature, margin, where)[0]


def _ldr_kl_jvp(normalize, primals, tangents):
  logits, labels, temperature, margin, where = primals
  logits_dot, _, temperature_dot, margin_dot, _ = tangents
  value, parts = _forward(normalize, logits, labels, temperature, margin, where)
  dot = jnp.zeros_like(value)
  if not _is_zero(logits_dot):
    dot += _along_logits(normalize, logits, labels, parts, where, logits_dot)
  if not _is_zero(temperature_dot):
    dot -= _divergence(parts, bounded_temperature(temperature, logits.dtype)[..., None])[..., 0] * temperature_dot
  if not _is_zero(margin_dot):
    dot += parts.rest[..., 0] * margin_dot
  return value, dot


def _along_logits(normalize, logits, labels, parts, where, logits_dot):
  """The derivative in a direction, the label's part apart from the sum (its transpose adds to one entry in place)."""
  gradient = parts.powers * (parts.factor / parts.mean)
  own = -parts.rest / parts.mean
  if normalize is not None:
    count = logits.shape[-1] if where is None else jnp.sum(where, axis=-1, keepdims=True)
    shift = parts.lead / (parts.mean * count)
    if normalize == "l1_mean":
      gradient -= jnp.sign(logits) * shift
    else:
      gradient = jnp.exp(logits - parts.scores) * (gradient - shift)  # sigmoid = exp(z - softplus(z))
      own *= jax.nn.sigmoid(of_label(logits, labels))
  if where is not None:
    gradient = jnp.where(where, gradient, 0)
  return jnp.sum(gradient * logits_dot, axis=-1) + (own * of_label(logits_dot, labels))[..., 0]


def _divergence(parts, temperature):
  """KL divergence of the weights from equal ones."""
  # Where a power is zero its exponent may be infinite.
  exponent = jnp.where(parts.powers > 0, (parts.scores - parts.largest) * inverse_scale(parts.mean, temperature), 0)
  shift = jnp.where(parts.rest > 0, (parts.best - parts.top) / temperature, 0)
  tilted = parts.factor * jnp.sum(parts.powers * exponent, axis=-1, keepdims=True) + parts.rest * shift
  return tilted - parts.own_weight * (parts.top / temperature) - parts.log_mean


def _is_zero(tangent) -> bool:
  return isinstance(tangent, jax.custom_derivatives.SymbolicZero)


_ldr_kl.defjvp(_ldr_kl_jvp, symbolic_zeros=True)
