"""Empirical tangent kernels, and their convergence to those of infinite width."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxreg.kernels import deep_limits, dual_activations, empirical, infinite_width
from tests.conformance import row


class Network(nn.Module):
  @nn.compact
  def __call__(self, x):
    x = nn.relu(nn.Conv(3, (2, 2))(x))
    return nn.Dense(3)(nn.tanh(nn.Dense(5)(x.reshape(len(x), -1))))


@pytest.fixture(scope="module")
def network():
  model = Network()
  rng = np.random.default_rng(0)
  first, second = (jnp.asarray(rng.normal(size=(n, 4, 4, 1)), jnp.float32) for n in (4, 3))
  return model.apply, model.init(jax.random.key(0), first), first, second


def flat_jacobian(apply, params, inputs):
  jacobian = jax.jacobian(lambda p: apply(p, inputs))(params)
  return jnp.concatenate([leaf.reshape((len(inputs), 3, -1)) for leaf in jax.tree.leaves(jacobian)], -1)


@pytest.mark.parametrize(
  "method",
  [
    empirical.ntk_by_jacobians,
    empirical.ntk_by_vector_products,
    empirical.empirical_ntk,
    functools.partial(empirical.empirical_ntk, tile=2),
  ],
)
def test_methods_agree_with_the_definition(network, method):
  apply, params, first, second = network
  jacobians = [jax.jit(functools.partial(flat_jacobian, apply))(params, x) for x in (first, second)]
  for pair, right in (((first, second), jacobians[1]), ((first,), jacobians[0])):
    expected = np.einsum("iap,jbp->ijab", jacobians[0], right)
    got = jax.jit(functools.partial(method, apply))(params, *pair)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)
  single = lambda params, x: apply(params, x)[:, 0]
  np.testing.assert_allclose(
    method(single, params, first), np.einsum("ip,jp->ij", *[jacobians[0][:, 0]] * 2), rtol=1e-4
  )


def test_the_cheaper_method_is_taken(monkeypatch):
  """Contraction for a network that uses its few parameters often, products for a large matrix with many outputs."""
  taken = []
  for name in ("ntk_by_jacobians", "ntk_by_vector_products"):
    method = getattr(empirical, name)
    record = lambda *arguments, method=method, name=name, **axes: taken.append(name) or method(*arguments, **axes)
    monkeypatch.setattr(empirical, name, record)
  x = jnp.ones((2, 32))
  empirical.empirical_ntk(lambda w, x: jnp.tanh(x @ w), jnp.ones((32, 16)), x)
  signal = jnp.ones((2, 64, 64, 1))
  conv = lambda w, x: jax.lax.conv_general_dilated(
    x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
  ).mean((1, 2, 3))
  empirical.empirical_ntk(conv, jnp.ones((3, 3, 1, 4)), signal)
  assert taken == ["ntk_by_vector_products", "ntk_by_jacobians"]


def wide_network(activation, params, x):
  """NTK parameterization, unit inputs."""
  x = x @ params[0]
  for w in params[1:]:
    x = activation(x) @ w / jnp.sqrt(w.shape[0])
  return x[:, 0]


def wide_params(key, sizes):
  pairs = list(zip(sizes, sizes[1:], strict=False))
  return [jax.random.normal(k, pair) for k, pair in zip(jax.random.split(key, len(pairs)), pairs, strict=True)]


@pytest.fixture(scope="module")
def unit_inputs():
  inputs = np.abs(np.random.default_rng(0).normal(size=(4, 3)))
  return jnp.asarray(inputs / np.linalg.norm(inputs, axis=1, keepdims=True), jnp.float32)


def test_wide_network_has_the_kernel_of_infinite_width(unit_inputs):
  """The card's test: within 5 % at width 4,096."""
  dual = deep_limits.optimal_dual(2)
  kernel = jax.jit(
    lambda key: empirical.ntk_by_vector_products(
      functools.partial(wide_network, dual.activation), wide_params(key, (3, 4096, 1)), unit_inputs
    )
  )
  exact = deep_limits.deep_ntk(deep_limits.sphere_gram(unit_inputs), depth=1, dual=dual)
  error = jnp.abs(kernel(jax.random.key(0)) - exact).max() / exact.max()
  assert error < 0.05


