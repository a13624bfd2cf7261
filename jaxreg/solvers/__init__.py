"""Iterative algorithms that are the method; what needs diffrax is imported when it is first used."""

import importlib
from typing import TYPE_CHECKING

from jaxreg.solvers.adaptive_sampling import (
  Derivatives,
  OptimalAdversary,
  aas_pinn_loss,
  aas_sampler_loss,
  das_cross_entropy_loss,
  laplacian,
  log_density_and_score,
  normalize_squared_residuals,
  optimal_adversary_1d,
  sample_in_box,
  tanh_network_derivatives,
)
from jaxreg.solvers.adversarial_mdp import (
  EpisodeResult,
  LinearMDP,
  best_policy_in_hindsight,
  exact_visits,
  linear_mdp,
  occupancy,
  optimize_policy,
  policy_values,
  simulated_visits,
)
from jaxreg.solvers.balanced_assignment import sinkhorn_assignment
from jaxreg.solvers.conjugate_directions import ConjugateDirectionsResult, solve_conjugate_directions
from jaxreg.solvers.factored_output import (
  FactoredState,
  center_factored,
  decay_factored,
  factored_init,
  factored_sgd_step,
  factored_statistics,
  factored_value_and_grad,
  factored_weights,
  stabilize_factored,
  unfactorize,
)
from jaxreg.solvers.follow_the_regularized_leader import ftrl_entropy, ftrl_log_barrier
from jaxreg.solvers.lanczos import LanczosResult, lanczos_decomposition, ritz_pairs, ritz_right_hand_sides
from jaxreg.solvers.linear_q_estimation import (
  dilated_bonus,
  linear_q_estimate,
  magnitude_reduced_q_estimate,
  matrix_geometric_resampling,
  quadratic_bonus,
  ridge_inverse_covariance,
)
from jaxreg.solvers.peak_equations import PeakEquation, cubic_peak_equation, poisson_peak_equation, two_peaks_equation
from jaxreg.solvers.poisson import poisson_matvec
from jaxreg.solvers.projections import sparse_simplex_projection
from jaxreg.solvers.self_tuning import (
  Hyperparameter,
  SelfTuner,
  SelfTuningState,
  Tuning,
  constrain_hyperparameters,
  perturb_hyperparameters,
  perturbation_entropy,
  response_inputs,
  self_tuner,
  tuning_init,
  unconstrain_hyperparameter,
)
from jaxreg.solvers.sinkhorn import sinkhorn_plan, sinkhorn_potentials
from jaxreg.solvers.sparse_transport import (
  SparseTransportResult,
  repair_sparse_transport,
  solve_sparse_transport,
  solve_sparse_transport_dual,
  sparse_conjugate,
  sparse_max,
  sparse_transport_dual,
  sparse_transport_plan,
  sparse_transport_semidual,
)
from jaxreg.solvers.taylor_regularization import solution_derivative

__all__ = [
  "ConjugateDirectionsResult",
  "Derivatives",
  "EpisodeResult",
  "FactoredState",
  "HeuristicSolver",
  "Hyperparameter",
  "LanczosResult",
  "LinearMDP",
  "OptimalAdversary",
  "PeakEquation",
  "SelfTuner",
  "SelfTuningState",
  "SolverCost",
  "SparseTransportResult",
  "Tuning",
  "aas_pinn_loss",
  "aas_sampler_loss",
  "best_policy_in_hindsight",
  "center_factored",
  "combined_cost",
  "constrain_hyperparameters",
  "cubic_peak_equation",
  "das_cross_entropy_loss",
  "decay_factored",
  "dilated_bonus",
  "exact_visits",
  "factored_init",
  "factored_sgd_step",
  "factored_statistics",
  "factored_value_and_grad",
  "factored_weights",
  "ftrl_entropy",
  "ftrl_log_barrier",
  "lanczos_decomposition",
  "laplacian",
  "linear_mdp",
  "linear_q_estimate",
  "log_density_and_score",
  "magnitude_reduced_q_estimate",
  "matrix_geometric_resampling",
  "normalize_squared_residuals",
  "occupancy",
  "optimal_adversary_1d",
  "optimize_policy",
  "perturb_hyperparameters",
  "perturbation_entropy",
  "poisson_matvec",
  "poisson_peak_equation",
  "policy_values",
  "quadratic_bonus",
  "repair_sparse_transport",
  "response_inputs",
  "ridge_inverse_covariance",
  "ritz_pairs",
  "ritz_right_hand_sides",
  "sample_in_box",
  "self_tuner",
  "simulated_visits",
  "sinkhorn_assignment",
  "sinkhorn_plan",
  "sinkhorn_potentials",
  "solution_derivative",
  "solve_conjugate_directions",
  "solve_sparse_transport",
  "solve_sparse_transport_dual",
  "solve_with_cost",
  "sparse_conjugate",
  "sparse_max",
  "sparse_simplex_projection",
  "sparse_transport_dual",
  "sparse_transport_plan",
  "sparse_transport_semidual",
  "stability_size",
  "stabilize_factored",
  "tanh_network_derivatives",
  "tuning_init",
  "two_peaks_equation",
  "unconstrain_hyperparameter",
  "unfactorize",
]

if TYPE_CHECKING:
  from jaxreg.solvers.solver_cost import HeuristicSolver, SolverCost, combined_cost, solve_with_cost, stability_size
else:

  def __getattr__(name: str):
    if name in ("HeuristicSolver", "SolverCost", "combined_cost", "solve_with_cost", "stability_size"):
      return getattr(importlib.import_module("jaxreg.solvers.solver_cost"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
