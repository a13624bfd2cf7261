"""Conformance rows of tables by id; the losses that carry a table test them over devices."""

from jaxreg.losses import example_table
from tests.conformance import EXAMPLES, TABLE, draw_ids, row

ROWS = [
  row(
    example_table.gather_rows,
    lambda rng: (rng.normal(size=(TABLE, 3)), draw_ids(rng)),
    wide=True,
  ),
  row(
    example_table.update_rows,
    lambda rng: (rng.normal(size=(TABLE, 3)), draw_ids(rng), rng.normal(size=(EXAMPLES, 3))),
  ),
]

