"""What to add: penalties on weights, with their proximal operators."""

from jaxreg.regularizers.group_sparsity import (
  compact,
  compact_pair,
  freeze_support,
  group_ids,
  group_lasso,
  group_norms,
  prox_group_lasso,
  prox_wgsef,
  resolve_groups,
  scale_groups,
  sum_groups,
  wgsef,
  wgsef_conjugate,
  wgsef_minimizer,
)
from jaxreg.regularizers.unsquared_norm import unsquared_norm_penalty

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
  "unsquared_norm_penalty",
  "wgsef",
  "wgsef_conjugate",
  "wgsef_minimizer",
]
