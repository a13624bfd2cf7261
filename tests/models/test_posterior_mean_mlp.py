"""The two-layer network: zero at the start, signs fixed, tangent kernel as in closed form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxreg.models.posterior_mean_mlp import PosteriorMeanMLP
from tests.conformance import draw_logits, module_row

MODEL = PosteriorMeanMLP(width=6, outputs=2)
INPUTS = jnp.asarray(np.random.default_rng(0).normal(size=(5, 3)), jnp.float32)


def test_starts_at_zero_and_only_weights_are_parameters():
  variables = MODEL.init(jax.random.key(0), INPUTS)
  np.testing.assert_allclose(MODEL.apply(variables, INPUTS), 0, atol=1e-6)
  assert set(variables["params"]) == {"weights"}
  signs = variables["fixed"]["signs"]
  assert set(np.unique(signs)) == {-1, 1}
  np.testing.assert_array_equal(signs[:, :3], -signs[:, 3:])


def test_is_the_formula():
  variables = MODEL.init(jax.random.key(1), INPUTS)
  weights, signs = jnp.arange(18.0).reshape(6, 3) / 9 - 1, variables["fixed"]["signs"]
  got = MODEL.apply({"params": {"weights": weights}, "fixed": {"signs": signs}}, INPUTS)
  np.testing.assert_allclose(got, jnp.maximum(INPUTS @ weights.T, 0) @ signs.T / np.sqrt(6), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("width", [0, 5])
def test_bad_width(width):
  with pytest.raises(ValueError, match="width must be a positive even number"):
    PosteriorMeanMLP(width=width, outputs=1).init(jax.random.key(0), INPUTS)


ROWS = [
  module_row(PosteriorMeanMLP(4, 3), lambda rng: (draw_logits(rng),), wide=False),
]
