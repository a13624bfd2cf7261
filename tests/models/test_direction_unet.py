"""The direction network: its size and its refusal of odd grids."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxreg.models.direction_unet import DirectionUNet
from tests.conformance import EXAMPLES, module_row


def size(model, *grid):
  params = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, *grid)))["params"]
  return sum(leaf.size for leaf in jax.tree.leaves(params))


def test_has_the_published_numbers_of_parameters():
  assert size(DirectionUNet(dimensions=3), 4, 4, 4) == 97_457
  assert size(DirectionUNet(dimensions=3, fine_before=6, coarse=10, fine_after=6), 4, 4, 4) == 152_881


def test_any_even_grid():
  model = DirectionUNet(channels=2)
  shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 4, 4)))
  params = jax.tree.map(lambda leaf: np.random.default_rng(0).normal(size=leaf.shape).astype(np.float32), shapes)
  residuals = jax.random.normal(jax.random.key(1), (2, 8, 6))
  directions = jax.jit(model.apply)(params, residuals)
  assert directions.shape == residuals.shape and np.isfinite(directions).all()
  with pytest.raises(ValueError, match="2 even grid axes"):
    jax.eval_shape(model.apply, params, residuals[:, :7])


ROWS = [
  module_row(
    DirectionUNet(dimensions=1, channels=2, fine_before=2, coarse=2, fine_after=2),
    lambda rng: (rng.normal(size=(EXAMPLES, 4)),),
  ),
]
