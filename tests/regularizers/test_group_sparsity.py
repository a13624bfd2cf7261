import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxreg.pruning.compaction import compact, compact_pair
from jaxreg.regularizers import group_sparsity
from jaxreg.regularizers.group_sparsity import (
  group_lasso,
  prox_group_lasso,
  prox_wgsef,
  wgsef,
  wgsef_conjugate,
  wgsef_minimizer,
)
from jaxreg.regularizers.groups import group_ids, group_norms, scale_groups
from tests.conformance import LAYER_GROUPS, penalty_row

GROUPS = np.array([0, 1, 1, 2, 2, 2, 3, 4, 4, 5])
WEIGHTS = np.array([1.0, 2.0, 3.0, 0.5, 2.0, 1.0])
M = 6


@functools.partial(jax.jit, static_argnames="num_groups")
def envelope(y, groups, k, d, num_groups=M):
  options = dict(k=k, weights=d, num_groups=num_groups)
  value, gradient = jax.value_and_grad(wgsef)(y, groups, **options)
  return value, gradient, wgsef_minimizer(y, groups, **options), wgsef_conjugate(y, groups, **options)


@functools.partial(jax.jit, static_argnames="num_groups")
def prox(y, groups, k, lam, d, num_groups=M):
  return prox_wgsef(y, groups, k=k, lam=lam, weights=d, num_groups=num_groups)


def sample(seed):
  rng = np.random.default_rng(seed)
  return rng.normal(size=GROUPS.size) * (10 ** rng.normal(size=M))[GROUPS]


def norms_of(y, groups=GROUPS, m=M):
  return np.sqrt(np.bincount(groups, weights=np.asarray(y) ** 2, minlength=m))


@pytest.mark.golden
def test_golden_wgsef(golden, x64):
  count = 0
  for _, case, _ in golden("49-wgsef").cases():
    count += 1
    y, groups, d, k, lam = (jnp.asarray(case[name]) for name in ("y", "group_id", "d", "k", "lam"))
    m = d.size
    close = lambda found, expected: np.testing.assert_allclose(
      found, expected, rtol=1e-9, atol=1e-13 * np.abs(expected).max()
    )
    value, gradient, _, _ = envelope(y, groups, k, d, m)
    close(value, case["out_value"])
    close(gradient, case["grad_value"])
    found, pullback = jax.vjp(functools.partial(prox, groups=groups, k=k, lam=lam, d=d, num_groups=m), y)
    close(found, case["out_prox"])
    close(pullback(jnp.asarray(case["cotangent"]))[0], case["grad_y_prox"])
    norms = jnp.sqrt(d) * norms_of(y, case["group_id"], m)
    close(group_sparsity._prox_minimizer(norms, lam * d, k), case["out_u"])
    assert (norms_of(found, case["group_id"], m) > 0).sum() == case["out_active_groups"]
  assert count


def test_ridge_and_feasible_points(x64):
  y = sample(0)
  for lam in (0.01, 1.0, 30.0):
    np.testing.assert_allclose(prox(y, GROUPS, M, lam, WEIGHTS), y / (1 + lam * WEIGHTS[GROUPS]), rtol=1e-12)
    np.testing.assert_allclose(prox(y, GROUPS, M + 5, lam, WEIGHTS), y / (1 + lam * WEIGHTS[GROUPS]), rtol=1e-12)
    for k in (1, 2, 3):
      few = np.where(GROUPS < k, y, 0)
      np.testing.assert_allclose(prox(few, GROUPS, k, lam, WEIGHTS), few / (1 + lam * WEIGHTS[GROUPS]), rtol=1e-12)
      half_square = 0.5 * np.sum(WEIGHTS[GROUPS] * few**2)
      np.testing.assert_allclose(envelope(few, GROUPS, k, WEIGHTS)[0], half_square, rtol=1e-12)
  np.testing.assert_allclose(envelope(y, GROUPS, M, WEIGHTS)[0], 0.5 * np.sum(WEIGHTS[GROUPS] * y**2), rtol=1e-12)


def test_one_group_is_half_the_squared_norm(x64):
  x = np.random.default_rng(1).normal(size=M)
  np.testing.assert_allclose(envelope(x, np.arange(M), 1, np.ones(M))[0], 0.5 * np.abs(x).sum() ** 2, rtol=1e-12)
  y = sample(1)
  lasso = group_lasso(jnp.asarray(y), GROUPS, weights=WEIGHTS)
  np.testing.assert_allclose(envelope(y, GROUPS, 1, WEIGHTS)[0], 0.5 * lasso**2, rtol=1e-12)


