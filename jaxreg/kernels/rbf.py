"""Kernels of distances."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxreg.checks import check_float, check_hyperparameter

__all__ = ["gaussian_log_kernel", "rbf_kernel", "squared_distances"]


def squared_distances(inputs: ArrayLike, others: ArrayLike) -> jax.Array:
  """Squared Euclidean distances of all pairs, `|x_i - x'_j|^2`.

  By one matrix product of centred inputs, so that a distance is exact to rounding of the squared spread of the inputs.

  >>> import jax.numpy as jnp
  >>> squared_distances(jnp.array([[0.0, 0.0], [3.0, 4.0]]), jnp.array([[0.0, 0.0]])).tolist()
  [[0.0], [25.0]]

  Args:
    inputs: floating `[inputs, dimensions]`.
    others: floating `[others, dimensions]`.

  Returns:
    `[inputs, others]`, not negative, float32 at least.

  Raises:
    ValueError: when the arguments are not two matrices of floats with equally many columns.

  Reference: none (algebra).
  """
  check_float("inputs", inputs)
  check_float("others", others)
  shapes = jnp.shape(inputs), jnp.shape(others)
  if len(shapes[0]) != 2 or len(shapes[1]) != 2 or shapes[0][1] != shapes[1][1]:
    raise ValueError(f"inputs and others must be [inputs, dimensions] and [others, dimensions], got shapes {shapes}.")
  dtype = jnp.promote_types(jnp.result_type(inputs, others), jnp.float32)
  inputs, others = jnp.asarray(inputs, dtype), jnp.asarray(others, dtype)
  center = others.mean(0)
  inputs, others = inputs - center, others - center
  product = jnp.matmul(inputs, others.T, precision="highest")
  squares = jnp.sum(inputs**2, 1)[:, None] + jnp.sum(others**2, 1) - 2 * product
  # The gradient is right where rounding led below 0.
  return squares + jax.lax.stop_gradient(jnp.maximum(-squares, 0))


def gaussian_log_kernel(inputs: ArrayLike, others: ArrayLike, *, bandwidth: ArrayLike) -> jax.Array:
  """The logarithm of the Gaussian kernel, `-|x - x'|^2 / (2 bandwidth^2)`, which does not underflow.

  >>> import jax.numpy as jnp
  >>> gaussian_log_kernel(jnp.array([[1.0], [2.0]]), jnp.array([[0.0]]), bandwidth=0.5).tolist()
  [[-2.0], [-8.0]]

  Args:
    inputs: floating `[inputs, dimensions]`.
    others: floating `[others, dimensions]`.
    bandwidth: positive scalar in units of the inputs; may be traced.

  Returns:
    `[inputs, others]`, not positive, float32 at least.

  Raises:
    ValueError: when shapes do not fit or `bandwidth` is not positive.

  Reference: none (textbook).
  """
  check_hyperparameter("bandwidth", bandwidth, low=0, open_low=True, shape=())
  squares = squared_distances(inputs, others)
  bandwidth = jnp.asarray(bandwidth, squares.dtype)
  return -squares / bandwidth / bandwidth / 2


def rbf_kernel(inputs: ArrayLike, others: ArrayLike, *, gamma: ArrayLike) -> jax.Array:
  """The radial basis function (Gaussian) kernel `exp(-gamma |x - x'|^2)`.

  >>> import jax.numpy as jnp
  >>> print(rbf_kernel(jnp.array([[0.0], [1.0]]), jnp.array([[0.0]]), gamma=2.0).round(4).T)
  [[1.     0.1353]]

  Args:
    inputs: floating `[inputs, dimensions]`.
    others: floating `[others, dimensions]`.
    gamma: non-negative scalar, `1 / (2 bandwidth^2)`; may be traced.

  Returns:
    `[inputs, others]`, in [0, 1], float32 at least.

  Raises:
    ValueError: when shapes do not fit or `gamma` is negative.

  Reference: none (textbook).
  """
  check_hyperparameter("gamma", gamma, low=0)
  squares = squared_distances(inputs, others)
  return jnp.exp(-jnp.asarray(gamma, squares.dtype) * squares)
