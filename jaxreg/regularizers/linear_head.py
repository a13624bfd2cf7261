"""Derivatives of the mean cross-entropy with respect to a linear head, in closed form.

A head is a dict of `kernel` `[features, classes]` and perhaps `bias` `[classes]`, as Flax's `Dense` has them. One
column stands for a sigmoid of two classes, more for a softmax. With z the features and 1, p the probabilities and
r = p - y, an example's gradient is `z r^T` and its Hessian `z z^T x (diag(p) - p p^T)`; neither is ever formed:
everything here takes memory for features, logits and heads alone, and may be differentiated in features and head.
"""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxreg.checks import as_array, check_float, dtype_of, example_mask
from jaxreg.losses.labelled_logits import narrowed, widened
from jaxreg.regularizers.environment_batch import (
  checked_features,
  class_labels,
  class_targets,
  example_weights,
  expanded,
)

__all__ = [
  "head_gradient",
  "head_gradient_square_norms",
  "head_gradient_variance",
  "head_hessian_diagonal",
  "head_hessian_product",
]

Head = Mapping[str, ArrayLike]


def head_gradient(
  features: ArrayLike, labels: ArrayLike, head: Head, *, where: ArrayLike | None = None
) -> dict[str, jax.Array]:
  """The gradient of the mean cross-entropy with respect to a linear head, `mean_n z_n r_n^T`.

  >>> import jax.numpy as jnp
  >>> head = {"kernel": jnp.zeros((1, 2)), "bias": jnp.zeros(2)}
  >>> gradient = head_gradient(jnp.array([[1.0], [3.0]]), jnp.array([0, 0]), head)
  >>> gradient["kernel"].tolist(), gradient["bias"].tolist()
  ([[-1.0, 1.0]], [-0.5, 0.5])

  Args:
    features: floating `[..., batch, features]`; leading axes are environments, of one head.
    labels: integers `[..., batch]`; examples with another label than a class count for nothing.
    head: `kernel` floating `[features, classes]` and perhaps `bias` `[classes]`; one column is a sigmoid of labels 0
      and 1.
    where: boolean `[..., batch]`: the examples that count; those of the others are not read.

  Returns:
    A dict like the head, of `[..., features, classes]` and `[..., classes]`, in the head's dtypes; 0 of no examples.

  Raises:
    ValueError: when shapes or dtypes do not fit.

  Reference: Hemati, Zhang, Estiri, Chen, "Understanding Hessian Alignment for Domain Generalization", ICCV 2023.
  """
  batch = labelled_batch(features, labels, head, where)
  return batch.narrowed(batch.gradient())


def head_hessian_product(
  features: ArrayLike, head: Head, direction: Head, *, where: ArrayLike | None = None
) -> dict[str, jax.Array]:
  """The Hessian of the mean cross-entropy with respect to a linear head, applied to a direction.

  `mean_n z_n u_n^T` with `u = p * (s - <p, s>)` and `s` the logits of the direction. It depends on no label.

  >>> import jax.numpy as jnp
  >>> head, direction = {"kernel": jnp.zeros((1, 2))}, {"kernel": jnp.array([[1.0, 0.0]])}
  >>> head_hessian_product(jnp.array([[2.0]]), head, direction)["kernel"].tolist()
  [[1.0, -1.0]]

  Args:
    features, head, where: as in `head_gradient`.
    direction: a dict like the head, of its shapes, or with the leading axes of the features before them.

  Returns:
    As `head_gradient`.

  Raises:
    ValueError: when shapes or dtypes do not fit.

  Reference: Hemati et al., ICCV 2023, the products of HGP.
  """
  batch = head_batch(features, head, where)
  return batch.narrowed(batch.product(like_head("direction", direction, batch)))


def head_hessian_diagonal(features: ArrayLike, head: Head, *, where: ArrayLike | None = None) -> dict[str, jax.Array]:
  """The diagonal of the Hessian of the mean cross-entropy with respect to a linear head, `mean_n z_n^2 p_n (1 - p_n)`.

  >>> import jax.numpy as jnp
  >>> head_hessian_diagonal(jnp.array([[2.0]]), {"kernel": jnp.zeros((1, 2))})["kernel"].tolist()
  [[1.0, 1.0]]

  Args:
    features, head, where: as in `head_gradient`.

  Returns:
    As `head_gradient`.

  Raises:
    ValueError: when shapes or dtypes do not fit.

  Reference: Hemati et al., ICCV 2023; what its Hutchinson estimator has as its mean.
  """
  batch = head_batch(features, head, where)
  return batch.narrowed(batch.diagonal())


