"""Transport with k non-zeros per column and entropic transport, on the same clouds of points."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import scipy.optimize

from experiments.benchmarks import Options
from experiments.benchmarks.timing import interleaved
from jaxreg.solvers.sparse_transport import solve_sparse_transport

TITLE = "Sparsity-constrained transport against ott-jax's Sinkhorn: two clouds of n points in the plane, float32"
STEPS = 1000
TOLERANCE = 1e-2  # of the marginals


def measure(options: Options):
  """Rows: one per number of points and method."""
  try:
    from ott.geometry.geometry import Geometry
    from ott.solvers.linear import solve
  except ImportError as error:
    Geometry = solve = None
    missing = f"Sinkhorn's rows are missing: {error}."
  rows = []
  for n in (32,) if options.quick else (256, 512, 1024):
    x, y = np.random.default_rng(0).normal(size=(2, n, 2))
    cost = np.sum((x[:, None] - 0.5 * y - 2.0) ** 2, -1)
    cost /= cost.mean()
    best = cost[scipy.optimize.linear_sum_assignment(cost)].mean()
    methods = {f"sparse, k = {k}": _sparse(k, n) for k in (1, 4, 16)}
    methods |= {f"sparse, k = {k}, from zero": _sparse(k, n, jnp.zeros(n)) for k in (4, 16)}
    if solve is not None:
      methods |= {f"Sinkhorn, epsilon {epsilon:g}": _sinkhorn(Geometry, solve, epsilon) for epsilon in (0.1, 0.01)}
    rows += _rows(n, cost, best, methods, options)
  notes = [
    f"Costs have the mean 1; marginals are uniform. Both solvers stop when the marginals' error is below {TOLERANCE:g}"
    f" of the mass (Sinkhorn: the sum of the errors; sparse: the largest, times n) or after {STEPS:,} steps (Sinkhorn:"
    " 10,000). The regularization of the sparse problems is n / 100, so that a column's share of the quadratic term,"
    " gamma / n, is that of 0.01 in the scale of the costs. `cost / optimum` compares with the assignment problem's"
    " optimum; where rows have not their mass it may be below 1. Sparse problems start from a few steps of"
    " Sinkhorn's algorithm, or from zero; L-BFGS takes the first 100 steps, Adam the others.",
  ]
  return rows, notes if solve is not None else [*notes, missing]


def _sparse(k: int, n: int, start=None):
  options = {"regularization": n / 100, "steps": STEPS, "tolerance": TOLERANCE, "row_potential": start}
  run = functools.partial(solve_sparse_transport, k=k, **options)

  @jax.jit
  def solve(cost, a):
    result = run(cost, a, a)
    return result.plan, result.steps

  return solve


def _sinkhorn(geometry, solver, epsilon: float):
  @jax.jit
  def solve(cost, a):
    output = solver(geometry(cost, epsilon=epsilon), a, a, threshold=TOLERANCE, max_iterations=10_000)
    return output.matrix, output.n_iters

  return solve


def _rows(n, cost, best, methods, options: Options):
  arguments = jnp.asarray(cost, jnp.float32), jnp.full(n, 1 / n, jnp.float32)
  seconds = interleaved(
    {name: lambda method=method: method(*arguments) for name, method in methods.items()},
    repeats=1 if options.quick else min(options.repeats, 3),
  )
  for name, method in methods.items():
    plan, steps = jax.device_get(method(*arguments))
    yield {
      "n": n,
      "method": name,
      "seconds": seconds[name],
      "steps": int(steps),
      "ms per step": 1e3 * seconds[name] / int(steps),
      "non-zeros per column": float(np.count_nonzero(plan, axis=0).mean()),
      "cost / optimum": float(np.sum(plan * cost) / best),
      "error of the rows": float(np.abs(plan.sum(1) - 1 / n).sum()),
      "error of the columns": float(np.abs(plan.sum(0) - 1 / n).sum()),
    }
