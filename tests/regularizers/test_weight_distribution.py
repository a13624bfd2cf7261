"""Penalties on the kurtosis and skewness of weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxreg.regularizers import weight_distribution
from tests.conformance import draw_layer, row

penalties = jax.jit(
  lambda weights, target: (
    weight_distribution.kurtosis_penalty(weights, target=target),
    weight_distribution.skewness_penalty(weights),
    weight_distribution.weight_distribution_penalty(weights, target=target),
  )
)


@pytest.mark.golden
def test_golden_11_eq_net_weight_distribution(golden, x64):
  file = golden("11-eq_net")
  target = file.meta["kurt_target"]
  read = 0
  for _, arrays, _ in file.cases():
    if "out_kurt_loss" not in arrays:
      continue
    names = sorted((name for name in arrays if name[0] == "w" and name[1:].isdigit()), key=lambda name: int(name[1:]))
    weights = [jnp.asarray(arrays[name]) for name in names[1:]]  # without the first layer
    kurtosis, kurtosis_gradients = jax.value_and_grad(weight_distribution.kurtosis_penalty)(weights, target=target)
    skewness, skewness_gradients = jax.value_and_grad(weight_distribution.skewness_penalty)(weights)
    np.testing.assert_allclose(kurtosis, arrays["out_kurt_loss"], rtol=1e-8)
    np.testing.assert_allclose(skewness, arrays["out_skew_loss"], rtol=1e-8)
    for name, of_kurtosis, of_skewness in zip(names[1:], kurtosis_gradients, skewness_gradients):
      np.testing.assert_allclose(of_kurtosis, arrays[f"grad_kurt_{name}"], rtol=1e-8, atol=1e-12)
      np.testing.assert_allclose(of_skewness, arrays[f"grad_skew_{name}"], rtol=1e-8, atol=1e-12)
    read += 1
  assert read


@given(st.integers(0, 2**32 - 1), st.floats(0.01, 100), st.booleans(), st.floats(-10, 10))
@settings(max_examples=20, deadline=None)
def test_invariance(seed, scale, negative, shift):
  weights = [np.random.default_rng(seed + index).gamma(2.0, size=(5, 7)) for index in range(2)]
  factor = -scale if negative else scale
  with jax.enable_x64(True):
    own = [np.asarray(value) for value in penalties(weights, jnp.float64(1.8))]
    other = [np.asarray(value) for value in penalties([factor * leaf + shift for leaf in weights], jnp.float64(1.8))]
  np.testing.assert_allclose(other, own, rtol=1e-6, atol=1e-9)
  np.testing.assert_allclose(own[2], 0.015 * own[0] + own[1], rtol=1e-9)


def test_uniform_weights_have_no_penalty():
  kurtosis, skewness, total = penalties([np.linspace(-1, 3, 100_000, dtype=np.float32)], jnp.float32(1.8))
  assert max(kurtosis, skewness, total) < 1e-6


def test_bad_input():
  with pytest.raises(ValueError, match="weights must have at least one"):
    weight_distribution.kurtosis_penalty([])
  with pytest.raises(ValueError, match="target must lie in"):
    weight_distribution.kurtosis_penalty([jnp.ones(3)], target=0.5)
  with pytest.raises(ValueError, match="kurtosis_weight must lie in"):
    weight_distribution.weight_distribution_penalty([jnp.ones(3)], kurtosis_weight=-1.0)


_BAD_WEIGHTS = (("weights", lambda values: (jax.tree.map(lambda leaf: np.ones(leaf.shape, np.int32), values),)),)


ROWS = [
  row(weight_distribution.kurtosis_penalty, draw_layer, bad=_BAD_WEIGHTS, wide=True, options=dict(target=(1.2, 3.0))),
  row(weight_distribution.skewness_penalty, draw_layer, bad=_BAD_WEIGHTS, wide=True),
  row(
    weight_distribution.weight_distribution_penalty,
    draw_layer,
    bad=_BAD_WEIGHTS,
    wide=True,
    options=dict(kurtosis_weight=(0.0, 1.0), skewness_weight=(0.0, 1.0), target=(1.2, 3.0)),
  ),
]