def head_gradient_variance(
  features: ArrayLike,
  labels: ArrayLike,
  head: Head,
  *,
  center: Head | None = None,
  where: ArrayLike | None = None,
) -> dict[str, jax.Array]:
  """How the examples' gradients with respect to a linear head vary, `mean_n (g_n - center)^2` for every parameter.

  >>> import jax.numpy as jnp
  >>> features, labels, head = jnp.array([[1.0], [3.0]]), jnp.array([0, 0]), {"kernel": jnp.zeros((1, 2))}
  >>> head_gradient_variance(features, labels, head)["kernel"].tolist()
  [[0.25, 0.25]]
  >>> head_gradient_variance(features, labels, head, center={"kernel": jnp.zeros((1, 2))})["kernel"].tolist()
  [[1.25, 1.25]]

  Args:
    features, labels, head, where: as in `head_gradient`.
    center: a dict like the head, of its shapes, or with the leading axes of the features before them, for example
      `head_gradient` of other examples; by default the mean of these examples' gradients, as in Fishr.

  Returns:
    As `head_gradient`; not negative but for rounding.

  Raises:
    ValueError: when shapes or dtypes do not fit.

  Reference: Rame, Dancette, Cord, "Fishr: Invariant Gradient Variances for Out-of-Distribution Generalization", ICML
    2022, equation 2.
  """
  batch = labelled_batch(features, labels, head, where)
  variance, mean = batch.moments()
  if center is not None:
    center = like_head("center", center, batch)
    some = jnp.any(batch.weights > 0, axis=-1)
    variance = {
      name: variance[name] + jnp.where(expanded(some, mean[name]), (mean[name] - center[name]) ** 2, 0)
      for name in variance
    }
  return batch.narrowed(variance)


def head_gradient_square_norms(
  features: ArrayLike, labels: ArrayLike, head: Head, *, where: ArrayLike | None = None
) -> dict[str, jax.Array]:
  """The mean squared norm of the examples' gradients with respect to each array of a linear head.

  `mean_n |r_n|^2 |z_n|^2` of the kernel and `mean_n |r_n|^2` of the bias.

  >>> import jax.numpy as jnp
  >>> head = {"kernel": jnp.zeros((1, 2)), "bias": jnp.zeros(2)}
  >>> norms = head_gradient_square_norms(jnp.array([[2.0]]), jnp.array([0]), head)
  >>> norms["kernel"].item(), norms["bias"].item()
  (2.0, 0.5)

  Args:
    features, labels, head, where: as in `head_gradient`.

  Returns:
    A dict like the head, of `[...]`, in the head's dtypes; 0 of no examples.

  Raises:
    ValueError: when shapes or dtypes do not fit.

  Reference: Shin, Bae, Na, Kim, Moon, "Unknown Domain Inconsistency Minimization for Domain Generalization", ICLR 2024
    (as in the official code).
  """
  batch = labelled_batch(features, labels, head, where)
  residuals = batch.weights * jnp.sum(batch.residuals() ** 2, axis=-1)
  norms = {"kernel": jnp.sum(residuals * jnp.sum(batch.features**2, axis=-1), axis=-1)}
  if "bias" in batch.head:
    norms["bias"] = jnp.sum(residuals, axis=-1)
  return batch.narrowed(norms)


