"""What dynamically pruned convolutions cost, counted in multiplications per example, before and after training."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

__all__ = [
  "ConvCost",
  "dense_flops",
  "dynamic_flops",
  "mask_head_flops",
  "official_dynamic_flops",
  "oracle_flops",
]


class ConvCost(NamedTuple):
  """The sizes of a convolution that its cost depends on, Python integers.

  Attributes:
    inputs: channels.
    outputs: filters.
    taps: of the kernel, height × width.
    positions: pixels of the output, height × width.
    groups: of channels.
  """

  inputs: int
  outputs: int
  taps: int
  positions: int
  groups: int = 1


def dense_flops(costs: Sequence[ConvCost]) -> int:
  """Multiplications per example of convolutions that are computed whole.

  >>> dense_flops([ConvCost(inputs=1, outputs=8, taps=9, positions=64), ConvCost(8, 16, 9, 16)])
  23040

  Args:
    costs: of the layers.

  Returns:
    A Python int.

  Reference: Elkerdawy, Elhoushi, Zhang, Ray, "Fire Together Wire Together: A Dynamic Pruning Approach with
    Self-Supervised Mask Prediction", CVPR 2022; the official code adds the classifier to this total alone.
  """
  return sum(cost.outputs * cost.positions * cost.taps * (cost.inputs // cost.groups) for cost in costs)


def dynamic_flops(
  active: Sequence[ArrayLike], costs: Sequence[ConvCost], *, active_inputs: Sequence[ArrayLike | None] | None = None
) -> jax.Array:
  """Multiplications per example of convolutions of which only the active filters, on active inputs, are computed.

  `sum_l outputs_l positions_l taps_l inputs_l` with the numbers of active filters and active input channels. With
  groups, which inputs an output needs is not known from numbers: all of its group count, exact for depthwise layers.

  >>> import jax.numpy as jnp
  >>> costs = [ConvCost(inputs=1, outputs=8, taps=9, positions=64), ConvCost(8, 16, 9, 16)]
  >>> dynamic_flops([jnp.array([8, 4]), jnp.array([16, 8])], costs).tolist()
  [23040.0, 6912.0]

  Args:
    active: number of active filters of each layer, `[batch]`.
    costs: of the layers, in order.
    active_inputs: number of input channels of each layer that are not zero, `[batch]`. None, for one layer or all, is
      what the layer before has active (all, for the first one). After a residual addition it is the size of the union
      of the mask and the shortcut's channels.

  Returns:
    `[batch]`, float32 at least.

  Raises:
    ValueError: when the numbers of layers differ.

  Reference: Elkerdawy, Elhoushi, Zhang, Ray, "Fire Together Wire Together: A Dynamic Pruning Approach with
    Self-Supervised Mask Prediction", CVPR 2022, the FLOPs per input; unlike the official code, depthwise and residual
    layers cost what they need.
  """
  given = [None] * len(costs) if active_inputs is None else active_inputs
  _check_lengths(active=active, costs=costs, active_inputs=given)
  total, previous = 0.0, None
  for count, cost, inputs in zip(active, costs, given):
    if inputs is None:
      inputs = cost.inputs if previous is None else previous
    per_output = inputs if cost.groups == 1 else cost.inputs // cost.groups
    total = total + _wide(count) * per_output * (cost.positions * cost.taps)
    previous = count
  return total


def official_dynamic_flops(active: Sequence[ArrayLike], costs: Sequence[ConvCost]) -> jax.Array:
  """The count of the official code, for comparison with the paper's tables; optimistic for two kinds of layers.

  Its number of input channels is `floor(active filters of the layer before / groups)`: 0 for a depthwise layer as soon
  as one channel is off, and blind to channels that a shortcut fills again.

  >>> import jax.numpy as jnp
  >>> costs = [ConvCost(inputs=1, outputs=8, taps=9, positions=64), ConvCost(8, 8, 9, 64, groups=8)]
  >>> official_dynamic_flops([jnp.array([8, 7]), jnp.array([8, 8])], costs).tolist()
  [9216.0, 4032.0]

  Args:
    active: number of active filters of each layer, `[batch]`.
    costs: of the layers, in order.

  Returns:
    `[batch]`, float32 at least.

  Raises:
    ValueError: when the numbers of layers differ.

  Reference: Elkerdawy, Elhoushi, Zhang, Ray, "Fire Together Wire Together: A Dynamic Pruning Approach with
    Self-Supervised Mask Prediction", CVPR 2022, as in the official code.
  """
  _check_lengths(active=active, costs=costs)
  total, previous = 0.0, costs[0].inputs
  for count, cost in zip(active, costs):
    total = total + _wide(count) * jnp.floor(_wide(previous) / cost.groups) * (cost.positions * cost.taps)
    previous = count
  return total


def mask_head_flops(costs: Sequence[ConvCost], input_positions: Sequence[int]) -> int:
  """Operations per example of the heads: pooling of the input and a linear map; not in the other counts.

  >>> mask_head_flops([ConvCost(inputs=8, outputs=16, taps=9, positions=16)], [64])
  640

  Args:
    costs: of the layers.
    input_positions: pixels of each layer's input.

  Returns:
    A Python int.

  Raises:
    ValueError: when the numbers of layers differ.

  Reference: Elkerdawy, Elhoushi, Zhang, Ray, "Fire Together Wire Together: A Dynamic Pruning Approach with
    Self-Supervised Mask Prediction", CVPR 2022, the prediction head.
  """
  _check_lengths(costs=costs, input_positions=input_positions)
  return sum(cost.inputs * (cost.outputs + pixels) for cost, pixels in zip(costs, input_positions))


def oracle_flops(
  active_at: Callable[[jax.Array], Sequence[jax.Array]], masses: ArrayLike, costs: Sequence[ConvCost]
) -> jax.Array:
  """The budget before any training: the share of multiplications that the targets themselves would leave, per mass.

  >>> import jax.numpy as jnp
  >>> from jaxreg.pruning.dynamic_pruning import mass_mask
  >>> maps = jnp.array([[4.0, 3.0, 2.0, 1.0]])
  >>> active_at = lambda mass: [mass_mask(maps, mass=mass).sum(-1)]
  >>> oracle_flops(active_at, jnp.array([0.5, 0.8]), [ConvCost(1, 4, 9, 1)]).tolist()
  [0.25, 0.5]

  Args:
    active_at: from a mass to the numbers of active filters of each layer, `[batch]`, of the trained network with
      `masks="target"`.
    masses: `[masses]`.
    costs: of the layers, in order.

  Returns:
    `[masses]`, the mean over the batch relative to the dense layers, float32 at least.

  Reference: Elkerdawy, Elhoushi, Zhang, Ray, "Fire Together Wire Together: A Dynamic Pruning Approach with
    Self-Supervised Mask Prediction", CVPR 2022, the FLOPs reduction estimated before training.
  """
  share = lambda mass: jnp.mean(dynamic_flops(active_at(mass), costs)) / dense_flops(costs)
  return jax.lax.map(share, jnp.asarray(masses))


def _check_lengths(**sequences):
  lengths = {name: len(values) for name, values in sequences.items()}
  if len(set(lengths.values())) > 1 or 0 in lengths.values():
    listed = ", ".join(f"{name} {length}" for name, length in lengths.items())
    raise ValueError(f"there must be one entry per layer, at least one, got {listed}.")


def _wide(count):
  return jnp.asarray(count, jnp.promote_types(jnp.result_type(count), jnp.float32))
