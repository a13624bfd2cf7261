"""Networks of infinite width as maps between kernels: layers are functions from a `KernelState` to the next.

A state describes the outputs of a layer whose units are independent Gaussian processes: their covariance between two
sets of inputs (the NNGP kernel), the variances on either set, and the neural tangent kernel so far. Functions compose
in the order of the layers:

>>> import jax.numpy as jnp
>>> from jaxreg.kernels.dual_activations import relu_dual
>>> state = dense(input_state(jnp.eye(3)), weight_variance=2.0)
>>> state = dense(activate(state, relu_dual()), weight_variance=2.0)
>>> state.ntk.shape
(3, 3)
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxreg.checks import check_float, check_hyperparameter
from jaxreg.kernels.dual_activations import DualActivation, check_dual, correlation_complement
from jaxreg.metrics.norms import normalized_rows, safe_sqrt
from jaxreg.metrics.sizes import static_integer

__all__ = [
  "KernelState",
  "activate",
  "add_states",
  "dense",
  "dense_standard",
  "fully_connected",
  "fully_connected_standard",
  "input_state",
  "layer_norm",
  "residual",
]


class KernelState(NamedTuple):
  """Kernels of one layer's outputs between two sets of inputs; float32 at least.

  Attributes:
    covariance: `[inputs1, inputs2]`, the NNGP kernel. Images have two more axes, `[…, height, width]` for covariances
      of equal positions, or four, `[…, height, height', width, width']`, for those of all pairs of positions.
    variance1: `[inputs1]`, variances on the first set; with images `[inputs1, height, width]` or
      `[inputs1, height, height', width, width']`.
    variance2: the same for the second set.
    ntk: like `covariance`, the neural tangent kernel of all parameters up to here.
    complement: like `covariance`, `1 - |correlation|`. For close inputs it is so small that the covariances in float32
      do not have it, and the tangent kernel depends on its root. None to have it computed from them all the same.
  """

  covariance: jax.Array
  variance1: jax.Array
  variance2: jax.Array
  ntk: jax.Array
  complement: jax.Array | None = None


def input_state(inputs1: ArrayLike, inputs2: ArrayLike | None = None) -> KernelState:
  """The state of the inputs themselves: covariances `x . x' / features`, no parameters yet.

  Without `inputs2` the covariances are those of `inputs1` with itself, their diagonal being exactly the variances.

  >>> import jax.numpy as jnp
  >>> input_state(jnp.array([[1.0, 1.0], [2.0, 0.0]])).covariance.tolist()
  [[1.0, 1.0], [1.0, 2.0]]

  Args:
    inputs1: floating `[inputs1, features]`.
    inputs2: floating `[inputs2, features]`, or None.

  Returns:
    State of shape `[inputs1, inputs2]`.

  Raises:
    ValueError: when the inputs are not matrices of the same number of features.

  Reference: Lee, Bahri, Novak, Schoenholz, Pennington, Sohl-Dickstein, "Deep Neural Networks as Gaussian Processes",
    ICLR 2018, equation 2.
  """
  check_matrices(inputs1, inputs2)
  same = inputs2 is None
  inputs2 = inputs1 if same else inputs2
  dtype = jnp.promote_types(jnp.result_type(inputs1, inputs2), jnp.float32)
  first, second = inputs1.astype(dtype), inputs2.astype(dtype)
  features = first.shape[-1]
  variance1, variance2 = (jnp.sum(jnp.square(x), -1) / features for x in (first, second))
  covariance = jnp.matmul(first, second.T, precision="highest") / features
  first = normalized_rows(first)
  complement = angle_complement(first, first if same else normalized_rows(second))
  if same:
    covariance, complement = with_diagonal(covariance, variance1), with_diagonal(complement, jnp.zeros_like(variance1))
  return KernelState(covariance, variance1, variance2, jnp.zeros_like(covariance), complement)


# Up to so many features distances are always sums of squared differences; with more of them only for rows with a pair
# closer than this `1 - |cosine|`: else rounding of the product changes the angle by less than 2e-6.
_FEW, _CLOSE = 32, 2.0**-8


@jax.custom_jvp
def angle_complement(first, second):
  """`1 - |x . y|` of unit vectors `[n, features]`, `[m, features]`, with all its digits, as half a squared distance."""
  product = jnp.matmul(first, second.T, precision="highest")
  near = lambda x, inner: _half_squared_distance(x, jnp.where(inner < 0, -1, 1)[:, None] * second)
  if first.shape[-1] <= _FEW:
    return jax.vmap(near)(first, product)
  square1, square2 = (jnp.sum(jnp.square(x), -1) for x in (first, second))
  rough = jnp.maximum((square1[:, None] + square2) / 2 - jnp.abs(product), 0)
  rough = jnp.where(jnp.minimum(square1[:, None], square2) > 0, rough, 1)

  def row(carry):
    x, inner, rough = carry
    return jax.lax.cond(jnp.any(rough < _CLOSE), lambda: near(x, inner), lambda: rough)

  every = lambda: jax.lax.map(row, (first, product, rough))
  return jax.lax.cond(jnp.any(rough < _CLOSE), every, lambda: rough)


def _half_squared_distance(x, others):
  """Of unit vectors, `[features]` and `[m, features]`; 1 beside a vector of zeros."""
  some = jnp.any(x != 0) & jnp.any(others != 0, -1)
  return jnp.where(some, jnp.sum(jnp.square(x - others), -1) / 2, 1)


@angle_complement.defjvp
def _angle_complement_jvp(primals, tangents):
  first, second = primals
  sign = jnp.where(jnp.matmul(first, second.T, precision="highest") < 0, -1, 1)
  change = jnp.matmul(tangents[0], second.T, precision="highest")
  change += jnp.matmul(first, tangents[1].T, precision="highest")
  return angle_complement(first, second), -sign * change


def check_matrices(inputs1, inputs2) -> None:
  """Raises ValueError unless the inputs are `[inputs, features]` with equal features."""
  check_float("inputs1", inputs1)
  if jnp.ndim(inputs1) != 2:
    raise ValueError(f"inputs1 must be [inputs, features], got shape {jnp.shape(inputs1)}.")
  if inputs2 is None:
    return
  check_float("inputs2", inputs2)
  if jnp.ndim(inputs2) != 2 or jnp.shape(inputs2)[1] != jnp.shape(inputs1)[1]:
    raise ValueError(
      f"inputs2 must be [inputs, features] with the {jnp.shape(inputs1)[1]} features of inputs1,"
      f" got shape {jnp.shape(inputs2)}."
    )


def with_diagonal(matrix: ArrayLike, diagonal: ArrayLike) -> jax.Array:
  """The square `matrix` with another diagonal; by selection, which fuses and has no scatter in its gradient."""
  index = jnp.arange(matrix.shape[0])
  shape = (-1,) + (1,) * (matrix.ndim - 2)
  on = (index[:, None] == index).reshape(matrix.shape[:2] + shape[1:])
  return jnp.where(on, jnp.expand_dims(diagonal, 1), matrix)


def dense(state: KernelState, *, weight_variance: ArrayLike = 1.0, bias_variance: ArrayLike = 0.0) -> KernelState:
  """A dense layer in NTK parameterization, `y = sqrt(weight_variance / n) W x + sqrt(bias_variance) b`.

  All parameters are standard normal and trained: `K' = weight_variance K + bias_variance` and
  `T' = K' + weight_variance T` for covariance K and tangent kernel T.

  >>> import jax.numpy as jnp
  >>> state = dense(input_state(jnp.array([[1.0, 1.0]])), weight_variance=2.0, bias_variance=0.5)
  >>> float(state.covariance[0, 0]), float(state.ntk[0, 0])
  (2.5, 2.5)

  Args:
    state: of the layer's inputs.
    weight_variance: non-negative scalar; may be traced.
    bias_variance: non-negative scalar, 0 for no bias; may be traced.

  Returns:
    The state of its outputs.

  Raises:
    ValueError: when a variance is negative.

  Reference: Jacot, Gabriel, Hongler, "Neural Tangent Kernel: Convergence and Generalization in Neural Networks",
    NeurIPS 2018, Proposition 1 and Theorem 1.
  """
  check_hyperparameter("weight_variance", weight_variance, low=0)
  check_hyperparameter("bias_variance", bias_variance, low=0)
  covariance, variance1, variance2, complement = _affine(state, weight_variance, bias_variance)
  return KernelState(covariance, variance1, variance2, covariance + weight_variance * state.ntk, complement)


def _affine(state, weight_variance, bias_variance):
  """Covariances `weight_variance K + bias_variance` with the variances and the complement that belong to them."""
  covariance, variance1, variance2 = (weight_variance * x + bias_variance for x in state[:3])
  complement = complement_of(state)
  if isinstance(bias_variance, int | float) and bias_variance == 0:
    return covariance, variance1, variance2, complement
  first, second = (safe_sqrt(weight_variance * variance) for variance in position_variances(state))
  after1, after2 = (safe_sqrt(weight_variance * variance + bias_variance) for variance in position_variances(state))
  negative = covariance < 0
  apart = first * second * gap(complement, state.covariance, negative) + jnp.where(negative, 2 * bias_variance, 0)
  defect = bias_variance * jnp.square(first - second)
  return (
    covariance,
    variance1,
    variance2,
    summed_complement(defect, apart, first * second + bias_variance, after1 * after2),
  )


def summed_complement(defect, apart, parallel, scale):
  """`1 - |correlation|` of sums of independent variables, from differences that do not cancel.

  Args:
    defect: `scale^2 - parallel^2`, from Lagrange's identity.
    apart: what is missing to `parallel` in the sum's absolute covariance.
    parallel: the covariance if each pair of summands were parallel.
    scale: the product of the sums' standard deviations.
  """
  zero = scale == 0
  safe = jnp.where(zero, 1, scale)
  return jnp.where(zero, 1, (defect / (safe + parallel) + apart) / safe)


def gap(complement, covariance, negative):
  """1 less a summand's correlation, in the direction of the sum."""
  return jnp.where((covariance < 0) == negative, complement, 2 - complement)


