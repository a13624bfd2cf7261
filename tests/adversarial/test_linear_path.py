"""Weight decay's path of linear classifiers: golden vectors, other solvers' minima, and its two ends."""

import functools

import jax
import numpy as np
import pytest
from scipy import optimize
from sklearn.svm import SVC

from jaxreg.adversarial import boundary, regularization_path
from jaxreg.adversarial.linear_path import LOSSES
from jaxreg.data import bundled
from tests.adversarial.test_boundary import _draw
from tests.conformance import EXAMPLES, row, unchanged

ROWS = [
  row(
    regularization_path,
    lambda rng: (*_draw(rng, EXAMPLES), np.array([0.01, 1.0])),
    call=lambda inputs, labels, strengths, loss=loss: regularization_path(
      inputs, labels, strengths=strengths, loss=loss
    )[:2],
    bad=(
      ("inputs", lambda x, y, s: (x.astype(np.int32), y, s)),
      ("labels", lambda x, y, s: (x, y[1:], s)),
      ("strengths", lambda x, y, s: (x, y, s[0])),
    ),
    extreme=unchanged,
    differentiable=False,
    wide=True,
  )._replace(label=f"linear_path.regularization_path-{loss}")
  for loss in LOSSES
]
EXEMPT = {"RegularizationPath": "result of regularization_path"}


def objective(inputs, labels, loss, strength, weights, bias):
  margins = np.where(labels == 1, 1, -1) * (inputs @ weights + bias)
  short = np.maximum(1 - margins, 0)
  values = {"softplus": np.logaddexp(0, -margins), "squared_hinge": short**2, "hinge": short}[loss]
  return values.mean() + strength * weights @ weights


@pytest.mark.golden
def test_golden_23_regularization_path(golden, x64):
  for name, case, _ in golden("23-boundary_tilting").cases("case"):
    x, y = case["x"], (case["y"] > 0).astype(np.int32)
    path = regularization_path(x, y, strengths=case["reg_lambdas"])
    assert path.converged.all()
    close = functools.partial(np.testing.assert_allclose, rtol=1e-7, atol=1e-10, err_msg=name)
    close(path.weights, case["reg_out_w"])
    close(path.bias, case["reg_out_b"])
    close(jax.vmap(lambda w: boundary.deviation_angle(x, y, w))(path.weights), case["reg_out_angle"])
    distances = jax.vmap(lambda w, b: boundary.adversarial_distance(x, y, w, b, balanced=False))(
      path.weights, path.bias
    )
    close(distances, case["reg_out_adv_dist"])


@pytest.mark.parametrize("features", [6, 60])
@pytest.mark.parametrize("loss", LOSSES)
def test_no_other_solver_finds_less(loss, features, x64):
  """In more dimensions than examples, too, where the equations are those of the examples' span."""
  rng = np.random.default_rng(0)
  inputs, labels = _draw(rng, 30, features)
  strengths = np.array([1.0, 1e-4, 1e-2])  # in any order
  path = regularization_path(inputs, labels, strengths=strengths, loss=loss)
  assert path.converged.all()
  for strength, weights, bias in zip(strengths, np.asarray(path.weights), np.asarray(path.bias)):
    value = lambda x: objective(inputs, labels, loss, strength, x[:-1], x[-1])
    found = value(np.append(weights, bias))
    if loss == "hinge":
      peer = SVC(kernel="linear", C=1 / (2 * strength * len(labels)), tol=1e-9).fit(inputs, labels)
      other = value(np.append(peer.coef_[0], peer.intercept_[0]))
    else:
      other = optimize.minimize(value, np.zeros(features + 1), method="BFGS", options={"gtol": 1e-9}).fun
    assert found <= other * (1 + 1e-9) and other <= 1.1 * found


