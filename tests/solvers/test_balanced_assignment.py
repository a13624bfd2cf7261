"""Balanced assignments: the published loop, its limit against ott-jax, masks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxreg.solvers import balanced_assignment
from jaxreg.solvers.balanced_assignment import sinkhorn_assignment
from tests.conformance import row, unchanged

LOGITS = np.tanh(np.random.default_rng(0).normal(size=(12, 5)))


def _published(logits, steps, epsilon=0.05):
  """The loop over whole matrices: clusters first, samples last."""
  q = np.exp(logits / epsilon).T
  q /= q.sum()
  for _ in range(steps):
    q /= q.sum(1, keepdims=True) * q.shape[0]
    q /= q.sum(0, keepdims=True) * q.shape[1]
  return (q * q.shape[1]).T


@pytest.mark.parametrize("steps", [1, 3, 10])
def test_agrees_with_the_published_loop(steps, x64):
  np.testing.assert_allclose(sinkhorn_assignment(LOGITS, steps=steps), _published(LOGITS, steps), atol=1e-12)


def test_sums(x64):
  few = sinkhorn_assignment(LOGITS.astype(np.float32))
  np.testing.assert_allclose(few.sum(-1), 1, atol=1e-6)
  many = sinkhorn_assignment(LOGITS, steps=200)
  np.testing.assert_allclose(many.sum(0), 12 / 5, atol=1e-6)
  np.testing.assert_allclose(sinkhorn_assignment(LOGITS + 7), sinkhorn_assignment(LOGITS), atol=1e-12)


def test_many_steps_are_the_plan_of_ott_jax(x64):
  linear = pytest.importorskip("ott.solvers.linear")
  pointcloud = pytest.importorskip("ott.geometry.geometry")
  geometry = pointcloud.Geometry(cost_matrix=jnp.asarray(-LOGITS), epsilon=0.05)
  plan = linear.solve(geometry, threshold=1e-10, max_iterations=5000).matrix
  np.testing.assert_allclose(sinkhorn_assignment(LOGITS, steps=500), 12 * plan, atol=1e-6)


def test_masked_samples_are_as_if_they_were_not_there(x64):
  where = np.arange(12) % 3 != 1
  spoiled = np.where(where[:, None], LOGITS, np.nan)
  masked = jax.jit(lambda z: sinkhorn_assignment(z, where=where))(spoiled)
  np.testing.assert_allclose(masked[where], sinkhorn_assignment(LOGITS[where]), atol=1e-12)
  assert not np.any(masked[~where])
  assert not np.any(sinkhorn_assignment(LOGITS, where=np.zeros(12, bool)))
  stacked = sinkhorn_assignment(np.stack([LOGITS, LOGITS]), where=np.stack([where, ~where]))
  np.testing.assert_allclose(stacked[1][~where], sinkhorn_assignment(LOGITS[~where]), atol=1e-12)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_finite_where_exponentials_are_not(dtype):
  for scale in (1.0, 1e4):
    assigned = sinkhorn_assignment((scale * jnp.sign(LOGITS)).astype(dtype), where=jnp.arange(12) > 0)
    assert assigned.dtype == jnp.float32 and jnp.isfinite(assigned).all()
    np.testing.assert_allclose(assigned[1:].sum(-1), 1, atol=1e-5)


def test_no_gradient():
  assert not np.any(jax.grad(lambda z: (sinkhorn_assignment(z) ** 2).sum())(jnp.asarray(LOGITS)))


def test_bad_input():
  with pytest.raises(ValueError, match="logits must be"):
    sinkhorn_assignment(LOGITS[0])
  with pytest.raises(ValueError, match="where must be boolean"):
    sinkhorn_assignment(LOGITS, where=np.ones(5, bool))
  with pytest.raises(ValueError, match="epsilon must lie in"):
    sinkhorn_assignment(LOGITS, epsilon=0.0)
  with pytest.raises(ValueError, match="steps must lie in"):
    sinkhorn_assignment(LOGITS, steps=0)


ROWS = [
  row(
    balanced_assignment.sinkhorn_assignment,
    lambda rng: (np.tanh(rng.normal(size=(8, 4))),),
    extreme=unchanged,
    bad=(("logits", lambda z: (z.astype(np.int32),)), ("logits", lambda z: (z[0],))),
    differentiable=False,
    wide=True,
    options=dict(epsilon=(0.05, 0.5)),
  ),
]
