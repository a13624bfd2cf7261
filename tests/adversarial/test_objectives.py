"""Margins as attacks' objectives: values by hand, scale invariance, and labels that are no class."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxreg.adversarial import objectives
from tests.conformance import loss_row

ROWS = [
  loss_row(objectives.margin_objective)._replace(extreme=lambda *a: a),
  loss_row(objectives.dlr_objective)._replace(extreme=lambda *a: a),
]


def test_of_sorted_logits():
  rng = np.random.default_rng(0)
  logits = rng.normal(size=(20, 6)).astype(np.float32)
  labels, targets = rng.integers(0, 6, 20), rng.integers(0, 6, 20)
  rows = np.arange(20)
  ordered = np.sort(logits, axis=-1)[:, ::-1]
  own, others = logits[rows, labels], np.where(np.arange(6) == labels[:, None], -np.inf, logits).max(-1)
  close = lambda actual, expected: np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)
  close(objectives.margin_objective(logits, labels), others - own)
  close(objectives.margin_objective(logits, labels, targets=targets), logits[rows, targets] - own)
  close(objectives.dlr_objective(logits, labels), (others - own) / (ordered[:, 0] - ordered[:, 2]))
  spread = ordered[:, 0] - (ordered[:, 2] + ordered[:, 3]) / 2
  close(objectives.dlr_objective(logits, labels, targets=targets), (logits[rows, targets] - own) / spread)
  close(objectives.dlr_objective(1e4 * logits, labels), objectives.dlr_objective(logits, labels))


def test_equal_logits_and_ignored_labels():
  labels = jnp.array([0, -1, 255])
  for objective in (objectives.margin_objective, objectives.dlr_objective):
    for logits in (jnp.zeros((3, 4)), jnp.array([[2.0, 1, 1, 1], [jnp.nan] * 4, [0.0, 1, 2, 3]])):
      value, gradient = jax.value_and_grad(lambda z, f=objective: f(z, labels).sum())(logits)
      assert jnp.isfinite(value) and jnp.isfinite(gradient).all() and not gradient[1:].any()
  ignored = objectives.margin_objective(jnp.eye(3), jnp.array([0, 1, 2]), targets=jnp.array([-1, 0, 9]))
  np.testing.assert_array_equal(ignored, [0, -1, 0])


def test_too_few_classes():
  with pytest.raises(ValueError, match="at least 2 classes"):
    objectives.margin_objective(jnp.zeros((2, 1)), jnp.zeros(2, int))
  with pytest.raises(ValueError, match="at least 4 classes"):
    objectives.dlr_objective(jnp.zeros((2, 3)), jnp.zeros(2, int), targets=jnp.ones(2, int))
