"""Conformance rows of `losses.hinge`."""

from jaxreg.losses import hinge
from tests.conformance import loss_row

ROWS = [
  loss_row(hinge.crammer_singer_loss, margin=(0.0, 1.0)),
  loss_row(hinge.weston_watkins_loss, margin=(0.0, 1.0)),
]
