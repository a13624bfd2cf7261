"""Cosine classifiers: bounds, norms, heads side by side, prototypes in trees of three libraries."""

import equinox
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxreg.layers import cosine_head
from jaxreg.layers.cosine_head import CosineHead, MultiHeadProjector, normalize_prototypes
from tests.conformance import EXAMPLES, module_row, row

FEATURES = jnp.asarray(np.random.default_rng(0).normal(size=(6, 4)), jnp.float32)


def test_logits_are_cosines():
  head = CosineHead(classes=3)
  variables = head.init(jax.random.key(0), FEATURES)
  prototypes = variables["params"]["prototypes"]
  np.testing.assert_allclose(jnp.linalg.norm(prototypes, axis=1), 1, rtol=1e-6)
  expected = FEATURES @ prototypes.T / jnp.linalg.norm(FEATURES, axis=1, keepdims=True)
  np.testing.assert_allclose(head.apply(variables, FEATURES), expected, rtol=1e-5)
  np.testing.assert_allclose(head.apply(variables, 1e30 * FEATURES), expected, rtol=1e-5)
  gradient = jax.grad(lambda x: head.apply(variables, x).sum())(jnp.zeros((2, 4)))
  assert np.isfinite(gradient).all()


def test_heads_are_independent():
  heads = MultiHeadProjector(heads=2, clusters=3, hidden=8, features=5)
  variables = heads.init(jax.random.key(0), FEATURES, train=False)
  logits, new = heads.apply(variables, FEATURES, train=True, mutable=["batch_stats"])
  assert logits.shape == (2, 6, 3) and (jnp.abs(logits) <= 1 + 1e-6).all()
  assert all(leaf.shape[0] == 2 for leaf in jax.tree.leaves((variables, new)))
  assert np.abs(logits[0] - logits[1]).max() > 1e-2
  gradient = jax.grad(lambda p: heads.apply({**variables, "params": p}, FEATURES, train=False)[0].sum())(
    variables["params"]
  )
  assert not any(np.any(leaf[1]) for leaf in jax.tree.leaves(gradient))
  # A head is what it would be alone.
  one = MultiHeadProjector(heads=1, clusters=3, hidden=8, features=5)
  second = jax.tree.map(lambda leaf: leaf[1:], variables)
  np.testing.assert_allclose(
    one.apply(second, FEATURES, train=True, mutable=["batch_stats"])[0][0], logits[1], rtol=1e-4
  )


class _NNX(nnx.Module):
  def __init__(self):
    self.prototypes, self.kernel = nnx.Param(3 * jnp.ones((2, 4))), nnx.Param(3 * jnp.ones((2, 4)))


class _Equinox(equinox.Module):
  prototypes: jax.Array
  kernel: jax.Array


@pytest.mark.parametrize(
  "params",
  [
    {"head": {"prototypes": 3 * jnp.ones((2, 4)), "kernel": 3 * jnp.ones((2, 4))}},
    nnx.state(_NNX()),
    _Equinox(3 * jnp.ones((2, 4)), 3 * jnp.ones((2, 4))),
  ],
  ids=["linen", "nnx", "equinox"],
)
def test_prototypes_of_any_tree(params):
  normalized = normalize_prototypes(params)
  assert jax.tree.structure(normalized) == jax.tree.structure(params)
  assert sorted(float(leaf[0, 0]) for leaf in jax.tree.leaves(normalized)) == [0.5, 3.0]


def test_prototypes_of_zeros_and_in_low_precision():
  rows = jnp.array([[0.0, 0.0], [3e-30, 4e-30], [3e30, 4e30]], jnp.float32)
  found = normalize_prototypes({"prototypes": rows})["prototypes"]
  np.testing.assert_allclose(found, [[0, 0], [0.6, 0.8], [0.6, 0.8]], rtol=1e-6)
  assert normalize_prototypes({"prototypes": rows.astype(jnp.bfloat16)})["prototypes"].dtype == jnp.bfloat16
  several = normalize_prototypes({"prototypes": jnp.full((2, 3, 4), 7.0)})["prototypes"]
  np.testing.assert_allclose(several, 0.5)


ROWS = [
  module_row(CosineHead(classes=3), lambda rng: (rng.normal(size=(EXAMPLES, 5)),)),
  module_row(
    MultiHeadProjector(heads=2, clusters=3, hidden=4, features=5),
    lambda rng: (rng.normal(size=(EXAMPLES, 5)),),
    options=dict(train=False),
    call=lambda module, variables, features: jnp.moveaxis(module.apply(variables, features, train=False), 0, 1),
  ),
  row(
    cosine_head.normalize_prototypes,
    lambda rng: ({"prototypes": rng.normal(size=(3, 4)), "bias": rng.normal(size=3)},),
  ),
]
