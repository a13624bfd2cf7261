"""How to step: optax gradient transformations."""

from jaxreg.transforms.orthogonal_gradient import orthogonal, orthogonalize_gradients
from jaxreg.transforms.penalize import PenalizeState, penalize
from jaxreg.transforms.proximal import ProximalState, half_space_projection, proximal

__all__ = [
  "PenalizeState",
  "ProximalState",
  "half_space_projection",
  "orthogonal",
  "orthogonalize_gradients",
  "penalize",
  "proximal",
]
