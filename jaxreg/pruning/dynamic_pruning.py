"""Dynamic pruning of convolutions: small heads that predict, from a layer's input, which of its filters will matter.

The targets are computed from the layer's own full output, so that one number sets the budget and no term has to be
balanced. Here all filters are computed and the pruned ones multiplied by zero; `pruned_flops` counts what that would
save, `gathered_conv` saves it.
"""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from jaxreg.checks import check_float, check_hyperparameter
from jaxreg.metrics.sizes import static_integer

__all__ = [
  "MaskHead",
  "MaskedConv",
  "mask_accuracy",
  "mask_prediction_loss",
  "mass_mask",
  "straight_through_mask",
  "uniform_mask",
]

MASKS = ("head", "target", "none")
MODES = ("decoupled", "joint")
NORM_EPSILON = 1e-5
POOLS = {"max": jnp.max, "mean": jnp.mean}


def mass_mask(feature_maps: ArrayLike, *, mass: ArrayLike, tolerance: ArrayLike = 1e-5, min_keep: int = 0) -> jax.Array:
  """Keeps each example's strongest filters that together carry at most a share `mass` of the activation.

  With `a_j` the largest absolute activation of filter `j`, divided by the sum over filters, and sorted in descending
  order, the filters are kept whose cumulative sum is at most `mass + tolerance`: the one that crosses is dropped, and
  none is left when the first alone is more. `mass = 1` keeps the filters that fired (`a_j > tolerance`), a negative
  one all.

  >>> import jax.numpy as jnp
  >>> mass_mask(jnp.array([[5.0, 1.0, 3.0, 1.0]]), mass=0.8).tolist()
  [[1.0, 0.0, 1.0, 0.0]]

  Args:
    feature_maps: floating `[batch, ..., filters]`, unmasked outputs of a layer.
    mass: at most 1; may be traced.
    tolerance: non-negative scalar; may be traced.
    min_keep: number of strongest filters that are kept in any case; static.

  Returns:
    `[batch, filters]` of zeros and ones in the dtype of `feature_maps`, constant under differentiation. Where nothing
    fired, all are kept, or none for `mass = 1`; NaN for an example with a NaN activation.

  Raises:
    ValueError: when the feature maps are not floating point or lack an axis, or a hyperparameter is out of range.

  Reference: Elkerdawy, Elhoushi, Zhang, Ray, "Fire Together Wire Together: A Dynamic Pruning Approach with
    Self-Supervised Mask Prediction", CVPR 2022, the mass of the heatmap; details as in the official code.
  """
  _check_feature_maps(feature_maps)
  check_hyperparameter("mass", mass, high=1)
  check_hyperparameter("tolerance", tolerance, low=0)
  shares = _shares(feature_maps)
  min_keep = static_integer("min_keep", min_keep, low=0, high=shares.shape[-1])
  order = jnp.argsort(-shares, axis=-1)
  cumulative = jnp.cumsum(jnp.take_along_axis(shares, order, -1), axis=-1)
  ranks = jnp.argsort(order, axis=-1)
  within = jnp.take_along_axis(cumulative, ranks, -1) <= mass + tolerance
  mass = jnp.asarray(mass)
  kept = jnp.where(mass == 1, shares > tolerance, within) | (mass < 0) | (ranks < min_keep)
  return _as_mask(kept, shares + mass, feature_maps.dtype)


