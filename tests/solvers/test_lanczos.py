"""Lanczos vectors, Ritz pairs and the right-hand sides made of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxreg.solvers.lanczos import lanczos_decomposition, ritz_pairs, ritz_right_hand_sides

SIZE, STEPS = 30, 12


def test_vectors_and_ritz_values(x64):
  rng = np.random.default_rng(0)
  a = rng.normal(size=(SIZE, SIZE))
  a = a + a.T
  start = rng.normal(size=(5, 6))

  @jax.jit
  def run(start):
    result = lanczos_decomposition(lambda v: (a @ v.ravel()).reshape(5, 6), start, steps=STEPS)
    return result, ritz_pairs(result)

  result, (values, vectors) = run(start)
  q = np.asarray(result.vectors).reshape(STEPS, SIZE)
  np.testing.assert_allclose(q @ q.T, np.eye(STEPS), atol=1e-10)
  off = result.subdiagonal
  np.testing.assert_allclose(q @ a @ q.T, np.diag(result.diagonal) + np.diag(off, 1) + np.diag(off, -1), atol=1e-10)
  flat = np.asarray(vectors).reshape(STEPS, SIZE)
  np.testing.assert_allclose(flat @ a @ flat.T, np.diag(values), atol=1e-10)
  assert np.all(np.diff(values) >= 0)


def test_right_hand_sides_have_no_null_space(x64):
  """The graph Laplacian of a path has the constants as null space; half of the others are emphasised."""
  a = np.diag(np.r_[1.0, np.full(SIZE - 2, 2.0), 1.0]) - np.eye(SIZE, k=1) - np.eye(SIZE, k=-1)
  values, vectors = np.linalg.eigh(a)
  sides = jax.jit(lambda key: ritz_right_hand_sides(key, values, vectors.T, count=400, extra=3))(jax.random.key(0))
  np.testing.assert_allclose(np.linalg.norm(sides, axis=1), 1, rtol=1e-12)
  coefficients = np.asarray(sides) @ vectors
  np.testing.assert_allclose(coefficients[:, 0], 0, atol=1e-12)
  spread = np.sqrt(np.mean(coefficients[:, 1:] ** 2, 0))
  low = SIZE // 2 + 3
  np.testing.assert_allclose(spread[:low] / spread[low:].mean(), 9, rtol=0.2)
  np.testing.assert_allclose(spread[low:] / spread[low:].mean(), 1, rtol=0.2)


def test_exhausted_span_and_bad_input():
  result = jax.jit(lambda v: lanczos_decomposition(lambda v: 2 * v, v, steps=3))(jnp.ones(4))
  np.testing.assert_allclose(result.diagonal, [2, 0, 0], atol=1e-6)
  assert np.isfinite(result.vectors).all() and not np.any(result.vectors[1:])
  none = jax.jit(lambda v: lanczos_decomposition(lambda v: 2 * v, v, steps=3))(jnp.zeros(4))
  assert not any(np.any(leaf) for leaf in none)  # zeros, and no NaN
  gradient = jax.grad(lambda v: sum(jnp.sum(x) for x in lanczos_decomposition(lambda v: 2 * v, v, steps=3)))
  assert np.isfinite(gradient(jnp.ones(4))).all() and np.isfinite(gradient(jnp.zeros(4))).all()
  with pytest.raises(ValueError, match="steps must lie"):
    lanczos_decomposition(lambda v: v, jnp.ones(4), steps=5)
  with pytest.raises(ValueError, match="values must have the shape"):
    ritz_right_hand_sides(jax.random.key(0), jnp.ones(2), jnp.ones((3, 4)), count=1)
  with pytest.raises(ValueError, match="low_scale"):
    ritz_right_hand_sides(jax.random.key(0), jnp.ones(3), jnp.ones((3, 4)), count=1, low_scale=-1.0)


EXEMPT = {
  "LanczosResult": "result of lanczos_decomposition",
  "lanczos_decomposition": "vectors up to their sign, of an iteration on a function of the caller",
  "ritz_pairs": "eigenvectors, up to their sign",
  "ritz_right_hand_sides": "draws; its tests look at the spectrum",
}
