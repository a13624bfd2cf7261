import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.papers import hessian_alignment
from jaxreg.training import Context
from tests.experiments import recipe_checks


def test_smoke(tmp_path):
  recipe_checks.check_smoke("hessian_alignment", tmp_path)


def test_run_and_predict(tmp_path):
  inputs = np.random.default_rng(0).uniform(size=(3, 14, 14, 2)).astype(np.float32)
  recipe_checks.check_run_and_predict("hessian_alignment", tmp_path, inputs=inputs)


def test_paper_step():
  recipe_checks.check_paper_step("hessian_alignment")


def test_paper_ten_steps(tmp_path):
  recipe_checks.check_paper_ten_steps("hessian_alignment", tmp_path)


@pytest.mark.parametrize("method", hessian_alignment.METHODS)
def test_environments_under_a_mask_are_environments_by_themselves(method):
  """The preset `paper` holds both in one batch."""
  rng = np.random.default_rng(0)
  features, labels = jnp.asarray(rng.normal(size=(2, 6, 3))), jnp.asarray(rng.integers(0, 2, (2, 6)))
  params = {"head": {"kernel": jnp.asarray(rng.normal(size=(3, 1))), "bias": jnp.asarray([0.3])}}
  context = Context(jnp.int32(500), jax.random.key(0), {"weight": 10.0, "l2": 0.1}, None)
  config = hessian_alignment.PRESETS["smoke"]
  apart = hessian_alignment._objective(config, method, params, features, labels, context)
  mixed, where = features.reshape(12, 3), jnp.repeat(jnp.arange(2), 6) == jnp.arange(2)[:, None]
  both = [jnp.broadcast_to(array, (2, *array.shape)) for array in (mixed, labels.ravel())]
  together = hessian_alignment._objective(config, method, params, *both, context, where)
  np.testing.assert_allclose(together, apart, rtol=1e-5)