def test_strong_decay_is_the_nearest_centroid(x64):
  rng = np.random.default_rng(1)
  inputs, labels = _draw(rng)
  strength = 1e3 * np.max(np.sum(inputs**2, axis=1))
  between = inputs[labels == 1].mean(0) - inputs[labels == 0].mean(0)
  path = regularization_path(inputs, labels, strengths=np.array([strength]))
  np.testing.assert_allclose(8 * strength * path.weights[0], between, rtol=1e-3)
  for loss in LOSSES:
    path = regularization_path(inputs, labels, strengths=np.geomspace(1e-6, strength, 6), loss=loss)
    angles = jax.vmap(lambda w: boundary.deviation_angle(inputs, labels, w))(path.weights)
    assert angles[-1] < 1e-3 and angles[0] > 0.1


@pytest.mark.parametrize("loss", LOSSES)
def test_other_labels_count_for_nothing(loss, x64):
  rng = np.random.default_rng(2)
  inputs, labels = _draw(rng)
  strengths = np.array([1e-3, 0.1])
  spoiled = np.concatenate([inputs, np.full((3, inputs.shape[1]), np.nan)])
  found = regularization_path(spoiled, np.append(labels, [-1, 2, 255]), strengths=strengths, loss=loss)
  expected = regularization_path(inputs, labels, strengths=strengths, loss=loss)
  np.testing.assert_allclose(found.weights, expected.weights, rtol=1e-6, atol=1e-9)
  np.testing.assert_allclose(found.bias, expected.bias, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("loss", LOSSES)
def test_one_class_does_not_converge_and_separable_float32_does(loss):
  rng = np.random.default_rng(3)
  inputs, labels = _draw(rng)
  inputs = inputs.astype(np.float32)
  path = regularization_path(inputs, labels, strengths=np.array([1e-3, 1.0]), loss=loss)
  assert path.converged.all()
  with jax.enable_x64(True):
    wide = regularization_path(inputs.astype(np.float64), labels, strengths=np.array([1e-3, 1.0]), loss=loss)
  # The weights of the hinge are as exact as the root of the gap, 6e-6.
  np.testing.assert_allclose(path.weights, wide.weights, rtol=2e-3, atol=3e-3 if loss == "hinge" else 1e-4)
  alone = regularization_path(inputs, np.zeros_like(labels), strengths=np.array([0.1]), loss=loss)
  assert np.isfinite(alone.weights).all()


def test_newton_converges_where_most_examples_have_no_curvature(x64):
  """A full step may lead to where scores are so large that the curvature, the bias' above all, vanishes."""
  data, rng = bundled.mnist_subset(), np.random.default_rng((103, 1))
  pair = [data["x"][data["y"] == digit][np.random.default_rng(103).permutation(500)[:300]] for digit in (3, 7)]
  inputs, labels = np.concatenate(pair).reshape(600, -1).astype(np.float64), np.repeat([0, 1], 300)
  wrong = rng.permutation(600)[:30]
  labels[wrong] = 1 - labels[wrong]
  path = regularization_path(inputs, labels, strengths=np.array([1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0]))
  assert path.converged.all()


def test_path_is_vmapped_over_pairs_of_classes(x64):
  rng = np.random.default_rng(4)
  pairs = [_draw(rng) for _ in range(3)]
  inputs, labels = (np.stack(each) for each in zip(*pairs))
  fit = functools.partial(regularization_path, strengths=np.array([1e-3, 0.1]))
  together = jax.jit(jax.vmap(fit))(inputs, labels)
  for index, pair in enumerate(pairs):
    np.testing.assert_allclose(together.weights[index], fit(*pair).weights, rtol=1e-8)


def test_wrong_options_are_refused():
  with pytest.raises(ValueError, match="strengths must lie in"):
    regularization_path(np.ones((2, 2), np.float32), np.array([0, 1]), strengths=np.zeros(1))
  with pytest.raises(ValueError, match="loss must be one of softplus, squared_hinge, hinge"):
    regularization_path(np.ones((2, 2), np.float32), np.array([0, 1]), strengths=np.ones(1), loss="log")
