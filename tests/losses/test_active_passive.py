"""Conformance rows of `losses.active_passive`."""

from jaxreg.losses import active_passive
from tests.conformance import loss_row

ROWS = [
  loss_row(active_passive.asymmetric_generalized_cross_entropy_loss, offset=(0.0, 3.0), q=(0.5, 2.0)),
  loss_row(active_passive.asymmetric_unhinged_loss, offset=(1.1, 3.0), q=(0.5, 2.0)),
  loss_row(
    active_passive.nce_agce_loss, active_weight=(0.0, 2.0), passive_weight=(0.0, 2.0), offset=(0.5, 3.0), q=(0.5, 2.0)
  ),
  loss_row(
    active_passive.nce_aul_loss, active_weight=(0.0, 2.0), passive_weight=(0.0, 2.0), offset=(1.1, 3.0), q=(0.5, 2.0)
  ),
  loss_row(active_passive.nce_rce_loss, active_weight=(0.0, 2.0), passive_weight=(0.0, 2.0), log_zero=(-9.0, -4.0)),
  loss_row(active_passive.normalized_cross_entropy_loss),
]
