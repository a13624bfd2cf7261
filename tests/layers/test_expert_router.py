"""The sparse-transport router: its assignment, its gradients and what vmoe's router function does."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxreg.layers.expert_router import SparseTransportRouter, assign_tokens, expert_capacity


@pytest.mark.golden
def test_golden_41_sparse_ot_router(golden, x64):
  file = golden("41-sparse_ot")
  for case, arrays, _ in file.cases():
    if "logits" in arrays:
      meta = file.meta["cases"][case.removeprefix("case")]
      got = jax.jit(assign_tokens, static_argnames="k")(
        arrays["logits"], k=meta["k"], regularization=meta["gamma"], learning_rate=1e-2
      )
      np.testing.assert_allclose(jax.nn.softmax(arrays["logits"]), arrays["out_softmax"], rtol=1e-10)
      np.testing.assert_allclose(got.plan, arrays["out_plan_adam20"], atol=1e-6)
      np.testing.assert_allclose(got.combine, np.where(arrays["out_plan_adam20"] > 0, arrays["out_softmax"], 0))


def test_only_the_weights_have_gradients():
  logits = jax.random.normal(jax.random.key(0), (8, 3))
  total = lambda name: lambda logits: jnp.sum(getattr(assign_tokens(logits, k=2), name) ** 2)
  plan, combine = jax.jit(lambda logits: (jax.grad(total("plan"))(logits), jax.grad(total("combine"))(logits)))(logits)
  assert not np.any(plan) and np.all(np.isfinite(combine)) and np.any(combine)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_extreme_logits(dtype):
  """All tokens want the first expert; it takes its capacity."""

  def total(logits):
    assignment = assign_tokens(logits, k=2)
    return assignment.combine.astype(jnp.float32).sum(), assignment

  logits = jnp.tile(jnp.array([1e4, 0.0, -1e4], dtype), (6, 1))
  gradient, assignment = jax.jit(jax.grad(total, has_aux=True))(logits)
  assert assignment.combine.dtype == dtype and assignment.dispatch.sum(0).max() <= 2
  assert np.isfinite(np.asarray(gradient, np.float32)).all()


def test_module():
  router = SparseTransportRouter(experts=3, capacity_factor=1.0, multiple_of=1)
  tokens = jax.random.normal(jax.random.key(0), (2, 8, 4))
  shapes = jax.eval_shape(router.init, jax.random.key(1), tokens)["params"]
  assert jax.tree.map(jnp.shape, shapes) == {"scores": {"kernel": (4, 3)}}
  params = {"scores": {"kernel": np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)}}
  apply = jax.jit(lambda tokens: router.apply({"params": params}, tokens, mutable="intermediates"))
  assignment, state = apply(tokens)
  loads = np.asarray(assignment.dispatch).sum(1)
  assert loads.max() <= 3
  measured = {name: float(value[0]) for name, value in state["intermediates"].items()}
  expected = {"min_tokens": loads.min(), "mean_tokens": loads.mean(), "max_tokens": loads.max()}
  assert measured == {name: pytest.approx(float(value)) for name, value in expected.items()}
  # Groups are problems of their own.
  np.testing.assert_array_equal(apply(tokens[::-1])[0].dispatch, assignment.dispatch[::-1])


def test_capacity():
  assert expert_capacity(16, 4, multiple_of=1) == 4
  assert expert_capacity(17, 4) == 8
  assert expert_capacity(2, 8) == 2
  assert expert_capacity(100, 8, capacity_factor=1.05, multiple_of=1) == 14
  for options in ({"capacity_factor": 0.0}, {"multiple_of": 0}):
    with pytest.raises(ValueError, match=next(iter(options))):
      expert_capacity(16, 4, **options)
  with pytest.raises(ValueError, match="learning_rate"):
    assign_tokens(jnp.ones((4, 2)), k=1, learning_rate=0.0)
  with pytest.raises(ValueError, match="logits must be"):
    assign_tokens(jnp.ones((4, 2), int), k=1)


EXEMPT = {
  "ExpertAssignment": "result of assign_tokens",
  "SparseTransportRouter": "a module around assign_tokens",
  "assign_tokens": "the largest entries of an iterated plan, where ties are decided by rounding",
  "expert_capacity": "of Python integers",
}
