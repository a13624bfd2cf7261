"""Average bits, features of configurations, the predictor and the genetic search."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxreg.quantization import search
from jaxreg.quantization.elastic_config import sample_config, uniform_config
from jaxreg.quantization.elastic_quantizer import ELASTIC_BITS
from tests.conformance import draw_logits, module_row, row

averaged = jax.jit(search.average_bits)


@pytest.mark.golden
def test_golden_11_eq_net_average_bits(golden, x64):
  read = 0
  for _, arrays, _ in golden("11-eq_net").cases():
    if "out_avg_bits" in arrays:
      weights, inputs = (averaged(arrays[f"{kind}_bits"], sizes) for kind, sizes in sizes_of(arrays))
      np.testing.assert_allclose([weights, inputs], arrays["out_avg_bits"], rtol=1e-8)
      read += 1
  assert read


def sizes_of(arrays):
  return (("w", arrays["params"]), ("a", arrays["featuremaps"]))


@given(st.integers(0, 2**32 - 1), st.sampled_from(ELASTIC_BITS))
@settings(max_examples=25, deadline=None)
def test_equal_bits_are_their_average(seed, bits):
  rng = np.random.default_rng(seed)
  sizes = rng.integers(1, 10**7, 7).astype(np.int32)
  config = np.full(7, bits, np.int32)
  config[[0, -1]] = rng.integers(2, 9, 2)
  assert averaged(config, sizes) == bits


def test_features_tell_configurations_apart():
  configs = jax.vmap(functools.partial(sample_config, layers=5))(jax.random.split(jax.random.key(0), 50))
  features = np.asarray(jax.jit(jax.vmap(search.encode_config))(configs))
  assert features.shape == (50, 6 + 14 * 5) and set(np.unique(features)) == {0, 1}
  np.testing.assert_array_equal(features.sum(1), 3 + 2 * 3)
  np.testing.assert_array_equal(features[:, 1], configs.per_channel[:, 0])
  np.testing.assert_array_equal(features[:, 2], configs.weight_symmetric[:, 0])
  np.testing.assert_array_equal(features[:, 4], configs.act_symmetric[:, 0])
  weights, inputs = features[:, 6:].reshape(50, 2, 5, 7).transpose(1, 0, 2, 3)
  for one_hot, bits in ((weights, configs.weight_bits), (inputs, configs.act_bits)):
    assert (one_hot[:, [0, -1]] == 0).all()
    np.testing.assert_array_equal(one_hot[:, 1:-1].argmax(-1) + 2, bits[:, 1:-1])


def value_of(layers, seed):
  """A table of what bits are worth, concave in them; NumPy's and JAX's form of the score."""
  worth = np.random.default_rng(seed).gamma(1.0, size=(2, layers))
  gain = jnp.log(jnp.arange(1.0, 9.0))

  def score(config):
    return jnp.sum(jnp.asarray(worth[0]) * gain[config.weight_bits - 1]) + jnp.sum(
      jnp.asarray(worth[1]) * gain[config.act_bits - 1]
    )

  return score


@pytest.mark.parametrize("target", [2.0, 3.4, 8.0])
def test_search_finds_the_best_configuration(target):
  """As going through all of them does."""
  layers, candidates, sizes = 5, (2, 4, 8), np.array([9, 3, 1, 2, 9])
  score, start = value_of(layers, 0), uniform_config(layers, bits=2, per_channel=True)
  search_it = functools.partial(
    search.evolve_bits, score=score, config=start, weight_sizes=sizes, act_sizes=sizes[::-1].copy(),
    candidates=candidates, generations=60,
  )  # fmt: skip
  config, found = run_search(search_it)(jax.random.key(0), target=target)
  assert config.per_channel.all() and config.weight_bits[0] == config.act_bits[-1] == 8
  np.testing.assert_allclose(found, score(config), rtol=1e-6)
  best = 0.0
  for own, own_sizes in ((0, sizes), (1, sizes[::-1])):
    bits = np.array(list(itertools.product(candidates, repeat=layers - 2)))
    mean = bits @ own_sizes[1:-1] / own_sizes[1:-1].sum()
    inside = bits[(mean <= target) & (mean > target - 0.5)]
    ends = np.full((len(inside), 1), 8)
    full = np.hstack([ends, inside, ends])
    worth = np.random.default_rng(0).gamma(1.0, size=(2, layers))[own]
    best += (np.log(full) * worth).sum(1).max()
  np.testing.assert_allclose(found, best, rtol=1e-5)


SEARCHES = {}


def run_search(search_it):
  """One program for all targets."""
  return SEARCHES.setdefault("program", jax.jit(search_it))


def test_averages_outside_the_interval_rank_below():
  """With one candidate nothing is inside, and the search still returns what is nearest."""
  start = uniform_config(4, bits=2)
  config, _ = jax.jit(
    functools.partial(
      search.evolve_bits, score=lambda config: jnp.sum(config.weight_bits), config=start, weight_sizes=(1,) * 4,
      act_sizes=(1,) * 4, target=5.0, slack=0.1, candidates=(2, 4), generations=5,
    )
  )(jax.random.key(0))  # fmt: skip
  assert config.weight_bits.tolist() == config.act_bits.tolist() == [8, 4, 4, 8]


def test_bad_input():
  options = dict(config=uniform_config(4, bits=2), weight_sizes=(1,) * 4, act_sizes=(1,) * 4)
  for name, value in (("target", 1.0), ("slack", 0.0), ("mutation_rate", 2.0), ("parent_share", 0.0)):
    with pytest.raises(ValueError, match=name):
      search.evolve_bits(
        jax.random.key(0), lambda config: 0.0, **{"target": 3.0, **options, name: value}
      )  # fmt: skip
  with pytest.raises(ValueError, match="bits and sizes must"):
    search.average_bits(jnp.array([2, 2]), (1, 1))


ROWS = [
  module_row(search.AccuracyPredictor(base=0.5, hidden=(4,)), lambda rng: (draw_logits(rng),)),
  row(
    search.average_bits,
    lambda rng: (rng.integers(2, 9, 6).astype(np.int32), rng.integers(1, 100, 6).astype(np.int32)),
    bad=(("bits", lambda bits, sizes: (bits[1:], sizes)), ("bits", lambda bits, sizes: (bits[:2], sizes[:2]))),
    differentiable=False,
    wide=True,
  ),
]


EXEMPT = {
  "encode_config": "of integers",
  "evolve_bits": "maps a function of the caller",
}