def uniform_mask(feature_maps: ArrayLike, *, prune_ratio: ArrayLike, tolerance: ArrayLike = 1e-5) -> jax.Array:
  """Drops each example's `floor(prune_ratio * filters)` weakest filters, and those that did not fire.

  >>> import jax.numpy as jnp
  >>> uniform_mask(jnp.array([[5.0, 1.0, 3.0, 0.0]]), prune_ratio=0.5).tolist()
  [[1.0, 0.0, 1.0, 0.0]]

  Args:
    feature_maps: floating `[batch, ..., filters]`, unmasked outputs of a layer.
    prune_ratio: in [0, 1], or negative to keep all filters; may be traced.
    tolerance: the largest share of the activation that does not count as fired; non-negative; may be traced.

  Returns:
    `[batch, filters]` of zeros and ones in the dtype of `feature_maps`, constant under differentiation.

  Raises:
    ValueError: when the feature maps are not floating point or lack an axis, or a hyperparameter is out of range.

  Reference: Elkerdawy, Elhoushi, Zhang, Ray, "Fire Together Wire Together: A Dynamic Pruning Approach with
    Self-Supervised Mask Prediction", CVPR 2022, the ablation with equal numbers of filters.
  """
  _check_feature_maps(feature_maps)
  check_hyperparameter("prune_ratio", prune_ratio, high=1)
  check_hyperparameter("tolerance", tolerance, low=0)
  shares = _shares(feature_maps)
  ranks = jnp.argsort(jnp.argsort(shares, axis=-1), axis=-1)
  ratio = jnp.asarray(prune_ratio, shares.dtype)
  kept = (ranks >= jnp.floor(ratio * shares.shape[-1])) & (shares > tolerance)
  return _as_mask(kept | (ratio < 0), shares + ratio, feature_maps.dtype)


def straight_through_mask(logits: ArrayLike) -> jax.Array:
  """The mask `1[logits > 0]` with the derivative of the sigmoid.

  >>> import jax, jax.numpy as jnp
  >>> straight_through_mask(jnp.array([-1.0, 0.0, 2.0])).tolist()
  [0.0, 0.0, 1.0]
  >>> float(jax.grad(straight_through_mask)(0.0))
  0.25

  Args:
    logits: floating, of any shape.

  Returns:
    Zeros and ones like `logits`.

  Raises:
    ValueError: when the logits are not floating point.

  Reference: Elkerdawy, Elhoushi, Zhang, Ray, "Fire Together Wire Together: A Dynamic Pruning Approach with
    Self-Supervised Mask Prediction", CVPR 2022, the binarization of the heads.
  """
  check_float("logits", logits)
  soft = jax.nn.sigmoid(logits)
  return (jnp.asarray(logits) > 0).astype(soft.dtype) + (soft - jax.lax.stop_gradient(soft))


def mask_prediction_loss(logits, targets) -> jax.Array:
  """Binary cross-entropy of the predicted masks, summed over the filters of a layer, averaged over the layers.

  `(1 / L) sum_l sum_j (max(P, 0) - P g + log(1 + exp(-|P|)))` with logits `P_lj` and targets `g_lj`.

  >>> import jax.numpy as jnp
  >>> loss = mask_prediction_loss([jnp.zeros((2, 3)), jnp.zeros((2, 1))], [jnp.ones((2, 3)), jnp.ones((2, 1))])
  >>> [round(value, 4) for value in loss.tolist()]
  [1.3863, 1.3863]

  Args:
    logits: pytree with an array per layer, floating `[batch, filters]`.
    targets: pytree of the same structure and shapes, constants in [0, 1].

  Returns:
    `[batch]`, one value per example.

  Raises:
    ValueError: when there is no layer, or logits and targets do not fit.

  Reference: Elkerdawy, Elhoushi, Zhang, Ray, "Fire Together Wire Together: A Dynamic Pruning Approach with
    Self-Supervised Mask Prediction", CVPR 2022, the mask loss; reductions as in the official code.
  """
  pairs = _layer_pairs(logits, targets)
  total = 0.0
  for scores, target in pairs:
    wide = jnp.asarray(scores, jnp.promote_types(scores.dtype, jnp.float32))
    goal = jax.lax.stop_gradient(jnp.asarray(target, wide.dtype))
    total = total + jnp.sum(optax.sigmoid_binary_cross_entropy(wide, goal), axis=-1)
  return (total / len(pairs)).astype(pairs[0][0].dtype)