def complement_of(state: KernelState):
  """`1 - |correlation|` of a state, also of one that was made without."""
  if state.complement is not None:
    return state.complement
  return correlation_complement(state.covariance, *position_variances(state))


def dense_standard(
  state: KernelState,
  *,
  width: ArrayLike,
  weight_variance: ArrayLike = 1.0,
  bias_variance: ArrayLike | None = None,
) -> KernelState:
  """A dense layer in standard parameterization, `y = W x + b` with `W ~ N(0, weight_variance / width)`.

  The covariances are those of `dense`, but the weights' own part of the tangent kernel is `width K`, that of the biases
  is 1: `T' = width K + 1 + weight_variance T`.

  >>> import jax.numpy as jnp
  >>> state = dense_standard(input_state(jnp.array([[1.0, 1.0]])), width=2)
  >>> float(state.covariance[0, 0]), float(state.ntk[0, 0])
  (1.0, 2.0)

  Args:
    state: of the layer's inputs.
    width: positive; the number of the layer's inputs.
    weight_variance: non-negative scalar, `width` times a weight's variance; may be traced.
    bias_variance: non-negative scalar, the variance of a bias (0 for biases that start at zero and are trained), or
      None for no bias; may be traced.

  Returns:
    The state of its outputs.

  Raises:
    ValueError: when a variance is negative or `width` not positive.

  Reference: Sohl-Dickstein, Novak, Schoenholz, Lee, "On the Infinite Width Limit of Neural Networks with a Standard
    Parameterization", arXiv 2001.07301, Section 3.
  """
  check_hyperparameter("width", width, low=0, open_low=True)
  check_hyperparameter("weight_variance", weight_variance, low=0)
  shift = 0.0 if bias_variance is None else bias_variance
  check_hyperparameter("bias_variance", shift, low=0)
  own = width * state.covariance + (0.0 if bias_variance is None else 1.0)
  covariance, variance1, variance2, complement = _affine(state, weight_variance, shift)
  return KernelState(covariance, variance1, variance2, own + weight_variance * state.ntk, complement)


