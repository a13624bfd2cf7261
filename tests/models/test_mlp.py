"""Conformance row of `models.mlp`."""

from jaxreg.models import MLP
from tests.conformance import draw_logits, module_row

ROWS = [
  module_row(MLP((4, 3)), lambda rng: (draw_logits(rng),)),
]
