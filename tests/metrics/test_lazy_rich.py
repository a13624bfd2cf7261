"""Alignment and difficulty of kernels, motion of weights, the gap between fitting and generalising."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxreg.metrics import lazy_rich
from tests.conformance import EXTREME, draw_layer, row

pytestmark = pytest.mark.usefixtures("x64")


def test_alignment():
  rng = np.random.default_rng(0)
  targets = jnp.asarray(rng.normal(size=(6, 2)))
  np.testing.assert_allclose(lazy_rich.kernel_alignment(targets @ targets.T, targets), 1, rtol=1e-12)
  one = targets[:, 0]
  np.testing.assert_allclose(lazy_rich.kernel_alignment(-jnp.outer(one, one), one), -1, rtol=1e-12)
  factor = jnp.asarray(rng.normal(size=(6, 4)))
  kernel = factor @ factor.T
  expected = one @ kernel @ one / (jnp.linalg.norm(kernel) * one @ one)
  np.testing.assert_allclose(lazy_rich.kernel_alignment(kernel, one), expected, rtol=1e-12)
  np.testing.assert_allclose(lazy_rich.kernel_alignment(kernel * 1e-200, one * 1e200), expected, rtol=1e-12)
  value, gradient = jax.value_and_grad(lazy_rich.kernel_alignment)(jnp.zeros((6, 6)), one)
  assert value == 0 and jnp.isfinite(gradient).all()


def test_difficulty_is_the_lazy_distance():
  """The least-norm parameters of a linear model that fits the targets have this squared length."""
  rng = np.random.default_rng(1)
  features, targets = jnp.asarray(rng.normal(size=(4, 9))), jnp.asarray(rng.normal(size=4))
  least = jnp.linalg.pinv(features) @ targets
  np.testing.assert_allclose(lazy_rich.kernel_difficulty(features @ features.T, targets), least @ least, rtol=1e-10)
  both = lazy_rich.kernel_difficulty(features @ features.T, jnp.stack([targets, targets], 1), ridge=0.5)
  one = lazy_rich.kernel_difficulty(features @ features.T, targets, ridge=0.5)
  np.testing.assert_allclose(both, 2 * one, rtol=1e-12)


def test_relative_motion():
  start = ({"w": jnp.array([3.0, 0.0])}, jnp.array([4.0]))
  moved = ({"w": jnp.array([3.0, 1.0])}, jnp.array([4.0]))
  np.testing.assert_allclose(lazy_rich.relative_motion(moved, start), 0.2, rtol=1e-12)
  value, gradient = jax.value_and_grad(lazy_rich.relative_motion)(start, start)
  assert value == 0 and all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 2), st.floats(0, 2)), min_size=1, max_size=12))
def test_gap_is_what_a_loop_finds(pairs):
  train, test = np.array([(1.0, 1.0), *pairs]).T
  steps = 3 * np.arange(len(train))
  with jax.enable_x64(True):
    fitted, generalized, gap = lazy_rich.grokking_gap(jnp.asarray(steps), jnp.asarray(train), jnp.asarray(test))
  first = next((step for step, loss in zip(steps, train) if loss <= 0.1), np.inf)
  last = max(index for index, loss in enumerate(test) if loss > 0.3)
  expected = steps[last + 1] if last + 1 < len(steps) else np.inf
  assert (float(fitted), float(generalized)) == (first, expected)
  np.testing.assert_equal(float(gap), float(expected) - float(first))


def test_bad_input():
  losses = jnp.ones(2)
  cases = (
    ("kernel must be a square", lambda: lazy_rich.kernel_alignment(jnp.ones((2, 3)), jnp.ones(2))),
    ("targets must be", lambda: lazy_rich.kernel_difficulty(jnp.eye(2), jnp.ones(3))),
    ("ridge must", lambda: lazy_rich.kernel_difficulty(jnp.eye(2), jnp.ones(2), ridge=-1.0)),
    ("initial_params must", lambda: lazy_rich.relative_motion({"a": jnp.ones(2)}, [jnp.ones(2)])),
    ("equal shapes", lambda: lazy_rich.relative_motion(jnp.ones(2), jnp.ones(3))),
    ("steps must", lambda: lazy_rich.grokking_gap(jnp.arange(3), losses, losses)),
    ("train_fraction must", lambda: lazy_rich.grokking_gap(jnp.arange(2), losses, losses, train_fraction=0.0)),
  )
  for message, call in cases:
    with pytest.raises(ValueError, match=message):
      call()


def _kernel_task(rng):
  factor = rng.normal(size=(6, 6))
  return factor @ factor.T + np.eye(6), rng.normal(size=6)


_BAD_KERNEL = (
  ("kernel", lambda kernel, targets: (kernel[1:], targets)),
  ("kernel", lambda kernel, targets: (kernel.astype(np.int32), targets)),
  ("targets", lambda kernel, targets: (kernel, targets[1:])),
)


ROWS = [
  row(lazy_rich.kernel_alignment, _kernel_task, bad=_BAD_KERNEL, wide=True),
  row(
    lazy_rich.kernel_difficulty,
    _kernel_task,
    extreme=lambda kernel, targets: (EXTREME * kernel, EXTREME * targets),  # still positive definite
    bad=_BAD_KERNEL,
    wide=True,
    options=dict(ridge=(0.0, 1.0)),
  ),
  row(
    lazy_rich.relative_motion,
    lambda rng: (*draw_layer(rng), *draw_layer(rng)),
    bad=(("shapes", lambda params, start: (params, jax.tree.map(lambda leaf: leaf[..., 1:], start))),),
    wide=True,
  ),
  row(
    lazy_rich.grokking_gap,
    lambda rng: (np.arange(3), np.array([[1.0, 0.01, 0.0]]), np.array([[1.0, 1.2, 0.01]])),
    extreme=lambda steps, train, test: (steps, EXTREME * train, EXTREME * test),
    bad=(
      ("steps", lambda steps, train, test: (steps[1:], train, test)),
      ("shapes", lambda steps, train, test: (steps, train, test[:, 1:])),
      ("train_losses", lambda steps, train, test: (steps, train.astype(np.int32), test)),
    ),
    differentiable=False,
    wide=True,
    options=dict(train_fraction=(0.05, 0.2), test_fraction=(0.2, 0.5)),
  ),
]


EXEMPT = {
  "GrokkingGap": "result of grokking_gap",
}
