"""Pareto fronts and the best value within a cost."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxreg.metrics import pareto
from tests.conformance import BAD_SAME_SHAPE, EXTREME, extremes, row

fronts = jax.jit(pareto.pareto_front)


best = jax.jit(pareto.best_within_cost)


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=7, max_size=7))
@settings(max_examples=30, deadline=None)
def test_pareto_front_is_who_is_not_dominated(points):
  costs, values = np.array(points, np.float32).T
  dominated = [any((a, -b) != (c, -v) and a <= c and b >= v for a, b in points) for c, v in points]
  assert fronts(costs, values).tolist() == [not each for each in dominated]
  reached = [max((b for a, b in points if a <= budget), default=-np.inf) for budget in range(-1, 6)]
  assert best(costs, values, np.arange(-1, 6, dtype=np.float32)).tolist() == reached


def test_fronts_of_several_at_once_and_bad_input():
  costs, values = np.random.default_rng(0).normal(size=(2, 3, 7)).astype(np.float32)
  np.testing.assert_array_equal(fronts(costs, values), [fronts(c, v) for c, v in zip(costs, values)])
  with pytest.raises(ValueError, match="shapes"):
    pareto.pareto_front(costs, values[:, 1:])
  with pytest.raises(ValueError, match="costs must be floating"):
    pareto.best_within_cost(costs.astype(int), values, values)
  with pytest.raises(ValueError, match="budgets must be floating"):
    pareto.best_within_cost(costs, values, values.astype(int))


ROWS = [
  row(
    pareto.pareto_front,
    lambda rng: (rng.normal(size=(3, 4)), rng.normal(size=(3, 4))),
    bad=(*BAD_SAME_SHAPE, ("costs", lambda c, v: (c.astype(np.int32), v))),
    differentiable=False,
    wide=True,
  ),
  row(
    pareto.best_within_cost,
    lambda rng: (rng.uniform(size=(3, 4)), rng.normal(size=(3, 4)), rng.uniform(1, 2, (3, 5))),
    extreme=lambda c, v, b: (extremes(c), extremes(v), EXTREME * b),
    bad=(
      ("shapes", lambda c, v, b: (c[1:], v, b)),
      ("costs", lambda c, v, b: (c.astype(np.int32), v, b)),
      ("budgets", lambda c, v, b: (c, v, b.astype(np.int32))),
    ),
    differentiable=False,
  ),
]
