"""Group sparsity: the k-group envelope (WGSEF) and the group lasso, their proximal operators, and removal of groups.

Groups are given by integer ids. `values` is an array or a pytree of arrays, `groups` has the same structure, and its
ids have the rank of their array with each axis full or of length 1 (then constant along it). Entries of all arrays with
the same id form one group, so that a neuron can be its kernel's column together with its bias.
"""

from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxreg.checks import check_float, check_hyperparameter

__all__ = [
  "compact",
  "compact_pair",
  "freeze_support",
  "group_ids",
  "group_lasso",
  "group_norms",
  "prox_group_lasso",
  "prox_wgsef",
  "resolve_groups",
  "scale_groups",
  "sum_groups",
  "wgsef",
  "wgsef_conjugate",
  "wgsef_minimizer",
]


def wgsef(values, groups, *, k: int | jax.Array, weights=None, num_groups: int | None = None) -> jax.Array:
  """Weighted group sparse envelope: the convex envelope of half the squared norm on "at most `k` groups are non-zero".

  With `b_j = sqrt(d_j) ||x_j||` sorted downwards it is `(sum_{j <= n} b_j^2 + (k - n) T^2) / 2`, where
  `T = sum_{j > n} b_j / (k - n)` and `n < k` is the number of groups above `T`; equally the minimum over `u` in [0, 1]
  with `sum u <= k` of `sum_j b_j^2 / (2 u_j)`. `k = 1` is half the squared group lasso, `k = num_groups` ridge. Its
  gradient `d_j x_j / u_j` is taken as 0 at zero groups; second derivatives are not supported. Gradient descent on it
  makes groups small but not zero: that needs `prox_wgsef`.

  >>> import jax.numpy as jnp
  >>> values, groups = jnp.array([3.0, 4.0, 1.0]), jnp.array([0, 0, 1])
  >>> [float(wgsef(values, groups, k=k)) for k in (1, 2)]
  [18.0, 13.0]

  Args:
    values: floating array, or pytree of arrays.
    groups: integer ids, as the module describes.
    k: number of groups that may survive, an integer of at least 1; may be traced.
    weights: `[num_groups]` positive `d_j`, for example group sizes; all 1 when None.
    num_groups: static; number of groups, needed when `groups` is traced and `weights` is None.

  Returns:
    Scalar in the dtype of `values`.

  Raises:
    ValueError: when `k` is not a positive integer, a weight is not positive, or ids do not fit the values.

  Reference: Refael, Arbel, Huleihel, "Learning k-Level Structured Sparse Neural Networks Using Group Envelope
    Regularization", arXiv 2212.12921; the placement of the weights is unverified. Unweighted and without groups: Beck,
    Refael, "Sparse Regularization via Bidualization", Journal of Global Optimization 2022.
  """
  _check_k(k)
  num_groups = _number_of_groups(groups, weights, num_groups)
  squared = _weights(weights, num_groups) * _squared_norms(values, groups, num_groups)
  # The value is a minimum over u, so its gradient is the one at fixed u.
  share = jax.lax.stop_gradient(_envelope_minimizer(jnp.sqrt(squared), k))
  value = jnp.sum(jnp.where(share > 0, squared / jnp.where(share > 0, share, 1), 0)) / 2
  return value.astype(_dtype(values))


def wgsef_minimizer(values, groups, *, k: int | jax.Array, weights=None, num_groups: int | None = None) -> jax.Array:
  """The minimiser `u_j = min(1, b_j / T)` of the envelope's variational form: how far each group is kept.

  It sums to `min(k, number of non-zero groups)`. No gradient flows through it.

  >>> import jax.numpy as jnp
  >>> wgsef_minimizer(jnp.array([4.0, 1.0, 1.0]), jnp.arange(3), k=2).tolist()
  [1.0, 0.5, 0.5]

  Args:
    values: floating array, or pytree of arrays.
    groups: integer ids, as the module describes.
    k: number of groups that may survive, an integer of at least 1; may be traced.
    weights: `[num_groups]` positive `d_j`; all 1 when None.
    num_groups: static; as in `wgsef`.

  Returns:
    `[num_groups]` float32 (float64 for float64 values) in [0, 1], 0 exactly at zero groups.

  Raises:
    ValueError: as `wgsef`.

  Reference: Refael, Arbel, Huleihel, arXiv 2212.12921, the variational form.
  """
  _check_k(k)
  num_groups = _number_of_groups(groups, weights, num_groups)
  squared = _weights(weights, num_groups) * _squared_norms(values, groups, num_groups)
  return jax.lax.stop_gradient(_envelope_minimizer(jnp.sqrt(squared), k))


