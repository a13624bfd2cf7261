"""Convolutional networks of infinitely many channels as maps between kernels.

A state of images holds covariances between positions. Those of all pairs of positions, `[inputs1, inputs2, height,
height', width, width']`, are needed when positions are averaged later (`average_pool`, `global_average_pool`); for
networks that end in `flatten` those of equal positions, `[inputs1, inputs2, height, width]`, suffice.

>>> import jax.numpy as jnp
>>> from jaxreg.kernels.dual_activations import relu_dual
>>> from jaxreg.kernels.infinite_width import activate, dense
>>> state = convolution(image_state(jnp.ones((2, 4, 4, 1))), size=3)
>>> dense(global_average_pool(activate(state, relu_dual()))).ntk.shape
(2, 2)
"""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxreg.checks import check_float, check_hyperparameter
from jaxreg.kernels.infinite_width import KernelState, with_diagonal
from jaxreg.metrics.sizes import static_integer

__all__ = [
  "average_pool",
  "convolution",
  "flatten",
  "global_average_pool",
  "image_patches",
  "image_state",
  "pixel_state",
]

PADDINGS = {"zero": "constant", "circular": "wrap"}


def image_state(images1: ArrayLike, images2: ArrayLike | None = None) -> KernelState:
  """The state of images with covariances of all pairs of positions, `x_p . x'_q / channels`.

  >>> import jax.numpy as jnp
  >>> image_state(jnp.ones((2, 3, 3, 1))).covariance.shape
  (2, 2, 3, 3, 3, 3)

  Args:
    images1: floating `[inputs1, height, width, channels]`.
    images2: floating `[inputs2, height, width, channels]`, or None for `images1` with itself.

  Returns:
    State with covariances `[inputs1, inputs2, height, height', width, width']`, float32 at least.

  Raises:
    ValueError: when the images do not fit.

  Reference: Novak et al., "Bayesian Deep Convolutional Networks with Many Channels are Gaussian Processes", ICLR 2019,
    Section 2.2.
  """

  def between(first, second):
    # A loop stores the products in their order; a transposition fused into what follows would slow that down.
    return jax.lax.map(lambda x: jnp.einsum("hwc,mijc->mhiwj", x, second, precision="highest"), first)

  return _state(images1, images2, between, "nhwc,nijc->nhiwj")


def pixel_state(images1: ArrayLike, images2: ArrayLike | None = None) -> KernelState:
  """The state of images with covariances of equal positions only, `x_p . x'_p / channels`.

  >>> import jax.numpy as jnp
  >>> pixel_state(jnp.ones((2, 3, 3, 1))).covariance.shape
  (2, 2, 3, 3)

  Args:
    images1: floating `[inputs1, height, width, channels]`.
    images2: floating `[inputs2, height, width, channels]`, or None for `images1` with itself.

  Returns:
    State with covariances `[inputs1, inputs2, height, width]`, float32 at least.

  Raises:
    ValueError: when the images do not fit.

  Reference: Novak et al., "Bayesian Deep Convolutional Networks with Many Channels are Gaussian Processes", ICLR 2019,
    Section 3.1 (vectorization).
  """
  between = lambda first, second: jnp.einsum("nhwc,mhwc->nmhw", first, second, precision="highest")
  return _state(images1, images2, between, "nhwc,nhwc->nhw")


def _state(images1, images2, between, within):
  check_float("images1", images1)
  if jnp.ndim(images1) != 4:
    raise ValueError(f"images1 must be [inputs, height, width, channels], got shape {jnp.shape(images1)}.")
  same = images2 is None
  images2 = images1 if same else images2
  check_float("images2", images2)
  if jnp.shape(images2)[1:] != jnp.shape(images1)[1:]:
    raise ValueError(
      f"images2 must be images like images1, [inputs, {', '.join(map(str, images1.shape[1:]))}],"
      f" got shape {jnp.shape(images2)}."
    )
  dtype = jnp.promote_types(jnp.result_type(images1, images2), jnp.float32)
  first, second = images1.astype(dtype), images2.astype(dtype)
  first, second = (x / jnp.sqrt(x.shape[-1]).astype(dtype) for x in (first, second))
  variance1, variance2 = (jnp.einsum(within, x, x, precision="highest") for x in (first, second))
  covariance = between(first, second)
  if same:
    covariance = with_diagonal(covariance, variance1)
  return KernelState(covariance, variance1, variance2, jnp.zeros_like(covariance))


