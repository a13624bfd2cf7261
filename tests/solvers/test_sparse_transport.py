"""Sparsity-constrained optimal transport against linear programs, quadratic programs and POT's and vmoe's functions."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.optimize
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxreg.solvers import sparse_transport as ot
from tests.conformance import EXAMPLES, row, sparse_row

M, N = 6, 4


def problem(seed, m=M, n=N):
  rng = np.random.default_rng(seed)
  return rng.uniform(size=(m, n)), rng.dirichlet(np.full(m, 3.0)), rng.dirichlet(np.full(n, 3.0))


def linear_program(cost, a, b):
  """The unregularized value."""
  m, n = cost.shape
  marginals = np.vstack([np.kron(np.eye(m), np.ones(n)), np.kron(np.ones(m), np.eye(n))])
  return scipy.optimize.linprog(cost.ravel(), A_eq=marginals, b_eq=np.concatenate([a, b])).fun


@functools.cache
def solver(k):
  """A compiled solver; problems and regularization are arguments."""

  @jax.jit
  def solve(cost, a, b, gamma):
    return ot.solve_sparse_transport(cost, a, b, k=k, regularization=gamma, steps=2000, tolerance=1e-8)

  return solve


@functools.cache
def functions(k):
  """Compiled: the conjugate's and the maximum's value, and the semi-dual with its plan."""

  @jax.jit
  def evaluate(alpha, beta, cost, a, b, gamma):
    scores = alpha[:, None] + beta - cost
    options = {"k": k, "axis": 0}
    total = lambda function: lambda s, r: (jnp.sum(function(s, regularization=r, **options)),) * 2
    pair = lambda function, s, r: (
      function(s, regularization=r, **options),
      jax.grad(lambda s: total(function)(s, r)[0])(s),
    )
    semidual = lambda *args: ot.sparse_transport_semidual(*args, k=k, regularization=gamma)
    dual = lambda *args: ot.sparse_transport_dual(*args, k=k, regularization=gamma)
    return {
      "conjugate": pair(ot.sparse_conjugate, scores, gamma),
      "max": pair(ot.sparse_max, alpha[:, None] - cost, gamma * b),
      "semidual": jax.value_and_grad(semidual)(alpha, cost, a, b),
      "dual": jax.value_and_grad(dual, argnums=(0, 1))(alpha, beta, cost, a, b),
      "plan": ot.sparse_transport_plan(alpha, cost, b, k=k, regularization=gamma),
    }

  return evaluate


@pytest.mark.golden
def test_golden_41_sparse_ot_functions_and_optimum(golden, x64):
  close = functools.partial(np.testing.assert_allclose, rtol=1e-10, atol=1e-12)
  for case, arrays, _ in golden("41-sparse_ot").cases():
    meta = golden("41-sparse_ot").meta["cases"][case.removeprefix("case")]
    if "C" not in arrays:
      continue
    cost, a, b, alpha, beta = (jnp.asarray(arrays[name]) for name in ("C", "a", "b", "alpha", "beta"))
    k, gamma = meta["k"], meta["gamma"]
    got = functions(k)(alpha, beta, cost, a, b, gamma)
    close(got["max"][0], arrays["out_max_val"])
    close(got["max"][1], arrays["out_max_grad"])
    close(got["plan"], arrays["out_max_grad"] * b)
    close(got["semidual"][0], arrays["out_semidual"])
    close(got["semidual"][1], arrays["grad_semidual_alpha"])
    close(got["conjugate"][0], arrays["out_conj_val"])
    close(got["conjugate"][1], arrays["out_conj_grad"])
    close(got["dual"][0], arrays["out_dual"])
    close(got["dual"][1][0], arrays["grad_dual_alpha"])
    close(got["dual"][1][1], arrays["grad_dual_beta"])
    solved = solver(k)(cost, a, b, gamma)
    np.testing.assert_allclose(solved.value, arrays["out_semidual_opt"], rtol=1e-6)
    np.testing.assert_allclose(linear_program(*map(np.asarray, (cost, a, b))), arrays["out_unregularised_ot"])
    if "out_plan_opt" in arrays:
      assert solved.residual < 1e-5
      np.testing.assert_allclose(solved.plan, arrays["out_plan_opt"], atol=1e-6)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([1, 3, M]), st.floats(0.1, 3.0))
def test_any_potential(seed, k, gamma):
  """Fenchel-Young, gradients, columns and cardinality, weak duality, shift invariance, at potentials at random."""
  cost, a, b = problem(seed)
  rng = np.random.default_rng(seed)
  alpha, beta, shift = rng.normal(size=M), rng.normal(size=N), rng.normal()
  with jax.enable_x64(True):
    got = jax.tree.map(np.asarray, functions(k)(alpha, beta, cost, a, b, gamma))
    shifted = jax.tree.map(np.asarray, functions(k)(alpha + shift, beta, cost, a, b, gamma))
  scores = alpha[:, None] + beta - cost
  t = got["conjugate"][1]
  np.testing.assert_allclose(got["conjugate"][0], np.sum(t * scores - gamma / 2 * t**2, 0), rtol=1e-9, atol=1e-12)
  top = np.sort(np.maximum(scores, 0), 0)[::-1][:k]
  np.testing.assert_allclose(got["conjugate"][0], np.sum(top**2, 0) / (2 * gamma), rtol=1e-9, atol=1e-12)
  plan = got["plan"]
  np.testing.assert_allclose(plan.sum(0), b, rtol=1e-12)
  assert np.count_nonzero(plan, axis=0).max() <= k
  np.testing.assert_allclose(got["semidual"][1], a - plan.sum(1), atol=1e-12)
  np.testing.assert_allclose(got["dual"][1][0], a - t.sum(1), atol=1e-12)
  np.testing.assert_allclose(got["dual"][1][1], b - t.sum(0), atol=1e-12)
  # The semi-dual is the dual maximised over beta; both are below every feasible plan's cost: that of independence has
  # columns of full support, so it is feasible at k = M only.
  assert got["dual"][0] <= got["semidual"][0] + 1e-10
  independent = np.outer(a, b)
  if k == M:
    assert got["semidual"][0] <= np.sum(independent * cost) + gamma / 2 * np.sum(independent**2) + 1e-10
  if k == 1:
    assert got["semidual"][0] <= linear_program(cost, a, b) + gamma / 2 * np.sum(b**2) + 1e-8
  np.testing.assert_allclose(shifted["semidual"][0], got["semidual"][0], rtol=1e-9, atol=1e-10)
  np.testing.assert_allclose(shifted["plan"], plan, atol=1e-10)


def test_weak_duality_of_a_sparse_plan(x64):
  """A feasible plan with two non-zeros in every column: uniform marginals, two permutations."""
  for seed in range(3):
    cost = problem(seed, M, M)[0]
    uniform = np.full(M, 1 / M)
    rng = np.random.default_rng(seed)
    plan = 0.5 * uniform[0] * (np.eye(M)[rng.permutation(M)] + np.eye(M)[rng.permutation(M)])
    bound = np.sum(plan * cost) + 0.35 * np.sum(plan**2)
    for alpha in rng.normal(size=(10, M)) / 3:
      assert semidual_of_two(alpha, cost, uniform) <= bound
    assert solver(2)(cost, uniform, uniform, 0.7).value <= bound


@jax.jit
def semidual_of_two(alpha, cost, uniform):
  return ot.sparse_transport_semidual(alpha, cost, uniform, uniform, k=2, regularization=0.7)


def test_one_is_unregularized_transport(x64):
  for seed in range(2):
    cost, a, b = problem(seed)
    expected = linear_program(cost, a, b) + 0.2 * np.sum(b**2)
    np.testing.assert_allclose(solver(1)(cost, a, b, 0.4).value, expected, atol=1e-6)


def test_one_with_uniform_marginals_is_the_assignment(x64):
  uniform = np.full(M, 1 / M)
  cost = problem(5, M, M)[0]
  result = solver(1)(cost, uniform, uniform, 0.4)
  expected = np.zeros((M, M))
  expected[scipy.optimize.linear_sum_assignment(cost)] = 1 / M
  assert result.certified
  np.testing.assert_allclose(result.plan, expected, atol=1e-12)


def quadratic_program(cost, a, b, gamma):
  """Quadratically regularized transport by SciPy's SLSQP, on the primal."""
  flat, start = cost.ravel(), np.outer(a, b).ravel()
  marginals = np.vstack([np.kron(np.eye(M), np.ones(N)), np.kron(np.ones(M), np.eye(N))])[:-1]  # one is redundant
  found = scipy.optimize.minimize(
    lambda t: t @ flat + gamma / 2 * t @ t,
    start,
    jac=lambda t: flat + gamma * t,
    bounds=[(0, None)] * start.size,
    constraints={
      "type": "eq",
      "fun": lambda t: marginals @ t - np.concatenate([a, b])[:-1],
      "jac": lambda t: marginals,
    },
    method="SLSQP",
    options={"ftol": 1e-15, "maxiter": 500},
  )
  return found.x.reshape(M, N), found.fun