def wgsef_conjugate(values, groups, *, k: int | jax.Array, weights=None, num_groups: int | None = None) -> jax.Array:
  """Convex conjugate of `wgsef`: half the sum of the `k` largest `||y_j||^2 / d_j`.

  >>> import jax.numpy as jnp
  >>> float(wgsef_conjugate(jnp.array([3.0, -1.0, 2.0]), jnp.arange(3), k=2))
  6.5

  Args:
    values: floating array, or pytree of arrays.
    groups: integer ids, as the module describes.
    k: number of groups that may survive, an integer of at least 1; may be traced.
    weights: `[num_groups]` positive `d_j`; all 1 when None.
    num_groups: static; as in `wgsef`.

  Returns:
    Scalar in the dtype of `values`.

  Raises:
    ValueError: as `wgsef`.

  Reference: Refael, Arbel, Huleihel, arXiv 2212.12921, the conjugate of the k-group model.
  """
  _check_k(k)
  num_groups = _number_of_groups(groups, weights, num_groups)
  squared = _squared_norms(values, groups, num_groups) / _weights(weights, num_groups)
  largest_first = -jnp.sort(-squared)
  return (jnp.sum(jnp.where(jnp.arange(num_groups) < k, largest_first, 0)) / 2).astype(_dtype(values))


def prox_wgsef(
  values, groups, *, k: int | jax.Array, lam: float | jax.Array, weights=None, num_groups: int | None = None
):
  """Proximal operator of `lam * wgsef`, `z_j = y_j u_j / (u_j + lam d_j)`.

  Here `u_j = clip(tau a_j - lam d_j, 0, 1)` with `a_j = sqrt(d_j) ||y_j||` and the `tau` at which they sum to `k`; all
  `u_j` are 1 when at most `k` groups are non-zero. Weak groups become exactly zero. `tau` is bracketed by bisection
  over the sorted breakpoints and then solved on its linear piece, so that derivatives in `values`, `lam` and `weights`
  are exact wherever the operator is differentiable.

  >>> import jax.numpy as jnp
  >>> prox_wgsef(jnp.array([4.0, -4.0, 0.5]), jnp.arange(3), k=2, lam=1.0).tolist()
  [2.0, -2.0, 0.0]

  Args:
    values: floating array, or pytree of arrays: the point `y`.
    groups: integer ids, as the module describes.
    k: number of groups that may survive, an integer of at least 1; may be traced.
    lam: non-negative strength; in a proximal step the learning rate times the penalty's strength; may be traced.
    weights: `[num_groups]` positive `d_j`; all 1 when None.
    num_groups: static; as in `wgsef`.

  Returns:
    The proximal point, with the structure, shapes and dtypes of `values`.

  Raises:
    ValueError: as `wgsef`, and when `lam` is negative.

  Reference: Refael, Arbel, Huleihel, arXiv 2212.12921, the proximal operator of WGSEF.
  """
  _check_k(k)
  check_hyperparameter("lam", lam, low=0)
  num_groups = _number_of_groups(groups, weights, num_groups)
  if num_groups == 0:
    return values
  weights = _weights(weights, num_groups)
  norms = _safe_sqrt(weights * _squared_norms(values, groups, num_groups))
  cost = weights.astype(norms.dtype) * lam
  share = _prox_minimizer(norms, cost, k)
  total = share + cost
  return scale_groups(values, groups, jnp.where(total > 0, share / jnp.where(total > 0, total, 1), 0))


