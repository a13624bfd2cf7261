"""Predictions of networks of infinite width from their kernels: mean and covariance, Bayesian and trained.

Every function takes the states of one architecture between training inputs (`train`), between test and training inputs
(`cross`) and between test inputs (`test`), as `fully_connected` or any composition of layers gives them:

>>> import jax.numpy as jnp
>>> from jaxreg.kernels.dual_activations import relu_dual
>>> from jaxreg.kernels.infinite_width import fully_connected
>>> inputs, others = jnp.eye(3), jnp.array([[1.0, 0.1, 0.0]])
>>> network = lambda x, y=None: fully_connected(x, y, depth=1, dual=relu_dual(), weight_variance=2.0)
>>> states = network(inputs), network(others, inputs), network(others)
>>> prediction = ntk_ensemble(*states, jnp.array([1.0, 0.0, -1.0]), time=jnp.inf)
>>> prediction.mean.shape, prediction.covariance.shape
((1,), (1, 1))
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxreg.checks import check_float, check_hyperparameter
from jaxreg.kernels.gradient_flow import check_gram, gradient_flow_coefficients, kernel_eigensystem
from jaxreg.kernels.infinite_width import KernelState

__all__ = [
  "Prediction",
  "largest_learning_rate",
  "nngp_ensemble",
  "nngp_posterior",
  "ntk_ensemble",
]


class Prediction(NamedTuple):
  """The Gaussian distribution of a network's outputs on test inputs, independent and alike for all outputs.

  Attributes:
    mean: `[test inputs]` or `[test inputs, outputs]`, as the targets.
    covariance: `[test inputs, test inputs]`, the same for every output.
  """

  mean: jax.Array
  covariance: jax.Array


def nngp_posterior(
  train: KernelState, cross: KernelState, test: KernelState, targets: ArrayLike, *, noise: ArrayLike = 0.0
) -> Prediction:
  """The posterior of the Gaussian process that a Bayesian network of infinite width is.

  Mean `K_td (K + noise)^-1 y` and covariance `K_tt - K_td (K + noise)^-1 K_dt` with the NNGP kernel K.

  >>> import jax.numpy as jnp
  >>> from jaxreg.kernels.infinite_width import dense, input_state
  >>> x = jnp.array([[1.0]])
  >>> states = [dense(input_state(a, b)) for a, b in ((x, None), (2 * x, x), (2 * x, None))]
  >>> posterior = nngp_posterior(*states, jnp.array([3.0]), noise=1.0)
  >>> posterior.mean.tolist(), posterior.covariance.tolist()
  ([3.0], [[2.0]])

  Args:
    train: state of the training inputs, `[training inputs, training inputs]`.
    cross: state between test and training inputs, `[test inputs, training inputs]`.
    test: state of the test inputs, `[test inputs, test inputs]`.
    targets: floating `[training inputs]` or `[training inputs, outputs]`.
    noise: non-negative variance of the targets' noise; may be traced.

  Returns:
    The prediction, float32 at least. Without noise the posterior of the network itself; directions in which the kernel
    vanishes up to rounding are left out.

  Raises:
    ValueError: when shapes do not fit or `noise` is negative.

  Reference: Lee et al., "Deep Neural Networks as Gaussian Processes", ICLR 2018, equation 8.
  """
  check_hyperparameter("noise", noise, low=0)
  grams = train.covariance, cross.covariance, test.covariance
  targets, dtype = _checked(targets, grams)
  k_dd, k_td, k_tt = (gram.astype(dtype) for gram in grams)
  weights = gradient_flow_coefficients(kernel_eigensystem(k_dd), k_td.T, time=jnp.inf, ridge=noise)
  return Prediction(_product(weights.T, targets), _symmetric(k_tt - _product(k_td, weights)))


def ntk_ensemble(
  train: KernelState,
  cross: KernelState,
  test: KernelState,
  targets: ArrayLike,
  *,
  time: ArrayLike = jnp.inf,
  ridge: ArrayLike = 0.0,
) -> Prediction:
  """The distribution, over initial parameters, of networks all of whose layers were trained by gradient flow.

  The loss is that of `gradient_flow_coefficients`. With the tangent kernel T, the covariance K of the outputs at the
  start, and `F = (T + ridge)^-1 (1 - exp(-(T + ridge) time))`, the mean is `T_td F y` and the covariance
  `K_tt - T_td F K_dt - K_td F T_dt + T_td F K F T_dt`.

  >>> import jax.numpy as jnp
  >>> from jaxreg.kernels.infinite_width import dense, input_state
  >>> x = jnp.array([[1.0]])
  >>> states = [dense(input_state(a, b)) for a, b in ((x, None), (2 * x, x), (2 * x, None))]
  >>> early, late = (ntk_ensemble(*states, jnp.array([3.0]), time=time) for time in (0.0, jnp.inf))
  >>> [prediction.mean.tolist() + prediction.covariance[0].tolist() for prediction in (early, late)]
  [[0.0, 4.0], [6.0, 0.0]]

  Args:
    train, cross, test, targets: as in `nngp_posterior`.
    time: non-negative scalar, may be infinite; may be traced. For the mean loss divide it by the number of inputs.
    ridge: non-negative scalar, of the distance to each network's own initial parameters; may be traced.

  Returns:
    The prediction, float32 at least.

  Raises:
    ValueError: when shapes do not fit or a hyperparameter is negative.

  Reference: Lee et al., "Wide Neural Networks of Any Depth Evolve as Linear Models Under Gradient Descent", NeurIPS
    2019, equations 14 and 15 (with a ridge: derived anew).
  """
  return _ensemble((train.ntk, cross.ntk), train, cross, test, targets, time, ridge)


def nngp_ensemble(
  train: KernelState,
  cross: KernelState,
  test: KernelState,
  targets: ArrayLike,
  *,
  time: ArrayLike = jnp.inf,
  ridge: ArrayLike = 0.0,
) -> Prediction:
  """The distribution, over initial parameters, of networks whose last layer alone was trained by gradient flow.

  It is `ntk_ensemble` with the NNGP kernel in place of the tangent kernel; at infinite time without a ridge it is
  `nngp_posterior` without noise.

  >>> import jax.numpy as jnp
  >>> from jaxreg.kernels.infinite_width import dense, input_state
  >>> x = jnp.array([[1.0]])
  >>> states = [dense(input_state(a, b)) for a, b in ((x, None), (2 * x, x), (2 * x, None))]
  >>> nngp_ensemble(*states, jnp.array([3.0])).mean.tolist()
  [6.0]

  Args:
    train, cross, test, targets: as in `nngp_posterior`.
    time: as in `ntk_ensemble`.
    ridge: as in `ntk_ensemble`.

  Returns:
    The prediction, float32 at least.

  Raises:
    ValueError: when shapes do not fit or a hyperparameter is negative.

  Reference: Lee et al., "Wide Neural Networks of Any Depth Evolve as Linear Models Under Gradient Descent", NeurIPS
    2019, Section 2.3.1.
  """
  return _ensemble((train.covariance, cross.covariance), train, cross, test, targets, time, ridge)


def _ensemble(dynamics, train, cross, test, targets, time, ridge):
  grams = train.covariance, cross.covariance, test.covariance
  targets, dtype = _checked(targets, grams)
  (k_dd, k_td, k_tt), (t_dd, t_td) = ([gram.astype(dtype) for gram in kind] for kind in (grams, dynamics))
  weights = gradient_flow_coefficients(kernel_eigensystem(t_dd), t_td.T, time=time, ridge=ridge)
  drift = _product(k_td, weights)
  covariance = k_tt - drift - drift.T + _product(weights.T, _product(k_dd, weights))
  return Prediction(_product(weights.T, targets), _symmetric(covariance))


def _product(first, second):
  return jnp.matmul(first, second, precision="highest")


def _symmetric(matrix):
  """The symmetric part; variances that rounding made negative are zero."""
  matrix = (matrix + matrix.T) / 2
  index = jnp.arange(len(matrix))
  return jnp.where(index[:, None] == index, jnp.maximum(matrix, 0), matrix)


def _checked(targets, grams):
  check_float("targets", targets)
  shapes = [jnp.shape(gram) for gram in grams]
  if any(len(shape) != 2 for shape in shapes):
    raise ValueError(f"states must be of outputs, with covariances [inputs, inputs], got shapes {shapes}.")
  test, train = shapes[1]
  if shapes != [(train, train), (test, train), (test, test)]:
    raise ValueError(
      "train, cross and test must be states [train, train], [test, train] and [test, test], got covariances of shapes"
      f" {shapes}."
    )
  if jnp.ndim(targets) not in (1, 2) or jnp.shape(targets)[0] != train:
    raise ValueError(f"targets must be [{train}] or [{train}, outputs], got shape {jnp.shape(targets)}.")
  dtype = jnp.promote_types(jnp.result_type(targets, *grams), jnp.float32)
  return jnp.asarray(targets, dtype), dtype


def largest_learning_rate(gram: ArrayLike, *, ridge: ArrayLike = 0.0, momentum: ArrayLike = 0.0) -> jax.Array:
  """The learning rate up to which gradient descent on squared loss converges: `2 (1 + momentum) / (largest + ridge)`.

  The loss is `1/2 sum_i |f(x_i) - y_i|^2 + ridge / 2 |theta - theta_0|^2`, of the sum over training inputs: for their
  mean, multiply by their number.

  >>> import jax.numpy as jnp
  >>> float(largest_learning_rate(jnp.diag(jnp.array([1.0, 4.0]))))
  0.5

  Args:
    gram: floating `[training inputs, training inputs]`, the tangent kernel.
    ridge: non-negative scalar; may be traced.
    momentum: scalar in [0, 1), of the heavy-ball method; may be traced.

  Returns:
    Scalar, float32 at least.

  Raises:
    ValueError: when `gram` is not a square matrix of floats or a hyperparameter is out of range.

  Reference: Lee et al., "Wide Neural Networks of Any Depth Evolve as Linear Models Under Gradient Descent", NeurIPS
    2019, Theorem 2.1; Polyak, "Some Methods of Speeding up the Convergence of Iteration Methods", USSR Computational
    Mathematics and Mathematical Physics 1964 (momentum).
  """
  check_gram(gram)
  check_hyperparameter("ridge", ridge, low=0)
  check_hyperparameter("momentum", momentum, low=0, high=1, open_high=True)
  gram = jnp.asarray(gram, jnp.promote_types(jnp.result_type(gram), jnp.float32))
  return 2 * (1 + momentum) / (jnp.linalg.eigvalsh(gram)[-1] + ridge)
