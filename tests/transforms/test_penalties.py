import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxreg.transforms.penalties import penalize
from tests.conformance import transform_row

BASES = {
  "sgd": optax.sgd(0.1, momentum=0.9),
  "adam": optax.adam(0.1),
  "adamw": optax.adamw(0.1),
  "lion": optax.lion(0.1),
}


def quartic(params):
  return sum(jnp.sum(leaf.astype(jnp.float32) ** 4) for leaf in jax.tree.leaves(params))


@pytest.mark.parametrize("base", BASES)
def test_equals_penalized_loss(base):
  loss = lambda params: jnp.sum((params["w"] - 1) ** 2) + params["b"] ** 2
  params = {"w": jnp.array([[1.0, -2.0], [0.5, 3.0]]), "b": jnp.array(2.0)}
  tx = optax.chain(penalize(quartic, 0.3), BASES[base])
  found, expected = params, params
  state, expected_state = tx.init(found), BASES[base].init(expected)
  for _ in range(3):
    updates, state = tx.update(jax.grad(loss)(found), state, found)
    found = optax.apply_updates(found, updates)
    grads = jax.grad(lambda p: loss(p) + 0.3 * quartic(p))(expected)
    updates, expected_state = BASES[base].update(grads, expected_state, expected)
    expected = optax.apply_updates(expected, updates)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), found, expected)


def test_schedule_and_traced_weight():
  params = jnp.array([1.0, 2.0])
  tx = penalize(quartic, lambda count: 0.5 * count)
  state = tx.init(params)
  for step in range(3):
    updates, state = jax.jit(tx.update)(jnp.zeros(2), state, params)
    np.testing.assert_allclose(updates, 0.5 * step * 4 * params**3)
  assert state.count == 3
  traced = jax.jit(jax.vmap(lambda w: penalize(quartic, w).update(jnp.zeros(2), state, params)[0]))(jnp.arange(3.0))
  np.testing.assert_allclose(traced, jnp.arange(3.0)[:, None] * 4 * params**3)


def test_masked_mixed_and_none():
  params = {"a": jnp.ones(3, jnp.bfloat16), "b": jnp.ones(2), "none": None, "empty": jnp.zeros((0,))}
  updates = jax.tree.map(jnp.zeros_like, params)
  mask = {"a": True, "b": False, "none": False, "empty": True}
  masked = optax.masked(penalize(quartic, 1.0), mask)
  found, _ = jax.jit(masked.update)(updates, masked.init(params), params)
  assert found["a"].dtype == jnp.bfloat16 and found["a"].tolist() == [4, 4, 4] and found["b"].tolist() == [0, 0]
  labels = {"a": "on", "b": "off", "none": "off", "empty": "on"}
  parts = optax.multi_transform({"on": penalize(quartic, 1.0), "off": optax.identity()}, labels)
  found, _ = parts.update(updates, parts.init(params), params)
  assert found["a"].tolist() == [4, 4, 4] and found["b"].tolist() == [0, 0] and found["none"] is None
  tx = penalize(quartic, 1.0)
  assert tx.update({}, tx.init({}), {})[0] == {}
  assert tx.update({"a": None}, tx.init({}), {"a": jnp.ones(2)})[0] == {"a": None}


def test_bad_input():
  tx = penalize(lambda p: p, 1.0)
  with pytest.raises(ValueError, match="penalty must return one floating scalar"):
    tx.update(jnp.ones(2), tx.init(jnp.ones(2)), jnp.ones(2))
  with pytest.raises(ValueError, match="params must be given"):
    tx.update(jnp.ones(2), tx.init(jnp.ones(2)))
  with pytest.raises(ValueError, match="equal shapes"):
    penalize(quartic, 1.0).update(jnp.ones(2), tx.init(jnp.ones(2)), jnp.ones((2, 1)))
  with pytest.raises(ValueError, match="weight"):
    penalize(quartic, float("nan"))


def _ridge(params):
  return sum((jnp.sum(jnp.square(leaf.astype(jnp.float32))) for leaf in jax.tree.leaves(params)), jnp.zeros(())) / 2


TRANSFORMS = [
  transform_row(
    penalize,
    lambda base, weight: optax.chain(penalize(_ridge, weight), base),
    weight=(0.0, 1.0),
  ),
]


EXEMPT = {
  "PenalizeState": "state, carried by penalize",
}