def group_lasso(values, groups, *, weights=None, num_groups: int | None = None) -> jax.Array:
  """Group lasso penalty `sum_j sqrt(d_j) ||x_j||`, with gradient 0 at zero groups.

  >>> import jax.numpy as jnp
  >>> float(group_lasso(jnp.array([3.0, 4.0, 1.0]), jnp.array([0, 0, 1])))
  6.0

  Args:
    values: floating array, or pytree of arrays.
    groups: integer ids, as the module describes.
    weights: `[num_groups]` positive `d_j`, for example group sizes; all 1 when None.
    num_groups: static; as in `wgsef`.

  Returns:
    Scalar in the dtype of `values`.

  Raises:
    ValueError: when a weight is not positive or ids do not fit the values.

  Reference: Yuan, Lin, "Model Selection and Estimation in Regression with Grouped Variables", JRSS B 2006, equation
    2.1.
  """
  num_groups = _number_of_groups(groups, weights, num_groups)
  squared = _weights(weights, num_groups) * _squared_norms(values, groups, num_groups)
  return jnp.sum(_safe_sqrt(squared)).astype(_dtype(values))


def prox_group_lasso(values, groups, *, lam: float | jax.Array, weights=None, num_groups: int | None = None):
  """Proximal operator of `lam * group_lasso`, the block soft threshold `y_j max(0, 1 - lam sqrt(d_j) / ||y_j||)`.

  >>> import jax.numpy as jnp
  >>> prox_group_lasso(jnp.array([3.0, 4.0, 1.0]), jnp.array([0, 0, 1]), lam=2.5).tolist()
  [1.5, 2.0, 0.0]

  Args:
    values: floating array, or pytree of arrays: the point `y`.
    groups: integer ids, as the module describes.
    lam: non-negative strength; in a proximal step the learning rate times the penalty's strength; may be traced.
    weights: `[num_groups]` positive `d_j`; all 1 when None.
    num_groups: static; as in `wgsef`.

  Returns:
    The proximal point, with the structure, shapes and dtypes of `values`.

  Raises:
    ValueError: when `lam` is negative, a weight is not positive, or ids do not fit the values.

  Reference: Parikh, Boyd, "Proximal Algorithms", Foundations and Trends in Optimization 2014, Section 6.5.1.
  """
  check_hyperparameter("lam", lam, low=0)
  num_groups = _number_of_groups(groups, weights, num_groups)
  norms = _safe_sqrt(_squared_norms(values, groups, num_groups))
  threshold = lam * jnp.sqrt(_weights(weights, num_groups)).astype(norms.dtype)
  alive = norms > threshold
  return scale_groups(values, groups, jnp.where(alive, 1 - threshold / jnp.where(alive, norms, 1), 0))


def group_ids(values, *, kind: str):
  """Group ids of a tensor, or of several tensors grouped jointly, by kind.

  | kind | a group is | ids follow |
  | --- | --- | --- |
  | "filter", "neuron" | what feeds one output: a filter (HWIO), a dense column, its bias | the last axis |
  | "channel" | what one input channel or unit feeds | the last axis but one |
  | "shape" | one position of the filters, across all filters | all axes but the last |
  | "element" | one entry | all axes |

  >>> import jax.numpy as jnp
  >>> group_ids(jnp.zeros((3, 3, 8, 16)), kind="channel").shape
  (1, 1, 8, 1)
  >>> ids = group_ids({"kernel": jnp.zeros((4, 2)), "bias": jnp.zeros(2)}, kind="neuron")
  >>> ids["kernel"].tolist(), ids["bias"].tolist()
  ([[0, 1]], [0, 1])

  Args:
    values: array, or pytree of arrays that share their groups; only shapes are read.
    kind: static; one of the table.

  Returns:
    NumPy int32 ids in the structure of `values`, ready for every function of this module.

  Raises:
    ValueError: when `kind` is unknown, a tensor's rank is too small for it, or tensors differ in their number of
      groups.

  Reference: Wen, Wu, Wang, Chen, Li, "Learning Structured Sparsity in Deep Neural Networks", NeurIPS 2016, Section
    3.2.
  """
  ids = jax.tree.map(lambda tensor: _tensor_ids(jnp.shape(tensor), kind), values)
  counts = {leaf.size for leaf in jax.tree.leaves(ids)}
  if len(counts) > 1:
    shapes = [jnp.shape(leaf) for leaf in jax.tree.leaves(values)]
    raise ValueError(f"values must have equally many groups of kind {kind!r}, got tensors of shapes {shapes}.")
  return ids


