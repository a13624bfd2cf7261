"""Training of linear models and networks of infinite width on squared loss, in closed form at any time.

The loss is `1/2 sum_i |f(x_i) - y_i|^2 + ridge / 2 |theta - theta_0|^2`. Under a fixed tangent kernel K the function at
time t is `f_0(x) + K(x, X) c(t)`, with coefficients c that depend on the residuals `y - f_0(X)` at the start:

>>> import jax.numpy as jnp
>>> gram, targets = jnp.array([[2.0, 1.0], [1.0, 2.0]]), jnp.array([1.0, -1.0])
>>> eigen = kernel_eigensystem(gram)
>>> (gram @ gradient_flow_coefficients(eigen, targets, time=jnp.inf)).round(4).tolist()
[1.0, -1.0]
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxreg.checks import as_array, check_float, check_hyperparameter, widened_integers
from jaxreg.kernels.spectral import apply_function, decayed_fraction, log_slope, powers
from jaxreg.metrics.classification import predicted_classes

__all__ = [
  "Eigensystem",
  "class_targets",
  "gradient_descent_coefficients",
  "gradient_flow_coefficients",
  "kernel_classify",
  "kernel_eigensystem",
  "kernel_regression",
]


class Eigensystem(NamedTuple):
  """Eigenvalues, ascending and not negative, and eigenvectors of a Gram matrix, computed once for all times.

  Attributes:
    values: `[training inputs]`.
    vectors: `[training inputs, training inputs]`, one eigenvector per column.
    gram: the matrix itself, in which coefficients are differentiated, also where eigenvalues are equal and eigenvectors
      have no derivative; None to differentiate them in the values and the vectors.
    noise: scalar, what rounding may have made of an eigenvalue 0; None for `n` times the dtype's resolution times the
      largest one.
  """

  values: jax.Array
  vectors: jax.Array
  gram: jax.Array | None = None
  noise: jax.Array | None = None


def kernel_eigensystem(gram: ArrayLike) -> Eigensystem:
  """The eigendecomposition of a Gram matrix; what rounding made negative is zero.

  Small eigenvalues of a definite matrix are found through the singular values of its Cholesky factor, their roots, with
  all the digits that the matrix has; where rounding made it indefinite, up to rounding of the largest one.

  >>> import jax.numpy as jnp
  >>> kernel_eigensystem(jnp.array([[2.0, 0.0], [0.0, 1.0]])).values.tolist()
  [1.0, 2.0]

  Args:
    gram: floating `[training inputs, training inputs]`, symmetric.

  Returns:
    The eigensystem, float32 at least.

  Raises:
    ValueError: when `gram` is not a square matrix of floats.

  Reference: none (linear algebra).
  """
  check_gram(gram)
  gram = jnp.asarray(gram, jnp.promote_types(jnp.result_type(gram), jnp.float32))
  values, vectors, noise = _decompose(gram)
  return Eigensystem(jnp.maximum(values, 0), vectors, gram, jax.lax.stop_gradient(noise))


@jax.custom_jvp
def _decompose(gram):
  """Eigenvalues, eigenvectors, and what of an eigenvalue is rounding."""
  values, vectors = jnp.linalg.eigh(gram)
  noise = _noise(values)
  factor = jnp.linalg.cholesky(gram)
  definite = jnp.isfinite(factor).all() & (values[0] <= noise)

  def precise():
    left, roots, _ = jnp.linalg.svd(factor, full_matrices=False)
    # What remains is the rounding of the matrix itself.
    rounding = len(gram) ** 0.5 * jnp.finfo(gram.dtype).eps * jnp.mean(jnp.diagonal(gram))
    return jnp.square(roots[::-1]), left[:, ::-1], rounding

  return jax.lax.cond(definite, precise, lambda: (values, vectors, noise))


@_decompose.defjvp
def _decompose_jvp(primals, tangents):
  values, vectors, noise = _decompose(*primals)
  inside = jnp.matmul(vectors.T, jnp.matmul(tangents[0], vectors, precision="highest"), precision="highest")
  inside = (inside + inside.T) / 2
  gap = values - values[:, None] + jnp.eye(len(values), dtype=values.dtype)
  rotation = (1 - jnp.eye(len(values), dtype=values.dtype)) * inside / gap
  change = jnp.matmul(vectors, rotation, precision="highest")
  return (values, vectors, noise), (jnp.diagonal(inside), change, jnp.zeros_like(noise))


def _noise(values):
  return values.shape[0] * jnp.finfo(values.dtype).eps * values[-1]


def check_gram(gram) -> None:
  """Raises ValueError unless `gram` is a square matrix of floats."""
  check_float("gram", gram)
  if jnp.ndim(gram) != 2 or jnp.shape(gram)[0] != jnp.shape(gram)[1]:
    raise ValueError(f"gram must be a square matrix, got shape {jnp.shape(gram)}.")


def _check_rows(name, array, count):
  check_float(name, array)
  if jnp.ndim(array) not in (1, 2) or jnp.shape(array)[0] != count:
    raise ValueError(f"{name} must be [{count}] or [{count}, outputs], got shape {jnp.shape(array)}.")


def gradient_flow_coefficients(
  eigensystem: Eigensystem, residuals: ArrayLike, *, time: ArrayLike, ridge: ArrayLike = 0.0
) -> jax.Array:
  """Coefficients after gradient flow: `c = (K + ridge)^-1 (1 - exp(-(K + ridge) time)) residuals`.

  At infinite time and without a ridge this is the least-norm interpolant: directions in which the kernel vanishes, up
  to rounding, are left out.

  >>> import jax.numpy as jnp
  >>> eigen = kernel_eigensystem(jnp.array([[1.0]]))
  >>> [round(float(gradient_flow_coefficients(eigen, jnp.ones(1), time=t)[0]), 4) for t in (0.0, 1.0, jnp.inf)]
  [0.0, 0.6321, 1.0]

  Args:
    eigensystem: of the Gram matrix of the training inputs.
    residuals: floating `[training inputs]` or `[training inputs, outputs]`, targets less the outputs at time 0.
    time: non-negative scalar, may be infinite; may be traced. For the mean loss divide it by the number of inputs.
    ridge: non-negative scalar; may be traced.

  Returns:
    Shaped like `residuals`: the predictions are `f_0(x) + K(x, X) c`.

  Raises:
    ValueError: when shapes do not fit or a hyperparameter is negative.

  Reference: Lee et al., "Wide Neural Networks of Any Depth Evolve as Linear Models Under Gradient Descent", NeurIPS
    2019, equations 9 to 11 (with a ridge: derived anew).
  """
  check_hyperparameter("time", time, low=0)
  check_hyperparameter("ridge", ridge, low=0)
  return filtered(_flow_filter, eigensystem, residuals, ridge, time)


def _flow_filter(values, ridge, time):
  """`(1 - exp(-rate time)) / rate` with `rate = value + ridge`, `time` at rate 0."""
  rates = values + ridge
  zero = rates == 0
  safe = jnp.where(zero, 1, rates)
  late = jnp.isinf(time)
  finite = jnp.where(late, 1, time)
  z = safe * finite
  early = zero | (z < 0.5)
  change = jnp.where(early, finite * decayed_fraction(jnp.where(early, rates * finite, 0)), -jnp.expm1(-z) / safe)
  return jnp.where(late, jnp.where(zero, 0, 1 / safe), change)


def gradient_descent_coefficients(
  eigensystem: Eigensystem,
  residuals: ArrayLike,
  *,
  steps: ArrayLike,
  learning_rate: ArrayLike,
  ridge: ArrayLike = 0.0,
) -> jax.Array:
  """Coefficients after gradient descent: `c = (K + ridge)^-1 (1 - (1 - learning_rate (K + ridge))^steps) residuals`.

  It converges when `learning_rate (K + ridge) < 2` for all eigenvalues.

  >>> import jax.numpy as jnp
  >>> eigen = kernel_eigensystem(jnp.array([[1.0]]))
  >>> after = lambda t: gradient_descent_coefficients(eigen, jnp.ones(1), steps=t, learning_rate=0.5)
  >>> [float(after(t)[0]) for t in (0, 1, 2, jnp.inf)]
  [0.0, 0.5, 0.75, 1.0]

  Args:
    eigensystem: of the Gram matrix of the training inputs.
    residuals: floating `[training inputs]` or `[training inputs, outputs]`, targets less the outputs at the start.
    steps: non-negative whole number, may be infinite; may be traced.
    learning_rate: non-negative scalar; may be traced.
    ridge: non-negative scalar; may be traced.

  Returns:
    Shaped like `residuals`: the predictions are `f_0(x) + K(x, X) c`.

  Raises:
    ValueError: when shapes do not fit or a hyperparameter is negative.

  Reference: Lee et al., "Wide Neural Networks of Any Depth Evolve as Linear Models Under Gradient Descent", NeurIPS
    2019, Section 2.2 (discrete time: derived anew).
  """
  check_hyperparameter("steps", steps, low=0)
  check_hyperparameter("learning_rate", learning_rate, low=0)
  check_hyperparameter("ridge", ridge, low=0)
  return filtered(_descent_filter, eigensystem, residuals, ridge, steps, learning_rate)


def _descent_filter(values, ridge, steps, learning_rate):
  """`(1 - (1 - learning_rate rate)^steps) / rate` with `rate = value + ridge`, `steps learning_rate` at rate 0."""
  factor = learning_rate * (values + ridge)
  zero = factor == 0
  safe = jnp.where(zero, 1, factor)
  late = jnp.isinf(steps)
  count = jnp.where(late, 1, steps)
  # Small factors by series, which have the derivatives at 0.
  small = factor < 0.1
  slope = log_slope(jnp.where(small, factor, 0))
  early = count * factor * slope < 0.5
  start = count * slope * decayed_fraction(jnp.where(small & early, count * factor * slope, 0))
  change = jnp.where(small & early, start, powers(1 - safe, safe, count)[1] / safe)
  limit = jnp.where(factor > 2, jnp.inf, jnp.where(factor < 2, 1 / safe, jnp.nan))
  return learning_rate * jnp.where(late, jnp.where(zero, 0, limit), change)


def filtered(function, eigensystem: Eigensystem, residuals: jax.Array, ridge, *parameters) -> jax.Array:
  """`V diag(f(values, ridge, *parameters)) V^T residuals`.

  Without a ridge eigenvalues that rounding cannot tell from 0 are 0; beside one they do no harm.
  """
  values, vectors, gram, noise = eigensystem
  values, vectors = jnp.asarray(values), jnp.asarray(vectors)
  _check_rows("residuals", residuals, values.shape[0])
  parameters = [jnp.asarray(parameter, values.dtype) for parameter in (ridge, *parameters)]
  noise = _noise(values) if noise is None else noise
  values = jnp.where((values <= noise) & (parameters[0] == 0), 0, values)
  residuals = jnp.asarray(residuals, values.dtype)
  if gram is not None:
    return apply_function(function, gram, values, vectors, residuals, *parameters)
  rotate = lambda matrix, x: jnp.tensordot(matrix, x, 1, precision="highest")
  return rotate(vectors, (function(values, *parameters) * rotate(vectors.T, residuals).T).T)


def kernel_regression(gram: ArrayLike, targets: ArrayLike, *, ridge: ArrayLike = 0.0) -> jax.Array:
  """Coefficients `c = (K + ridge)^-1 targets` of kernel (ridge) regression, by Cholesky factorization.

  >>> import jax.numpy as jnp
  >>> kernel_regression(jnp.array([[2.0, 0.0], [0.0, 1.0]]), jnp.array([1.0, 1.0])).round(4).tolist()
  [0.5, 1.0]

  Args:
    gram: floating `[training inputs, training inputs]`, positive definite together with the ridge: without one no two
      training inputs may coincide. The result is not a number where rounding makes the matrix indefinite.
    targets: floating `[training inputs]` or `[training inputs, outputs]`.
    ridge: non-negative scalar; may be traced.

  Returns:
    Shaped like `targets`, float32 at least: the predictions are `K(x, X) c`.

  Raises:
    ValueError: when shapes do not fit or `ridge` is negative.

  Reference: Radhakrishnan, Belkin, Uhler, "Wide and Deep Neural Networks Achieve Optimality for Classification",
    PNAS 2023, the kernel machine of a trained network.
  """
  check_gram(gram)
  _check_rows("targets", targets, jnp.shape(gram)[0])
  check_hyperparameter("ridge", ridge, low=0)
  dtype = jnp.promote_types(jnp.result_type(gram, targets), jnp.float32)
  matrix = gram.astype(dtype) + jnp.asarray(ridge, dtype) * jnp.eye(gram.shape[0], dtype=dtype)
  return jax.scipy.linalg.cho_solve(jax.scipy.linalg.cho_factor(matrix, lower=True), targets.astype(dtype))


def class_targets(labels: ArrayLike, *, num_classes: int, dtype=jnp.float32) -> jax.Array:
  """Regression targets of classes: one-hot less `1 / num_classes`, so that they sum to zero over the classes.

  >>> import jax.numpy as jnp
  >>> class_targets(jnp.array([1]), num_classes=2).tolist()
  [[-0.5, 0.5]]

  Args:
    labels: integers `[training inputs]`.
    num_classes: static; at least 2.
    dtype: static; of the result.

  Returns:
    `[training inputs, num_classes]`.

  Raises:
    ValueError: when the labels are not integers or `num_classes` is less than 2.

  Reference: Lee et al., "Deep Neural Networks as Gaussian Processes", ICLR 2018, Section 3.1.
  """
  labels = as_array("labels", labels)
  if not jnp.issubdtype(labels.dtype, jnp.integer):
    raise ValueError(f"labels must be integer class indices, got dtype {jnp.result_type(labels)}.")
  if num_classes < 2:
    raise ValueError(f"num_classes must be at least 2, got {num_classes}.")
  return jax.nn.one_hot(widened_integers(labels), num_classes, dtype=dtype) - jnp.asarray(1 / num_classes, dtype)


def kernel_classify(cross: ArrayLike, coefficients: ArrayLike) -> jax.Array:
  """Classes predicted by kernel regression on `class_targets`, or signs (+1 at zero) for targets of one output.

  >>> import jax.numpy as jnp
  >>> kernel_classify(jnp.array([[1.0, 0.2]]), jnp.array([[-0.5, 0.5], [0.5, -0.5]])).tolist()
  [1]

  Args:
    cross: floating `[inputs, training inputs]`, kernels; a positive factor per row changes nothing.
    coefficients: floating `[training inputs, classes]`, or `[training inputs]` for two classes -1 and 1.

  Returns:
    `[inputs]`, int32 class indices or signs; where a score is NaN, -1 for no class, and the sign 0.

  Raises:
    ValueError: when shapes do not fit.

  Reference: Radhakrishnan, Belkin, Uhler, PNAS 2023, the classifier of a trained network.
  """
  check_float("cross", cross)
  if jnp.ndim(cross) != 2:
    raise ValueError(f"cross must be [inputs, training inputs], got shape {jnp.shape(cross)}.")
  _check_rows("coefficients", coefficients, jnp.shape(cross)[1])
  scores = jnp.matmul(cross, coefficients, precision="highest")
  if scores.ndim == 2:
    return predicted_classes(scores).astype(jnp.int32)
  return jnp.where(jnp.isnan(scores), 0, jnp.where(scores >= 0, 1, -1)).astype(jnp.int32)
