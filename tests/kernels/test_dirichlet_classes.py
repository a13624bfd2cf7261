"""Two Dirichlet classes on a sphere and their Bayes rule."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from jaxreg.kernels import dirichlet_classes as ds
from tests.conformance import EXAMPLES, EXTREME, row

PAIR = [[0.5, 0.5, 2.5], [2.5, 0.1, 0.5]]


@pytest.fixture(scope="module")
def sample():
  return draw(jnp.array(PAIR))


@jax.jit
def draw(concentrations):
  return ds.dirichlet_sphere(jax.random.key(0), 20_000, concentrations=concentrations)


def test_inputs_are_normalized_dirichlet_samples(sample):
  inputs, labels = (np.asarray(x) for x in sample)
  np.testing.assert_allclose(np.linalg.norm(inputs, axis=1), 1, rtol=1e-6)
  np.testing.assert_allclose(labels.mean(), 0.4, atol=0.02)
  simplex = np.asarray(inputs / inputs.sum(1, keepdims=True))
  for label in (0, 1):
    alpha = np.asarray(PAIR[label])
    np.testing.assert_allclose(simplex[labels == label].mean(0), alpha / alpha.sum(), atol=0.01)


def test_log_odds_are_those_of_the_densities(sample, x64):
  inputs = np.asarray(sample[0][:50], np.float64)
  got = ds.dirichlet_sphere_log_odds(jnp.asarray(inputs), concentrations=PAIR, prior=0.3)
  simplex = inputs / inputs.sum(1, keepdims=True)
  ok = simplex.min(1) > 1e-12
  exact = [
    stats.dirichlet.logpdf(x, PAIR[1]) - stats.dirichlet.logpdf(x, PAIR[0]) + np.log(0.3 / 0.7) for x in simplex[ok]
  ]
  np.testing.assert_allclose(got[ok], exact, rtol=1e-9, atol=1e-9)


def test_finite_in_float32():
  inputs, _ = draw(jnp.array([[0.01, 0.01, 0.01], [0.02, 5.0, 0.01]]))
  assert inputs.dtype == jnp.float32 and jnp.isfinite(inputs).all()
  odds, gradient = jax.value_and_grad(
    lambda x: ds.dirichlet_sphere_log_odds(x, concentrations=[[0.5, 0.5, 1.0], [0.5, 5.0, 1.0]]).sum()
  )(inputs)
  assert jnp.isfinite(odds) and jnp.isfinite(gradient).all()


def test_bad_input():
  key = jax.random.key(0)
  with pytest.raises(ValueError, match="concentrations must lie"):
    ds.dirichlet_sphere(key, 3, concentrations=[[1.0, 0.0], [1.0, 1.0]])
  with pytest.raises(ValueError, match="prior must lie"):
    ds.dirichlet_sphere(key, 3, concentrations=PAIR, prior=2.0)
  with pytest.raises(ValueError, match="count must be"):
    ds.dirichlet_sphere(key, 0, concentrations=PAIR)
  with pytest.raises(ValueError, match="inputs must have 3"):
    ds.dirichlet_sphere_log_odds(jnp.ones((2, 2)), concentrations=PAIR)


ROWS = [
  row(
    ds.dirichlet_sphere_log_odds,
    lambda rng: (rng.uniform(0.1, 1, (EXAMPLES, 3)), rng.uniform(0.5, 2, (2, 3))),
    call=lambda inputs, concentrations, **options: ds.dirichlet_sphere_log_odds(
      inputs, concentrations=concentrations, **options
    ),
    extreme=lambda inputs, concentrations: (np.resize([EXTREME, 1e-4, 1.0, 1.0], inputs.shape), concentrations),
    wide=True,
    options=dict(prior=(0.2, 0.8)),
  ),
]


EXEMPT = {
  "dirichlet_sphere": "draws; its tests compare the distributions",
}