def activate(state: KernelState, dual: DualActivation) -> KernelState:
  """An elementwise activation: `K' = E[phi(U) phi(V)]`, `T' = T E[phi'(U) phi'(V)]`.

  >>> import jax.numpy as jnp
  >>> from jaxreg.kernels.dual_activations import relu_dual
  >>> activate(input_state(jnp.array([[1.0, 1.0]])), relu_dual()).covariance.tolist()
  [[0.5]]

  Args:
    state: of Gaussian inputs, as `dense` and convolutions give.
    dual: static; the activation's dual.

  Returns:
    The state of its outputs.

  Raises:
    ValueError: when `dual` is not a dual activation.

  Reference: Lee et al., "Wide Neural Networks of Any Depth Evolve as Linear Models Under Gradient Descent", NeurIPS
    2019, Appendix E.
  """
  check_dual(dual)
  first, second = position_variances(state)
  # Each variance against itself; of images the variances hold covariances between positions.
  own1, own2 = (_own_covariance(variance, dual) for variance in (state.variance1, state.variance2))
  if dual.moments is None:
    covariance, derivative = (f(state.covariance, first, second) for f in (dual.covariance, dual.derivative))
    complement = None
  else:
    covariance, derivative, complement = dual.moments(state.covariance, first, second, complement_of(state))
  after = KernelState(covariance, own1, own2, state.ntk * derivative, complement)
  return after._replace(complement=complement_of(after))


