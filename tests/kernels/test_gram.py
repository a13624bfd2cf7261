"""Gram matrices in tiles."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh

from jaxreg.kernels import convolutional
from jaxreg.kernels import gram as grams
from jaxreg.kernels import infinite_width as iw
from jaxreg.kernels.dual_activations import erf_dual
from tests.conformance import row


def kernel(x, y):
  state = iw.fully_connected(x, y, depth=1, dual=erf_dual(), weight_variance=2.0)
  return {"nngp": state.covariance, "ntk": state.ntk}


plain = jax.jit(kernel)


@pytest.fixture
def inputs():
  rng = np.random.default_rng(0)
  return jnp.asarray(rng.normal(size=(11, 4)), jnp.float32), jnp.asarray(rng.normal(size=(7, 4)), jnp.float32)


@pytest.fixture
def mesh():
  return Mesh(np.asarray(jax.devices()[:8]).reshape(4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)


@pytest.mark.parametrize("tile", [3, 20])
def test_tiles_make_the_whole(inputs, tile):
  first, second = inputs
  for pair in ((first, None), (first, second)):
    got = jax.jit(lambda *pair: grams.tiled_gram(kernel, *pair, tile=tile))(*pair)
    for name, expected in plain(*pair).items():
      np.testing.assert_allclose(got[name], expected, rtol=1e-5, atol=1e-6)
    if pair[1] is None:
      mirrored = (
        np.arange(11)[:, None] // tile != np.arange(11) // tile
      )  # within a tile the kernel's own rounding shows
      np.testing.assert_array_equal(got["ntk"][mirrored], got["ntk"].T[mirrored])


def convolved(convolve, x, y):
  image_state = convolutional.image_state if convolve else convolutional.pixel_state
  state = convolutional.convolution(
    image_state(*(None if z is None else z.reshape(-1, 2, 2, 1) for z in (x, y))), size=3
  )
  return {"state": iw.activate(state, erf_dual()), "pair": (jnp.ones(state.covariance.shape[:2]), None)}


@pytest.mark.parametrize("numbers", [jnp.asarray, np.asarray])
@pytest.mark.parametrize("tile", [3, 20])
def test_states_and_trees_in_tiles(inputs, tile, numbers):
  first, second = map(numbers, inputs)
  layers = lambda x, y: iw.fully_connected(x, y, depth=2, dual=erf_dual())
  kernels = (layers, lambda x, y: convolved(False, x, y), lambda x, y: convolved(True, x, y))
  for function in kernels:
    for pair in ((first, None), (first, second)):
      got, expected = (
        grams.tiled_gram(function, *pair, tile=tile),
        function(*map(jnp.asarray, inputs[: 1 + (pair[1] is not None)]), *[None] * (pair[1] is None)),
      )
      assert jax.tree.structure(got) == jax.tree.structure(expected)
      jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6), got, expected)


def test_devices_share_the_tiles(inputs, mesh):
  first, second = inputs
  for pair in ((first, None), (first, second)):
    got = jax.jit(lambda *pair: grams.tiled_gram(kernel, *pair, tile=3, mesh=mesh))(*pair)
    for name, expected in plain(*pair).items():
      np.testing.assert_allclose(got[name], expected, rtol=1e-5, atol=1e-6)


def test_every_pair_is_computed_once(inputs, mesh):
  """Four tiles: four on the diagonal and six above it; with eight devices every device has one of either."""
  calls = []

  def counted(x, y):
    jax.debug.callback(lambda: calls.append(y is None))
    return x @ (x if y is None else y).T

  jax.block_until_ready(grams.tiled_gram(counted, inputs[0], tile=3))
  jax.effects_barrier()
  assert (sum(calls), len(calls)) == (4, 10)


def test_memory_is_that_of_a_tile():
  """For a kernel of images, which needs much more memory than its result."""

  def pooled(x, y):
    state = iw.activate(convolutional.convolution(convolutional.image_state(x, y), size=3), erf_dual())
    return convolutional.global_average_pool(state).ntk

  images = jnp.ones((32, 6, 6, 1))
  whole = jax.jit(lambda x: pooled(x, None))
  tiled = jax.jit(lambda x: grams.tiled_gram(pooled, x, tile=4))
  sizes = [f.lower(images).compile().memory_analysis().temp_size_in_bytes for f in (whole, tiled)]
  assert sizes[1] < sizes[0] / 16, sizes  # a tile has a 64th of the pairs


def test_gradient(inputs):
  total = lambda of: jax.jit(jax.grad(lambda x: jnp.sum(jnp.sin(of(x)))))
  tiled = total(lambda x: grams.tiled_gram(lambda a, b: kernel(a, b)["ntk"], x, tile=6))(inputs[0])
  np.testing.assert_allclose(tiled, total(lambda x: kernel(x, None)["ntk"])(inputs[0]), rtol=1e-3, atol=1e-4)


def test_bad_input(inputs):
  with pytest.raises(ValueError, match="tile must be"):
    grams.tiled_gram(kernel, inputs[0], tile=0)


def test_progress_is_told_tile_by_tile(inputs, mesh):
  first, _ = inputs
  for devices, expected in ((None, 10), (mesh, 16)):  # four tiles a side; eight devices repeat some of the ten
    done = []
    jax.block_until_ready(grams.tiled_gram(kernel, first, tile=3, mesh=devices, advance=done.append))
    jax.effects_barrier()
    assert sum(done) == expected


ROWS = [
  row(
    grams.tiled_gram,
    lambda rng: (rng.normal(size=(4, 3)), rng.normal(size=(6, 3))),
    call=lambda x, y: grams.tiled_gram(lambda a, b: jnp.tanh(a @ b.T), x, y, tile=2),
  ),
]
