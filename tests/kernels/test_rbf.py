"""Distances and the kernel of distances."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxreg.kernels import rbf
from jaxreg.kernels.rbf import gaussian_log_kernel, rbf_kernel, squared_distances
from tests.conformance import row

X = np.random.default_rng(0).normal(size=(5, 3)) + 30
Y = np.random.default_rng(1).normal(size=(4, 3)) + 30


def test_distances_by_differences(x64):
  expected = np.square(X[:, None] - Y).sum(-1)
  np.testing.assert_allclose(squared_distances(X, Y), expected, rtol=1e-12)
  np.testing.assert_allclose(rbf_kernel(X, Y, gamma=0.3), np.exp(-0.3 * expected), rtol=1e-12)
  np.testing.assert_allclose(gaussian_log_kernel(X, Y, bandwidth=1e-3), -expected / 2e-6, rtol=1e-12)


def test_far_from_the_origin_in_float32():
  near = squared_distances(jnp.asarray(X + 1e3, jnp.float32), jnp.asarray(Y + 1e3, jnp.float32))
  np.testing.assert_allclose(near, np.square(X[:, None] - Y).sum(-1), rtol=1e-3)
  assert np.asarray(squared_distances(jnp.asarray(X, jnp.float32), jnp.asarray(X, jnp.float32))).min() >= 0


def test_gradient_between_inputs_nearer_than_rounding():
  inputs = jnp.asarray([[1e3, 1e3], [1e3 + 1e-3, 1e3], [-1e3, 5.0]], jnp.float32)
  squares, backward = jax.vjp(lambda x: squared_distances(x, inputs), inputs)
  assert squares.min() >= 0
  (gradient,) = backward(jnp.zeros((3, 3)).at[0, 1].set(1.0))
  np.testing.assert_allclose(gradient[0, 0], 2 * (inputs[0, 0] - inputs[1, 0]), rtol=0.2)


def test_bad_input():
  for inputs, others in ((X, Y[:, :2]), (X[0], Y)):
    with pytest.raises(ValueError, match="inputs and others must be"):
      squared_distances(inputs, others)
  with pytest.raises(ValueError, match="inputs must be floating"):
    squared_distances(X.astype(int), Y)
  with pytest.raises(ValueError, match="gamma"):
    rbf_kernel(X, Y, gamma=-1.0)


_BAD_SETS = (
  ("inputs", lambda x, y: (x.astype(np.int32), y)),
  ("dimensions|others", lambda x, y: (x, y[:, 1:])),
)


ROWS = [
  row(
    rbf.gaussian_log_kernel,
    lambda rng: (rng.normal(size=(4, 3)), rng.normal(size=(5, 3))),
    bad=_BAD_SETS,
    wide=True,
    options=dict(bandwidth=(0.5, 2.0)),
  ),
  row(
    rbf.rbf_kernel,
    lambda rng: (rng.normal(size=(4, 3)), rng.normal(size=(5, 3))),
    bad=_BAD_SETS,
    wide=True,
    options=dict(gamma=(0.1, 1.0)),
  ),
  row(
    rbf.squared_distances,
    lambda rng: (rng.normal(size=(4, 3)), rng.normal(size=(5, 3))),
    bad=_BAD_SETS,
    wide=True,
  ),
]
