"""qwix as a provider: Linen and NNX, dense and convolutional, integers in the program, gradients."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jaxreg.quantization import qwix_quantized


class _Linen(nn.Module):
  @nn.compact
  def __call__(self, images):
    hidden = nn.relu(nn.Conv(8, (3, 3))(images))
    return nn.Dense(3)(hidden.mean((1, 2)))


class _Nnx(nnx.Module):
  def __init__(self, rngs):
    self.conv = nnx.Conv(2, 8, (3, 3), rngs=rngs)
    self.dense = nnx.Linear(8, 3, rngs=rngs)

  def __call__(self, images):
    return self.dense(nnx.relu(self.conv(images)).mean((1, 2)))


@pytest.fixture
def images():
  return jnp.asarray(np.random.default_rng(0).normal(size=(16, 6, 6, 2)), jnp.float32)


def test_linen_trains_in_integers(images):
  labels = jnp.asarray(images.mean((1, 2, 3)) > 0, jnp.int32)
  model = qwix_quantized(_Linen(), weight_bits=8, act_bits=8)
  params = model.init(jax.random.key(0), images)
  assert jax.tree.structure(params) == jax.tree.structure(_Linen().init(jax.random.key(0), images))
  np.testing.assert_allclose(model.apply(params, images), _Linen().apply(params, images), atol=0.05)
  loss = lambda p: optax.softmax_cross_entropy_with_integer_labels(model.apply(p, images), labels).mean()
  assert "i8[" in str(jax.make_jaxpr(loss)(params))
  optimizer = optax.adam(0.02)

  def step(carry, _):
    params, state = carry
    value, gradient = jax.value_and_grad(loss)(params)
    updates, state = optimizer.update(gradient, state)
    return (optax.apply_updates(params, updates), state), value

  _, losses = jax.lax.scan(step, (params, optimizer.init(params)), length=60)
  assert losses[-1] < 0.7 * losses[0]


def test_nnx_and_bits(images):
  plain = _Nnx(nnx.Rngs(0))
  error = lambda bits: float(
    jnp.abs(qwix_quantized(plain, images, weight_bits=bits, act_bits=bits)(images) - plain(images)).max()
  )
  assert 0 < error(8) < error(6) < error(5)  # int4 in a convolution is nothing that XLA compiles for CPUs


def test_int4_in_products():
  inputs = jnp.asarray(np.random.default_rng(1).normal(size=(4, 16)), jnp.float32)
  model = qwix_quantized(nn.Dense(8), weight_bits=4, act_bits=8)
  params = model.init(jax.random.key(0), inputs)
  assert "i4[" in str(jax.make_jaxpr(model.apply)(params, inputs))
  plain = nn.Dense(8).apply(params, inputs)
  assert 0 < jnp.linalg.norm(model.apply(params, inputs) - plain) < 0.2 * jnp.linalg.norm(plain)


def test_gradients_of_a_convolution_are_straight_through(images):
  params = _Linen().init(jax.random.key(1), images)
  total = lambda model: jax.grad(lambda p: jnp.sum(jnp.sin(model.apply(p, images))))(params)
  plain, quantized = total(_Linen()), total(qwix_quantized(_Linen(), weight_bits=8, gradient_bits=8))
  for one, other in zip(jax.tree.leaves(plain), jax.tree.leaves(quantized)):
    assert jnp.linalg.norm(one - other) < 0.05 * jnp.linalg.norm(one)


def test_only_the_layers_that_match(images):
  params = _Linen().init(jax.random.key(1), images)
  program = str(jax.make_jaxpr(qwix_quantized(_Linen(), layers="nothing").apply)(params, images))
  assert "i8[" not in program
  weights_only = str(jax.make_jaxpr(qwix_quantized(_Linen(), act_bits=None).apply)(params, images))
  assert "i8[" in weights_only


def test_bad_bits_are_refused():
  for name in ("weight_bits", "act_bits", "gradient_bits"):
    with pytest.raises(ValueError, match=name):
      qwix_quantized(_Linen(), **{name: 9})
  with pytest.raises(ValueError, match="[Ii]nputs"):
    qwix_quantized(_Nnx(nnx.Rngs(0)))


EXEMPT = {"qwix_quantized": "takes a network; its promises are tested"}
