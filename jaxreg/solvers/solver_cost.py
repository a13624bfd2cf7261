"""What an adaptive differential equation solve costs, as a differentiable value: its error and stiffness estimates.

An adaptive solver estimates its local error at every step, and two of its stages may tell how stiff the equation is.
Added to a training loss these estimates lead to equations that need fewer steps. They are differentiated through the
solver's own steps, without any derivative of higher order.
"""

from typing import NamedTuple

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from jaxreg.checks import check_hyperparameter

__all__ = ["HeuristicSolver", "SolverCost", "combined_cost", "solve_with_cost", "stability_size"]


class SolverCost(NamedTuple):
  """The cost of one solve over its accepted steps; scalars in float32, or float64 if the solution is.

  With the step sizes `h_j`, the local errors `e_j` and the scaled errors
  `E_j = RMS(e_j / (atol + rtol max(|y_j|, |y_{j+1}|)))`. Gradients hold the step sizes that the controller chose fixed.
  """

  error_sum: jax.Array  # sum of E_j h_j
  squared_error_sum: jax.Array  # sum of RMS(e_j)^2, which knows no tolerance
  stiffness_sum: jax.Array | None  # sum of S_j, see solve_with_cost; None for a solver without this estimate
  stiffness_max: jax.Array | None  # max of S_j
  steps: jax.Array  # int32, accepted steps
  evaluations: jax.Array | None  # int32, of the vector field, also in rejected steps; None if not known

  @property
  def error_mean(self) -> jax.Array:
    """Mean of `E_j h_j` over the accepted steps; 0 without any."""
    return self.error_sum / jnp.maximum(self.steps, 1)

  @property
  def stiffness_mean(self) -> jax.Array | None:
    """Mean of `S_j` over the accepted steps, 0 without any; None for a solver without this estimate."""
    return None if self.stiffness_sum is None else self.stiffness_sum / jnp.maximum(self.steps, 1)


class _Totals(NamedTuple):
  error_sum: jax.Array
  squared_error_sum: jax.Array
  stiffness_sum: jax.Array | None  # None for a solver without this estimate
  stiffness_max: jax.Array | None


class HeuristicSolver(diffrax.AbstractWrappedSolver):
  """Any diffrax solver, with running totals of its estimates beside its state.

  A controller that rejects a step drops its state, and with it what the step added. `solve_with_cost` wraps and
  unwraps; use this class where `diffeqsolve` has to be called by other code.

  Attributes:
    solver: a solver that estimates its error.
    rtol: relative tolerance in the scaled error.
    atol: absolute tolerance in the scaled error.

  Reference: Pal, Ma, Shah, Rackauckas, "Opening the Blackbox: Accelerating Neural Differential Equations by
    Regularizing Internal Solver Heuristics", ICML 2021 (Section 3).
  """

  solver: diffrax.AbstractSolver
  rtol: float | jax.Array
  atol: float | jax.Array

  @property
  def term_structure(self):
    return self.solver.term_structure

  @property
  def interpolation_cls(self):
    return self.solver.interpolation_cls

  @property
  def term_compatible_contr_kwargs(self):
    return self.solver.term_compatible_contr_kwargs

  @property
  def scan_kind(self):  # DirectAdjoint sets it through this property
    return _innermost(self.solver).scan_kind

  @property
  def root_finder(self):  # of implicit solvers; diffeqsolve gives it the controller's tolerances through this property
    return _innermost(self.solver).root_finder

  @property
  def root_find_max_steps(self):
    return _innermost(self.solver).root_find_max_steps

  def order(self, terms):
    return self.solver.order(terms)

  def strong_order(self, terms):
    return self.solver.strong_order(terms)

  def error_order(self, terms):
    return self.solver.error_order(terms)

  def func(self, terms, t0, y0, args):
    return self.solver.func(terms, t0, y0, args)

  def init(self, terms, t0, t1, y0, args):
    zero = jnp.zeros((), _accumulator_dtype(y0))
    stiffness = None if _stages_at_one_time(self.solver, y0) is None else zero
    return self.solver.init(terms, t0, t1, y0, args), _Totals(zero, zero, stiffness, stiffness)

  def step(self, terms, t0, t1, y0, args, solver_state, made_jump):
    inner, totals = solver_state
    y1, error, dense, inner, result = self.solver.step(terms, t0, t1, y0, args, inner, made_jump)
    if error is None:
      raise ValueError(
        f"solver must estimate its error, got {self.solver!r}; diffrax.HalfSolver does it for explicit ones."
      )
    return y1, error, dense, (inner, self._add(totals, t1 - t0, y0, y1, error, dense)), result

  def _add(self, totals: _Totals, size, y0, y1, error, dense) -> _Totals:
    """The totals after a step."""
    dtype = _accumulator_dtype(y0)
    size = jnp.abs(size).astype(dtype)
    scaled = jax.tree.map(
      lambda e, a, b: e / (self.atol + self.rtol * jnp.maximum(jnp.abs(a), jnp.abs(b))), error, y0, y1
    )
    totals = totals._replace(
      error_sum=totals.error_sum + _root_mean_square(scaled, dtype) * size,
      squared_error_sum=totals.squared_error_sum + _root_mean_square(error, dtype) ** 2,
    )
    if totals.stiffness_sum is None:
      return totals
    stiffness = _stiffness(self.solver, dense, y0, size)
    return totals._replace(
      stiffness_sum=totals.stiffness_sum + stiffness,
      stiffness_max=jnp.maximum(totals.stiffness_max, stiffness),
    )


