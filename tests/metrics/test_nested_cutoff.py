"""Accuracy by the number of features kept, and the number to keep: golden vectors, ties, ensembles."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxreg.metrics.nested_cutoff import accuracy_per_cutoff, best_cutoff
from tests.conformance import CLASSES, EXAMPLES, row


@pytest.mark.golden
def test_golden_nested_dropout_cutoff(golden, x64):
  """Both networks' logits are averaged."""
  for case, arrays, _ in golden("07-nested_dropout").cases("case"):
    features = jnp.stack([jax.nn.relu(arrays["x1"] @ arrays[f"W{net}"] + arrays[f"b{net}"]) for net in (1, 2)])
    kernel = jnp.stack([arrays["V1"], arrays["V2"]])
    accuracies = accuracy_per_cutoff(features, kernel, arrays["y1"])
    np.testing.assert_allclose(accuracies, arrays["out_acc_per_k"], rtol=1e-9, err_msg=case)
    assert best_cutoff(accuracies) == arrays["out_best_k_kept"], case


def test_equals_a_loop(x64):
  rng = np.random.default_rng(0)
  features, kernel, labels = rng.normal(size=(50, 7)), rng.normal(size=(7, 4)), rng.integers(0, 4, 50)
  labels[::7] = -1
  counted = labels >= 0
  loop = [((features[:, :k] @ kernel[:k]).argmax(-1) == labels)[counted].mean() for k in range(1, 8)]
  np.testing.assert_allclose(accuracy_per_cutoff(features, kernel, labels), loop, rtol=1e-12)


def test_near_ties_go_to_the_smaller_number():
  assert best_cutoff(jnp.array([0.2, 0.900001, 0.9, 0.900009])) == 2
  assert best_cutoff(jnp.array([[0.2, 0.9], [0.9, 0.2]])).tolist() == [2, 1]
  assert best_cutoff(jnp.array([0.1, 0.5, 0.9]), penalty=0.5) == 1


def test_no_label_that_is_a_class():
  assert np.isnan(accuracy_per_cutoff(jnp.ones((2, 3)), jnp.ones((3, 2)), jnp.array([-1, 255]))).all()


ROWS = [
  row(
    accuracy_per_cutoff,
    lambda rng: (
      rng.normal(size=(EXAMPLES, 6)),
      rng.normal(size=(6, CLASSES)),
      rng.integers(0, CLASSES, EXAMPLES).astype(np.int32),
    ),
    differentiable=False,
    wide=True,
    bad=(
      ("labels", lambda h, v, y: (h, v, y[1:])),
      ("labels", lambda h, v, y: (h, v, y.astype(np.float32))),
      ("features", lambda h, v, y: (h.astype(np.int32), v, y)),
      ("kernel", lambda h, v, y: (h, v[0], y)),
    ),
  ),
  row(
    best_cutoff,
    lambda rng: (rng.uniform(size=(EXAMPLES, 6)),),
    examples="any",
    differentiable=False,
    wide=True,
    bad=(("accuracies", lambda a: (a.astype(np.int32),)),),
    options=dict(penalty=(0.0, 0.1)),
  ),
]
