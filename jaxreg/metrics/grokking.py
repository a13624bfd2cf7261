"""Diagnostics of training past the point where everything is fitted: softmax collapse and naive loss minimisation."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxreg.checks import check_float, check_same_shape
from jaxreg.metrics.norms import safe_norm, scaled

__all__ = ["nlm_alignment", "nlm_direction", "softmax_collapse_fraction", "tensor_norms", "zero_loss_fraction"]


def softmax_collapse_fraction(logits: ArrayLike, *, dtype=None, axis: int = -1) -> jax.Array:
  """Fraction of examples whose softmax has collapsed: `sum_k exp(z_k - max z)` equals 1 in the loss's arithmetic.

  All classes but the largest are then absorbed by rounding. Where the largest is the label, loss and gradient of the
  label's logit are exactly zero. Logits, terms and sum are each rounded to `dtype`, however the compiler sums; with gap
  `g` between the two largest logits and `p` significant bits an example has collapsed for certain when
  `(classes - 1) exp(-g) < 2^-(p + 1)` and not when `exp(-g) > 2^-(p - 1)`; between the two it depends on the order of
  summation.

  >>> import jax.numpy as jnp
  >>> logits = jnp.array([[12.0, 0.0], [2.0, 0.0]])
  >>> float(softmax_collapse_fraction(logits, dtype=jnp.float16)), float(softmax_collapse_fraction(logits))
  (0.5, 0.0)

  Args:
    logits: floating `[..., classes]`.
    dtype: static; floating dtype of the loss, that of `logits` when None.
    axis: the axis of the classes.

  Returns:
    Scalar float32 in [0, 1], the mean over all examples; NaN where a logit is.

  Raises:
    ValueError: when `logits` or `dtype` is not floating, or `dtype` is float64 without `jax_enable_x64`.

  Reference: Prieto, Barsbey, Mediano, Birdal, "Grokking at the Edge of Numerical Stability", ICLR 2025, Definition 3;
    the test of the largest logit, label or not, is that of their code.
  """
  check_float("logits", logits)
  dtype = jnp.dtype(jnp.result_type(logits) if dtype is None else dtype)
  if not jnp.issubdtype(dtype, jnp.floating):
    raise ValueError(f"dtype must be floating point, got {dtype}.")
  if dtype == jnp.float64 and not jax.config.jax_enable_x64:
    raise ValueError("dtype must be at most float32 unless jax_enable_x64 is set, got float64.")
  info = jnp.finfo(dtype)
  wide = jnp.promote_types(dtype, jnp.float32)

  def rounded(value):
    # Not a cast there and back, which XLA is free to drop.
    return jax.lax.reduce_precision(value.astype(wide), exponent_bits=info.nexp, mantissa_bits=info.nmant)

  z = rounded(jnp.clip(jnp.asarray(logits, wide), info.min.astype(wide), info.max.astype(wide)))
  terms = rounded(jnp.exp(rounded(z - jnp.max(z, axis=axis, keepdims=True))))
  return _fraction(rounded(jnp.sum(terms, axis=axis)), 1)


def zero_loss_fraction(losses: ArrayLike) -> jax.Array:
  """Fraction of examples whose loss is exactly zero.

  >>> import jax.numpy as jnp
  >>> float(zero_loss_fraction(jnp.array([0.0, 0.5, 0.0, 1e-30])))
  0.5

  Args:
    losses: floating `[...]`, one value per example in the dtype in which the loss was computed.

  Returns:
    Scalar float32 in [0, 1]; NaN where a loss is.

  Raises:
    ValueError: when `losses` is not floating point.

  Reference: Prieto, Barsbey, Mediano, Birdal, "Grokking at the Edge of Numerical Stability", ICLR 2025, Section 3
    ("zero terms" of their code).
  """
  check_float("losses", losses)
  return _fraction(jnp.asarray(losses), 0)


def _fraction(values, wanted):
  """The fraction of values that are as wanted, float32; NaN where one is NaN, of a run that has diverged."""
  return jnp.mean(jnp.where(jnp.isnan(values), jnp.nan, values == wanted), dtype=jnp.float32)


def nlm_alignment(grads, params):
  """Cosine of the negative gradient and the weights, `-<g, w> / (||g|| ||w||)`, of every tensor.

  Near 1 the descent direction does little but scale the weights: naive loss minimisation. Defined as 0 where gradient
  or weights are zero; gradients too small to be squared in float32 are scaled first.

  >>> import jax.numpy as jnp
  >>> params = {"w": jnp.array([3.0, 4.0]), "b": jnp.zeros(1)}
  >>> cosines = nlm_alignment({"w": jnp.array([-3e-30, -4e-30]), "b": jnp.ones(1)}, params)
  >>> {name: round(float(cosine), 3) for name, cosine in cosines.items()}
  {'b': 0.0, 'w': 1.0}

  Args:
    grads: pytree of the loss's gradients.
    params: pytree of the weights, of the same structure and shapes.

  Returns:
    Pytree of scalars in [-1, 1], float32 (float64 for float64 tensors).

  Raises:
    ValueError: when a gradient's shape is not its weight's.

  Reference: Prieto, Barsbey, Mediano, Birdal, "Grokking at the Edge of Numerical Stability", ICLR 2025, Section 4.2.
  """

  def cosine(gradient, weight):
    check_same_shape(grads=gradient, params=weight)
    (gradient, _), (weight, _) = scaled(gradient), scaled(weight)
    lengths = jnp.sqrt(jnp.sum(gradient**2) * jnp.sum(weight**2))
    inner = jnp.sum(gradient * weight)
    zero = lengths == 0
    return jnp.where(zero, 0, jnp.clip(-inner / jnp.where(zero, 1, lengths), -1, 1))

  return jax.tree.map(cosine, grads, params)


def nlm_direction(params, *, last_layer: str | Sequence[str] | None = None):
  """The direction of naive loss minimisation: adding a multiple of it to the weights only scales the logits.

  For a positively homogeneous network, `f(c theta) = c^L f(theta)` (bias-free, ReLU), it is `theta` itself, and
  `f(theta + a theta) = (1 + a)^L f(theta)`. For any network that ends in a linear layer it is that layer's kernel and
  bias, zero elsewhere, and the factor is `1 + a`. The loss falls along it once every example is classified correctly.

  >>> import jax.numpy as jnp
  >>> params = {"Dense_0": {"kernel": jnp.ones((1, 2))}, "Dense_1": {"kernel": jnp.ones((2, 1))}}
  >>> direction = nlm_direction(params, last_layer="Dense_1")
  >>> direction["Dense_0"]["kernel"].tolist(), direction["Dense_1"]["kernel"].tolist()
  ([[0.0, 0.0]], [[1.0], [1.0]])

  Args:
    params: pytree of the weights.
    last_layer: static; key of the last linear layer, or the keys on the path to it; None for a homogeneous network.

  Returns:
    Pytree like `params`.

  Raises:
    ValueError: when `params` holds nothing at `last_layer`.

  Reference: Prieto, Barsbey, Mediano, Birdal, "Grokking at the Edge of Numerical Stability", ICLR 2025, Definition 5.
  """
  if last_layer is None:
    return params
  path = (last_layer,) if isinstance(last_layer, str) else tuple(last_layer)

  def inside(keys):
    return tuple(jax.tree_util.keystr((key,), simple=True) for key in keys[: len(path)]) == path

  if not any(inside(keys) for keys, _ in jax.tree.leaves_with_path(params)):
    raise ValueError(f"last_layer must name a layer of params, got {last_layer!r}.")
  return jax.tree.map_with_path(lambda keys, leaf: leaf if inside(keys) else jnp.zeros_like(leaf), params)


def tensor_norms(params):
  """Euclidean norm of every tensor.

  >>> import jax.numpy as jnp
  >>> {name: float(norm) for name, norm in tensor_norms({"w": jnp.array([[3.0], [4.0]])}).items()}
  {'w': 5.0}

  Args:
    params: pytree of floating arrays.

  Returns:
    Pytree of scalars, float32 (float64 for float64 tensors).

  Raises:
    ValueError: when a tensor is not floating point.

  Reference: Prieto, Barsbey, Mediano, Birdal, "Grokking at the Edge of Numerical Stability", ICLR 2025, Figure 4 (norms
    that grow throughout training).
  """

  def norm(tensor):
    check_float("params", tensor)
    return safe_norm(tensor)

  return jax.tree.map(norm, params)