def mask_accuracy(logits, targets) -> jax.Array:
  """The share of filters whose mask is predicted right, averaged over filters, then over layers.

  >>> import jax.numpy as jnp
  >>> mask_accuracy([jnp.array([[1.0, -1.0]])], [jnp.array([[1.0, 1.0]])]).tolist()
  [0.5]

  Args:
    logits: pytree with an array per layer, floating `[batch, filters]`.
    targets: pytree of the same structure and shapes, of zeros and ones.

  Returns:
    `[batch]` float32, one value per example.

  Raises:
    ValueError: when there is no layer, or logits and targets do not fit.

  Reference: Elkerdawy, Elhoushi, Zhang, Ray, "Fire Together Wire Together: A Dynamic Pruning Approach with
    Self-Supervised Mask Prediction", CVPR 2022, as in the official code.
  """
  pairs = _layer_pairs(logits, targets)

  def right(scores, target):
    unknown = jnp.isnan(scores) | jnp.isnan(target)
    return jnp.mean(jnp.where(unknown, jnp.nan, (scores > 0) == (target > 0.5)), axis=-1, dtype=jnp.float32)

  return sum(right(*pair) for pair in pairs) / len(pairs)


class MaskHead(nn.Module):
  """Predicts the mask of a layer from its input: pooling over space, a softmax over channels, a linear map.

  The softmax is about `1 / channels` everywhere, which makes gradients small: give heads a large learning rate of their
  own. With one channel it is constant, and only the bias learns.

  >>> import jax, jax.numpy as jnp
  >>> head = MaskHead(filters=5)
  >>> head.init_with_output(jax.random.key(0), jnp.ones((2, 4, 4, 3)))[0].shape
  (2, 5)

  Attributes:
    filters: number of filters to predict.
    pool: `max` as in the paper's figure, or `mean` as in the released code.

  Reference: Elkerdawy, Elhoushi, Zhang, Ray, "Fire Together Wire Together: A Dynamic Pruning Approach with
    Self-Supervised Mask Prediction", CVPR 2022, the prediction head.
  """

  filters: int
  pool: str = "max"

  @nn.compact
  def __call__(self, inputs: ArrayLike) -> jax.Array:
    """Logits `[batch, filters]` of inputs `[batch, ..., channels]`."""
    _check_feature_maps(inputs)
    if self.pool not in POOLS:
      raise ValueError(f"pool must be one of {', '.join(POOLS)}, got {self.pool!r}.")
    wide = inputs.astype(jnp.promote_types(inputs.dtype, jnp.float32))
    pooled = POOLS[self.pool](wide, axis=tuple(range(1, inputs.ndim - 1)))
    return nn.Dense(self.filters, name="linear")(jax.nn.softmax(pooled).astype(inputs.dtype))


