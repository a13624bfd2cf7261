"""MaxMin: sorted pairs, with a gradient that is a permutation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxreg.layers import max_min as max_min_function
from jaxreg.layers.max_min_activation import max_min
from tests.conformance import EXAMPLES, row

forward = jax.jit(max_min)
backward = jax.jit(lambda x, cotangent: jax.vjp(max_min, x)[1](cotangent)[0])


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_sorts_pairs_and_keeps_norms(seed):
  rng = np.random.default_rng(seed)
  x, cotangent = rng.integers(-2, 3, (3, 6)).astype(np.float32), rng.normal(size=(3, 6)).astype(np.float32)
  pairs = np.asarray(forward(x)).reshape(3, 3, 2)
  np.testing.assert_array_equal(pairs[..., ::-1], np.sort(x.reshape(3, 3, 2)))
  back = np.asarray(backward(x, cotangent))  # ties among them
  np.testing.assert_array_equal(np.sort(back.reshape(3, 3, 2)), np.sort(cotangent.reshape(3, 3, 2)))


def test_axis_dtype_and_extremes():
  x = jnp.array([[1e4, -1e4, 3.0], [-1e4, 1e4, 3.0]], jnp.bfloat16)
  out = max_min(x, axis=0)
  assert out.dtype == jnp.bfloat16
  np.testing.assert_array_equal(np.asarray(out, np.float32), np.float32(jnp.sort(x, axis=0)[::-1]))


def test_bad_input():
  with pytest.raises(ValueError, match="even number of features, got 3"):
    max_min(jnp.ones(3))
  with pytest.raises(ValueError, match="axis must be an axis of inputs"):
    max_min(jnp.ones(4), axis=1)
  with pytest.raises(ValueError, match="inputs must be floating"):
    max_min(jnp.ones(4, int))


ROWS = [
  row(
    max_min_function,
    lambda rng: (rng.normal(size=(EXAMPLES, 6)),),
    bad=(("inputs", lambda inputs: (inputs.astype(np.int32),)), ("inputs", lambda inputs: (inputs[:, 1:],))),
    examples="any",
  ),
]
