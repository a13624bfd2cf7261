import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxreg.transforms.orthogonal_gradient import orthogonal, orthogonalize_gradients
from tests.conformance import transform_row


@functools.partial(jax.jit, static_argnames=("per_leaf", "renormalize"))
def apply(grads, params, per_leaf=True, renormalize=True):
  tx = orthogonalize_gradients(per_leaf=per_leaf, renormalize=renormalize)
  return tx.update(grads, tx.init(params), params)[0]


def tree(seed, scale=1.0):
  rng = np.random.default_rng(seed)
  return {"a": jnp.asarray(rng.normal(size=(4, 3)) * scale), "b": jnp.asarray(rng.normal(size=5) * scale)}


@pytest.mark.golden
def test_golden_grokking_stability_gradients(golden, x64):
  cases = [arrays for _, arrays, _ in golden("40-grokking_stability").cases() if "w0" in arrays]
  assert cases
  for case in cases:
    names = [name[1:] for name in case if name.startswith("w")]
    params = {name: jnp.asarray(case[f"w{name}"]) for name in names}
    found = apply({name: jnp.asarray(case[f"g{name}"]) for name in names}, params)
    for name in names:
      w, g = case[f"w{name}"].ravel(), case[f"g{name}"].ravel()
      cosine = abs(w @ g) / max(np.linalg.norm(w) * np.linalg.norm(g), 1e-300)
      # The direction that is left of a nearly parallel gradient is known to fewer digits.
      tolerance = 1e-8 if cosine > 0.9 else 1e-10
      np.testing.assert_allclose(found[name], case[f"out_g{name}"], rtol=tolerance, atol=1e-10)


@pytest.mark.golden
def test_golden_grokking_stability_trajectories(golden, x64):
  file = golden("40-grokking_stability")
  sgd, adamw = file.meta["sgd"], file.meta["adamw"]
  optimizers = {
    "sgd": optax.sgd(sgd["lr"], momentum=sgd["momentum"]),
    "adamw": optax.adamw(adamw["lr"], *adamw["betas"], eps=adamw["eps"], weight_decay=adamw["weight_decay"]),
  }
  runs = 0
  for _, case, _ in file.cases():
    for name, optimizer in optimizers.items():
      if f"{name}_W0" not in case:
        continue
      runs += 1
      params = {leaf: jnp.asarray(case[f"{name}_{leaf}0"]) for leaf in ("W", "b")}
      target = {leaf: jnp.asarray(case[f"{name}_{leaf}target"]) for leaf in ("W", "b")}
      tx = orthogonal(optimizer)
      state, update = tx.init(params), jax.jit(tx.update)
      for step in range(len(case[f"{name}_out_W"])):
        updates, state = update(jax.tree.map(jnp.subtract, params, target), state, params)
        params = optax.apply_updates(params, updates)
        for leaf in params:
          np.testing.assert_allclose(params[leaf], case[f"{name}_out_{leaf}"][step], rtol=1e-12, atol=1e-12)
  assert runs


@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize("per_leaf", [True, False])
def test_projection(per_leaf, renormalize, x64):
  g, w = tree(0, 1e-3), tree(1)
  o = apply(g, w, per_leaf, renormalize)
  groups = [[name] for name in g] if per_leaf else [list(g)]
  for names in groups:
    join = lambda t, names=names: np.concatenate([np.ravel(t[name]) for name in names])
    left, weight, raw = join(o), join(w), join(g)
    assert abs(left @ weight) <= 1e-12 * np.linalg.norm(left) * np.linalg.norm(weight)
    formula = raw - raw @ weight / (weight @ weight) * weight
    factor = np.linalg.norm(raw) / np.linalg.norm(formula) if renormalize else 1
    np.testing.assert_allclose(left, formula * factor, rtol=1e-10)
  for other in (apply(o, w, per_leaf, renormalize), apply(g, jax.tree.map(lambda x: -7 * x, w), per_leaf, renormalize)):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10), other, o)


# Beyond a share of 1e4 what is left of a float32 gradient is its rounding, which has no direction to check.
@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.floats(-12, 4), st.sampled_from([1e-30, 1e-4, 1.0, 1e6, 1e30]))
def test_nearly_parallel_and_extreme_gradients(seed, log_share, scale):
  rng = np.random.default_rng(seed)
  w = rng.normal(size=6)
  g = rng.normal(size=6) + 10**log_share * w
  g = scale * g / np.abs(g).max()
  w, g = jnp.asarray(w, jnp.float32), jnp.asarray(g, jnp.float32)
  o = np.asarray(apply({"a": g}, {"a": w})["a"], np.float64)
  wide = np.asarray(w, np.float64), np.asarray(g, np.float64)
  assert np.isfinite(o).all()
  assert abs(o @ wide[0]) <= 1e-5 * np.linalg.norm(o) * np.linalg.norm(wide[0])
  assert np.linalg.norm(o) == pytest.approx(np.linalg.norm(wide[1]), rel=1e-5)


