"""Linear classifiers on frozen features: the generative one in closed form, the discriminative one by L-BFGS.

Both are the same family, `softmax(W x + b)`. Gaussian naive Bayes with one diagonal covariance for all classes needs a
single pass over the features and few examples; logistic regression needs more of them and ends at a lower error.
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from jaxreg.checks import check_float, check_hyperparameter, check_same_shape

__all__ = [
  "GaussianStats",
  "LinearProbe",
  "MinMaxScaling",
  "NaiveBayesHead",
  "empty_stats",
  "gaussian_scores",
  "gaussian_stats",
  "logistic_probe",
  "merge_stats",
  "minmax_scale",
  "minmax_scaling",
  "probe_logits",
  "stats_to_linear",
]

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


class LinearProbe(NamedTuple):
  """A linear classifier `softmax(W x + b)`.

  Attributes:
    weights: W, `[classes, features]`.
    bias: b, `[classes]`.
  """

  weights: jax.Array
  bias: jax.Array


class MinMaxScaling(NamedTuple):
  """The affine map of each feature's range on some examples to [0, 1].

  Attributes:
    minimum: `[features]`.
    width: `[features]`, maximum less minimum, or 1 where they are equal.
  """

  minimum: jax.Array
  width: jax.Array


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
  features: jax.Array,
  labels: jax.Array,
  *,
  num_classes: int,
  where: jax.Array | None = None,
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
  features, members = _members(features, labels, num_classes, where)
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
  eps: float | jax.Array = 1e-9,
  relative_floor: float | jax.Array = 0.0,
  prior: str = "empirical",
) -> LinearProbe:
  """Gaussian naive Bayes with one diagonal covariance `v`: `W_k = mu_k / v`, `b_k = log pi_k - sum_j mu_kj W_kj / 2`.

  `v` is the within-class variance of all examples (divided by their number) plus `eps`. A feature that is constant in
  every class has `v = eps` and outweighs all others; `eps` presumes features in [0, 1], and `relative_floor` bounds `v`
  below whatever their scale.

  >>> import jax.numpy as jnp
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
  log_prior, variance = _prior_and_variance(stats, eps, relative_floor, prior)
  weights = stats.mean / variance
  return LinearProbe(weights, log_prior - jnp.sum(stats.mean * weights, axis=-1) / 2)