def solve_with_cost(
  terms,
  solver: diffrax.AbstractSolver,
  t0,
  t1,
  dt0,
  y0,
  args=None,
  *,
  saveat: diffrax.SaveAt | None = None,
  stepsize_controller: diffrax.AbstractStepSizeController | None = None,
  adjoint: diffrax.AbstractAdjoint | None = None,
  rtol: float | jax.Array | None = None,
  atol: float | jax.Array | None = None,
  **options,
) -> tuple[diffrax.Solution, SolverCost]:
  """`diffrax.diffeqsolve` that also returns what the solve cost, `sum_j E_j h_j` and the like, to be differentiated.

  The solution is the one that `diffeqsolve` finds. For explicit Runge-Kutta methods with two stages `i < j` at the same
  time (Tsit5, Dopri5, in float64 Dopri8) the cost has the stiffness estimates `S = |k_j - k_i| / |g_j - g_i|` of
  derivatives `k` at states `g`, a lower estimate of the largest eigenvalue of the vector field's Jacobian. A step so
  small that the two states differ by little more than rounding counts as 0: in float32 those with `h S` below about
  0.02. Dopri8's states are so close that in float32 all would be rounding, and it has no such estimate there.

  The default adjoint works under `jit`, `vmap` and sharded `jit`; under `pmap` and `shard_map` a gradient needs
  `diffrax.DirectAdjoint()`. Solve a batch as one state: mapped over its examples, a solve has steps of its own for
  each.

  >>> import diffrax, jax.numpy as jnp
  >>> solution, cost = solve_with_cost(diffrax.ODETerm(lambda t, y, args: -3.0 * y), diffrax.Tsit5(), 0.0, 1.0, 0.25,
  ...                                  jnp.ones(2), rtol=1e-3, atol=1e-6)
  >>> solution.ys.shape, int(cost.steps), round(float(cost.stiffness_mean), 2)
  ((1, 2), 4, 3.0)

  Args:
    terms: as in `diffeqsolve`, of an ODE or an SDE.
    solver: one that estimates its error.
    t0: start, scalar.
    t1: end, scalar.
    dt0: first step size, or None for the controller's choice.
    y0: the initial state, any pytree.
    args: passed to the vector field.
    saveat: as in `diffeqsolve`.
    stepsize_controller: as in `diffeqsolve`; default constant steps.
    adjoint: `RecursiveCheckpointAdjoint` (default), `DirectAdjoint` or `ForwardMode`: those that differentiate steps.
    rtol: relative tolerance in the scaled error, non-negative; default the controller's. May be traced.
    atol: absolute tolerance in the scaled error, positive; default the controller's. May be traced.
    **options: further arguments of `diffeqsolve` but `solver_state`; `max_steps` bounds the steps that reverse mode can
      go back.

  Returns:
    The solution and a `SolverCost`.

  Raises:
    ValueError: when the solver has no error estimate, the adjoint does not differentiate the steps, or a tolerance is
      outside its domain or unknown.

  Reference: Pal, Ma, Shah, Rackauckas, "Opening the Blackbox: Accelerating Neural Differential Equations by
    Regularizing Internal Solver Heuristics", ICML 2021, the regularizers R_E and R_S (Section 3).
  """
  adjoint = diffrax.RecursiveCheckpointAdjoint() if adjoint is None else adjoint
  if isinstance(adjoint, (diffrax.BacksolveAdjoint, diffrax.ImplicitAdjoint)):
    raise ValueError(f"adjoint must differentiate the solver's own steps, got {type(adjoint).__name__}.")
  controller = diffrax.ConstantStepSize() if stepsize_controller is None else stepsize_controller
  rtol, atol = _tolerances(controller, rtol, atol)
  wrapped = HeuristicSolver(solver, rtol, atol)
  saveat = diffrax.SaveAt(t1=True) if saveat is None else saveat
  solution = diffrax.diffeqsolve(
    terms,
    wrapped,
    t0,
    t1,
    dt0,
    y0,
    args,
    saveat=eqx.tree_at(lambda s: s.solver_state, saveat, True),
    stepsize_controller=controller,
    adjoint=adjoint,
    **options,
  )
  inner, totals = solution.solver_state
  cost = SolverCost(
    *totals,
    steps=jnp.asarray(solution.stats["num_accepted_steps"], jnp.int32),
    evaluations=_evaluations(solver, jnp.asarray(solution.stats["num_steps"], jnp.int32)),
  )
  shown = inner if saveat.solver_state else None
  return eqx.tree_at(lambda s: s.solver_state, solution, shown, is_leaf=lambda x: x is None), cost


