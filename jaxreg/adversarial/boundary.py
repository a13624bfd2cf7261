"""Geometry of decision boundaries: how far a linear or locally linear boundary tilts from the nearest-centroid one.

Labels are 0 and 1, `score = weights . x + bias` is positive for class 1, and `d(x) = score / |weights|` is the signed
distance of an input to the boundary. Examples with another label count for nothing.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxreg.checks import as_array, check_float, check_hyperparameter, counted_labels, dtype_of

__all__ = [
  "adversarial_distance",
  "adversarial_strength",
  "centroid_normal",
  "deviation_angle",
  "error_distance",
  "local_distances",
  "mirror_images",
  "projected_images",
  "signed_distances",
  "tilted_normal",
  "tilting_plane",
]


def signed_distances(inputs: ArrayLike, weights: ArrayLike, bias: ArrayLike) -> jax.Array:
  """Signed Euclidean distances to a hyperplane, `(weights . x + bias) / |weights|`.

  >>> import jax.numpy as jnp
  >>> signed_distances(jnp.array([[3.0, 4.0], [0.0, 0.0]]), jnp.array([3.0, 4.0]), -5.0).tolist()
  [4.0, -1.0]

  Args:
    inputs: floating `[..., features]`.
    weights: floating `[features]`, the normal of the hyperplane; of any length but zero, where distances are 0.
    bias: scalar.

  Returns:
    `[...]`, of the inputs' dtype, positive on the side that `weights` points to.

  Raises:
    ValueError: when shapes or dtypes do not fit.

  Reference: Tanay, Griffin, "A New Angle on L2 Regularization", arXiv 1806.11186, 2018.
  """
  dtype = dtype_of("inputs", inputs)
  return _signed_distances(*_hyperplane(inputs, weights, bias)).astype(dtype)


def projected_images(inputs: ArrayLike, weights: ArrayLike, bias: ArrayLike) -> jax.Array:
  """The nearest points of the hyperplane, `x - d(x) weights / |weights|`.

  >>> import jax.numpy as jnp
  >>> projected_images(jnp.array([[3.0, 1.0]]), jnp.array([2.0, 0.0]), -2.0).tolist()
  [[1.0, 1.0]]

  Args:
    inputs: as in `signed_distances`, as the rest.
    weights: floating `[features]`.
    bias: scalar.

  Returns:
    `[..., features]`, of the inputs' dtype.

  Raises:
    ValueError: when shapes or dtypes do not fit.

  Reference: Tanay, Griffin, "A New Angle on L2 Regularization", arXiv 1806.11186, 2018.
  """
  return _moved(inputs, weights, bias, 1)


def mirror_images(inputs: ArrayLike, weights: ArrayLike, bias: ArrayLike) -> jax.Array:
  """The inputs reflected at the hyperplane, `x - 2 d(x) weights / |weights|`: of the other class, as confidently.

  >>> import jax.numpy as jnp
  >>> mirror_images(jnp.array([[3.0, 1.0]]), jnp.array([2.0, 0.0]), -2.0).tolist()
  [[-1.0, 1.0]]

  Args:
    inputs: as in `signed_distances`, as the rest.
    weights: floating `[features]`.
    bias: scalar.

  Returns:
    `[..., features]`, of the inputs' dtype.

  Raises:
    ValueError: when shapes or dtypes do not fit.

  Reference: Tanay, Griffin, "A New Angle on L2 Regularization", arXiv 1806.11186, 2018.
  """
  return _moved(inputs, weights, bias, 2)


def centroid_normal(inputs: ArrayLike, labels: ArrayLike) -> jax.Array:
  """The unit normal of the nearest-centroid boundary, `(mean of class 1 - mean of class 0) / |…|`.

  >>> import jax.numpy as jnp
  >>> centroid_normal(jnp.array([[0.0, 1.0], [0.0, 5.0]]), jnp.array([0, 1])).tolist()
  [0.0, 1.0]

  Args:
    inputs: floating `[examples, features]`.
    labels: integers `[examples]`, 0 or 1.

  Returns:
    `[features]`, of the inputs' dtype; zero where a class is empty or the means are equal.

  Raises:
    ValueError: when shapes or dtypes do not fit.

  Reference: Tanay, Griffin, "A Boundary Tilting Perspective on the Phenomenon of Adversarial Examples", arXiv
    1608.07690, 2016.
  """
  dtype = dtype_of("inputs", inputs)
  wide, labels, counted = _classes(inputs, labels)
  return _unit(_between_centroids(*_centroids(wide, labels, counted))).astype(dtype)


def deviation_angle(inputs: ArrayLike, labels: ArrayLike, weights: ArrayLike) -> jax.Array:
  """The angle between a boundary's normal and that of the nearest-centroid classifier.

  By the arc tangent of both components, so that small angles keep their digits.

  >>> import jax.numpy as jnp
  >>> inputs, labels = jnp.array([[0.0, 0.0], [1.0, 0.0]]), jnp.array([0, 1])
  >>> round(deviation_angle(inputs, labels, jnp.array([2.0, 2.0])).item(), 4)
  0.7854

  Args:
    inputs: floating `[examples, features]`.
    labels: integers `[examples]`, 0 or 1.
    weights: floating `[features]`.

  Returns:
    Scalar in radians, in [0, pi], of the weights' dtype.

  Raises:
    ValueError: when shapes or dtypes do not fit.

  Reference: Tanay, Griffin, "A Boundary Tilting Perspective on the Phenomenon of Adversarial Examples", arXiv
    1608.07690, 2016.
  """
  dtype = dtype_of("weights", weights)
  wide, labels, counted = _classes(inputs, labels)
  normal = _unit(_between_centroids(*_centroids(wide, labels, counted)))
  weights = _weights(weights, wide)
  along, across = _components(normal, weights)
  return jnp.arctan2(_length(across), along).astype(dtype)


def adversarial_distance(
  inputs: ArrayLike, labels: ArrayLike, weights: ArrayLike, bias: ArrayLike, *, balanced: bool = True
) -> jax.Array:
  """How far, on average, inputs lie on their own side of the boundary: the mean of `d(x)` and `-d(x)`.

  With `balanced` it is half the distance of the classes' means times the cosine of `deviation_angle`, whatever the
  bias.

  >>> import jax.numpy as jnp
  >>> adversarial_distance(jnp.array([[0.0], [6.0]]), jnp.array([0, 1]), jnp.array([2.0]), -4.0).item()
  3.0

  Args:
    inputs: floating `[examples, features]`.
    labels: integers `[examples]`, 0 or 1.
    weights: floating `[features]`.
    bias: scalar.
    balanced: whether both classes count alike rather than every example; static.

  Returns:
    Scalar, of the inputs' dtype; 0 where a class that counts is empty.

  Raises:
    ValueError: when shapes or dtypes do not fit.

  Reference: Tanay, Griffin, "A New Angle on L2 Regularization", arXiv 1806.11186, 2018.
  """
  margins, labels, counted, dtype = _margins(inputs, labels, weights, bias)
  if not balanced:
    return _mean(margins, counted).astype(dtype)
  some = jnp.any(counted & (labels == 0)) & jnp.any(counted & (labels == 1))
  return jnp.where(
    some, (_mean(margins, counted & (labels == 0)) + _mean(margins, counted & (labels == 1))) / 2, 0
  ).astype(dtype)


def error_distance(inputs: ArrayLike, labels: ArrayLike, weights: ArrayLike, bias: ArrayLike) -> jax.Array:
  """How far, on average, misclassified inputs lie beyond the boundary; those classified rightly add 0 to the mean.

  >>> import jax.numpy as jnp
  >>> error_distance(jnp.array([[0.0], [6.0]]), jnp.array([0, 1]), jnp.array([2.0]), 4.0).item()
  1.0

  Args:
    inputs: floating `[examples, features]`.
    labels: integers `[examples]`, 0 or 1.
    weights: floating `[features]`.
    bias: scalar.

  Returns:
    Scalar, of the inputs' dtype, not negative.

  Raises:
    ValueError: when shapes or dtypes do not fit.

  Reference: Tanay, Griffin, "A New Angle on L2 Regularization", arXiv 1806.11186, 2018.
  """
  margins, _, counted, dtype = _margins(inputs, labels, weights, bias)
  return _mean(jnp.maximum(-margins, 0), counted).astype(dtype)


def adversarial_strength(inputs: ArrayLike, labels: ArrayLike, weights: ArrayLike, bias: ArrayLike) -> jax.Array:
  """How much nearer the mirror images of the classes' means are than the means of the other class.

  `|j - i| / (|d(i)| + |d(j)|)` with the means `i` and `j`: `1 / |cos(deviation_angle)|` where the boundary lies between
  them, and less where it does not. 1 says that an input must move as far as the other class to change sides.

  >>> import jax.numpy as jnp
  >>> inputs, labels = jnp.array([[0.0, 0.0], [2.0, 0.0]]), jnp.array([0, 1])
  >>> round(adversarial_strength(inputs, labels, jnp.array([3.0, 4.0]), -3.0).item(), 4)
  1.6667

  Args:
    inputs: floating `[examples, features]`.
    labels: integers `[examples]`, 0 or 1.
    weights: floating `[features]`.
    bias: scalar.

  Returns:
    Scalar, of the inputs' dtype; inf of a boundary through both means, NaN where a class is empty.

  Raises:
    ValueError: when shapes or dtypes do not fit.

  Reference: Tanay, Griffin, "A Boundary Tilting Perspective on the Phenomenon of Adversarial Examples", arXiv
    1608.07690, 2016.
  """
  dtype = dtype_of("inputs", inputs)
  wide, labels, counted = _classes(inputs, labels)
  means, some = _centroids(wide, labels, counted)
  _, weights, bias = _hyperplane(wide, weights, bias)
  reach = jnp.sum(jnp.abs(_signed_distances(means, weights, bias)))
  return jnp.where(some, _length(means[1] - means[0]) / reach, jnp.nan).astype(dtype)


def tilting_plane(inputs: ArrayLike, labels: ArrayLike, weights: ArrayLike) -> jax.Array:
  """The plane in which a boundary tilts: `centroid_normal`, and the unit vector in which `weights` deviates from it.

  `inputs @ tilting_plane(…)` shows the data in two dimensions and the boundary as a line.

  >>> import jax.numpy as jnp
  >>> inputs, labels = jnp.array([[0.0, 0.0, 1.0], [1.0, 0.0, 1.0]]), jnp.array([0, 1])
  >>> tilting_plane(inputs, labels, jnp.array([1.0, 0.0, -3.0])).T.tolist()
  [[1.0, 0.0, 0.0], [0.0, 0.0, -1.0]]

  Args:
    inputs: floating `[examples, features]`.
    labels: integers `[examples]`, 0 or 1.
    weights: floating `[features]`.

  Returns:
    `[features, 2]`, of the inputs' dtype; the second column is zero where `weights` does not deviate.

  Raises:
    ValueError: when shapes or dtypes do not fit.

  Reference: Tanay, Griffin, "A New Angle on L2 Regularization", arXiv 1806.11186, 2018.
  """
  dtype = dtype_of("inputs", inputs)
  wide, labels, counted = _classes(inputs, labels)
  normal = _unit(_between_centroids(*_centroids(wide, labels, counted)))
  weights = _weights(weights, wide)
  _, across = _components(normal, weights)
  # What is left of weights along the normal is rounding, which has no direction.
  across = jnp.where(_length(across) > 8 * jnp.finfo(across.dtype).eps * _length(weights), across, 0 * across)
  return jnp.stack([normal, _unit(across)], axis=1).astype(dtype)


def tilted_normal(normal: ArrayLike, direction: ArrayLike, *, angle: ArrayLike) -> jax.Array:
  """A boundary's normal tilted by an angle towards a direction, `cos(angle) normal + sin(angle) direction`.

  With a direction in which the data do not vary no prediction changes below pi / 2, while `adversarial_strength` grows
  like `1 / cos(angle)`.

  >>> import jax.numpy as jnp
  >>> tilted_normal(jnp.array([2.0, 0.0]), jnp.array([1.0, 3.0]), angle=jnp.pi / 6).round(4).tolist()
  [0.8659999966621399, 0.5]

  Args:
    normal: floating `[features]`; made a unit vector.
    direction: floating `[features]`; made orthogonal to `normal` and a unit vector.
    angle: scalar in radians; may be traced.

  Returns:
    `[features]`, of the normal's dtype, of length 1.

  Raises:
    ValueError: when shapes or dtypes do not fit.

  Reference: Tanay, Griffin, "A Boundary Tilting Perspective on the Phenomenon of Adversarial Examples", arXiv
    1608.07690, 2016.
  """
  dtype = dtype_of("normal", normal)
  check_hyperparameter("angle", angle, shape=())
  check_float("normal", normal)
  if jnp.ndim(normal) != 1:
    raise ValueError(f"normal must be [features], got shape {jnp.shape(normal)}.")
  normal = _unit(_widened(normal))
  _, across = _components(normal, _weights(direction, normal, "direction"))
  angle = jnp.asarray(angle, normal.dtype)
  return (jnp.cos(angle) * normal + jnp.sin(angle) * _unit(across)).astype(dtype)


def local_distances(
  scores_of_inputs: Callable[[jax.Array], jax.Array], inputs: ArrayLike, labels: ArrayLike
) -> jax.Array:
  """First-order distances of inputs to the boundary of any differentiable classifier, `margin / |grad_x margin|`.

  The margin is the score of the label minus the largest other one; of a single score it is the score itself, with the
  label's sign. Exact where the network is linear between the input and its projection onto the boundary.

  >>> import jax.numpy as jnp
  >>> weights = jnp.array([[3.0, -3.0], [4.0, -4.0]])
  >>> local_distances(lambda x: x @ weights, jnp.array([[3.0, 4.0], [3.0, 4.0]]), jnp.array([0, 1])).tolist()
  [5.0, -5.0]

  Args:
    scores_of_inputs: `[batch, ...] -> [batch, classes]`, or `[batch]` for two classes; closes over the model. No
      example's scores may depend on another's.
    inputs: floating `[batch, ...]`.
    labels: integers `[batch]`.

  Returns:
    `[batch]`, of the inputs' dtype, negative for what is misclassified; 0 where the margin has no gradient or the label
    is no class.

  Raises:
    ValueError: when shapes or dtypes do not fit.

  Reference: Tanay, Griffin, "A New Angle on L2 Regularization", arXiv 1806.11186, 2018.
  """
  check_float("inputs", inputs)
  inputs, labels = as_array("inputs", inputs), as_array("labels", labels)
  _check_labels(inputs, labels)
  scores = jax.eval_shape(scores_of_inputs, inputs)
  if getattr(scores, "ndim", 0) not in (1, 2) or scores.shape[0] != inputs.shape[0]:
    raise ValueError(f"scores_of_inputs must return [batch, classes] or [batch], got {scores}.")
  classes = scores.shape[1] if scores.ndim == 2 else 2
  labels, counted = counted_labels(labels, classes)

  def margins(inputs):
    scores = _widened(scores_of_inputs(inputs))
    if scores.ndim == 1:
      return jnp.where(labels == 1, scores, -scores)
    own = jnp.arange(classes) == labels[:, None]
    others = jnp.max(jnp.where(own, -jnp.inf, scores), axis=1)
    return jnp.sum(jnp.where(own, scores, 0), axis=1) - others

  values, backward = jax.vjp(margins, inputs)
  (gradient,) = backward(jnp.ones_like(values))
  length = _length(_widened(gradient).reshape(len(labels), -1))
  usable = counted & (length > 0)
  return jnp.where(usable, values / jnp.where(usable, length, 1), 0).astype(inputs.dtype)


def _widened(array):
  array = jnp.asarray(array)
  return array.astype(jnp.promote_types(array.dtype, jnp.float32))


def _weights(weights, inputs, name="weights"):
  check_float(name, weights)
  if jnp.shape(weights) != inputs.shape[-1:]:
    raise ValueError(f"{name} must have shape {inputs.shape[-1:]}, got {jnp.shape(weights)}.")
  return jnp.asarray(weights).astype(jnp.promote_types(inputs.dtype, dtype_of(name, weights)))


def _hyperplane(inputs, weights, bias):
  check_float("inputs", inputs)
  if jnp.ndim(inputs) < 1:
    raise ValueError("inputs must be [..., features], got a scalar.")
  inputs = _widened(inputs)
  check_hyperparameter("bias", bias, shape=())
  weights = _weights(weights, inputs)
  return inputs, weights, jnp.asarray(bias, weights.dtype)


def _signed_distances(inputs, weights, bias):
  largest = jnp.max(jnp.abs(weights))
  scale = jnp.where(largest > 0, largest, 1)
  length = _length(weights / scale)
  along = jnp.matmul(inputs, weights / scale, precision="highest") + bias / scale
  return jnp.where(largest == 0, 0, along / jnp.where(length > 0, length, 1))


def _moved(inputs, weights, bias, times):
  dtype = dtype_of("inputs", inputs)
  inputs, weights, bias = _hyperplane(inputs, weights, bias)
  distances = _signed_distances(inputs, weights, bias)
  return (inputs - times * distances[..., None] * _unit(weights)).astype(dtype)


def _check_labels(inputs, labels):
  if not jnp.issubdtype(dtype_of("labels", labels), jnp.integer) or jnp.shape(labels) != inputs.shape[:1]:
    raise ValueError(
      f"labels must be integers of shape {inputs.shape[:1]}, got {jnp.shape(labels)} of dtype"
      f" {jnp.result_type(labels)}."
    )


def _classes(inputs, labels):
  """Inputs in float32 at least, those without a class cleared, and their labels."""
  check_float("inputs", inputs)
  if jnp.ndim(inputs) != 2:
    raise ValueError(f"inputs must be [examples, features], got shape {jnp.shape(inputs)}.")
  inputs, labels = _widened(inputs), as_array("labels", labels)
  _check_labels(inputs, labels)
  labels, counted = counted_labels(labels, 2)
  return jnp.where(counted[:, None], inputs, 0), labels, counted


def _mean(values, counted):
  """Over the first axis; 0 of nothing."""
  weights = counted.astype(values.dtype)
  return jnp.tensordot(weights, values, 1, precision="highest") / jnp.maximum(jnp.sum(weights), 1)


def _centroids(inputs, labels, counted):
  """The means of both classes, `[2, features]`, and whether neither is empty."""
  members = [counted & (labels == label) for label in (0, 1)]
  means = jnp.stack([_mean(inputs, member) for member in members])
  return means, jnp.any(members[0]) & jnp.any(members[1])


def _between_centroids(means, some):
  return jnp.where(some, means[1] - means[0], 0)


def _margins(inputs, labels, weights, bias):
  dtype = dtype_of("inputs", inputs)
  wide, labels, counted = _classes(inputs, labels)
  distances = _signed_distances(*_hyperplane(wide, weights, bias))
  return jnp.where(labels == 1, distances, -distances), labels, counted, dtype


def _length(array):
  """Of the last axis, with derivative 0 at zero, and without overflow of the squares."""
  largest = jax.lax.stop_gradient(jnp.max(jnp.abs(array), axis=-1, keepdims=True))
  largest = jnp.where(largest > 0, largest, 1)
  squares = jnp.sum(jnp.square(array / largest), axis=-1)
  some = squares > 0
  return jnp.where(some, jnp.sqrt(jnp.where(some, squares, 1)), squares) * largest[..., 0]


def _unit(vector):
  length = _length(vector)
  return vector / jnp.where(length > 0, length, 1)


def _components(normal, vector):
  """Along a unit vector, and what is left across it, orthogonal to rounding of the latter."""
  along = jnp.dot(normal, vector, precision="highest")
  across = vector - along * normal
  return along, across - jnp.dot(normal, across, precision="highest") * normal
