"""What to add: penalties on weights, with their proximal operators."""

from jaxreg.regularizers.group_sparsity import (
  group_lasso,
  prox_group_lasso,
  prox_wgsef,
  wgsef,
  wgsef_conjugate,
  wgsef_minimizer,
)
from jaxreg.regularizers.groups import freeze_support, group_ids, group_norms, resolve_groups, scale_groups, sum_groups
from jaxreg.regularizers.orthogonal_conv import (
  orthogonal_conv_defect_norm,
  orthogonal_conv_exists,
  orthogonal_conv_offset,
  orthogonal_conv_penalty,
  orthogonal_conv_taps,
  orthogonal_dense_penalty,
  orthogonal_penalty,
)
from jaxreg.regularizers.unsquared_norm import unsquared_norm_penalty
from jaxreg.regularizers.weight_distribution import kurtosis_penalty, skewness_penalty, weight_distribution_penalty

__all__ = [
  "freeze_support",
  "group_ids",
  "group_lasso",
  "group_norms",
  "kurtosis_penalty",
  "orthogonal_conv_defect_norm",
  "orthogonal_conv_exists",
  "orthogonal_conv_offset",
  "orthogonal_conv_penalty",
  "orthogonal_conv_taps",
  "orthogonal_dense_penalty",
  "orthogonal_penalty",
  "prox_group_lasso",
  "prox_wgsef",
  "resolve_groups",
  "scale_groups",
  "skewness_penalty",
  "sum_groups",
  "unsquared_norm_penalty",
  "weight_distribution_penalty",
  "wgsef",
  "wgsef_conjugate",
  "wgsef_minimizer",
]
