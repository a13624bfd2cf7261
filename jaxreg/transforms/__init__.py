"""How to step: optax gradient transformations."""

from jaxreg.transforms.aligned_gradients import align_gradients, aligned_value_and_grad
from jaxreg.transforms.gradient_matching import FishState, fish
from jaxreg.transforms.orthogonal_gradient import orthogonal, orthogonalize_gradients
from jaxreg.transforms.penalties import PenalizeState, penalize
from jaxreg.transforms.proximal_steps import ProximalState, half_space_projection, proximal
from jaxreg.transforms.sharpness import gam, sagm, sam, udim_value_and_grad
from jaxreg.transforms.state_reset import ResetState, reset_at
from jaxreg.transforms.weight_compander import CompandWeightsState, compand_weights

__all__ = [
  "FishState",
  "PenalizeState",
  "ProximalState",
  "ResetState",
  "CompandWeightsState",
  "align_gradients",
  "aligned_value_and_grad",
  "compand_weights",
  "fish",
  "gam",
  "half_space_projection",
  "orthogonal",
  "orthogonalize_gradients",
  "penalize",
  "proximal",
  "reset_at",
  "sagm",
  "sam",
  "udim_value_and_grad",
]
