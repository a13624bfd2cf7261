"""Score estimation by wide two-layer networks: their tangent kernel, gradient descent under it, and when to stop.

As regression of clean data on noisy data (`losses.score_matching`) score matching is least squares with noisy targets.
A wide ReLU network of which the hidden layer is trained then follows kernel regression, which has to stop early. Inputs
are (noisy data, time, 1): without the constant the kernel, homogeneous of degree 1, cannot represent much.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxreg.checks import check_float, check_hyperparameter
from jaxreg.kernels.dual_activations import relu_dual
from jaxreg.kernels.gradient_flow import gradient_descent_coefficients, kernel_eigensystem
from jaxreg.kernels.infinite_width import angle_complement
from jaxreg.metrics.norms import normalized_rows

__all__ = [
  "DescentPath",
  "early_stopping_step",
  "finite_score_ntk",
  "kernel_descent_path",
  "score_ntk",
  "score_output_kernel",
]


class DescentPath(NamedTuple):
  """Predictions of kernel gradient descent after several numbers of steps.

  Attributes:
    train: `[steps, training inputs, ...]`.
    test: `[steps, inputs, ...]`.
  """

  train: jax.Array
  test: jax.Array


def score_ntk(inputs: ArrayLike, others: ArrayLike) -> jax.Array:
  """Tangent kernel of the hidden layer of an infinitely wide ReLU network: `z.z' (pi - t) / (2 pi)` at the angle t.

  It is the same for every output, and zero between outputs. If the output layer is trained as well, add
  `score_output_kernel`.

  >>> import jax.numpy as jnp
  >>> kernel = score_ntk(jnp.array([[1.0, 1.0], [-2.0, 0.0]]), jnp.array([[2.0, 0.0]]))
  >>> [round(abs(float(value)), 4) for value in kernel[:, 0]]
  [0.75, 0.0]

  Args:
    inputs: floating `[inputs, features]`.
    others: floating `[others, features]`.

  Returns:
    `[inputs, others]`, float32 at least.

  Raises:
    ValueError: when the inputs are not matrices of the same number of features.

  Reference: Han, Razaviyayn, Xu, "Neural Network-Based Score Estimation in Diffusion Models: Optimization and
    Generalization", ICLR 2024, the neural tangent kernel.
  """
  products, moments = _moments(inputs, others)
  return products * moments[1]


def score_output_kernel(inputs: ArrayLike, others: ArrayLike) -> jax.Array:
  """The output layer's part of the tangent kernel: `|z| |z'| (sin t + (pi - t) cos t) / (2 pi)` at the angle t.

  >>> import jax.numpy as jnp
  >>> kernel = score_output_kernel(jnp.array([[1.0, 0.0], [0.0, 1.0]]), jnp.array([[2.0, 0.0]]))
  >>> [round(float(value), 4) for value in kernel[:, 0]]
  [1.0, 0.3183]

  Args:
    inputs: floating `[inputs, features]`.
    others: floating `[others, features]`.

  Returns:
    `[inputs, others]`, float32 at least.

  Raises:
    ValueError: when the inputs are not matrices of the same number of features.

  Reference: Cho, Saul, "Kernel Methods for Deep Learning", NeurIPS 2009, Section 2, degree 1.
  """
  return _moments(inputs, others)[1][0]


def _moments(inputs, others):
  inputs, others = _matrices(inputs=inputs, others=others)
  products = jnp.matmul(inputs, others.T, precision="highest")
  complement = angle_complement(normalized_rows(inputs), normalized_rows(others))
  squares, other_squares = jnp.sum(inputs**2, 1), jnp.sum(others**2, 1)
  return products, relu_dual().moments(products, squares[:, None], other_squares, complement)


def _matrices(**arrays):
  """The arrays, float32 at least; ValueError unless they are matrices with equally many columns."""
  for name, array in arrays.items():
    check_float(name, array)
  shapes = {name: jnp.shape(array) for name, array in arrays.items()}
  if any(len(shape) != 2 for shape in shapes.values()) or len({shape[1] for shape in shapes.values()}) > 1:
    listed = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
    raise ValueError(f"{' and '.join(arrays)} must be matrices with equally many features, got shapes {listed}.")
  dtype = jnp.promote_types(jnp.result_type(*arrays.values()), jnp.float32)
  return [jnp.asarray(array, dtype) for array in arrays.values()]


def finite_score_ntk(weights: ArrayLike, signs: ArrayLike, inputs: ArrayLike, others: ArrayLike) -> jax.Array:
  """The hidden layer's tangent kernel at finite width: `mean_r a_r^i a_r^k [w_r.z > 0] [w_r.z' > 0] z.z'`.

  >>> import jax.numpy as jnp
  >>> weights, signs = jnp.array([[1.0, 0.0], [-1.0, 0.0]]), jnp.array([[1.0, -1.0]])
  >>> finite_score_ntk(weights, signs, jnp.array([[2.0, 1.0]]), jnp.array([[1.0, 1.0]]))[0, 0].tolist()
  [[1.5]]

  Args:
    weights: hidden weights w, floating `[width, features]`.
    signs: output weights a, floating `[outputs, width]`.
    inputs: floating `[inputs, features]`.
    others: floating `[others, features]`.

  Returns:
    `[inputs, others, outputs, outputs]`, float32 at least.

  Raises:
    ValueError: when shapes do not fit.

  Reference: Han, Razaviyayn, Xu, ICLR 2024, the tangent kernel at initialization.
  """
  weights, inputs, others = _matrices(weights=weights, inputs=inputs, others=others)
  check_float("signs", signs)
  if jnp.ndim(signs) != 2 or jnp.shape(signs)[1] != weights.shape[0]:
    raise ValueError(f"signs must be [outputs, {weights.shape[0]}], got shape {jnp.shape(signs)}.")
  signs = jnp.asarray(signs, weights.dtype)
  dot = lambda a, b: jnp.matmul(a, b, precision="highest")

  def active(z):
    fields = dot(z, weights.T)
    return jnp.where(jnp.isnan(fields), jnp.nan, fields > 0).astype(weights.dtype)

  # One output pair at a time is one matrix product of [inputs, width] and [width, others].
  pairs = jnp.einsum("nr,ir,kr,mr->nmik", active(inputs), signs, signs, active(others), precision="highest")
  return pairs / weights.shape[0] * dot(inputs, others.T)[..., None, None]


def kernel_descent_path(
  gram: ArrayLike, cross: ArrayLike, targets: ArrayLike, *, learning_rate: ArrayLike, steps: ArrayLike
) -> DescentPath:
  """Gradient descent from zero on `1/2 sum |F - Y|^2` under a fixed kernel, `F <- F - learning_rate K (F - Y)`.

  In closed form, `K* U diag((1 - (1 - learning_rate l)^s) / l) U^T Y` with `K = U diag(l) U^T`, so that any number of
  steps costs the same. It converges, to the interpolant, when `learning_rate l < 2`.

  >>> import jax.numpy as jnp
  >>> path = kernel_descent_path(jnp.eye(1), jnp.eye(1) / 2, jnp.ones(1), learning_rate=0.5, steps=jnp.array([1, 2]))
  >>> path.train[:, 0].tolist(), path.test[:, 0].tolist()
  ([0.5, 0.75], [0.25, 0.375])

  Args:
    gram: floating `[training inputs, training inputs]`.
    cross: floating `[inputs, training inputs]`.
    targets: floating `[training inputs]` or `[training inputs, outputs]`.
    learning_rate: not negative; may be traced. For the mean loss divide it by the number of training inputs.
    steps: whole numbers `[steps]`, may be infinite; may be traced.

  Returns:
    The predictions, float32 at least.

  Raises:
    ValueError: when shapes do not fit or a hyperparameter is negative.

  Reference: Han, Razaviyayn, Xu, ICLR 2024, the kernel regression that the network follows.
  """
  check_float("cross", cross)
  check_float("gram", gram)
  if jnp.ndim(cross) != 2 or jnp.shape(cross)[1] != jnp.shape(gram)[-1]:
    raise ValueError(f"cross must be [inputs, {jnp.shape(gram)[-1]}], got shape {jnp.shape(cross)}.")
  if jnp.ndim(steps) != 1:
    raise ValueError(f"steps must be [steps], got shape {jnp.shape(steps)}.")
  check_hyperparameter("steps", steps, low=0)
  eigensystem = kernel_eigensystem(gram)
  after = lambda s: gradient_descent_coefficients(eigensystem, targets, steps=s, learning_rate=learning_rate)
  coefficients = jax.vmap(after)(jnp.asarray(steps, eigensystem.values.dtype))
  predict = lambda kernel: jax.vmap(lambda c: jnp.matmul(kernel, c, precision="highest"))(coefficients)
  return DescentPath(predict(gram), predict(cross))


def early_stopping_step(
  eigenvalues: ArrayLike, *, noise: ArrayLike, learning_rate: ArrayLike, longest: int
) -> jax.Array:
  """The last step of kernel descent before noise takes over: `R(1 / sqrt(tau)) <= 1 / (2 e noise tau)`, `tau = rate s`.

  `R(r) = sqrt(mean_i min(mu_i, r^2))` is the local complexity at eigenvalues mu of the Gram matrix over the number of
  examples n. The rule needs no validation data and is conservative; it is made for one noise level and one output.

  >>> import jax.numpy as jnp
  >>> eigenvalues = jnp.array([1.0, 0.1, 0.01])
  >>> [int(early_stopping_step(eigenvalues, noise=s, learning_rate=0.1, longest=1000)) for s in (0.01, 0.1, 1.0)]
  [1000, 60, 3]

  Args:
    eigenvalues: mu, of `K / n`, not negative, floating `[examples]`.
    noise: standard deviation of the targets' noise, positive; may be traced. A bound is the norm of the data.
    learning_rate: step on the mean loss (n times that on the sum); may be traced.
    longest: static; the answer when the rule does not stop before.

  Returns:
    int32 scalar, at most `longest`; 0 when not even one step is allowed.

  Raises:
    ValueError: when `eigenvalues` are not a vector of floats or a hyperparameter is out of range.

  Reference: Han, Razaviyayn, Xu, ICLR 2024, early stopping, and Raskutti, Wainwright, Yu, "Early Stopping and
    Non-parametric Regression", JMLR 2014, equation 6 (the constants of the former's extension to vectors unverified).
  """
  check_float("eigenvalues", eigenvalues)
  check_hyperparameter("noise", noise, low=0, open_low=True)
  check_hyperparameter("learning_rate", learning_rate, low=0, open_low=True)
  check_hyperparameter("longest", longest, low=1, high=np.iinfo(np.int32).max // 2)
  if jnp.ndim(eigenvalues) != 1:
    raise ValueError(f"eigenvalues must be [examples], got shape {jnp.shape(eigenvalues)}.")
  dtype = jnp.promote_types(jnp.result_type(eigenvalues), jnp.float32)
  mu, noise, rate = (jnp.asarray(x, dtype) for x in (eigenvalues, noise, learning_rate))

  def beyond(step):
    tau = rate * step
    # It grows with tau; NaN stops at once.
    return ~((2 * math.e * noise) ** 2 * tau * jnp.mean(jnp.minimum(tau * mu, 1)) <= 1)

  def halve(_, ends):
    low, high = ends  # allowed, and beyond (or longest + 1)
    middle = low + (high - low) // 2
    stops = beyond(middle.astype(dtype))
    moved = jnp.where(stops, low, middle), jnp.where(stops, middle, high)
    return jax.tree.map(lambda new, old: jnp.where(high - low > 1, new, old), moved, ends)

  ends = (jnp.int32(0), jnp.int32(longest + 1))
  return jax.lax.fori_loop(0, int(longest).bit_length() + 1, halve, ends)[0]
