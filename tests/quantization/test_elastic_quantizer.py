"""Quantizers with learned grids: the official numbers, gradients, extremes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxreg.quantization import elastic_quantizer
from jaxreg.quantization.elastic_quantizer import ELASTIC_BITS, lsq_calibrate, lsq_quantize
from tests.conformance import EXAMPLES, row


@jax.jit
def pulled(values, scale, offset, cotangent, bits, signed, factor):
  """The quantized values and the gradients in values, scale and offset."""
  call = lambda x, s, o: lsq_quantize(x, s, o, bits=bits, signed=signed, gradient_factor=factor)
  out, pull = jax.vjp(call, values, scale, offset)
  return out, pull(cotangent)


@functools.partial(jax.jit, static_argnames=("symmetric", "per_channel", "candidates"))
def calibrated(values, signed, symmetric, per_channel=False, candidates=80):
  return lsq_calibrate(
    values, symmetric=symmetric, per_channel=per_channel, signed=signed, candidates=candidates
  )  # fmt: skip


def largest_integer(bits, signed):
  return 2 ** (bits - 1) - 1 if signed else 2**bits - 1


@pytest.mark.golden
def test_golden_11_eq_net_quantizers(golden, x64):
  file = golden("11-eq_net")
  for _, arrays, _ in file.cases():
    if "w" in arrays:
      check_golden_weights(arrays, file.meta["bits"])
    kinds = {name.removeprefix("x_") for name in arrays if name.startswith("x_")}
    for kind in kinds:
      check_golden_activations(arrays, kind, file.meta["bits"])


def check_golden_weights(arrays, bits):
  weights = arrays["w"]  # outputs first
  for granularity in ("layer", "channel"):
    for form in ("sym", "asym"):
      name = f"{form}_{granularity}"
      candidates = 5 if (form, granularity) == ("sym", "channel") else 80
      found = calibrated(jnp.moveaxis(weights, 0, -1), True, form == "sym", granularity == "channel", candidates)
      check_table(found, arrays, name)
      factor = lambda p: 1 / np.sqrt(p * weights.size)
      if granularity == "channel":
        factor = lambda p: 2 / np.sqrt(p * weights.size / weights.shape[1])
      for index, b in enumerate(bits):
        suffix = f"bits{index}_{granularity}_{form}"
        axes = (-1,) + (1,) * (weights.ndim - 1)
        check_golden_quantizer(arrays, "w", "cotangent", name, suffix, b, True, factor, lambda s: s.reshape(axes))


def check_golden_activations(arrays, kind, bits):
  values = arrays[f"x_{kind}"]
  signed = bool((values < -1e-9).any())
  for form in ("sym", "asym"):
    check_table(calibrated(values, signed, form == "sym"), arrays, f"{form}_{kind}")
    factor = lambda p: 1 / np.sqrt(p * values.size)
    for index, b in enumerate(bits):
      suffix = f"{kind}_bits{index}_{form}"
      reshape = lambda s: s.reshape((1,) * values.ndim)
      check_golden_quantizer(arrays, "x", f"cotangent_{kind}", f"{form}_{kind}", suffix, b, signed, factor, reshape)


def check_table(found, arrays, name):
  np.testing.assert_allclose(found.scale, arrays[f"init_scale_{name}"], rtol=1e-8)
  np.testing.assert_allclose(found.offset, arrays[f"init_beta_{name}"], rtol=1e-8)


def check_golden_quantizer(arrays, letter, cotangent, table, suffix, bits, signed, factor, reshape):
  column = bits - ELASTIC_BITS[0]
  scale = arrays[f"init_scale_{table}"][:, column]
  used = arrays.get(f"used_beta_{table}", arrays[f"init_beta_{table}"])[:, column]
  values = arrays["w"] if letter == "w" else arrays["x_" + cotangent.removeprefix("cotangent_")]
  out, (grad_values, grad_scale, grad_offset) = pulled(
    values, reshape(scale), reshape(used), arrays[cotangent], bits, signed, factor(largest_integer(bits, signed))
  )
  np.testing.assert_allclose(out, arrays[f"out_{letter}q_{suffix}"], rtol=1e-8, atol=1e-12)
  np.testing.assert_allclose(grad_values, arrays[f"grad_{letter}_{suffix}"], rtol=1e-8, atol=1e-12)
  np.testing.assert_allclose(np.ravel(grad_scale), arrays[f"grad_scale_{suffix}"], rtol=1e-8, atol=1e-12)
  if f"grad_beta_{suffix}" in arrays:
    np.testing.assert_allclose(np.ravel(grad_offset), arrays[f"grad_beta_{suffix}"], rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("factor", [1e-4, 1e-6, 1e-8, 1e-12])
def test_calibrated_grids_follow_the_scale(factor):
  values = jnp.asarray(np.random.default_rng(0).normal(size=(64, 4)), jnp.float32)
  for symmetric, signed in ((True, True), (False, True), (False, False)):
    inputs = values if signed else jnp.abs(values)

    def error(inputs):
      table = lsq_calibrate(inputs, bits=(4,), symmetric=symmetric, signed=signed)
      on_grid = lsq_quantize(inputs, table.scale[0], table.offset[0], bits=4, signed=signed)
      return jnp.sqrt(jnp.mean((on_grid - inputs) ** 2))

    np.testing.assert_allclose(error(factor * inputs) / factor, error(inputs), rtol=0.05)


def test_a_step_of_zero_leaves_nothing():
  values = jnp.array([-1.0, 0.0, 2.0])
  value, slopes = jax.value_and_grad(lambda s: lsq_quantize(values, s, bits=4).sum())(jnp.zeros(()))
  assert abs(value) < 1e-20 and np.isfinite(slopes)


@given(st.integers(0, 2**32 - 1), st.integers(2, 8), st.booleans(), st.booleans())
@settings(max_examples=30, deadline=None)
def test_grid_gradients_and_zero_point(seed, bits, signed, wide):
  rng = np.random.default_rng(seed)
  values, cotangent = rng.normal(size=40), rng.normal(size=40)
  scale = (9.0 if wide else 0.5) * rng.uniform(0.5, 1) / 2 ** (bits - 1)
  step = scale + 1e-6
  zero_point = rng.integers(-3, 4)
  offset = -step * zero_point if signed else min(values.min(), -9.0 if wide else 0.0) - step / 3
  with jax.enable_x64(True):
    out, gradients = pulled(values, jnp.float64(scale), jnp.float64(offset), cotangent, bits, signed, jnp.float64(0.7))
    out, (grad_values, grad_scale, grad_offset) = np.asarray(out), jax.tree.map(np.asarray, gradients)
  low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
  ratio = (values - offset) / step
  integers = np.round(np.clip(ratio, low, high))
  found = (out - offset) / step
  np.testing.assert_allclose(found, np.round(found), atol=1e-9)
  assert low <= np.round(found).min() and np.round(found).max() <= high and len(np.unique(integers)) <= 2**bits
  inside = (low <= ratio) & (ratio <= high)
  np.testing.assert_allclose(out, integers * step + offset, rtol=1e-9, atol=1e-12)
  np.testing.assert_allclose(grad_values, cotangent * inside, rtol=1e-9, atol=1e-12)
  on_scale = np.where(inside, integers - ratio, integers)
  np.testing.assert_allclose(grad_scale, 0.7 * np.sum(cotangent * on_scale), rtol=1e-9, atol=1e-9)
  np.testing.assert_allclose(grad_offset, 0.7 * np.sum(cotangent * ~inside), rtol=1e-9, atol=1e-12)
  if inside.all():
    assert grad_offset == 0
  if signed:  # the form with an integer zero point
    shifted = step * (np.clip(np.round(values / step) + zero_point, low, high) - zero_point)
    tied = np.abs(np.abs(values / step) % 1 - 0.5) < 1e-6
    np.testing.assert_allclose(np.where(tied, out, shifted), out, atol=1e-9)


def test_ends_of_the_grid_have_the_whole_gradient():
  """As the zeros of a ReLU, on which `jnp.clip` would halve it."""
  values = jnp.array([0.0, 3.0, -1.0, 4.0])
  gradient = jax.grad(lambda x: lsq_quantize(x, jnp.array(1.0 - 1e-6), bits=2, signed=False).sum())(values)
  np.testing.assert_array_equal(gradient, [1, 1, 0, 0])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_finite_at_extremes(dtype):
  values = jnp.array([1e4, -1e4, 0.0, 1e-4], dtype)
  for scale in (0.0, 1e-4, 1e4):
    out, gradients = pulled(values, jnp.float32(scale), jnp.float32(0), jnp.ones_like(values), 8, True, 1.0)
    assert out.dtype == dtype and all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves((out, gradients)))


def test_more_bits_and_more_channels_are_more_accurate():
  weights = np.random.default_rng(0).normal(size=(6, 5, 4)).astype(np.float32) * np.array([0.1, 1, 2, 5], np.float32)
  errors = {}
  for per_channel in (False, True):
    table = calibrated(weights, True, False, per_channel)
    for bits in (2, 4, 8):
      out, _ = pulled(weights, *(leaf[:, bits - 2] for leaf in table), np.zeros_like(weights), bits, True, 1.0)
      errors[per_channel, bits] = np.mean(np.abs(out - weights) ** 2.4)
  for bits in (2, 4, 8):
    assert errors[True, bits] <= errors[False, bits]
  for per_channel in (False, True):
    assert errors[per_channel, 8] <= errors[per_channel, 4] <= errors[per_channel, 2]


def _lsq_surrogate(x, results, scale, *, bits):
  """The identity on the grid and constant beyond, about the point of the row's second result."""
  value, point = results
  half = 2.0 ** (bits - 1)
  ratio = point / (scale + 1e-6)
  return value + jnp.where((ratio >= -half) & (ratio <= half - 1), x - point, 0)


ROWS = [
  row(
    elastic_quantizer.lsq_quantize,
    lambda rng: (rng.normal(size=EXAMPLES), np.array(0.3)),
    call=lambda x, scale, bits: (elastic_quantizer.lsq_quantize(x, scale, bits=bits), x),
    bad=(
      ("values", lambda x, scale: (x.astype(np.int32), scale)),
      ("scale", lambda x, scale: (x, np.ones(3))),
      ("scale", lambda x, scale: (x, scale.astype(np.int32))),
    ),
    surrogate=_lsq_surrogate,
    options=dict(bits=(2, 8)),
  ),
]


EXEMPT = {
  "ELASTIC_BITS": "numbers",
  "ElasticQuantizer": "a module around lsq_quantize",
  "LsqTable": "result of lsq_calibrate",
  "lsq_calibrate": "a search whose ties rounding decides; has its golden test",
}
