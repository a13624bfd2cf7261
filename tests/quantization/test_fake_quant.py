"""Fake quantization of weights and activations, and rounding with straight-through gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxreg.quantization import fake_quant, straight_through
from tests.conformance import EXAMPLES, extremes, row, straight_through_surrogate

SHAPE = (3, 4)  # weights: inputs, outputs


def in_numpy(function):
  """Compiled, with NumPy arrays for results: what tests do with them compiles nothing."""
  compiled = jax.jit(function)
  return lambda *arguments: jax.tree.map(np.asarray, compiled(*arguments))


@functools.cache
def weight(**static):
  """Value and straight-through gradient against a cotangent, with traced bits."""

  def run(weights, cotangent, bits):
    function = lambda w: fake_quant.fake_quant_weight(w, bits=bits, **static)
    value, pullback = jax.vjp(function, weights)
    return value, pullback(cotangent)[0], function(value)

  return in_numpy(run)


@functools.cache
def activation(**static):
  def run(inputs, cotangent, bits, bound):
    function = lambda x, bound: fake_quant.fake_quant_activation(x, bits=bits, bound=bound, **static)
    value, pullback = jax.vjp(function, inputs, bound)
    return value, *pullback(cotangent)

  return in_numpy(run)


@given(st.integers(0, 2**32 - 1), st.sampled_from([2, 3, 4, 8]), st.floats(0.2, 100))
@settings(max_examples=25, deadline=None)
def test_weights_lie_on_their_grid(seed, bits, size):
  rng = np.random.default_rng(seed)
  weights = (size * rng.uniform(0.5, 1, SHAPE[1]) * rng.uniform(-1, 1, SHAPE)).astype(np.float32)
  weights[rng.integers(SHAPE[0]), :] = size  # so that float32's epsilon, which the scale adds, is small beside it
  cotangent = rng.normal(size=SHAPE).astype(np.float32)
  value, gradient, again = weight()(weights, cotangent, bits)
  limit = 2 ** (bits - 1) - 1
  assert (np.abs(value - weights) <= size / (2 * limit) * (1 + 1e-5)).all()
  steps = np.asarray(value, np.float64) * limit / size
  np.testing.assert_allclose(steps, np.round(steps), atol=1e-4 * limit)
  np.testing.assert_allclose(again, value, rtol=2e-6)
  np.testing.assert_array_equal(gradient, cotangent)
  assert all(len(np.unique(column)) <= 2**bits - 1 for column in np.asarray(value).T)


@given(st.integers(0, 2**32 - 1), st.sampled_from([2, 4, 8]), st.floats(0.1, 1e3))
@settings(max_examples=25, deadline=None)
def test_channels_scale_independently(seed, bits, factor):
  rng = np.random.default_rng(seed)
  limit = 2 ** (bits - 1) - 1
  # Away from the ends of the bins, where the factor's rounding could decide.
  steps = rng.integers(1 - limit, limit, SHAPE) + rng.uniform(-0.4, 0.4, SHAPE) if limit > 1 else np.zeros(SHAPE)
  steps[0] = limit
  weights = (steps / limit * np.array([1, 2, 3, 5])).astype(np.float32)
  factors = np.array([1, factor, 1, 1 / factor], np.float32)
  value, scaled = (np.asarray(weight()(w, weights, bits)[0]) for w in (weights, weights * factors))
  np.testing.assert_allclose(scaled, value * factors, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("factor", [1e-5, 1e-6, 1e-8, 1e-12, 1e-20, 1e-30, 1e20])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_grid_follows_the_scale(bits, factor):
  rng = np.random.default_rng(bits)
  limit = 2 ** (bits - 1) - 1
  # Away from the ends of the bins, where the factor's rounding could decide.
  steps = rng.integers(-limit, limit, (64, 4)) + rng.uniform(-0.4, 0.4, (64, 4))
  weights = jnp.asarray(3 * np.clip(steps / limit, -1, 1), jnp.float32).at[0].set(3.0)
  grid = lambda w: fake_quant.fake_quant_weight(w, bits=bits)
  np.testing.assert_allclose(grid(factor * weights) / factor, grid(weights), rtol=1e-4)
  for signed in (True, False):
    steps = rng.integers(0, limit, 64) + (0.2 if signed else 0.5)
    inputs = jnp.asarray(3.0 * steps / (limit if signed else 2**bits), jnp.float32)
    grid = lambda x, bound: fake_quant.fake_quant_activation(x, bits=bits, bound=bound, signed=signed)
    np.testing.assert_allclose(grid(factor * inputs, factor * 3.0) / factor, grid(inputs, 3.0), rtol=1e-4)


def test_nothing_fits_into_a_range_of_zero():
  values = jnp.array([[0.0, 3.0], [0.0, -4.0]])
  weights, slope = jax.value_and_grad(lambda w: jnp.sum(fake_quant.fake_quant_weight(w, bits=4) ** 2))(values * 0)
  assert weights == 0 and (slope == 0).all()
  integers = fake_quant.quantize_weight(jnp.zeros((3, 2)), bits=8)
  assert not integers.values.any() and np.isfinite(integers.scale).all()
  for signed in (True, False):
    outputs = fake_quant.fake_quant_activation(values, bits=4, bound=0.0, signed=signed)
    np.testing.assert_allclose(outputs, 0, atol=1e-30)


def test_many_bits_leave_weights_alone_and_one_bit_nothing():
  weights = np.random.default_rng(0).uniform(-1, 1, SHAPE).astype(np.float32)
  np.testing.assert_allclose(weight()(weights, weights, 23)[0], weights, atol=1e-6)
  assert not weight()(weights, weights, 1)[0].any()
  assert fake_quant.fake_quant_weight(weights, bits=None) is weights
  static = jax.jit(functools.partial(fake_quant.fake_quant_weight, bits=4))(weights)
  np.testing.assert_allclose(static, weight()(weights, weights, 4)[0], rtol=1e-6)
  whole = weight(reduce_axes=(0, 1))(weights, weights, 4)[0]
  assert len(np.unique(np.abs(whole))) <= 8


def test_halves_round_up_and_zero_stays():
  weights = np.array([[7.0], [0.5], [-0.5], [-1.5], [0.0], [-7.0]], np.float32)
  integers = jax.jit(functools.partial(fake_quant.quantize_weight, bits=4))(weights)
  # Seven and float32's epsilon is seven, so that the scale is one.
  np.testing.assert_array_equal(integers.values.ravel(), [7, 1, 0, -1, 0, -7])
  # The largest meet the limit exactly: half a gradient from the official code, a whole one from ours.
  ones = np.ones_like(weights)
  assert weight(official_ties=True)(weights, ones, 4)[1].ravel().tolist() == [0.5, 1, 1, 1, 1, 0.5]
  assert weight()(weights, ones, 4)[1].ravel().tolist() == [1] * 6


@given(st.integers(0, 2**32 - 1), st.sampled_from([1, 2, 4, 8]), st.floats(0.01, 1e3))
@settings(max_examples=25, deadline=None)
def test_unsigned_activations_are_the_lower_ends_of_bins(seed, bits, bound):
  rng = np.random.default_rng(seed)
  inputs = (bound * rng.uniform(-0.5, 1.5, 24)).astype(np.float32)
  cotangent = rng.normal(size=24).astype(np.float32)
  value, gradient, to_bound = activation(signed=False)(inputs, cotangent, bits, np.float32(bound))
  inside = (inputs >= 0) & (inputs <= np.float32(bound))
  error = (inputs - value)[inside & (inputs < bound)]
  assert (error >= -1e-5 * bound).all() and (error < bound / 2**bits + 1e-5 * bound).all()
  assert (value[inputs < 0] == 0).all()
  np.testing.assert_allclose(value[inputs > bound], bound * (1 - 2.0**-bits), rtol=1e-4)
  np.testing.assert_array_equal(gradient, np.where(inside, cotangent, 0))
  assert to_bound == 0


def test_signed_activations_clip():
  inputs = np.array([-3.0, -1.0, -0.4, 0.0, 0.2, 1.0, 1.1], np.float32)
  value, gradient, to_bound = activation(signed=True)(inputs, np.ones(7, np.float32), 3, np.float32(1))
  np.testing.assert_allclose(value, np.array([-3, -3, -1, 0, 1, 3, 3]) / 3, rtol=1e-6)
  assert gradient.tolist() == [0, 1, 1, 1, 1, 1, 0] and to_bound == 0


@pytest.mark.parametrize("signed", [False, True])
def test_no_bound_yet_and_a_channel_that_never_fired(signed):
  inputs = np.array([[0.3, -2.0], [1e4, 5.0]], np.float32)
  bounds = np.array([-1.0, 0.0], np.float32)
  value, gradient, _ = activation(signed=signed)(inputs, np.ones((2, 2), np.float32), 4, bounds)
  np.testing.assert_array_equal(value[:, 0], inputs[:, 0])
  np.testing.assert_array_equal(gradient, [[1, 0], [1, 0]])
  assert (np.abs(value[:, 1]) <= 1.2e-7).all()
  assert fake_quant.fake_quant_activation(inputs, bits=None, bound=bounds, signed=signed) is inputs


def test_integers_stand_for_the_fake_quantized_values():
  inputs = np.random.default_rng(0).uniform(-1, 2, 24).astype(np.float32)
  for signed, (low, high) in ((True, (-7, 7)), (False, (0, 15))):
    integers = jax.jit(functools.partial(fake_quant.quantize_activation, bits=4, bound=1.5, signed=signed))(inputs)
    assert set(np.asarray(integers.values)) <= set(range(low, high + 1))
    expected = activation(signed=signed)(inputs, inputs, 4, np.float32(1.5))[0]
    np.testing.assert_allclose(np.asarray(integers.values) / np.asarray(integers.scale), expected, rtol=1e-6)


def test_straight_through():
  values = np.array([-1.5, -0.5, 0.2, 0.5, 1e4], np.float32)
  for function, expected in (
    (straight_through.straight_through_floor, [-2, -1, 0, 0, 1e4]),
    (straight_through.straight_through_round, [-1, 0, 0, 1, 1e4]),
    (lambda x: straight_through.straight_through_value(x, jnp.sign(x)), [-1, -1, 1, 1, 1]),
  ):
    value, tangent = jax.jit(lambda x, t, function=function: jax.jvp(function, (x,), (t,)))(values, 3 * values)
    assert value.tolist() == expected
    np.testing.assert_array_equal(tangent, 3 * values)
  with pytest.raises(ValueError, match="values must be floating"):
    straight_through.straight_through_round(jnp.arange(3))
  with pytest.raises(ValueError, match="shapes"):
    straight_through.straight_through_value(values, values[1:])


@pytest.mark.golden
@pytest.mark.usefixtures("x64")
def test_golden_31_quantized_resnet_quantizers(golden):
  file, seen = golden("31-quantized_resnet"), 0
  for _, arrays, _ in file.cases():
    if "kernel" in arrays:
      function = weight(official_ties=True)
      value, gradient, _ = function(arrays["kernel"], arrays["cotangent"], file.meta["weight_bits"])
      expected = arrays["out_kernel_q"], arrays["grad_kernel"]
    elif "bound" in arrays:
      signed = bool((arrays["out_x_q"] < 0).any())
      function = activation(signed=signed, official_ties=True)
      value, gradient, _ = function(arrays["x"], arrays["cotangent"], file.meta["act_bits"], arrays["bound"])
      expected = arrays["out_x_q"], arrays["grad_x"]
    else:
      continue
    seen += 1
    np.testing.assert_allclose(value, expected[0], rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(gradient, expected[1], rtol=1e-5, atol=1e-7)
  assert seen


def test_bad_input():
  weights = jnp.ones(SHAPE)
  for bits in (0, 24, 2.5, float("nan")):
    with pytest.raises(ValueError, match="bits must be an integer"):
      fake_quant.fake_quant_weight(weights, bits=bits)
  with pytest.raises(ValueError, match="bits must be an integer"):
    fake_quant.fake_quant_weight(weights, bits=jnp.float32(4))
  with pytest.raises(ValueError, match="reduce_axes"):
    fake_quant.fake_quant_weight(weights, bits=4, reduce_axes=(2,))
  with pytest.raises(ValueError, match="bound must broadcast"):
    fake_quant.fake_quant_activation(weights, bits=4, bound=jnp.ones(3), signed=True)
  with pytest.raises(ValueError, match="bound must lie in"):
    fake_quant.fake_quant_activation(weights, bits=4, bound=float("nan"), signed=True)
  with pytest.raises(ValueError, match="inputs must be floating"):
    fake_quant.fake_quant_activation(jnp.arange(3), bits=4, bound=1.0, signed=True)


def _clipped_straight_through(x, results, bound, *, bits, signed):
  value, start = results
  inside = (start <= bound) & (start >= (-bound if signed else 0))
  return value + jnp.where(inside, x - start, 0)


ROWS = [
  row(
    fake_quant.fake_quant_weight,
    lambda rng: (rng.normal(size=(6, 3)),),
    call=lambda x, bits: (fake_quant.fake_quant_weight(x, bits=bits), x),
    bad=(("weights", lambda x: (x.astype(np.int32),)),),
    surrogate=straight_through_surrogate,
    options=dict(bits=(2, 8)),
  ),
  *(
    row(
      fake_quant.fake_quant_activation,
      lambda rng: (rng.normal(size=EXAMPLES), rng.uniform(0.5, 1, EXAMPLES)),
      call=lambda x, bound, bits, signed: (
        fake_quant.fake_quant_activation(x, bits=bits, bound=bound, signed=signed),
        x,
      ),
      extreme=lambda x, bound: (extremes(x), np.resize([0.0, 1e4, -1.0], bound.shape)),
      bad=(("inputs", lambda x, b: (x.astype(np.int32), b)), ("bound", lambda x, b: (x, b[1:]))),
      surrogate=functools.partial(_clipped_straight_through, signed=signed),
      options=dict(bits=(2, 8), signed=signed),
    )
    for signed in (False, True)
  ),
]


EXEMPT = {
  "Quantized": "result of quantize_weight and quantize_activation",
  "quantize_activation": "carried by fake_quant_activation",
  "quantize_weight": "carried by fake_quant_weight",
}
