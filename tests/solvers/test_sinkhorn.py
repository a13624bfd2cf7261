"""Sinkhorn's algorithm against ott-jax in the limit, and transport without regularization."""

import jax
import numpy as np
import pytest

from jaxreg.solvers.sinkhorn import sinkhorn_plan, sinkhorn_potentials

M, N = 5, 7


def problem(seed):
  rng = np.random.default_rng(seed)
  return rng.uniform(size=(M, N)), rng.dirichlet(np.full(M, 3.0)), rng.dirichlet(np.full(N, 3.0))


def test_the_limit_is_that_of_ott(x64):
  linear = pytest.importorskip("ott.solvers.linear", exc_type=ImportError)
  from ott.geometry import geometry

  cost, a, b = problem(0)
  plan = sinkhorn_plan(cost, a, b, epsilon=0.05, steps=2000)
  solved = jax.jit(lambda: linear.solve(geometry.Geometry(cost, epsilon=0.05), a, b, threshold=1e-12).matrix)()
  np.testing.assert_allclose(plan, solved, atol=1e-9)


def test_rows_are_exact_and_columns_improve(x64):
  cost, a, b = problem(1)
  errors = []
  for steps in (1, 5, 50):
    plan = sinkhorn_plan(cost, a, b, epsilon=0.1, steps=steps)
    np.testing.assert_allclose(plan.sum(1), a, rtol=1e-12)
    errors.append(np.abs(plan.sum(0) - b).max())
  assert errors[0] > errors[1] > errors[2] and errors[2] < 1e-3


def test_a_warm_start_goes_on(x64):
  cost, a, b = problem(2)
  f, _ = sinkhorn_potentials(cost, a, b, epsilon=0.1, steps=4)
  again = sinkhorn_potentials(cost, a, b, epsilon=0.1, steps=3, row_potential=f)
  for one, other in zip(again, sinkhorn_potentials(cost, a, b, epsilon=0.1, steps=7)):
    np.testing.assert_allclose(one, other, rtol=1e-12)


def test_rows_without_mass_have_no_part(x64):
  cost, a, b = problem(3)
  a[2] = 0
  a /= a.sum()
  plan = sinkhorn_plan(cost, a, b, epsilon=0.1, steps=50)
  rest = sinkhorn_plan(np.delete(cost, 2, 0), np.delete(a, 2), b, epsilon=0.1, steps=50)
  np.testing.assert_array_equal(plan[2], 0)
  np.testing.assert_allclose(np.delete(plan, 2, 0), rest, rtol=1e-10)


def test_small_epsilon_and_large_costs_stay_finite():
  cost, a, b = (np.asarray(array, np.float32) for array in problem(4))
  f, g = sinkhorn_potentials(1e4 * cost, a, b, epsilon=1e-2, steps=20)
  assert np.isfinite(f).all() and np.isfinite(g).all()


def test_mapped_problems_and_bad_input(x64):
  problems = [np.stack(parts) for parts in zip(*map(problem, range(3)))]
  plans = sinkhorn_plan(*problems, epsilon=0.1, steps=5)
  mapped = jax.jit(jax.vmap(lambda *each: sinkhorn_plan(*each, epsilon=0.1, steps=5)))(*problems)
  np.testing.assert_allclose(plans, mapped, rtol=1e-12)
  cost, a, b = problem(0)
  with pytest.raises(ValueError, match="column_marginal must have the shape"):
    sinkhorn_plan(cost, a, a, epsilon=0.1, steps=5)
  for options in ({"epsilon": 0.0}, {"steps": 0}):
    with pytest.raises(ValueError, match=f"{next(iter(options))} must"):
      sinkhorn_potentials(cost, a, b, **{"epsilon": 0.1, "steps": 5, **options})


EXEMPT = {
  "sinkhorn_plan": "an iterative solver whose result is float32 at least, compared with ott-jax in the limit",
  "sinkhorn_potentials": "an iterative solver whose result is float32 at least, compared with ott-jax in the limit",
}
