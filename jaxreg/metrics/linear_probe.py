"""Linear classifiers `softmax(W x + b)` on frozen features, logistic regression, and scaling of features.

`gaussian_probe` fits the same family generatively.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxreg.checks import as_array, check_float, check_hyperparameter, dtype_of, widened_integers
from jaxreg.metrics.sizes import static_integer

__all__ = [
  "LinearProbe",
  "MinMaxScaling",
  "linear_probe_accuracy",
  "logistic_probe",
  "minmax_scale",
  "minmax_scaling",
  "probe_logits",
]


class LinearProbe(NamedTuple):
  """A linear classifier `softmax(W x + b)`.

  Attributes:
    weights: W, `[classes, features]`.
    bias: b, `[classes]`.
    converged: boolean, whether an iterative fit reached what was asked for; None of other classifiers.
  """

  weights: jax.Array
  bias: jax.Array
  converged: jax.Array | None = None


class MinMaxScaling(NamedTuple):
  """The affine map of each feature's range on some examples to [0, 1].

  Attributes:
    minimum: `[features]`.
    width: `[features]`, maximum less minimum, or 1 where they are equal.
  """

  minimum: jax.Array
  width: jax.Array


def probe_logits(probe: LinearProbe, features: ArrayLike) -> jax.Array:
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
  check_features(features, probe.weights)
  features = jnp.asarray(features)
  wide = features.astype(jnp.promote_types(features.dtype, probe.weights.dtype))
  return (jnp.matmul(wide, probe.weights.T, precision="highest") + probe.bias).astype(features.dtype)


def logistic_probe(
  features: ArrayLike,
  labels: ArrayLike,
  *,
  num_classes: int,
  l2: ArrayLike = 1.0,
  max_iterations: ArrayLike = 1000,
  tolerance: ArrayLike = 1e-7,
  where: ArrayLike | None = None,
) -> LinearProbe:
  """Multinomial logistic regression: minimises `sum_i CE(W x_i + b, y_i) + l2 / 2 ||W||^2`; b is free.

  By Newton's method, whose equations are solved by conjugate gradients in coordinates in which features and penalty
  together have the same scale in all directions: badly scaled or correlated features do no harm. Ends when the
  gradient's norm falls below `tolerance`, or falls no more; `converged` says whether it is below that, or below what
  the dtype can resolve, `32 eps (sum_i 1 + |x_i|^2)^(1/2)` times one plus the largest logit. `l2` is `1 / C` of
  scikit-learn. Runs under `jit`, `vmap` and `lax.map` (which is faster on a CPU: vmapped fits all take as long as the
  slowest); cannot be differentiated in reverse mode.

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
    max_iterations: positive, of Newton's method; may be traced.
    tolerance: non-negative, of the gradient of the sum in W and b; may be traced.
    where: boolean `[examples]`: the examples that count.

  Returns:
    `LinearProbe`, in float32 at least; weights and biases sum to 0 over the classes.

  Raises:
    ValueError: when shapes or dtypes do not fit or a hyperparameter is out of range.

  Reference: Nocedal, Wright, "Numerical Optimization", Springer 2006, Section 7.1; the objective of the linear
    evaluations in Zheng et al., ICML 2023.
  """
  num_classes = static_integer("num_classes", num_classes, low=2)
  check_hyperparameter("l2", l2, low=0)
  check_hyperparameter("max_iterations", max_iterations, low=1)
  check_hyperparameter("tolerance", tolerance, low=0)
  features, members = class_members(features, labels, num_classes, where)
  counted = jnp.sum(members, axis=1, keepdims=True)
  l2 = jnp.asarray(l2, features.dtype)
  size = jnp.sqrt(jnp.sum(counted * (1 + jnp.square(features))))
  center = jnp.sum(counted * features, 0) / jnp.maximum(jnp.sum(counted), 1)
  factor = _curvature_factor(counted * (features - center), num_classes, l2)
  solve = lambda rows, **options: jax.scipy.linalg.solve_triangular(factor, rows.T, lower=True, **options).T
  inputs = solve(features - center)

  # From here on `weights` are W times the factor, and `bias` is that of the centred features.
  def value_and_gradient(probe):
    logits = _matmul(inputs, probe.weights.T) + probe.bias
    above = logits - jnp.sum(members * logits, axis=1, keepdims=True)
    # The cross-entropy as log(1 + the other classes' odds) keeps its digits when it is small.
    others = jax.nn.logsumexp(jnp.where(members > 0, -jnp.inf, above), axis=1)
    plain = solve(probe.weights, trans=1)
    value = jnp.sum(counted[:, 0] * jax.nn.softplus(others)) + l2 / 2 * jnp.sum(jnp.square(plain))
    probabilities = jax.nn.softmax(logits)
    # The error of the own class as minus the sum of the others', which does not cancel either.
    rest = jnp.where(members > 0, 0, probabilities)
    error = counted * jnp.where(members > 0, -jnp.sum(rest, 1, keepdims=True), rest)
    gradient = LinearProbe(_matmul(error.T, inputs) + l2 * solve(plain), jnp.sum(error, 0))
    return value, gradient, (probabilities, jnp.max(jnp.abs(logits)))

  def original_norm(gradient):
    weights = _matmul(gradient.weights, factor.T) + gradient.bias[:, None] * center
    return jnp.sqrt(jnp.sum(jnp.square(weights)) + jnp.sum(jnp.square(gradient.bias)))

  def curvature(probabilities, change):
    logits = _matmul(inputs, change.weights.T) + change.bias
    mean = jnp.sum(probabilities * logits, 1, keepdims=True)
    error = counted * probabilities * (logits - mean)
    return LinearProbe(_matmul(error.T, inputs) + l2 * solve(solve(change.weights, trans=1)), jnp.sum(error, 0))

  start = LinearProbe(*(jnp.zeros(shape, features.dtype) for shape in ((num_classes, features.shape[1]), num_classes)))
  found, norm, largest = _newton(value_and_gradient, curvature, original_norm, start, tolerance, max_iterations)
  weights = solve(found.weights, trans=1)
  probe = LinearProbe(weights, found.bias - _matmul(weights, center))
  resolution = 32 * jnp.finfo(size.dtype).eps * size * (1 + largest)
  return LinearProbe(*(leaf - leaf.mean(axis=0) for leaf in probe[:2]), norm <= jnp.maximum(tolerance, resolution))


def _matmul(first, second):
  return jnp.matmul(first, second, precision="highest")


def _curvature_factor(inputs, num_classes, l2):
  """The Cholesky factor of a bound of the curvature in the weights, made definite."""
  curvature = _matmul(inputs.T, inputs) * (1 - 1 / num_classes) / num_classes
  diagonal = jnp.diagonal(curvature) + l2
  size = len(diagonal)
  diagonal = jnp.where(diagonal > 0, diagonal * (1 + 8 * size * jnp.finfo(inputs.dtype).eps), 1)
  return jnp.linalg.cholesky(jnp.where(jnp.eye(size, dtype=bool), diagonal, curvature))


def _newton(value_and_gradient, curvature, norm_of, start, tolerance, max_iterations):
  """Newton's method until the gradient is small, or has not fallen for some steps: (probe, norm, largest logit).

  The probe is that of the smallest gradient seen: near the minimum, where values no longer differ, steps may lead away.
  """
  dot = lambda a, b: sum(jnp.vdot(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))

  def going(carry):
    *_, norm, stalled, steps = carry
    return (norm > tolerance) & (stalled < 4) & (steps < max_iterations)

  def step(carry):
    best, probe, value, gradient, extra, norm, stalled, steps = carry
    length = jnp.sqrt(dot(gradient, gradient))
    accuracy = jnp.minimum(0.1, length / (1 + length))
    direction, _ = jax.scipy.sparse.linalg.cg(
      lambda change: curvature(extra[0], change), jax.tree.map(jnp.negative, gradient), tol=accuracy, maxiter=200
    )
    slope = dot(gradient, direction)

    def short(search):
      _, size, new, after, *_ = search
      fits = (new <= value + 1e-4 * size * slope) | (norm_of(after) < norm)
      return ~fits & (size > 1e-6)

    def at(size):
      # What all classes share changes no probability; rounding would let it drift.
      moved = jax.tree.map(lambda x, d: x + size * (d - jnp.mean(d, axis=0)), probe, direction)
      return moved, size, *value_and_gradient(moved)

    first = at(jnp.ones((), value.dtype))
    moved, _, value, gradient, extra = jax.lax.while_loop(short, lambda search: at(search[1] / 2), first)
    norm = norm_of(gradient)
    stalled = jnp.where(norm < 0.9 * best[1], 0, stalled + 1)
    best = jax.tree.map(lambda new, old: jnp.where(norm < best[1], new, old), (moved, norm, extra[1]), best)
    return best, moved, value, gradient, extra, norm, stalled, steps + 1

  value, gradient, extra = value_and_gradient(start)
  norm = norm_of(gradient)
  best = (start, norm, extra[1])
  first = (best, start, value, gradient, extra, norm, jnp.int32(0), jnp.int32(0))
  return jax.lax.while_loop(going, step, first)[0]


def linear_probe_accuracy(
  features: ArrayLike,
  labels: ArrayLike,
  test_features: ArrayLike,
  test_labels: ArrayLike,
  *,
  num_classes: int,
  l2: ArrayLike = 1.0,
  max_iterations: ArrayLike = 1000,
  tolerance: ArrayLike = 1e-7,
) -> jax.Array:
  """Test accuracy of logistic regression on frozen features, which are centred and divided by one standard deviation.

  Mean and deviation, of all entries together, are those of the training features. So the strength of `l2` does not
  depend on the scale of a representation, while its features keep their relative sizes.

  >>> import jax.numpy as jnp
  >>> features, labels = jnp.array([[0.0], [2.0], [4.0], [6.0]]), jnp.array([0, 0, 1, 1])
  >>> linear_probe_accuracy(features, labels, 1000 * features, labels, num_classes=2).item()
  0.75

  Args:
    features: floating `[examples, features]`, of the training set.
    labels: integers `[examples]`.
    test_features: floating `[tests, features]`.
    test_labels: integers `[tests]`.
    num_classes: static, at least 2.
    l2: as in `logistic_probe`, as the rest.
    max_iterations: positive.
    tolerance: non-negative.

  Returns:
    Scalar in [0, 1], float32 at least. NaN of features that are NaN.

  Raises:
    ValueError: when shapes or dtypes do not fit or a hyperparameter is out of range.

  Reference: the probe of Xue, Gan, Ni, Joshi, Mirzasoleiman, "Investigating the Benefits of Projection Head for
    Representation Learning", ICLR 2024.
  """
  features, test_features = as_array("features", features), as_array("test_features", test_features)
  check_float("test_features", test_features)
  wide, _ = _wide_features(features, None)
  mean = jnp.mean(wide, axis=0)
  deviation = jnp.sqrt(jnp.mean(jnp.square(wide - mean)))
  scale = lambda x: (x.astype(wide.dtype) - mean) / jnp.where(deviation == 0, 1, deviation)
  options = dict(num_classes=num_classes, l2=l2, max_iterations=max_iterations, tolerance=tolerance)
  probe = logistic_probe(scale(wide), labels, **options)
  check_features(test_features, probe.weights)
  _, members = class_members(test_features, test_labels, num_classes, None)
  right = probe_logits(probe, scale(test_features)).argmax(-1) == members.argmax(-1)
  counted = jnp.any(members > 0, axis=1)
  spoiled = jnp.any(jnp.isnan(wide)) | jnp.any(jnp.isnan(test_features))
  return jnp.where(spoiled, jnp.nan, jnp.mean(right.astype(wide.dtype), where=counted))


def minmax_scaling(features: ArrayLike, *, where: ArrayLike | None = None) -> MinMaxScaling:
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
  return MinMaxScaling(jnp.where(some, minimum, 0), jnp.where(some & (width != 0), width, 1))


def minmax_scale(scaling: MinMaxScaling, features: ArrayLike) -> jax.Array:
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
  check_features(features, scaling.minimum)
  features = jnp.asarray(features)
  wide = features.astype(jnp.promote_types(features.dtype, scaling.minimum.dtype))
  return ((wide - scaling.minimum) / scaling.width).astype(features.dtype)


def check_features(features, table):
  """Raises ValueError unless the last axis of the features is that of the table."""
  check_float("features", features)
  table = as_array("table", table)
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
  features = features.astype(jnp.promote_types(features.dtype, jnp.float32))
  if where is None:
    return features, jnp.ones(features.shape[0], bool)
  where = jnp.asarray(where, bool)
  # What does not count may be anything, NaN too, which no factor of 0 would remove.
  return jnp.where(where[:, None], features, 0), where


def class_members(features, labels, num_classes, where):
  """Features in float32 at least, and the masked one-hot labels `[examples, classes]` in the same dtype."""
  features, where = _wide_features(features, where)
  check_hyperparameter("num_classes", num_classes, low=1)
  if not jnp.issubdtype(dtype_of("labels", labels), jnp.integer) or jnp.shape(labels) != features.shape[:1]:
    raise ValueError(
      f"labels must be integers of shape {features.shape[:1]}, got {jnp.shape(labels)} of dtype"
      f" {jnp.result_type(labels)}."
    )
  labels = widened_integers(as_array("labels", labels))
  one_hot = jax.nn.one_hot(labels, num_classes, dtype=features.dtype)
  return features, one_hot * where[:, None].astype(features.dtype)
