"""Counts of multiplications, by hand and by the official code."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxreg.pruning import pruned_flops
from jaxreg.pruning.dynamic_pruning import mass_mask
from jaxreg.pruning.pruned_flops import ConvCost
from tests.conformance import EXAMPLES, row, unchanged

COSTS = [ConvCost(inputs=3, outputs=8, taps=9, positions=64), ConvCost(8, 8, 9, 16, groups=8), ConvCost(8, 10, 1, 16)]


def test_everything_active_is_dense():
  active = [jnp.full(2, cost.outputs) for cost in COSTS]
  dense = 3 * 8 * 9 * 64 + 8 * 9 * 16 + 8 * 10 * 16
  assert pruned_flops.dense_flops(COSTS) == dense
  assert pruned_flops.dynamic_flops(active, COSTS).tolist() == [dense] * 2
  assert pruned_flops.official_dynamic_flops(active, COSTS).tolist() == [dense] * 2
  assert pruned_flops.mask_head_flops(COSTS, [64, 64, 16]) == 3 * (8 + 64) + 8 * (8 + 64) + 8 * (10 + 16)


def test_pruned_depthwise_and_shortcut():
  active = [jnp.array([4, 0]), jnp.array([6, 8]), jnp.array([5, 10])]
  first, depthwise, last = np.array([4, 0]) * 3 * 9 * 64, np.array([6, 8]) * 9 * 16, np.array([6 * 5, 8 * 10]) * 16
  np.testing.assert_allclose(pruned_flops.dynamic_flops(active, COSTS), first + depthwise + last)
  np.testing.assert_allclose(pruned_flops.official_dynamic_flops(active, COSTS), first + last)
  filled = pruned_flops.dynamic_flops(active, COSTS, active_inputs=[None, None, jnp.array([8, 8])])
  np.testing.assert_allclose(filled, first + depthwise + np.array([8 * 5, 8 * 10]) * 16)


@pytest.mark.golden
def test_golden_33_ftwt_flops(golden, x64):
  for _, arrays, _meta in golden("33-ftwt").cases():
    if "prev_active" not in arrays:
      continue
    filters, channels, *kernel_size = arrays["w"].shape
    positions = int(np.prod(arrays["cotangent"].shape[2:]))
    costs = [ConvCost(channels, channels, 0, 0), ConvCost(channels, filters, int(np.prod(kernel_size)), positions)]
    for mode in ("decoupled", "joint"):
      active = [arrays["prev_active"], arrays[f"out_active_{mode}"]]
      for count in (pruned_flops.official_dynamic_flops, pruned_flops.dynamic_flops):
        np.testing.assert_allclose(count(active, costs), arrays[f"out_flops_{mode}"], rtol=1e-9)


def test_oracle_budget_is_monotone_in_the_mass():
  maps = [
    jnp.asarray(np.random.default_rng(seed).normal(size=(16, 4, cost.outputs))) for seed, cost in enumerate(COSTS)
  ]
  active_at = lambda mass: [mass_mask(each, mass=mass).sum(-1) for each in maps]
  budget = jax.jit(lambda masses: pruned_flops.oracle_flops(active_at, masses, COSTS))
  shares = np.asarray(budget(np.float32([0.2, 0.5, 0.9, -1.0])))
  assert (np.diff(shares) > 0).all() and shares[-1] == 1


def test_bad_input():
  with pytest.raises(ValueError, match="one entry per layer, at least one, got active 1, costs 3"):
    pruned_flops.dynamic_flops([jnp.ones(2)], COSTS)
  with pytest.raises(ValueError, match="one entry per layer"):
    pruned_flops.official_dynamic_flops([], [])
  with pytest.raises(ValueError, match="input_positions 0"):
    pruned_flops.mask_head_flops(COSTS, [])


_COSTS = [ConvCost(inputs=1, outputs=8, taps=9, positions=64), ConvCost(8, 16, 9, 16)]


def _counts(rng):
  return rng.integers(1, 9, EXAMPLES).astype(np.float64), rng.integers(1, 17, EXAMPLES).astype(np.float64)


ROWS = [
  row(
    pruned_flops.dynamic_flops,
    _counts,
    call=lambda *active: pruned_flops.dynamic_flops(active, _COSTS),
    extreme=unchanged,
    wide=True,
  ),
  row(
    pruned_flops.official_dynamic_flops,
    _counts,
    call=lambda *active: pruned_flops.official_dynamic_flops(active, _COSTS),
    extreme=unchanged,
    differentiable=False,
    wide=True,
  ),
]


EXEMPT = {
  "ConvCost": "Python integers",
  "dense_flops": "of Python integers",
  "mask_head_flops": "of Python integers",
  "oracle_flops": "takes a function of the caller",
}