def test_all_is_quadratically_regularized_transport(x64):
  for seed, gamma in ((0, 0.8), (1, 2.0)):
    cost, a, b = problem(seed)
    result = solver(M)(cost, a, b, gamma)
    plan, value = quadratic_program(cost, a, b, gamma)
    np.testing.assert_allclose(result.plan, plan, atol=2e-6)  # SLSQP's own error
    np.testing.assert_allclose(result.value, value, atol=1e-7)
    np.testing.assert_allclose(result.plan.sum(1), a, atol=1e-6)
    primal = np.sum(result.plan * cost) + gamma / 2 * np.sum(np.square(result.plan))
    np.testing.assert_allclose(primal, result.value, atol=1e-6)
    slack = cost + gamma * result.plan - result.row_potential[:, None] - result.column_potential
    assert slack.min() > -1e-6 and np.abs(slack[result.plan > 0]).max() < 1e-6


def test_dual_and_semidual_agree(x64):
  cost, a, b = problem(2)
  result = jax.jit(functools.partial(ot.solve_sparse_transport_dual, k=M, steps=500, optimizer=optax.lbfgs()))(
    cost, a, b, tolerance=1e-7
  )
  semidual = solver(M)(cost, a, b, 1.0)
  assert result.certified
  np.testing.assert_allclose(result.value, semidual.value, rtol=1e-8)
  np.testing.assert_allclose(result.plan, semidual.plan, atol=1e-6)
  np.testing.assert_allclose(result.plan.sum(0), b, atol=1e-6)
  gap = result.row_potential - semidual.row_potential
  np.testing.assert_allclose(gap, gap[0], atol=1e-5)
  np.testing.assert_allclose(result.column_potential - semidual.column_potential, -gap[0], atol=1e-5)


