"""Self-distillation: a model fitted again and again to its own predictions, mixed with the ground truth.

In kernel ridge regression all rounds follow in closed form from the first. Without ground truth each round shrinks the
fit once more, down to zero; with weight alpha the rounds converge to ridge regression with the ridge over alpha:

>>> import jax.numpy as jnp
>>> gram, targets = jnp.array([[2.0, 1.0], [1.0, 2.0]]), jnp.array([1.0, 0.0])
>>> rounds = self_distilled_regression(gram, targets, ridge=0.5, target_weight=0.25, rounds=50)
>>> amplified = gram @ jnp.linalg.solve(gram + effective_ridge(0.5, 0.25) * jnp.eye(2), targets)
>>> bool(jnp.allclose(rounds.fitted[-1], amplified, atol=1e-5))
True
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxreg.checks import check_float, check_hyperparameter, check_same_shape
from jaxreg.kernels.gradient_flow import Eigensystem, check_gram, filtered
from jaxreg.kernels.spectral import powers
from jaxreg.metrics.norms import scaled

__all__ = [
  "DistillationRounds",
  "coefficient_filter",
  "distillation_filter",
  "effective_ridge",
  "iterated_distillation",
  "optimal_target_weight",
  "self_distilled_coefficients",
  "self_distilled_regression",
]


class DistillationRounds(NamedTuple):
  """The fits of all rounds of self-distillation.

  Attributes:
    fitted: `[rounds, ...]`, predictions on the training inputs, shaped like the targets.
    coefficients: `[rounds, ...]`, dual coefficients c: predictions elsewhere are `K(x, X) c`.
  """

  fitted: jax.Array
  coefficients: jax.Array


def self_distilled_regression(
  gram: ArrayLike,
  targets: ArrayLike,
  *,
  ridge: ArrayLike,
  target_weight: ArrayLike | Sequence[float],
  rounds: int,
) -> DistillationRounds:
  """Kernel ridge regression on its own predictions: `c_t = (K + ridge)^-1 (alpha_t Y + (1 - alpha_t) K c_(t - 1))`.

  Round 1 is plain ridge regression on the targets Y for every weight. The Gram matrix may be singular. In float32 the
  ridge should be at least 1e-4 of the largest eigenvalue.

  >>> import jax.numpy as jnp
  >>> gram, targets = jnp.eye(1), jnp.ones(1)
  >>> for weight in (0.0, 0.5, 1.0):
  ...   rounds = self_distilled_regression(gram, targets, ridge=1.0, target_weight=weight, rounds=3)
  ...   print([round(value, 4) for value in rounds.fitted[:, 0].tolist()])
  [0.5, 0.25, 0.125]
  [0.5, 0.375, 0.3438]
  [0.5, 0.5, 0.5]

  Args:
    gram: floating `[training inputs, training inputs]`, positive semi-definite.
    targets: floating `[training inputs]` or `[training inputs, outputs]`.
    ridge: the paper's lambda, positive scalar; may be traced. It is not multiplied by the number of inputs: for a mean
      instead of a sum over the inputs do that first.
    target_weight: the paper's alpha, weight of the ground truth, a scalar or one number per round, of which the first
      has no effect; may be traced. Beyond [0, 1] it is allowed: a negative one regularizes even more.
    rounds: static; at least 1.

  Returns:
    The fits of all rounds, float32 at least.

  Raises:
    ValueError: when shapes do not fit or a hyperparameter is out of range.

  Reference: Borup, Andersen, "Even your Teacher Needs Guidance: Ground-Truth Targets Dampen Regularization Imposed by
    Self-Distillation", NeurIPS 2021, the recursion (as in the official code).
  """
  check_gram(gram)
  _check_targets(targets, jnp.shape(gram)[0])
  check_hyperparameter("ridge", ridge, low=0, open_low=True)
  if rounds < 1:
    raise ValueError(f"rounds must be at least 1, got {rounds}.")
  if isinstance(target_weight, (list, tuple)):
    target_weight = np.asarray(target_weight)
  check_hyperparameter("target_weight", target_weight)
  if jnp.shape(target_weight) not in ((), (rounds,)):
    raise ValueError(
      f"target_weight must be a scalar or have one number per round, expected shape () or ({rounds},),"
      f" got {jnp.shape(target_weight)}."
    )
  dtype = jnp.promote_types(jnp.result_type(gram, targets), jnp.float32)
  targets, ridge = jnp.asarray(targets, dtype), jnp.asarray(ridge, dtype)
  factor = jax.scipy.linalg.cho_factor(gram.astype(dtype) + ridge * jnp.eye(gram.shape[0], dtype=dtype), lower=True)

  def refit(previous, weight):
    mixed = weight * targets + (1 - weight) * previous
    coefficients = jax.scipy.linalg.cho_solve(factor, mixed)
    # K c, without the rounding errors of large coefficients.
    fitted = mixed - ridge * coefficients
    return fitted, DistillationRounds(fitted, coefficients)

  weights = jnp.broadcast_to(jnp.asarray(target_weight, dtype), (rounds,))
  return jax.lax.scan(refit, targets, weights)[1]


def _check_targets(targets, count):
  check_float("targets", targets)
  if jnp.ndim(targets) not in (1, 2) or jnp.shape(targets)[0] != count:
    raise ValueError(f"targets must be [{count}] or [{count}, outputs], got shape {jnp.shape(targets)}.")


def distillation_filter(
  eigenvalues: ArrayLike, *, ridge: ArrayLike, target_weight: ArrayLike, rounds: ArrayLike
) -> jax.Array:
  """What round t keeps of each eigendirection: `b_1 = a = d / (d + ridge)`, `b_(t + 1) = a (alpha + (1 - alpha) b_t)`.

  With eigenvectors V of the Gram matrix the fit of round t is `V diag(b_t) V^T Y`. At infinitely many rounds it is
  `alpha d / (alpha d + ridge)`, the filter of ridge regression with `effective_ridge`.

  >>> import jax.numpy as jnp
  >>> [round(float(distillation_filter(jnp.array(1.0), ridge=1.0, target_weight=0.5, rounds=t)), 4)
  ...  for t in (1, 2, jnp.inf)]
  [0.5, 0.375, 0.3333]

  Args:
    eigenvalues: d, not negative, floating `[...]`.
    ridge: positive scalar; may be traced.
    target_weight: alpha, weight of the ground truth, in [0, 1]; may be traced.
    rounds: whole number from 1, may be infinite; may be traced.

  Returns:
    b, `[...]`, in [0, 1).

  Raises:
    ValueError: when `eigenvalues` are not floating point or a hyperparameter is out of range.

  Reference: Borup, Andersen, "Even your Teacher Needs Guidance", NeurIPS 2021, the spectral form (geometric sum worked
    out anew).
  """
  check_float("eigenvalues", eigenvalues)
  wide = _wide(eigenvalues)
  kept = wide * coefficient_filter(wide, ridge=ridge, target_weight=target_weight, rounds=rounds)
  return kept.astype(jnp.result_type(eigenvalues))


def coefficient_filter(
  eigenvalues: ArrayLike, *, ridge: ArrayLike, target_weight: ArrayLike, rounds: ArrayLike
) -> jax.Array:
  """`distillation_filter / d` without a division by small eigenvalues d: dual coefficients are `V diag(b_t / d) V^T Y`.

  It is `(1 - r^(t - 1)) alpha / (ridge + alpha d) + r^(t - 1) / (ridge + d)` with `r = (1 - alpha) d / (d + ridge)`.

  >>> import jax.numpy as jnp
  >>> coefficient_filter(jnp.array([0.0, 1.0]), ridge=1.0, target_weight=0.5, rounds=1).tolist()
  [1.0, 0.5]

  Args:
    eigenvalues: d, not negative, floating `[...]`.
    ridge: positive scalar; may be traced.
    target_weight: alpha, weight of the ground truth, in [0, 1]; may be traced.
    rounds: whole number from 1, may be infinite; may be traced.

  Returns:
    `[...]`, positive (zero in the limit at `target_weight = 0`).

  Raises:
    ValueError: when `eigenvalues` are not floating point or a hyperparameter is out of range.

  Reference: Borup, Andersen, "Even your Teacher Needs Guidance", NeurIPS 2021, the spectral form (geometric sum worked
    out anew).
  """
  check_float("eigenvalues", eigenvalues)
  shape = jnp.shape(eigenvalues)
  check_hyperparameter("ridge", ridge, low=0, open_low=True, shape=shape)
  check_hyperparameter("target_weight", target_weight, low=0, high=1, shape=shape)
  check_hyperparameter("rounds", rounds, low=1, shape=shape)
  d = _wide(eigenvalues)
  ridge, weight, refits = (jnp.asarray(x, d.dtype) for x in (ridge, target_weight, rounds - 1))
  return _coefficient_filter(d, ridge, weight, refits).astype(jnp.result_type(eigenvalues))


def _coefficient_filter(d, ridge, weight, refits):
  forever = jnp.isinf(refits)
  total = d + ridge
  remembered, forgotten = powers(
    (1 - weight) * (d / total), (ridge + weight * d) / total, jnp.where(forever, 1, refits)
  )
  limit, first = weight / (ridge + weight * d), 1 / total
  return jnp.where(forever, limit, forgotten * limit + remembered * first)


def _wide(array):
  return jnp.asarray(array, jnp.promote_types(jnp.result_type(array), jnp.float32))


def self_distilled_coefficients(
  eigensystem: Eigensystem,
  targets: ArrayLike,
  *,
  ridge: ArrayLike,
  target_weight: ArrayLike,
  rounds: ArrayLike,
) -> jax.Array:
  """Dual coefficients of one round, or of the limit, in closed form: `V diag(b_t / d) V^T Y`.

  >>> import jax.numpy as jnp
  >>> from jaxreg.kernels.gradient_flow import kernel_eigensystem
  >>> eigen = kernel_eigensystem(jnp.eye(1))
  >>> self_distilled_coefficients(eigen, jnp.ones(1), ridge=1.0, target_weight=0.5, rounds=2).round(4).tolist()
  [0.375]

  Args:
    eigensystem: of the Gram matrix, from `kernel_eigensystem`.
    targets: floating `[training inputs]` or `[training inputs, outputs]`.
    ridge: positive scalar; may be traced.
    target_weight: alpha, weight of the ground truth, in [0, 1], the same in all rounds; may be traced.
    rounds: whole number from 1, may be infinite; may be traced.

  Returns:
    Shaped like `targets`: predictions are `K(x, X) c`.

  Raises:
    ValueError: when shapes do not fit or a hyperparameter is out of range.

  Reference: Borup, Andersen, "Even your Teacher Needs Guidance", NeurIPS 2021, the solution in closed form and its
    limit.
  """
  check_hyperparameter("ridge", ridge, low=0, open_low=True)
  check_hyperparameter("target_weight", target_weight, low=0, high=1)
  check_hyperparameter("rounds", rounds, low=1)
  _check_targets(targets, jnp.shape(eigensystem.values)[0])
  return filtered(_coefficient_filter, eigensystem, targets, ridge, target_weight, rounds - 1)


def effective_ridge(ridge: ArrayLike, target_weight: ArrayLike) -> jax.Array:
  """The ridge of the limit of self-distillation: `ridge / alpha`, infinite without ground truth.

  >>> float(effective_ridge(0.5, 0.25))
  2.0

  Args:
    ridge: positive; may be traced.
    target_weight: alpha, weight of the ground truth, in [0, 1]; may be traced.

  Returns:
    The ridge, of the broadcast shape.

  Raises:
    ValueError: when an argument is out of range.

  Reference: Borup, Andersen, "Even your Teacher Needs Guidance", NeurIPS 2021, the limit.
  """
  check_hyperparameter("ridge", ridge, low=0, open_low=True)
  check_hyperparameter("target_weight", target_weight, low=0, high=1)
  return jnp.asarray(ridge, jnp.result_type(float)) / target_weight


def optimal_target_weight(
  first: ArrayLike,
  distilled: ArrayLike,
  targets: ArrayLike,
  *,
  low: ArrayLike = 0.0,
  high: ArrayLike = 1.0,
) -> jax.Array:
  """The ground truth's weight with the least validation error: `<y - h, g - h> / |g - h|^2`, clipped to [low, high].

  In kernel ridge regression a round's predictions are `alpha g + (1 - alpha) h`, so this is exact; for networks it is
  an estimate from one student trained without ground truth. It is 1 (clipped) where g and h agree.

  >>> import jax.numpy as jnp
  >>> float(optimal_target_weight(jnp.array([1.0, 0.0]), jnp.array([0.0, 0.0]), jnp.array([0.25, 1.0])))
  0.25

  Args:
    first: g, validation predictions (of networks: probabilities) of round 1, floating `[...]`.
    distilled: h, those of this round at weight 0, of the same shape.
    targets: y, what they should be, of the same shape.
    low: smallest weight; minus infinity for no bound; may be traced.
    high: largest weight; infinity for no bound; may be traced.

  Returns:
    Scalar, float32 at least.

  Raises:
    ValueError: when the arrays' shapes differ, one is not floating point, or a bound is NaN.

  Reference: Borup, Andersen, "Even your Teacher Needs Guidance", NeurIPS 2021, the best weight in closed form (derived
    anew from the recursion).
  """
  for name, array in (("first", first), ("distilled", distilled), ("targets", targets)):
    check_float(name, array)
  check_same_shape(first=first, distilled=distilled, targets=targets)
  check_hyperparameter("low", low)
  check_hyperparameter("high", high)
  dtype = jnp.promote_types(jnp.result_type(first, distilled, targets), jnp.float32)
  first, distilled, targets = (jnp.asarray(x, dtype) for x in (first, distilled, targets))
  gap = first - distilled
  gap, scale = scaled(gap)  # squares of small differences would vanish
  square = jnp.sum(gap**2)
  agree = square == 0
  weight = jnp.sum((targets - distilled) / scale * gap) / jnp.where(agree, 1, square)
  return jnp.clip(jnp.where(agree, 1, weight), low, high)


def iterated_distillation(
  train: Callable[[int, Any, Any], Any],
  *,
  rounds: int,
  target_weight: ArrayLike | Sequence[float] | Callable[[list], Any],
) -> list:
  """Trains rounds of self-distillation: a first model without a teacher, then each with the one before as its teacher.

  >>> import jax.numpy as jnp
  >>> def train(index, teacher, weight):  # ridge regression with kernel 1 and ridge 1, on one target of 1
  ...   return 0.5 if teacher is None else 0.5 * (weight + (1 - weight) * teacher)
  >>> iterated_distillation(train, rounds=3, target_weight=0.5)
  [0.5, 0.375, 0.34375]

  Args:
    train: `(index, teacher, target_weight) -> model`, with indices from 0 (to fold into a key, say) and any kind of
      model; at index 0 the teacher is None and the weight 1.
    rounds: static; at least 1.
    target_weight: weight of the ground truth, a number for all rounds or one per round (the first has no effect), or a
      function from the list of the models so far to the next round's weight, such as one that calls
      `optimal_target_weight`.

  Returns:
    The models of all rounds.

  Raises:
    ValueError: when `rounds` is less than 1 or the number of weights is not `rounds`.

  Reference: Borup, Andersen, "Even your Teacher Needs Guidance", NeurIPS 2021, the procedure.
  """
  if rounds < 1:
    raise ValueError(f"rounds must be at least 1, got {rounds}.")
  single = callable(target_weight) or jnp.ndim(target_weight) == 0
  if not single and len(target_weight) != rounds:
    raise ValueError(f"target_weight must have one number per round, expected {rounds}, got {len(target_weight)}.")
  models = [train(0, None, 1.0)]
  for index in range(1, rounds):
    if callable(target_weight):
      weight = target_weight(models)
    else:
      weight = target_weight if single else target_weight[index]
    models.append(train(index, models[-1], weight))
  return models