def combined_cost(
  cost: SolverCost, *, stability_size: float | jax.Array, stiffness_weight: float | jax.Array = 0.1
) -> jax.Array:
  """Error and stiffness in one penalty, `mean_j E_j h_j + w mean_j S_j / stability_size`.

  >>> import jax.numpy as jnp
  >>> one = jnp.float32(1)
  >>> cost = SolverCost(3 * one, one, 4 * one, 2 * one, jnp.int32(2), jnp.int32(13))
  >>> float(combined_cost(cost, stability_size=2.0, stiffness_weight=0.5))
  2.0

  Args:
    cost: of a solver with a stiffness estimate.
    stability_size: length of the solver's stability region on the negative axis, positive; see `stability_size`.
    stiffness_weight: `w`, non-negative; may be traced.

  Returns:
    A scalar.

  Raises:
    ValueError: when the cost has no stiffness or a hyperparameter is outside its domain.

  Reference: Pal, Ma, Shah, Rackauckas, "Opening the Blackbox: Accelerating Neural Differential Equations by
    Regularizing Internal Solver Heuristics", ICML 2021, both regularizers as the official code adds them.
  """
  if cost.stiffness_sum is None:
    raise ValueError(
      "cost must have a stiffness estimate, got None: the solver has no two stages at one time, or none whose"
      " states differ by more than rounding in the dtype of the solution."
    )
  check_hyperparameter("stability_size", stability_size, low=0, open_low=True)
  check_hyperparameter("stiffness_weight", stiffness_weight, low=0)
  return cost.error_mean + stiffness_weight * cost.stiffness_mean / stability_size


def stability_size(solver: diffrax.AbstractSolver) -> float:
  """Length of a solver's stability region on the negative axis: `h S` above it makes steps unstable.

  >>> import diffrax
  >>> stability_size(diffrax.Tsit5()), stability_size(diffrax.Dopri5())
  (3.5068, 3.3066)

  Args:
    solver: Tsit5 or Dopri5, perhaps wrapped.

  Returns:
    The length, by which the official code divides the stiffness estimates.

  Raises:
    ValueError: for another solver.

  Reference: Pal, Ma, Shah, Rackauckas, "Opening the Blackbox: Accelerating Neural Differential Equations by
    Regularizing Internal Solver Heuristics", ICML 2021 (the official code's constants).
  """
  sizes = {diffrax.Tsit5: 3.5068, diffrax.Dopri5: 3.3066}
  inner = type(_innermost(solver))
  if inner not in sizes:
    raise ValueError(f"solver must be Tsit5 or Dopri5, got {inner.__name__}.")
  return sizes[inner]


def _innermost(solver):
  while hasattr(solver, "solver"):
    solver = solver.solver
  return solver


