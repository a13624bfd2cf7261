"""Kernels of convolutional networks: against wide networks, the definition, and each other."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from jaxreg.kernels import convolutional as conv
from jaxreg.kernels import dual_activations as duals
from jaxreg.kernels import empirical
from jaxreg.kernels import infinite_width as iw
from tests.conformance import row

RELU = duals.relu_dual()


@pytest.fixture
def images():
  rng = np.random.default_rng(0)
  return (jnp.asarray(rng.normal(size=(n, 5, 4, 2)), jnp.float32) for n in (3, 2))


def network(pool, stride, circular, params, x):
  """Two convolutions, ReLU after each, and a linear output, in NTK parameterization with bias variance 0.3."""
  for index, (w, b) in enumerate(params[:-1]):
    half = w.shape[0] // 2
    x = jnp.pad(x, ((0, 0), (half, half), (half, half), (0, 0)), mode="wrap" if circular else "constant")
    x = (
      jax.lax.conv_general_dilated(
        x, w, (stride if index == 0 else 1,) * 2, "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
      )
      / np.sqrt(np.prod(w.shape[:3]) / 1.7)
      + jnp.sqrt(0.3) * b
    )
    x = jax.nn.relu(x)
  x = x.mean((1, 2)) if pool else x.reshape(len(x), -1)
  return (x @ params[-1] / np.sqrt(x.shape[1]))[:, 0]


def params_of(key, pool, positions, channels=64):
  keys = jax.random.split(key, 5)
  layers = [
    (jax.random.normal(keys[2 * i], (3, 3, n, channels)), jax.random.normal(keys[2 * i + 1], (channels,)))
    for i, n in enumerate((2, channels))
  ]
  return [*layers, jax.random.normal(keys[4], ((1 if pool else positions) * channels, 1))]


@pytest.mark.parametrize("pool, stride, padding", [(False, 2, 1), (True, 2, "CIRCULAR")])
def test_mean_kernel_of_wide_networks(images, pool, stride, padding):
  first, second = images
  layer = functools.partial(conv.convolution, size=3, padding=padding, weight_variance=1.7, bias_variance=0.3)

  @jax.jit
  def kernels(first, second):
    state = (conv.image_state if pool else conv.pixel_state)(first, second)
    state = iw.activate(layer(iw.activate(layer(state, stride=stride), RELU)), RELU)
    return iw.dense((conv.global_average_pool if pool else conv.flatten)(state))

  state = kernels(first, second)

  def kernel(key):
    params = params_of(key, pool, positions=6 if stride == 2 else 20)
    apply = functools.partial(network, pool, stride, padding == "CIRCULAR")
    return empirical.ntk_by_vector_products(apply, params, first, second)

  mean = jax.jit(lambda keys: jax.lax.map(kernel, keys).mean(0))(jax.random.split(jax.random.key(0), 48))
  # A network's kernel varies by a fifth, mostly a factor common to all inputs, so that ratios are closer.
  np.testing.assert_allclose(mean, state.ntk, atol=0.12 * float(state.ntk.max()))
  np.testing.assert_allclose(mean / mean.mean(), state.ntk / state.ntk.mean(), atol=0.04)


def test_windows_by_definition(x64, images):
  images = next(images).astype(jnp.float64)
  state = conv.image_state(images)
  covariance = np.asarray(state.covariance)
  for mode, padding in (("constant", 1), ("wrap", "CIRCULAR")):
    got = conv.convolution(state, size=3, stride=2, padding=padding, weight_variance=2.0, bias_variance=0.1)
    padded = np.pad(covariance, ((0, 0), (0, 0), (1, 1), (1, 1), (1, 1), (1, 1)), mode=mode)
    total = sum(
      padded[:, :, i : i + 5 : 2, i : i + 5 : 2, j : j + 4 : 2, j : j + 4 : 2] for i in range(3) for j in range(3)
    )
    np.testing.assert_allclose(got.covariance, 2 * total / 9 + 0.1, rtol=1e-12)
    np.testing.assert_allclose(got.ntk, got.covariance, rtol=1e-12)


PADDINGS = ("SAME", "VALID", "CIRCULAR", "REFLECT", 1, 0, (1, 0), ((2, 0), (0, 1)))


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("size, stride", [(3, 2), (3, 1), (2, 2), (4, 3)])
def test_covariances_are_those_of_wide_flax_convolutions(padding, size, stride):
  """Even images: `SAME` with stride 2 pads below and right only."""
  images = jnp.asarray(np.random.default_rng(2).normal(size=(2, 6, 4, 2)), jnp.float32)
  layer = nn.Conv(20_000, (size, size), strides=stride, padding=padding, kernel_init=nn.initializers.normal(1.0))
  params = layer.init(jax.random.key(0), images)
  outputs = layer.apply(params, images) / np.sqrt(size**2 * 2)
  options = {"size": size, "stride": stride, "padding": padding}
  state = conv.convolution(conv.pixel_state(images), **options)
  expected = jnp.einsum("nhwc,mhwc->nmhw", outputs, outputs) / outputs.shape[-1]
  scale = np.sqrt(state.variance1[:, None] * state.variance2)
  # Twenty thousand channels give correlations to a hundredth; a wrong window is off by a tenth or more.
  np.testing.assert_allclose(state.covariance, expected, atol=0.04 * scale.max())
  full = conv.convolution(conv.image_state(images), **options)
  np.testing.assert_allclose(jnp.einsum("nmhhww->nmhw", full.covariance), state.covariance, rtol=1e-5, atol=1e-6)
  patches = conv.image_patches(images, **options)
  np.testing.assert_allclose(
    jnp.einsum("nhwc,mhwc->nmhw", patches, patches) / (size**2 * 2), state.covariance, atol=1e-5
  )


def test_stride_two_with_same_padding_in_depth():
  """Two strided convolutions and ReLU: the variance of 4,000 channels, 0.365 in the report that found (1, 1) padded."""
  images = jnp.asarray(np.random.default_rng(3).normal(size=(1, 8, 8, 3)), jnp.float32)
  state = conv.pixel_state(images)
  for _ in range(2):
    state = iw.activate(conv.convolution(state, size=3, stride=2, weight_variance=2.0), RELU)

  def network(key):
    x = images
    for index in range(2):
      layer = nn.Conv(512, (3, 3), strides=2, use_bias=False, kernel_init=nn.initializers.he_normal())
      x = nn.relu(layer.apply(layer.init(jax.random.fold_in(key, index), x), x))
    return jnp.square(x).mean(-1)

  squares = jax.lax.map(network, jax.random.split(jax.random.key(1), 16)).mean(0)
  np.testing.assert_allclose(state.variance1, squares, rtol=0.08)


@pytest.mark.parametrize("kind", ["image", "pixel"])
def test_close_images_in_float32(kind):
  """Tangent kernels of images that differ by a thousandth, of which some are multiples of others."""
  rng = np.random.default_rng(0)
  images = rng.normal(size=(1, 6, 6, 2)) + 1e-3 * rng.normal(size=(6, 6, 6, 2))
  images = np.concatenate([images, images[:2] * 1.5, -images[:2]]).astype(np.float32)

  @jax.jit
  def kernel(x):
    state = (conv.image_state if kind == "image" else conv.pixel_state)(x)
    for stride in (1, 2):
      state = iw.activate(conv.convolution(state, size=3, stride=stride, weight_variance=2.0, bias_variance=0.01), RELU)
    return iw.dense((conv.global_average_pool if kind == "image" else conv.flatten)(state))

  got = kernel(jnp.asarray(images))
  with jax.enable_x64(True):
    exact = jax.tree.map(np.asarray, kernel(images.astype(np.float64)))
  np.testing.assert_allclose(got.ntk, exact.ntk, rtol=2e-6)
  if kind == "pixel":
    np.testing.assert_allclose(np.sqrt(got.complement), np.sqrt(exact.complement), rtol=1e-6, atol=5e-7)


def test_complement_of_windows_by_definition(x64, images):
  first = next(images).astype(jnp.float64)
  first = jnp.concatenate([first, 1.01 * first[:1], -first[:1]])
  for state in (conv.image_state(first), conv.pixel_state(first)):
    for padding in PADDINGS:
      out = conv.convolution(state, size=3, stride=2, padding=padding, bias_variance=0.1, weight_variance=1.3)
      for state_ in (out, conv.flatten(out), iw.activate(out, duals.erf_dual())):
        a, b = iw.position_variances(state_)
        np.testing.assert_allclose(state_.complement, 1 - np.abs(state_.covariance) / np.sqrt(a * b), atol=1e-12)


def test_both_forms_agree_and_diagonals_are_exact(images):
  first, second = images

  def run(state):
    state = conv.convolution(state, size=3, stride=2, bias_variance=0.2)
    state = iw.activate(iw.layer_norm(state), duals.gelu_dual())
    branch = lambda s: conv.convolution(iw.activate(s, RELU), size=3, padding="CIRCULAR", weight_variance=2.0)
    return conv.flatten(iw.residual(conv.convolution(state, size=1), branch))

  pair = (jnp.concatenate([first, second]),)
  full, pixels = (jax.jit(lambda *p, of=of: run(of(*p)))(*pair) for of in (conv.image_state, conv.pixel_state))
  for a, b in zip(full, pixels, strict=True):
    np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6)
  np.testing.assert_allclose(np.diagonal(full.covariance), full.variance1, rtol=1e-5)


def test_pooling_by_definition(images):
  first, second = (x[:, :4] for x in images)
  state = conv.image_state(first, second)
  pooled = conv.average_pool(state, size=2)
  by_hand = conv.image_state(*(x.reshape(len(x), 2, 2, 2, 2, 2).mean((2, 4)) for x in (first, second)))
  for got, expected in zip(pooled[:4], by_hand[:4], strict=True):
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)
  whole = conv.global_average_pool(pooled)
  np.testing.assert_allclose(whole.covariance, first.mean((1, 2)) @ second.mean((1, 2)).T / 2, rtol=1e-4, atol=1e-6)
  np.testing.assert_allclose(whole.variance1, jnp.square(first.mean((1, 2))).mean(-1), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("padding, stride", [("SAME", 2), ("CIRCULAR", 1), ("VALID", 2), (((1, 0), (0, 2)), 2)])
def test_first_convolution_is_dense_on_patches(images, padding, stride):
  options = {"weight_variance": 1.7, "bias_variance": 0.3}
  first, second = images

  @jax.jit
  def both(first, second):
    patches = [conv.image_patches(x, size=3, stride=stride, padding=padding) for x in (first, second)]
    whole = conv.convolution(conv.image_state(first, second), size=3, stride=stride, padding=padding, **options)
    return iw.dense(conv.image_state(*patches), **options), whole

  for a, b in zip(*both(first, second), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_gradients_are_finite_at_equal_images(images):
  first = next(images)

  @jax.jit
  @jax.grad
  def gradient(x):
    state = iw.activate(conv.convolution(conv.image_state(jnp.concatenate([x, x[:1], 0 * x[:1]])), size=3), RELU)
    return jnp.sum(iw.dense(conv.global_average_pool(state)).ntk)

  assert jnp.isfinite(gradient(first)).all()


def test_bad_input(images):
  first, second = images
  state, vectors = conv.pixel_state(first), iw.input_state(jnp.ones((2, 3)))
  for message, call in (
    ("images1 must be", lambda: conv.image_state(first[0])),
    ("images2 must be", lambda: conv.image_state(first, second[:, :2])),
    ("size must be a positive integer", lambda: conv.convolution(state, size=0)),
    ("size must be at most", lambda: conv.convolution(state, size=5, padding="VALID")),
    ("images must be", lambda: conv.image_patches(first[0], size=3)),
    ("padding must be", lambda: conv.image_patches(first, size=3, padding="zero")),
    ("stride must be", lambda: conv.convolution(state, size=3, stride=0)),
    ("padding must be", lambda: conv.convolution(state, size=3, padding="same")),
    ("padding must be", lambda: conv.convolution(state, size=3, padding=None)),
    ("padding must be", lambda: conv.convolution(state, size=3, padding=(1, 1, 1))),
    ("padding must be", lambda: conv.convolution(state, size=3, padding=((1, -1), (0, 0)))),
    ("weight_variance must lie", lambda: conv.convolution(state, size=3, weight_variance=-1.0)),
    ("state must be of images", lambda: conv.convolution(vectors, size=3)),
    ("state must be of image_state", lambda: conv.global_average_pool(state)),
    ("state must be of image_state", lambda: conv.average_pool(state, size=2)),
    ("size must be a positive divisor", lambda: conv.average_pool(conv.image_state(first), size=3)),
    ("state must be of images", lambda: conv.flatten(vectors)),
  ):
    with pytest.raises(ValueError, match=message):
      call()


def _images(rng):
  return (rng.normal(size=(2, 4, 4, 1)),)


_BAD_IMAGES = (("images", lambda images: (images[0],)), ("images", lambda images: (images.astype(np.int32),)))


ROWS = [
  row(conv.image_patches, _images, bad=_BAD_IMAGES, options=dict(size=3)),
  row(conv.image_state, _images, bad=_BAD_IMAGES, wide=True),
  row(conv.pixel_state, _images, bad=_BAD_IMAGES, wide=True),
  row(
    conv.convolution,
    _images,
    call=lambda images, **options: conv.convolution(conv.pixel_state(images), size=3, **options),
    wide=True,
    options=dict(weight_variance=(0.5, 2.0), bias_variance=(0.0, 0.5)),
  ),
  row(conv.flatten, _images, call=lambda images: conv.flatten(conv.pixel_state(images)), wide=True),
  row(
    conv.global_average_pool, _images, call=lambda images: conv.global_average_pool(conv.image_state(images)), wide=True
  ),
  row(conv.average_pool, _images, call=lambda images: conv.average_pool(conv.image_state(images), size=2), wide=True),
]
