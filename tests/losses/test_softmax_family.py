"""Conformance rows of what softmax losses share."""

import numpy as np

from jaxreg.losses import softmax_family
from tests.conformance import draw_classification, row

ROWS = [
  row(softmax_family.of_label, draw_classification, examples="any"),
  row(softmax_family.with_label, lambda rng: (*draw_classification(rng), np.float64(0.5)), examples="none"),
]


EXEMPT = {
  "SoftmaxRow": "result of softmax_row",
  "SoftmaxStatistics": "result of softmax_statistics",
  "softmax_row": "of float32 and wider only; every softmax loss's row carries it",
  "softmax_statistics": "of float32 and wider only; every softmax loss's row carries it",
}