def test_value_falls_with_k_and_scales(x64):
  cost, a, b = problem(3)
  values = [float(solver(k)(cost, a, b, 0.5).value) for k in (1, 2, M)]
  assert values[0] >= values[1] - 1e-7 and values[1] >= values[2] - 1e-7
  np.testing.assert_allclose(solver(M)(30 * cost, a, b, 30 * 0.5).value, 30 * values[2], rtol=1e-7)


def test_value_bounds_the_k_support_norm(x64):
  """Omega** is gamma times ott's halved squared k-overlap norm; the semi-dual's maximum is below the primal."""
  regularizers = pytest.importorskip("ott.geometry.regularizers", exc_type=ImportError)
  cost, a, b = problem(4)
  k, gamma = 2, 0.5
  plan = np.outer(a, b)
  sparse, dense = np.array([0.4, 0.0, 0.6, 0.0, 0.0, 0.0]), np.array([0.4, 0.1, 0.3, 0.1, 0.1, 0.0])
  columns = np.vstack([plan.T, sparse, dense])
  norms = gamma * np.asarray(jax.jit(jax.vmap(regularizers.SqKOverlap(k)))(columns))
  convex, halves = np.sum(cost * plan) + norms[:N].sum(), gamma / 2 * np.square(columns).sum(1)
  assert solver(k)(cost, a, b, gamma).value <= convex + 1e-9
  np.testing.assert_allclose(norms[N], halves[N], rtol=1e-6)
  assert np.all(norms[:N] > halves[:N]) and norms[-1] > halves[-1] + 1e-3


