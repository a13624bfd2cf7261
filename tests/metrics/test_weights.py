"""Moments and extremes of weights."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from jaxreg.metrics import weights
from jaxreg.metrics.weights import weight_moments, weight_stats
from tests.conformance import draw_layer, row

moments = jax.jit(weight_moments, static_argnames="ddof")


def test_known_laws():
  size = 100_000
  np.testing.assert_allclose(moments(np.linspace(-3, 5, size, dtype=np.float32)), (0, 1.8), atol=1e-3)
  np.testing.assert_allclose(moments(np.resize([2.0, 7.0], size).astype(np.float32)), (0, 1), atol=1e-3)
  quantiles = stats.norm.ppf((np.arange(size) + 0.5) / size).astype(np.float32)
  np.testing.assert_allclose(moments(quantiles), (0, 3), atol=1e-2)


@given(st.integers(0, 2**32 - 1), st.floats(0.01, 100), st.floats(-10, 10))
@settings(max_examples=25, deadline=None)
def test_invariance_and_scipy(seed, scale, shift):
  weights = np.random.default_rng(seed).gamma(2.0, size=(5, 7))
  with jax.enable_x64(True):
    own, other = moments(weights, ddof=0), moments(scale * weights + shift, ddof=0)
    mirrored = moments(-scale * weights + shift, ddof=0)
  np.testing.assert_allclose(own, (stats.skew(weights, None), stats.kurtosis(weights, None, fisher=False)), rtol=1e-9)
  np.testing.assert_allclose(other, own, rtol=1e-6)
  np.testing.assert_allclose(mirrored, (-own.skewness, own.kurtosis), rtol=1e-6)


@pytest.mark.parametrize("value", [0.0, 0.3, -1e30])
def test_equal_weights_have_no_moments_and_no_gradient(value):
  both = lambda w: sum(weight_moments(w))
  total, gradient = jax.jit(jax.value_and_grad(both))(jnp.full((5, 7), value))
  assert total == 0 and (gradient == 0).all()


def test_stats_of_a_network():
  rng = np.random.default_rng(0)
  params = {"a": {"kernel": rng.normal(size=(8, 4)), "bias": np.full(4, 99.0)}, "b": rng.normal(size=(2, 3, 5))}
  params = jax.tree.map(np.float32, params)
  result = jax.jit(weight_stats)(params, threshold=jnp.float32(0.3))
  units = np.concatenate([(params["a"]["kernel"] / np.sqrt(2 / 8)).ravel(), (params["b"] / np.sqrt(2 / 6)).ravel()])
  np.testing.assert_allclose(result.largest, np.abs(units).max(), rtol=1e-6)
  np.testing.assert_allclose(result.near_zero, np.mean(np.abs(units) < 0.3), rtol=1e-6)
  each = [moments(params["a"]["kernel"]).kurtosis, moments(params["b"]).kurtosis]
  np.testing.assert_allclose(result.kurtosis, np.mean(each), rtol=1e-6)


def test_bad_input():
  with pytest.raises(ValueError, match="params must have a kernel"):
    weight_stats({"bias": jnp.ones(3)})
  with pytest.raises(ValueError, match="weights must be more than"):
    weight_moments(jnp.ones(1))
  with pytest.raises(ValueError, match="threshold must lie in"):
    weight_stats({"kernel": jnp.ones((2, 2))}, threshold=-1.0)


def test_fan_in_of_attention_and_of_stacked_kernels():
  """The queries' scale is that of their 512 inputs, and stacks of kernels are those of one kernel."""
  attention = nn.MultiHeadDotProductAttention(8, qkv_features=512)
  shapes = jax.eval_shape(attention.init, jax.random.key(0), jnp.ones((1, 2, 512)))["params"]
  for name in ("query", "key", "value", "out"):
    shape = shapes[name]["kernel"].shape
    assert (
      weights.he_deviation(shape, in_axes=weights.input_axes(f"attention/{name}/kernel", np.empty(shape))) == 1 / 16
    )
  kernel = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)
  alone = weights.weight_stats({"kernel": kernel})
  stacked = weights.weight_stats({"kernel": np.stack([kernel, kernel])}, in_axes=lambda path, leaf: (1,))
  np.testing.assert_allclose(stacked[:2], alone[:2], rtol=1e-6)
  for axes in ((0, 0), (0, -2), (2,)):
    with pytest.raises(ValueError, match="in_axes must be different axes"):
      weights.he_deviation((6, 4), in_axes=axes)


ROWS = [
  row(
    weights.weight_moments,
    lambda rng: (rng.gamma(2.0, size=(3, 4)),),
    bad=(("weights", lambda weights: (weights.astype(np.int32),)), ("weights", lambda weights: (weights[:1, :1],))),
    wide=True,
  ),
  row(
    weights.weight_stats,
    draw_layer,
    bad=(
      ("weights", lambda values: (jax.tree.map(lambda leaf: leaf.astype(np.int32), values),)),
      ("params", lambda values: ({"bias": values["bias"]},)),
    ),
    differentiable=False,
    wide=True,
    options=dict(threshold=(0.0, 0.5)),
  ),
]


EXEMPT = {
  "WeightMoments": "result of weight_moments",
  "WeightStats": "result of weight_stats",
  "flax_kernel": "transposes, or not, by a name",
  "he_deviation": "of Python integers",
  "input_axes": "of a name and a shape",
  "is_kernel": "reads a name",
  "parameter_name": "of the keys of a pytree",
}
