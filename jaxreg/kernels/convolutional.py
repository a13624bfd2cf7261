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

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxreg.checks import check_float
from jaxreg.kernels.infinite_width import (
  KernelState,
  angle_complement,
  complement_of,
  dense,
  gap,
  position_variances,
  with_diagonal,
)
from jaxreg.metrics.norms import normalized_rows, safe_sqrt
from jaxreg.metrics.sizes import is_integer, static_integer

__all__ = [
  "average_pool",
  "convolution",
  "flatten",
  "global_average_pool",
  "image_patches",
  "image_state",
  "pixel_state",
]

# As Flax pads before a convolution without padding of its own.
_WRAPPED = {"CIRCULAR": "wrap", "REFLECT": "reflect"}


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

  def angles(first, second):
    many = jax.vmap(lambda x, y: angle_complement(x, y), (None, 0))  # [m, h w, i j]
    shape = first.shape[1:3] + second.shape[1:3]
    flat = second.reshape(len(second), -1, second.shape[-1])
    one = lambda x: many(x.reshape(-1, x.shape[-1]), flat).reshape((-1, *shape)).transpose(0, 1, 3, 2, 4)
    return jax.lax.map(one, first)

  return _state(images1, images2, between, "nhwc,nijc->nhiwj", angles)


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
  angles = jax.vmap(jax.vmap(angle_complement, (1, 1), 2), (1, 1), 2)
  return _state(images1, images2, between, "nhwc,nhwc->nhw", angles)


def _state(images1, images2, between, within, angles):
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
  first = normalized_rows(first)
  complement = angles(first, first if same else normalized_rows(second))
  if same:
    covariance = with_diagonal(covariance, variance1)
  return KernelState(covariance, variance1, variance2, jnp.zeros_like(covariance), complement)


def image_patches(
  images: ArrayLike, *, size: int, stride: int = 1, padding: str | int | Sequence = "SAME"
) -> jax.Array:
  """The windows that a convolution sees, as channels: a first convolution is a dense layer on them.

  `dense(image_state(image_patches(x, size=3)))` equals `convolution(image_state(x), size=3)`, but window sums are
  taken by a matrix product, and with a stride only those that are needed.

  >>> import jax.numpy as jnp
  >>> image_patches(jnp.ones((1, 4, 4, 2)), size=3, stride=2).shape
  (1, 2, 2, 18)

  Args:
    images: floating `[inputs, height, width, channels]`.
    size: static; height and width of the window.
    stride: static; step between windows.
    padding: static; as in `convolution`.

  Returns:
    `[inputs, height', width', size^2 channels]`, of the size that the convolution gives.

  Raises:
    ValueError: when an argument is out of range.

  Reference: Arora, Du, Hu, Li, Salakhutdinov, Wang, "On Exact Computation with an Infinitely Wide Neural Net", NeurIPS
    2019, Section 4.
  """
  check_float("images", images)
  if jnp.ndim(images) != 4:
    raise ValueError(f"images must be [inputs, height, width, channels], got shape {jnp.shape(images)}.")
  size, stride, pads, mode = _window(size, stride, padding, images.shape[1:3])
  padded = jnp.pad(images, ((0, 0), *pads, (0, 0)), mode=mode)
  shape = [_length(n, size, stride, pad) for n, pad in zip(images.shape[1:3], pads, strict=True)]
  rows = [_take(padded, (1,), shift, stride, shape[0]) for shift in range(size)]
  return jnp.concatenate([_take(row, (2,), shift, stride, shape[1]) for row in rows for shift in range(size)], -1)


def _length(count, size, stride, pad):
  """The number of windows along an axis."""
  return (count + sum(pad) - size) // stride + 1