def test_envelope_gradients(x64):
  cost, a, b = problem(6)
  gradients = jax.jit(jax.grad(lambda *problem: solver(M)(*problem, 0.6).value, argnums=(0, 1, 2)))(cost, a, b)
  result = solver(M)(cost, a, b, 0.6)
  assert result.residual < 1e-5
  for gradient, expected in zip(gradients, (result.plan, result.row_potential, result.column_potential)):
    np.testing.assert_allclose(gradient, expected, atol=1e-10)
  step = 1e-5 * np.random.default_rng(0).normal(size=cost.shape)
  ahead, behind = (solver(M)(cost + sign * step, a, b, 0.6).value for sign in (1, -1))
  np.testing.assert_allclose((ahead - behind) / 2, np.sum(step * result.plan), rtol=1e-4)


def test_value_has_gradients_in_the_regularization_and_costs_by_reverse_mode(x64):
  cost, a, b = problem(7)

  def value(gamma, scale):
    return ot.solve_sparse_transport(scale * cost, a, b, k=M, regularization=gamma, steps=500, tolerance=1e-9).value

  gradients = jax.jit(jax.grad(value, argnums=(0, 1)))(0.6, 1.0)
  plan = solver(M)(cost, a, b, 0.6).plan
  np.testing.assert_allclose(gradients[0], np.sum(np.square(plan)) / 2, rtol=1e-6)
  np.testing.assert_allclose(gradients[1], np.sum(plan * cost), rtol=1e-6)
  dual = lambda gamma: ot.solve_sparse_transport_dual(cost, a, b, k=M, regularization=gamma, steps=500).value
  np.testing.assert_allclose(jax.jit(jax.grad(dual))(0.6), np.sum(np.square(plan)) / 2, rtol=1e-2)


def test_smooth_problems_are_certified_and_kinks_reached(x64):
  """A problem on which Adam alone stopped 1e-4 above the optimum; and unregularized transport, all of kinks."""
  rng = np.random.default_rng(66)
  cost = rng.uniform(size=(16, 16))
  a, b = rng.dirichlet([3] * 16), rng.dirichlet([3] * 16)
  smooth = solver(16)(cost, a, b, 0.5)
  assert smooth.certified and smooth.steps < 100
  primal = np.sum(smooth.plan * cost) + 0.25 * np.sum(np.square(smooth.plan))
  np.testing.assert_allclose(primal, smooth.value, atol=1e-8)
  kinked = solver(1)(cost, a, b, 0.5)  # the worst case seen; other problems of this size end within 1e-7
  np.testing.assert_allclose(kinked.value, linear_program(cost, a, b) + 0.25 * np.sum(b * b), atol=2e-5)


def test_the_best_potential_is_returned(x64):
  """A problem on which L-BFGS alone diverges."""
  cost, a, b = problem(144, 9, 7)
  options = dict(k=3, regularization=0.9, steps=200)
  result = jax.jit(functools.partial(ot.solve_sparse_transport, optimizer=optax.lbfgs(), **options))(
    cost, a, b, row_potential=np.zeros(9)
  )
  rounding = 1e-12 * np.abs(result.value)
  assert result.value >= result.history.max() - rounding and np.isfinite(result.value)
  best = ot.solve_sparse_transport(cost, a, b, **options | {"steps": 4000})
  assert result.value <= best.value + 1e-9


