"""Linear classifiers `softmax(W x + b)` on frozen features, logistic regression by L-BFGS, and scaling of features.

`gaussian_probe` fits the same family generatively.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from jaxreg.checks import as_array, check_float, check_hyperparameter, dtype_of, widened_integers

__all__ = ["LinearProbe", "MinMaxScaling", "logistic_probe", "minmax_scale", "minmax_scaling", "probe_logits"]


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
  features, members = class_members(features, labels, num_classes, where)
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
