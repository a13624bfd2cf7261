"""The effective rank."""

import numpy as np
import pytest

from jaxreg.metrics import representation
from tests.conformance import EXAMPLES, row

pytestmark = pytest.mark.usefixtures("x64")


def test_of_known_singular_values():
  rng = np.random.default_rng(0)
  left, right = np.linalg.qr(rng.normal(size=(9, 4)))[0], np.linalg.qr(rng.normal(size=(4, 4)))[0]
  values = np.array([4.0, 2.0, 1.0, 1.0])
  shares = values / values.sum()
  expected = np.exp(-np.sum(shares * np.log(shares)))
  for scale in (1.0, 1e-200, 1e200):
    np.testing.assert_allclose(representation.effective_rank(scale * (left * values) @ right), expected, rtol=1e-10)


def test_bounds():
  np.testing.assert_allclose(representation.effective_rank(np.eye(5)), 5, rtol=1e-12)
  np.testing.assert_allclose(representation.effective_rank(np.ones((6, 3))), 1, rtol=1e-9)
  assert representation.effective_rank(np.zeros((6, 3))) == 0
  assert np.isnan(representation.effective_rank(np.full((2, 2), np.nan)))


ROWS = [
  row(
    representation.effective_rank,
    lambda rng: (rng.normal(size=(EXAMPLES, 6)),),
    bad=(("features", lambda x: (x.astype(np.int32),)), ("features", lambda x: (x[0],))),
    examples="reduced",
    differentiable=False,
    wide=True,
  )
]