class MaskedConv(nn.Module):
  """A convolution with batch normalisation and activation whose filters are switched per example by a `MaskHead`.

  `O = activation(norm(conv(inputs)))`, output `O * mask`. When the collection `pruning` is mutable it sows there
  `logits` (of the head), `targets` (of the unmasked `O`, so that pruned filters can return) and `mask`,
  `[batch, filters]` each.

  >>> import functools, jax, jax.numpy as jnp
  >>> layer, images = MaskedConv(filters=8), jax.random.normal(jax.random.key(0), (2, 6, 6, 3))
  >>> target = functools.partial(mass_mask, mass=0.9)
  >>> variables = layer.init(jax.random.key(1), images, target=target, train=False)
  >>> outputs, new = layer.apply(variables, images, target=target, train=True, mutable=["batch_stats", "pruning"])
  >>> outputs.shape, sorted(new["pruning"])
  ((2, 6, 6, 8), ['logits', 'mask', 'targets'])

  Attributes:
    filters: number of filters.
    kernel_size: in pixels.
    strides: in pixels.
    padding: as flax's.
    groups: of channels, as flax's `feature_group_count`.
    activation: applied after the normalisation and the shortcut.
    pool: of the head.
    mode: `decoupled`: the head sees its input as a constant, so that its errors do not change earlier layers, or
      `joint`. In both, when training, the task's loss reaches the head through the mask.
    axis_name: the mapped axis over which batch statistics are averaged, or None.
    conv_general_dilated: what convolves; `layers.loop_conv_general_dilated` trains faster in a loop on a CPU.

  Reference: Elkerdawy, Elhoushi, Zhang, Ray, "Fire Together Wire Together: A Dynamic Pruning Approach with
    Self-Supervised Mask Prediction", CVPR 2022, the pipeline figure.
  """

  filters: int
  kernel_size: tuple[int, int] = (3, 3)
  strides: int = 1
  padding: str | tuple = "SAME"
  groups: int = 1
  activation: Callable = nn.relu
  pool: str = "max"
  mode: str = "decoupled"
  axis_name: str | None = None
  conv_general_dilated: Callable = jax.lax.conv_general_dilated

  @nn.compact
  def __call__(
    self,
    inputs: ArrayLike,
    *,
    target: Callable[[jax.Array], jax.Array],
    train: bool,
    masks: str = "head",
    shortcut: ArrayLike | None = None,
  ) -> jax.Array:
    """The masked output.

    Args:
      inputs: floating `[batch, height, width, channels]`, as masked by the layer before.
      target: function of the unmasked output that gives the mask to predict: `mass_mask` at some mass.
      train: whether the batch's statistics are used and remembered.
      masks: which ones are applied: the `head`'s, the `target` itself (the oracle), or `none`; static.
      shortcut: added before the activation; None leaves a residual branch to be added, and counted, outside.

    Returns:
      `[batch, height', width', filters]`.
    """
    for name, value, known in (("masks", masks, MASKS), ("mode", self.mode, MODES)):
      if value not in known:
        raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}.")
    conv = nn.Conv(
      self.filters, self.kernel_size, self.strides, self.padding, feature_group_count=self.groups, use_bias=False,
      conv_general_dilated=self.conv_general_dilated, name="conv",
    )  # fmt: skip
    norm = nn.BatchNorm(
      use_running_average=not train, momentum=0.9, epsilon=NORM_EPSILON, axis_name=self.axis_name, name="norm"
    )
    hidden = norm(conv(inputs))
    full = self.activation(hidden if shortcut is None else hidden + shortcut)
    seen = jax.lax.stop_gradient(inputs) if self.mode == "decoupled" else inputs
    logits = MaskHead(self.filters, self.pool, name="head")(seen)
    targets = jax.lax.stop_gradient(target(full))
    # As in the official code, the task's loss reaches the heads in training only.
    predicted = straight_through_mask(logits) if train else jax.lax.stop_gradient(straight_through_mask(logits))
    mask = {"head": predicted, "target": targets, "none": jnp.ones_like(targets)}[masks]
    if not self.is_initializing():
      for name, value in (("logits", logits), ("targets", targets), ("mask", mask)):
        self.sow("pruning", name, value, reduce_fn=lambda _, new: new, init_fn=lambda: None)
    return full * mask[:, None, None, :].astype(full.dtype)


def _check_feature_maps(feature_maps):
  check_float("feature_maps", feature_maps)
  if jnp.ndim(feature_maps) < 2:
    raise ValueError(f"feature_maps must have the axes [batch, ..., filters], got shape {jnp.shape(feature_maps)}.")


def _shares(feature_maps):
  """Each filter's share of an example's activation, `[batch, filters]`; zeros where nothing fired."""
  maps = jax.lax.stop_gradient(feature_maps)
  maps = maps.astype(jnp.promote_types(maps.dtype, jnp.float32))
  strengths = jnp.max(jnp.abs(maps), axis=tuple(range(1, maps.ndim - 1)))
  total = jnp.sum(strengths, axis=-1, keepdims=True)
  return strengths / jnp.where(total == 0, 1, total)


def _as_mask(kept, inputs, dtype):
  """Zeros and ones, and NaN where the inputs are."""
  return jnp.where(jnp.isnan(inputs), jnp.nan, kept).astype(dtype)


def _layer_pairs(logits, targets):
  """The logits and targets of each layer."""
  structures = jax.tree.structure(logits), jax.tree.structure(targets)
  if structures[0] != structures[1] or not structures[0].num_leaves:
    raise ValueError(f"logits and targets must have the same layers, got {structures[0]} and {structures[1]}.")
  pairs = list(zip(jax.tree.leaves(logits), jax.tree.leaves(targets)))
  for scores, target in pairs:
    check_float("logits", scores)
    if jnp.ndim(scores) != 2 or jnp.shape(scores) != jnp.shape(target):
      raise ValueError(
        f"targets must have the shape of the logits, [batch, filters], got {jnp.shape(target)} for {jnp.shape(scores)}."
      )
  return pairs
