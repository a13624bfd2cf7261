"""A two-layer network whose risk, kernel and training depend on two statistics of its weights: a model of grokking.

The committee machine `f(x) = (a / N) sum_i phi(w_i . x)` with `phi(h) = h + (c / 2) h^2`, output scale `a` and
curvature `c`, learns the teacher `y(x) = (beta . x)^2 / 2` from inputs `x ~ N(0, I / D)`. The mean and the second
moment of its neurons say all about it. In the lazy limit of large `a` it is regression with its initial kernel, which
needs of the order of `D^2 / (2 c^2)` examples; learning features needs of the order of `D`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxreg.checks import check_float, check_hyperparameter

__all__ = [
  "CommitteeRisk",
  "CommitteeSpectrum",
  "CommitteeStatistics",
  "committee",
  "committee_alignment",
  "committee_initial_ntk",
  "committee_ntk",
  "committee_risk",
  "committee_spectrum",
  "committee_statistics",
]


class CommitteeStatistics(NamedTuple):
  """Sufficient statistics of the neurons, or the change of both since initialisation.

  Attributes:
    mean: `[features]`, the mean of the weight vectors.
    second_moment: `[features, features]`, the mean of their outer products.
  """

  mean: jax.Array
  second_moment: jax.Array


class CommitteeRisk(NamedTuple):
  """Three terms that sum to the population risk `E (y - f)^2`; each a scalar.

  Attributes:
    variance: what the trace of the second moment gets wrong, `(|beta|^2 - a c tr M)^2 / (4 D^2)`.
    misalignment: what all its entries get wrong, `||a c M - beta beta^T||^2 / (2 D^2)`.
    linear: power in linear functions, `a^2 |mean|^2 / D`.
  """

  variance: jax.Array
  misalignment: jax.Array
  linear: jax.Array


class CommitteeSpectrum(NamedTuple):
  """Eigenvalues of the wide network's initial kernel under `N(0, I / D)`; each a scalar.

  Attributes:
    linear: of the D linear functions.
    quadratic: of the `D (D + 1) / 2 - 1` quadratic functions without trace.
    norm: of `|x|^2`, up to the constant that the kernel does not contain.
  """

  linear: jax.Array
  quadratic: jax.Array
  norm: jax.Array


def committee(
  weights: ArrayLike,
  inputs: ArrayLike,
  *,
  output_scale: ArrayLike = 1.0,
  curvature: ArrayLike = 1.0,
  initial_weights: ArrayLike | None = None,
) -> jax.Array:
  """The committee machine `f(x) = (a / N) sum_i phi(w_i . x)` with `phi(h) = h + (c / 2) h^2`.

  With `initial_weights` it is centred, `f(x; W) - f(x; W_0)`, and exactly zero at the start.

  >>> import jax.numpy as jnp
  >>> weights = jnp.array([[1.0, 0.0], [0.0, 1.0]])
  >>> committee(weights, jnp.array([[2.0, 0.0]]), output_scale=3.0, curvature=0.5).tolist()
  [4.5]

  Args:
    weights: floating `[neurons, features]`.
    inputs: floating `[..., features]`.
    output_scale: positive `a`, the laziness; may be traced.
    curvature: `c = phi''`, the weight of the quadratic part; may be traced.
    initial_weights: `[neurons, features]`, or None for the network itself.

  Returns:
    `[...]`, the outputs, in the dtype of `inputs`.

  Raises:
    ValueError: when shapes do not fit or a hyperparameter lies outside its domain.

  Reference: Kumar, Bordelon, Gershman, Pehlevan, "Grokking as the Transition from Lazy to Rich Training Dynamics",
    ICLR 2024, the polynomial regression problem.
  """
  _check_weights(weights, initial_weights)
  _check_features("inputs", inputs, weights.shape[1])
  _check_scale(output_scale)
  check_hyperparameter("curvature", curvature)
  dtype = jnp.promote_types(jnp.result_type(weights, inputs), jnp.float32)

  def mean_output(w):
    fields = jnp.matmul(inputs.astype(dtype), w.astype(dtype).T, precision="highest")
    return jnp.mean(fields + curvature / 2 * jnp.square(fields), axis=-1)

  outputs = mean_output(weights)
  if initial_weights is not None:
    outputs = outputs - mean_output(initial_weights)
  return (output_scale * outputs).astype(jnp.result_type(inputs))


def committee_statistics(weights: ArrayLike, *, initial_weights: ArrayLike | None = None) -> CommitteeStatistics:
  """Mean and second moment of the neurons, by which `f(x) = a mean . x + (a c / 2) x^T M x`.

  >>> import jax.numpy as jnp
  >>> statistics = committee_statistics(jnp.array([[1.0, 0.0], [0.0, 1.0]]))
  >>> statistics.mean.tolist(), statistics.second_moment.tolist()
  ([0.5, 0.5], [[0.5, 0.0], [0.0, 0.5]])

  Args:
    weights: floating `[neurons, features]`.
    initial_weights: `[neurons, features]`, whose statistics are subtracted, for the centred network; or None.

  Returns:
    Statistics in float32 at least.

  Raises:
    ValueError: when shapes do not fit.

  Reference: Kumar, Bordelon, Gershman, Pehlevan, "Grokking as the Transition from Lazy to Rich Training Dynamics",
    ICLR 2024, the sufficient statistics of the polynomial regression problem.
  """
  _check_weights(weights, initial_weights)

  def statistics(w):
    w = w.astype(jnp.promote_types(w.dtype, jnp.float32))
    return CommitteeStatistics(jnp.mean(w, 0), jnp.matmul(w.T, w, precision="highest") / w.shape[0])

  result = statistics(weights)
  return result if initial_weights is None else jax.tree.map(jnp.subtract, result, statistics(initial_weights))


def committee_risk(
  statistics: CommitteeStatistics,
  teacher: ArrayLike,
  *,
  output_scale: ArrayLike = 1.0,
  curvature: ArrayLike = 1.0,
) -> CommitteeRisk:
  """The population risk `E (y - f)^2` for the teacher `y = (beta . x)^2 / 2`, in closed form and in three terms.

  It vanishes only where the mean is 0 and the second moment `beta beta^T / (a c)`: where features have been learned.
  Empirical test errors fluctuate much more, because the squared error is of fourth degree in Gaussians, squared.

  >>> import jax.numpy as jnp
  >>> statistics = CommitteeStatistics(jnp.zeros(2), 2.0 * jnp.array([[1.0, 0.0], [0.0, 0.0]]))
  >>> [round(float(term), 4) for term in committee_risk(statistics, jnp.array([2.0**0.5, 0.0]))]
  [0.0, 0.0, 0.0]

  Args:
    statistics: of the network, or their change since initialisation for the centred network.
    teacher: floating `[features]`, `beta`.
    output_scale: positive `a`; may be traced.
    curvature: `c`; may be traced.

  Returns:
    The terms, scalars in float32 at least; they sum to the risk.

  Raises:
    ValueError: when shapes do not fit or a hyperparameter lies outside its domain.

  Reference: Kumar, Bordelon, Gershman, Pehlevan, "Grokking as the Transition from Lazy to Rich Training Dynamics",
    ICLR 2024, the decomposition of the test loss of the polynomial regression problem.
  """
  mean, moment, teacher = _check_statistics(statistics, teacher)
  _check_scale(output_scale)
  check_hyperparameter("curvature", curvature)
  features = teacher.shape[0]
  error = output_scale * curvature * moment - jnp.outer(teacher, teacher)
  return CommitteeRisk(
    variance=jnp.square(jnp.trace(error) / features) / 4,
    misalignment=jnp.sum(jnp.square(error / features)) / 2,
    linear=jnp.square(output_scale) * jnp.sum(jnp.square(mean)) / features,
  )


def committee_ntk(
  inputs1: ArrayLike, inputs2: ArrayLike, statistics: CommitteeStatistics, *, curvature: ArrayLike = 1.0
) -> jax.Array:
  """The neural tangent kernel `(N / a^2) sum_i grad_i f(x) . grad_i f(x')` of the network as it stands.

  It is `x . x' (1 + c mean . (x + x') + c^2 x^T M x')`, of the uncentred statistics also for the centred network. The
  factor `N / a^2` makes it independent of the output scale: gradient descent with step `eta N / a^2` follows
  `df/dt = -eta K (f - y)`.

  >>> import jax.numpy as jnp
  >>> statistics = CommitteeStatistics(jnp.zeros(2), jnp.eye(2))
  >>> committee_ntk(jnp.array([[1.0, 1.0]]), jnp.array([[1.0, 0.0]]), statistics, curvature=2.0).tolist()
  [[5.0]]

  Args:
    inputs1: floating `[n, features]`.
    inputs2: floating `[m, features]`.
    statistics: of the network, not centred.
    curvature: `c`; may be traced.

  Returns:
    `[n, m]`, in the dtype of the inputs.

  Raises:
    ValueError: when shapes do not fit.

  Reference: Kumar, Bordelon, Gershman, Pehlevan, "Grokking as the Transition from Lazy to Rich Training Dynamics",
    ICLR 2024, the kernel of the polynomial regression problem (printed there without the factor `a^2 / N`).
  """
  first, second, dtype = _check_inputs(inputs1, inputs2)
  mean, moment, _ = _check_statistics(statistics, jnp.zeros(first.shape[1], first.dtype))
  check_hyperparameter("curvature", curvature)
  product = lambda a, b: jnp.matmul(a, b, precision="highest")
  means = product(first, mean)[:, None] + product(second, mean)
  moments = product(product(first, moment), second.T)
  return (product(first, second.T) * (1 + curvature * means + curvature**2 * moments)).astype(dtype)


def committee_initial_ntk(
  inputs1: ArrayLike, inputs2: ArrayLike, *, curvature: ArrayLike = 1.0
) -> jax.Array:  # fmt: skip
  """The neural tangent kernel of the infinitely wide network with standard normal weights, `x.x' + c^2 (x.x')^2`.

  >>> import jax.numpy as jnp
  >>> committee_initial_ntk(jnp.array([[1.0, 1.0]]), jnp.array([[1.0, 2.0]]), curvature=0.5).tolist()
  [[5.25]]

  Args:
    inputs1: floating `[n, features]`.
    inputs2: floating `[m, features]`.
    curvature: `c`; may be traced.

  Returns:
    `[n, m]`, in the dtype of the inputs.

  Raises:
    ValueError: when shapes do not fit.

  Reference: Kumar, Bordelon, Gershman, Pehlevan, "Grokking as the Transition from Lazy to Rich Training Dynamics",
    ICLR 2024, the initial kernel of the polynomial regression problem.
  """
  first, second, dtype = _check_inputs(inputs1, inputs2)
  check_hyperparameter("curvature", curvature)
  inner = jnp.matmul(first, second.T, precision="highest")
  return (inner + jnp.square(curvature * inner)).astype(dtype)


def committee_spectrum(features: int, *, curvature: ArrayLike = 1.0) -> CommitteeSpectrum:
  """Eigenvalues of `committee_initial_ntk` for inputs from `N(0, I / D)`: `1/D`, `2 c^2/D^2`, `(c^2/D) (1 + 2/D)`.

  Kernel regression learns the quadratic teacher when the number of examples reaches the inverse of the second.

  >>> [round(float(value), 4) for value in committee_spectrum(4, curvature=0.5)]
  [0.25, 0.0312, 0.0938]

  Args:
    features: static, D.
    curvature: `c`; may be traced.

  Returns:
    The three eigenvalues, scalars.

  Raises:
    ValueError: when an argument lies outside its domain.

  Reference: Kumar, Bordelon, Gershman, Pehlevan, "Grokking as the Transition from Lazy to Rich Training Dynamics",
    ICLR 2024, appendix on the Mercer decomposition (the main text prints `c` for `c^2` in one place).
  """
  check_hyperparameter("features", features, low=1)
  check_hyperparameter("curvature", curvature)
  square = jnp.square(jnp.asarray(curvature, jnp.promote_types(jnp.result_type(curvature, 1.0), jnp.float32)))
  return CommitteeSpectrum(
    jnp.full_like(square, 1 / features), 2 * square / features**2, square / features * (1 + 2 / features)
  )


def committee_alignment(
  statistics: CommitteeStatistics, teacher: ArrayLike, *, curvature: ArrayLike = 1.0
) -> jax.Array:
  """The population alignment of kernel and teacher, `E y K y' = (c^2 / 4 D^4) (|b|^4 tr M + 8 |b|^2 b^T M b)`.

  The numerator of the population's centred-kernel alignment; it grows while the second moment turns to the teacher `b`.

  >>> import jax.numpy as jnp
  >>> statistics = CommitteeStatistics(jnp.zeros(2), jnp.eye(2))
  >>> float(committee_alignment(statistics, jnp.array([1.0, 1.0])))
  0.625

  Args:
    statistics: of the network, not centred.
    teacher: floating `[features]`, `b`.
    curvature: `c`; may be traced.

  Returns:
    Scalar, in float32 at least.

  Raises:
    ValueError: when shapes do not fit.

  Reference: Kumar, Bordelon, Gershman, Pehlevan, "Grokking as the Transition from Lazy to Rich Training Dynamics",
    ICLR 2024, the alignment of the polynomial regression problem (printed there without the factor 1/4).
  """
  _, moment, teacher = _check_statistics(statistics, teacher)
  check_hyperparameter("curvature", curvature)
  features = teacher.shape[0]
  power = jnp.sum(jnp.square(teacher)) / features
  along = jnp.vdot(teacher, jnp.matmul(moment, teacher, precision="highest")) / features
  return (curvature / features) ** 2 / 4 * power * (power * jnp.trace(moment) + 8 * along)


def _check_weights(weights, initial_weights) -> None:
  check_float("weights", weights)
  if jnp.ndim(weights) != 2:
    raise ValueError(f"weights must be [neurons, features], got shape {jnp.shape(weights)}.")
  if initial_weights is not None and jnp.shape(initial_weights) != jnp.shape(weights):
    raise ValueError(
      f"initial_weights must have the shape of weights {jnp.shape(weights)}, got {jnp.shape(initial_weights)}."
    )


def _check_features(name: str, array, features: int) -> None:
  check_float(name, array)
  if jnp.ndim(array) < 1 or jnp.shape(array)[-1] != features:
    raise ValueError(f"{name} must have {features} features on its last axis, got shape {jnp.shape(array)}.")


def _check_inputs(inputs1, inputs2):
  check_float("inputs1", inputs1)
  if jnp.ndim(inputs1) != 2:
    raise ValueError(f"inputs1 must be [inputs, features], got shape {jnp.shape(inputs1)}.")
  _check_features("inputs2", inputs2, jnp.shape(inputs1)[1])
  if jnp.ndim(inputs2) != 2:
    raise ValueError(f"inputs2 must be [inputs, features], got shape {jnp.shape(inputs2)}.")
  dtype = jnp.result_type(inputs1, inputs2)
  wide = jnp.promote_types(dtype, jnp.float32)
  return inputs1.astype(wide), inputs2.astype(wide), dtype


def _check_statistics(statistics: CommitteeStatistics, teacher):
  check_float("teacher", teacher)
  if jnp.ndim(teacher) != 1:
    raise ValueError(f"teacher must be [features], got shape {jnp.shape(teacher)}.")
  features = jnp.shape(teacher)[0]
  shapes = jnp.shape(statistics.mean), jnp.shape(statistics.second_moment)
  if shapes != ((features,), (features, features)):
    raise ValueError(
      f"statistics must have a mean of shape {(features,)} and a second moment of shape {(features, features)},"
      f" got {shapes[0]} and {shapes[1]}."
    )
  dtype = jnp.promote_types(jnp.result_type(*statistics, teacher), jnp.float32)
  return statistics.mean.astype(dtype), statistics.second_moment.astype(dtype), teacher.astype(dtype)


def _check_scale(output_scale) -> None:
  check_hyperparameter("output_scale", output_scale, low=0, open_low=True)