def _tolerances(controller, rtol, atol):
  while not hasattr(controller, "rtol") and hasattr(controller, "controller"):
    controller = controller.controller
  rtol = getattr(controller, "rtol", None) if rtol is None else rtol
  atol = getattr(controller, "atol", None) if atol is None else atol
  if rtol is None or atol is None:
    raise ValueError(f"rtol and atol must be given, {type(controller).__name__} has none to take them from.")
  check_hyperparameter("rtol", rtol, low=0)
  check_hyperparameter("atol", atol, low=0, open_low=True)
  return rtol, atol


def _accumulator_dtype(y0):
  leaves = [jnp.abs(leaf) for leaf in jax.tree.leaves(y0)]
  return jnp.promote_types(jnp.result_type(*leaves), jnp.float32)


def _root_mean_square(tree, dtype) -> jax.Array:
  """Root of the mean square over all entries, with a gradient at zero, and in steps that will be rejected."""
  values = jnp.concatenate([jnp.abs(leaf).ravel().astype(dtype) for leaf in jax.tree.leaves(tree)])
  values = jnp.where(jnp.isfinite(values), values, 0)
  largest = jax.lax.stop_gradient(values.max(initial=0))
  some = largest > 0
  scale = jnp.where(some, largest, 1)  # squares of very large or small entries would leave the dtype's range
  mean = jnp.mean(jnp.square(values / scale))
  return jnp.where(some, scale * jnp.sqrt(jnp.where(some, mean, 1)), 0)


def _epsilon(y0) -> float:
  """The relative rounding of the coarsest leaf."""
  return max(float(jnp.finfo(jnp.result_type(leaf)).eps) for leaf in jax.tree.leaves(y0))


def _stages_at_one_time(solver, y0):
  """The last two stages at the same time, and the coefficients of the difference of their states; None if none.

  None as well where rounding in the dtype of `y0` would be a hundredth of that difference at `h S = 0.1`.
  """
  tableau = getattr(_innermost(solver), "tableau", None)
  if not isinstance(tableau, diffrax.ButcherTableau) or tableau.implicit:
    return None
  times = [0.0, *np.asarray(tableau.c)]
  rows = [np.zeros(len(times)), *(np.pad(row, (0, len(times) - len(row))) for row in tableau.a_lower)]
  for last in reversed(range(len(times))):
    for other in reversed(range(last)):
      if np.isclose(times[last], times[other], rtol=0, atol=1e-12):
        coefficients = rows[last] - rows[other]
        apart = abs(coefficients @ _stages_of_growth(rows, 0.1)) * 0.1
        return (other, last, coefficients) if apart > 100 * _epsilon(y0) else None
  return None


def _stages_of_growth(rows, rate: float) -> np.ndarray:
  """The states at the stages of one step of size 1 of `y' = rate y` from 1."""
  states = np.ones(len(rows))
  for stage, row in enumerate(rows):
    states[stage] = 1 + rate * row[:stage] @ states[:stage]
  return states


def _stiffness(solver, dense, y0, size) -> jax.Array:
  """`|k_j - k_i| / |g_j - g_i|`; zero where the states differ by no more than ten times their rounding."""
  i, j, coefficients = _stages_at_one_time(solver, y0)
  increments = dense["k"]  # h k, stages first
  slopes = _root_mean_square(jax.tree.map(lambda hk: hk[j] - hk[i], increments), size.dtype)
  states = jax.tree.map(
    lambda hk: jnp.tensordot(coefficients.astype(hk.dtype), hk, axes=1, precision="highest"), increments
  )
  distance = _root_mean_square(states, size.dtype)
  terms = _root_mean_square(y0, size.dtype) + float(np.abs(coefficients).sum()) * _root_mean_square(
    increments, size.dtype
  )
  rounding = _epsilon(y0) * jax.lax.stop_gradient(terms)
  apart = distance > jnp.maximum(10 * rounding, jnp.sqrt(jnp.finfo(size.dtype).tiny))
  return jnp.where(apart, slopes / jnp.where(apart, distance * size, 1), 0)


def _evaluations(solver, steps):
  """Evaluations in accepted and rejected steps; the last stage of an accepted step is often the next one's first."""
  tableau = getattr(solver, "tableau", None)
  if not isinstance(tableau, diffrax.ButcherTableau) or tableau.implicit:
    return None
  stages = len(tableau.c) + 1
  return steps * (stages - 1) + 1 if tableau.fsal else steps * stages
