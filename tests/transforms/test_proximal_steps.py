import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxreg.regularizers.group_sparsity import prox_wgsef
from jaxreg.regularizers.groups import group_ids
from jaxreg.transforms.proximal_steps import half_space_projection, proximal
from tests.conformance import transform_row

BASES = {
  "sgd": optax.sgd(0.1, momentum=0.9),
  "adam": optax.adam(0.1),
  "adamw": optax.adamw(0.1),
  "lion": optax.lion(0.1),
}


def soft_threshold(values, step_size):
  return jax.tree.map(lambda x: jnp.sign(x) * jnp.maximum(jnp.abs(x) - 0.5 * step_size, 0), values)


def layer_prox(values, step_size):
  return prox_wgsef(values, group_ids(values, kind="neuron"), k=1, lam=step_size)


def test_iterates_equal_the_textbook_method():
  target = jnp.array([1.0, 0.02, -3.0])
  tx = optax.chain(optax.sgd(0.2), proximal(soft_threshold, 0.2))
  found = expected = jnp.array([0.5, 0.5, 0.5])
  state, update = tx.init(found), jax.jit(tx.update)
  for _ in range(60):
    updates, state = update(found - target, state, found)
    found = optax.apply_updates(found, updates)
    expected = soft_threshold(expected - 0.2 * (expected - target), 0.2)
    np.testing.assert_allclose(found, expected, atol=1e-6)
  np.testing.assert_allclose(found, soft_threshold(target, 1.0), atol=1e-4)
  assert found[1] == 0


@pytest.mark.parametrize("base", BASES)
def test_composes(base):
  params = {
    "layer": {"kernel": jnp.array([[1.0, 0.01], [1.0, 0.0]]), "bias": jnp.array([0.5, 0.0])},
    "half": jnp.array([1.0, 0.001], jnp.bfloat16),
    "free": jnp.array(2.0),
    "empty": jnp.zeros((0, 2)),
    "none": None,
  }
  operators = {"layer": layer_prox, "half": soft_threshold, "free": None, "empty": soft_threshold, "none": None}
  tx = optax.chain(BASES[base], proximal(operators, 0.1))
  grads = jax.tree.map(jnp.zeros_like, params)
  state = tx.init(params)
  updates, state = jax.jit(tx.update)(grads, state, params)
  moved = optax.apply_updates(params, updates)
  plain, _ = BASES[base].update(grads, BASES[base].init(params), params)
  plain = optax.apply_updates(params, plain)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), moved["layer"], layer_prox(plain["layer"], 0.1)
  )
  assert moved["layer"]["kernel"][0, 1] == 0 and moved["half"][1] == 0
  np.testing.assert_array_equal(moved["free"], plain["free"])
  assert moved["none"] is None and moved["half"].dtype == jnp.bfloat16


def test_exact_zeros_whatever_the_dtypes():
  for parameter, update in ((jnp.float32, jnp.bfloat16), (jnp.bfloat16, jnp.float32), (jnp.float32, jnp.float32)):
    params = jnp.array([1.2345678], parameter)
    tx = proximal(lambda x, _: jnp.zeros_like(x), 0.1)
    updates, _ = tx.update(jnp.array([0.3], update), tx.init(params), params)
    assert optax.apply_updates(params, updates)[0] == 0


def test_schedule_and_traced_step_size():
  params, seen = jnp.zeros(1), lambda values, step_size: values + step_size
  schedule = optax.linear_schedule(1.0, 0.0, 4)
  tx = proximal(seen, schedule)
  state = tx.init(params)
  for step in range(5):
    updates, state = jax.jit(tx.update)(jnp.zeros(1), state, params)
    np.testing.assert_allclose(updates[0], schedule(step))
  one = lambda rate: proximal(seen, rate).update(jnp.zeros(1), state, params)[0][0]
  np.testing.assert_allclose(jax.jit(jax.vmap(one))(jnp.arange(3.0)), jnp.arange(3.0))