def gaussian_scores(
  stats: GaussianStats,
  features: jax.Array,
  *,
  eps: float | jax.Array = 1e-9,
  relative_floor: float | jax.Array = 0.0,
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
  _check_features(features, stats.mean)
  features = jnp.asarray(features)
  log_prior, variance = _prior_and_variance(stats, eps, relative_floor, prior)
  wide = features.astype(jnp.promote_types(features.dtype, stats.mean.dtype))
  distance = jnp.sum((wide[..., None, :] - stats.mean) ** 2 / variance, axis=-1)
  return (log_prior - distance / 2).astype(features.dtype)


def probe_logits(probe: LinearProbe, features: jax.Array) -> jax.Array:
  """The logits `W x + b`.

  >>> import jax.numpy as jnp
  >>> probe_logits(LinearProbe(jnp.array([[1.0, 2.0]]), jnp.array([3.0])), jnp.array([1.0, 1.0])).tolist()
  [6.0]

  Args:
    probe: a linear classifier.
    features: floating `[..., features]`.

  Returns:
    `[..., classes]`, of the features' dtype.

  Raises:
    ValueError: when features do not fit the probe.

  Reference: none.
  """
  _check_features(features, probe.weights)
  features = jnp.asarray(features)
  wide = features.astype(jnp.promote_types(features.dtype, probe.weights.dtype))
  return (jnp.matmul(wide, probe.weights.T, precision="highest") + probe.bias).astype(features.dtype)


class NaiveBayesHead(nn.Module):
  """A classification layer without trained parameters: naive Bayes of the examples that it was given.

  Its statistics are the collection `stats`. `partial_fit` adds examples, `fit` starts anew (both need
  `mutable=["stats"]`), calling it gives logits, through which gradients flow to the features.

  >>> import jax, jax.numpy as jnp
  >>> head = NaiveBayesHead(features=1, classes=2)
  >>> variables = head.init(jax.random.key(0), jnp.zeros((1, 1)))
  >>> examples = jnp.array([[0.0], [2.0], [4.0], [6.0]]), jnp.array([0, 0, 1, 1])
  >>> _, variables = head.apply(variables, *examples, method="partial_fit", mutable=["stats"])
  >>> head.apply(variables, jnp.array([[1.0], [5.0]])).argmax(-1).tolist()
  [0, 1]

  Attributes:
    features: number of features.
    classes: number of classes.
    eps: added to every variance.
    relative_floor: the smallest variance allowed, as a share of the mean variance.
    prior: `empirical` or `uniform`.
    axis_name: the mapped axis that splits the examples of `fit` and `partial_fit`, if any.

  Reference: Zheng, Wu, Bao, Cao, Li, Zhu, "Revisiting Discriminative vs. Generative Classifiers: Theory and
    Implications", ICML 2023.
  """

  features: int
  classes: int
  eps: float = 1e-9
  relative_floor: float = 0.0
  prior: str = "empirical"
  axis_name: str | None = None

  def setup(self):
    self.stats = self.variable("stats", "gaussian", empty_stats, self.classes, self.features)

  def __call__(self, features: jax.Array) -> jax.Array:
    """Logits `[..., classes]` of features `[..., features]`."""
    return gaussian_scores(
      self.stats.value, features, eps=self.eps, relative_floor=self.relative_floor, prior=self.prior
    )

  def partial_fit(self, features: jax.Array, labels: jax.Array) -> None:
    """Adds examples `[examples, features]` with labels `[examples]`."""
    self.stats.value = merge_stats(self.stats.value, self._stats(features, labels))

  def fit(self, features: jax.Array, labels: jax.Array) -> None:
    """Forgets what was given before, then adds examples."""
    self.stats.value = self._stats(features, labels)

  def linear(self) -> LinearProbe:
    """The same classifier as weights and bias."""
    return stats_to_linear(self.stats.value, eps=self.eps, relative_floor=self.relative_floor, prior=self.prior)

  def _stats(self, features, labels):
    return gaussian_stats(features, labels, num_classes=self.classes, axis_name=self.axis_name)


def logistic_probe(
  features: jax.Array,
  labels: jax.Array,
  *,
  num_classes: int,
  l2: float | jax.Array = 1.0,
  max_iterations: int | jax.Array = 1000,
  tolerance: float | jax.Array = 1e-7,
  where: jax.Array | None = None,
) -> LinearProbe:
  """Multinomial logistic regression: minimises `sum_i CE(W x_i + b, y_i) + l2 / 2 ||W||^2` by L-BFGS; b is free.

  `l2` is `1 / C` of scikit-learn. Ends when the gradient's norm falls below `tolerance`, or below what the dtype can
  resolve, or when the value has not fallen for some steps. Runs under `jit`, `vmap` and `lax.map` (which is faster on a
  CPU: vmapped fits all take as long as the slowest); cannot be differentiated in reverse mode.

  >>> import jax.numpy as jnp
  >>> features, labels = jnp.array([[0.0], [2.0], [4.0], [6.0]]), jnp.array([0, 0, 1, 1])
  >>> probe = logistic_probe(features, labels, num_classes=2)
  >>> probe_logits(probe, features).argmax(-1).tolist(), abs(probe.weights.sum().item()) < 1e-3
  ([0, 0, 1, 1], True)

  Args:
    features: floating `[examples, features]`.
    labels: integers `[examples]` in [0, num_classes).
    num_classes: static, at least 2.
    l2: non-negative; at 0 separable classes have no minimum; may be traced.
    max_iterations: positive; may be traced.
    tolerance: non-negative; may be traced.
    where: boolean `[examples]`: the examples that count.

  Returns:
    `LinearProbe`, in float32 at least; weights and biases sum to 0 over the classes.

  Raises:
    ValueError: when shapes or dtypes do not fit or a hyperparameter is out of range.

  Reference: Liu, Nocedal, "On the Limited Memory BFGS Method for Large Scale Optimization", Mathematical Programming
    1989; the objective of the linear evaluations in Zheng et al., ICML 2023.
  """
  check_hyperparameter("num_classes", num_classes, low=2)
  check_hyperparameter("l2", l2, low=0)
  check_hyperparameter("max_iterations", max_iterations, low=1)
  check_hyperparameter("tolerance", tolerance, low=0)
  features, members = _members(features, labels, num_classes, where)
  counted = jnp.sum(members, axis=1, keepdims=True)
  size = jnp.maximum(jnp.sum(counted), 1)
  l2 = jnp.asarray(l2, features.dtype)

  def objective(probe):
    # Divided by the number of examples, which suits the first step. The cross-entropy as log(1 + the other classes'
    # odds) keeps its digits when it is small, and the line search can go on in float32.
    logits = jnp.matmul(features, probe.weights.T, precision="highest") + probe.bias
    above = logits - jnp.sum(members * logits, axis=1, keepdims=True)
    others = jax.nn.logsumexp(jnp.where(members > 0, -jnp.inf, above), axis=1)
    return (jnp.sum(counted[:, 0] * jax.nn.softplus(others)) + l2 / 2 * jnp.sum(probe.weights**2)) / size

  start = LinearProbe(*(jnp.zeros(shape, features.dtype) for shape in ((num_classes, features.shape[1]), num_classes)))
  resolution = 4 * jnp.finfo(features.dtype).eps * jnp.sqrt(jnp.sum(counted * (1 + features**2)))
  found = _minimize(objective, start, jnp.maximum(tolerance, resolution) / size, max_iterations)
  return jax.tree.map(lambda leaf: leaf - leaf.mean(axis=0), found)


def minmax_scaling(features: jax.Array, *, where: jax.Array | None = None) -> MinMaxScaling:
  """The scaling of each feature to [0, 1] on some examples: those of the training subset, never of the test set.

  >>> import jax.numpy as jnp
  >>> scaling = minmax_scaling(jnp.array([[1.0, 7.0], [3.0, 7.0]]))
  >>> minmax_scale(scaling, jnp.array([[2.0, 7.0], [5.0, 8.0]])).tolist()
  [[0.5, 0.0], [2.0, 1.0]]

  Args:
    features: floating `[examples, features]`.
    where: boolean `[examples]`: the examples that count.

  Returns:
    `MinMaxScaling`, in float32 at least; a constant feature is shifted only.

  Raises:
    ValueError: when an argument has the wrong dtype or shape.

  Reference: the linear-evaluation protocol of Zheng et al., ICML 2023.
  """
  features, where = _wide_features(features, where)
  minimum = jnp.min(features, axis=0, where=where[:, None], initial=jnp.inf)
  width = jnp.max(features, axis=0, where=where[:, None], initial=-jnp.inf) - minimum
  some = jnp.any(where)
  return MinMaxScaling(jnp.where(some, minimum, 0), jnp.where(some & (width > 0), width, 1))


def minmax_scale(scaling: MinMaxScaling, features: jax.Array) -> jax.Array:
  """Features scaled as `minmax_scaling` found; those of other examples may leave [0, 1].

  >>> import jax.numpy as jnp
  >>> minmax_scale(MinMaxScaling(jnp.array([1.0]), jnp.array([4.0])), jnp.array([3.0])).tolist()
  [0.5]

  Args:
    scaling: from `minmax_scaling`.
    features: floating `[..., features]`.

  Returns:
    `[..., features]` of the same dtype.

  Raises:
    ValueError: when features do not fit the scaling.

  Reference: none.
  """
  _check_features(features, scaling.minimum)
  features = jnp.asarray(features)
  wide = features.astype(jnp.promote_types(features.dtype, scaling.minimum.dtype))
  return ((wide - scaling.minimum) / scaling.width).astype(features.dtype)


def _check_features(features, table):
  check_float("features", features)
  if jnp.ndim(features) < 1 or jnp.shape(features)[-1] != table.shape[-1]:
    raise ValueError(f"features must have {table.shape[-1]} entries on the last axis, got shape {jnp.shape(features)}.")


def _wide_features(features, where):
  """Features in float32 at least, and a mask of the examples."""
  check_float("features", features)
  if jnp.ndim(features) != 2:
    raise ValueError(f"features must be [examples, features], got shape {jnp.shape(features)}.")
  if where is not None and jnp.shape(where) != jnp.shape(features)[:1]:
    raise ValueError(f"where must have shape {jnp.shape(features)[:1]}, got {jnp.shape(where)}.")
  features = jnp.asarray(features)
  where = jnp.ones(features.shape[0], bool) if where is None else jnp.asarray(where, bool)
  return features.astype(jnp.promote_types(features.dtype, jnp.float32)), where


def _members(features, labels, num_classes, where):
  """Features in float32 at least, and the masked one-hot labels `[examples, classes]` in the same dtype."""
  features, where = _wide_features(features, where)
  check_hyperparameter("num_classes", num_classes, low=1)
  if not jnp.issubdtype(jnp.result_type(labels), jnp.integer) or jnp.shape(labels) != features.shape[:1]:
    raise ValueError(
      f"labels must be integers of shape {features.shape[:1]}, got {jnp.shape(labels)} of dtype"
      f" {jnp.result_type(labels)}."
    )
  one_hot = jax.nn.one_hot(labels, num_classes, dtype=features.dtype)
  return features, one_hot * where[:, None].astype(features.dtype)


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


def _minimize(objective, start, tolerance, max_iterations):
  """L-BFGS with a line search, until the gradient is small, the value stalls or the steps run out."""
  optimizer = optax.lbfgs()
  value_and_gradient = optax.value_and_grad_from_state(objective)

  def going(carry):
    _, _, norm, _, stalled, steps = carry
    return (norm > tolerance) & (stalled < 3) & (steps < max_iterations)

  def step(carry):
    params, state, _, best, stalled, steps = carry
    value, gradient = value_and_gradient(params, state=state)
    updates, state = optimizer.update(gradient, state, params, value=value, grad=gradient, value_fn=objective)
    params = optax.apply_updates(params, updates)
    value, gradient = optax.tree.get(state, "value"), optax.tree.get(state, "grad")
    stalled = jnp.where(value < best, 0, stalled + 1)
    return params, state, optax.global_norm(gradient), jnp.minimum(value, best), stalled, steps + 1

  value, gradient = jax.value_and_grad(objective)(start)
  first = (start, optimizer.init(start), optax.global_norm(gradient), value, jnp.int32(0), jnp.int32(0))
  return jax.lax.while_loop(going, step, first)[0]