def _own_covariance(variance, dual):
  at = _at_positions(variance)
  if variance.ndim < 5:
    return dual.covariance(at, at, at)
  return dual.covariance(variance, at[:, :, None, :, None], at[:, None, :, None, :])


def _at_positions(variance):
  """`[inputs, …]` variances of single positions."""
  if variance.ndim < 5:
    return variance
  return jnp.einsum("nhhww->nhw", variance)


def position_variances(state: KernelState) -> tuple[jax.Array, jax.Array]:
  """The variances of both sets, shaped so that they broadcast against `state.covariance`."""
  first, second = _at_positions(state.variance1), _at_positions(state.variance2)
  if state.covariance.ndim < 6:
    return first[:, None], second[None]
  return first[:, None, :, None, :, None], second[None, :, None, :, None, :]


def add_states(first: KernelState, second: KernelState) -> KernelState:
  """The sum of two networks' outputs, with independent parameters in at least one last layer.

  >>> import jax.numpy as jnp
  >>> state = dense(input_state(jnp.ones((1, 2))))
  >>> add_states(state, state).covariance.tolist()
  [[2.0]]

  Args:
    first: state.
    second: state of the same shapes.

  Returns:
    The state of the sum.

  Raises:
    ValueError: when the shapes differ.

  Reference: none (independent Gaussian processes add their covariances).
  """
  shapes = tuple(tuple(map(jnp.shape, state[:4])) for state in (first, second))
  if shapes[0] != shapes[1]:
    raise ValueError(f"second must have the shapes of first, expected {shapes[0]}, got {shapes[1]}.")
  total = KernelState(*(a + b for a, b in zip(first[:4], second[:4], strict=True)))
  (a1, b1), (a2, b2), (a, b) = (map(safe_sqrt, position_variances(state)) for state in (first, second, total))
  negative = total.covariance < 0
  apart = sum(
    scale * gap(complement_of(state), state.covariance, negative)
    for scale, state in ((a1 * b1, first), (a2 * b2, second))
  )
  defect = jnp.square(a1 * b2 - a2 * b1)
  return total._replace(complement=summed_complement(defect, apart, a1 * b1 + a2 * b2, a * b))


def residual(state: KernelState, branch) -> KernelState:
  """A residual block `x + f(x)`, for a branch `f` that ends in a dense layer or a convolution.

  >>> import jax.numpy as jnp
  >>> from jaxreg.kernels.dual_activations import relu_dual
  >>> state = dense(input_state(jnp.ones((1, 2))))
  >>> residual(state, lambda s: dense(activate(s, relu_dual()), weight_variance=2.0)).covariance.tolist()
  [[2.0]]

  Args:
    state: of the block's inputs.
    branch: static; `state -> state`.

  Returns:
    The state of the block's outputs.

  Raises:
    ValueError: when the branch changes the shapes.

  Reference: Yang, Schoenholz, "Mean Field Residual Networks: On the Edge of Chaos", NeurIPS 2017, Section 3.
  """
  return add_states(state, branch(state))


def layer_norm(state: KernelState, *, epsilon: ArrayLike = 1e-6) -> KernelState:
  """Layer normalization over units of zero mean: covariances and tangent kernel divided by the standard deviations.

  It belongs behind a dense layer or a convolution, whose outputs have zero mean over units; every position of an image
  is normalized by itself. Scale and shift are not trained.

  >>> import jax.numpy as jnp
  >>> layer_norm(dense(input_state(jnp.array([[3.0, 4.0]]))), epsilon=0.0).variance1.round(4).tolist()
  [1.0]

  Args:
    state: of Gaussian inputs.
    epsilon: non-negative scalar added to the variances; may be traced.

  Returns:
    The state of its outputs.

  Raises:
    ValueError: when `epsilon` is negative.

  Reference: Novak et al., "Neural Tangents: Fast and Easy Infinite Neural Networks in Python", ICLR 2020 (layer
    normalization); derived anew.
  """
  check_hyperparameter("epsilon", epsilon, low=0)
  first, second = (jax.lax.rsqrt(variance + epsilon) for variance in position_variances(state))
  own1, own2 = (_own_normalized(variance, epsilon) for variance in (state.variance1, state.variance2))
  scale = first * second
  return KernelState(state.covariance * scale, own1, own2, state.ntk * scale, complement_of(state))


