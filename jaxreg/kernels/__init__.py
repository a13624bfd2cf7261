"""Theory in closed form: pure functions on arrays."""

from jaxreg.kernels.bagged_regression import (
  aggregate_fixed_point,
  aggregate_risk,
  effective_noise,
  interpolated_ridge,
  optimal_bag_size,
  optimal_instance_bag_size,
  optimal_rho,
)

__all__ = [
  "aggregate_fixed_point",
  "aggregate_risk",
  "effective_noise",
  "interpolated_ridge",
  "optimal_bag_size",
  "optimal_instance_bag_size",
  "optimal_rho",
]
