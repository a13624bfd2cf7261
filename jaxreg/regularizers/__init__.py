"""What to add: penalties on weights, with their proximal operators, and on how environments differ."""

from jaxreg.regularizers.domain_inconsistency import inconsistency_penalty
from jaxreg.regularizers.environment_penalties import (
  coral_penalty,
  environment_risks,
  iga_penalty,
  irm_penalty,
  mmd_penalty,
  vrex_penalty,
)
from jaxreg.regularizers.group_sparsity import (
  group_lasso,
  prox_group_lasso,
  prox_wgsef,
  wgsef,
  wgsef_conjugate,
  wgsef_minimizer,
)
from jaxreg.regularizers.groups import freeze_support, group_ids, group_norms, resolve_groups, scale_groups, sum_groups
from jaxreg.regularizers.head_alignment import (
  FishrState,
  fishr_init,
  fishr_penalty,
  hgp_penalty,
  hutchinson_penalty,
  rademacher_probes,
)
from jaxreg.regularizers.linear_head import (
  head_gradient,
  head_gradient_square_norms,
  head_gradient_variance,
  head_hessian_diagonal,
  head_hessian_product,
)
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
  "FishrState",
  "coral_penalty",
  "environment_risks",
  "fishr_init",
  "fishr_penalty",
  "freeze_support",
  "group_ids",
  "group_lasso",
  "group_norms",
  "head_gradient",
  "head_gradient_square_norms",
  "head_gradient_variance",
  "head_hessian_diagonal",
  "head_hessian_product",
  "hgp_penalty",
  "hutchinson_penalty",
  "iga_penalty",
  "inconsistency_penalty",
  "irm_penalty",
  "kurtosis_penalty",
  "mmd_penalty",
  "orthogonal_conv_defect_norm",
  "orthogonal_conv_exists",
  "orthogonal_conv_offset",
  "orthogonal_conv_penalty",
  "orthogonal_conv_taps",
  "orthogonal_dense_penalty",
  "orthogonal_penalty",
  "prox_group_lasso",
  "prox_wgsef",
  "rademacher_probes",
  "resolve_groups",
  "scale_groups",
  "skewness_penalty",
  "sum_groups",
  "unsquared_norm_penalty",
  "vrex_penalty",
  "weight_distribution_penalty",
  "wgsef",
  "wgsef_conjugate",
  "wgsef_minimizer",
]
