"""Optimal transport with a squared 2-norm and at most k non-zero entries in every column of the plan.

For costs `C`, `[m, n]`, and marginals `a`, `[m]`, and `b`, `[n]`, of equal mass, the problem is

    min <T, C> + gamma / 2 |T|^2    over T >= 0, T 1 = a, T^T 1 = b, |t_j|_0 <= k for every column t_j.

It is not convex, but its dual and its semi-dual are concave maximisations whose every evaluation is a top-k operation.
`k = 1` is optimal transport without regularization, `k = m` quadratically regularized transport. For at most k
non-zeros per row, transpose the costs and exchange the marginals.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from jaxreg.checks import check_float, check_hyperparameter, shape_without
from jaxreg.solvers.projections import check_support_size, sparse_simplex_projection
from jaxreg.solvers.sinkhorn import sinkhorn_potentials

__all__ = [
  "SparseTransportResult",
  "repair_sparse_transport",
  "solve_sparse_transport",
  "solve_sparse_transport_dual",
  "sparse_conjugate",
  "sparse_max",
  "sparse_transport_dual",
  "sparse_transport_plan",
  "sparse_transport_semidual",
]


class SparseTransportResult(NamedTuple):
  """What a solver found; every entry has the leading axes of the problem.

  Only `value` has a gradient, in the costs, the marginals and the regularization, by the envelope theorem; the others
  are constants.
  """

  plan: jax.Array  # T, [..., m, n], with at most k non-zeros in every column
  row_potential: jax.Array  # alpha, [..., m]
  column_potential: jax.Array  # beta, [..., n]
  value: jax.Array  # of the objective that was maximised, [...]
  residual: jax.Array  # largest absolute error of a marginal of the plan, over the mean of the row marginal, [...]
  certified: jax.Array  # whether the residual is at most the tolerance, so that the plan solves the problem, [...]
  steps: jax.Array  # int32, steps taken, [...]
  history: jax.Array  # values before each step, then that of the result, [..., steps]


def sparse_max(scores: ArrayLike, *, k: int, regularization: ArrayLike, axis: int = -1) -> jax.Array:
  """The regularized maximum `max p . s - r / 2 |p|^2` over distributions `p` with at most `k` non-zero entries.

  The gradient in the scores is the maximiser, `sparse_simplex_projection(s / r)`. With `k = 1` it is `max(s) - r / 2`.

  >>> import jax, jax.numpy as jnp
  >>> scores = jnp.array([1.0, 0.75, 0.0])
  >>> round(float(sparse_max(scores, k=2, regularization=0.5)), 4)
  0.7812
  >>> jax.grad(lambda s: sparse_max(s, k=2, regularization=0.5))(scores).tolist()
  [0.75, 0.25, 0.0]

  Args:
    scores: floating `[..., size]`.
    k: static, in [1, size].
    regularization: `r`, positive; for a column of mass `b`, `gamma * b`. A scalar or an array that broadcasts against
      the result; may be traced.
    axis: the axis of the distributions.

  Returns:
    `[...]`, the scores' shape without `axis`.

  Raises:
    ValueError: when scores are not floating point, `k` is no integer in [1, size] or `regularization` not positive.

  Reference: Liu, Puigcerver, Blondel, "Sparsity-Constrained Optimal Transport", ICLR 2023, the maximum operator of the
    semi-dual (Section 4).
  """
  check_float("scores", scores)
  check_support_size(k, scores, axis)
  shape = shape_without(scores, axis)
  check_hyperparameter("regularization", regularization, low=0, open_low=True, shape=shape)
  dtype = jnp.promote_types(scores.dtype, jnp.float32)
  wide = jnp.moveaxis(scores, axis, -1).astype(dtype)
  weight = jnp.broadcast_to(jnp.asarray(regularization, dtype), wide.shape[:-1])
  return _sparse_max(k)(wide, weight).astype(scores.dtype)


def _sparse_max(k: int) -> Callable:
  def maximiser(scores, weight):
    """With a weight of zero, in the limit, the largest score alone."""
    none = weight < jnp.finfo(weight.dtype).tiny / jnp.finfo(weight.dtype).eps
    p = sparse_simplex_projection(scores / jnp.where(none, 1, weight)[..., None], k=k)
    return jnp.where(none[..., None], jax.nn.one_hot(jnp.argmax(scores, -1), scores.shape[-1], dtype=p.dtype), p)

  @jax.custom_jvp
  def maximum(scores, weight):
    p = maximiser(scores, weight)
    return jnp.sum(p * scores, -1) - weight / 2 * jnp.sum(p * p, -1)

  @maximum.defjvp
  def derivative(primals, tangents):  # Danskin's theorem: the maximiser is held fixed
    p = maximiser(*primals)
    return maximum(*primals), jnp.sum(p * tangents[0], -1) - jnp.sum(p * p, -1) / 2 * tangents[1]

  return maximum


def sparse_conjugate(scores: ArrayLike, *, k: int, regularization: ArrayLike, axis: int = -1) -> jax.Array:
  """The conjugate `max t . s - gamma / 2 |t|^2` over `t >= 0` with at most `k` non-zero entries.

  It is the sum of `max(s_i, 0)^2` over the `k` largest entries over `2 gamma`; its gradient is the maximiser.

  >>> import jax, jax.numpy as jnp
  >>> jax.value_and_grad(lambda s: sparse_conjugate(s, k=2, regularization=0.5))(jnp.array([1.0, 0.5, 0.25, -1.0]))
  (Array(1.25, dtype=float32), Array([2., 1., 0., 0.], dtype=float32))

  Args:
    scores: floating `[..., size]`.
    k: static, in [1, size].
    regularization: `gamma`, positive; a scalar or an array that broadcasts against the result; may be traced.
    axis: the axis of the vectors.

  Returns:
    `[...]`, the scores' shape without `axis`.

  Raises:
    ValueError: when scores are not floating point, `k` is no integer in [1, size] or `regularization` not positive.

  Reference: Liu, Puigcerver, Blondel, "Sparsity-Constrained Optimal Transport", ICLR 2023, the conjugate of the dual
    (Section 4).
  """
  check_float("scores", scores)
  check_support_size(k, scores, axis)
  shape = shape_without(scores, axis)
  check_hyperparameter("regularization", regularization, low=0, open_low=True, shape=shape)
  dtype = jnp.promote_types(scores.dtype, jnp.float32)
  wide = jnp.moveaxis(scores, axis, -1).astype(dtype)
  squares = jnp.sum(jnp.square(jax.nn.relu(jax.lax.top_k(wide, k)[0])), -1)
  return (squares / (2 * jnp.asarray(regularization, dtype))).astype(scores.dtype)


def sparse_transport_semidual(
  row_potential: ArrayLike,
  cost: ArrayLike,
  row_marginal: ArrayLike,
  column_marginal: ArrayLike,
  *,
  k: int,
  regularization: ArrayLike,
) -> jax.Array:
  """The semi-dual `alpha . a - sum_j b_j max_j(alpha - c_j)`, to be maximised; `max_j` is `sparse_max` at `gamma b_j`.

  It is at most the cost of every feasible plan. Its gradient in `alpha` is the error `a - T 1` of the plan's rows.

  >>> import jax.numpy as jnp
  >>> half = jnp.array([0.5, 0.5])
  >>> cost = jnp.array([[0.0, 1.0], [1.0, 0.0]])
  >>> float(sparse_transport_semidual(jnp.zeros(2), cost, half, half, k=1, regularization=0.5))
  0.125

  Args:
    row_potential: alpha, floating `[..., m]`.
    cost: C, floating `[..., m, n]`.
    row_marginal: a, floating `[..., m]`, of the same mass as b.
    column_marginal: b, floating `[..., n]`, not negative; a column without mass (padding) changes nothing.
    k: static, the largest number of non-zeros in a column, in [1, m].
    regularization: gamma, positive, in units of cost per mass; may be traced.

  Returns:
    `[...]`, the value of every problem.

  Raises:
    ValueError: when shapes or dtypes do not fit, `k` is no integer in [1, m] or `regularization` not positive.

  Reference: Liu, Puigcerver, Blondel, "Sparsity-Constrained Optimal Transport", ICLR 2023, the semi-dual (Section 4).
  """
  arrays = dict(row_marginal=row_marginal, column_marginal=column_marginal, row_potential=row_potential)
  _check_problem(cost, k, regularization, **arrays)
  dtype = cost.dtype
  cost, a, b, alpha = _widened(cost, row_marginal, column_marginal, row_potential)
  gamma = jnp.asarray(regularization, cost.dtype)
  maxima = sparse_max(alpha[..., :, None] - cost, k=k, regularization=gamma * b, axis=-2)
  return (jnp.sum(alpha * a, -1) - jnp.sum(b * maxima, -1)).astype(dtype)


def sparse_transport_plan(
  row_potential: ArrayLike,
  cost: ArrayLike,
  column_marginal: ArrayLike,
  *,
  k: int,
  regularization: ArrayLike,
) -> jax.Array:
  """The plan of a row potential, `t_j = b_j sparse_simplex_projection((alpha - c_j) / (gamma b_j))`.

  Its columns have at most `k` non-zeros and the mass of `b` whatever the potential; its rows have that of `a` only at a
  maximum of the semi-dual where that is smooth.

  >>> import jax.numpy as jnp
  >>> cost = jnp.array([[0.0, 1.0], [1.0, 0.0]])
  >>> sparse_transport_plan(jnp.zeros(2), cost, jnp.array([0.5, 0.5]), k=1, regularization=0.5).tolist()
  [[0.5, 0.0], [0.0, 0.5]]

  Args:
    row_potential: alpha, floating `[..., m]`.
    cost: C, floating `[..., m, n]`.
    column_marginal: b, floating `[..., n]`, not negative; a column without mass (padding) changes nothing.
    k: static, the largest number of non-zeros in a column, in [1, m].
    regularization: gamma, positive, in units of cost per mass; may be traced.

  Returns:
    `[..., m, n]`.

  Raises:
    ValueError: when shapes or dtypes do not fit, `k` is no integer in [1, m] or `regularization` not positive.

  Reference: Liu, Puigcerver, Blondel, "Sparsity-Constrained Optimal Transport", ICLR 2023, the recovery of the plan
    (Section 4).
  """
  _check_problem(cost, k, regularization, column_marginal=column_marginal, row_potential=row_potential)
  dtype = cost.dtype
  cost, b, alpha = _widened(cost, column_marginal, row_potential)
  weight = jnp.asarray(regularization, cost.dtype) * b
  weight = jnp.where(
    weight < jnp.finfo(cost.dtype).tiny / jnp.finfo(cost.dtype).eps, 1, weight
  )  # a column without mass
  scaled = (alpha[..., :, None] - cost) / weight[..., None, :]
  return (b[..., None, :] * sparse_simplex_projection(scaled, k=k, axis=-2)).astype(dtype)


def sparse_transport_dual(
  row_potential: ArrayLike,
  column_potential: ArrayLike,
  cost: ArrayLike,
  row_marginal: ArrayLike,
  column_marginal: ArrayLike,
  *,
  k: int,
  regularization: ArrayLike,
) -> jax.Array:
  """The dual `alpha . a + beta . b - sum_j sparse_conjugate(alpha + beta_j - c_j)`, to be maximised.

  Its maximum is the semi-dual's. Its gradients are the errors `a - T 1` and `b - T^T 1` of the plan whose columns are
  the conjugates' gradients.

  >>> import jax.numpy as jnp
  >>> half = jnp.array([0.5, 0.5])
  >>> cost = jnp.array([[0.0, 1.0], [1.0, 0.0]])
  >>> float(sparse_transport_dual(jnp.full(2, 0.25), jnp.zeros(2), cost, half, half, k=1, regularization=0.5))
  0.125

  Args:
    row_potential: alpha, floating `[..., m]`.
    column_potential: beta, floating `[..., n]`.
    cost: C, floating `[..., m, n]`.
    row_marginal: a, floating `[..., m]`, of the same mass as b.
    column_marginal: b, floating `[..., n]`.
    k: static, the largest number of non-zeros in a column, in [1, m].
    regularization: gamma, positive, in units of cost per mass; may be traced.

  Returns:
    `[...]`, the value of every problem.

  Raises:
    ValueError: when shapes or dtypes do not fit, `k` is no integer in [1, m] or `regularization` not positive.

  Reference: Liu, Puigcerver, Blondel, "Sparsity-Constrained Optimal Transport", ICLR 2023, the dual (Section 4).
  """
  potentials = dict(row_potential=row_potential, column_potential=column_potential)
  marginals = dict(row_marginal=row_marginal, column_marginal=column_marginal)
  _check_problem(cost, k, regularization, **marginals, **potentials)
  dtype = cost.dtype
  cost, a, b, alpha, beta = _widened(cost, row_marginal, column_marginal, row_potential, column_potential)
  scores = alpha[..., :, None] + beta[..., None, :] - cost
  conjugates = sparse_conjugate(scores, k=k, regularization=regularization, axis=-2)
  return (jnp.sum(alpha * a, -1) + jnp.sum(beta * b, -1) - jnp.sum(conjugates, -1)).astype(dtype)


def solve_sparse_transport(
  cost: ArrayLike,
  row_marginal: ArrayLike,
  column_marginal: ArrayLike,
  *,
  k: int,
  regularization: ArrayLike = 1.0,
  steps: int = 2000,
  tolerance: ArrayLike = 1e-3,
  optimizer: optax.GradientTransformation | None = None,
  row_potential: ArrayLike | None = None,
) -> SparseTransportResult:
  """Maximises the semi-dual, `sparse_transport_semidual`, by first-order steps; returns the best potential found.

  The columns of the plan are exact. Where the maximum lies at a kink, as it often does for small `k`, the value is
  right but no potential gives a plan with the rows' masses: `certified` says so, and `repair_sparse_transport` makes a
  plan with these masses. Larger `k` makes the semi-dual smoother.

  >>> import jax, jax.numpy as jnp
  >>> cost = jnp.array([[0.0, 1.0, 2.0], [1.0, 0.0, 1.0], [2.0, 1.0, 0.5]])
  >>> third = jnp.full(3, 1 / 3)
  >>> solve = jax.jit(solve_sparse_transport, static_argnames=("k", "steps"))
  >>> result = solve(cost, third, third, k=2, regularization=0.1, steps=500)
  >>> bool(result.certified), (3 * result.plan).round(2).tolist()
  (True, [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])

  Args:
    cost: C, floating `[..., m, n]`.
    row_marginal: a, floating `[..., m]`, of the same mass as b: otherwise there is no maximum, which shows in the
      residual.
    column_marginal: b, floating `[..., n]`, not negative; a column without mass (padding) changes nothing.
    k: static, the largest number of non-zeros in a column, in [1, m].
    regularization: gamma, positive, in units of cost per mass; may be traced.
    steps: static, the largest number of steps.
    tolerance: the residual, relative to the mean of `a`, below which the solver stops; 0 takes all steps; may be
      traced.
    optimizer: static; by default L-BFGS for the first 100 steps (or half of `steps`), which converges where the maximum
      is smooth, and then Adam whose learning rate falls geometrically from 0.05 to 5e-8 times the mean absolute cost,
      which reaches the kinks of small `k`: to 1e-7 of the value in most problems, to 1e-4 in the worst one seen.
    row_potential: alpha to start from, `[..., m]`; by default that of 50 steps of Sinkhorn's algorithm at falling
      regularization, each of which costs less than a tenth of a step here.

  Returns:
    SparseTransportResult, in float32 or float64. Its value has the gradients `T` in the costs, `alpha` in `a`, `beta`
    in `b` and `|T|^2 / 2` in the regularization.

  Raises:
    ValueError: when shapes or dtypes do not fit, or a hyperparameter is outside its domain.

  Reference: Liu, Puigcerver, Blondel, "Sparsity-Constrained Optimal Transport", ICLR 2023, Section 4.
  """
  arrays = dict(row_marginal=row_marginal, column_marginal=column_marginal)
  if row_potential is not None:
    arrays["row_potential"] = row_potential
  _check_problem(cost, k, regularization, **arrays)
  _check_effort(steps, tolerance)
  cost, a, b = _widened(cost, row_marginal, column_marginal)
  alpha = _sinkhorn_start(cost, a, b) if row_potential is None else _widened(row_potential)[0]

  def solve(cost, a, b, alpha):
    options = {"k": k, "regularization": regularization}
    *fixed, start, gamma, small = jax.lax.stop_gradient((cost, a, b, alpha, regularization, tolerance))
    constant = {"k": k, "regularization": gamma}

    def objective(potentials):
      return sparse_transport_semidual(*potentials, *fixed, **constant)

    run = _ascend(objective, (start,), fixed, steps, small, optimizer)
    plan = sparse_transport_plan(*run.potentials, fixed[0], fixed[2], **constant)
    beta = jax.grad(lambda b: sparse_transport_semidual(*run.potentials, *fixed[:2], b, **constant))(fixed[2])
    value = sparse_transport_semidual(*run.potentials, cost, a, b, **options)
    return _result(plan, (*run.potentials, beta), value, fixed, small, run)

  return _over_leading_axes(solve, cost)(cost, a, b, alpha)


def repair_sparse_transport(
  cost: ArrayLike,
  row_marginal: ArrayLike,
  column_marginal: ArrayLike,
  row_potential: ArrayLike,
  *,
  k: int,
  regularization: ArrayLike = 1.0,
  extra: int = 1,
  steps: int = 2000,
  tolerance: ArrayLike = 1e-3,
) -> SparseTransportResult:
  """A plan with the rows' masses, near a maximiser of the semi-dual at a kink, with `extra` more non-zeros per column.

  At a kink the `k`-th and the next score of some columns are equal, and the plan that solves the relaxed problem splits
  the mass between both. Every column keeps the `k + extra` rows of its largest scores; transport with
  a squared 2-norm on these entries is a smooth problem, which is solved anew. `certified` is False where the entries
  cannot carry the marginals; then more `extra` can.

  >>> import jax.numpy as jnp
  >>> cost = jnp.array([[0.0, 0.2, 1.0], [1.0, 0.5, 0.0]])
  >>> rows, columns = jnp.array([0.5, 0.5]), jnp.full(3, 1 / 3)
  >>> result = solve_sparse_transport(cost, rows, columns, k=1, regularization=0.1, steps=300)
  >>> bool(result.certified)
  False
  >>> repaired = repair_sparse_transport(cost, rows, columns, result.row_potential, k=1, regularization=0.1, steps=300)
  >>> bool(repaired.certified), (6 * repaired.plan).round(2).tolist()
  (True, [[2.0, 1.0, 0.0], [0.0, 1.0, 2.0]])

  Args:
    cost, row_marginal, column_marginal, regularization, steps, tolerance: as in `solve_sparse_transport`.
    row_potential: alpha, `[..., m]`, a maximiser of the semi-dual at `k`.
    k: static, the number of non-zeros per column of the problem that alpha solves.
    extra: static, how many more non-zeros a column may have, in [0, m - k].

  Returns:
    SparseTransportResult of the problem on these entries; its columns have at most `k + extra` non-zeros, and few of
    them more than `k`.

  Raises:
    ValueError: as `solve_sparse_transport`, and when `k + extra` exceeds the number of rows.

  Reference: Liu, Puigcerver, Blondel, "Sparsity-Constrained Optimal Transport", ICLR 2023, Section 4; repair: our own.
  """
  arrays = dict(row_marginal=row_marginal, column_marginal=column_marginal, row_potential=row_potential)
  _check_problem(cost, k, regularization, **arrays)
  check_hyperparameter("extra", extra, low=0)
  check_support_size(k + extra, cost, -2)
  cost, a, b, alpha = _widened(cost, row_marginal, column_marginal, row_potential)
  scores = jnp.swapaxes(alpha[..., :, None] - cost, -1, -2)
  smallest = jnp.min(jax.lax.top_k(scores, k + extra)[0], -1)[..., None, :]
  forbidden = 1e3 * jnp.max(jnp.abs(cost), (-2, -1), keepdims=True)
  kept = jnp.where(jnp.swapaxes(scores, -1, -2) >= smallest, cost, cost + forbidden)
  options = {"regularization": regularization, "steps": steps, "tolerance": tolerance}
  return solve_sparse_transport(kept, a, b, k=k + extra, row_potential=alpha, **options)


def solve_sparse_transport_dual(
  cost: ArrayLike,
  row_marginal: ArrayLike,
  column_marginal: ArrayLike,
  *,
  k: int,
  regularization: ArrayLike = 1.0,
  steps: int = 2000,
  tolerance: ArrayLike = 1e-3,
  optimizer: optax.GradientTransformation | None = None,
) -> SparseTransportResult:
  """Maximises the dual, `sparse_transport_dual`, by first-order steps.

  A step needs no projection onto a simplex, but neither the rows nor the columns of the plan are exact before
  convergence. Prefer `solve_sparse_transport` unless columns may miss their mass.

  >>> import jax, jax.numpy as jnp
  >>> cost = jnp.array([[0.0, 1.0, 2.0], [1.0, 0.0, 1.0], [2.0, 1.0, 0.5]])
  >>> third = jnp.full(3, 1 / 3)
  >>> solve = jax.jit(solve_sparse_transport_dual, static_argnames=("k", "steps"))
  >>> result = solve(cost, third, third, k=2, regularization=0.1, steps=1000)
  >>> bool(result.certified), (3 * result.plan).round(2).tolist()
  (True, [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])

  Args:
    cost: C, floating `[..., m, n]`.
    row_marginal: a, floating `[..., m]`, of the same mass as b.
    column_marginal: b, floating `[..., n]`, not negative; a column without mass (padding) changes nothing.
    k: static, the largest number of non-zeros in a column, in [1, m].
    regularization: gamma, positive, in units of cost per mass; may be traced.
    steps: static, the largest number of steps.
    tolerance: the residual, relative to the mean of `a`, below which the solver stops; 0 takes all steps; may be
      traced.
    optimizer: static; by default as in `solve_sparse_transport`.

  Returns:
    SparseTransportResult, in float32 or float64.

  Raises:
    ValueError: when shapes or dtypes do not fit, or a hyperparameter is outside its domain.

  Reference: Liu, Puigcerver, Blondel, "Sparsity-Constrained Optimal Transport", ICLR 2023, Section 4.
  """
  _check_problem(cost, k, regularization, row_marginal=row_marginal, column_marginal=column_marginal)
  _check_effort(steps, tolerance)

  def solve(cost, a, b):
    options = {"k": k, "regularization": regularization}
    *fixed, gamma, small = jax.lax.stop_gradient((cost, a, b, regularization, tolerance))
    constant = {"k": k, "regularization": gamma}

    def objective(potentials):
      return sparse_transport_dual(*potentials, *fixed, **constant)

    run = _ascend(objective, (jnp.zeros_like(a), jnp.zeros_like(b)), fixed, steps, small, optimizer)
    scores = run.potentials[0][:, None] + run.potentials[1] - fixed[0]
    plan = jax.grad(lambda scores: jnp.sum(sparse_conjugate(scores, axis=0, **constant)))(scores)
    value = sparse_transport_dual(*run.potentials, cost, a, b, **options)
    return _result(plan, run.potentials, value, fixed, small, run)

  return _over_leading_axes(solve, cost)(*_widened(cost, row_marginal, column_marginal))


class _Run(NamedTuple):
  potentials: tuple
  state: optax.OptState
  value: jax.Array  # of the loss, minus the objective
  slope: tuple  # of the loss: minus the errors of the plan's marginals
  step: jax.Array
  history: jax.Array
  best: tuple  # potentials, value and slope that are returned
  lowest: jax.Array  # value seen


def _ascend(objective: Callable, potentials: tuple, problem, steps: int, tolerance, optimizer) -> _Run:
  """Steps of the optimizers until the slope, which is the marginals' error, is small; returns the best point seen."""
  cost, a, _ = problem
  first = min(100, steps // 2)
  adam = optax.adam(optax.exponential_decay(0.05 * jnp.mean(jnp.abs(cost)), steps - first, 1e-6))
  stages = [(optimizer, steps)] if optimizer is not None else [(optax.lbfgs(memory_size=20), first), (adam, steps)]
  loss = lambda potentials: -objective(potentials)
  evaluate = jax.value_and_grad(loss)
  value, slope = evaluate(potentials)
  history = jnp.zeros(steps, cost.dtype)
  run = _Run(potentials, None, value, slope, jnp.int32(0), history, (potentials, value, slope), value)
  for each, end in stages:
    run = _stage(optax.with_extra_args_support(each), loss, evaluate, run, end, tolerance * jnp.mean(a))
  potentials, value, slope = run.best
  history = jnp.where(jnp.arange(steps) < run.step, run.history, -value)
  return run._replace(potentials=potentials, value=value, slope=slope, history=history)


def _stage(optimizer, loss: Callable, evaluate: Callable, run: _Run, end: int, small: jax.Array) -> _Run:
  def unfinished(run):
    return (run.step < end) & ~(_largest(run.best[2]) < small)

  def body(run):
    extra = {"value": run.value, "grad": run.slope, "value_fn": loss}
    updates, state = optimizer.update(run.slope, run.state, run.potentials, **extra)
    potentials = optax.apply_updates(run.potentials, updates)
    value, slope = evaluate(potentials)
    lowest = jnp.fmin(run.lowest, value)
    # Values near the maximum differ by rounding only; there the smaller slope decides.
    rounding = 8 * jnp.finfo(value.dtype).eps * jnp.abs(lowest)
    level = (value <= lowest + rounding) & (_largest(slope) < _largest(run.best[2]))
    better = (value < run.best[1] - rounding) | level
    best = jax.tree.map(lambda new, old: jnp.where(better, new, old), (potentials, value, slope), run.best)
    history = run.history.at[run.step].set(-run.value)
    return _Run(potentials, state, value, slope, run.step + 1, history, best, lowest)

  potentials, value, slope = run.best
  start = run._replace(potentials=potentials, value=value, slope=slope, state=optimizer.init(potentials))
  return jax.lax.while_loop(unfinished, body, start)._replace(state=None)


def _sinkhorn_start(cost, a, b):
  """A row potential near that of transport without regularization."""
  scale = jnp.mean(jnp.abs(cost), (-2, -1))
  alpha = None
  for fraction in (0.1, 0.03, 0.01, 0.003, 0.001):
    epsilon = fraction * scale + jnp.finfo(cost.dtype).tiny
    alpha, _ = sinkhorn_potentials(cost, a, b, epsilon=epsilon, steps=10, row_potential=alpha)
  finite = jnp.isfinite(alpha)  # rows without mass have the potential -inf
  return jnp.where(finite, alpha, jnp.min(alpha, -1, keepdims=True, where=finite, initial=0))


def _result(plan, potentials, value, problem, tolerance, run: _Run) -> SparseTransportResult:
  residual = _largest(run.slope) / jnp.mean(problem[1])
  constants = jax.lax.stop_gradient((plan, *potentials))
  return SparseTransportResult(*constants, value, residual, residual <= tolerance, run.step, run.history)


def _largest(slope: tuple) -> jax.Array:
  return jnp.max(jnp.concatenate([jnp.abs(part) for part in slope]))


def _over_leading_axes(solve: Callable, cost: jax.Array) -> Callable:
  for _ in range(cost.ndim - 2):
    solve = jax.vmap(solve)
  return solve


def _widened(*arrays):
  return tuple(array.astype(jnp.promote_types(array.dtype, jnp.float32)) for array in map(jnp.asarray, arrays))


def _check_problem(cost, k, regularization, **arrays):
  """Checks what a problem consists of: costs, marginals and potentials by name."""
  check_float("cost", cost)
  shape = jnp.shape(cost)
  if len(shape) < 2:
    raise ValueError(f"cost must have the shape [..., m, n], got {shape}.")
  check_support_size(k, cost, -2)
  check_hyperparameter("regularization", regularization, low=0, open_low=True)
  for name, array in arrays.items():
    expected = shape[:-1] if name.startswith("row") else (*shape[:-2], shape[-1])
    check_float(name, array)
    if jnp.shape(array) != expected:
      raise ValueError(f"{name} must have the shape {expected} for costs of shape {shape}, got {jnp.shape(array)}.")


def _check_effort(steps, tolerance):
  check_hyperparameter("steps", steps, low=1)
  check_hyperparameter("tolerance", tolerance, low=0)
