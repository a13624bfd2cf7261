"""What distinguishes data."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxreg.data.fingerprint import array_fingerprint

EXEMPT = {"array_fingerprint": "reads values and returns text"}


def test_values_dtypes_and_shapes_are_told_apart():
  arrays = [
    np.zeros(4, np.float32),
    np.zeros(4, np.float64),
    np.zeros((2, 2), np.float32),
    np.array([0, 0, 0, -0.0], np.float32),
    np.zeros(0, np.float32),
    np.float32(0),
    np.array(["a", "b"]),
    np.array([b"a", b"b"]),
    np.array([True, False]),
    jnp.zeros(4, jnp.bfloat16),
    jax.random.key(0),
    jax.random.key(1),
  ]
  assert len({array_fingerprint(array) for array in arrays}) == len(arrays)


def test_layout_and_place_do_not_matter():
  array = np.arange(6, dtype=np.float32).reshape(2, 3)
  assert array_fingerprint(array) == array_fingerprint(jnp.asarray(array)) == array_fingerprint(array.T.copy().T)