@settings(max_examples=30, deadline=None)
@given(
  st.integers(0, 10**6), st.integers(1, M), st.floats(-4, 3), st.booleans(), st.lists(st.integers(0, M - 1), max_size=4)
)
def test_fenchel_young_and_shape_of_the_prox(seed, k, log_lam, weighted, zeroed):
  with jax.enable_x64(True):
    y, lam = np.where(np.isin(GROUPS, zeroed), 0, sample(seed)), 10.0**log_lam
    d = WEIGHTS if weighted else np.ones(M)
    z = np.asarray(prox(y, GROUPS, k, lam, d))
    v = (y - z) / lam
    value, conjugate = envelope(z, GROUPS, k, d)[0], envelope(v, GROUPS, k, d)[3]
    np.testing.assert_allclose(value + conjugate, z @ v, rtol=1e-10, atol=1e-13)
    u = np.asarray(envelope(y, GROUPS, k, d)[2])
    assert u.sum() == pytest.approx(min(k, (norms_of(y) > 0).sum()), abs=1e-10)
    assert (u >= 0).all() and (u <= 1).all() and ((u > 0) == (norms_of(y) > 0)).all()
    assert (z * y >= 0).all()
    factor = np.divide(norms_of(z), norms_of(y), out=np.zeros(M), where=norms_of(y) > 0)
    np.testing.assert_allclose(z, factor[GROUPS] * y, atol=1e-12 * max(np.abs(y).max(), 1e-300))
    if not weighted:
      order = np.argsort(norms_of(y))
      assert (np.diff(norms_of(z)[order]) >= -1e-12 * np.abs(y).max()).all()


def conjugate_prox(w, k, lam, d):
  """argmin_v ||v - w||^2 / 2 + W*(v) / lam, with the top-k sum as a linear programme over (s, r)."""
  m = len(w)
  split = lambda x: (x[:m], x[m], x[m + 1 :])

  def objective(x):
    v, s, r = split(x)
    return 0.5 * np.sum((v - w) ** 2) + (k * s + r.sum()) / (2 * lam)

  def slope(x):
    v, _, _ = split(x)
    return np.concatenate([v - w, [k / (2 * lam)], np.full(m, 1 / (2 * lam))])

  start = np.concatenate([w, [0.0], w**2 / d])
  constraints = [
    {"type": "ineq", "fun": lambda x: split(x)[2] + split(x)[1] - split(x)[0] ** 2 / d},
    {"type": "ineq", "fun": lambda x: split(x)[2]},
  ]
  options = {"maxiter": 2000, "ftol": 1e-16}
  return split(scipy.optimize.minimize(objective, start, jac=slope, constraints=constraints, options=options).x)[0]


@pytest.mark.parametrize("k", [1, 2, 4])
def test_moreau(k, x64):
  rng = np.random.default_rng(k)
  for lam in (0.3, 2.0):
    y, d = rng.normal(size=M) * 2, rng.uniform(0.5, 2, size=M)
    total = prox(y, np.arange(M), k, lam, d) + lam * conjugate_prox(y / lam, k, lam, d)
    np.testing.assert_allclose(total, y, atol=1e-6)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, M), st.floats(-3, 2))
def test_firm_non_expansiveness(seed, k, log_lam):
  with jax.enable_x64(True):
    y, other = sample(seed), sample(seed + 1)
    difference = np.asarray(prox(y, GROUPS, k, 10.0**log_lam, WEIGHTS) - prox(other, GROUPS, k, 10.0**log_lam, WEIGHTS))
    assert difference @ difference <= difference @ (y - other) + 1e-12 * np.sum((y - other) ** 2)


def test_equivariance(x64):
  y, k, lam, rng = sample(3), 2, 0.7, np.random.default_rng(3)
  expected = np.asarray(prox(y, GROUPS, k, lam, WEIGHTS))
  order = rng.permutation(y.size)
  np.testing.assert_allclose(prox(y[order], GROUPS[order], k, lam, WEIGHTS), expected[order], rtol=1e-12)
  names = rng.permutation(M)
  renamed = np.empty(M)
  renamed[names] = WEIGHTS
  np.testing.assert_allclose(prox(y, names[GROUPS], k, lam, renamed), expected, rtol=1e-12)
  rotation = np.zeros((y.size, y.size))
  for group in range(M):
    inside = np.flatnonzero(GROUPS == group)
    rotation[np.ix_(inside, inside)] = np.linalg.qr(rng.normal(size=(inside.size, inside.size)))[0]
  np.testing.assert_allclose(prox(rotation @ y, GROUPS, k, lam, WEIGHTS), rotation @ expected, atol=1e-12)
  np.testing.assert_allclose(
    envelope(rotation @ y, GROUPS, k, WEIGHTS)[0], envelope(y, GROUPS, k, WEIGHTS)[0], rtol=1e-12
  )