def _window(size, stride, padding, shape):
  """(size, stride, [(low, high) of height and width], mode of `jnp.pad`) as `flax.linen.Conv` pads."""
  size, stride = static_integer("size", size, low=1), static_integer("stride", stride, low=1)
  if padding in ("SAME", "VALID"):
    pads, mode = jax.lax.padtype_to_pads(shape, (size, size), (stride, stride), padding), "constant"
  elif isinstance(padding, str) and padding in _WRAPPED:
    pads, mode = [((size - 1) // 2, size // 2)] * 2, _WRAPPED[padding]
  else:
    pads, mode = _explicit_padding(padding), "constant"
  if min(count + sum(pad) for count, pad in zip(shape, pads, strict=True)) < size:
    raise ValueError(f"size must be at most that of the padded images, got {size} for {tuple(shape)} padded by {pads}.")
  return size, stride, [tuple(map(int, pad)) for pad in pads], mode


def _explicit_padding(padding):
  pairs = [padding] * 2 if is_integer(padding) else padding
  try:
    pairs = [(pair, pair) if is_integer(pair) else tuple(pair) for pair in pairs]
    if len(pairs) == 2 and all(len(pair) == 2 and is_integer(n) and n >= 0 for pair in pairs for n in pair):
      return pairs
  except TypeError:
    pass
  raise ValueError(
    "padding must be 'SAME', 'VALID', 'CIRCULAR', 'REFLECT', a number of zeros, or two numbers or (low, high) pairs for"
    f" height and width, as in flax.linen.Conv, got {padding!r}."
  )


def convolution(
  state: KernelState,
  *,
  size: int,
  stride: int = 1,
  padding: str | int | Sequence = "SAME",
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
    size: static; height and width of the window.
    stride: static; step between windows.
    padding: static; as `flax.linen.Conv` names it and pads: `"SAME"` or `"VALID"` (zeros, on even sizes with stride 2
      all of them below and right), `"CIRCULAR"`, `"REFLECT"`, a number of zeros on each side, or (low, high) numbers of
      zeros for height and width.
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
  shape = [state.covariance.shape[group[0]] for group in _spatial(state.covariance)]
  size, stride, pads, mode = _window(size, stride, padding, shape)
  whole = lambda x: _window_mean(x, size, stride, pads, mode)
  if state.covariance.ndim < 6:
    means = _window_moments(state, size, stride, pads, mode)
  else:
    # A loop keeps XLA from computing an activation before the window once for each of the window's positions.
    variance1, variance2 = state.variance1[:, None], state.variance2
    state = state._replace(complement=complement_of(state))
    of = lambda row: [
      x[0]
      for x in _window_moments(
        KernelState(row[0][None], row[1], variance2, row[2][None], row[3][None]), size, stride, pads, mode
      )
    ]
    means = jax.lax.map(of, (state.covariance, variance1, state.ntk, state.complement))
  covariance, ntk, complement = means
  averaged = KernelState(covariance, whole(state.variance1), whole(state.variance2), ntk, complement)
  return dense(averaged, weight_variance=weight_variance, bias_variance=bias_variance)


def _check_images(state, kind):
  allowed = (6,) if kind == "full" else (4, 6)
  if state.covariance.ndim not in allowed:
    text = "of image_state" if kind == "full" else "of images"
    raise ValueError(f"state must be {text}, got covariances of shape {state.covariance.shape}.")


def _spatial(x):
  """Groups of axes that shift together, height and width, of any array of a state: one position or a pair."""
  return ((-2,), (-1,)) if x.ndim < 5 else ((-4, -3), (-2, -1))


def _window_mean(x, size, stride, pads, mode):
  """The mean over windows, along height and then along width: a window's mean separates."""
  for axes, pad in zip(_spatial(x), pads, strict=True):
    x = sum(_shifts(x, axes, size, stride, pad, mode)) / size
  return x


def _shifts(x, axes, size, stride, pad, mode):
  """What each place of the window sees, its positions along some axes."""
  pads = [(0, 0)] * x.ndim
  for axis in axes:
    pads[axis] = pad
  length = _length(x.shape[axes[0]], size, stride, pad)
  padded = jnp.pad(x, pads, mode=mode)
  return [_take(padded, axes, shift, stride, length) for shift in range(size)]


def _window_moments(state, size, stride, pads, mode):
  """Covariance, tangent kernel and complement averaged over windows."""
  covariance, ntk, complement = state.covariance, state.ntk, complement_of(state)
  first, second = map(safe_sqrt, position_variances(state))
  for axes, pad in zip(_spatial(covariance), pads, strict=True):
    shifts = lambda x, axes, pad=pad: _shifts(x, axes, size, stride, pad, mode)
    both = (shifts(x, axes) for x in (covariance, complement))
    places = list(zip(*both, shifts(first, axes[:1]), shifts(second, axes[-1:]), strict=True))
    mean = lambda f, places=places: sum(f(*place) for place in places) / size
    ntk = sum(shifts(ntk, axes)) / size
    covariance, complement, first, second = _averaged(mean)
  return covariance, ntk, complement


def _averaged(mean):
  """Moments of a mean over places with weights of their own, which are independent between them.

  Args:
    mean: of a function of a place's (covariance, complement, deviation on the first set, deviation on the second).

  Returns:
    The mean's (covariance, complement, two deviations).
  """
  covariance = mean(lambda c, u, a, b: c)
  first, second = (safe_sqrt(mean(lambda *place, i=i: jnp.square(place[i]))) for i in (2, 3))
  negative = covariance < 0
  apart = mean(lambda c, u, a, b: a * b * gap(u, c, negative))
  zero = (first == 0) | (second == 0)
  ratio = jnp.sqrt(jnp.where(zero, 1, second) / jnp.where(zero, 1, first))
  # first * second - mean(a b), a difference of what is nearly equal for close inputs
  unlike = mean(lambda c, u, a, b: jnp.square(a * ratio - b / ratio)) / 2
  complement = jnp.where(zero, 1, (unlike + apart) / jnp.where(zero, 1, first * second))
  return covariance, complement, first, second


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

  return KernelState(*map(pool, state[:4]))


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
  return KernelState(*(x.mean((-4, -3, -2, -1)) for x in state[:4]))


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
  complement = complement_of(state)
  first, second = map(safe_sqrt, (_equal_positions(state.variance1)[:, None], _equal_positions(state.variance2)[None]))
  places = _equal_positions(state.covariance), _equal_positions(complement), first, second
  moments = _averaged(lambda f: f(*places).mean((-2, -1), keepdims=True))
  others = (_equal_positions(x).mean((-2, -1)) for x in (state.variance1, state.variance2, state.ntk))
  return KernelState(moments[0][..., 0, 0], *others, moments[1][..., 0, 0])


def _equal_positions(x):
  return x if x.ndim < 5 else jnp.einsum("...hhww->...hw", x)
