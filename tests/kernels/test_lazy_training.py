"""Conformance rows of lazy training; its other tests are those of `kernels.committee`."""

import jax.numpy as jnp
import numpy as np

from jaxreg.kernels import lazy_training
from tests.conformance import row, unchanged

ROWS = [
  row(
    lazy_training.lazy_learning_rate,
    lambda rng: (np.float64(rng.uniform(0.1, 1)),),
    extreme=unchanged,
    wide=True,
    options=dict(output_scale=(0.5, 2.0)),
  ),
  row(
    lazy_training.lazy_output,
    lambda rng: (rng.normal(size=(3, 2)), rng.normal(size=(3, 2)), rng.normal(size=(4, 3))),
    call=lambda params, start, inputs, output_scale: lazy_training.lazy_output(
      lambda params, inputs: jnp.tanh(inputs @ params), start, output_scale=output_scale
    )(params, inputs),
    options=dict(output_scale=(0.5, 2.0)),
  ),
]


EXEMPT = {
  "eigenvector_labels": "an eigenvector, up to its sign",
}