def group_norms(values, *, kind: str) -> jax.Array:
  """Euclidean norm of every group of a tensor, or of several tensors grouped jointly.

  >>> import jax.numpy as jnp
  >>> group_norms({"kernel": jnp.array([[3.0, 0.0]]), "bias": jnp.array([4.0, 0.0])}, kind="neuron").tolist()
  [5.0, 0.0]

  Args:
    values: floating array, or pytree of arrays that share their groups.
    kind: static; as in `group_ids`.

  Returns:
    `[num_groups]` float32 (float64 for float64 values).

  Raises:
    ValueError: as `group_ids`.

  Reference: Refael, Arbel, Huleihel, arXiv 2212.12921, the groups of their experiments.
  """
  groups, num_groups = resolve_groups(kind, values)
  return _safe_sqrt(_squared_norms(values, groups, num_groups))


def resolve_groups(kind: str | Callable, values):
  """Ids and number of groups of `values`, from a kind of `group_ids` or a function from `values` to ids.

  >>> import jax.numpy as jnp
  >>> resolve_groups("neuron", jnp.zeros((4, 2)))[1]
  2

  Args:
    kind: static; a kind of `group_ids`, or a function that maps `values` to concrete ids.
    values: array or pytree of arrays.

  Returns:
    `(ids, num_groups)`.

  Raises:
    ValueError: as `group_ids`, or when the function's ids are traced.

  Reference: none; shared by `freeze_support` and `jaxreg.transforms.half_space_projection`.
  """
  groups = kind(values) if callable(kind) else group_ids(values, kind=kind)
  return groups, _number_of_groups(groups, None, None)


def sum_groups(values, groups, *, num_groups: int) -> jax.Array:
  """Sum of the entries of each group.

  >>> import jax.numpy as jnp
  >>> sum_groups(jnp.array([1.0, 2.0, 3.0]), jnp.array([1, 0, 1]), num_groups=2).tolist()
  [2.0, 4.0]

  Args:
    values: floating array, or pytree of arrays.
    groups: integer ids, as the module describes.
    num_groups: static; number of groups.

  Returns:
    `[num_groups]` float32 (float64 for float64 values).

  Raises:
    ValueError: when ids do not fit the values.

  Reference: none.
  """
  total = jnp.zeros(num_groups, jnp.promote_types(_dtype(values), jnp.float32))
  for tensor, ids in _paired(values, groups):
    constant = tuple(axis for axis in range(ids.ndim) if ids.shape[axis] == 1)
    entries = jnp.sum(jnp.asarray(tensor).astype(total.dtype), axis=constant).reshape(-1)
    if not _in_order(ids, num_groups):
      entries = jax.ops.segment_sum(entries, jnp.asarray(ids, jnp.int32).reshape(-1), num_groups)
    total = total + entries
  return total


def scale_groups(values, groups, factors: jax.Array):
  """Multiplies each group by its factor; a factor of 0 gives exact zeros.

  >>> import jax.numpy as jnp
  >>> scale_groups(jnp.array([1.0, 2.0, 3.0]), jnp.array([1, 0, 1]), jnp.array([0.0, 10.0])).tolist()
  [10.0, 0.0, 30.0]

  Args:
    values: floating array, or pytree of arrays.
    groups: integer ids, as the module describes.
    factors: `[num_groups]` floating.

  Returns:
    The scaled values, with the structure, shapes and dtypes of `values`.

  Raises:
    ValueError: when ids do not fit the values.

  Reference: none.
  """
  scaled = []
  for tensor, ids in _paired(values, groups):
    factor = factors.reshape(ids.shape) if _in_order(ids, factors.size) else factors[jnp.asarray(ids, jnp.int32)]
    scaled.append((tensor * factor).astype(jnp.result_type(tensor)))
  return jax.tree.structure(values).unflatten(scaled)


