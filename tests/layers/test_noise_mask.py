"""The policy of noise masks: bases and statistics, in training and out of it."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from jaxreg.layers import NoiseMaskPolicy
from tests.conformance import EXAMPLES, module_row

ROWS = [
  module_row(
    NoiseMaskPolicy(cells=4, train=train),
    lambda rng: (rng.normal(size=(EXAMPLES, 3)),),
    bad=(("inputs", lambda x: (x.astype(np.int32),)), ("inputs", lambda x: (x[0],))),
    examples="none",
    call=lambda module, variables, x, train=train: module.apply(variables, x, mutable=["batch_stats", "bases"])[0],
    extreme=lambda x: (100 * x,),
  )._replace(label=f"noise_mask.NoiseMaskPolicy-{train}")
  for train in (False,)
]


def test_bases_are_moving_averages_and_statistics_follow():
  features = np.random.default_rng(0).normal(size=(64, 3)).astype(np.float32) + 2
  module = NoiseMaskPolicy(cells=4, inertia=0.7, base_decay=0.9)
  variables = module.init(jax.random.key(0), features)
  bases = variables["bases"]
  assert all(((0 <= base) & (base < 1)).all() for base in bases.values()) and not np.allclose(*bases.values())
  own, updated = NoiseMaskPolicy(cells=4, inertia=0.0).apply(variables, features, mutable=["batch_stats", "bases"])
  mixed, after = module.apply(variables, features, mutable=["batch_stats", "bases"])
  for name, part, result in zip(("alpha", "beta"), own, mixed):
    np.testing.assert_allclose(result, 0.7 * bases[name] + 0.3 * part, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(after["bases"][name], 0.9 * bases[name] + 0.1 * part.mean(0), rtol=1e-5, atol=1e-6)
  # Out of training it reads them, and changes nothing.
  for _ in range(80):
    _, updated = module.apply({**variables, **updated}, features, mutable=["batch_stats", "bases"])
  still = NoiseMaskPolicy(cells=4, inertia=0.7, train=False)
  evaluated, unchanged = still.apply({**variables, **updated}, features, mutable=["batch_stats", "bases"])
  jax.tree.map(np.testing.assert_array_equal, unchanged, dict(updated))
  trained, _ = module.apply({**variables, **updated}, features, mutable=["batch_stats", "bases"])
  np.testing.assert_allclose(evaluated[0], trained[0], rtol=0.05, atol=0.05)


def test_a_batch_split_over_devices_is_the_whole():
  features = np.random.default_rng(1).normal(size=(16, 3)).astype(np.float32)
  module = NoiseMaskPolicy(cells=4)
  variables = module.init(jax.random.key(0), features)
  expected, after = module.apply(variables, features, mutable=["batch_stats", "bases"])
  split = module.clone(axis_name="devices")

  def part(features):
    parameters, updated = split.apply(variables, features, mutable=["batch_stats", "bases"])
    return parameters, jax.tree.map(lambda leaf: leaf[None], dict(updated))

  mapped = jax.shard_map(
    part,
    mesh=jax.make_mesh((4,), ("devices",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4]),
    in_specs=PartitionSpec("devices"),
    out_specs=PartitionSpec("devices"),
    check_vma=False,
  )
  parameters, updated = jax.jit(mapped)(features)
  close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
  jax.tree.map(close, parameters, expected)
  jax.tree.map(lambda a, b: close(a, np.stack([b] * 4)), updated, dict(after))


def test_gradients_do_not_flow_into_the_bases():
  module = NoiseMaskPolicy(cells=2, backbone=nn.Dense(3))
  variables = module.init(jax.random.key(0), jnp.ones((4, 5)))
  inputs = jax.random.normal(jax.random.key(1), (4, 5))

  def total(params):
    _, updated = module.apply({**variables, "params": params}, inputs, mutable=["batch_stats", "bases"])
    return sum(jnp.sum(base) for base in updated["bases"].values())

  assert not any(np.any(leaf) for leaf in jax.tree.leaves(jax.grad(total)(variables["params"])))
  with pytest.raises(ValueError, match=r"features \[batch, features\]"):
    NoiseMaskPolicy(cells=2).init(jax.random.key(0), jnp.ones((2, 3, 4)))
