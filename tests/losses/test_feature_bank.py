"""The ring buffer of features: the last of every domain, whatever the batches, on one device and several."""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from jaxreg.losses import feature_bank
from tests.conformance import EXAMPLES, row


def _bank(rng):
  return feature_bank.FeatureBank(rng.normal(size=(3, 4, 2)), np.array([0, 2, 9], np.int32))


ROWS = [
  row(
    feature_bank.feature_bank_update,
    lambda rng: (rng.normal(size=(EXAMPLES, 2)), rng.integers(0, 3, EXAMPLES).astype(np.int32), _bank(rng)),
    bad=(
      ("features", lambda x, d, b: (x.astype(np.int32), d, b)),
      ("features", lambda x, d, b: (x[:, :1], d, b)),
      ("domains", lambda x, d, b: (x, d[1:], b)),
      ("domains", lambda x, d, b: (x, d * 1.0, b)),
      ("bank", lambda x, d, b: (x, d, b.features)),
    ),
    differentiable=False,
    wide=True,
  ),
  row(
    feature_bank.feature_bank_means,
    lambda rng: (_bank(rng),),
    bad=(("bank", lambda b: (b.features,)),),
    differentiable=False,
    wide=True,
  ),
]
EXEMPT = {"FeatureBank": "state, made by feature_bank_init", "feature_bank_init": "makes zeros of static sizes"}


def test_keeps_the_last_of_every_domain():
  rng, kept = np.random.default_rng(0), [collections.deque(maxlen=3) for _ in range(4)]
  bank, update = feature_bank.feature_bank_init(4, 3, 2), jax.jit(feature_bank.feature_bank_update)
  for size in (5, 1, 17, 5, 0):
    features, domains = rng.normal(size=(size, 2)).astype(np.float32), rng.integers(-1, 5, size).astype(np.int32)
    domains[domains == 2] = 100  # nothing is ever written of domain 2
    where = rng.uniform(size=size) < 0.8
    bank = update(np.where(where[:, None], features, np.nan), domains, bank, where=where)
    for feature, domain in zip(features[where], domains[where]):
      if 0 <= domain < 4:
        kept[domain].append(feature)
    for domain, expected in enumerate(kept):
      found = np.asarray(bank.features[domain, : min(int(bank.written[domain]), 3)])
      assert sorted(map(tuple, found)) == sorted(map(tuple, expected))
    means = [np.mean(each, axis=0) if each else np.zeros(2) for each in kept]
    np.testing.assert_allclose(feature_bank.feature_bank_means(bank), means, rtol=1e-5, atol=1e-6)


def test_every_device_has_the_bank_of_the_whole_batch():
  rng = np.random.default_rng(1)
  features, domains = rng.normal(size=(16, 2)).astype(np.float32), rng.integers(0, 2, 16).astype(np.int32)
  start = feature_bank.feature_bank_init(2, 5, 2)
  whole = feature_bank.feature_bank_update(features, domains, start)
  mesh = jax.make_mesh((8,), ("devices",), axis_types=(AxisType.Auto,))
  part = lambda x, d: jax.tree.map(
    lambda leaf: leaf[None], feature_bank.feature_bank_update(x, d, start, axis_name="devices")
  )
  specs = PartitionSpec("devices")
  parts = jax.jit(jax.shard_map(part, mesh=mesh, in_specs=specs, out_specs=specs, check_vma=False))(features, domains)
  jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, np.stack([b] * 8)), parts, whole)


def test_no_gradient_and_narrow_types():
  bank = feature_bank.feature_bank_init(2, 3, 1, dtype=jnp.bfloat16)
  updated = feature_bank.feature_bank_update(jnp.ones((2, 1)), np.array([1, 255], np.uint8), bank)
  assert updated.features.dtype == jnp.bfloat16 and updated.written.tolist() == [0, 1]
  total = lambda x: feature_bank.feature_bank_means(feature_bank.feature_bank_update(x, jnp.zeros(2, int), bank)).sum()
  assert not jax.grad(total)(jnp.ones((2, 1))).any()
  with pytest.raises(ValueError, match="capacity must be a positive integer"):
    feature_bank.feature_bank_init(2, 0, 1)
  with pytest.raises(ValueError, match="dtype must be floating"):
    feature_bank.feature_bank_init(2, 1, 1, dtype=jnp.int32)
