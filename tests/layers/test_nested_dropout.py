"""Nested dropout: the distribution of cut-offs (golden vectors, limits), the layer, and PCA in order."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jaxreg.layers import nested_dropout as nd
from tests.conformance import module_row, row


@pytest.mark.golden
def test_golden_nested_dropout_distribution(golden, x64):
  for case, arrays, _ in golden("07-nested_dropout").cases("dist"):
    mu, sigma, channels = arrays["mu_sigma_K"]
    p = nd.nested_cutoff_probabilities(int(channels), sigma=sigma, mu=mu)
    np.testing.assert_allclose(p, arrays["out_p"], rtol=1e-9, atol=1e-300, err_msg=case)


def test_distribution(x64):
  p = nd.nested_cutoff_probabilities(64, sigma=10.0)
  np.testing.assert_allclose(p.sum(), 1, rtol=1e-14)
  assert (np.diff(p) < 0).all()
  np.testing.assert_allclose(nd.nested_cutoff_probabilities(64, sigma=1e-200), np.eye(64)[0], atol=1e-300)
  np.testing.assert_allclose(nd.nested_cutoff_probabilities(64, sigma=1e9), 1 / 64, rtol=1e-12)
  paper = nd.nested_cutoff_probabilities(64, sigma=10.0 / np.sqrt(2), convention="paper")
  np.testing.assert_allclose(paper, p, rtol=1e-12)


def test_the_smallest_sigma_in_float32_keeps_one_channel():
  np.testing.assert_array_equal(nd.nested_cutoff_probabilities(8, sigma=1e-30), np.eye(8)[0])


def test_channels_are_kept_as_often_as_the_tail_says():
  p = nd.nested_cutoff_probabilities(8, sigma=4.0)
  counts = jax.vmap(nd.sample_cutoff, (0, None))(jax.random.split(jax.random.key(1), 20_000), p)
  kept = (np.asarray(counts)[:, None] > np.arange(8)).mean(0)
  tail = np.cumsum(np.asarray(p)[::-1])[::-1]
  np.testing.assert_array_less(np.abs(kept - tail), 3.5 * np.sqrt(tail * (1 - tail) / 20_000) + 1e-6)


def test_dropped_rows_of_the_classifier_have_no_gradient():
  rng = np.random.default_rng(0)
  features, kernel = rng.normal(size=(5, 6)), jnp.asarray(rng.normal(size=(6, 3)))
  loss = lambda v: jnp.sum(jnp.square(nd.keep_leading_channels(features, 2) @ v))
  gradient = jax.grad(loss)(kernel)
  assert (gradient[2:] == 0).all() and (gradient[:2] != 0).all()


def test_channels_on_another_axis_and_nan_beyond_the_cutoff():
  images = jnp.ones((2, 5, 3, 3)).at[:, 4].set(jnp.nan)
  kept = nd.keep_leading_channels(images, jnp.int8(4), axis=1)
  np.testing.assert_array_equal(kept[:, :4], 1)
  np.testing.assert_array_equal(kept[:, 4], 0)


def test_one_cutoff_for_the_whole_batch_and_all_channels_when_deterministic():
  layer, features = nd.NestedDropout(sigma=3.0), jnp.ones((16, 8))
  outputs = jax.jit(lambda key: layer.apply({}, features, rngs={"dropout": key}))(jax.random.key(3))
  counts = np.asarray(outputs).sum(1)
  assert len(set(counts)) == 1 and 1 <= counts[0] <= 8
  np.testing.assert_array_equal(layer.apply({}, features, deterministic=True), features)
  np.testing.assert_array_equal(nd.NestedDropout(sigma=3.0, deterministic=True).apply({}, features), features)
  np.testing.assert_array_equal(layer.apply({}, features, count=2, deterministic=True).sum(1), 2)


def test_in_nnx_through_the_bridge():
  layer = nnx.bridge.ToNNX(nd.NestedDropout(sigma=2.0), rngs=nnx.Rngs(dropout=0))
  nnx.bridge.lazy_init(layer, jnp.ones((2, 4)))
  assert layer(jnp.ones((2, 4))).shape == (2, 4)


def test_a_sweep_over_sigma_is_one_program():
  def outputs(sigma):
    return nd.NestedDropout(sigma=sigma).apply({}, jnp.ones((1, 50)), rngs={"dropout": jax.random.key(0)}).sum()

  small, large = jax.jit(jax.vmap(outputs))(jnp.array([1e-3, 1e3]))
  assert small == 1 and large > 1


def test_linear_autoencoder_finds_principal_directions_in_order():
  rng = np.random.default_rng(0)
  deviations = np.array([3.0, 2.0, 1.4, 1.0, 0.7, 0.4])
  basis = np.linalg.qr(rng.normal(size=(6, 6)))[0]
  data = jnp.asarray((rng.normal(size=(2000, 6)) * deviations) @ basis.T, jnp.float32)
  p = nd.nested_cutoff_probabilities(6, sigma=4.0)

  def loss(params):
    codes = data @ params["encoder"]
    # The expectation over the cut-off, exactly.
    errors = [jnp.mean((nd.keep_leading_channels(codes, k) @ params["decoder"] - data) ** 2) for k in range(1, 7)]
    return jnp.sum(p * jnp.stack(errors))

  params = {"encoder": jnp.asarray(rng.normal(size=(6, 6)) / 3, jnp.float32)}
  params["decoder"] = params["encoder"].T
  optimizer = optax.adam(2e-2)

  def step(carry, _):
    params, state = carry
    updates, state = optimizer.update(jax.grad(loss)(params), state)
    return (optax.apply_updates(params, updates), state), None

  (params, _), _ = jax.jit(lambda c: jax.lax.scan(step, c, length=2000))((params, optimizer.init(params)))
  principal = np.linalg.svd(data - data.mean(0), full_matrices=False)[2]
  for channel in range(3):
    direction = np.asarray(params["decoder"][channel])
    assert abs(direction @ principal[channel]) / np.linalg.norm(direction) > 0.95


def test_bad_arguments_are_refused():
  for arguments, message in (
    (dict(num_channels=0, sigma=1.0), "num_channels"),
    (dict(num_channels=3, sigma=0.0), "sigma"),
    (dict(num_channels=3, sigma=1.0, convention="text"), "convention"),
  ):
    with pytest.raises(ValueError, match=message):
      nd.nested_cutoff_probabilities(**arguments)
  with pytest.raises(ValueError, match="count"):
    nd.keep_leading_channels(jnp.ones(3), 1.5)
  with pytest.raises(ValueError, match="axis"):
    nd.keep_leading_channels(jnp.ones(3), 1, axis=1)


class _Network(nn.Module):
  @nn.compact
  def __call__(self, inputs, *, train):
    hidden = nd.NestedDropout(sigma=2.0)(nn.relu(nn.Dense(8)(inputs)), deterministic=not train)
    return nn.Dense(3, use_bias=False)(hidden)


def test_inside_a_network():
  model = _Network()
  params = model.init(jax.random.key(0), jnp.ones((2, 4)), train=False)
  outputs = model.apply(params, jnp.ones((2, 4)), train=True, rngs={"dropout": jax.random.key(1)})
  assert outputs.shape == (2, 3)


ROWS = [
  module_row(
    nd.NestedDropout(sigma=2.0),
    lambda rng: (rng.normal(size=(16, 4)),),
    options=dict(count=2),
    wide=False,
    bad=(("features", lambda h: (h.astype(np.int32),)),),
  ),
  row(
    nd.keep_leading_channels,
    lambda rng: (rng.normal(size=(16, 4)),),
    call=lambda features: nd.keep_leading_channels(features, 3),
    examples="any",
    bad=(("features", lambda h: (h.astype(np.int32),)),),
  ),
  row(
    nd.nested_cutoff_probabilities,
    lambda rng: (np.float64(rng.uniform(1, 3)),),
    call=lambda sigma: nd.nested_cutoff_probabilities(6, sigma=sigma),
    extreme=lambda sigma: (sigma * 1e4,),
    wide=True,
  ),
]
EXEMPT = {"sample_cutoff": "draws from a key; its frequencies are tested"}
