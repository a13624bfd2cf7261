"""Networks of one description: kernels of sampled networks against those of the limit."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxreg.kernels import convolutional as conv
from jaxreg.kernels import infinite_width as iw
from jaxreg.kernels import wide_networks as wide
from jaxreg.kernels.dual_activations import erf_dual, relu_dual
from jaxreg.kernels.gram import tiled_gram

OPTIONS = {"weight_variance": 1.5, "bias_variance": 0.2}
dense = functools.partial(wide.wide_dense, **OPTIONS)
convolution = functools.partial(wide.wide_convolution, size=3, **OPTIONS)
relu, erf = wide.wide_activation(relu_dual()), wide.wide_activation(erf_dual())


def residual_network(width):
  return wide.serial(dense(width), wide.parallel(wide.wide_identity(), wide.serial(erf, dense(width))), relu, dense(4))


def images_network(width, pool):
  pooled = (wide.wide_average_pool(size=2), wide.wide_global_average_pool()) if pool else (wide.wide_flatten(),)
  layers = convolution(width, stride=2), relu, convolution(width, padding="CIRCULAR"), erf
  return wide.serial(*layers, *pooled, dense(4))


VECTORS = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
IMAGES = np.random.default_rng(1).normal(size=(3, 8, 4, 2)).astype(np.float32)
NETWORKS = {
  "residual": (residual_network, VECTORS, iw.input_state),
  "flattened": (functools.partial(images_network, pool=False), IMAGES, conv.pixel_state),
  "pooled": (functools.partial(images_network, pool=True), IMAGES, conv.image_state),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_kernels_of_sampled_networks_are_those_of_the_limit(name):
  network_of, inputs, start = NETWORKS[name]
  network = network_of(64 if name == "residual" else 48)
  init = lambda key: network.init(key, inputs.shape)[0]
  sampled = jax.jit(lambda key: wide.monte_carlo_kernels(key, init, network.apply, inputs, inputs[:2], samples=100))(
    jax.random.key(0)
  )
  limit = wide.network_kernel(network, start=start)(inputs, inputs[:2])
  for got, expected in zip(sampled[:4], limit[:4], strict=True):
    # A hundred networks with four outputs: a tenth of the scale.
    np.testing.assert_allclose(got, expected, atol=0.15 * float(jnp.abs(expected).max()))
  params, shape = network.init(jax.random.key(1), inputs.shape)
  assert network.apply(params, inputs).shape == shape == (len(inputs), 4)


def test_kernel_is_the_composition_by_hand():
  state = iw.dense(iw.input_state(VECTORS), **OPTIONS)
  state = iw.residual(state, lambda s: iw.dense(iw.activate(s, erf_dual()), **OPTIONS))
  state = iw.dense(iw.activate(state, relu_dual()), **OPTIONS)
  got = wide.network_kernel(residual_network(5))(VECTORS)
  for a, b in zip(got, state, strict=True):
    np.testing.assert_array_equal(a, b)


def test_tiled_gram_of_a_whole_network():
  kernel = wide.network_kernel(images_network(5, pool=True), start=conv.image_state)
  whole, tiled = kernel(IMAGES), tiled_gram(kernel, IMAGES, tile=2)
  for a, b in zip(tiled, whole, strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_variances_may_be_traced():
  def total(weight_variance):
    network = wide.serial(wide.wide_dense(6, weight_variance=weight_variance), relu, wide.wide_dense(2))
    params, _ = network.init(jax.random.key(0), VECTORS.shape)
    return jnp.sum(network.apply(params, VECTORS)) + jnp.sum(wide.network_kernel(network)(VECTORS).ntk)

  assert jnp.isfinite(jax.jit(jax.grad(total))(1.5))


def test_bad_input():
  key = jax.random.key(0)
  for message, call in (
    ("width must be", lambda: wide.wide_dense(0)),
    ("bias_variance must lie", lambda: wide.wide_dense(3, bias_variance=-1.0)),
    ("dual must be", lambda: wide.wide_activation(jnp.tanh)),
    ("channels must be", lambda: wide.wide_convolution(0, size=3)),
    ("padding must be", lambda: wide.wide_convolution(2, size=3, padding="zero").init(key, IMAGES.shape)),
    ("size must be", lambda: wide.wide_average_pool(size=0)),
    ("branches must be at least", wide.parallel),
    ("branches must have outputs", lambda: wide.parallel(dense(2), dense(3)).init(key, (2, 3))),
    ("samples must be", lambda: wide.monte_carlo_kernels(key, len, len, VECTORS, samples=0)),
  ):
    with pytest.raises(ValueError, match=message):
      call()


EXEMPT = {
  "WideLayer": "what the functions of this module make",
  "monte_carlo_kernels": "draws of a network of the caller",
  **dict.fromkeys(
    (
      "network_kernel",
      "parallel",
      "serial",
      "wide_activation",
      "wide_average_pool",
      "wide_convolution",
      "wide_dense",
      "wide_flatten",
      "wide_global_average_pool",
      "wide_identity",
    ),
    "makes functions of layers",
  ),
}