def image_patches(images: ArrayLike, *, size: int, stride: int = 1, padding: str = "zero") -> jax.Array:
  """The windows that a convolution sees, as channels: a first convolution is a dense layer on them.

  `dense(image_state(image_patches(x, size=3)))` equals `convolution(image_state(x), size=3)`, but window sums are
  taken by a matrix product, and with a stride only those that are needed.

  >>> import jax.numpy as jnp
  >>> image_patches(jnp.ones((1, 4, 4, 2)), size=3, stride=2).shape
  (1, 2, 2, 18)

  Args:
    images: floating `[inputs, height, width, channels]`.
    size: static; odd height and width of the window.
    stride: static; step between windows.
    padding: static; `"zero"` or `"circular"`.

  Returns:
    `[inputs, height / stride, width / stride, size^2 channels]`, rounded up.

  Raises:
    ValueError: when an argument is out of range.

  Reference: Arora, Du, Hu, Li, Salakhutdinov, Wang, "On Exact Computation with an Infinitely Wide Neural Net", NeurIPS
    2019, Section 4.
  """
  check_float("images", images)
  if jnp.ndim(images) != 4:
    raise ValueError(f"images must be [inputs, height, width, channels], got shape {jnp.shape(images)}.")
  _check_window(size, stride, padding)
  half = (size // 2, size // 2)
  padded = jnp.pad(images, ((0, 0), half, half, (0, 0)), mode=PADDINGS[padding])
  shape = [-(-n // stride) for n in images.shape[1:3]]
  rows = [_take(padded, (1,), shift, stride, shape[0]) for shift in range(size)]
  return jnp.concatenate([_take(row, (2,), shift, stride, shape[1]) for row in rows for shift in range(size)], -1)


def _check_window(size, stride, padding):
  if static_integer("size", size, low=1) % 2 == 0:
    raise ValueError(f"size must be a positive odd integer, got {size!r}.")
  static_integer("stride", stride, low=1)
  if padding not in PADDINGS:
    raise ValueError(f"padding must be one of {', '.join(PADDINGS)}, got {padding!r}.")


def convolution(
  state: KernelState,
  *,
  size: int,
  stride: int = 1,
  padding: str = "zero",
  weight_variance: ArrayLike = 1.0,
  bias_variance: ArrayLike = 0.0,
) -> KernelState:
  """A convolution in NTK parameterization, with weights of variance `weight_variance / (size^2 channels)`.

  Covariances are averaged over the window, both positions shifted alike:
  `K'(p, q) = weight_variance / size^2 sum_d K(s p + d, s q + d) + bias_variance`, and `T' = K' + weight_variance A(T)`
  with the same average A.

  >>> import jax.numpy as jnp
  >>> state = convolution(pixel_state(jnp.ones((1, 4, 4, 2))), size=3)
  >>> (9 * state.covariance[0, 0, :2, :2]).round().tolist()  # at a corner five of nine pixels are missing
  [[4.0, 6.0], [6.0, 9.0]]

  Args:
    state: of images.
    size: static; odd height and width of the window.
    stride: static; step between windows.
    padding: static; `"zero"` or `"circular"`; with stride 1 either keeps the size, else it is divided, rounding up.
    weight_variance: non-negative scalar; may be traced.
    bias_variance: non-negative scalar; may be traced.

  Returns:
    The state of its outputs.

  Raises:
    ValueError: when an argument is out of range or the state is not of images.

  Reference: Arora, Du, Hu, Li, Salakhutdinov, Wang, "On Exact Computation with an Infinitely Wide Neural Net", NeurIPS
    2019, Section 4.
  """
  _check_images(state, "any")
  check_hyperparameter("weight_variance", weight_variance, low=0)
  check_hyperparameter("bias_variance", bias_variance, low=0)
  _check_window(size, stride, padding)
  mean = lambda x: _window_mean(x, size, stride, PADDINGS[padding])
  # A loop keeps XLA from computing an activation before the window once for each of the window's positions.
  average = lambda x: jax.lax.map(mean, x) if x.ndim == 6 else mean(x)
  covariance, variance1, variance2 = (weight_variance * average(x) + bias_variance for x in state[:3])
  return KernelState(covariance, variance1, variance2, covariance + weight_variance * average(state.ntk))


def _check_images(state, kind):
  allowed = (6,) if kind == "full" else (4, 6)
  if state.covariance.ndim not in allowed:
    text = "of image_state" if kind == "full" else "of images"
    raise ValueError(f"state must be {text}, got covariances of shape {state.covariance.shape}.")


def _spatial(x):
  """Groups of axes that shift together, height and width, of any array of a state: one position or a pair."""
  return ((-2,), (-1,)) if x.ndim < 5 else ((-4, -3), (-2, -1))


def _window_mean(x, size, stride, mode):
  """The mean over windows, along height and then along width: a window's mean separates."""
  for axes in _spatial(x):
    pad = [(0, 0)] * x.ndim
    for axis in axes:
      pad[axis] = (size // 2, size // 2)
    length = -(-x.shape[axes[0]] // stride)
    padded = jnp.pad(x, pad, mode=mode)
    x = sum(_take(padded, axes, shift, stride, length) for shift in range(size)) / size
  return x


def _take(x, axes, start, stride, length):
  for axis in axes:
    x = jax.lax.slice_in_dim(x, start, start + (length - 1) * stride + 1, stride, axis % x.ndim)
  return x


def average_pool(state: KernelState, *, size: int) -> KernelState:
  """Averages over disjoint windows: both positions of a covariance are averaged, each over its own window.

  >>> import jax.numpy as jnp
  >>> average_pool(image_state(jnp.ones((1, 4, 4, 1))), size=2).covariance.shape
  (1, 1, 2, 2, 2, 2)

  Args:
    state: of `image_state`, with covariances of all pairs of positions.
    size: static; height and width of a window, a divisor of the images'.

  Returns:
    The state of its outputs.

  Raises:
    ValueError: when the state has no covariances of all pairs or `size` is no divisor.

  Reference: Novak et al., "Bayesian Deep Convolutional Networks with Many Channels are Gaussian Processes", ICLR 2019,
    Section 3.2 (projection).
  """
  _check_images(state, "full")
  height, width = state.covariance.shape[2], state.covariance.shape[4]
  size = static_integer("size", size, low=1)
  if height % size or width % size:
    raise ValueError(f"size must be a positive divisor of height {height} and width {width}, got {size!r}.")

  def pool(x):
    lead, (h, _, w, _) = x.shape[:-4], x.shape[-4:]
    split = x.reshape(lead + tuple(part for n in (h, h, w, w) for part in (n // size, size)))
    return split.mean((-7, -5, -3, -1))

  return KernelState(*map(pool, state))


def global_average_pool(state: KernelState) -> KernelState:
  """The mean over all positions: covariances are averaged over all pairs.

  >>> import jax.numpy as jnp
  >>> global_average_pool(image_state(jnp.ones((2, 4, 4, 1)))).covariance.tolist()
  [[1.0, 1.0], [1.0, 1.0]]

  Args:
    state: of `image_state`, with covariances of all pairs of positions.

  Returns:
    State of shape `[inputs1, inputs2]`.

  Raises:
    ValueError: when the state has no covariances of all pairs.

  Reference: Novak et al., "Bayesian Deep Convolutional Networks with Many Channels are Gaussian Processes", ICLR 2019,
    Section 3.2.1.
  """
  _check_images(state, "full")
  return KernelState(*(x.mean((-4, -3, -2, -1)) for x in state))


def flatten(state: KernelState) -> KernelState:
  """All positions and channels as one vector: covariances of equal positions are averaged.

  >>> import jax.numpy as jnp
  >>> flatten(pixel_state(jnp.ones((1, 4, 4, 1)))).covariance.tolist()
  [[1.0]]

  Args:
    state: of images.

  Returns:
    State of shape `[inputs1, inputs2]`.

  Raises:
    ValueError: when the state is not of images.

  Reference: Novak et al., "Bayesian Deep Convolutional Networks with Many Channels are Gaussian Processes", ICLR 2019,
    Section 3.1.
  """
  _check_images(state, "any")
  return KernelState(*(_mean_of_equal(x) for x in state))


def _mean_of_equal(x):
  positions = x if x.ndim < 5 else jnp.einsum("...hhww->...hw", x)
  return positions.mean((-2, -1))
