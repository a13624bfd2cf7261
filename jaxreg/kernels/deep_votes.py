"""The classifiers that infinitely deep networks become: weighted votes of the training targets."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxreg.checks import check_float, check_hyperparameter
from jaxreg.kernels.deep_limits import koenigs
from jaxreg.kernels.dual_activations import DualActivation

__all__ = ["hilbert_vote", "majority_vote", "nearest_neighbor_vote", "singular_vote"]


def singular_vote(correlation: ArrayLike, targets: ArrayLike, dual: DualActivation, *, iterations: int = 200):
  """The mean of the training targets weighted by `koenigs` kernels, the limit of infinite depth for `"singular"`.

  >>> import jax.numpy as jnp
  >>> from jaxreg.kernels.deep_limits import optimal_dual
  >>> vote = singular_vote(jnp.array([[0.9, 0.5]]), jnp.array([1.0, -1.0]), optimal_dual(2))
  >>> bool(vote[0] > 0)
  True

  Args:
    correlation: floating `[inputs, training inputs]`, non-negative.
    targets: floating `[training inputs]` or `[training inputs, outputs]`.
    dual: static; of a normalized activation with zero mean and a linear part.
    iterations: static; see `koenigs`.

  Returns:
    `[inputs]` or `[inputs, outputs]`; a training input gets its own target.

  Raises:
    ValueError: when shapes or `dual` do not fit.

  Reference: Radhakrishnan, Belkin, Uhler, PNAS 2023, the singular-kernel limit.
  """
  _check_votes(correlation, targets)
  kernel = koenigs(correlation, dual, iterations=iterations)
  # A weight of 0 has no gradient; where all are 0 the vote is that of the majority.
  none = kernel <= 0
  log_kernel = jnp.log(jnp.where(none, 1, kernel))
  return _weighted(jnp.where(none, jnp.finfo(kernel.dtype).min, log_kernel), targets)


def hilbert_vote(correlation: ArrayLike, targets: ArrayLike, *, exponent: ArrayLike) -> jax.Array:
  """The Hilbert estimate, the mean of the training targets weighted by `|x - x_i|^-exponent`.

  >>> import jax.numpy as jnp
  >>> vote = hilbert_vote(jnp.array([[0.5, 0.0]]), jnp.array([1.0, -1.0]), exponent=2.0)
  >>> round(float(vote[0]), 4)  # weights 2 : 1
  0.3333

  Args:
    correlation: floating `[inputs, training inputs]`, inner products on the unit sphere.
    targets: floating `[training inputs]` or `[training inputs, outputs]`.
    exponent: non-negative scalar; consistent when it is the sphere's dimension; may be traced.

  Returns:
    `[inputs]` or `[inputs, outputs]`; a training input gets its own target.

  Raises:
    ValueError: when shapes do not fit or `exponent` is negative.

  Reference: Devroye, Gyorfi, Krzyzak, "The Hilbert Kernel Regression Estimate", Journal of Multivariate Analysis 1998.
  """
  _check_votes(correlation, targets)
  check_hyperparameter("exponent", exponent, low=0)
  wide = jnp.asarray(correlation, jnp.promote_types(jnp.result_type(correlation), jnp.float32))
  gap = 1 - jnp.clip(wide, -1, 1)
  same = gap <= 0
  return _weighted(jnp.where(same, jnp.inf, -exponent / 2 * jnp.log(jnp.where(same, 1, gap))), targets)


def _weighted(log_weights, targets):
  """The mean with weights that may overflow; infinite ones share everything."""
  infinite = jnp.isposinf(log_weights)
  any_infinite = infinite.any(-1, keepdims=True)
  usual = jax.nn.softmax(jnp.where(any_infinite, 0, log_weights), axis=-1)
  weights = jnp.where(any_infinite, infinite / jnp.maximum(infinite.sum(-1, keepdims=True), 1), usual)
  return jnp.matmul(weights.astype(log_weights.dtype), targets, precision="highest")


def nearest_neighbor_vote(correlation: ArrayLike, targets: ArrayLike) -> jax.Array:
  """The target of the nearest training input, the limit of infinite depth for `"1nn"`.

  >>> import jax.numpy as jnp
  >>> nearest_neighbor_vote(jnp.array([[0.9, 0.5]]), jnp.array([1.0, -1.0])).tolist()
  [1.0]

  Args:
    correlation: floating `[inputs, training inputs]`.
    targets: floating `[training inputs]` or `[training inputs, outputs]`.

  Returns:
    `[inputs]` or `[inputs, outputs]`; NaN where a correlation is.

  Raises:
    ValueError: when shapes do not fit.

  Reference: Radhakrishnan, Belkin, Uhler, PNAS 2023, the nearest-neighbour limit.
  """
  _check_votes(correlation, targets)
  correlation, targets = jnp.asarray(correlation), jnp.asarray(targets)
  votes = targets[jnp.argmax(correlation, -1)]
  unknown = jnp.isnan(correlation).any(-1).reshape((-1,) + (1,) * (targets.ndim - 1))
  return jnp.where(unknown, jnp.nan, votes)


def majority_vote(correlation: ArrayLike, targets: ArrayLike) -> jax.Array:
  """The mean training target for every input, the limit of infinite depth for `"majority"`.

  >>> import jax.numpy as jnp
  >>> majority_vote(jnp.zeros((2, 4)), jnp.array([1.0, -1.0, -1.0, -1.0])).tolist()
  [-0.5, -0.5]

  Args:
    correlation: floating `[inputs, training inputs]`.
    targets: floating `[training inputs]` or `[training inputs, outputs]`.

  Returns:
    `[inputs]` or `[inputs, outputs]`.

  Raises:
    ValueError: when shapes do not fit.

  Reference: Radhakrishnan, Belkin, Uhler, PNAS 2023, the majority limit.
  """
  _check_votes(correlation, targets)
  return jnp.broadcast_to(jnp.mean(targets, 0), correlation.shape[:-1] + targets.shape[1:])


def _check_votes(correlation, targets):
  check_float("correlation", correlation)
  check_float("targets", targets)
  if jnp.ndim(correlation) != 2 or jnp.shape(targets)[:1] != jnp.shape(correlation)[1:]:
    raise ValueError(
      "correlation must be [inputs, training inputs] and targets [training inputs, ...],"
      f" got shapes {jnp.shape(correlation)} and {jnp.shape(targets)}."
    )
