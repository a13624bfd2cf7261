"""An optimizer that starts anew."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxreg.transforms import reset_at, state_reset
from tests.conformance import transform_row

TRANSFORMS = [transform_row(state_reset.reset_at, lambda base, step: state_reset.reset_at(base, step), step=(-1, 3))]
EXEMPT = {"ResetState": "state of reset_at"}


@pytest.mark.parametrize("step", [-1, 0, 3])
def test_updates_are_those_of_two_optimizers_in_turn(step):
  optimizer, params = optax.adam(0.1), {"w": jnp.ones(3)}
  tx = reset_at(optimizer, step)
  update = jax.jit(tx.update)
  state, plain = tx.init(params), optimizer.init(params)
  for index, gradient in enumerate(np.random.default_rng(0).normal(size=(6, 3))):
    gradient = {"w": jnp.asarray(gradient, jnp.float32)}
    found, state = update(gradient, state, params)
    plain = optimizer.init(params) if index == step else plain
    expected, plain = optimizer.update(gradient, plain, params)
    np.testing.assert_allclose(found["w"], expected["w"], rtol=1e-5)
    params = optax.apply_updates(params, found)