def test_rows_and_columns_without_mass(x64):
  cost, a, b = problem(9)
  a[1] = 0
  a /= a.sum()
  result = solver(M)(cost, a, b, 0.5)
  rest = solver(M - 1)(np.delete(cost, 1, 0), np.delete(a, 1), b, 0.5)
  assert result.residual < 1e-6
  np.testing.assert_allclose(result.value, rest.value, atol=1e-8)


@pytest.mark.parametrize("k", [1, 2])
def test_repaired_plans_are_feasible_and_nearly_optimal(k, x64):
  cost, a, b = problem(11, 8, 8)
  gamma = 0.3
  relaxed = solver(k)(cost, a, b, gamma)
  assert not relaxed.certified
  repair = functools.partial(ot.repair_sparse_transport, k=k, regularization=gamma, steps=1000, tolerance=1e-6)
  found = [jax.jit(functools.partial(repair, extra=extra))(cost, a, b, relaxed.row_potential) for extra in (0, 1, 3)]
  assert not found[0].certified
  result = found[2]
  assert result.certified
  np.testing.assert_allclose(result.plan.sum(1), a, atol=1e-6 * a.mean() * 2)
  np.testing.assert_allclose(result.plan.sum(0), b, atol=1e-12)
  for extra, each in zip((0, 1, 3), found):
    assert np.count_nonzero(each.plan, 0).max() <= k + extra
  for extra, each in zip((1, 3), found[1:]):
    assert each.value >= solver(k + extra)(cost, a, b, gamma).value - 1e-7
  primal = np.sum(result.plan * cost) + gamma / 2 * np.sum(np.square(result.plan))
  np.testing.assert_allclose(primal, result.value, atol=1e-6)


@pytest.mark.parametrize("k", [1, 3])
def test_a_column_without_mass_changes_nothing(k, x64):
  """Value, plan and gradients are those of the problem without it."""
  cost, a, b = problem(5)
  padded = np.concatenate([cost, np.full((M, 1), 0.3)], 1), a, np.append(b, 0.0)
  for solve in (ot.solve_sparse_transport, ot.solve_sparse_transport_dual):
    call = lambda cost, a, b, solve=solve: solve(cost, a, b, k=k, regularization=0.3, steps=1500)
    function = jax.jit(
      lambda cost, a, b, call=call: (call(cost, a, b), jax.grad(lambda *x: call(*x).value)(cost, a, b))
    )
    (one, _), (more, wide) = function(cost, a, b), function(*padded)
    np.testing.assert_allclose(more.value, one.value, rtol=1e-5)
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves((more, wide)))
    np.testing.assert_allclose(more.plan[:, -1], 0, atol=2e-4)
  semidual = functools.partial(ot.sparse_transport_semidual, k=k, regularization=0.3)
  alpha = np.linspace(0, 1, M)
  np.testing.assert_allclose(semidual(alpha, *padded), semidual(alpha, cost, a, b), rtol=1e-14)
  slopes = jax.grad(semidual, argnums=(0, 1, 2, 3))(jnp.asarray(alpha), *padded)
  assert all(jnp.isfinite(leaf).all() for leaf in slopes)
  np.testing.assert_allclose(slopes[3][-1], -(alpha - padded[0][:, -1]).max(), rtol=1e-12)  # the price of a first grain
  plan = ot.sparse_transport_plan(alpha, padded[0], padded[2], k=k, regularization=0.3)
  np.testing.assert_allclose(plan.sum(0), padded[2], atol=1e-12)


def test_repair_refuses():
  cost, a, b = problem(0)
  with pytest.raises(ValueError, match="extra must"):
    ot.repair_sparse_transport(cost, a, b, a, k=1, extra=-1)
  with pytest.raises(ValueError, match="k must"):
    ot.repair_sparse_transport(cost, a, b, a, k=M)