def test_masked_and_multi_transform():
  params = {"a": jnp.array([0.01, 1.0]), "b": jnp.array([0.01, 1.0])}
  updates = jax.tree.map(jnp.zeros_like, params)
  on, off = [0.0, 0.95], [0.01, 1.0]
  masked = optax.masked(proximal({"a": soft_threshold, "b": soft_threshold}, 0.1), {"a": True, "b": False})
  whole = optax.masked(proximal(soft_threshold, 0.1), {"a": True, "b": False})
  parts = optax.multi_transform({"on": proximal(soft_threshold, 0.1), "off": optax.identity()}, {"a": "on", "b": "off"})
  for tx in (masked, whole, parts):
    found, _ = jax.jit(tx.update)(updates, tx.init(params), params)
    moved = optax.apply_updates(params, found)
    np.testing.assert_allclose(moved["a"], on, rtol=1e-6)
    np.testing.assert_allclose(moved["b"], off)
  empty = proximal(soft_threshold, 0.1)
  assert empty.update({}, empty.init({}), {})[0] == {}


def test_half_space():
  params = {"on": {"kernel": jnp.array([[1.0, 1.0, 0.0]]), "bias": jnp.array([1.0, 1.0, 0.0])}, "off": jnp.ones(2)}
  updates = {
    "on": {"kernel": jnp.array([[-1.5, -0.7, 1.0]]), "bias": jnp.array([-0.6, -0.7, 0.0])},
    "off": jnp.full(2, -5.0),
  }
  for epsilon, second in ((0.0, 0.3), (0.4, 0.0), (jnp.float32(0.4), 0.0)):
    tx = half_space_projection({"on": "neuron", "off": None}, epsilon=epsilon)
    found, _ = jax.jit(tx.update)(updates, tx.init(params), params)
    moved = optax.apply_updates(params, found)
    np.testing.assert_allclose(moved["on"]["kernel"], [[0.0, second, 1.0]], atol=1e-6)
    np.testing.assert_allclose(moved["on"]["bias"], [0.0, second, 0.0], atol=1e-6)
    np.testing.assert_allclose(moved["off"], [-4, -4])
  delayed = optax.conditionally_transform(half_space_projection("element"), lambda step: step >= 1)
  state = delayed.init(jnp.ones(1))
  for expected in (-1.0, 0.0):
    found, state = delayed.update(jnp.array([-2.0]), state, jnp.ones(1))
    assert jnp.ones(1) + found == expected


def test_bad_input():
  tx = proximal(soft_threshold, 0.1)
  state = tx.init(jnp.ones(2))
  with pytest.raises(ValueError, match="params must be given"):
    tx.update(jnp.ones(2), state)
  with pytest.raises(ValueError, match="equal shapes"):
    tx.update(jnp.ones(2), state, jnp.ones((2, 1)))
  with pytest.raises(ValueError, match="proximal_points"):
    proximal(lambda x, t: x[:, None], 0.1).update(jnp.ones(2), state, jnp.ones(2))
  with pytest.raises(ValueError, match="learning_rate"):
    proximal(soft_threshold, -0.1)
  with pytest.raises(ValueError, match="prox must be a function"):
    proximal({"a": 3}, 0.1)
  with pytest.raises(ValueError, match="epsilon"):
    half_space_projection("neuron", epsilon=1.0)
  with pytest.raises(ValueError, match="params must be given"):
    half_space_projection("neuron").update(jnp.ones(2), optax.EmptyState())


def _soft_threshold(params, step):
  return jax.tree.map(lambda x: jnp.sign(x) * jnp.maximum(jnp.abs(x) - step * 0.1, 0), params)


def _tensors_as_groups(params):
  structure = jax.tree.structure(params)
  return structure.unflatten(
    np.full((1,) * jnp.ndim(leaf), index, np.int32) for index, leaf in enumerate(jax.tree.leaves(params))
  )


TRANSFORMS = [
  transform_row(
    proximal,
    lambda base, rate: optax.chain(base, proximal(_soft_threshold, rate)),
    rate=(0.0, 1.0),
  ),
  transform_row(
    half_space_projection,
    lambda base, epsilon: optax.chain(base, half_space_projection(_tensors_as_groups, epsilon=epsilon)),
    epsilon=(0.0, 0.5),
  ),
]


EXEMPT = {
  "ProximalState": "state, carried by proximal",
}
