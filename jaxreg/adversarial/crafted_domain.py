"""Crafted domains: inputs moved by one step to where a network's loss, and its sharpness in the parameters, are larger.

All of them take `loss_fn(params, inputs) -> scalar`, the mean loss of a batch with its labels inside.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxreg.checks import as_array, check_float, check_hyperparameter
from jaxreg.metrics.norms import safe_norm, safe_sqrt

__all__ = ["craft_domain", "craft_style", "sharpness_aware_loss"]

NORM_AXES = ("batch", "example")
_STYLE_EPSILON = 1e-5


def sharpness_aware_loss(loss_fn: Callable[[Any], ArrayLike], params: Any, *, rho: ArrayLike = 0.05) -> jax.Array:
  """The loss plus its first-order rise within a radius, `L(params) + rho ||grad L(params)||`.

  >>> import jax.numpy as jnp
  >>> sharpness_aware_loss(lambda w: jnp.sum(w**2) / 2, jnp.array([3.0, 4.0]), rho=0.5).item()
  15.0

  Args:
    loss_fn: `params -> scalar`, floating.
    params: tree of floating arrays.
    rho: non-negative scalar, the radius in the parameters; may be traced.

  Returns:
    Scalar, float32 at least; its derivative, through second derivatives of the loss, counts the norm's as 0 where the
    gradient is 0.

  Raises:
    ValueError: when the loss is no floating scalar or `rho` is negative.

  Reference: Shin, Bae, Na, Kim, Moon, "Unknown Domain Inconsistency Minimization for Domain Generalization", ICLR 2024,
    the objective of the perturbed inputs (as in the official code).
  """
  check_hyperparameter("rho", rho, low=0, shape=())
  _check_loss(loss_fn, params)
  loss, gradient = jax.value_and_grad(loss_fn)(params)
  return loss + rho * tree_norm(gradient)


def craft_domain(
  loss_fn: Callable[[Any, jax.Array], ArrayLike],
  params: Any,
  inputs: ArrayLike,
  *,
  step_size: ArrayLike,
  rho: ArrayLike = 0.05,
  norm_axis: str = "batch",
  axis_name: str | None = None,
) -> jax.Array:
  """One normalised step up the sharpness-aware loss, `x + step_size G / ||G||` with `G = grad_x (L + rho ||grad L||)`.

  The norm is over the batch for every coordinate of the inputs by itself, as in the official code: coordinates move
  alike, examples with larger losses move more, by about `step_size sqrt(coordinates / batch)` each; the size of the
  batch belongs to the step size. With one example it is a sign step. Or the norm is over each example: every one moves
  by `step_size`. Inputs are not clipped.

  >>> import jax.numpy as jnp
  >>> loss_fn = lambda weights, x: jnp.mean(x @ weights)
  >>> weights, inputs = jnp.array([1.0, -2.0]), jnp.zeros((1, 2))
  >>> craft_domain(loss_fn, weights, inputs, step_size=0.5, rho=0.0).tolist()
  [[0.5, -0.5]]
  >>> craft_domain(loss_fn, weights, inputs, step_size=5**0.5, rho=0.0, norm_axis="example").round(3).tolist()
  [[1.0, -2.0]]

  Args:
    loss_fn: `(params, inputs) -> scalar`.
    params: tree of floating arrays.
    inputs: floating `[batch, ...]`.
    step_size: eta_x, non-negative scalar in units of the inputs; may be traced.
    rho: as in `sharpness_aware_loss`; the norm is over all parameters.
    norm_axis: `batch` or `example`; static.
    axis_name: the mapped axis over which the batch is split in equal parts, or None.

  Returns:
    `[batch, ...]`, constant under differentiation; what has no gradient stays where it is.

  Raises:
    ValueError: when the inputs are not floating point, the loss is no floating scalar, or a hyperparameter is out of
      range.

  Reference: Shin, Bae, Na, Kim, Moon, "Unknown Domain Inconsistency Minimization for Domain Generalization", ICLR 2024,
    the data perturbation (as in the official code, which leaves gradients with a norm below 1e-12 shorter).
  """
  inputs = check_crafting(loss_fn, params, inputs, step_size, rho, norm_axis)
  _, _, gradient = sharpness_gradients(loss_fn, params, inputs, rho, axis_name)
  return moved_inputs(inputs, gradient, step_size, norm_axis, axis_name)


def craft_style(
  loss_fn: Callable[[Any, jax.Array], ArrayLike],
  params: Any,
  inputs: ArrayLike,
  *,
  step_size: ArrayLike,
  rho: ArrayLike = 0.05,
  channel_axis: int = -1,
) -> jax.Array:
  """One ascent step on the sharpness-aware loss by the style of each image alone, its channels' means and deviations.

  With `x = deviation * x' + mean` over the positions of a channel, `mean + step_size dJ/dmean` and likewise the
  deviation, without normalising.

  >>> import jax.numpy as jnp
  >>> images = jnp.array([[[1.0], [3.0]]])  # one image, two positions, one channel
  >>> print(craft_style(lambda w, x: w * jnp.sum(x), jnp.array(1.0), images, step_size=0.5, rho=0.0).round(3).ravel())
  [2. 4.]

  Args:
    loss_fn: as in `craft_domain`. A mean over the batch makes each image's step smaller the larger the batch is.
    params: as in `craft_domain`.
    inputs: floating `[batch, ..., channels]`, with at least two positions.
    step_size: eta_x, non-negative scalar; may be traced.
    rho: as in `craft_domain`.
    channel_axis: static.

  Returns:
    As `inputs`, constant under differentiation.

  Raises:
    ValueError: as `craft_domain`, or when there are not two positions.

  Reference: Zhong, Zhao, Lee, Sebe, "Adversarial Style Augmentation for Domain Generalized Urban Scene Segmentation",
    NeurIPS 2022, as the variant of Shin, Bae, Na, Kim, Moon, "Unknown Domain Inconsistency Minimization for Domain
    Generalization", ICLR 2024. Their code computes the new style and does not put it back into the images; this does.
  """
  inputs = check_crafting(loss_fn, params, inputs, step_size, rho)
  if not -inputs.ndim <= channel_axis < inputs.ndim or channel_axis % inputs.ndim == 0:
    raise ValueError(f"channel_axis must be an axis of the inputs {inputs.shape} behind the first, got {channel_axis}.")
  axes = tuple(axis for axis in range(1, inputs.ndim) if axis != channel_axis % inputs.ndim)
  if inputs[0].size < 2 * inputs.shape[channel_axis]:
    raise ValueError(f"inputs must have at least two positions besides batch and channels, got shape {inputs.shape}.")
  wide = inputs.astype(jnp.promote_types(inputs.dtype, jnp.float32))
  mean = jnp.mean(wide, axes, keepdims=True)
  deviation = jnp.sqrt(jnp.var(wide, axes, keepdims=True, ddof=1) + _STYLE_EPSILON)
  plain = (wide - mean) / deviation
  styled = lambda style: style[0] + style[1] * plain
  in_style = lambda params, style: loss_fn(params, styled(style).astype(inputs.dtype))
  _, _, gradient = sharpness_gradients(in_style, params, (mean, deviation), rho, None)
  style = jax.tree.map(lambda value, slope: value + step_size * slope, (mean, deviation), gradient)
  return jax.lax.stop_gradient(styled(style).astype(inputs.dtype))


def check_crafting(loss_fn, params, inputs, step_size, rho, norm_axis="batch"):
  """The inputs as constants, after what all of the above refuse."""
  check_float("inputs", inputs)
  inputs = jax.lax.stop_gradient(as_array("inputs", inputs))
  if inputs.ndim < 1:
    raise ValueError("inputs must have a leading batch axis, got a scalar.")
  if norm_axis not in NORM_AXES:
    raise ValueError(f"norm_axis must be one of {', '.join(NORM_AXES)}, got {norm_axis!r}.")
  for name, value in {"step_size": step_size, "rho": rho}.items():
    check_hyperparameter(name, value, low=0, shape=())
  _check_loss(loss_fn, params, inputs)
  return inputs


def sharpness_gradients(loss_fn, params, inputs, rho, axis_name):
  """The loss, its gradient in the parameters, and in the inputs that of the sharpness-aware loss, by one linearization.

  On several devices each has the first two of the whole batch, and the last of its own part of it.
  """
  together = lambda tree: tree if axis_name is None else jax.lax.pmean(tree, axis_name)
  first, pullback = jax.vjp(lambda inputs: jax.value_and_grad(loss_fn)(params, inputs), inputs)
  loss, gradient = together(first)
  norm = tree_norm(gradient)
  # The norm's derivative is that along the unit gradient.
  divisor = jnp.where(norm == 0, 1, norm)
  along = jax.tree.map(lambda leaf: (rho * (leaf / divisor)).astype(leaf.dtype), gradient)
  one = jnp.ones_like(loss)
  if axis_name is not None:
    parts = jax.lax.psum(1, axis_name)
    one, along = one / parts, jax.tree.map(lambda leaf: leaf / parts, along)
  return loss, gradient, pullback((one, along))[0]


def moved_inputs(inputs, gradient, step_size, norm_axis, axis_name):
  """The step of `craft_domain` along a gradient."""
  axes = (0,) if norm_axis == "batch" else tuple(range(1, inputs.ndim))
  axis_name = axis_name if norm_axis == "batch" else None
  gradient = gradient.astype(jnp.promote_types(gradient.dtype, jnp.float32))
  size = jnp.max(jnp.abs(gradient), axis=axes, keepdims=True, initial=0)
  size = size if axis_name is None else jax.lax.pmax(size, axis_name)
  scaled = gradient / jnp.where(size == 0, 1, size)  # no square leaves the range
  squared = jnp.sum(jnp.square(scaled), axis=axes, keepdims=True)
  squared = squared if axis_name is None else jax.lax.psum(squared, axis_name)
  length = safe_sqrt(squared)
  step = jnp.asarray(step_size, scaled.dtype) * scaled / jnp.where(length == 0, 1, length)
  return jax.lax.stop_gradient((inputs + step).astype(inputs.dtype))


def tree_norm(tree) -> jax.Array:
  """The Euclidean norm of all entries of a tree, float32 at least, with gradient 0 at 0; 0 of an empty tree."""
  leaves = jax.tree.leaves(tree)
  return safe_norm(jnp.stack([safe_norm(leaf) for leaf in leaves])) if leaves else jnp.zeros(())


def _check_loss(loss_fn, *arguments):
  loss = jax.eval_shape(loss_fn, *arguments)
  if getattr(loss, "shape", None) != () or not jnp.issubdtype(loss.dtype, jnp.floating):
    raise ValueError(f"loss_fn must return a floating scalar, got {loss}.")
