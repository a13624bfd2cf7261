"""The projection on the simplex with at most k non-zeros."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxreg.solvers import projections
from jaxreg.solvers.projections import sparse_simplex_projection
from tests.conformance import sparse_row

SIZE = 6


def simplex(v, scale):
  u = np.sort(v)[::-1]
  excess = (np.cumsum(u) - scale) / np.arange(1, u.size + 1)
  return np.maximum(v - excess[np.flatnonzero(u > excess)[-1]], 0)


def brute_force(v, k, scale):
  """The nearest of the projections on all supports."""
  best = None
  for support in map(list, itertools.combinations(range(v.size), k)):
    p = np.zeros(v.size)
    p[support] = simplex(v[support], scale)
    if best is None or np.sum((p - v) ** 2) < np.sum((best - v) ** 2):
      best = p
  return best


@jax.jit
def all_projections(values, scale):
  return jnp.stack([sparse_simplex_projection(values, k=k, scale=scale) for k in (1, 2, 4, SIZE)])


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32 - 1), st.floats(0.1, 10.0))
def test_is_the_nearest_point(seed, scale):
  values = np.random.default_rng(seed).normal(size=SIZE) * 2
  with jax.enable_x64(True):
    for k, p in zip((1, 2, 4, SIZE), np.asarray(all_projections(values, scale))):
      np.testing.assert_allclose(p, brute_force(values, k, scale), atol=1e-10)
      np.testing.assert_allclose(p.sum(), scale, rtol=1e-12)
      assert p.min() >= 0 and np.count_nonzero(p) <= k


def test_all_entries_axis_and_ties(x64):
  values = jnp.asarray(np.random.default_rng(0).normal(size=(4, 5)))

  @jax.jit
  def project(values):
    return (
      jax.vmap(optax.projections.projection_simplex)(values),
      sparse_simplex_projection(values, k=5),
      sparse_simplex_projection(values.T, k=5, axis=0).T,
      sparse_simplex_projection(jnp.zeros_like(values), k=2),
    )

  whole, last, first, ties = project(values)
  np.testing.assert_allclose(last, whole, atol=1e-14)
  np.testing.assert_allclose(first, whole, atol=1e-14)
  np.testing.assert_array_equal(ties, np.tile([0.5, 0.5, 0, 0, 0], (4, 1)))


def test_derivative_lives_on_the_support(x64):
  values = jnp.array([0.9, -1.0, 0.7, 0.6])
  jacobian = jax.jit(jax.jacobian(lambda v: sparse_simplex_projection(v, k=2)))(values)
  expected = np.zeros((4, 4))
  expected[np.ix_([0, 2], [0, 2])] = [[0.5, -0.5], [-0.5, 0.5]]
  np.testing.assert_allclose(jacobian, expected, atol=1e-15)


def test_bad_input():
  for k in (0, 4, 1.5):
    with pytest.raises(ValueError, match="k must be an integer in"):
      sparse_simplex_projection(jnp.ones(3), k=k)
  with pytest.raises(ValueError, match="axis must be an axis"):
    sparse_simplex_projection(jnp.ones(3), k=1, axis=1)
  with pytest.raises(ValueError, match="scale must lie"):
    sparse_simplex_projection(jnp.ones(3), k=1, scale=0.0)


ROWS = [
  sparse_row(projections.sparse_simplex_projection, "values", scale=(0.5, 2.0)),
]
