"""What to measure: pure functions of logits, gradients and parameters."""

from jaxreg.metrics.classification import (
  MemorizationFractions,
  area_under_roc,
  balanced_top_k_accuracy,
  memorization_fractions,
  top_k_accuracy,
)
from jaxreg.metrics.conv_spectrum import (
  OrthogonalityError,
  certified_radius,
  conv_singular_values,
  isometry_bounds,
  orthogonality_error,
  orthogonality_spectral_constant,
)
from jaxreg.metrics.gaussian_probe import (
  GaussianStats,
  empty_stats,
  gaussian_scores,
  gaussian_stats,
  merge_stats,
  stats_to_linear,
)
from jaxreg.metrics.grokking import (
  nlm_alignment,
  nlm_direction,
  softmax_collapse_fraction,
  tensor_norms,
  zero_loss_fraction,
)
from jaxreg.metrics.inductive_bias import (
  ScaledChi2,
  bootstrap_inductive_bias,
  encoded_inductive_bias,
  fit_scaled_chi2,
  required_inductive_bias,
  sample_network_errors,
  sankaran_inductive_bias,
  scaled_chi2_inductive_bias,
)
from jaxreg.metrics.lazy_rich import GrokkingGap, grokking_gap, kernel_alignment, kernel_difficulty, relative_motion
from jaxreg.metrics.linear_probe import (
  LinearProbe,
  MinMaxScaling,
  logistic_probe,
  minmax_scale,
  minmax_scaling,
  probe_logits,
)
from jaxreg.metrics.network_cost import LayerCost, NetworkCost, assign_bits, layer_table, quant_cost
from jaxreg.metrics.noncentral_chi2 import log_gammainc, noncentral_chi2_logcdf, noncentral_chi2_logpdf
from jaxreg.metrics.pareto import best_within_cost, pareto_front
from jaxreg.metrics.sample_complexity import min_samples_to, probe_sample_curve
from jaxreg.metrics.weights import WeightMoments, WeightStats, he_deviation, input_axes, weight_moments, weight_stats

__all__ = [
  "GaussianStats",
  "GrokkingGap",
  "LayerCost",
  "LinearProbe",
  "MemorizationFractions",
  "MinMaxScaling",
  "NetworkCost",
  "OrthogonalityError",
  "ScaledChi2",
  "WeightMoments",
  "WeightStats",
  "area_under_roc",
  "assign_bits",
  "balanced_top_k_accuracy",
  "best_within_cost",
  "bootstrap_inductive_bias",
  "certified_radius",
  "conv_singular_values",
  "empty_stats",
  "encoded_inductive_bias",
  "fit_scaled_chi2",
  "gaussian_scores",
  "gaussian_stats",
  "grokking_gap",
  "he_deviation",
  "input_axes",
  "isometry_bounds",
  "kernel_alignment",
  "kernel_difficulty",
  "layer_table",
  "log_gammainc",
  "logistic_probe",
  "memorization_fractions",
  "merge_stats",
  "min_samples_to",
  "minmax_scale",
  "minmax_scaling",
  "nlm_alignment",
  "nlm_direction",
  "noncentral_chi2_logcdf",
  "noncentral_chi2_logpdf",
  "orthogonality_error",
  "orthogonality_spectral_constant",
  "pareto_front",
  "probe_logits",
  "probe_sample_curve",
  "quant_cost",
  "relative_motion",
  "required_inductive_bias",
  "sample_network_errors",
  "sankaran_inductive_bias",
  "scaled_chi2_inductive_bias",
  "softmax_collapse_fraction",
  "stats_to_linear",
  "tensor_norms",
  "top_k_accuracy",
  "weight_moments",
  "weight_stats",
  "zero_loss_fraction",
]
