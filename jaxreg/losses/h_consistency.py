"""H-consistency bounds of comp-sum losses: from the regret of the surrogate to the regret of its classifier."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxreg.checks import as_array, check_float, check_hyperparameter, check_same_shape
from jaxreg.losses.binary_margin import log_limit
from jaxreg.losses.comp_sum import comp_sum_outer
from jaxreg.losses.labelled_logits import widened

__all__ = [
  "bayes_conditional_risk",
  "deterministic_bounded_risk",
  "h_consistency_gamma",
  "h_consistency_gamma_bound",
  "h_consistency_transform",
  "minimizability_gap",
]


def h_consistency_transform(error_regret: ArrayLike, *, tau: ArrayLike, classes: ArrayLike) -> jax.Array:
  """The transform T: no classifier with zero-one regret b has a smaller comp-sum regret than `T(b)`.

  With `A = (((1 + b)^(1/(2 - tau)) + (1 - b)^(1/(2 - tau))) / 2)^(2 - tau)` and n classes it is

  - `2^(1 - tau) (1 - A) / (1 - tau)` for `tau < 1`,
  - `((1 + b) log(1 + b) + (1 - b) log(1 - b)) / 2` for `tau = 1`,
  - `(A - 1) / ((tau - 1) n^(tau - 1))` for `1 < tau < 2`,
  - `b / ((tau - 1) n^(tau - 1))` for `tau >= 2`.

  It is convex and increasing, and attained for `tau <= 1`, and for two classes and `tau <= 2`.

  >>> import jax.numpy as jnp
  >>> [round(float(h_consistency_transform(jnp.array(1.0), tau=tau, classes=2)), 3) for tau in (0.0, 1.0, 2.0)]
  [1.0, 0.693, 0.5]

  Args:
    error_regret: the zero-one regret b in [0, 1], floating `[...]`.
    tau: non-negative scalar (or array broadcasting against `error_regret`); may be traced.
    classes: number of classes, at least 2; may be traced.

  Returns:
    `[...]`, in units of the loss. The derivative at `b = 1`, infinite for some tau, is replaced by a finite one.

  Raises:
    ValueError: when an argument is not floating point or a hyperparameter is out of range.

  Reference: Mao, Mohri, Zhong, "Cross-Entropy Loss Functions: Theoretical Analysis and Applications", ICML 2023,
    the H-consistency bounds of comp-sum losses (Section 4).
  """
  b, tau, classes = _checked("error_regret", error_regret, tau, classes)
  gap = 1 - tau
  log_mean = _log_power_mean(b, gap)
  logistic, absolute = gap == 0, tau >= 2
  curved = -jnp.expm1(log_mean) / jnp.where(logistic, 1, gap)
  curved = jnp.where(gap > 0, 2.0, classes) ** gap * curved
  entropy = ((1 + b) * jnp.log1p(b) + jnp.where(b < 1, (1 - b) * jnp.log1p(-jnp.where(b < 1, b, 0)), 0)) / 2
  linear = -b * classes**gap / jnp.where(absolute, gap, -1)
  return jnp.where(absolute, linear, jnp.where(logistic, entropy, curved)).astype(jnp.result_type(error_regret))


def h_consistency_gamma(loss_regret: ArrayLike, *, tau: ArrayLike, classes: ArrayLike) -> jax.Array:
  """The bound on the zero-one regret, the inverse of `h_consistency_transform`: by bisection, at most 1.

  The bound reads `R_01(h) - R_01*(H) + M_01(H) <= Gamma(R_L(h) - R_L*(H) + M_L(H))` for symmetric, complete H, with the
  gaps M of `minimizability_gap`.

  >>> import jax.numpy as jnp
  >>> h_consistency_gamma(jnp.array([0.0, 0.5, 4.0]), tau=2.0, classes=2).tolist()
  [0.0, 1.0, 1.0]

  Args:
    loss_regret: the regret of the comp-sum loss, plus its minimizability gap, floating `[...]`; below zero it is zero.
    tau: non-negative scalar (or array broadcasting against `loss_regret`); may be traced.
    classes: number of classes, at least 2; may be traced.

  Returns:
    `[...]` in [0, 1]. The gradient is that of the inverse function, and zero where the inverse is 0 or 1.

  Raises:
    ValueError: when an argument is not floating point or a hyperparameter is out of range.

  Reference: Mao, Mohri, Zhong, "Cross-Entropy Loss Functions: Theoretical Analysis and Applications", ICML 2023,
    the function Gamma of the H-consistency bounds (Section 4).
  """
  regret, tau, classes = _checked("loss_regret", loss_regret, tau, classes)
  shape = jnp.broadcast_shapes(regret.shape, tau.shape, classes.shape)
  transform = lambda b: h_consistency_transform(b, tau=tau, classes=classes)
  low, high = jnp.zeros(shape, regret.dtype), jnp.ones(shape, regret.dtype)

  def halve(_, bracket):
    low, high = bracket
    middle = (low + high) / 2
    below = transform(middle) < regret
    return jnp.where(below, middle, low), jnp.where(below, high, middle)

  steps = 2 * jnp.finfo(regret.dtype).nmant  # so small inverses keep half of their digits or more
  low, high = jax.lax.fori_loop(0, steps, halve, jax.lax.stop_gradient((low, high)))
  inside = (regret > 0) & (regret < transform(jnp.ones(shape, regret.dtype)))
  edge = jnp.where(jnp.isnan(regret), regret, jnp.where(regret > 0, 1.0, 0.0))
  found = jnp.where(inside, jax.lax.stop_gradient(low + high) / 2, edge)
  # One Newton step whose value is taken away again leaves the derivative of the implicit function.
  _, slope = jax.jvp(transform, (found,), (jnp.ones(shape, regret.dtype),))
  usable = inside & (slope > 0)
  newton = jnp.where(usable, (regret - transform(found)) / jax.lax.stop_gradient(jnp.where(usable, slope, 1)), 0)
  return (found + newton - jax.lax.stop_gradient(newton)).astype(jnp.result_type(loss_regret))


def h_consistency_gamma_bound(loss_regret: ArrayLike, *, tau: ArrayLike, classes: ArrayLike) -> jax.Array:
  """A bound on `h_consistency_gamma` in closed form, for a regret t and n classes.

  `sqrt(2^tau (2 - tau) t)` for `tau < 1`, `sqrt(2 n^(tau - 1) t)` for `1 <= tau < 2`, and `(tau - 1) n^(tau - 1) t` for
  `tau >= 2`.

  >>> import jax.numpy as jnp
  >>> h_consistency_gamma_bound(jnp.array([0.0, 0.125]), tau=1.0, classes=2).tolist()
  [0.0, 0.5]

  Args:
    loss_regret: as for `h_consistency_gamma`.
    tau: non-negative scalar (or array broadcasting against `loss_regret`); may be traced.
    classes: number of classes, at least 2; may be traced.

  Returns:
    `[...]`, which may exceed 1. The derivative at zero, infinite for `tau < 2`, is replaced by zero.

  Raises:
    ValueError: when an argument is not floating point or a hyperparameter is out of range.

  Reference: Mao, Mohri, Zhong, "Cross-Entropy Loss Functions: Theoretical Analysis and Applications", ICML 2023,
    the upper bounds on Gamma (Section 4).
  """
  regret, tau, classes = _checked("loss_regret", loss_regret, tau, classes)
  regret = jnp.where(regret < 0, 0, regret)
  curved, zero = tau < 2, regret == 0
  below = jnp.where(curved, tau, 1)
  factor = jnp.where(below < 1, 2**below * (2 - below), 2 * classes ** (below - 1))
  root = jnp.where(zero, 0, jnp.sqrt(jnp.where(curved & ~zero, factor * regret, 1)))
  above = jnp.where(curved, 2, tau) - 1
  # The power may leave the dtype's range, and its product with a regret of zero be no number.
  slope = jnp.exp(jnp.minimum(jnp.log(above) + above * jnp.log(classes), log_limit(regret.dtype)))
  bound = jnp.where(curved, root, slope * regret)
  return bound.astype(jnp.result_type(loss_regret))


def bayes_conditional_risk(probabilities: ArrayLike, *, tau: ArrayLike, axis: int = -1) -> jax.Array:
  """The smallest expected comp-sum loss that scores can have when labels are drawn from `probabilities`.

  `((sum_y p_y^(1/(2 - tau)))^(2 - tau) - 1) / (1 - tau)` for `tau < 2`, which is the entropy at `tau = 1`, and
  `(1 - max_y p_y) / (tau - 1)` for `tau >= 2`. For `tau < 2` it is reached by a softmax proportional to
  `p^(1/(2 - tau))`.

  >>> import jax.numpy as jnp
  >>> p = jnp.array([0.5, 0.5])
  >>> [round(float(bayes_conditional_risk(p, tau=tau)), 3) for tau in (0.0, 1.0, 2.0)]
  [1.0, 0.693, 0.5]

  Args:
    probabilities: floating `[..., classes]`, non-negative and summing to one.
    tau: non-negative scalar (or array broadcasting against the result); may be traced.
    axis: the axis of the classes.

  Returns:
    `[...]`. The derivative in a probability of zero, infinite for some tau, is replaced by a finite one.

  Raises:
    ValueError: when `probabilities` are not floating point or `tau` is negative.

  Reference: Mao, Mohri, Zhong, "Cross-Entropy Loss Functions: Theoretical Analysis and Applications", ICML 2023,
    the minimal conditional risks behind the minimizability gaps (Section 4).
  """
  check_float("probabilities", probabilities)
  dtype = jnp.promote_types(jnp.result_type(probabilities), jnp.float32)
  p = jnp.moveaxis(jnp.asarray(probabilities, dtype), axis, -1)
  check_hyperparameter("tau", tau, low=0, shape=p.shape[:-1])
  tau = jnp.asarray(tau, dtype)
  gap, logistic, absolute = 1 - tau, tau == 1, tau >= 2
  rest = jnp.where(absolute, 1, 2 - tau)
  log_p = jnp.log(jnp.where(p > 0, p, 1))
  # Close to tau = 1 the power sum is one plus something small; far above it is small itself, and its logarithm exact.
  close = tau < 1.25
  excess = jnp.sum(p * jnp.expm1(-jnp.where(close, gap / rest, 0)[..., None] * log_p), axis=-1)
  powers = jnp.where(p > 0, log_p / jnp.where(close, 1, rest)[..., None], -jnp.inf)
  log_norm = rest * jnp.where(close, jnp.log1p(excess), jax.nn.logsumexp(powers, axis=-1))
  curved = jnp.expm1(log_norm) / jnp.where(logistic, 1, gap)
  entropy = -jnp.sum(p * log_p, axis=-1)
  linear = -(1 - jnp.max(p, axis=-1)) / jnp.where(absolute, gap, -1)
  risk = jnp.where(absolute, linear, jnp.where(logistic, entropy, curved))
  return risk.astype(jnp.result_type(probabilities))


def deterministic_bounded_risk(score_bound: ArrayLike, *, tau: ArrayLike, classes: ArrayLike) -> jax.Array:
  """The smallest comp-sum loss of a certain label when no score exceeds a bound L in size: `Phi((n - 1) exp(-2 L))`.

  >>> import jax.numpy as jnp
  >>> round(float(deterministic_bounded_risk(jnp.array(0.0), tau=0.0, classes=4)), 3)
  3.0

  Args:
    score_bound: non-negative, floating `[...]`, the largest absolute score.
    tau: non-negative scalar (or array broadcasting against `score_bound`); may be traced.
    classes: number of classes n, at least 2; may be traced.

  Returns:
    `[...]`.

  Raises:
    ValueError: when `score_bound` is not floating point or a hyperparameter is out of range.

  Reference: Mao, Mohri, Zhong, "Cross-Entropy Loss Functions: Theoretical Analysis and Applications", ICML 2023,
    minimizability gaps for deterministic labels and bounded scores (Section 4).
  """
  bound, tau, classes = _checked("score_bound", score_bound, tau, classes)
  return comp_sum_outer((classes - 1) * jnp.exp(-2 * bound), tau=tau).astype(jnp.result_type(score_bound))


def minimizability_gap(
  best_risk: ArrayLike, best_conditional_risks: ArrayLike, *, weights: ArrayLike | None = None
) -> jax.Array:
  """The minimizability gap: the best risk within a hypothesis set less the mean of the best conditional risks.

  It is zero for the set of all functions. For a set in which the best risk is not known it cannot be computed; the
  risk of any member in place of the best bounds it from above.

  >>> import jax.numpy as jnp
  >>> round(float(minimizability_gap(jnp.array(0.5), jnp.array([0.1, 0.5]))), 3)
  0.2

  Args:
    best_risk: the smallest expected loss over the set, floating scalar.
    best_conditional_risks: at each input the smallest conditional risk over the set, floating `[inputs]`: of
      `bayes_conditional_risk` where scores are free, of `deterministic_bounded_risk` where they are bounded.
    weights: probabilities of the inputs, floating `[inputs]`; default uniform.

  Returns:
    A scalar.

  Raises:
    ValueError: when an argument is not floating point or shapes differ.

  Reference: Mao, Mohri, Zhong, "Cross-Entropy Loss Functions: Theoretical Analysis and Applications", ICML 2023,
    the minimizability gap (Section 2).
  """
  check_float("best_risk", best_risk)
  check_float("best_conditional_risks", best_conditional_risks)
  if weights is not None:
    check_float("weights", weights)
    check_same_shape(best_conditional_risks=best_conditional_risks, weights=weights)
  dtype = jnp.promote_types(jnp.result_type(best_risk, best_conditional_risks), jnp.float32)
  conditional = jnp.asarray(best_conditional_risks, dtype)
  mean = jnp.mean(conditional) if weights is None else jnp.sum(conditional * jnp.asarray(weights, dtype))
  return (jnp.asarray(best_risk, dtype) - mean).astype(jnp.result_type(best_risk))


def _checked(name, value, tau, classes):
  """The arguments that the transforms share, in float32 or wider."""
  value = as_array(name, value)
  check_float(name, value)
  check_hyperparameter("tau", tau, low=0, shape=value.shape)
  check_hyperparameter("classes", classes, low=2, shape=value.shape)
  wide = widened(value)
  return wide, jnp.asarray(tau, wide.dtype), jnp.asarray(classes, wide.dtype)


def _log_power_mean(b, gap):
  """`(1 + gap) log(((1 + b)^(1/(1 + gap)) + (1 - b)^(1/(1 + gap))) / 2)` for `gap > -1`; anything finite elsewhere."""
  rest = jnp.where(gap > -1, 1 + gap, 1)
  inside = b < 1
  log_up, log_down = jnp.log1p(b), jnp.log1p(-jnp.where(inside, b, 0))
  # The mean of the powers is one plus something small near tau = 1; near tau = 2 the larger power is all of it.
  steep = log_up / rest > 0.25 * np.log(float(jnp.finfo(b.dtype).max))
  scale = jnp.where(steep, 0, -jnp.where(gap > -1, gap, 0) / rest)
  down = jnp.where(inside, (1 - b) * jnp.expm1(scale * log_down), 0)
  mean = jnp.log1p(((1 + b) * jnp.expm1(scale * log_up) + down) / 2)
  return jnp.where(steep, log_up - rest * np.log(2.0), rest * mean)
