"""Compacted networks compute the same."""

import flax.linen as nn
import jax
import numpy as np
import pytest

from jaxreg.models import MLP
from jaxreg.pruning.compaction import compact


@pytest.mark.parametrize("use_bias", [True, False])
def test_compact_mlp(use_bias):
  x = jax.random.normal(jax.random.key(0), (4, 6))
  params = MLP((8, 7, 3), use_bias=use_bias).init(jax.random.key(1), x)["params"]
  for name, dead in (("Dense_0", [1, 4, 5]), ("Dense_1", [0, 6])):
    params[name] = jax.tree.map(lambda leaf, dead=dead: (leaf + 0.1).at[..., np.array(dead)].set(0), params[name])
  smaller = compact(params, order=("Dense_0", "Dense_1", "Dense_2"))
  widths = [layer["kernel"].shape[-1] for layer in smaller.values()]
  assert widths == [5, 5, 3]
  outputs = [MLP(w, use_bias=use_bias).apply({"params": p}, x) for w, p in (((8, 7, 3), params), (widths, smaller))]
  np.testing.assert_allclose(outputs[0], outputs[1], rtol=1e-5, atol=1e-6)


def test_compact_convolutions():
  class Network(nn.Module):
    filters: tuple

    @nn.compact
    def __call__(self, x):
      for width in self.filters:
        x = nn.max_pool(nn.relu(nn.Conv(width, (3, 3))(x)), (2, 2), (2, 2))
      return nn.Dense(3)(x.reshape(x.shape[0], -1))

  x = jax.random.normal(jax.random.key(0), (2, 8, 8, 3))
  params = Network((6, 5)).init(jax.random.key(1), x)["params"]
  for name, dead in (("Conv_0", [2, 3]), ("Conv_1", [0])):
    params[name] = jax.tree.map(lambda leaf, dead=dead: (leaf + 0.1).at[..., np.array(dead)].set(0), params[name])
  smaller = compact(params, order=("Conv_0", "Conv_1", "Dense_0"))
  assert smaller["Dense_0"]["kernel"].shape == (16, 3)
  outputs = [Network(w).apply({"params": p}, x) for w, p in (((6, 5), params), ((4, 4), smaller))]
  np.testing.assert_allclose(outputs[0], outputs[1], rtol=1e-5, atol=1e-6)


EXEMPT = {
  "compact": "shapes depend on values: not traceable, by contract",
  "compact_pair": "shapes depend on values: not traceable, by contract",
  "compact_variables": "shapes depend on values: not traceable, by contract",
}
