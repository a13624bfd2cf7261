"""Follow the regularized leader on the simplex: from cumulative losses to a distribution over actions."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxreg.checks import check_float, check_hyperparameter

__all__ = ["ftrl_entropy", "ftrl_log_barrier"]

# Newton's method needs fewer than ten for a few hundred actions.
_ITERATIONS = 24


def ftrl_log_barrier(
  cumulative_losses: ArrayLike,
  *,
  learning_rate: ArrayLike,
  axis: int = -1,
  where: ArrayLike | None = None,
) -> jax.Array:
  """The distribution `argmin_p eta <p, L> + sum_a log(1 / p_a)`, which is `p_a = 1 / (eta L_a + lambda)`.

  `lambda` is the root of `sum_a p_a = 1`. Regret is bounded for losses that are arbitrarily negative. The gradient is
  that of the implicit function, `dp / dL = -eta (diag(p^2) - p^2 p^2' / sum p^2)`.

  >>> import jax.numpy as jnp
  >>> [round(p, 4) for p in ftrl_log_barrier(jnp.array([0.0, 1.5]), learning_rate=1.0).tolist()]
  [0.6667, 0.3333]

  Args:
    cumulative_losses: `L`, floating `[..., actions]`.
    learning_rate: `eta`, a non-negative scalar, or an array that broadcasts against the losses; may be traced.
    axis: the axis of the actions.
    where: boolean, broadcasting against the losses: the actions that may be taken, at least one.

  Returns:
    `[..., actions]`, positive and summing to one.

  Raises:
    ValueError: when losses are not floating point or `learning_rate` is negative.

  Reference: Dai, Luo, Wei, Zimmert, "Refined Regret for Adversarial MDPs with Linear Function Approximation",
    ICML 2023, the log-barrier of Algorithm 1.
  """
  gaps = _scaled_gaps(cumulative_losses, learning_rate, axis, where)
  return jnp.moveaxis(_log_barrier(jnp.moveaxis(gaps, axis, -1)), -1, axis).astype(cumulative_losses.dtype)


def ftrl_entropy(
  cumulative_losses: ArrayLike,
  *,
  learning_rate: ArrayLike,
  axis: int = -1,
  where: ArrayLike | None = None,
) -> jax.Array:
  """The distribution `argmin_p eta <p, L> + sum_a p_a log(p_a)`, exponential weights `p_a ~ exp(-eta L_a)`.

  Its regret bound needs `eta L_a >= -1` of each loss.

  >>> import jax.numpy as jnp
  >>> [round(p, 4) for p in ftrl_entropy(jnp.log(jnp.array([1.0, 3.0])), learning_rate=1.0).tolist()]
  [0.75, 0.25]

  Args:
    cumulative_losses: `L`, floating `[..., actions]`.
    learning_rate: `eta`, a non-negative scalar, or an array that broadcasts against the losses; may be traced.
    axis: the axis of the actions.
    where: boolean, broadcasting against the losses: the actions that may be taken, at least one.

  Returns:
    `[..., actions]`, summing to one.

  Raises:
    ValueError: when losses are not floating point or `learning_rate` is negative.

  Reference: Dai, Luo, Wei, Zimmert, "Refined Regret for Adversarial MDPs with Linear Function Approximation",
    ICML 2023, the negative entropy of Algorithm 2.
  """
  gaps = _scaled_gaps(cumulative_losses, learning_rate, axis, where)
  return jax.nn.softmax(-gaps, axis=axis).astype(cumulative_losses.dtype)


def _scaled_gaps(losses, learning_rate, axis, where) -> jax.Array:
  """`eta (L - min L)`, infinite for actions that may not be taken; subtracted first, for L may be large."""
  check_float("cumulative_losses", losses)
  check_hyperparameter("learning_rate", learning_rate, low=0)
  dtype = jnp.promote_types(jnp.result_type(losses), jnp.float32)
  wide = jnp.asarray(losses, dtype)
  if where is not None:
    wide = jnp.where(where, wide, 0)  # may be NaN
  least = jnp.min(wide, axis=axis, keepdims=True, where=where, initial=jnp.inf)
  # Both distributions are the same for L + c, so that the least one can be held constant.
  gaps = jnp.asarray(learning_rate, dtype) * (wide - jax.lax.stop_gradient(least))
  return gaps if where is None else jnp.where(where, gaps, jnp.inf)


@jax.custom_jvp
def _log_barrier(gaps: jax.Array) -> jax.Array:
  """`1 / (gaps + mu)` along the last axis with the `mu` in [1, actions] at which the sum is one."""

  def improve(_, multiplier):
    # Newton's method for 1 / sum = 1: the left side is concave in mu, so that iterates approach from below.
    inverse = 1 / (gaps + multiplier)
    total = inverse.sum(-1, keepdims=True)
    return jnp.maximum(multiplier + (total - 1) * total / jnp.square(inverse).sum(-1, keepdims=True), 1)

  multiplier = jax.lax.fori_loop(0, _ITERATIONS, improve, jnp.ones_like(gaps[..., :1]))
  return 1 / (gaps + multiplier)


@_log_barrier.defjvp
def _log_barrier_jvp(primals, tangents):
  probabilities = _log_barrier(*primals)
  squares = jnp.square(probabilities)
  (change,) = tangents
  mean = jnp.sum(squares * change, -1, keepdims=True) / squares.sum(-1, keepdims=True)
  return probabilities, -squares * (change - mean)