def _own_normalized(variance, epsilon):
  scale = jax.lax.rsqrt(_at_positions(variance) + epsilon)
  if variance.ndim < 5:
    return variance * scale * scale
  return variance * scale[:, :, None, :, None] * scale[:, None, :, None, :]


def fully_connected(
  inputs1: ArrayLike,
  inputs2: ArrayLike | None = None,
  *,
  depth: int,
  dual: DualActivation,
  weight_variance: ArrayLike = 1.0,
  bias_variance: ArrayLike = 0.0,
) -> KernelState:
  """NNGP and NTK of a fully connected network in NTK parameterization: `depth` hidden layers and a linear output.

  >>> import jax.numpy as jnp
  >>> from jaxreg.kernels.dual_activations import relu_dual
  >>> state = fully_connected(jnp.array([[1.0, 1.0]]), depth=3, dual=relu_dual(), weight_variance=2.0)
  >>> state.covariance.tolist(), state.ntk.tolist()
  ([[2.0]], [[8.0]])

  Args:
    inputs1: floating `[inputs1, features]`.
    inputs2: floating `[inputs2, features]`, or None for `inputs1` with itself.
    depth: static; number of activations, non-negative.
    dual: static; the activation's dual.
    weight_variance: non-negative scalar; may be traced.
    bias_variance: non-negative scalar; may be traced.

  Returns:
    State of shape `[inputs1, inputs2]`.

  Raises:
    ValueError: when shapes do not fit or a hyperparameter is out of range.

  Reference: Jacot, Gabriel, Hongler, "Neural Tangent Kernel: Convergence and Generalization in Neural Networks",
    NeurIPS 2018, Theorem 1.
  """
  depth = static_integer("depth", depth, low=0)
  check_dual(dual)
  options = {"weight_variance": weight_variance, "bias_variance": bias_variance}
  state = dense(input_state(inputs1, inputs2), **options)
  layer = lambda _, state: dense(activate(state, dual), **options)
  # Without a loop all layers are one pass over the matrices.
  return jax.lax.fori_loop(0, depth, layer, state, unroll=depth if 0 < depth <= 16 else 1)


def fully_connected_standard(
  inputs1: ArrayLike,
  inputs2: ArrayLike | None = None,
  *,
  widths: Sequence[int],
  dual: DualActivation,
  weight_variance: ArrayLike = 1.0,
  bias_variance: ArrayLike | None = None,
) -> KernelState:
  """NNGP and NTK of a fully connected network in standard parameterization.

  The covariances are those of infinite width; in the tangent kernel every layer counts with its number of inputs.

  >>> import jax.numpy as jnp
  >>> from jaxreg.kernels.dual_activations import relu_dual
  >>> options = {"dual": relu_dual(), "weight_variance": 2.0}
  >>> fully_connected_standard(jnp.array([[1.0, 1.0]]), widths=(10,), **options).ntk.tolist()
  [[12.0]]

  Args:
    inputs1: floating `[inputs1, features]`.
    inputs2: floating `[inputs2, features]`, or None for `inputs1` with itself.
    widths: static; numbers of units of the hidden layers.
    dual: static; the activation's dual.
    weight_variance: non-negative scalar, fan-in times a weight's variance; may be traced.
    bias_variance: non-negative scalar or None for no biases; may be traced.

  Returns:
    State of shape `[inputs1, inputs2]`.

  Raises:
    ValueError: when shapes do not fit or a hyperparameter is out of range.

  Reference: Sohl-Dickstein, Novak, Schoenholz, Lee, "On the Infinite Width Limit of Neural Networks with a Standard
    Parameterization", arXiv 2001.07301, Section 3.
  """
  check_dual(dual)
  options = {"weight_variance": weight_variance, "bias_variance": bias_variance}
  state = dense_standard(input_state(inputs1, inputs2), width=inputs1.shape[-1], **options)
  for width in widths:
    state = dense_standard(activate(state, dual), width=width, **options)
  return state
