"""The Poisson operator on grids with obstacles."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxreg.solvers import poisson
from jaxreg.solvers.poisson import poisson_matvec
from tests.conformance import draw_logits, row


@pytest.mark.parametrize("shape", [(5,), (3, 4), (2, 3, 4)])
def test_is_the_sum_of_second_differences(shape, x64):
  """A Kronecker sum, of which removed cells are rows and columns of zeros."""
  rng = np.random.default_rng(0)
  dense = 0
  for axis, size in enumerate(shape):
    line = 2 * np.eye(size) - np.eye(size, k=1) - np.eye(size, k=-1)
    dense += np.kron(np.kron(np.eye(int(np.prod(shape[:axis]))), line), np.eye(int(np.prod(shape[axis + 1 :]))))
  values, mask = rng.normal(size=shape), rng.random(shape) < 0.7
  whole, masked = jax.jit(lambda v, m: (poisson_matvec(v), poisson_matvec(v, mask=m)))(values, mask)
  np.testing.assert_allclose(whole.ravel(), dense @ values.ravel(), atol=1e-12)
  np.testing.assert_allclose(masked.ravel(), (dense * np.outer(mask, mask)) @ values.ravel(), atol=1e-12)


def test_bad_input():
  with pytest.raises(ValueError, match="mask must have the shape"):
    poisson_matvec(jnp.ones((2, 3)), mask=jnp.ones(3, bool))
  with pytest.raises(ValueError, match="values must be floating"):
    poisson_matvec(jnp.ones((2, 3), int))
  with pytest.raises(ValueError, match="values must have an axis"):
    poisson_matvec(jnp.float32(1))


ROWS = [
  row(
    poisson.poisson_matvec,
    lambda rng: (draw_logits(rng),),
    bad=(("values", lambda v: (v.astype(np.int32),)),),
  ),
]
