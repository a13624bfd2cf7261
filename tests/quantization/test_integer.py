"""Integer inference, and AQT's own quantized products."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxreg.quantization import bounds, integer
from jaxreg.quantization.fake_quant import (
  fake_quant_activation,
  fake_quant_weight,
  quantize_activation,
  quantize_weight,
)
from jaxreg.quantization.layers import QConv, QDense
from tests.conformance import EXAMPLES, row

EPS = np.finfo(np.float32).eps


def test_dot_is_exact():
  rng = np.random.default_rng(0)
  lhs, rhs = rng.integers(-128, 128, (2, 3, 70), np.int8), rng.integers(-128, 128, (70, 4), np.int8)
  lhs[0, 0], rhs[:, 0] = -128, -128
  got = integer.integer_dot(lhs, rhs)
  assert got.dtype == jnp.int32
  np.testing.assert_array_equal(got, lhs.astype(int) @ rhs.astype(int))


@functools.partial(jax.jit, static_argnames=("signed", "strides", "padding"))
def both(inputs, kernel, bound, bits, signed, **options):
  """The layer in integers and on fake-quantized operands in floating point, and its integer operands."""
  grids = dict(weight_bits=bits[0], act_bits=bits[1], bound=bound, signed=signed)
  x = fake_quant_activation(inputs, bits=bits[1], bound=bound, signed=signed)
  w = fake_quant_weight(kernel, bits=bits[0])
  operands = (
    quantize_activation(inputs, bits=bits[1], bound=bound, signed=signed),
    quantize_weight(kernel, bits=bits[0]),
  )
  if kernel.ndim == 2:
    return integer.integer_dense(inputs, kernel, **grids), x @ w, operands
  fake = jax.lax.conv_general_dilated(
    x, w, options["strides"], options["padding"], dimension_numbers=("NHWC", "HWIO", "NHWC")
  )
  return integer.integer_conv(inputs, kernel, **grids, **options), fake, operands


@pytest.mark.parametrize("signed", [False, True])
def test_dense_with_scales_that_are_powers_of_two_is_equal_bit_for_bit(signed):
  """Then the fake-quantized product is exact in floating point too."""
  rng = np.random.default_rng(1)
  inputs, kernel = rng.uniform(-0.5, 1.2, (8, 30)), rng.uniform(-0.9, 0.9, (30, 5))
  kernel[0] = 127 / 128 - EPS  # scale 127 / (127 / 128)
  bound = np.float32((127 / 128 if signed else 1) - EPS)
  integers, fake, (x, w) = both(inputs.astype(np.float32), kernel.astype(np.float32), bound, (8, 8), signed)
  assert {float(x.scale), *np.ravel(w.scale)} == ({128} if signed else {128, 256})
  np.testing.assert_array_equal(integers, fake)
  np.testing.assert_array_equal(integers, np.asarray(x.values) @ np.asarray(w.values) / (x.scale * w.scale))


@pytest.mark.parametrize("bits", [(8, 8), (4, 4), (2, 8)])
@pytest.mark.parametrize("signed", [False, True])
def test_dense_is_the_fake_quantized_one_up_to_rounding(signed, bits):
  rng = np.random.default_rng(2)
  inputs, kernel = rng.normal(size=(8, 30)).astype(np.float32), rng.normal(size=(30, 5)).astype(np.float32)
  integers, fake, _ = both(inputs, kernel, np.float32(1.3), bits, signed)
  np.testing.assert_allclose(integers, fake, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("signed, strides, padding", [(False, (2, 1), "SAME"), (True, (1, 2), ((1, 2), (0, 3)))])
def test_conv_is_the_fake_quantized_one_up_to_rounding(signed, strides, padding):
  rng = np.random.default_rng(3)
  inputs, kernel = rng.normal(size=(2, 7, 6, 3)).astype(np.float32), rng.normal(size=(3, 2, 3, 4)).astype(np.float32)
  integers, fake, _ = both(inputs, kernel, np.float32(1.3), (8, 8), signed, strides=strides, padding=padding)
  np.testing.assert_allclose(integers, fake, rtol=1e-5, atol=1e-5)


def test_network_in_integers_is_the_fake_quantized_one_with_bounds_per_tensor():
  """A residual network without normalisation in between: its two kinds of layers, and all their options."""

  class Network(nn.Module):
    conv: type = QConv
    dense: type = QDense

    @nn.compact
    def __call__(self, images):
      hidden = nn.relu(self.conv(3, (3, 3), strides=(2, 2), weight_bits=8, act_bits=8, signed=True)(images))
      return self.dense(2, weight_bits=4, act_bits=4)(hidden.mean((1, 2)))

  images = np.random.default_rng(5).normal(size=(4, 4, 4, 2)).astype(np.float32)

  @jax.jit
  def outputs():
    variables = Network(name="n").init(jax.random.key(1), images)
    stats = Network().apply(variables, images, mutable=["quant_stats"])[1]["quant_stats"]
    frozen = bounds.freeze_bounds(stats, per_tensor=False)
    variables = {**variables, "quant_stats": bounds.per_tensor_bounds(frozen)}
    # The layers' names come from their classes.
    renamed = {
      group: {name.replace("Q", "Integer"): value for name, value in tree.items()}
      for group, tree in {**variables, "quant_stats": frozen}.items()
    }
    return Network(integer.IntegerConv, integer.IntegerDense).apply(renamed, images), Network().apply(variables, images)

  np.testing.assert_allclose(*outputs(), rtol=1e-5, atol=1e-6)


@pytest.mark.golden
@pytest.mark.usefixtures("x64")
def test_golden_31_quantized_resnet_aqt(golden):
  file, seen = golden("31-quantized_resnet"), 0
  for _, arrays, _ in file.cases():
    for key in [key for key in arrays if key.startswith("out_y_int")]:
      bits = int(key.removeprefix("out_y_int"))
      product = integer.aqt_dot_general(bits=bits, quantized_backward=False)
      dims = (((1,), (0,)), ((), ()))

      @jax.jit
      def run(x, w, cotangent, product=product):
        value, pullback = jax.vjp(lambda x, w: product.apply({}, x, w, dims, None), x, w)
        return value, *pullback(cotangent)

      expected = arrays[key], arrays[f"grad_x_int{bits}"], arrays[f"grad_w_int{bits}"]
      for got, wanted in zip(run(arrays["x"], arrays["w"], arrays["cotangent"]), expected):
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-6)
      seen += 1
  assert seen


def test_aqt_backward_of_quantized_operands():
  x, w = jnp.asarray(np.random.default_rng(4).normal(size=(2, 5, 5)), jnp.float32)
  dims = (((1,), (0,)), ((), ()))
  product = integer.aqt_dot_general(bits=4)
  gradient = jax.jit(jax.grad(lambda w: product.apply({}, x, w, dims, None).sum()))(w)
  scale = np.abs(x).max(1, keepdims=True) / 7.5
  np.testing.assert_allclose(gradient, (np.round(x / scale).clip(-7, 7) * scale).T @ np.ones((5, 5)), rtol=1e-5)


def test_aqt_convolutions_still_have_no_gradient():
  """When this fails, AQT's convolutions can be trained and `QConv` need no longer be the only way."""
  from aqt.jax.v2 import aqt_conv_general

  conv = aqt_conv_general.make_conv_general_dilated(aqt_conv_general.conv_general_dilated_make(2, 8, 8))
  layer = nn.Conv(2, (3, 3), conv_general_dilated=conv)
  x = jax.random.normal(jax.random.key(0), (1, 4, 4, 1))

  @jax.jit
  def run():
    params = layer.init(jax.random.key(1), x)
    return jax.value_and_grad(lambda params: layer.apply(params, x).sum())(params)

  value, gradient = run()
  assert value != 0 and not gradient["params"]["kernel"].any()