@pytest.mark.parametrize("c", [1e-6, 0.5, -3.0, 1e4])
def test_homogeneity(c, x64):
  y = sample(4)
  for k in (1, 3, M):
    value = envelope(y, GROUPS, k, WEIGHTS)[0]
    np.testing.assert_allclose(envelope(c * y, GROUPS, k, WEIGHTS)[0], c**2 * value, rtol=1e-12)
    np.testing.assert_allclose(
      prox(c * y, GROUPS, k, 0.3, WEIGHTS), c * np.asarray(prox(y, GROUPS, k, 0.3, WEIGHTS)), rtol=1e-11
    )


def test_envelope(x64):
  rng = np.random.default_rng(5)
  for k in (1, 2, 4):
    parts = [np.where(np.isin(GROUPS, rng.permutation(M)[:k]), sample(s), 0) for s in range(5)]
    share = rng.dirichlet(np.ones(5))
    mixture = sum(c * part for c, part in zip(share, parts))
    bound = sum(c * 0.5 * np.sum(WEIGHTS[GROUPS] * part**2) for c, part in zip(share, parts))
    assert envelope(mixture, GROUPS, k, WEIGHTS)[0] <= bound * (1 + 1e-12)
  y = sample(6)
  values = [float(envelope(y, GROUPS, k, WEIGHTS)[0]) for k in range(1, M + 1)]
  assert (np.diff(values) <= 1e-12 * values[0]).all()


@pytest.mark.parametrize("k", [1, 2, 4])
def test_closed_form_is_the_variational_minimum(k, x64):
  y = np.random.default_rng(k).normal(size=GROUPS.size)
  squared = WEIGHTS * norms_of(y) ** 2
  found = scipy.optimize.minimize(
    lambda u: 0.5 * np.sum(squared / u), np.full(M, k / M), jac=lambda u: -0.5 * squared / u**2,
    bounds=[(1e-9, 1)] * M, constraints={"type": "ineq", "fun": lambda u: k - u.sum()},
    method="SLSQP", options={"ftol": 1e-14, "maxiter": 1000},
  )  # fmt: skip
  value, _, u, _ = envelope(y, GROUPS, k, WEIGHTS)
  np.testing.assert_allclose(value, found.fun, rtol=1e-5)
  np.testing.assert_allclose(0.5 * np.sum(squared / u), value, rtol=1e-12)


def test_gradient_is_the_slope(x64):
  y, step = sample(7), 1e-6
  for k in (1, 2, 5, M):
    gradient = envelope(y, GROUPS, k, WEIGHTS)[1]
    for index in range(y.size):
      shift = np.eye(y.size)[index] * step
      slope = (envelope(y + shift, GROUPS, k, WEIGHTS)[0] - envelope(y - shift, GROUPS, k, WEIGHTS)[0]) / (2 * step)
      np.testing.assert_allclose(gradient[index], slope, rtol=1e-6, atol=1e-6)


def test_prox_derivatives(x64):
  y, direction = sample(8), np.random.default_rng(8).normal(size=GROUPS.size)
  weight_direction = np.random.default_rng(9).normal(size=M)
  for k in (1, 2, 4):
    function = lambda y, lam, d, k=k: prox(y, GROUPS, k, lam, d)
    point, tangent = (y, 0.4, WEIGHTS), (direction, 0.3, weight_direction)
    forward = function(*(p + 1e-6 * v for p, v in zip(point, tangent)))
    backward = function(*(p - 1e-6 * v for p, v in zip(point, tangent)))
    _, found = jax.jvp(function, tuple(map(jnp.asarray, point)), tuple(map(jnp.asarray, tangent)))
    expected = (forward - backward) / 2e-6
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)


