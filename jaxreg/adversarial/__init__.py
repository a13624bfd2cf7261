"""Attacks, robustness and the geometry of decision boundaries; attacks take the model's apply function."""

from jaxreg.adversarial.attacks import fgsm, pgd, pgd_survival
from jaxreg.adversarial.barrier import fast_bat_loss, implicit_adversarial_loss, log_barrier_attack
from jaxreg.adversarial.boundary import (
  adversarial_distance,
  adversarial_strength,
  centroid_normal,
  deviation_angle,
  error_distance,
  local_distances,
  mirror_images,
  projected_images,
  signed_distances,
  tilted_normal,
  tilting_plane,
)
from jaxreg.adversarial.crafted_domain import craft_domain, craft_style, sharpness_aware_loss
from jaxreg.adversarial.linear_path import RegularizationPath, regularization_path
from jaxreg.adversarial.objectives import dlr_objective, margin_objective
from jaxreg.adversarial.reweighting import (
  LogMeanExpState,
  gairat_weights,
  kl_dro_loss,
  kl_dro_weights,
  log_mean_exp_init,
  log_mean_exp_update,
  mail_weights,
)
from jaxreg.adversarial.strong_attacks import apgd, attack_battery, random_search_attack
from jaxreg.adversarial.wasserstein import (
  logistic_robust_loss,
  ramp_robust_loss,
  robust_loss,
  robust_self_training_loss,
)

__all__ = [
  "LogMeanExpState",
  "RegularizationPath",
  "adversarial_distance",
  "adversarial_strength",
  "apgd",
  "attack_battery",
  "centroid_normal",
  "craft_domain",
  "craft_style",
  "deviation_angle",
  "dlr_objective",
  "error_distance",
  "fast_bat_loss",
  "fgsm",
  "gairat_weights",
  "implicit_adversarial_loss",
  "kl_dro_loss",
  "kl_dro_weights",
  "local_distances",
  "log_barrier_attack",
  "log_mean_exp_init",
  "log_mean_exp_update",
  "logistic_robust_loss",
  "mail_weights",
  "margin_objective",
  "mirror_images",
  "pgd",
  "pgd_survival",
  "projected_images",
  "ramp_robust_loss",
  "random_search_attack",
  "regularization_path",
  "sharpness_aware_loss",
  "signed_distances",
  "tilted_normal",
  "tilting_plane",
  "robust_loss",
  "robust_self_training_loss",
]
