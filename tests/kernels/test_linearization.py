"""Expansions of networks in their parameters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from jaxreg.kernels import linearization
from jaxreg.kernels.empirical import empirical_ntk


def network():
  model = nn.Sequential([nn.Dense(8), jnp.tanh, nn.Dense(3)])
  inputs = jnp.asarray(np.random.default_rng(0).normal(size=(5, 4)))
  return model.apply, model.init(jax.random.key(0), inputs), inputs


def moved(params, scale):
  return jax.tree.map(lambda x: x + scale * jnp.cos(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape), params)


def test_polynomials_are_their_own_expansion(x64):
  cubic = lambda w, x: {"value": w["a"] ** 3 * x + w["a"] * w["b"], "other": w["b"] ** 2}
  at, new = ({"a": jnp.float64(a), "b": jnp.float64(b)} for a, b in ((0.7, -0.3), (1.9, 0.4)))
  exact = cubic(new, 2.0)
  got = linearization.taylor_expand(cubic, at, degree=3)(new, 2.0)
  np.testing.assert_allclose(jax.tree.leaves(got), jax.tree.leaves(exact), rtol=1e-12)
  constant = linearization.taylor_expand(cubic, at, degree=0)(new, 2.0)
  np.testing.assert_allclose(jax.tree.leaves(constant), jax.tree.leaves(cubic(at, 2.0)), rtol=1e-12)
  linear = linearization.linearize(cubic, at)(new, 2.0)
  # 3 a^2 x da + b da + a db, and 2 b db
  np.testing.assert_allclose(linear["value"], cubic(at, 2.0)["value"] + (3 * 0.49 * 2 - 0.3) * 1.2 + 0.7 * 0.7)
  np.testing.assert_allclose(linear["other"], 0.09 - 0.6 * 0.7)


@pytest.mark.parametrize("degree", [0, 1, 2, 3])
def test_error_falls_with_the_power_after_the_degree(x64, degree):
  function, params, inputs = network()
  expanded = jax.jit(linearization.taylor_expand(function, params, degree=degree))
  error = lambda scale: np.abs(expanded(moved(params, scale), inputs) - function(moved(params, scale), inputs)).max()
  np.testing.assert_allclose(np.log2(error(0.02) / error(0.01)), degree + 1, atol=0.15)


def test_linear_network_has_the_tangent_kernel_everywhere(x64):
  function, params, inputs = network()
  linear = linearization.linearize(function, params)
  expected = empirical_ntk(function, params, inputs)
  for scale in (0.0, 1.0):
    np.testing.assert_allclose(empirical_ntk(linear, moved(params, scale), inputs), expected, rtol=1e-10)


def test_bad_input():
  with pytest.raises(ValueError, match="degree must be"):
    linearization.taylor_expand(lambda w: w, 1.0, degree=-1)


EXEMPT = {
  "linearize": "makes a function of a function",
  "taylor_expand": "makes a function of a function",
}