class HeadBatch(NamedTuple):
  """Features and labels of a linear head as its derivatives are computed with them, in float32 at least."""

  features: jax.Array  # [..., batch, features], no gradient to those that do not count
  labels: jax.Array | None  # integers [..., batch]
  weights: jax.Array  # [..., batch], one over their number for the examples that count, else 0
  head: dict[str, jax.Array]  # kernel and perhaps bias
  dtypes: dict  # of the head as it came

  def logits(self, head: dict[str, jax.Array] | None = None) -> jax.Array:
    """Of this head or of a direction, which may have leading axes."""
    head = self.head if head is None else head
    logits = jnp.einsum("...bk,...kc->...bc", self.features, head["kernel"], precision="highest")
    return logits + head["bias"][..., None, :] if "bias" in head else logits

  def probabilities(self) -> jax.Array:
    logits = self.logits()
    return jax.nn.sigmoid(logits) if logits.shape[-1] == 1 else jax.nn.softmax(logits)

  def residuals(self) -> jax.Array:
    probabilities = self.probabilities()
    return probabilities - class_targets(self.labels, probabilities.shape[-1], probabilities.dtype)

  def sums(self, features: jax.Array, scores: jax.Array) -> dict[str, jax.Array]:
    """Weighted sums of features times scores, and of scores."""
    scores = self.weights[..., None] * scores
    found = {"kernel": jnp.einsum("...bk,...bc->...kc", features, scores, precision="highest")}
    return {**found, "bias": jnp.sum(scores, axis=-2)} if "bias" in self.head else found

  def gradient(self) -> dict[str, jax.Array]:
    return self.sums(self.features, self.residuals())

  def product(self, direction: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """The Hessian times a direction."""
    probabilities, scores = self.probabilities(), self.logits(direction)
    if probabilities.shape[-1] == 1:
      curved = probabilities * (1 - probabilities) * scores
    else:
      curved = probabilities * (scores - jnp.sum(probabilities * scores, axis=-1, keepdims=True))
    return self.sums(self.features, curved)

  def diagonal(self) -> dict[str, jax.Array]:
    """The Hessian's diagonal."""
    probabilities = self.probabilities()
    return self.sums(self.features**2, probabilities * (1 - probabilities))

  def moments(self) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """Variance and mean of the examples' gradients.

    Of centred features and residuals, without subtracting the square of a large mean. With `z = b + mean z` and
    `r = a + mean r`, `var(z r) = var(b r) + 2 mean(z) mean(b r a) + mean(z)^2 mean(a^2)`.
    """
    residuals, weights = self.residuals(), self.weights[..., None]
    mean_residual = jnp.sum(weights * residuals, axis=-2, keepdims=True)
    mean_feature = jnp.sum(weights * self.features, axis=-2, keepdims=True)
    centred, shifted = residuals - mean_residual, self.features - mean_feature
    along = jnp.swapaxes(mean_feature, -1, -2)
    part = self.sums(shifted, residuals)["kernel"]
    mean_square = jnp.sum(weights * centred**2, axis=-2, keepdims=True)
    mixed = self.sums(shifted, centred * residuals)["kernel"]
    variance = self.sums(shifted**2, residuals**2)["kernel"] - part**2 + 2 * along * mixed + along**2 * mean_square
    variances, means = {"kernel": variance}, {"kernel": part + along * mean_residual}
    if "bias" in self.head:
      variances["bias"], means["bias"] = mean_square[..., 0, :], mean_residual[..., 0, :]
    return variances, means

  def narrowed(self, arrays: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """In the dtypes of the head."""
    return {name: narrowed(array, self.dtypes[name]) for name, array in arrays.items()}


def labelled_batch(features, labels, head, where, *, ndim: int | None = None) -> HeadBatch:
  """Checked arguments in the form in which derivatives are computed; labels that are no class do not count."""
  features = checked_features(features, ndim=ndim)
  _check_head(head, features.shape[-1])
  labels, known = class_labels(labels, features.shape[:-1], jnp.shape(head["kernel"])[1])
  counted = known & example_mask(where, features.shape[:-1])
  return head_batch(features, head, counted)._replace(labels=labels)


def head_batch(features, head, where) -> HeadBatch:
  """Checked arguments of what depends on no label."""
  features = checked_features(features)
  dtypes = _check_head(head, features.shape[-1])
  counted = example_mask(where, features.shape[:-1])
  wide = jnp.where(counted[..., None], widened(features), 0)
  dtype = jnp.promote_types(wide.dtype, jnp.result_type(*dtypes.values()))
  head = {name: widened(as_array(name, head[name])).astype(dtype) for name in dtypes}
  return HeadBatch(wide.astype(dtype), None, example_weights(counted, dtype), head, dtypes)


def like_head(name: str, tree, batch: HeadBatch) -> dict[str, jax.Array]:
  """A checked dict with the arrays of the head, in the dtype of the computation."""
  if not isinstance(tree, Mapping) or set(tree) != set(batch.head):
    found = sorted(tree) if isinstance(tree, Mapping) else type(tree).__name__
    raise ValueError(f"{name} must be a dict like the head, of {sorted(batch.head)}, got {found}.")
  leading = batch.features.shape[:-2]
  for key, array in batch.head.items():
    check_float(name, tree[key])
    if jnp.shape(tree[key]) not in (array.shape, (*leading, *array.shape)):
      raise ValueError(f"{name} must have the shapes of the head, {key} {array.shape}, got {jnp.shape(tree[key])}.")
  return {key: widened(as_array(name, tree[key])).astype(array.dtype) for key, array in batch.head.items()}


def _check_head(head, features: int) -> dict:
  """The dtypes of a head's arrays."""
  if not isinstance(head, Mapping) or not {"kernel"} <= set(head) <= {"kernel", "bias"}:
    found = sorted(head) if isinstance(head, Mapping) else type(head).__name__
    raise ValueError(f"head must be a dict of kernel and perhaps bias, got {found}.")
  for array in head.values():
    check_float("head", array)
  shapes = {name: jnp.shape(array) for name, array in head.items()}
  kernel = shapes["kernel"]
  if len(kernel) != 2 or kernel[0] != features or kernel[1] < 1 or shapes.get("bias", kernel[1:]) != kernel[1:]:
    raise ValueError(f"head must have kernel [{features}, classes] and bias [classes], got {shapes}.")
  return {name: dtype_of("head", head[name]) for name in sorted(head, reverse=True)}
