"""A linear layer over very many classes whose exact SGD step costs the same for any number of classes.

The weights `W`, `[classes, features]`, are kept as `W = V U + 1 omega^T`, with the Gram matrix `Q = W^T W` and the sums
`wbar = W^T 1`. A loss that reads the label's logit, the logits' sum and their square sum (`losses.spherical`) needs no
other logit, and its gradient step changes `U`, `omega`, `Q`, `wbar` and the rows of `V` that are labels of the batch.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxreg.checks import check_float, check_hyperparameter, check_state, dtype_of
from jaxreg.losses.spherical import SphericalStatistics

__all__ = [
  "FactoredState",
  "center_factored",
  "decay_factored",
  "factored_init",
  "factored_sgd_step",
  "factored_statistics",
  "factored_value_and_grad",
  "factored_weights",
  "stabilize_factored",
  "unfactorize",
]

# Q holds sums over all classes: rounding its factors to bfloat16 or TF32 would break its agreement with the weights.
_dot = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
_ROWS = 512  # of V worked on at a time, which stay in the cache
_DIRECTIONS = 8  # of U corrected at a time
_LOW, _HIGH = 0.5, 2.0  # singular values of U


class FactoredState(NamedTuple):
  """The layer's weights `W = factor @ mixing + shift` and what makes their exact update cheap.

  Donate it to the jitted step, so that `factor` is changed in place.
  """

  factor: jax.Array  # V, [classes, features]
  mixing: jax.Array  # U, [features, features]
  mixing_inverse: jax.Array  # of U, [features, features]
  shift: jax.Array  # omega, [features]
  gram: jax.Array  # Q = W^T W, [features, features]
  total: jax.Array  # wbar, the sum of W's rows, [features]
  step: jax.Array  # int32, updates so far


def factored_init(
  key: jax.Array, classes: int, features: int, *, scale: ArrayLike = 1e-3, dtype=jnp.float32
) -> FactoredState:
  """Normal weights, centred over the classes.

  Centred weights give centred logits, whose variance float32 statistics resolve; the Z-loss keeps them centred.

  >>> import jax
  >>> state = factored_init(jax.random.key(0), 1000, 4, scale=1.0)
  >>> state.factor.shape, bool((abs(factored_weights(state).mean(0)) < 1e-5).all())
  ((1000, 4), True)

  Args:
    key: threefry key.
    classes: number of classes, static.
    features: length of the inputs, static; for a bias append a constant such as 0.001 to them.
    scale: standard deviation of the weights; may be traced.
    dtype: of the state, float32 or float64.

  Returns:
    The state.

  Raises:
    ValueError: when a size is not positive or the dtype is narrower than float32.

  Reference: Vincent, de Brebisson, Bouthillier, "Efficient Exact Gradient Update for Training Deep Networks with Very
    Large Sparse Targets", NeurIPS 2015; the scale as in the authors' code.
  """
  check_hyperparameter("classes", classes, low=1)
  check_hyperparameter("features", features, low=1)
  check_hyperparameter("scale", scale, low=0)
  if jnp.dtype(dtype) not in (jnp.float32, jnp.float64):
    raise ValueError(f"dtype must be float32 or float64, got {jnp.dtype(dtype)}.")
  factor = jax.random.normal(key, (classes, features), dtype) * jnp.asarray(scale, dtype)
  eye = functools.partial(jnp.eye, features, dtype=dtype)  # two arrays: one could not be donated twice
  gram, total = _dot(factor.T, factor), jnp.sum(factor, axis=0)
  return center_factored(
    FactoredState(factor, eye(), eye(), jnp.zeros(features, dtype), gram, total, jnp.int32(0))
  )  # fmt: skip


def factored_weights(state: FactoredState) -> jax.Array:
  """The weights `V U + 1 omega^T`.

  >>> import jax
  >>> factored_weights(factored_init(jax.random.key(0), 10, 4)).shape
  (10, 4)

  Args:
    state: of the layer.

  Returns:
    `[classes, features]`; the logits of inputs `h` are `h @ weights.T`.

  Reference: Vincent, de Brebisson, Bouthillier, "Efficient Exact Gradient Update for Training Deep Networks with Very
    Large Sparse Targets", NeurIPS 2015.
  """
  check_state(state, FactoredState)
  return _dot(state.factor, state.mixing) + state.shift


def factored_statistics(state: FactoredState, inputs: ArrayLike, labels: ArrayLike) -> SphericalStatistics:
  """The label's logit, the sum and the square sum of all logits: `h^T W_y`, `h^T wbar`, `h^T Q h`.

  It can be differentiated in the inputs; the weights are updated by `factored_sgd_step`, not by their gradient.

  >>> import jax
  >>> state = factored_init(jax.random.key(0), 10, 4)
  >>> factored_statistics(state, jnp.ones((3, 4)), jnp.array([0, 1, 2])).target.shape
  (3,)

  Args:
    state: of the layer.
    inputs: floating `[examples, features]`.
    labels: integers in [0, classes), `[examples]`; or `[examples, k]`, different within a row.

  Returns:
    `target` shaped like the labels, `total` and `square_total` `[examples]`, in the state's dtype.

  Raises:
    ValueError: when inputs or labels do not fit.

  Reference: Vincent, de Brebisson, Bouthillier, "Efficient Exact Gradient Update for Training Deep Networks with Very
    Large Sparse Targets", NeurIPS 2015, the forward pass.
  """
  _check(state, inputs, labels)
  state, inputs = jax.lax.stop_gradient(state), inputs.astype(state.gram.dtype)
  rows = state.factor[labels.reshape(len(inputs), -1)]
  # einsum would make a batched matrix product of it, slow on a CPU.
  target = jnp.sum(_dot(inputs, state.mixing.T)[:, None] * rows, axis=-1) + _dot(inputs, state.shift)[:, None]
  return SphericalStatistics(
    target.reshape(labels.shape), _dot(inputs, state.total), _quadratic(inputs, state.gram)
  )  # fmt: skip


@jax.custom_jvp
def _quadratic(inputs, gram):
  """`h^T Q h`, whose derivative needs no second product because Q is symmetric."""
  return jnp.sum(_dot(inputs, gram) * inputs, axis=-1)


@_quadratic.defjvp
def _quadratic_jvp(primals, tangents):
  product = _dot(*primals)
  return jnp.sum(product * primals[0], axis=-1), 2 * jnp.sum(product * tangents[0], axis=-1)


def factored_sgd_step(
  state: FactoredState,
  inputs: ArrayLike,
  labels: ArrayLike,
  cotangents: SphericalStatistics,
  *,
  learning_rate: ArrayLike,
) -> tuple[FactoredState, jax.Array]:
  """The exact step `W - learning_rate * dL/dW` in factored form, and `dL/dh`.

  Its cost does not depend on the number of classes: `O(m d^2 + m^2 d + m^3)` for m examples with d features. The step
  must be small enough for `I - 2 learning_rate sum_i dL/dq_i h_i h_i^T` to be invertible. Classes that occur several
  times in the batch accumulate. On a busy CPU set `OPENBLAS_NUM_THREADS=1`: LAPACK's threads wait for each other for
  many times as long as the small solve takes.

  >>> import jax
  >>> state = factored_init(jax.random.key(0), 10, 4, scale=1.0)
  >>> inputs, labels, ones = jnp.ones((1, 4)), jnp.array([3]), jnp.ones(1)
  >>> new, gradient = factored_sgd_step(state, inputs, labels, SphericalStatistics(ones, 0 * ones, 0 * ones),
  ...                                   learning_rate=0.5)
  >>> (factored_weights(new) - factored_weights(state))[3].round(3).tolist()
  [-0.5, -0.5, -0.5, -0.5]

  Args:
    state: of the layer.
    inputs: floating `[examples, features]`.
    labels: integers in [0, classes), `[examples]`; or `[examples, k]`, different within a row.
    cotangents: derivatives of the batch's loss in the statistics of `factored_statistics`.
    learning_rate: non-negative; may be traced.

  Returns:
    The new state, and the gradient in the inputs, shaped and typed like them.

  Raises:
    ValueError: when inputs, labels or cotangents do not fit, or the rate is negative.

  Reference: Vincent, de Brebisson, Bouthillier, "Efficient Exact Gradient Update for Training Deep Networks with Very
    Large Sparse Targets", NeurIPS 2015, the update for the spherical family and minibatches.
  """
  _check(state, inputs, labels)
  check_hyperparameter("learning_rate", learning_rate, low=0)
  _check_cotangents(labels, cotangents)
  state = jax.tree.map(jnp.asarray, state)
  dtype = state.gram.dtype
  h, rate = inputs.astype(dtype), jnp.asarray(learning_rate, dtype)
  classes = labels.reshape(len(h), -1)
  on_label = cotangents.target.astype(dtype).reshape(classes.shape)
  on_total = cotangents.total.astype(dtype)[:, None]
  on_square = 2 * cotangents.square_total.astype(dtype)[:, None]

  # W^T dL/do, the input's gradient, in its parts: of the squares, and of the label and the sum.
  rows = jnp.sum(on_label[..., None] * state.factor[classes], axis=1)
  label_sum = jnp.sum(on_label, axis=1, keepdims=True)
  squares = on_square * _dot(h, state.gram)
  linear = _dot(rows, state.mixing) + label_sum * state.shift + on_total * state.total
  gradient = squares + linear

  # (dL/do) (dL/do)^T, [examples, examples].
  products = jnp.sum(on_label[:, :, None, None] * on_label * (classes[:, :, None, None] == classes), axis=(1, 3))
  half = on_square * _dot(h, (squares / 2 + linear).T) + on_total * (
    len(state.factor) / 2 * on_total + label_sum
  ).T  # fmt: skip
  products = products + half + half.T

  cross = _dot(gradient.T, h)
  gram = state.gram - rate * (cross + cross.T) + rate**2 * _dot(h.T, _dot(products, h))
  total = state.total - rate * jnp.sum(
    h * (on_square * _dot(h, state.total)[:, None] + len(state.factor) * on_total + label_sum), axis=0
  )  # fmt: skip
  shift = state.shift - rate * jnp.sum(h * (on_square * _dot(h, state.shift)[:, None] + on_total), axis=0)
  mixing = state.mixing - _dot(_dot(h, state.mixing.T).T, rate * on_square * h)
  inverse, directions = _shrunk_inverse(state.mixing_inverse, h, rate * on_square)
  factor = jnp.asarray(state.factor).at[classes].add(-rate * on_label[..., None] * directions[:, None])
  new = FactoredState(factor, mixing, inverse, shift, gram, total, state.step + 1)
  return new, gradient.astype(inputs.dtype)


def _shrunk_inverse(inverse, h, weights):
  """The inverse of `U S` with `S = I - sum_i weights_i h_i h_i^T`, and `(U S)^{-T} h_i` of every example."""
  examples, features = h.shape
  if examples <= features:  # Woodbury: S^{-1} = I + h^T weights solved, solved = (I - h h^T weights)^{-1} h
    solved = jnp.linalg.solve(jnp.eye(examples, dtype=h.dtype) - _dot(h, (weights * h).T), h)
  else:
    solved = jnp.linalg.solve(jnp.eye(features, dtype=h.dtype) - _dot(h.T, weights * h), h.T).T
  directions = _dot(solved, inverse)
  return inverse + _dot((weights * h).T, directions), directions


def decay_factored(state: FactoredState, *, rate: ArrayLike) -> FactoredState:
  """Weight decay: `W` multiplied by `1 - rate`.

  >>> import jax
  >>> state = factored_init(jax.random.key(0), 10, 4, scale=1.0)
  >>> bool(jnp.allclose(factored_weights(decay_factored(state, rate=0.5)), factored_weights(state) / 2))
  True

  Args:
    state: of the layer.
    rate: in [0, 1), the learning rate times the decay's coefficient; may be traced.

  Returns:
    The new state.

  Raises:
    ValueError: when the rate is outside [0, 1).

  Reference: Vincent, de Brebisson, Bouthillier, "Efficient Exact Gradient Update for Training Deep Networks with Very
    Large Sparse Targets", NeurIPS 2015.
  """
  check_state(state, FactoredState)
  check_hyperparameter("rate", rate, low=0, high=1, open_high=True)
  keep = 1 - jnp.asarray(rate, state.gram.dtype)
  return state._replace(
    mixing=keep * state.mixing,
    mixing_inverse=state.mixing_inverse / keep,
    shift=keep * state.shift,
    gram=keep**2 * state.gram,
    total=keep * state.total,
  )


def center_factored(state: FactoredState) -> FactoredState:
  """Subtracts the mean of the weights over the classes, which shifts all logits of an example alike.

  It does not change a shift-invariant loss such as the Z-loss, and takes the rounding out of the logits' mean. It costs
  `O(features^2)`. Where the mean was far larger than the deviations, `unfactorize` afterwards, which computes the Gram
  matrix anew.

  >>> import jax
  >>> state = center_factored(factored_init(jax.random.key(0), 10, 4))
  >>> state.total.tolist()
  [0.0, 0.0, 0.0, 0.0]

  Args:
    state: of the layer.

  Returns:
    The new state.

  Reference: none.
  """
  check_state(state, FactoredState)
  mean = state.total / len(state.factor)
  gram = state.gram - mean[:, None] * state.total
  return state._replace(shift=state.shift - mean, gram=gram, total=jnp.zeros_like(state.total))


def stabilize_factored(state: FactoredState, *, low: ArrayLike = _LOW, high: ArrayLike = _HIGH) -> FactoredState:
  """Sets singular values of the mixing that left [low, high] back to 1, with the same weights.

  Where they are up to a third of the features, that costs `O(classes * features)` for each, and nothing of this size
  when there is none; where they are more, as much as `unfactorize`, which is then done. The mixing's inverse is
  computed anew.

  >>> import jax
  >>> state = decay_factored(factored_init(jax.random.key(0), 10, 4), rate=0.9)
  >>> float(stabilize_factored(state).mixing.max())
  1.0

  Args:
    state: of the layer.
    low: positive, at most 1; may be traced.
    high: at least 1; may be traced.

  Returns:
    The new state.

  Raises:
    ValueError: when a bound is out of range.

  Reference: Vincent, de Brebisson, Bouthillier, "Efficient Exact Gradient Update for Training Deep Networks with Very
    Large Sparse Targets", NeurIPS 2015, the numerical stabilization; the third as in the authors' code.
  """
  check_state(state, FactoredState)
  check_hyperparameter("low", low, low=0, high=1, open_low=True)
  check_hyperparameter("high", high, low=1)
  return _stabilize_if(jnp.bool_(True), state, low, high)


class _Correction(NamedTuple):
  """What stabilization makes of U, and what V needs for it: `V + V left diag(excess) left^T`, the first `count`."""

  mixing: jax.Array
  mixing_inverse: jax.Array
  left: jax.Array
  excess: jax.Array
  count: jax.Array


def _stabilize_if(condition, state, low, high):
  """Only small arrays go through a branch; V is worked on by loops, which do not copy it."""

  def decompose(mixing, inverse):
    del inverse
    left, values, right = jnp.linalg.svd(mixing)
    outside = (values < low) | (values > high)
    order = jnp.argsort(~outside)
    kept = jnp.where(outside, 1, values)
    excess = jnp.where(outside, values - 1, 0)[order]
    return _Correction(_dot(left * kept, right), _dot(right.T / kept, left.T), left[:, order], excess, outside.sum())

  def keep(mixing, inverse):
    return _Correction(mixing, inverse, jnp.zeros_like(mixing), jnp.zeros_like(mixing[0]), jnp.zeros((), int))

  correction = jax.lax.cond(condition, decompose, keep, state.mixing, state.mixing_inverse)
  many = 3 * correction.count > len(state.mixing)
  blocks = jnp.where(many, 0, (correction.count + _DIRECTIONS - 1) // _DIRECTIONS)
  state = state._replace(factor=_correct(state.factor, correction.left, correction.excess, blocks))
  partial = state._replace(mixing=correction.mixing, mixing_inverse=correction.mixing_inverse)
  return _unfactorize_if(many, state, partial)


def _correct(factor, left, excess, blocks):
  """`V + V left diag(excess) left^T` for the first directions, as many as there are in `blocks`."""
  padding = -len(excess) % _DIRECTIONS
  left, excess = jnp.pad(left, ((0, 0), (0, padding))), jnp.pad(excess, (0, padding))

  def correct_rows(rows):
    def correct(block, change):
      take = functools.partial(jax.lax.dynamic_slice_in_dim, start_index=block * _DIRECTIONS, slice_size=_DIRECTIONS)
      directions = take(left, axis=1)
      return change + _dot(_dot(rows, directions) * take(excess, axis=0), directions.T)

    return jax.lax.fori_loop(0, blocks, correct, rows)

  factor, _ = _map_rows(factor, lambda rows: (correct_rows(rows), ()), (), blocks > 0)
  return factor


def unfactorize(state: FactoredState) -> FactoredState:
  """The same weights with `U = I` and `omega = 0`, with `Q` and the sums computed anew: `O(classes * features^2)`.

  Rounding in `Q` and the sums accumulates over steps; this removes it and is worth its cost every ten thousand steps.

  >>> import jax
  >>> state = decay_factored(factored_init(jax.random.key(0), 10, 4), rate=0.5)
  >>> bool(jnp.allclose(unfactorize(state).factor, factored_weights(state)))
  True

  Args:
    state: of the layer.

  Returns:
    The new state.

  Reference: Vincent, de Brebisson, Bouthillier, "Efficient Exact Gradient Update for Training Deep Networks with Very
    Large Sparse Targets", NeurIPS 2015, the numerical stabilization.
  """
  check_state(state, FactoredState)
  return _unfactorize_if(jnp.bool_(True), state, state)


def _unfactorize_if(condition, state, otherwise):
  def multiply(rows):
    rows = _dot(rows, state.mixing) + state.shift
    return rows, (_dot(rows.T, rows), jnp.sum(rows, axis=0))

  nothing = (jnp.zeros_like(state.gram), jnp.zeros_like(state.total))
  factor, (gram, total) = _map_rows(state.factor, multiply, nothing, condition)
  eye = jnp.eye(len(state.gram), dtype=state.gram.dtype)
  whole = FactoredState(None, eye, eye, jnp.zeros_like(state.shift), gram, total, state.step)
  small = jax.tree.map(lambda a, b: jnp.where(condition, a, b), whole, otherwise._replace(factor=None))
  return small._replace(factor=factor)


def _map_rows(factor, function, sums, condition):
  """Replaces blocks of rows by `function(rows)[0]` in place, and adds up `function(rows)[1]`, if the condition holds.

  The condition is the number of iterations of a loop: a conditional would copy the array.
  """
  size = min(_ROWS, len(factor))

  def apply(carry, start, size):
    factor, sums = carry
    rows, more = function(jax.lax.dynamic_slice_in_dim(factor, start, size))
    return jax.lax.dynamic_update_slice_in_dim(factor, rows, start, 0), jax.tree.map(jnp.add, sums, more)

  carry = jax.lax.fori_loop(
    0, jnp.where(condition, len(factor) // size, 0), lambda i, carry: apply(carry, i * size, size), (factor, sums)
  )
  rest = len(factor) % size
  if rest:
    carry = jax.lax.fori_loop(
      0, jnp.where(condition, 1, 0), lambda _, carry: apply(carry, len(factor) - rest, rest), carry
    )  # fmt: skip
  return carry


def factored_value_and_grad(
  loss: Callable[[SphericalStatistics], jax.Array], *, stabilize_every: int = 100, axis_name: str | None = None
) -> Callable:
  """The function `(state, inputs, labels, learning_rate) -> (value, gradient, new_state)` of a loss of the statistics.

  The value is the mean of the losses over the batch, the gradient that in the inputs, to be propagated through the rest
  of the network; the layer is already updated in the new state, by SGD.

  >>> import jax
  >>> from jaxreg.losses.spherical import z_loss_from_statistics
  >>> step = jax.jit(factored_value_and_grad(lambda s: z_loss_from_statistics(s, classes=10)), donate_argnums=0)
  >>> state = factored_init(jax.random.key(0), 10, 4, scale=1.0)
  >>> inputs, labels = jnp.eye(4), jnp.array([0, 1, 2, 2])
  >>> first, gradient, state = step(state, inputs, labels, 0.1)
  >>> second, gradient, state = step(state, inputs, labels, 0.1)
  >>> bool(second < first), gradient.shape
  (True, (4, 4))

  Args:
    loss: `statistics -> [examples]`, such as a partial `z_loss_from_statistics`.
    stabilize_every: steps between calls of `stabilize_factored`, static.
    axis_name: mapped axis over which the batch is split, all devices holding the same state. Value and gradient are
      then those of the device's own examples; the update is that of the whole batch.

  Returns:
    The function.

  Raises:
    ValueError: when `stabilize_every` is not positive; the function, when its arguments do not fit.

  Reference: Vincent, de Brebisson, Bouthillier, "Efficient Exact Gradient Update for Training Deep Networks with Very
    Large Sparse Targets", NeurIPS 2015, the algorithm for minibatches.
  """
  check_hyperparameter("stabilize_every", stabilize_every, low=1)

  def value_and_grad(state, inputs, labels, learning_rate):
    statistics = factored_statistics(state, inputs, labels)
    value, cotangents = jax.value_and_grad(lambda s: _mean(loss, s))(statistics)
    if axis_name is None:
      new, gradient = factored_sgd_step(state, inputs, labels, cotangents, learning_rate=learning_rate)
    else:
      new, gradient = _step_over(axis_name, state, inputs, labels, cotangents, learning_rate)
    return value, gradient, _stabilize_if(new.step % stabilize_every == 0, new, _LOW, _HIGH)

  return value_and_grad


def _mean(loss, statistics):
  values = loss(statistics)
  if values.shape != statistics.total.shape:
    raise ValueError(f"loss must return a value per example, {statistics.total.shape}, got {values.shape}.")
  return jnp.mean(values)


def _step_over(axis_name, state, inputs, labels, cotangents, learning_rate):
  """The step of the whole batch, and the gradient of the device's own mean."""
  devices, own = jax.lax.axis_size(axis_name), jax.lax.axis_index(axis_name) * len(inputs)
  gather = lambda leaf: jax.lax.all_gather(leaf, axis_name, tiled=True)
  mean = jax.tree.map(lambda leaf: gather(leaf) / devices, cotangents)
  new, gradient = factored_sgd_step(state, gather(inputs), gather(labels), mean, learning_rate=learning_rate)
  return new, devices * jax.lax.dynamic_slice_in_dim(gradient, own, len(inputs))


def _check(state, inputs, labels):
  check_state(state, FactoredState)
  check_float("inputs", inputs)
  features = len(state.gram)
  if jnp.ndim(inputs) != 2 or inputs.shape[-1] != features:
    raise ValueError(f"inputs must have the shape [examples, {features}], got {jnp.shape(inputs)}.")
  if not jnp.issubdtype(dtype_of("labels", labels), jnp.integer):
    raise ValueError(f"labels must be integer class indices, got dtype {dtype_of('labels', labels)}.")
  if jnp.ndim(labels) not in (1, 2) or len(labels) != len(inputs):
    raise ValueError(f"labels must have the shape [{len(inputs)}] or [{len(inputs)}, k], got {jnp.shape(labels)}.")


def _check_cotangents(labels, cotangents):
  expected = {"target": labels.shape, "total": labels.shape[:1], "square_total": labels.shape[:1]}
  for name, shape in expected.items():
    if jnp.shape(getattr(cotangents, name)) != shape:
      raise ValueError(f"cotangents.{name} must have shape {shape}, got {jnp.shape(getattr(cotangents, name))}.")
