"""Coloured, rotated and imbalanced environments."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage

from jaxreg.data import environments
from tests.conformance import row, unchanged


def _digits(rng, count=16):
  return rng.uniform(0.1, 1, (count, 4, 5, 1)), rng.integers(0, 10, count).astype(np.int32)


_BAD = (
  ("images", lambda x, y, *rest: (x.astype(np.int32), y, *rest)),
  ("images", lambda x, y, *rest: (x[..., 0], y, *rest)),
  ("labels", lambda x, y, *rest: (x, y[1:], *rest)),
  ("labels", lambda x, y, *rest: (x, y * 1.0, *rest)),
)
ROWS = [
  row(
    environments.colored_digits,
    _digits,
    call=lambda x, y, **options: environments.colored_digits(jax.random.key(0), x, y, **options),
    extreme=unchanged,
    bad=_BAD,
    options=dict(color_flip=(0.0, 1.0), label_flip=(0.0, 0.5)),
  ),
  row(
    environments.rotate_images,
    lambda rng: (_digits(rng, 3)[0],),
    bad=(("images", lambda x: (x.astype(np.int32),)), ("images", lambda x: (x[0, 0],))),
    options=dict(degrees=(-30.0, 60.0)),
  ),
  row(
    environments.rotated_environments,
    lambda rng: (*_digits(rng, 7), rng.uniform(0, 90, 3)),
    call=lambda x, y, degrees: environments.rotated_environments(jax.random.key(0), x, y, degrees=degrees),
    extreme=unchanged,
    bad=(*_BAD, ("degrees", lambda x, y, d: (x, y, d[0]))),
  ),
]
EXEMPT = {"imbalanced_environments": "of NumPy arrays on the host"}


def test_colours_and_labels_are_wrong_as_often_as_is_said():
  count, label_flip = 20_000, 0.25
  images, digits = jnp.ones((count, 1, 1, 1)), jnp.arange(count) % 10
  draw = jax.jit(jax.vmap(lambda rate: environments.colored_digits(jax.random.key(0), images, digits, color_flip=rate)))
  rates = np.array([0.1, 0.9])
  colored, labels, colors = draw(rates)
  np.testing.assert_allclose(jnp.mean(labels != (digits < 5), axis=1), label_flip, atol=0.02)
  np.testing.assert_allclose(jnp.mean(colors != labels, axis=1), rates, atol=0.02)
  # Whether the colour is wrong does not depend on whether the label is.
  wrong = labels != (digits < 5)
  np.testing.assert_allclose(jnp.sum(wrong & (colors != labels), axis=1) / jnp.sum(wrong, axis=1), rates, atol=0.03)
  np.testing.assert_array_equal(colored[..., 0, 0, :].argmax(-1), colors)
  np.testing.assert_array_equal(colored.sum(-1), 1)


@pytest.mark.parametrize("degrees", [0.0, 15.0, 75.0, -90.0, 200.0])
def test_rotation_is_that_of_scipy(degrees, x64):
  images = np.random.default_rng(0).normal(size=(2, 6, 9, 2))
  expected = ndimage.rotate(images, degrees, axes=(1, 2), reshape=False, order=1, mode="grid-constant")
  np.testing.assert_allclose(environments.rotate_images(images, degrees=degrees), expected, atol=1e-12)


def test_rotated_environments_have_different_images(x64):
  images = np.arange(14.0)[:, None, None, None] * np.ones((1, 3, 3, 1))
  labels, angles = np.arange(14), np.array([0.0, 45.0, 90.0])
  rotated, found = environments.rotated_environments(jax.random.key(1), images, labels, degrees=angles)
  assert len(np.unique(found)) == 12
  for angle, some, own in zip(angles, rotated, found):
    np.testing.assert_allclose(some, environments.rotate_images(images[own], degrees=angle), atol=1e-12)


@pytest.mark.parametrize("official, below", [(False, (97, 3)), (True, (100, 0))])
def test_imbalanced_environments(official, below):
  labels = np.repeat(np.arange(10), 20)
  parts = environments.imbalanced_environments(np.random.default_rng(0), labels, official=official)
  assert tuple(int(np.sum(labels[part] < 5)) for part in parts) == below
  assert len(parts[0]) - below[0] == (6 if official else 3)
  np.testing.assert_array_equal(np.sort(np.concatenate(parts)), np.arange(200))


def test_bad_environments_are_refused():
  images, labels = np.ones((2, 3, 3, 1), np.float32), np.zeros(2, np.int32)
  with pytest.raises(ValueError, match="color_flip must lie in"):
    environments.colored_digits(jax.random.key(0), images, labels, color_flip=1.5)
  with pytest.raises(ValueError, match="degrees must be a scalar"):
    environments.rotate_images(images, degrees=np.ones(2, np.float32))
  with pytest.raises(ValueError, match="fraction must lie in"):
    environments.imbalanced_environments(np.random.default_rng(0), labels, fraction=2.0)
  with pytest.raises(ValueError, match="labels must be integers"):
    environments.imbalanced_environments(np.random.default_rng(0), images)
