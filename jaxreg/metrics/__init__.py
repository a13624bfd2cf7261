"""What to measure: pure functions of logits, gradients and parameters."""

from jaxreg.metrics.classification import (
  MemorizationFractions,
  area_under_roc,
  balanced_top_k_accuracy,
  memorization_fractions,
  top_k_accuracy,
)
from jaxreg.metrics.grokking import (
  nlm_alignment,
  nlm_direction,
  softmax_collapse_fraction,
  tensor_norms,
  zero_loss_fraction,
)
from jaxreg.metrics.sample_complexity import min_samples_to, probe_sample_curve

__all__ = [
  "MemorizationFractions",
  "area_under_roc",
  "balanced_top_k_accuracy",
  "memorization_fractions",
  "min_samples_to",
  "nlm_alignment",
  "nlm_direction",
  "probe_sample_curve",
  "softmax_collapse_fraction",
  "tensor_norms",
  "top_k_accuracy",
  "zero_loss_fraction",
]
