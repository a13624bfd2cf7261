"""The norm penalty of self-distillation's code; its golden test is with the loss, in tests/losses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxreg.regularizers import unsquared_norm
from jaxreg.regularizers.groups import group_norms
from jaxreg.regularizers.unsquared_norm import unsquared_norm_penalty
from tests.conformance import draw_layer, row


def test_is_a_sum_of_norms():
  params = {"a": jnp.array([[3.0, 4.0]]), "b": {"c": jnp.array([-2.0])}, "empty": jnp.zeros((0, 2))}
  assert unsquared_norm_penalty(params) == 7
  assert unsquared_norm_penalty({}) == 0
  rows = jnp.asarray(np.random.default_rng(0).normal(size=(3, 4)), jnp.float32)
  np.testing.assert_allclose(
    unsquared_norm_penalty(list(rows.T)), group_norms(rows, kind="neuron").sum(), rtol=1e-6
  )  # fmt: skip


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1.0, 1e30])
def test_gradient_is_the_direction_and_zero_at_zero(scale):
  value, gradient = jax.value_and_grad(unsquared_norm_penalty)(scale * jnp.array([3.0, -4.0]))
  np.testing.assert_allclose(value, 5 * scale, rtol=1e-6)
  np.testing.assert_allclose(gradient, np.array([0.6, -0.8]) * (scale > 0), rtol=1e-6)


def test_bad_input():
  with pytest.raises(ValueError, match="params must be floating"):
    unsquared_norm_penalty({"a": jnp.ones(2), "b": jnp.ones(2, int)})


ROWS = [
  row(
    unsquared_norm.unsquared_norm_penalty,
    draw_layer,
    bad=(("params", lambda values: (jax.tree.map(lambda leaf: np.ones(leaf.shape, np.int32), values),)),),
    wide=True,
  ),
]
