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
from jaxreg.metrics.sample_complexity import min_samples_to, probe_sample_curve
from jaxreg.metrics.weights import WeightMoments, WeightStats, weight_moments, weight_stats

__all__ = [
  "GrokkingGap",
  "MemorizationFractions",
  "OrthogonalityError",
  "ScaledChi2",
  "WeightMoments",
  "WeightStats",
  "area_under_roc",
  "balanced_top_k_accuracy",
  "bootstrap_inductive_bias",
  "certified_radius",
  "conv_singular_values",
  "encoded_inductive_bias",
  "fit_scaled_chi2",
  "grokking_gap",
  "isometry_bounds",
  "kernel_alignment",
  "kernel_difficulty",
  "memorization_fractions",
  "min_samples_to",
  "nlm_alignment",
  "nlm_direction",
  "orthogonality_error",
  "orthogonality_spectral_constant",
  "probe_sample_curve",
  "relative_motion",
  "required_inductive_bias",
  "sample_network_errors",
  "sankaran_inductive_bias",
  "scaled_chi2_inductive_bias",
  "softmax_collapse_fraction",
  "tensor_norms",
  "top_k_accuracy",
  "weight_moments",
  "weight_stats",
  "zero_loss_fraction",
]
