"""Conformance rows of `solvers.linear_q_estimation`."""

import numpy as np

from jaxreg.solvers import linear_q_estimation
from tests.conformance import EXAMPLES, extremes, row


def _q_estimation(rng):
  """Features, an inverse covariance, one played and some visited features."""
  features = rng.normal(size=(EXAMPLES, 3)) / 2
  factor = rng.normal(size=(3, 3))
  return (
    features,
    factor @ factor.T,
    features[0],
    np.float64(0.7),
    rng.normal(size=(6, 3)) / 2,
    rng.dirichlet(np.ones(6)),
  )


ROWS = [
  row(
    linear_q_estimation.magnitude_reduced_q_estimate,
    _q_estimation,
    extreme=lambda features, *rest: (extremes(features), *rest),
    bad=(
      ("played_features", lambda f, s, p, *rest: (f, s, p[1:], *rest)),
      ("inverse_covariance", lambda f, s, *rest: (f, s[1:], *rest)),
      ("weights", lambda *arguments: (*arguments[:-1], arguments[-1][1:])),
      ("loss_to_go", lambda f, s, p, loss, *rest: (f, s, p, np.full(EXAMPLES, loss), *rest)),
      ("reference_features", lambda *arguments: (*arguments[:4], arguments[4][:, 1:], arguments[5])),
    ),
    options={"high": (1.0, 3.0)},
  ),
]


EXEMPT = {
  "dilated_bonus": "a sum over layers, in the golden test",
  "linear_q_estimate": "magnitude_reduced_q_estimate carries it",
  "matrix_geometric_resampling": "an estimate whose variance no rounding error survives",
  "quadratic_bonus": "a quadratic form, in the golden test",
  "ridge_inverse_covariance": "an inverse, of extreme features an extreme one",
}
