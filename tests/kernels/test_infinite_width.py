"""Kernels of fully connected networks of infinite width."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jax.test_util import check_grads

from jaxreg.kernels import dual_activations as duals
from jaxreg.kernels import infinite_width as iw
from tests.conformance import row

RELU = duals.relu_dual()
OPTIONS = {"weight_variance": 1.7, "bias_variance": 0.3}


@pytest.fixture
def inputs():
  rng = np.random.default_rng(0)
  return jnp.asarray(rng.normal(size=(5, 4))), jnp.asarray(rng.normal(size=(3, 4)))


def by_hand(first, second, depth, weight, bias):
  """The recursion for ReLU with the angle, for one pair at a time."""
  of = lambda x, y: weight * np.dot(x, y) / len(x) + bias
  a, b, c = of(first, first), of(second, second), of(first, second)
  ntk = c
  for _ in range(depth):
    angle = np.arccos(np.clip(c / np.sqrt(a * b), -1, 1))
    moment = np.sqrt(a * b) * (np.sin(angle) + (np.pi - angle) * np.cos(angle)) / (2 * np.pi)
    slope = (np.pi - angle) / (2 * np.pi)
    a, b, c = weight * a / 2 + bias, weight * b / 2 + bias, weight * moment + bias
    ntk = c + weight * slope * ntk
  return c, ntk


@pytest.mark.parametrize("depth", [0, 1, 4])
def test_relu_network_against_the_recursion_by_hand(x64, inputs, depth):
  first, second = inputs
  state = iw.fully_connected(first, second, depth=depth, dual=RELU, **OPTIONS)
  hand = np.array([[by_hand(np.asarray(x), np.asarray(y), depth, 1.7, 0.3) for y in second] for x in first])
  np.testing.assert_allclose(state.covariance, hand[..., 0], rtol=1e-12)
  np.testing.assert_allclose(state.ntk, hand[..., 1], rtol=1e-12)


@pytest.mark.parametrize("dual", [RELU, duals.erf_dual(), duals.gelu_dual(), duals.sine_dual()])
def test_symmetric_form_and_its_diagonal(x64, inputs, dual):
  first, _ = inputs
  apart = iw.fully_connected(first, first, depth=3, dual=dual, **OPTIONS)
  same = iw.fully_connected(first, depth=3, dual=dual, **OPTIONS)
  for a, b in zip(apart, same, strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-10)
  np.testing.assert_allclose(jnp.diagonal(same.covariance), same.variance1, rtol=1e-14)
  assert np.linalg.eigvalsh(same.ntk)[0] > 0


def network(params, x, activation, weight, bias):
  """A finite network in NTK parameterization."""
  for index, (w, b) in enumerate(params):
    x = activation(x) if index else x
    x = jnp.sqrt(weight / w.shape[0]) * x @ w + jnp.sqrt(bias) * b
  return x


def normal_params(key, sizes):
  keys = jax.random.split(key, 2 * len(sizes))
  pairs = zip(sizes, sizes[1:], strict=False)
  return [
    (jax.random.normal(keys[2 * i], (m, n)), jax.random.normal(keys[2 * i + 1], (n,))) for i, (m, n) in enumerate(pairs)
  ]


def test_covariance_of_random_networks(inputs):
  first = inputs[0][:3].astype(jnp.float32)
  sample = lambda key: network(normal_params(key, (4, 128, 128, 1)), first, jnp.tanh, 1.7, 0.3)[:, 0]
  outputs = jax.jit(lambda keys: jax.lax.map(sample, keys, batch_size=20))(jax.random.split(jax.random.key(0), 2000))
  expected = iw.fully_connected(first, depth=2, dual=duals.numerical_dual(jnp.tanh), **OPTIONS)
  # Two thousand samples give covariances to a few hundredths.
  np.testing.assert_allclose(outputs.T @ outputs / 2000, expected.covariance, atol=0.2)


def test_standard_parameterization_is_the_gradient_of_a_wide_network(inputs):
  """`T = sum of gradients' products`; the widths enter."""
  first = inputs[0][:3].astype(jnp.float32)
  widths = (512, 384)

  def apply(params, x):
    for index, (w, b) in enumerate(params):
      x = (jax.nn.relu(x) if index else x) @ w + b
    return x[0]

  @jax.jit
  def kernel(key):
    params = [(jnp.sqrt(1.7 / w.shape[0]) * w, jnp.sqrt(0.3) * b) for w, b in normal_params(key, (4, *widths, 1))]
    rows = jax.vmap(lambda x: ravel_pytree(jax.grad(apply)(params, x))[0])(first)
    return rows @ rows.T

  mean = jnp.mean(jax.lax.map(kernel, jax.random.split(jax.random.key(1), 8)), 0)
  state = iw.fully_connected_standard(first, widths=widths, dual=RELU, **OPTIONS)
  np.testing.assert_allclose(mean, state.ntk, rtol=0.12)
  unbiased = iw.fully_connected_standard(first, widths=widths, dual=RELU, weight_variance=1.7)
  np.testing.assert_allclose(
    unbiased.covariance, iw.fully_connected(first, depth=2, dual=RELU, weight_variance=1.7).covariance, rtol=1e-5
  )


def test_residual_and_layer_norm(x64, inputs):
  state = iw.dense(iw.input_state(*inputs), **OPTIONS)
  branch = lambda s: iw.dense(iw.activate(iw.layer_norm(s, epsilon=0.0), RELU), weight_variance=2.0)
  got = iw.residual(state, branch)
  inside = branch(state)
  np.testing.assert_allclose(got.covariance, state.covariance + inside.covariance)
  np.testing.assert_allclose(got.ntk, state.ntk + inside.ntk)
  np.testing.assert_allclose(inside.variance1, jnp.ones(5), rtol=1e-12)
  normal = iw.layer_norm(state, epsilon=0.0)
  rho = state.covariance / jnp.sqrt(state.variance1[:, None] * state.variance2)
  np.testing.assert_allclose(normal.covariance, rho, rtol=1e-12)


def test_layer_norm_against_a_wide_network(inputs):
  """The tangent kernel through a layer norm between two dense layers."""
  first = inputs[0][:3].astype(jnp.float32)

  def apply(params, x):
    (w, _), (v, _) = params
    hidden = x @ w / 2
    hidden = (hidden - hidden.mean()) / jnp.std(hidden)
    return (jax.nn.relu(hidden) @ v)[0] / jnp.sqrt(v.shape[0])

  params = normal_params(jax.random.key(2), (4, 8192, 1))
  rows = jax.vmap(lambda x: ravel_pytree(jax.grad(apply)(params, x))[0])(first)
  state = iw.dense(iw.activate(iw.layer_norm(iw.dense(iw.input_state(first))), RELU))
  np.testing.assert_allclose(rows @ rows.T, state.ntk, atol=0.05 * float(state.ntk.max()))


def test_float32_at_equal_and_opposite_inputs(inputs):
  """The trap of arccos: kernels and gradients stay finite, and near those of float64."""
  first = inputs[0].astype(jnp.float32)
  both = jnp.concatenate([first, -first, 3 * first, jnp.zeros((1, 4))])
  kernel = jax.jit(lambda x: iw.fully_connected(x, depth=2, dual=RELU, weight_variance=2.0))
  state = kernel(both)
  with jax.enable_x64(True):
    exact = jax.tree.map(np.asarray, kernel(jnp.asarray(np.asarray(both), jnp.float64)))
  np.testing.assert_allclose(state.ntk, exact.ntk, rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(np.diagonal(state.ntk), np.diagonal(exact.ntk), rtol=1e-5)
  gradient = jax.grad(lambda x: jnp.sum(kernel(x).covariance) + jnp.sum(kernel(x).ntk))(both)
  assert jnp.isfinite(gradient).all()


def close_inputs(name):
  """Two hundred inputs whose tangent kernels depend on angles that their covariances in float32 do not have."""
  rng = np.random.default_rng(0)
  if name == "line":
    return np.linspace(-10 * np.pi, 10 * np.pi, 200)[:, None]
  features = 40 if name == "clusters" else 4  # on either side of where distances are summed for close rows only
  centers = np.repeat([np.ones(features), np.linspace(-3, 3, features)], 100, 0)
  return centers + np.repeat([1e-3, 1e-4], 100)[:, None] * rng.normal(size=(200, features))


BOTH = {"relu": RELU, "abs": duals.abs_dual(), "leaky": duals.leaky_relu_dual(negative_slope=0.2)}


@pytest.mark.parametrize("name", BOTH)
@pytest.mark.parametrize("inputs_of", ["line", "clusters", "few features"])
def test_close_inputs_in_float32(name, inputs_of):
  """Kernels are right to 1e-6 of the mean diagonal, entries and least eigenvalue."""
  inputs = close_inputs(inputs_of).astype(np.float32)
  options = {"depth": 2, "dual": BOTH[name], "weight_variance": 2.25, "bias_variance": 0.0025}
  kernel = jax.jit(lambda x: iw.fully_connected(x, **options))
  apart = jax.jit(lambda x: iw.fully_connected(x, jnp.concatenate([x[:20], -x[:20]]), **options))
  for of in (kernel, apart):
    got = of(jnp.asarray(inputs))
    with jax.enable_x64(True):
      exact = jax.tree.map(np.asarray, of(inputs.astype(np.float64)))
    scale = np.mean(exact.variance1)
    np.testing.assert_allclose(got.covariance, exact.covariance, rtol=1e-6, atol=1e-6 * scale)
    np.testing.assert_allclose(got.ntk, exact.ntk, rtol=1e-6, atol=1e-9 * np.abs(exact.ntk).max())
    # The angle, on which the slopes depend, is right to about a unit of rounding.
    angle = lambda state: np.sqrt(2 * np.asarray(state.complement, np.float64))
    np.testing.assert_allclose(angle(got), angle(exact), rtol=1e-6, atol=5e-7)
    if of is kernel:
      matrix = np.asarray(got.ntk, np.float64)
      assert np.linalg.eigvalsh((matrix + matrix.T) / 2)[0] >= -1e-6 * np.trace(matrix) / len(matrix)


@pytest.mark.parametrize("dual", [duals.erf_dual(), duals.gelu_dual(), duals.sine_dual(), duals.gaussian_dual()])
def test_close_inputs_in_float32_for_smooth_activations(dual):
  """Their kernels are singular in float64 already; float32 adds its rounding."""
  inputs = close_inputs("clusters").astype(np.float32)
  kernel = jax.jit(lambda x: iw.fully_connected(x, depth=1, dual=dual, weight_variance=2.25, bias_variance=0.0025))
  got = kernel(jnp.asarray(inputs)).ntk
  with jax.enable_x64(True):
    exact = np.asarray(kernel(inputs.astype(np.float64)).ntk)
  np.testing.assert_allclose(got, exact, atol=1e-6 * exact.max())


def test_mixed_networks_keep_the_angle(x64):
  """Sums, biases, layer norm: the complement is `1 - |correlation|` of what stands beside it."""
  rng = np.random.default_rng(1)
  inputs = rng.normal(size=(6, 3))
  inputs = jnp.asarray(np.concatenate([inputs, inputs + 0.1 * rng.normal(size=(6, 3)), -inputs]))
  start = iw.dense(iw.input_state(inputs), **OPTIONS)
  states = [
    start,
    iw.residual(start, lambda s: iw.dense(iw.activate(s, duals.erf_dual()), **OPTIONS)),
    iw.add_states(iw.dense(iw.activate(start, duals.abs_dual())), start._replace(complement=None)),
    iw.dense(iw.layer_norm(iw.activate(start, duals.leaky_relu_dual(negative_slope=-0.5))), bias_variance=0.1),
    iw.activate(start, duals.step_dual()),
    iw.dense_standard(iw.activate(start, duals.sign_dual()), width=3, bias_variance=0.2),
  ]
  for state in states:
    scale = np.sqrt(np.asarray(state.variance1)[:, None] * np.asarray(state.variance2))
    np.testing.assert_allclose(state.complement, 1 - np.abs(state.covariance) / scale, atol=1e-13)


def test_residual_networks_of_close_inputs():
  """A residual ReLU network in float32 keeps what one without branches keeps."""
  inputs = close_inputs("line").astype(np.float32)

  @jax.jit
  def kernel(x):
    state = iw.dense(iw.input_state(x), **OPTIONS)
    branch = lambda s: iw.dense(iw.activate(s, RELU), **OPTIONS)
    return iw.residual(iw.residual(state, branch), branch).ntk

  with jax.enable_x64(True):
    exact = np.asarray(kernel(inputs.astype(np.float64)))
  np.testing.assert_allclose(kernel(jnp.asarray(inputs)), exact, rtol=1e-6, atol=1e-9 * exact.max())


def test_a_state_or_a_dual_without_the_angle_does_as_well(x64, inputs):
  state = iw.dense(iw.input_state(*inputs), **OPTIONS)
  plain = duals.DualActivation(RELU.activation, RELU.covariance, RELU.derivative)
  for start, dual in ((state._replace(complement=None), RELU), (state, plain)):
    for a, b in zip(iw.activate(start, dual), iw.activate(state, RELU), strict=True):
      np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dual", [RELU, duals.erf_dual(), duals.gelu_dual()])
def test_extreme_inputs(inputs, dual):
  total = jax.jit(jax.value_and_grad(lambda x: jnp.sum(iw.fully_connected(x, depth=1, dual=dual, **OPTIONS).ntk)))
  for scale, dtype in ((1e4, jnp.float32), (1e-4, jnp.float32), (1.0, jnp.bfloat16)):
    value, gradient = total((scale * inputs[0]).astype(dtype))
    assert jnp.isfinite(value) and jnp.isfinite(gradient).all()


def test_gradient_against_finite_differences(x64, inputs):
  first, second = inputs

  @jax.jit
  def total(x, weight):
    state = iw.fully_connected(x, second, depth=2, dual=RELU, weight_variance=weight, bias_variance=0.1)
    return jnp.sum(jnp.sin(state.ntk) + state.covariance)

  check_grads(total, (first, 1.3), order=1, modes=("rev",), eps=1e-5)


def test_traced_hyperparameters_under_vmap(inputs):
  weights = jnp.array([1.0, 2.0])
  kernel = lambda w: iw.fully_connected(*inputs, depth=2, dual=RELU, weight_variance=w).ntk
  mapped = jax.jit(jax.vmap(kernel))(weights)
  for index, weight in enumerate((1.0, 2.0)):
    np.testing.assert_allclose(mapped[index], kernel(weight), rtol=1e-5)


def test_sharded_equals_single_device(inputs):
  first = jnp.tile(inputs[0][:4], (4, 1)) * jnp.linspace(0.5, 2, 16)[:, None]
  kernel = jax.jit(lambda x, y: iw.fully_connected(x, y, depth=2, dual=RELU, **OPTIONS).ntk)
  expected = kernel(first, inputs[1])
  mesh = Mesh(np.asarray(jax.devices()[:8]), ("data",), axis_types=(AxisType.Auto,))
  sharded = kernel(jax.device_put(first, NamedSharding(mesh, PartitionSpec("data"))), inputs[1])
  np.testing.assert_allclose(sharded, expected, rtol=1e-5)
  mapped = jax.shard_map(
    lambda x: kernel(x, inputs[1]), mesh=mesh, in_specs=PartitionSpec("data"), out_specs=PartitionSpec("data"),
    check_vma=False,
  )(first)  # fmt: skip
  np.testing.assert_allclose(mapped, expected, rtol=1e-5)
  pmapped = jax.pmap(lambda x: kernel(x, inputs[1]))(first.reshape(8, 2, 4))
  np.testing.assert_allclose(pmapped.reshape(16, 3), expected, rtol=1e-5)


def test_bad_input(inputs):
  first, second = inputs
  state = iw.input_state(first)
  for message, call in (
    ("inputs1 must be \\[inputs, features\\]", lambda: iw.input_state(first[0])),
    ("inputs2 must be", lambda: iw.input_state(first, second[:, :2])),
    ("inputs1 must be floating", lambda: iw.input_state(jnp.ones((2, 2), int))),
    ("weight_variance must lie in", lambda: iw.dense(state, weight_variance=-1.0)),
    ("bias_variance must lie in", lambda: iw.dense(state, bias_variance=float("nan"))),
    ("width must lie in", lambda: iw.dense_standard(state, width=0)),
    ("epsilon must lie in", lambda: iw.layer_norm(state, epsilon=-1.0)),
    ("depth must be", lambda: iw.fully_connected(first, depth=-1, dual=RELU)),
    ("dual must be", lambda: iw.fully_connected(first, depth=1, dual=jax.nn.relu)),
    ("second must have the shapes", lambda: iw.add_states(state, iw.input_state(first, second))),
  ):
    with pytest.raises(ValueError, match=message):
      call()


def _of_inputs(function, call, *, bad=(), **options):
  """A function of states as one of the inputs."""
  return row(function, lambda rng: (rng.normal(size=(4, 3)),), call=call, bad=bad, wide=True, options=options)


_BAD_INPUTS = (("inputs", lambda inputs: (inputs.astype(np.int32),)), ("inputs", lambda inputs: (inputs[0],)))


ROWS = [
  _of_inputs(iw.activate, lambda x: iw.activate(iw.input_state(x), duals.relu_dual())),
  _of_inputs(iw.add_states, lambda x: iw.add_states(iw.input_state(x), iw.dense(iw.input_state(x)))),
  _of_inputs(
    iw.dense,
    lambda x, **options: iw.dense(iw.input_state(x), **options),
    weight_variance=(0.5, 2.0),
    bias_variance=(0.0, 0.5),
  ),
  _of_inputs(
    iw.dense_standard,
    lambda x, **options: iw.dense_standard(iw.input_state(x), **options),
    width=(4.0, 9.0),
    weight_variance=(0.5, 2.0),
    bias_variance=(0.1, 0.5),
  ),
  _of_inputs(
    iw.fully_connected,
    lambda x, **options: iw.fully_connected(x, depth=2, dual=duals.erf_dual(), **options),
    bad=_BAD_INPUTS,
    weight_variance=(0.5, 2.0),
    bias_variance=(0.0, 0.5),
  ),
  _of_inputs(
    iw.fully_connected_standard,
    lambda x, **options: iw.fully_connected_standard(x, widths=(5, 4), dual=duals.erf_dual(), **options),
    bad=_BAD_INPUTS,
    weight_variance=(0.5, 2.0),
  ),
  _of_inputs(iw.input_state, iw.input_state, bad=_BAD_INPUTS),
  _of_inputs(iw.layer_norm, lambda x, epsilon: iw.layer_norm(iw.input_state(x), epsilon=epsilon), epsilon=(1e-6, 1e-2)),
  _of_inputs(iw.residual, lambda x: iw.residual(iw.input_state(x), iw.dense)),
]


EXEMPT = {
  "KernelState": "what the functions of this module make",
}