def freeze_support(params, kinds):
  """Mask of the entries whose group is not zero, for fine-tuning without the penalty on the support it has found.

  >>> import jax, jax.numpy as jnp, optax
  >>> params = {"Dense_0": {"kernel": jnp.array([[1.0, 0.0]]), "bias": jnp.zeros(2)}}
  >>> mask = freeze_support(params, {"Dense_0": "neuron"})
  >>> keep = lambda updates, params: jax.tree.map(lambda m, u: jnp.where(m, u, 0), mask, updates)
  >>> tx = optax.chain(optax.sgd(1.0), optax.stateless(keep))
  >>> state = tx.init(params)
  >>> for _ in range(2):
  ...   updates, state = tx.update(jax.tree.map(jnp.ones_like, params), state, params)
  ...   params = optax.apply_updates(params, updates)
  >>> params["Dense_0"]["bias"].tolist()
  [-2.0, 0.0]

  Args:
    params: pytree of arrays.
    kinds: prefix of `params` whose leaves are a kind of `group_ids`, a function from the subtree below to ids, or None
      (everything may move). A subtree of several tensors is grouped jointly.

  Returns:
    Booleans in the structure and shapes of `params`, True where the entry may move.

  Raises:
    ValueError: as `group_ids`.

  Reference: Refael, Arbel, Huleihel, arXiv 2212.12921 (step 4 of card 49: the ridge part of the penalty biases the
    surviving groups, and fine-tuning removes the bias).
  """

  def mask(kind, values):
    everywhere = jax.tree.map(lambda tensor: jnp.ones(jnp.shape(tensor)), values)
    if kind is not None and jax.tree.leaves(values):
      groups, num_groups = resolve_groups(kind, values)
      occupied = jax.tree.map(lambda tensor: (jnp.asarray(tensor) != 0).astype(jnp.float32), values)
      alive = sum_groups(occupied, groups, num_groups=num_groups) > 0
      everywhere = scale_groups(everywhere, groups, alive.astype(jnp.float32))
    return jax.tree.map(lambda factor: factor > 0, everywhere)

  return jax.tree.map(mask, kinds, params, is_leaf=lambda node: node is None or callable(node))


