"""What tasks that read a stream share: one pass over a held-out split, and means over its examples."""

import jax
import jax.numpy as jnp

from jaxreg.training import Mean

__all__ = ["ONCE", "mean_over"]

# Options of `tfds_stream` and `array_stream`: all examples once, in order.
ONCE = {"seed": None, "num_epochs": 1, "drop_remainder": False}


def mean_over(batch, **values: jax.Array) -> dict[str, Mean]:
  """Means of values `[batch]` by name, without the examples with which a last batch was filled up.

  >>> import numpy as np
  >>> batch = {"valid": np.array([True, True, False])}
  >>> float(mean_over(batch, accuracy=jnp.array([1.0, 0.0, 1.0]))["accuracy"].value())
  0.5
  """
  valid = jnp.asarray(batch["valid"], jnp.float32)
  return {name: Mean(jnp.sum(valid * value), jnp.sum(valid)) for name, value in values.items()}
