"""Geometry of boundaries: identities, the card's exact tests, golden vectors and the published sweep."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxreg.adversarial import boundary
from tests.conformance import EXAMPLES, row, unchanged

FEATURES = 6


def _draw(rng, size=40, features=FEATURES):
  labels = np.resize([0, 1], size)
  inputs = rng.normal(size=(size, features)) + 2 * labels[:, None] * rng.normal(size=features)
  return inputs, labels


def _drawn_hyperplane(rng):
  return rng.normal(size=(EXAMPLES, FEATURES)), rng.normal(size=FEATURES), np.float64(rng.normal())


def _drawn_data(rng, *, bias=True):
  inputs, labels = _draw(rng, EXAMPLES)
  return inputs, labels.astype(np.int32), rng.normal(size=FEATURES), *([np.float64(rng.normal())] if bias else [])


_BAD = (
  ("inputs", lambda x, *rest: (x.astype(np.int32), *rest)),
  ("labels", lambda x, y, *rest: (x, y[1:], *rest)),
  ("labels", lambda x, y, *rest: (x, y * 1.0, *rest)),
)
_BAD_WEIGHTS = (*_BAD, ("weights", lambda x, y, w, *rest: (x, y, w[1:], *rest)))

ROWS = [
  *(
    row(
      function,
      _drawn_hyperplane,
      bad=(
        ("inputs", lambda x, w, b: (x.astype(np.int32), w, b)),
        ("weights", lambda x, w, b: (x, w[1:], b)),
        ("bias", lambda x, w, b: (x, w, np.ones(3, np.float32))),
      ),
    )
    for function in (boundary.signed_distances, boundary.mirror_images, boundary.projected_images)
  ),
  *(
    row(function, _drawn_data, bad=_BAD_WEIGHTS, extreme=unchanged)
    for function in (boundary.adversarial_distance, boundary.error_distance, boundary.adversarial_strength)
  ),
  row(boundary.centroid_normal, lambda rng: _drawn_data(rng)[:2], bad=_BAD, extreme=unchanged),
  *(
    row(function, functools.partial(_drawn_data, bias=False), bad=_BAD_WEIGHTS, extreme=unchanged)
    for function in (boundary.deviation_angle, boundary.tilting_plane)
  ),
  row(
    boundary.tilted_normal,
    lambda rng: (rng.normal(size=FEATURES), rng.normal(size=FEATURES)),
    bad=(("normal", lambda n, d: (n.astype(np.int32), d)), ("direction", lambda n, d: (n, d[1:]))),
    extreme=unchanged,
    options=dict(angle=(0.1, 1.5)),
  ),
]
EXEMPT = {"local_distances": "takes the model's function; tested here"}


@pytest.mark.golden
def test_golden_23_boundary_tilting(golden, x64):
  for name, case, _ in golden("23-boundary_tilting").cases("case"):
    x, y, w, b = case["x"], (case["y"] > 0).astype(np.int32), case["w"], case["b"]
    close = functools.partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-12, err_msg=name)
    close(boundary.signed_distances(x, w, b), case["out_signed_dist"])
    close(boundary.projected_images(x, w, b), case["out_projected"])
    close(boundary.mirror_images(x, w, b), case["out_mirror"])
    between = case["out_centroid_j"] - case["out_centroid_i"]
    close(boundary.centroid_normal(x, y), between / np.linalg.norm(between))
    close(boundary.deviation_angle(x, y, w), case["out_deviation_angle"])
    close(boundary.adversarial_distance(x, y, w, b, balanced=False), case["out_adv_dist_samples"])
    close(boundary.adversarial_distance(x, y, w, b), case["out_adv_dist_balanced"])
    close(boundary.error_distance(x, y, w, b), case["out_err_dist"])
    close(boundary.adversarial_strength(x, y, w, b), case["out_adv_strength"])
    normal = boundary.centroid_normal(x, y)
    middle = (case["out_centroid_i"] + case["out_centroid_j"]) / 2
    for index, tau in enumerate(case["tilt_taus"]):
      tilted = boundary.tilted_normal(normal, case["tilt_dir"], angle=tau)
      bias = -tilted @ middle
      close(boundary.adversarial_strength(x, y, tilted, bias), case["tilt_out_strength"][index])
      close(boundary.adversarial_distance(x, y, tilted, bias), case["tilt_out_adv_dist"][index])
      wrong = (boundary.signed_distances(x, tilted, bias) > 0) != (y == 1)
      close(np.mean(np.asarray(wrong)), case["tilt_out_error"][index])


@pytest.mark.golden
def test_golden_23_published_sweep_obeys_the_identity(golden):
  ((_, sweep, _),) = golden("23-boundary_tilting").cases("published")
  angles = np.deg2rad(sweep["tilt_angle"]) if np.max(sweep["tilt_angle"]) > np.pi else sweep["tilt_angle"]
  straight = sweep["adv_dist"][np.argmin(angles)] / np.cos(np.min(angles))
  # The data are rounded to three decimals, the angles too.
  np.testing.assert_allclose(sweep["adv_dist"], straight * np.cos(angles), atol=2e-3)


def test_reflection(x64):
  rng = np.random.default_rng(0)
  inputs, weights, bias = _drawn_hyperplane(rng)
  mirrored = boundary.mirror_images(inputs, weights, bias)
  np.testing.assert_allclose(boundary.mirror_images(mirrored, weights, bias), inputs, atol=1e-12)
  np.testing.assert_allclose(mirrored @ weights + bias, -(inputs @ weights + bias), atol=1e-12)
  lengths = lambda x: np.linalg.norm(x[:, None] - x, axis=-1)
  np.testing.assert_allclose(lengths(mirrored), lengths(inputs), atol=1e-12)
  projected = boundary.projected_images(inputs, weights, bias)
  np.testing.assert_allclose(projected, (inputs + mirrored) / 2, atol=1e-12)
  np.testing.assert_allclose(boundary.signed_distances(projected, weights, bias), 0, atol=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_distance_is_that_of_the_means_times_the_cosine(seed, x64):
  rng = np.random.default_rng(seed)
  inputs, labels = _draw(rng)
  labels[:7] = 1  # unbalanced
  weights, bias = rng.normal(size=FEATURES), rng.normal()
  between = inputs[labels == 1].mean(0) - inputs[labels == 0].mean(0)
  cosine = np.cos(boundary.deviation_angle(inputs, labels, weights))
  for w, b in ((weights, bias), (7 * weights, bias), (weights, bias + 5)):
    found = boundary.adversarial_distance(inputs, labels, w, b)
    np.testing.assert_allclose(found, np.linalg.norm(between) * cosine / 2, atol=1e-12)
  middle = -weights @ (inputs[labels == 1].mean(0) + inputs[labels == 0].mean(0)) / 2
  strength = lambda b: boundary.adversarial_strength(inputs, labels, weights, b)
  np.testing.assert_allclose(strength(middle), 1 / abs(cosine), rtol=1e-10)
  assert strength(middle + 100) < 1 / abs(cosine) - 1e-6


def test_nearest_centroid_has_no_adversarial_examples(x64):
  rng = np.random.default_rng(1)
  inputs, labels = _draw(rng)
  normal = boundary.centroid_normal(inputs, labels)
  middle = -normal @ (inputs[labels == 1].mean(0) + inputs[labels == 0].mean(0)) / 2
  # The arc tangent of rounding, where the arc cosine would be wrong by 1e-8.
  assert boundary.deviation_angle(inputs, labels, 3 * normal) < 1e-14
  np.testing.assert_allclose(boundary.adversarial_strength(inputs, labels, normal, middle), 1, rtol=1e-12)
  best = boundary.adversarial_distance(inputs, labels, normal, middle)
  others = [boundary.adversarial_distance(inputs, labels, w, middle) for w in rng.normal(size=(50, FEATURES))]
  assert best > max(others)


def test_a_direction_without_variance_tilts_for_nothing(x64):
  rng = np.random.default_rng(2)
  inputs, labels = _draw(rng)
  inputs = np.concatenate([inputs, np.full((len(inputs), 1), 0.7)], axis=1)
  weights, bias = np.append(rng.normal(size=FEATURES), 0), rng.normal()
  extra = 10 * np.linalg.norm(weights)
  tilted, moved = weights + extra * np.eye(FEATURES + 1)[-1], bias - extra * 0.7
  np.testing.assert_allclose(inputs @ tilted + moved, inputs @ weights + bias, atol=1e-11)
  plain, little = (boundary.adversarial_distance(inputs, labels, *both) for both in ((weights, bias), (tilted, moved)))
  np.testing.assert_allclose(little / plain, 1 / np.sqrt(1 + 100), rtol=1e-10)
  normal, unit = boundary.centroid_normal(inputs, labels), np.eye(FEATURES + 1)[-1]
  for angle in (0.3, 1.2, 1.55):
    w = boundary.tilted_normal(normal, unit, angle=angle)
    np.testing.assert_allclose(boundary.deviation_angle(inputs, labels, w), angle, rtol=1e-12)


def test_tilting_plane_holds_both_normals(x64):
  rng = np.random.default_rng(3)
  inputs, labels = _draw(rng)
  weights = rng.normal(size=FEATURES)
  plane = boundary.tilting_plane(inputs, labels, weights)
  np.testing.assert_allclose(plane.T @ plane, np.eye(2), atol=1e-14)
  np.testing.assert_allclose(plane @ (plane.T @ weights), weights, atol=1e-13)
  assert not np.any(boundary.tilting_plane(inputs, labels, 2 * plane[:, 0])[:, 1])


def test_other_labels_count_for_nothing():
  rng = np.random.default_rng(4)
  inputs, labels = (np.asarray(x, d) for x, d in zip(_draw(rng), (np.float32, np.int8)))
  weights, bias = np.asarray(rng.normal(size=FEATURES), np.float32), 0.3
  spoiled = np.concatenate([inputs, np.full((3, FEATURES), np.nan, np.float32)])
  more = np.append(labels, np.array([-1, -100, 2], np.int8))
  for function in (boundary.adversarial_distance, boundary.error_distance, boundary.adversarial_strength):
    np.testing.assert_allclose(function(spoiled, more, weights, bias), function(inputs, labels, weights, bias))
    gradient = jax.grad(lambda x, function=function: function(x, more, weights, bias))(spoiled)
    assert np.isfinite(gradient).all() and not np.any(gradient[-3:])
  np.testing.assert_allclose(
    boundary.deviation_angle(spoiled, more, weights), boundary.deviation_angle(inputs, labels, weights)
  )
  one_class = np.zeros_like(labels)
  assert boundary.adversarial_distance(inputs, one_class, weights, bias) == 0
  assert np.isnan(boundary.adversarial_strength(inputs, one_class, weights, bias))
  assert not np.any(boundary.centroid_normal(inputs, one_class))


def test_weights_of_any_size_and_none():
  inputs = np.ones((2, 3), np.float32)
  for size in (1e-30, 1e30):
    weights = np.asarray([size, 0, 0], np.float32)
    np.testing.assert_allclose(boundary.signed_distances(inputs, weights, 0.0), 1, rtol=1e-6)
    np.testing.assert_allclose(boundary.mirror_images(inputs, weights, 0.0)[:, 0], -1, rtol=1e-6)
  value, gradient = jax.value_and_grad(lambda w: jnp.sum(boundary.signed_distances(inputs, w, 1.0)))(jnp.zeros(3))
  assert value == 0 and np.isfinite(gradient).all()


def test_local_distance_of_a_linear_model_is_the_signed_distance(x64):
  rng = np.random.default_rng(5)
  inputs, labels = _draw(rng)
  weights, bias = rng.normal(size=FEATURES), rng.normal()
  expected = boundary.signed_distances(inputs, weights, bias) * np.where(labels == 1, 1, -1)
  score = lambda x: x @ weights + bias
  np.testing.assert_allclose(boundary.local_distances(score, inputs, labels), expected, rtol=1e-12)
  both = lambda x: jnp.stack([-score(x) / 2, score(x) / 2], axis=1)
  np.testing.assert_allclose(boundary.local_distances(both, inputs, labels), expected, rtol=1e-12)
  images = inputs.reshape(-1, 2, 3)
  flat = lambda x: both(x.reshape(len(x), -1))
  np.testing.assert_allclose(boundary.local_distances(flat, images, labels), expected, rtol=1e-12)
  outside = np.where(np.arange(len(labels)) % 3, labels, 7)
  found = boundary.local_distances(both, inputs, outside)
  np.testing.assert_allclose(found, np.where(outside == 7, 0, expected), rtol=1e-12)


def test_local_distance_of_a_relu_network_is_exact_within_its_linear_region(x64):
  rng = np.random.default_rng(6)
  first, second = rng.normal(size=(2, 5)), rng.normal(size=(5, 3))
  # All classes tie at zero, so that boundaries are near.
  network = lambda x: (jnp.maximum(x @ first + 2, 0) - 2) @ second
  inputs = 0.3 * rng.normal(size=(200, 2))
  labels = np.asarray(network(inputs).argmax(1))
  distances = boundary.local_distances(network, inputs, labels)
  ordered = lambda x: jnp.sort(network(x), axis=1)
  gradient = jax.vmap(jax.grad(lambda x: ordered(x[None])[0, 2] - ordered(x[None])[0, 1]))(inputs)
  onto = inputs - distances[:, None] * gradient / np.linalg.norm(gradient, axis=1, keepdims=True)
  same = np.all((inputs @ first + 2 > 0) == (onto @ first + 2 > 0), axis=1)
  runner_up = np.argsort(network(inputs), axis=1)[:, 1]
  same &= np.all(np.argsort(network(inputs), axis=1)[:, :1] == np.argsort(network(onto), axis=1)[:, :1], axis=1)
  assert same.sum() > 20
  scores = np.asarray(network(onto))
  at = np.arange(len(labels))
  np.testing.assert_allclose((scores[at, labels] - scores[at, runner_up])[same], 0, atol=1e-12)


def test_local_distances_refuse_what_does_not_fit():
  with pytest.raises(ValueError, match="scores_of_inputs must return"):
    boundary.local_distances(lambda x: jnp.sum(x), np.ones((2, 3), np.float32), np.array([0, 1]))
  with pytest.raises(ValueError, match="labels must be integers"):
    boundary.local_distances(lambda x: x, np.ones((2, 3), np.float32), np.array([0.0, 1]))
  with pytest.raises(ValueError, match="inputs must be floating"):
    boundary.local_distances(lambda x: x, np.ones((2, 3), np.int32), np.array([0, 1]))
