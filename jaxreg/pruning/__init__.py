"""What to leave out: filters switched per image, convolutions without them, their cost, and smaller networks."""

from jaxreg.pruning.compaction import compact, compact_pair, compact_variables
from jaxreg.pruning.dynamic_pruning import (
  MaskedConv,
  MaskHead,
  mask_accuracy,
  mask_prediction_loss,
  mass_mask,
  straight_through_mask,
  uniform_mask,
)
from jaxreg.pruning.gathered import gathered_conv, gathered_masked_conv, gathered_sizes
from jaxreg.pruning.pruned_flops import (
  ConvCost,
  dense_flops,
  dynamic_flops,
  mask_head_flops,
  official_dynamic_flops,
  oracle_flops,
)

__all__ = [
  "ConvCost",
  "MaskHead",
  "MaskedConv",
  "compact",
  "compact_pair",
  "compact_variables",
  "dense_flops",
  "dynamic_flops",
  "gathered_conv",
  "gathered_masked_conv",
  "gathered_sizes",
  "mask_accuracy",
  "mask_head_flops",
  "mask_prediction_loss",
  "mass_mask",
  "official_dynamic_flops",
  "oracle_flops",
  "straight_through_mask",
  "uniform_mask",
]
