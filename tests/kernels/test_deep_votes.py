"""The Hilbert estimate."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxreg.kernels import deep_votes
from jaxreg.kernels.deep_limits import optimal_dual
from tests.conformance import EXTREME, row


def test_hilbert_vote(x64):
  xi = jnp.array([[0.5, 0.9, -1.0], [1.0, 0.2, 1.0], [1 - 1e-12, 0.2, 0.3]])
  targets = jnp.array([1.0, -1.0, 3.0])
  for exponent in (0.0, 2.0, 200.0):
    got = deep_votes.hilbert_vote(xi, targets, exponent=exponent)
    weights = (2 - 2 * np.asarray(xi)[0]) ** (-exponent / 2)
    np.testing.assert_allclose(got[0], weights @ targets / weights.sum(), rtol=1e-10)
  assert got[1] == 2.0 and got[2] == 1.0  # the mean of two coinciding points; the nearest
  many = deep_votes.hilbert_vote(xi, jnp.stack([targets, -targets], 1), exponent=2.0)
  np.testing.assert_allclose(many[:, 0], deep_votes.hilbert_vote(xi, targets, exponent=2.0), rtol=1e-12)
  gradient = jax.grad(lambda x: deep_votes.hilbert_vote(x, targets, exponent=2.0).sum())(xi)
  assert jnp.isfinite(gradient).all()


def _votes(function, call=None, **options):
  """`function(correlation, targets, …)`."""
  bad = (
    ("correlation", lambda correlation, targets: (correlation[:, 1:], targets)),
    ("targets", lambda correlation, targets: (correlation, targets.astype(np.int32))),
  )
  keywords = {name: options.pop(name) for name in tuple(options) if name == "wide"}
  draw = lambda rng: (rng.uniform(0, 0.9, (4, 5)), rng.normal(size=5))
  extreme = lambda correlation, targets: (np.resize([1.0, 0.0, 0.99], correlation.shape), EXTREME * targets)
  return row(function, draw, call=call, extreme=extreme, bad=bad, options=options, **keywords)


ROWS = [
  _votes(deep_votes.hilbert_vote, exponent=(1.0, 3.0), wide=True),
  _votes(deep_votes.majority_vote),
  _votes(deep_votes.nearest_neighbor_vote),
  _votes(
    deep_votes.singular_vote,
    lambda correlation, targets: deep_votes.singular_vote(correlation, targets, optimal_dual(2), iterations=30),
    wide=True,
  ),
]
