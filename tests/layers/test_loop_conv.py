"""Convolutions for loops: those of JAX, with the same gradients."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxreg.layers import loop_conv
from jaxreg.layers.loop_conv import loop_conv_general_dilated
from tests.conformance import row

# Size of the inputs, extents of the kernel, strides, padding.
CASES = {
  "same": ((6, 7), (3, 3), (1, 1), "SAME"),
  "strided": ((7, 8), (3, 3), (2, 2), "SAME"),
  "unequal": ((9, 6), (3, 2), (2, 3), "VALID"),
  "stem": ((12, 12), (7, 7), (2, 2), ((3, 3), (3, 3))),
  "point": ((5, 5), (1, 1), (2, 2), "SAME"),
  "cropped": ((6, 6), (2, 3), (1, 1), ((-1, 0), (2, -1))),
  "wide": ((4, 4), (3, 3), (1, 1), ((4, 3), (2, 5))),
  "space": ((5, 4, 6), (3, 3, 3), (1, 1, 1), "SAME"),
  "strided in space": ((6, 7, 5), (3, 2, 3), (2, 1, 2), "SAME"),
}


def layout(kernel):
  return ("NHWC", "HWIO", "NHWC") if kernel.ndim == 4 else ("NDHWC", "DHWIO", "NDHWC")


@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_are_those_of_jax(case, x64):
  size, extents, strides, padding = CASES[case]
  keys = jax.random.split(jax.random.key(0), 3)
  inputs, kernel = jax.random.normal(keys[0], (2, *size, 3)), jax.random.normal(keys[1], (*extents, 3, 4))

  def outcome(conv):
    run = lambda inputs, kernel: conv(inputs, kernel, strides, padding, dimension_numbers=layout(kernel))
    outputs, pull = jax.vjp(run, inputs, kernel)
    return outputs, *pull(jax.random.normal(keys[2], outputs.shape))

  for new, old in zip(outcome(loop_conv_general_dilated), outcome(jax.lax.conv_general_dilated)):
    np.testing.assert_allclose(new, old, rtol=1e-12, atol=1e-12)


def test_the_new_gradient_is_taken_where_it_should_be():
  """On a CPU, where the suite runs: otherwise the comparisons with JAX would compare JAX with itself."""
  for size, extents, strides, padding in CASES.values():
    inputs, kernel = jnp.ones((2, *size, 3)), jnp.ones((*extents, 3, 4))
    for dtype in (jnp.float32, jnp.bfloat16):
      run = lambda x, k: loop_conv_general_dilated(x, k, strides, padding, dimension_numbers=layout(k))
      program = jax.make_jaxpr(run)(inputs.astype(dtype), kernel.astype(dtype))
      assert ("custom_vjp" in str(program)) == (jax.default_backend() == "cpu")
      assert program.out_avals[0].dtype == dtype


def test_half_precision():
  keys = jax.random.split(jax.random.key(0), 2)
  inputs, kernel = jax.random.normal(keys[0], (2, 6, 6, 3)), jax.random.normal(keys[1], (3, 3, 3, 4))

  def slopes(dtype):
    loss = lambda x, k: loop_conv_general_dilated(x, k, (2, 2), "SAME", dimension_numbers=layout(kernel)).sum()
    return jax.grad(loss, argnums=(0, 1))(inputs.astype(dtype), kernel.astype(dtype))

  for low, high in zip(slopes(jnp.bfloat16), slopes(jnp.float32)):
    assert low.dtype == jnp.bfloat16
    # Eight bits of mantissa, in the operands and in the result.
    np.testing.assert_allclose(low.astype(jnp.float32), high, rtol=2e-2, atol=2e-2 * float(jnp.abs(high).max()))


def test_second_derivatives_and_lanes(x64):
  keys = jax.random.split(jax.random.key(0), 2)
  inputs, kernels = jax.random.normal(keys[0], (2, 5, 5, 3)), jax.random.normal(keys[1], (4, 3, 3, 3, 2))

  def curvature(conv):
    loss = lambda kernel: jnp.sum(jnp.tanh(conv(inputs, kernel, (2, 2), "SAME", dimension_numbers=layout(kernel))))
    return jax.vmap(lambda kernel: jax.jvp(jax.grad(loss), (kernel,), (jnp.ones_like(kernel),))[1])(kernels)

  new, old = curvature(loop_conv_general_dilated), curvature(jax.lax.conv_general_dilated)
  np.testing.assert_allclose(new, old, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("options", [{"feature_group_count": 2}, {"kernel_dilation": 2}, {"input_dilation": 2}])
def test_other_convolutions_are_left_to_jax(options):
  inputs = jax.random.normal(jax.random.key(0), (2, 6, 6, 4))
  layers = [
    nn.Conv(4, (3, 3), padding=[(1, 1), (1, 1)], conv_general_dilated=conv, **options)
    for conv in (None, loop_conv_general_dilated)
  ]
  variables = layers[0].init(jax.random.key(1), inputs)
  np.testing.assert_array_equal(*[layer.apply(variables, inputs) for layer in layers])


def test_what_is_wrong_is_an_error():
  with pytest.raises((TypeError, ValueError), match="feature"):
    loop_conv_general_dilated(
      jnp.ones((1, 4, 4, 3)), jnp.ones((3, 3, 2, 5)), (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


ROWS = [
  row(
    loop_conv.loop_conv_general_dilated,
    lambda rng: (rng.normal(size=(2, 5, 5, 2)), rng.normal(size=(3, 3, 2, 3))),
    call=lambda images, kernel: loop_conv.loop_conv_general_dilated(
      images, kernel, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    ),
  ),
]
