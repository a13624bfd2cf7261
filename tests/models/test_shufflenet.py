"""ShuffleNetV2: the usual number of parameters, shuffled channels."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxreg.models import shufflenet
from jaxreg.models.shufflenet import ShuffleNetV2
from tests.conformance import EXAMPLES, module_row


def test_number_of_parameters():
  """1.36 million with 100 classes, as in benchmarks of distillation: the stem's weights are 72 instead of 648 here."""
  shapes = jax.eval_shape(
    lambda: ShuffleNetV2(classes=100).init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)), train=False)
  )
  assert round(sum(leaf.size for leaf in jax.tree.leaves(shapes["params"])) / 1e6, 2) == 1.36


def test_channels_of_the_halves_alternate():
  np.testing.assert_array_equal(shufflenet._shuffled(jnp.arange(6.0)[None]), [[0, 3, 1, 4, 2, 5]])


ROWS = [
  module_row(
    ShuffleNetV2(classes=2, blocks=(1,), widths=(4,), stem=2, last=4),
    lambda rng: (rng.normal(size=(EXAMPLES, 4, 4, 1)),),
    options=dict(train=False),
  ),
]
