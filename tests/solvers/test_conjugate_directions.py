"""Conjugate directions against conjugate gradients, the published iteration and what exact line searches guarantee."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxreg.losses.scaled_residual import scaled_residual_loss
from jaxreg.solvers import conjugate_directions
from jaxreg.solvers.conjugate_directions import solve_conjugate_directions
from jaxreg.solvers.lanczos import lanczos_decomposition, ritz_pairs
from jaxreg.solvers.poisson import poisson_matvec
from tests.conformance import row, unchanged

SIZE = 20


@functools.partial(jax.jit, static_argnames=("steps", "orthogonalize"))
def solve(a, b, linear, tanh, tolerance=0.0, x0=None, *, steps=8, orthogonalize=2):
  """With the direction `linear r + tanh tanh(5 r)`."""
  return solve_conjugate_directions(
    lambda v: a @ v,
    b,
    lambda r: linear @ r + tanh * jnp.tanh(5 * r),
    x0=x0,
    steps=steps,
    tolerance=tolerance,
    orthogonalize=orthogonalize,
  )


def system(seed, size=SIZE):
  rng = np.random.default_rng(seed)
  root = rng.normal(size=(size, size))
  return root @ root.T / size + np.eye(size), rng.normal(size=size), rng.normal(size=(size, size))


def conjugate_gradients(a, b, steps):
  x, residual = np.zeros_like(b), b
  direction, norms = residual, [np.linalg.norm(b)]
  for _ in range(steps):
    step = residual @ residual / (direction @ a @ direction)
    x, old, residual = x + step * direction, residual, residual - step * (a @ direction)
    direction = residual + direction * (residual @ residual) / (old @ old)
    norms.append(np.linalg.norm(residual))
  return x, np.array(norms)


@pytest.mark.golden
def test_golden_39_dcdm(golden, x64):
  file = golden("39-dcdm")
  shared = {name: file.arrays[name] for name in ("A_dense", "b", "x0", "W")}
  for case, arrays, meta in list(file.cases("case")):
    meta = file.meta["cases"].get(case.removeprefix("case"), meta)
    if "out_x_final" in arrays:
      _check_iterates(shared, arrays, meta)
    elif "out_cg_x" in arrays:
      steps = len(arrays["out_cg_residual_norms"]) - 1
      got = solve(shared["A_dense"], shared["b"], np.eye(len(shared["b"])), 0.0, x0=shared["x0"], steps=steps)
      np.testing.assert_allclose(got.residual_norms, arrays["out_cg_residual_norms"], rtol=1e-8)
      np.testing.assert_allclose(got.x, arrays["out_cg_x"], rtol=1e-7, atol=1e-9)
    elif "out_Q" in arrays:
      _check_lanczos(shared, arrays)
    elif "pred" in arrays:
      loss = lambda q, b: scaled_residual_loss(q, b, matvec=lambda v: shared["A_dense"] @ v).mean()
      value, gradient = jax.jit(jax.value_and_grad(loss))(arrays["pred"], arrays["rhs"])
      np.testing.assert_allclose(value, arrays["out_loss"], rtol=1e-10)
      np.testing.assert_allclose(gradient, arrays["grad_pred"], rtol=1e-8, atol=1e-12)


def _check_iterates(shared, arrays, meta):
  linear = np.eye(len(shared["b"])) if meta["f"] == "identity" else shared["W"]
  tanh = float(meta["f"].rpartition("c=")[2]) if "tanh" in meta["f"] else 0.0
  arguments, steps = (shared["A_dense"], shared["b"], linear, tanh), meta["iterations"]
  result = solve(*arguments, x0=shared["x0"], steps=steps)
  norms = arrays["out_residual_norms"]
  # Late residuals are as small as the rounding of b - A x.
  np.testing.assert_allclose(result.residual_norms, norms, rtol=1e-8, atol=1e-15 * norms[0])
  np.testing.assert_allclose(result.x, arrays["out_x_final"], rtol=1e-7, atol=1e-9)
  iterates = all_iterates(*arguments, shared["x0"], steps=steps)
  for name in arrays:
    if name.startswith("out_x_it"):
      np.testing.assert_allclose(iterates[int(name.removeprefix("out_x_it"))], arrays[name], rtol=1e-7, atol=1e-9)


def _check_lanczos(shared, arrays):
  steps = len(arrays["out_diag"])
  run = jax.jit(lambda v: lanczos_decomposition(lambda u: shared["A_dense"] @ u, v, steps=steps))
  result = run(arrays["start"])
  signs = np.sign(np.sum(result.vectors * arrays["out_Q"], 1, keepdims=True))
  np.testing.assert_allclose(signs * result.vectors, arrays["out_Q"], atol=1e-8)
  np.testing.assert_allclose(result.diagonal, arrays["out_diag"], rtol=1e-8)
  np.testing.assert_allclose(np.abs(result.subdiagonal), np.abs(arrays["out_subdiag"]), rtol=1e-8)
  np.testing.assert_allclose(ritz_pairs(result)[0], np.sort(arrays["out_ritz_values"]), rtol=1e-8)


def test_identity_is_conjugate_gradients(x64):
  a, b, _ = system(0)
  x, norms = conjugate_gradients(a, b, 8)
  result = solve(a, b, np.eye(SIZE), 0.0)
  np.testing.assert_allclose(result.residual_norms, norms, rtol=1e-9)
  np.testing.assert_allclose(result.x, x, rtol=1e-9, atol=1e-12)
  assert int(result.iterations) == 8 and not result.converged


def test_inverse_converges_at_once_and_has_no_loss(x64):
  a, b, _ = system(1)
  inverse = -3 * np.linalg.inv(a)
  result = solve(a, b, inverse, 0.0, 1e-12)
  assert int(result.iterations) == 1 and result.converged
  np.testing.assert_array_equal(result.residual_norms[1:], np.full(8, result.residual_norms[1]))
  loss = scaled_residual_loss((inverse @ b)[None], b[None], matvec=lambda v: a @ v)
  assert loss[0] <= 1e-20


@functools.partial(jax.jit, static_argnames=("steps",))
def all_iterates(a, b, linear, tanh, x0, *, steps=8):
  """x before the first and after every iteration, `[steps + 1, size]`."""
  options = dict(matvec=lambda v: a @ v, direction=lambda r: linear @ r + tanh * jnp.tanh(5 * r), project=lambda v: v)

  def advance(state, _):
    state = conjugate_directions._iterate(state, target=b, **options)
    return state, state.x

  start = conjugate_directions._start(x0, b - a @ x0, steps, 2)
  return jnp.concatenate([x0[None], jax.lax.scan(advance, start, length=steps)[1]])


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32 - 1), st.floats(0.0, 2.0))
def test_exact_line_searches(seed, tanh):
  """The error falls by (r . d)^2 / (d . A d), the residual and the directions are orthogonal, whatever f is."""
  a, b, linear = system(seed)
  with jax.enable_x64(True):
    iterates = np.asarray(all_iterates(a, b, linear, tanh, np.zeros(SIZE)))
  truth, directions, residuals = np.linalg.solve(a, b), np.diff(iterates, axis=0), b - iterates @ a.T
  products = directions @ a @ directions.T
  curvatures = np.diag(products)
  energies = np.einsum("ki,ij,kj->k", iterates - truth, a, iterates - truth)
  gained = np.sum(residuals[:-1] * directions, 1) ** 2 / curvatures
  np.testing.assert_allclose(energies[:-1] - energies[1:], gained, rtol=1e-8, atol=1e-12 * energies[0])
  # Differences of iterates carry their rounding, so orthogonality is relative to the whole as well.
  lengths, whole = np.sqrt(curvatures), np.sqrt(energies[0])
  norms = np.linalg.norm(residuals[1:], axis=1) * np.linalg.norm(directions, axis=1)
  assert np.all(np.abs(np.sum(residuals[1:] * directions, 1)) <= 1e-10 * norms + 1e-12 * whole * np.sqrt(norms))
  for lag in (1, 2):
    bound = lengths[lag:] * lengths[:-lag]
    assert np.all(np.abs(np.diag(products, lag)) <= 1e-10 * bound + 1e-12 * whole * lengths[:-lag])


def test_orthogonal_to_all_terminates(x64):
  for seed in range(2):
    a, b, linear = system(seed)
    result = solve(a, b, linear, 0.0, 1e-8, steps=SIZE, orthogonalize=SIZE)
    assert result.converged and result.iterations <= SIZE
    np.testing.assert_allclose(result.x, np.linalg.solve(a, b), rtol=1e-6, atol=1e-7)


def test_tolerance_is_relative(x64):
  a, b, _ = system(3)
  counts = {int(solve(a, scale * b, np.eye(SIZE), 0.3, 1e-4, steps=100).iterations) for scale in (1e-6, 1.0, 1e6)}
  assert len(counts) == 1 and counts.pop() < 100


def test_useless_directions_fall_back_to_the_residual(x64):
  """Directions that are zero, not finite, or always the same."""
  a, b, _ = system(4)
  for linear in (np.zeros((SIZE, SIZE)), np.full((SIZE, SIZE), np.nan)):
    result = solve(a, b, linear, 0.0)
    np.testing.assert_allclose(result.residual_norms, conjugate_gradients(a, b, 8)[1], rtol=1e-9)
  constant = jax.jit(lambda: solve_conjugate_directions(lambda v: a @ v, b, lambda r: 0 * r + 1.0, steps=60))()
  assert constant.converged


def test_null_space_and_zero_right_hand_side(x64):
  """All-Neumann: the constants are projected out; b = 0 is solved by 0 at once."""
  a = np.diag(np.r_[1.0, np.full(6, 2.0), 1.0]) - np.eye(8, k=1) - np.eye(8, k=-1)
  b = np.random.default_rng(0).normal(size=8)
  center = lambda v: v - v.mean()
  run = jax.jit(
    lambda b: solve_conjugate_directions(lambda v: a @ v, b, lambda r: r + 1, steps=20, tolerance=1e-10, project=center)
  )
  result = run(b)
  assert result.converged
  np.testing.assert_allclose(a @ result.x, b - b.mean(), atol=1e-8)
  np.testing.assert_allclose(result.x.mean(), 0, atol=1e-10)
  zero = run(np.zeros(8))
  assert zero.converged and int(zero.iterations) == 0 and not np.any(zero.x)


def test_grids_in_a_batch_and_bfloat16():
  """A map over right-hand sides on a grid is one after the other; in bfloat16 the iteration is in float32."""
  run = lambda b: solve_conjugate_directions(poisson_matvec, b, lambda r: r, steps=30, tolerance=1e-3)
  sides = jax.random.normal(jax.random.key(0), (3, 4, 6))
  single, batched = jax.jit(run), jax.jit(jax.vmap(run))(sides)
  assert batched.converged.all()
  for index in range(3):
    alone = single(sides[index])
    assert abs(int(alone.iterations) - int(batched.iterations[index])) <= 1  # rounding may decide at the tolerance
    np.testing.assert_allclose(alone.x, batched.x[index], rtol=2e-2, atol=2e-3)
  narrow = jax.jit(run)(sides[0].astype(jnp.bfloat16))
  assert narrow.x.dtype == jnp.bfloat16 and narrow.residual_norms.dtype == jnp.float32 and narrow.converged


def test_bad_input():
  call = functools.partial(solve_conjugate_directions, lambda v: v, jnp.ones(3), lambda r: r)
  for options, message in (
    ({"steps": 0}, "steps must"),
    ({"tolerance": float("nan")}, "tolerance must"),
    ({"orthogonalize": -1}, "orthogonalize must"),
    ({"x0": jnp.ones(2)}, "x0 must have the shape of b"),
  ):
    with pytest.raises(ValueError, match=message):
      call(**options)
  with pytest.raises(ValueError, match="direction must return the shape of b"):
    solve_conjugate_directions(lambda v: v, jnp.ones(3), lambda r: r[:1])
  with pytest.raises(ValueError, match="b must be floating"):
    solve_conjugate_directions(lambda v: v, jnp.ones(3, int), lambda r: r)


def test_derivatives_are_those_of_the_solution(x64):
  """In the right-hand side and in the matrix, reverse and forward, also of a batch and from another start."""
  rng = np.random.default_rng(5)
  factor, b, weights, start = (rng.normal(size=shape) for shape in ((6, 6), (6,), (6,), (6,)))

  def exact(factor, b):
    return jnp.vdot(weights, jnp.linalg.solve(factor @ factor.T + jnp.eye(6), b))

  def iterated(factor, b, x0=None):
    matvec = lambda v: factor @ (factor.T @ v) + v
    result = solve_conjugate_directions(matvec, b, lambda r: r, x0=x0, steps=30, tolerance=1e-13)
    return jnp.vdot(weights, result.x)

  expected = jax.grad(exact, argnums=(0, 1))(factor, b)
  for x0 in (None, start):
    got = jax.jit(jax.grad(lambda factor, b: iterated(factor, b, x0), argnums=(0, 1)))(factor, b)
    for one, other in zip(got, expected):
      np.testing.assert_allclose(one, other, rtol=1e-8, atol=1e-10)
  tangent = jax.jvp(lambda b: iterated(factor, b), (b,), (weights,))[1]
  np.testing.assert_allclose(tangent, exact(factor, weights), rtol=1e-9)
  many = rng.normal(size=(3, 6))
  batched = jax.jit(jax.vmap(jax.grad(lambda b: iterated(factor, b))))(many)
  np.testing.assert_allclose(batched, np.broadcast_to(expected[1], (3, 6)), rtol=1e-8)


def test_derivatives_of_singular_systems(x64):
  """A path graph's Laplacian, without its constants."""
  laplacian = np.diag([1.0, 2, 2, 1]) - np.diag(np.ones(3), 1) - np.diag(np.ones(3), -1)
  project = lambda v: v - v.mean()
  rng = np.random.default_rng(6)
  b, weights = rng.normal(size=(2, 4))

  def value(b):
    solve = functools.partial(solve_conjugate_directions, lambda v: laplacian @ v, direction=lambda r: r)
    return jnp.vdot(weights, solve(b, project=project, tolerance=1e-12).x)

  np.testing.assert_allclose(jax.grad(value)(b), np.linalg.pinv(laplacian) @ weights, atol=1e-10)


ROWS = [
  row(
    solve_conjugate_directions,
    lambda rng: (rng.normal(size=4),),
    call=lambda b: (
      solve_conjugate_directions(
        lambda v: v * jnp.arange(1, 5, dtype=v.dtype), b, lambda residual: residual, steps=3, tolerance=0.0
      ).x
    ),
    extreme=unchanged,
    differentiable=False,
  ),
]


EXEMPT = {
  "ConjugateDirectionsResult": "result of solve_conjugate_directions",
}
