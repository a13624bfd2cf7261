"""The generative linear classifier on frozen features: Gaussian naive Bayes, in closed form.

With one diagonal covariance for all classes it is a linear classifier `softmax(W x + b)`, as in `linear_probe`. It
needs a single pass over the features and few examples; logistic regression needs more and ends at a lower error.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxreg.checks import check_hyperparameter, check_same_shape, check_state
from jaxreg.metrics.linear_probe import LinearProbe, check_features, class_members

__all__ = ["GaussianStats", "empty_stats", "gaussian_scores", "gaussian_stats", "merge_stats", "stats_to_linear"]


PRIORS = ("empirical", "uniform")


# The log prior of a class without examples: never predicted, and finite.
_ABSENT = -1e30


class GaussianStats(NamedTuple):
  """What naive Bayes needs to know of the examples seen so far, in float32 at least.

  Attributes:
    count: `[classes]`, examples of each class.
    mean: `[classes, features]`, 0 where there are none.
    squares: `[classes, features]`, sums of squared deviations from the mean.
  """

  count: jax.Array
  mean: jax.Array
  squares: jax.Array


def empty_stats(num_classes: int, num_features: int, dtype=jnp.float32) -> GaussianStats:
  """The statistics of no examples, the neutral element of `merge_stats`.

  >>> empty_stats(3, 5).mean.shape
  (3, 5)

  Args:
    num_classes: static, positive.
    num_features: static, positive.
    dtype: of the statistics.

  Returns:
    `GaussianStats` of zeros.

  Raises:
    ValueError: when a number is below 1.

  Reference: none.
  """
  check_hyperparameter("num_classes", num_classes, low=1)
  check_hyperparameter("num_features", num_features, low=1)
  zeros = jnp.zeros((num_classes, num_features), dtype)
  return GaussianStats(zeros[:, 0], zeros, zeros)


def gaussian_stats(
  features: ArrayLike,
  labels: ArrayLike,
  *,
  num_classes: int,
  where: ArrayLike | None = None,
  axis_name: str | None = None,
) -> GaussianStats:
  """Counts, means and squared deviations of each class.

  Deviations are taken from the class's own mean, never as a difference of large moments.

  >>> import jax.numpy as jnp
  >>> stats = gaussian_stats(jnp.array([[0.0], [2.0], [5.0]]), jnp.array([0, 0, 2]), num_classes=3)
  >>> stats.count.tolist(), stats.mean[:, 0].tolist(), stats.squares[:, 0].tolist()
  ([2.0, 0.0, 1.0], [1.0, 0.0, 5.0], [2.0, 0.0, 0.0])

  Args:
    features: floating `[examples, features]`.
    labels: integers `[examples]` in [0, num_classes).
    num_classes: static.
    where: boolean `[examples]`: the examples that count.
    axis_name: static; the mapped axis of `pmap` or `shard_map` that splits the examples, if any.

  Returns:
    `GaussianStats`, of all devices' examples if `axis_name` is given.

  Raises:
    ValueError: when shapes or dtypes do not fit.

  Reference: Zheng, Wu, Bao, Cao, Li, Zhu, "Revisiting Discriminative vs. Generative Classifiers: Theory and
    Implications", ICML 2023, the naive Bayes estimator.
  """
  features, members = class_members(features, labels, num_classes, where)
  total = (lambda x: x) if axis_name is None else (lambda x: jax.lax.psum(x, axis_name))
  count = total(members.sum(0))
  safe = jnp.maximum(count, 1)[:, None]
  contract = lambda values: jnp.einsum("mk,mj->kj", members, values, precision="highest")
  mean = total(contract(features)) / safe
  # Each example's own class mean; a row without a class is masked, and any mean will do.
  deviations = features - mean[jnp.argmax(members, axis=1)]
  # The rounding of the mean is taken out again: sum (x - a)^2 = sum (x - mean)^2 + count (mean - a)^2.
  shift = total(contract(deviations)) / safe
  squares = total(contract(deviations**2)) - count[:, None] * shift**2
  return GaussianStats(count, mean + shift, jnp.maximum(squares, 0))


def merge_stats(first: GaussianStats, second: GaussianStats) -> GaussianStats:
  """The statistics of two disjoint sets of examples together; exact, commutative and associative up to rounding.

  Classes may be missing from either. Usable as the operation of `lax.associative_scan`, or to fold `lax.all_gather`ed
  statistics of several devices.

  >>> import jax.numpy as jnp
  >>> one = gaussian_stats(jnp.array([[0.0]]), jnp.array([0]), num_classes=1)
  >>> two = gaussian_stats(jnp.array([[2.0]]), jnp.array([0]), num_classes=1)
  >>> merge_stats(one, two).squares.tolist()
  [[2.0]]

  Args:
    first: statistics, leaves with equal shapes in both.
    second: statistics.

  Returns:
    `GaussianStats`.

  Raises:
    ValueError: when shapes differ.

  Reference: Chan, Golub, LeVeque, "Algorithms for Computing the Sample Variance: Analysis and Recommendations",
    The American Statistician 1983, equation 2.1 (pairwise update); the streaming fit of Zheng et al., ICML 2023.
  """
  check_state(first, GaussianStats, "first")
  check_state(second, GaussianStats, "second")
  check_same_shape(first=first.mean, second=second.mean)
  check_same_shape(first=first.count, second=second.count)
  count = first.count + second.count
  safe = jnp.maximum(count, 1)
  mean = (first.count[..., None] * first.mean + second.count[..., None] * second.mean) / safe[..., None]
  between = (first.count * second.count / safe)[..., None] * (first.mean - second.mean) ** 2
  return GaussianStats(count, mean, first.squares + second.squares + between)


def stats_to_linear(
  stats: GaussianStats,
  *,
  eps: ArrayLike = 1e-9,
  relative_floor: ArrayLike = 0.0,
  prior: str = "empirical",
) -> LinearProbe:
  """Gaussian naive Bayes with one diagonal covariance `v`: `W_k = mu_k / v`, `b_k = log pi_k - sum_j mu_kj W_kj / 2`.

  `v` is the within-class variance of all examples (divided by their number) plus `eps`. A feature that is constant in
  every class has `v = eps` and outweighs all others; `eps` presumes features in [0, 1], and `relative_floor` bounds `v`
  below whatever their scale.

  >>> import jax.numpy as jnp
  >>> from jaxreg.metrics.linear_probe import probe_logits
  >>> features, labels = jnp.array([[0.0], [2.0], [4.0], [6.0]]), jnp.array([0, 0, 1, 1])
  >>> probe = stats_to_linear(gaussian_stats(features, labels, num_classes=2), eps=0.0)
  >>> logits = probe_logits(probe, jnp.array([3.0, 4.0])[:, None])
  >>> probe.weights[:, 0].tolist(), [round(x) for x in (logits[:, 1] - logits[:, 0]).tolist()]
  ([1.0, 5.0], [0, 4])

  Args:
    stats: of the examples to fit.
    eps: non-negative; added to every variance; may be traced.
    relative_floor: non-negative; the smallest variance allowed, as a share of the mean variance; may be traced.
    prior: static; `empirical`, the classes' shares, or `uniform` over the classes that occur.

  Returns:
    `LinearProbe`. The bias of a class without examples is -1e30: it is never predicted.

  Raises:
    ValueError: when a hyperparameter is out of range or `prior` unknown.

  Reference: Zheng, Wu, Bao, Cao, Li, Zhu, "Revisiting Discriminative vs. Generative Classifiers: Theory and
    Implications", ICML 2023, the naive Bayes estimator in its linear form.
  """
  check_state(stats, GaussianStats, "stats")
  log_prior, variance = _prior_and_variance(stats, eps, relative_floor, prior)
  weights = stats.mean / variance
  return LinearProbe(weights, log_prior - jnp.sum(stats.mean * weights, axis=-1) / 2)


def gaussian_scores(
  stats: GaussianStats,
  features: ArrayLike,
  *,
  eps: ArrayLike = 1e-9,
  relative_floor: ArrayLike = 0.0,
  prior: str = "empirical",
) -> jax.Array:
  """The joint log-likelihood of naive Bayes, `log pi_k - sum_j (x_j - mu_kj)^2 / (2 v_j)`, without what is constant.

  It differs from the logits of `stats_to_linear` by a number per example and does not cancel where features are far
  from 0 compared to their deviation.

  >>> import jax.numpy as jnp
  >>> stats = gaussian_stats(jnp.array([[0.0], [2.0], [4.0], [6.0]]), jnp.array([0, 0, 1, 1]), num_classes=2)
  >>> (gaussian_scores(stats, jnp.array([[1.0]]), eps=0.0) + jnp.log(2.0)).round(3).tolist()
  [[0.0, -8.0]]

  Args:
    stats: of the examples to fit.
    features: floating `[..., features]`.
    eps: non-negative; added to every variance; may be traced.
    relative_floor: non-negative; the smallest variance allowed, as a share of the mean variance; may be traced.
    prior: static; `empirical` or `uniform`.

  Returns:
    `[..., classes]`, of the features' dtype.

  Raises:
    ValueError: when shapes do not fit, a hyperparameter is out of range or `prior` unknown.

  Reference: Zheng, Wu, Bao, Cao, Li, Zhu, "Revisiting Discriminative vs. Generative Classifiers: Theory and
    Implications", ICML 2023, the naive Bayes classifier.
  """
  check_state(stats, GaussianStats, "stats")
  check_features(features, stats.mean)
  features = jnp.asarray(features)
  log_prior, variance = _prior_and_variance(stats, eps, relative_floor, prior)
  wide = features.astype(jnp.promote_types(features.dtype, stats.mean.dtype))
  distance = jnp.sum((wide[..., None, :] - stats.mean) ** 2 / variance, axis=-1)
  return (log_prior - distance / 2).astype(features.dtype)


def _prior_and_variance(stats, eps, relative_floor, prior):
  check_hyperparameter("eps", eps, low=0)
  check_hyperparameter("relative_floor", relative_floor, low=0)
  if prior not in PRIORS:
    raise ValueError(f"prior must be one of {', '.join(PRIORS)}, got {prior!r}.")
  total = jnp.maximum(jnp.sum(stats.count, axis=-1, keepdims=True), 1)
  variance = jnp.sum(stats.squares, axis=-2) / total + eps
  variance = jnp.maximum(variance, relative_floor * jnp.mean(variance, axis=-1, keepdims=True))
  present = stats.count > 0
  if prior == "empirical":
    share = stats.count / total
  else:
    share = 1 / jnp.maximum(jnp.sum(present, axis=-1, keepdims=True), 1)
  return jnp.where(present, jnp.log(jnp.where(present, share, 1)), _ABSENT), variance