def test_convergence_at_the_rate_of_the_root_of_the_width(unit_inputs):
  state = infinite_width.fully_connected(jnp.sqrt(3.0) * unit_inputs, depth=2, dual=dual_activations.relu_dual())
  widths = (32, 128, 256)

  def error(width):
    kernel = lambda key: empirical.ntk_by_jacobians(
      functools.partial(wide_network, jax.nn.relu), wide_params(key, (3, width, width, 1)), unit_inputs
    )
    kernels = jax.jit(lambda keys: jax.lax.map(kernel, keys))(jax.random.split(jax.random.key(0), 60))
    return float(jnp.sqrt(jnp.mean(jnp.square(kernels - state.ntk))))

  slope = np.polyfit(np.log(widths), np.log([error(width) for width in widths]), 1)[0]
  assert -0.62 < slope < -0.38


@pytest.mark.parametrize(
  "method", [empirical.empirical_ntk, empirical.ntk_by_jacobians, empirical.ntk_by_vector_products]
)
def test_kernels_of_single_outputs(method):
  """A hundred outputs: their kernels with themselves, and the mean of these, without those of all pairs."""
  rng = np.random.default_rng(0)
  weights = {"a": jnp.asarray(rng.normal(size=(3, 6))), "b": jnp.asarray(rng.normal(size=(6, 100)))}
  function = lambda w, x: jnp.tanh(x @ w["a"]) @ w["b"]
  first, second = (jnp.asarray(rng.normal(size=(n, 3))) for n in (4, 2))
  for others in (None, second):
    whole = empirical.ntk_by_jacobians(function, weights, first, others)
    diagonal = jnp.einsum("ijaa->ija", whole)
    np.testing.assert_allclose(method(function, weights, first, others, diagonal_axes=(-1,)), diagonal, rtol=1e-4)
    np.testing.assert_allclose(method(function, weights, first, others, trace_axes=(-1,)), diagonal.mean(-1), rtol=1e-4)
  if method is empirical.empirical_ntk:
    tiled = method(function, weights, first, tile=3, trace_axes=(1,))
    np.testing.assert_allclose(tiled, method(function, weights, first, trace_axes=(-1,)), rtol=1e-4)
    tiled = method(function, weights, first, tile=3, diagonal_axes=(-1,))
    np.testing.assert_allclose(tiled, method(function, weights, first, diagonal_axes=(-1,)), rtol=1e-4)
  for message, axes in (
    ("trace_axes must be axes", {"trace_axes": (0,)}),
    ("diagonal_axes must be axes", {"diagonal_axes": (-2,)}),
    ("must not name the same", {"trace_axes": (-1,), "diagonal_axes": (-1,)}),
  ):
    with pytest.raises(ValueError, match=message):
      method(function, weights, first, **axes)
  with pytest.raises(ValueError, match="trace_axes must be axes of the outputs, \\(\\)"):
    method(lambda w, x: function(w, x)[:, 0], weights, first, trace_axes=(-1,))


def test_bad_input(network):
  _, params, first, _ = network
  for method in (empirical.empirical_ntk, empirical.ntk_by_jacobians, empirical.ntk_by_vector_products):
    with pytest.raises(ValueError, match="function must give"):
      method(lambda params, x: x, params, first)


def _tangent_kernel(function):
  """`function(network, params, inputs)` of a small network, as a function of the inputs."""
  network = lambda params, inputs: jnp.tanh(inputs @ params)
  return row(
    function,
    lambda rng: (rng.normal(size=(4, 3)), rng.normal(size=(3, 2))),
    call=lambda inputs, params: function(network, params, inputs),
    wide=True,
  )


ROWS = [
  _tangent_kernel(empirical.empirical_ntk),
  _tangent_kernel(empirical.ntk_by_jacobians),
  _tangent_kernel(empirical.ntk_by_vector_products),
]