def test_bad_input():
  x, w = jnp.ones((2, 3)), jnp.ones((3, 4))
  options = dict(weight_bits=8, act_bits=8, bound=1.0, signed=True)
  with pytest.raises(ValueError, match="lhs must be int8"):
    integer.integer_dot(x, w)
  with pytest.raises(ValueError, match="rhs must be"):
    integer.integer_dot(jnp.ones((2, 3), jnp.int8), jnp.ones((4, 3), jnp.int8))
  with pytest.raises(ValueError, match="weight_bits must be"):
    integer.integer_dense(x, w, **{**options, "weight_bits": 9})
  with pytest.raises(ValueError, match="act_bits must be"):
    integer.integer_dense(x, w, **{**options, "act_bits": float("nan")})
  with pytest.raises(ValueError, match="one number for all channels"):
    integer.integer_dense(x, w, **{**options, "bound": jnp.ones(3)})
  with pytest.raises(ValueError, match="kernel must have 4 axes"):
    integer.integer_conv(x, w, **options)
  with pytest.raises(ValueError, match="bits must be an integer"):
    integer.aqt_dot_general(bits=9)


ROWS = [
  row(
    integer.integer_dense,
    lambda rng: (rng.normal(size=(EXAMPLES, 6)),),
    call=lambda x, **bits: integer.integer_dense(x, jnp.cos(jnp.arange(18.0)).reshape(6, 3), **bits),
    bad=(("inputs", lambda x: (x.astype(np.int32),)), ("kernel", lambda x: (x[:, 1:],))),
    examples="any",
    differentiable=False,
    options=dict(bound=1.5, signed=False, weight_bits=(2, 8), act_bits=(2, 8)),
  ),
  row(
    integer.integer_conv,
    lambda rng: (rng.normal(size=(2, 4, 3, 2)),),
    call=lambda x, **bits: integer.integer_conv(x, jnp.cos(jnp.arange(24.0)).reshape(2, 2, 2, 3), **bits),
    bad=(("inputs", lambda x: (x.astype(np.int32),)), ("kernel", lambda x: (x[..., 1:],))),
    differentiable=False,
    options=dict(bound=1.5, signed=True, weight_bits=(2, 8), act_bits=(2, 8)),
  ),
]


EXEMPT = {
  "IntegerConv": "a module around integer_conv",
  "IntegerDense": "a module around integer_dense",
  "aqt_dot_general": "a module of AQT",
  "integer_dot": "carried by integer_dense",
}
