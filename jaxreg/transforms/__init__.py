"""How to step: optax gradient transformations."""

from jaxreg.transforms.orthogonal_gradient import orthogonal, orthogonalize_gradients
from jaxreg.transforms.penalties import PenalizeState, penalize
from jaxreg.transforms.proximal_steps import ProximalState, half_space_projection, proximal
from jaxreg.transforms.weight_compander import CompandWeightsState, compand_weights

__all__ = [
  "CompandWeightsState",
  "PenalizeState",
  "ProximalState",
  "compand_weights",
  "half_space_projection",
  "orthogonal",
  "orthogonalize_gradients",
  "penalize",
  "proximal",
]
