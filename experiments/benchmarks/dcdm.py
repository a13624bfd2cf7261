"""Conjugate directions from a network against conjugate gradients, plain and preconditioned, on Poisson problems."""

import functools
import importlib.util
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse
import scipy.sparse.linalg

from experiments.benchmarks import Options
from experiments.papers import dcdm
from jaxreg.solvers.conjugate_directions import solve_conjugate_directions
from jaxreg.solvers.poisson import poisson_matvec
from jaxreg.training import fit

TITLE = "DCDM against conjugate gradients: Poisson problems with a round obstacle, relative residual 1e-4"
TOLERANCE = 1e-4
ITERATIONS = 2000  # no solver takes more
DCDM_ITERATIONS = {2: 150, 3: 80}  # nor DCDM more than this in two and in three dimensions
SIDES = {2: (64, 256, 1024), 3: (32, 64, 100)}
LIBRARIES = {"CG (SciPy)": "scipy", "CG, incomplete Cholesky": "ilupp", "CG, multigrid": "pyamg"}


def measure(options: Options):
  """Rows: one per grid and solver."""
  flat = dcdm.PRESETS["smoke" if options.quick else "cpu"]
  rows, trained = [], []
  for config in (flat, dcdm.three_dimensional(flat)):
    network, seconds = _train(config)
    trained.append(f"{' × '.join(map(str, config.grid))} ({config.steps:,} steps, {seconds:.0f} s)")
    for side in (config.side,) if options.quick else SIDES[config.dimensions]:
      rows += _rows((side,) * config.dimensions, network, options)
  notes = [
    "The networks are those of the recipe, trained on the empty grids of " + " and ".join(trained) + " only. JAX's"
    " solvers are in float32, SciPy's in float64. `setup` is the factorization or the hierarchy; the networks' training"
    " is not counted. The incomplete Cholesky factorization is ilupp's, without fill-in; multigrid is pyamg's"
    " Ruge-Stüben hierarchy in two dimensions and smoothed aggregation in three.",
    *_capped(rows),
  ]
  missing = [name for name in LIBRARIES.values() if importlib.util.find_spec(name) is None]
  return rows, notes + [f"{name} is not installed (extra `benchmarks`): its rows are missing." for name in missing]


def _train(config):
  """What proposes directions on grids `[*grid]`, and the seconds of its training."""
  began = time.perf_counter()
  cell = dcdm.cell(config)
  task = cell.task.replace(evaluate=None)
  with tempfile.TemporaryDirectory() as folder:
    options = {"log_every": cell.log_every or cell.eval_every or cell.steps, "progress": False}
    state = fit(task, steps=cell.steps, folder=folder, **options).state
  return lambda residual: task.predict(state, residual[None])[0], time.perf_counter() - began


def round_obstacle(grid: tuple[int, ...]) -> np.ndarray:
  """A square without a disc, or a cube without a ball, of a fifth of its width, `[*grid]`."""
  center = np.array([0.4, 0.55, 0.5])[: len(grid)]
  places = (np.moveaxis(np.indices(grid), 0, -1) + 0.5) / grid
  return np.linalg.norm(places - center, axis=-1) > 0.1


def sparse_matrix(mask: np.ndarray) -> scipy.sparse.csr_array:
  """The operator of `poisson_matvec` on the cells that remain."""
  line = lambda size: scipy.sparse.diags_array([-1.0, 2.0, -1.0], offsets=[-1, 0, 1], shape=(size, size))
  # The first axis is the slowest one, and comes second in a Kronecker sum.
  whole = functools.reduce(lambda slow, size: scipy.sparse.kronsum(line(size), slow), mask.shape[1:], line(len(mask)))
  kept = np.flatnonzero(mask)
  return scipy.sparse.csr_array(whole)[kept][:, kept]


def _rows(grid, network, options: Options):
  mask = round_obstacle(grid)
  b = np.where(mask, np.random.default_rng(0).normal(size=mask.shape), 0)
  b /= np.linalg.norm(b)
  repeats = 1 if options.quick or b.size > 250_000 else min(options.repeats, 3)
  row = functools.partial(_row, mask)
  target, matvec = jnp.asarray(b, jnp.float32), functools.partial(poisson_matvec, mask=jnp.asarray(mask))
  for name, direction, steps in (
    ("CG, as directions (JAX)", lambda residual: residual, ITERATIONS),
    ("DCDM", lambda residual: jnp.where(mask, network(residual), 0), min(DCDM_ITERATIONS[mask.ndim], ITERATIONS)),
  ):
    solve = functools.partial(solve_conjugate_directions, matvec, direction=direction, steps=steps, tolerance=TOLERANCE)
    seconds, result = _timed(jax.jit(solve).lower(target).compile(), target, repeats=repeats)
    yield row(name, 0.0, seconds, int(result.iterations), b - matvec(result.x))
  plain = jax.jit(lambda b: jax.scipy.sparse.linalg.cg(matvec, b, tol=TOLERANCE, maxiter=ITERATIONS)[0])
  seconds, x = _timed(plain.lower(target).compile(), target, repeats=repeats)
  yield row("CG (jax.scipy)", 0.0, seconds, None, b - matvec(x))
  matrix = sparse_matrix(mask)
  for (name, library), prepare in zip(LIBRARIES.items(), (None, _incomplete, _multigrid)):
    if importlib.util.find_spec(library) is None:
      continue
    began = time.perf_counter()
    preconditioner = prepare(matrix, mask.ndim) if prepare else None
    setup = time.perf_counter() - began
    counted = []
    solve = functools.partial(
      scipy.sparse.linalg.cg, matrix, rtol=TOLERANCE, maxiter=ITERATIONS, M=preconditioner, callback=counted.append
    )
    seconds, (x, _) = _timed(solve, b[mask], repeats=repeats)
    yield row(name, setup, seconds, len(counted) // repeats, b[mask] - matrix @ x)


def _timed(solve, b, *, repeats: int):
  """Seconds of the fastest of some calls, and what the last one returned."""
  best = float("inf")
  for _ in range(repeats):
    began = time.perf_counter()
    result = jax.block_until_ready(solve(b))
    best = min(best, time.perf_counter() - began)
  return best, result


def _incomplete(matrix, dimensions):
  del dimensions
  import ilupp

  return ilupp.IChol0Preconditioner(scipy.sparse.csr_matrix(matrix))


def _multigrid(matrix, dimensions):
  import pyamg

  solver = pyamg.ruge_stuben_solver if dimensions == 2 else pyamg.smoothed_aggregation_solver
  return solver(scipy.sparse.csr_matrix(matrix)).aspreconditioner()


def _capped(rows) -> list[str]:
  """A note where the iterations of DCDM ended before the residual was small enough."""
  short = [row for row in rows if row["solver"] == "DCDM" and row["relative residual"] > 1.01 * TOLERANCE]
  if not short:
    return []
  grids = [f"{row['grid']} (after {row['iterations']}: {row['relative residual']:.1e})" for row in short]
  return [f"DCDM's iterations are limited to bound the benchmark's time: not solved on {', '.join(grids)}."]


def _row(mask, name, setup, seconds, iterations, residual):
  return {
    "grid": " × ".join(map(str, mask.shape)),
    "unknowns": int(mask.sum()),
    "solver": name,
    "iterations": iterations,
    "seconds": seconds,
    "setup": setup,
    "relative residual": float(np.linalg.norm(np.asarray(residual, np.float64))),
  }