def test_special_cases(x64):
  g = {"zero_weight": jnp.array([1.0, 2.0]), "orthogonal": jnp.array([0.0, 3.0]), "zero": jnp.zeros(2)}
  w = {"zero_weight": jnp.zeros(2), "orthogonal": jnp.array([2.0, 0.0]), "zero": jnp.ones(2)}
  chex.assert_trees_all_equal(apply(g, w), g)


def test_sgd_norm_growth(x64):
  w, tx = tree(2), orthogonal(optax.sgd(0.3))
  state = tx.init(w)
  for seed in range(3):
    g = tree(seed + 10)
    updates, state = tx.update(g, state, w)
    moved = optax.apply_updates(w, updates)
    for name in w:
      growth = jnp.sum(moved[name] ** 2) - jnp.sum(w[name] ** 2)
      np.testing.assert_allclose(growth, 0.09 * jnp.sum(g[name] ** 2), rtol=1e-10)
    w = moved


BASES = {
  "sgd": optax.sgd(0.1, momentum=0.9),
  "adam": optax.adam(0.1),
  "adamw": optax.adamw(0.1),
  "lion": optax.lion(0.1),
}


@pytest.mark.parametrize("base", BASES)
def test_composes(base):
  params = {
    "kernel": jnp.ones((3, 2), jnp.bfloat16),
    "bias": jnp.ones(2),
    "scale": jnp.array(2.0),
    "empty": jnp.zeros((0, 3)),
    "none": None,
  }
  grads = {
    "kernel": jnp.arange(6.0, dtype=jnp.bfloat16).reshape(3, 2),
    "bias": jnp.array([1.0, -2.0]),
    "scale": jnp.array(0.5),
    "empty": jnp.zeros((0, 3)),
    "none": None,
  }
  tx = optax.chain(
    optax.masked(orthogonalize_gradients(), lambda p: jax.tree.map(lambda leaf: jnp.size(leaf) > 1, p)), BASES[base]
  )
  alone = orthogonal(BASES[base])
  labels = {"kernel": "orthogonal", "bias": "plain", "scale": "plain", "empty": "orthogonal", "none": "plain"}
  parts = optax.multi_transform({"orthogonal": alone, "plain": BASES[base]}, labels)
  for transformation in (tx, alone, parts):
    state = transformation.init(params)
    updates, state = jax.jit(transformation.update)(grads, state, params)
    moved = optax.apply_updates(params, updates)
    assert jax.tree.map(jnp.result_type, moved) == jax.tree.map(jnp.result_type, params)
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(moved))


def test_none_updates_of_existing_parameters():
  found = apply({"a": jnp.array([1.0, 0.0]), "b": None}, {"a": jnp.array([0.0, 1.0]), "b": jnp.ones(3)})
  assert found["b"] is None and found["a"].tolist() == [1.0, 0.0]


@pytest.mark.parametrize("per_leaf", [True, False])
def test_empty_tree_and_scalar(per_leaf):
  assert apply({}, {}, per_leaf) == {}
  # A scalar's gradient is always parallel to it.
  assert apply(jnp.array(3.0), jnp.array(2.0), per_leaf) == 0


def test_vmap_pmap_and_traced_eps():
  g, w = jax.random.normal(jax.random.key(0), (2, 8, 5))
  one = lambda g, w: orthogonalize_gradients(eps=jnp.float32(1e-30)).update(g, optax.EmptyState(), w)[0]
  loop = jnp.stack([one(*pair) for pair in zip(g, w)])
  np.testing.assert_allclose(jax.vmap(one)(g, w), loop, rtol=1e-5)
  np.testing.assert_allclose(jax.pmap(one)(g, w), loop, rtol=1e-5)
  traced = jax.jit(lambda eps: orthogonalize_gradients(eps=eps).update(g[0], optax.EmptyState(), w[0])[0])
  np.testing.assert_allclose(traced(1e-30), loop[0], rtol=1e-5)


def test_bad_input():
  tx = orthogonalize_gradients()
  with pytest.raises(ValueError, match="params must be given"):
    tx.update(jnp.ones(2), optax.EmptyState())
  with pytest.raises(ValueError, match="equal shapes"):
    tx.update(jnp.ones(2), optax.EmptyState(), jnp.ones((2, 1)))
  with pytest.raises(ValueError, match="eps"):
    orthogonalize_gradients(eps=-1.0)


TRANSFORMS = [
  transform_row(
    orthogonalize_gradients,
    lambda base, eps: optax.chain(orthogonalize_gradients(eps=eps), base),
    eps=(1e-30, 1e-3),
  ),
  transform_row(
    orthogonal,
    lambda base, eps: orthogonal(base, renormalize=False, eps=eps),
    eps=(1e-30, 1e-3),
  ),
]