def test_zero_group_derivative(x64):
  # With fewer than k non-zero groups a zero group that moves is kept, otherwise it dies.
  y = np.where(GROUPS < 2, 1.0, 0.0)
  jacobian = lambda k: jax.jacfwd(lambda y: prox(y, GROUPS, k, 0.5, np.ones(M)))(y)[-1, -1]
  assert jacobian(3) == pytest.approx(1 / 1.5) and jacobian(2) == 0


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("y", [np.zeros(10), np.ones(10), np.full(10, 1e4), np.arange(10) > 4, np.eye(10)[3] * -1e4])
def test_ties_and_zeros_are_finite(y, dtype):
  y = jnp.asarray(y, dtype)
  for k in (1, 2, M):
    value, gradient, u, conjugate = envelope(y, GROUPS, k, WEIGHTS.astype(np.float32))
    assert value.dtype == gradient.dtype == conjugate.dtype == dtype
    for lam in (0.0, 1e-3, 50.0):
      point, pullback = _prox_vjp(y, k, lam)
      assert point.dtype == dtype
      assert all(np.isfinite(np.asarray(x, np.float32)).all() for x in (value, gradient, u, conjugate, point, pullback))
      if lam == 0:
        np.testing.assert_allclose(point, y, rtol=1e-6)


@jax.jit
def _prox_vjp(y, k, lam):
  point, pullback = jax.vjp(lambda y: prox(y, GROUPS, k, lam, np.ones(M, np.float32)), y)
  return point, pullback(jnp.ones_like(point))[0]


def test_wide_range_in_float32():
  rng = np.random.default_rng(10)
  y = (rng.normal(size=64) * 10 ** rng.uniform(-4, 4, size=64)).astype(np.float32)
  groups = np.arange(64)
  for k in (1, 8, 40):
    for lam in (1e-3, 0.1, 10.0):
      found = prox(y, groups, k, np.float32(lam), np.ones(64, np.float32), 64)
      with jax.enable_x64(True):
        expected = prox(y.astype(float), groups, k, float(np.float32(lam)), np.ones(64), 64)
      np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-6 * np.abs(y).max())


def test_sparsity_condition(x64):
  # Exactly the k strongest survive iff the next norm is at most lam / (1 + lam) of the k-th.
  lam, y = 0.5, np.array([5.0, 4.0, 3.0, 0.99, 0.5, 0.1])
  for fourth, survivors in ((0.999, 3), (1.01, 4)):
    y[3] = fourth
    assert (np.asarray(prox(y, np.arange(M), 3, lam, np.ones(M))) != 0).sum() == survivors


def test_group_lasso_prox_is_the_minimizer(x64):
  y, lam = jnp.asarray(sample(11)), 0.8
  z = prox_group_lasso(y, GROUPS, lam=lam, weights=WEIGHTS)
  objective = lambda z: 0.5 * jnp.sum((z - y) ** 2) + lam * group_lasso(z, GROUPS, weights=WEIGHTS)
  rng = np.random.default_rng(11)
  others = jax.vmap(objective)(z + jnp.asarray(rng.normal(size=(200, y.size)) * 10 ** rng.uniform(-4, 0, (200, 1))))
  assert (others >= objective(z)).all()
  active = z != 0
  gradient = jax.grad(objective)(z)
  np.testing.assert_allclose(jnp.where(active, gradient, 0), 0, atol=1e-10)
  assert (prox_group_lasso(jnp.zeros(10), GROUPS, lam=lam) == 0).all()
  assert jnp.isfinite(jax.grad(lambda y: prox_group_lasso(y, GROUPS, lam=lam).sum())(jnp.zeros(10))).all()