def compact_pair(first: Mapping, second: Mapping) -> tuple[dict, dict]:
  """Removes the outputs of a layer that are zero, and the inputs of the next layer that they fed.

  An output goes when its kernel entries and its bias are all zero; it then contributes nothing as long as whatever lies
  between the layers maps zero to zero (ReLU, pooling). Dense after dense, convolution (HWIO) after convolution, and
  dense after a flattened convolution (whose channels vary fastest) all work. Shapes depend on the values: not under
  `jit`.

  >>> import jax.numpy as jnp
  >>> first = {"kernel": jnp.array([[1.0, 0.0, 2.0]]), "bias": jnp.zeros(3)}
  >>> first, second = compact_pair(first, {"kernel": jnp.ones((3, 5))})
  >>> first["kernel"].tolist(), first["bias"].shape, second["kernel"].shape
  ([[1.0, 2.0]], (2,), (2, 5))

  Args:
    first: layer with a `kernel` whose last axis are its outputs; other entries (`bias`) are `[outputs]`.
    second: the layer it feeds, whose kernel has the inputs on the last axis but one.

  Returns:
    `(first, second)` without the zero outputs.

  Raises:
    ValueError: when the second kernel's inputs are not a multiple of the first one's outputs, or an entry of `first`
      has another length.

  Reference: Refael, Arbel, Huleihel, arXiv 2212.12921 (step 4 of card 49).
  """
  kernel, following = np.asarray(first["kernel"]), np.asarray(second["kernel"])
  outputs, inputs = kernel.shape[-1], following.shape[-2]
  if outputs == 0 or inputs % outputs:
    raise ValueError(
      f"second must have inputs in a multiple of first's outputs, got kernels {kernel.shape} and {following.shape}."
    )
  for name, entry in first.items():
    if name != "kernel" and np.shape(entry) != (outputs,):
      raise ValueError(f"first[{name!r}] must have one entry per output, expected {(outputs,)}, got {np.shape(entry)}.")
  alive = np.zeros(outputs, bool)
  for entry in first.values():
    alive |= (np.asarray(entry) != 0).reshape(-1, outputs).any(axis=0)
  kept = {name: jnp.asarray(np.asarray(entry)[..., alive]) for name, entry in first.items()}
  rows = np.tile(alive, inputs // outputs)
  return kept, {**second, "kernel": jnp.asarray(following[..., rows, :])}


def compact(params: Mapping, *, order: Sequence[str]) -> dict:
  """Removes the zero neurons or filters of a chain of layers; outputs do not change.

  >>> import jax.numpy as jnp
  >>> kernel = jnp.array([[1.0, 0.0, 2.0]])
  >>> params = {"Dense_0": {"kernel": kernel}, "Dense_1": {"kernel": jnp.ones((3, 5))}}
  >>> compact(params, order=("Dense_0", "Dense_1"))["Dense_1"]["kernel"].shape
  (2, 5)

  Args:
    params: dictionary of layers; those not in `order` are kept as they are.
    order: names of layers that feed one another, first to last, as `compact_pair` requires of each two neighbours.

  Returns:
    The smaller parameters; their kernels' shapes are the widths for the smaller model.

  Raises:
    ValueError: as `compact_pair`, or when `order` names a layer that `params` does not hold.

  Reference: Refael, Arbel, Huleihel, arXiv 2212.12921 (step 4 of card 49).
  """
  missing = [name for name in order if name not in params]
  if missing:
    raise ValueError(f"order must name layers of params, which has {sorted(params)}, got {missing}.")
  smaller = dict(params)
  for first, second in zip(order, order[1:]):
    smaller[first], smaller[second] = compact_pair(smaller[first], smaller[second])
  return smaller


def _envelope_minimizer(b, k):
  """`u` of the envelope: `b` in units of the threshold `T`, capped at 1."""
  k = jnp.minimum(k, b.size)
  largest_first = -jnp.sort(-b)
  tail = jnp.cumsum(largest_first[::-1])[::-1]
  rank = jnp.arange(b.size)
  # Group number i + 1 lies above the T that the groups from it onwards would share.
  above = (rank < k - 1) & (largest_first * (k - rank) > tail)
  n = jnp.sum(above)
  threshold = jnp.sum(jnp.where(rank >= n, largest_first, 0)) / (k - n).astype(b.dtype)
  share = jnp.minimum(b / jnp.where(threshold > 0, threshold, 1), 1)
  return jnp.where(threshold > 0, share, (b > 0).astype(b.dtype))


def _prox_minimizer(norms, cost, k):
  """`u_j = clip(tau a_j - l_j, 0, 1)` summing to `k`, for weighted norms `a` and costs `l`.

  Where at most `k` groups are non-zero, those have `u = 1`; with fewer than `k`, zero groups have it too, for a zero
  group that moves is then kept.
  """
  few = jnp.sum(norms > 0) <= k
  capped, active = _pieces(jax.lax.stop_gradient(norms), jax.lax.stop_gradient(cost), k)
  slope = jnp.sum(jnp.where(active, norms, 0))
  level = k - jnp.sum(capped) + jnp.sum(jnp.where(active, cost, 0))
  tau = level / jnp.where(slope > 0, slope, 1)
  share = jnp.where(capped, 1, jnp.where(active, tau * norms - cost, 0))
  everything = jnp.where(norms > 0, 1, jnp.sum(norms > 0) < k).astype(norms.dtype)
  return jnp.where(few, everything, jnp.clip(share, 0, 1))


def _pieces(norms, cost, k):
  """Which groups are at the cap and which between the bounds, on the linear piece where the sum crosses `k`."""
  safe = jnp.where(norms > 0, norms, 1)
  enters = jnp.where(norms > 0, cost / safe, jnp.inf)
  leaves = jnp.where(norms > 0, (1 + cost) / safe, jnp.inf)
  breakpoints = jnp.sort(jnp.concatenate([enters, leaves]))

  def reaches(tau):
    return jnp.sum(jnp.where(norms > 0, jnp.clip(tau * safe - cost, 0, 1), 0)) >= k

  def halve(_, bracket):
    low, high = bracket
    middle = (low + high) // 2
    reached = reaches(breakpoints[middle])
    return jnp.where(reached, low, middle), jnp.where(reached, middle, high)

  last = breakpoints.size - 1
  # Sums evaluated afresh at each probe, because running sums over the breakpoints lose small groups beside large ones.
  low, high = jax.lax.fori_loop(0, last.bit_length() + 1, halve, (jnp.int32(0), jnp.int32(last)))
  capped = leaves <= breakpoints[low]
  active = (enters <= breakpoints[low]) & ~capped & (leaves >= breakpoints[high])
  return capped, active


def _safe_sqrt(squared):
  """Square root with derivative 0 at 0."""
  return jnp.where(squared > 0, jnp.sqrt(jnp.where(squared > 0, squared, 1)), 0)


def _squared_norms(values, groups, num_groups):
  _dtype(values)
  wide = jax.tree.map(lambda x: jnp.asarray(x).astype(jnp.promote_types(jnp.result_type(x), jnp.float32)), values)
  return sum_groups(jax.tree.map(jnp.square, wide), groups, num_groups=num_groups)


def _dtype(values):
  leaves = jax.tree.leaves(values)
  for leaf in leaves:
    check_float("values", leaf)
  return jnp.result_type(*leaves) if leaves else jnp.dtype(jnp.float32)


def _check_k(k):
  if not jnp.issubdtype(jnp.result_type(k), jnp.integer):
    raise ValueError(f"k must be an integer, got dtype {jnp.result_type(k)}.")
  check_hyperparameter("k", k, low=1)


def _weights(weights, num_groups):
  if weights is None:
    return jnp.ones(num_groups, jnp.float32)
  check_hyperparameter("weights", weights, low=0, open_low=True)
  if jnp.shape(weights) != (num_groups,):
    raise ValueError(f"weights must have one entry per group, expected {(num_groups,)}, got {jnp.shape(weights)}.")
  return jnp.asarray(weights)


def _number_of_groups(groups, weights, num_groups):
  """The number of groups, from the argument, the weights or the ids themselves, which are checked where readable."""
  leaves = jax.tree.leaves(groups)
  for ids in leaves:
    if not jnp.issubdtype(jnp.result_type(ids), jnp.integer):
      raise ValueError(f"groups must be integer ids, got dtype {jnp.result_type(ids)}.")
  if num_groups is None and weights is not None:
    num_groups = jnp.shape(weights)[0] if jnp.ndim(weights) == 1 else None
  traced = any(isinstance(ids, jax.core.Tracer) for ids in leaves)
  if traced and num_groups is None:
    raise ValueError("num_groups must be given when groups is traced, got None.")
  if traced:
    return num_groups
  bounds = [(int(np.min(ids)), int(np.max(ids))) for ids in leaves if np.size(ids)]
  largest = max((high for _, high in bounds), default=-1)
  num_groups = largest + 1 if num_groups is None else num_groups
  if largest >= num_groups or any(low < 0 for low, _ in bounds):
    raise ValueError(f"groups must hold ids from 0 to {num_groups - 1}, got {bounds} as their ranges.")
  return num_groups


def _paired(values, groups):
  """The arrays with their ids, after a check that ranks match and axes are full or of length 1."""
  structure = jax.tree.structure(values)
  pairs = list(zip(jax.tree.leaves(values), structure.flatten_up_to(groups)))
  for tensor, ids in pairs:
    shape, id_shape = jnp.shape(tensor), jnp.shape(ids)
    if len(shape) != len(id_shape) or any(i not in (1, s) for s, i in zip(shape, id_shape)):
      raise ValueError(f"groups must have the rank of values and axes full or of length 1, got {id_shape} for {shape}.")
  return pairs


def _in_order(ids, num_groups):
  """Whether the ids simply count the groups, which saves a scatter or gather."""
  return isinstance(ids, np.ndarray) and ids.size == num_groups and np.array_equal(ids.ravel(), np.arange(num_groups))


def _tensor_ids(shape, kind):
  free = {
    "filter": range(len(shape) - 1, len(shape)),
    "neuron": range(len(shape) - 1, len(shape)),
    "channel": range(len(shape) - 2, len(shape) - 1),
    "shape": range(len(shape) - 1),
    "element": range(len(shape)),
  }
  if kind not in free:
    raise ValueError(f"kind must be one of {sorted(free)}, got {kind!r}.")
  least = {"channel": 2, "shape": 2, "element": 0}.get(kind, 1)
  if len(shape) < least:
    raise ValueError(f"values must have at least {least} axes for groups of kind {kind!r}, got shape {shape}.")
  id_shape = tuple(size if axis in free[kind] else 1 for axis, size in enumerate(shape))
  return np.arange(int(np.prod(id_shape, dtype=int)), dtype=np.int32).reshape(id_shape)
