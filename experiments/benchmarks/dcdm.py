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

from experiments import dcdm
from experiments.benchmarks import Options
from experiments.benchmarks.timing import interleaved
from jaxreg.solvers.conjugate_directions import solve_conjugate_directions
from jaxreg.solvers.poisson import poisson_matvec
from jaxreg.training import fit

TITLE = "DCDM against conjugate gradients: Poisson problems with a round obstacle, relative residual 1e-4"
TOLERANCE = 1e-4
ITERATIONS = 2000  # no solver takes more


def measure(options: Options):
  """Rows: one per grid and solver."""
  config = dcdm.PRESETS["smoke" if options.quick else "cpu"]
  task = dcdm.build(config)
  with tempfile.TemporaryDirectory() as folder:
    state = fit(task, folder=folder, progress=False, **dcdm.run_options(config)).state
  network = functools.partial(dcdm.network(config).apply, {"params": state.params})
  rows = []
  for side in (config.side,) if options.quick else (64, 256, 1024):
    rows += _rows(side, network, options)
  notes = [
    f"The network is that of the recipe, trained on the empty {config.side} × {config.side} grid only. JAX's solvers"
    " are in float32, SciPy's in float64. `setup` is the factorization or the hierarchy; the network's training is not"
    " counted. SciPy's incomplete LU, without pivoting and in symmetric mode, stands for an incomplete Cholesky"
    " factorization.",
  ]
  if importlib.util.find_spec("pyamg") is None:
    notes.append("pyamg is not installed (pip install pyamg): multigrid skipped.")
  return rows, notes


def round_obstacle(side: int) -> np.ndarray:
  """A square grid without a disc of a fifth of its width, `[side, side]`."""
  places = (np.indices((side, side)) + 0.5) / side
  return np.hypot(places[0] - 0.4, places[1] - 0.55) > 0.1


def sparse_matrix(mask: np.ndarray) -> scipy.sparse.csr_array:
  """The operator of `poisson_matvec` on the cells that remain."""
  line = lambda size: scipy.sparse.diags_array([-1.0, 2.0, -1.0], offsets=[-1, 0, 1], shape=(size, size))
  eye = scipy.sparse.eye_array
  rows, columns = mask.shape
  whole = scipy.sparse.kron(line(rows), eye(columns)) + scipy.sparse.kron(eye(rows), line(columns))
  kept = np.flatnonzero(mask)
  return whole.tocsr()[kept][:, kept]


def _rows(side: int, network, options: Options):
  mask = round_obstacle(side)
  b = np.where(mask, np.random.default_rng(0).normal(size=mask.shape), 0)
  b /= np.linalg.norm(b)
  matvec = functools.partial(poisson_matvec, mask=jnp.asarray(mask))
  repeats = 1 if options.quick or side > 500 else min(options.repeats, 3)
  directions = {
    "CG, as directions (JAX)": lambda residual: residual,
    "DCDM": lambda residual: jnp.where(mask, network(residual[None])[0], 0),
  }
  for name, direction in directions.items():
    solve = jax.jit(
      lambda b, direction=direction: solve_conjugate_directions(
        matvec, b, direction, steps=ITERATIONS, tolerance=TOLERANCE
      )
    )
    target = jnp.asarray(b, jnp.float32)
    seconds = interleaved({name: lambda solve=solve: solve(target)}, repeats=repeats)[name]
    result = solve(target)
    yield _row(side, mask, name, 0.0, seconds, int(result.iterations), b - matvec(result.x))
  plain = jax.jit(lambda b: jax.scipy.sparse.linalg.cg(matvec, b, tol=TOLERANCE, maxiter=ITERATIONS)[0])
  seconds = interleaved({"cg": lambda: plain(target)}, repeats=repeats)["cg"]
  yield _row(side, mask, "CG (jax.scipy)", 0.0, seconds, None, b - matvec(plain(target)))
  matrix = sparse_matrix(mask)
  for name, prepare in {"CG (SciPy)": None, "CG, incomplete LU": _incomplete, "CG, multigrid": _multigrid}.items():
    if prepare is _multigrid and importlib.util.find_spec("pyamg") is None:
      continue
    began = time.perf_counter()
    preconditioner = prepare(matrix) if prepare else None
    setup = time.perf_counter() - began
    counted, best = [], float("inf")
    for _ in range(repeats):
      counted.clear()
      began = time.perf_counter()
      x, _ = scipy.sparse.linalg.cg(
        matrix, b[mask], rtol=TOLERANCE, maxiter=ITERATIONS, M=preconditioner, callback=counted.append
      )
      best = min(best, time.perf_counter() - began)
    yield _row(side, mask, name, setup, best, len(counted), b[mask] - matrix @ x)


def _incomplete(matrix):
  factors = scipy.sparse.linalg.spilu(
    matrix.tocsc(), drop_tol=1e-3, fill_factor=10, diag_pivot_thresh=0.0, options={"SymmetricMode": True}
  )
  return scipy.sparse.linalg.LinearOperator(matrix.shape, factors.solve)


def _multigrid(matrix):
  import pyamg

  return pyamg.ruge_stuben_solver(scipy.sparse.csr_matrix(matrix)).aspreconditioner()


def _row(side, mask, name, setup, seconds, iterations, residual):
  return {
    "grid": f"{side} × {side}",
    "unknowns": int(mask.sum()),
    "solver": name,
    "iterations": iterations,
    "seconds": seconds,
    "setup": setup,
    "relative residual": float(np.linalg.norm(np.asarray(residual, np.float64))),
  }