def test_transformations():
  y = np.stack([sample(seed) for seed in range(8)]).astype(np.float32)
  k, lam = jnp.arange(8) % 4 + 1, jnp.linspace(0.1, 2, 8)
  one = lambda y, k, lam: prox_wgsef(y, GROUPS, k=k, lam=lam)
  loop = np.stack([prox(*a, np.ones(M, np.float32)) for a in zip(y, [GROUPS] * 8, k, lam)])
  np.testing.assert_allclose(jax.jit(jax.vmap(one))(y, k, lam), loop, rtol=1e-5)
  np.testing.assert_allclose(jax.pmap(one)(y, k, lam), loop, rtol=1e-5)
  mesh = jax.make_mesh((8,), ("trial",), axis_types=(jax.sharding.AxisType.Auto,))
  spec = jax.sharding.PartitionSpec("trial")
  mapped = jax.shard_map(jax.vmap(one), mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
  np.testing.assert_allclose(jax.jit(mapped)(y, k, lam), loop, rtol=1e-5)
  sharded = jax.device_put(y, jax.sharding.NamedSharding(mesh, spec))
  np.testing.assert_allclose(jax.jit(jax.vmap(one))(sharded, k, lam), loop, rtol=1e-5)


def test_groups_over_several_tensors(x64):
  rng = np.random.default_rng(12)
  layer = {"kernel": jnp.asarray(rng.normal(size=(3, 4))), "bias": jnp.asarray(rng.normal(size=4))}
  ids = group_ids(layer, kind="neuron")
  joined = jnp.concatenate([layer["kernel"].reshape(-1), layer["bias"]])
  joined_ids = np.tile(np.arange(4), 4)
  np.testing.assert_allclose(wgsef(layer, ids, k=2), wgsef(joined, joined_ids, k=2), rtol=1e-12)
  found = prox_wgsef(layer, ids, k=2, lam=0.5)
  expected = prox_wgsef(joined, joined_ids, k=2, lam=0.5)
  np.testing.assert_allclose(jnp.concatenate([found["kernel"].reshape(-1), found["bias"]]), expected, rtol=1e-12)
  np.testing.assert_allclose(
    group_norms(layer, kind="neuron"), np.sqrt(np.sum(layer["kernel"] ** 2, 0) + layer["bias"] ** 2), rtol=1e-12
  )


def test_empty_and_scalar():
  assert wgsef({}, {}, k=1) == 0
  assert prox_wgsef({}, {}, k=1, lam=1.0) == {}
  assert prox_wgsef(jnp.zeros((0, 3)), np.zeros((0, 3), int), k=1, lam=1.0).shape == (0, 3)
  assert prox_wgsef(jnp.array(2.0), np.array(0), k=1, lam=1.0) == 1
  assert prox_wgsef({"a": jnp.array([2.0]), "b": None}, {"a": np.array([0]), "b": None}, k=1, lam=1.0)["b"] is None


def test_bad_input():
  y = jnp.ones(10)
  bad = [
    ("k must be an integer", lambda: wgsef(y, GROUPS, k=1.5)),
    ("k must lie", lambda: prox_wgsef(y, GROUPS, k=0, lam=1.0)),
    ("lam", lambda: prox_wgsef(y, GROUPS, k=1, lam=-1.0)),
    ("weights must lie", lambda: wgsef(y, GROUPS, k=1, weights=-WEIGHTS)),
    ("weights must have", lambda: wgsef(y, GROUPS, k=1, weights=WEIGHTS, num_groups=7)),
    ("groups must hold ids", lambda: wgsef(y, GROUPS, k=1, weights=WEIGHTS[:5])),
    ("groups must have the rank", lambda: wgsef(y[:, None], GROUPS, k=1)),
    ("groups must have the rank", lambda: scale_groups(y, GROUPS[:5], jnp.ones(M))),
    ("groups must be integer", lambda: wgsef(y, GROUPS * 1.0, k=1)),
    ("num_groups", lambda: jax.jit(lambda ids: wgsef(y, ids, k=1))(GROUPS)),
    ("values must be floating", lambda: wgsef(jnp.arange(10), GROUPS, k=1)),
    ("kind must be", lambda: group_ids(y, kind="column")),
    ("at least 2 axes", lambda: group_norms(y, kind="channel")),
    ("equally many groups", lambda: group_ids([jnp.ones((2, 3)), jnp.ones(2)], kind="neuron")),
    ("second must have inputs", lambda: compact_pair({"kernel": jnp.ones((2, 3))}, {"kernel": jnp.ones((4, 1))})),
    ("order must name", lambda: compact({}, order=("a",))),
  ]
  for message, call in bad:
    with pytest.raises(ValueError, match=message):
      call()


ROWS = [
  penalty_row(group_sparsity.wgsef, LAYER_GROUPS, k=(1, 4)),
  penalty_row(group_sparsity.wgsef_minimizer, LAYER_GROUPS, k=(1, 4), differentiable=False, wide=True),
  penalty_row(group_sparsity.wgsef_conjugate, LAYER_GROUPS, k=(1, 4)),
  penalty_row(group_sparsity.prox_wgsef, LAYER_GROUPS, k=(1, 4), lam=(0.0, 2.0)),
  penalty_row(group_sparsity.group_lasso, LAYER_GROUPS),
  penalty_row(group_sparsity.prox_group_lasso, LAYER_GROUPS, lam=(0.0, 2.0)),
]
