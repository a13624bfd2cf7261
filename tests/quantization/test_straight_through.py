"""Conformance rows of `quantization.straight_through`."""

import numpy as np

from jaxreg.quantization import straight_through
from tests.conformance import BAD_SAME_SHAPE, EXAMPLES, row, straight_through_surrogate

ROWS = [
  row(
    straight_through.straight_through_floor,
    lambda rng: (rng.normal(size=EXAMPLES),),
    bad=(("values", lambda x: (x.astype(np.int32),)),),
    call=lambda x: (straight_through.straight_through_floor(x), x),
    surrogate=straight_through_surrogate,
  ),
  row(
    straight_through.straight_through_round,
    lambda rng: (rng.normal(size=EXAMPLES),),
    bad=(("values", lambda x: (x.astype(np.int32),)),),
    call=lambda x: (straight_through.straight_through_round(x), x),
    surrogate=straight_through_surrogate,
  ),
  row(
    straight_through.straight_through_value,
    lambda rng: (rng.normal(size=EXAMPLES), rng.normal(size=EXAMPLES)),
    call=lambda x, replaced: (straight_through.straight_through_value(x, replaced), x),
    bad=(*BAD_SAME_SHAPE, ("values", lambda x, y: (x.astype(np.int32), y))),
    surrogate=lambda x, results, replaced: straight_through_surrogate(x, results),
  ),
]
