"""Bandwidth rules against NumPy, masks, and ties."""

import jax
import numpy as np
import pytest
from scipy.spatial.distance import pdist

from jaxreg.kernels import bandwidths
from tests.conformance import row

RULES = (bandwidths.median_bandwidth, bandwidths.silverman_bandwidth, bandwidths.ten_median_square_bandwidth)

ROWS = [
  row(
    rule,
    lambda rng: (rng.normal(size=(6, 3)),),
    bad=(("inputs", lambda x: (x.astype(np.int32),)), ("inputs", lambda x: (x[0],))),
    differentiable=False,
    wide=True,
  )
  for rule in RULES
]


@pytest.mark.parametrize("count", [5, 8])
def test_rules_are_numpys(count, x64):
  inputs = np.random.default_rng(count).normal(size=(count, 3)) + 7
  np.testing.assert_allclose(bandwidths.median_bandwidth(inputs), np.median(pdist(inputs)), rtol=1e-9)
  doubled = pdist(np.concatenate([inputs, inputs]), "sqeuclidean")
  np.testing.assert_allclose(bandwidths.ten_median_square_bandwidth(inputs), 10 * np.median(doubled), rtol=1e-9)
  expected = np.sqrt(inputs.var(0).mean()) * (4 / (5 * count)) ** (1 / 7)
  np.testing.assert_allclose(bandwidths.silverman_bandwidth(inputs), expected, rtol=1e-9)


@pytest.mark.parametrize("rule", RULES)
def test_masks_ties_and_gradients(rule, x64):
  inputs = np.random.default_rng(0).normal(size=(9, 2))
  kept = np.arange(9) % 3 > 0
  spoiled = np.where(kept[:, None], inputs, np.nan)
  np.testing.assert_allclose(rule(spoiled, where=kept), rule(inputs[kept]), rtol=1e-12)
  assert np.isnan(rule(spoiled))
  np.testing.assert_array_equal(jax.grad(rule)(inputs), 0)
  least = 0.1 if rule is bandwidths.ten_median_square_bandwidth else 0
  for nothing in (rule(inputs, where=np.zeros(9, bool)), rule(np.ones((4, 2))), rule(inputs[:1])):
    np.testing.assert_allclose(nothing, least, atol=1e-7)