def test_batches_and_history(x64):
  """Leading axes are problems of their own, which stop on their own; the history ends at the value."""
  problems = list(map(problem, range(2)))
  result = solver(M)(*(np.stack(parts)[:, None] for parts in zip(*problems)), 0.8)
  assert result.plan.shape == (2, 1, M, N) and result.history.shape == (2, 1, 2000)
  assert result.certified.all() and result.steps[0] != result.steps[1] and result.steps.max() < 2000
  for index in range(2):
    alone = solver(M)(*problems[index], 0.8)
    np.testing.assert_allclose(result.plan[index, 0], alone.plan, atol=1e-9)
    assert alone.steps == result.steps[index, 0]
    np.testing.assert_allclose(alone.history[-1], alone.value, rtol=1e-12)
    assert alone.history[0] < alone.value


def test_bad_input():
  cost, a, b = problem(0)
  for arguments, named in (
    ((cost, b, b), "row_marginal must have the shape"),
    ((cost, a, a), "column_marginal must have the shape"),
    ((cost[0], a, b), "cost must have the shape"),
    ((cost > 0, a, b), "cost must be floating"),
  ):
    with pytest.raises(ValueError, match=named):
      ot.solve_sparse_transport(*arguments, k=1)
  for options in ({"k": 0}, {"k": M + 1}, {"regularization": 0.0}, {"steps": 0}, {"tolerance": -1.0}):
    with pytest.raises(ValueError, match=f"{next(iter(options))} must"):
      ot.solve_sparse_transport_dual(cost, a, b, **{"k": 1, **options})
  with pytest.raises(ValueError, match="row_potential must have the shape"):
    ot.solve_sparse_transport(cost, a, b, k=1, row_potential=b)


def test_maximum_has_the_right_second_derivative(x64):
  scores = jnp.array([0.9, 0.2, 0.7])
  hessian = jax.jit(jax.hessian(lambda s: ot.sparse_max(s, k=2, regularization=0.5)))(scores)
  expected = [[1.0, 0.0, -1.0], [0.0, 0.0, 0.0], [-1.0, 0.0, 1.0]]  # of the projection of s / 0.5
  np.testing.assert_allclose(hessian, expected, atol=1e-14)


def _transport(rng):
  """Potentials, costs and marginals of problems of four rows and three columns."""
  alpha, beta = (rng.normal(size=(EXAMPLES, size)) for size in (4, 3))
  marginals = [rng.dirichlet(np.full(size, 3.0), EXAMPLES) for size in (4, 3)]
  return alpha, beta, rng.uniform(size=(EXAMPLES, 4, 3)), *marginals


def transport(function, chosen):
  """`function(*arguments, k, regularization)`, a result per problem, with the chosen ones of `_transport`."""

  def arguments(rng):
    problem = _transport(rng)
    return tuple(problem[index] for index in chosen)

  bad = (
    ("row_potential", lambda alpha, *rest: (alpha[:, 1:], *rest)),
    ("row_potential", lambda alpha, *rest: (alpha[:1], *rest)),
    ("row_potential", lambda alpha, *rest: (alpha.astype(np.int32), *rest)),
    ("column_marginal", lambda *rest: (*rest[:-1], rest[-1][:, 1:])),
  )
  options = dict(k=2, regularization=(0.2, 2.0))
  return row(function, arguments, bad=bad, examples="any", options=options)


ROWS = [
  sparse_row(ot.sparse_max, "scores", regularization=(0.2, 2.0)),
  sparse_row(ot.sparse_conjugate, "scores", regularization=(0.2, 2.0)),
  transport(ot.sparse_transport_semidual, (0, 2, 3, 4)),
  transport(ot.sparse_transport_dual, (0, 1, 2, 3, 4)),
  transport(ot.sparse_transport_plan, (0, 2, 4)),
]


EXEMPT = {
  "SparseTransportResult": "result of solve_sparse_transport",
  "repair_sparse_transport": "an iterative maximisation, compared with exact optima",
  "solve_sparse_transport": "an iterative maximisation, compared with exact optima",
  "solve_sparse_transport_dual": "an iterative maximisation, compared with exact optima",
}
