"""Coordinates of the information plane."""

import numpy as np

from jaxreg.metrics import information_plane
from tests.conformance import row


def _pair(rng):
  targets = rng.normal(size=(8, 2))
  return targets + 0.3 * rng.normal(size=targets.shape), targets


_BAD = (("shapes", lambda x, y: (x, y[1:])), ("floating", lambda x, y: (x.astype(np.int32), y)))

ROWS = [
  row(
    information_plane.compression_ratio,
    lambda rng: (rng.uniform(0.1, 1, 8), rng.uniform(1, 2, 8)),
    bad=_BAD,
    wide=True,
  ),
  row(
    information_plane.gaussian_information,
    _pair,
    bad=(*_BAD, ("predictions", lambda x, y: (x[None], y[None]))),
    extreme=lambda x, y: (1e4 * x, y),
    wide=True,
  ),
]


def test_gaussian_information_is_that_of_a_gaussian_channel(x64):
  rng = np.random.default_rng(0)
  signal, noise = rng.normal(size=(2, 200_000))
  # The best prediction of signal + noise is signal: half a bit at equal variances.
  np.testing.assert_allclose(information_plane.gaussian_information(signal, signal + noise), 0.5, atol=0.01)
  assert information_plane.gaussian_information(noise, noise) == np.inf


def test_masks_and_nothing(x64):
  predictions, targets = _pair(np.random.default_rng(1))
  kept = np.arange(8) > 2
  spoiled = np.where(kept[:, None], predictions, np.nan)
  value = information_plane.gaussian_information(spoiled, targets, where=kept)
  np.testing.assert_allclose(value, information_plane.gaussian_information(predictions[kept], targets[kept]))
  assert information_plane.gaussian_information(spoiled, targets, where=np.zeros(8, bool)) == 0
  np.testing.assert_array_equal(
    information_plane.compression_ratio(np.array([0.0, 1.0]), np.array([0.0, 4.0])), [0, 0.75]
  )
