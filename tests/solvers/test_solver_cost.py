"""The cost of a solve: golden values, identities on fixed meshes, the unwrapped solve, SDEs, mapped gradients."""

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxreg.solvers import solver_cost

SOLVERS = {"tsit5": diffrax.Tsit5, "dopri5": diffrax.Dopri5}
DIRECT = diffrax.DirectAdjoint()  # compiles faster than the default, which the other tests use
OUTPUTS = ("RE_sum", "RE_mean", "RE_raw_sq_sum", "RS_sum", "RS_max")


def on_mesh(solver, field, mesh, y0, args, *, rtol, atol):
  terms, steps = diffrax.ODETerm(field), diffrax.StepTo(mesh)
  saveat = diffrax.SaveAt(t0=True, steps=True)
  return solver_cost.solve_with_cost(
    terms, solver, mesh[0], mesh[-1], None, y0, args,
    saveat=saveat, stepsize_controller=steps, max_steps=mesh.size - 1, rtol=rtol, atol=atol, adjoint=DIRECT,
  )  # fmt: skip


def network(t, y, params):
  time = jnp.broadcast_to(t, (*y.shape[:-1], 1))
  hidden = jnp.tanh(jnp.concatenate([y, time], -1) @ params["W1"].T + params["b1"])
  return jnp.concatenate([hidden, time], -1) @ params["W2"].T


@pytest.mark.golden
def test_golden_25_ode_heuristics(golden, x64):
  file = golden("25-ode_heuristics")
  for case, arrays, _ in file.cases():
    meta = file.meta["cases"][case.removeprefix("case")]
    solver = SOLVERS[meta["solver"]]()
    size = meta.get("stability_size", solver_cost.stability_size(solver))
    params = {name: arrays[name] for name in ("W1", "b1", "W2") if name in arrays}
    rate = None if params else float(meta["field"].removesuffix("*y"))
    field = network if params else lambda t, y, _, rate=rate: rate * y

    def weighted(weights, params, y0, *, solver=solver, field=field, size=size, mesh=arrays["mesh"], meta=meta):
      solution, cost = on_mesh(solver, field, mesh, y0, params, rtol=meta["rtol"], atol=meta["atol"])
      named = {
        "RE_sum": cost.error_sum,
        "RE_mean": cost.error_mean,
        "RE_raw_sq_sum": cost.squared_error_sum,
        "RS_sum": cost.stiffness_sum / size,
        "RS_max": cost.stiffness_max / size,
      }
      return sum(weights[name] * named[name] for name in OUTPUTS), {**named, "ys": solution.ys}

    function = jax.jit(jax.value_and_grad(weighted, argnums=(1, 2), has_aux=True) if params else weighted)
    for name in OUTPUTS:
      weights = {other: float(other == name) for other in OUTPUTS}
      if not params:
        _, values = function(weights, params, arrays["y0"])
      else:
        (_, values), (of_params, of_state) = function(weights, params, arrays["y0"])
        for wrt, gradient in {**of_params, "y0": of_state}.items():
          if f"grad_{name}_{wrt}" in arrays:
            expected = arrays[f"grad_{name}_{wrt}"]
            np.testing.assert_allclose(gradient, expected, rtol=1e-7, atol=1e-9 * np.abs(expected).max())
    for name, value in values.items():
      if f"out_{name}" in arrays:
        np.testing.assert_allclose(value, arrays[f"out_{name}"], rtol=1e-9)


def _linear(rate, interval, step, y0, rtol, atol):
  solution, cost = solver_cost.solve_with_cost(
    diffrax.ODETerm(lambda t, y, rate: rate * y), diffrax.Tsit5(), interval[0], interval[1], step, y0, rate,
    rtol=rtol, atol=atol, max_steps=8,
  )  # fmt: skip
  return cost.error_sum + cost.stiffness_sum, (cost, solution.ys[0])


# One program for every test with a linear field.
linear = jax.jit(jax.value_and_grad(_linear, has_aux=True))
Y0 = np.array([[1.0, -0.5], [2.0, 0.25]])


def linear_cost(rate, *, start=0.0, steps=4, step=0.1, rtol=1e-3, atol=1e-6, y0=Y0):
  interval = np.array([start, start + steps * step])
  scalars = [np.float64(value) for value in (rate, step, rtol, atol)]
  (_, (cost, end)), slope = linear(scalars[0], interval, scalars[1], np.asarray(y0, np.float64), *scalars[2:])
  return cost, slope, np.asarray(end)


@pytest.mark.parametrize("rate", [-40.0, -1.0, 0.3, 7.0])
def test_stiffness_of_a_linear_field_is_its_rate(rate, x64):
  # Of h times the rate of order one: the two states differ by its fifth power, and so much is lost to rounding.
  cost, slope, _ = linear_cost(rate, step=0.7 / abs(rate))
  np.testing.assert_allclose([cost.stiffness_max, cost.stiffness_mean], [abs(rate)] * 2, rtol=1e-10)
  assert int(cost.steps) == 4 and int(cost.evaluations) == 25
  assert np.isfinite(slope)


def test_no_cost_and_no_gradient_where_nothing_moves(x64):
  for rate, y0 in ((0.0, Y0), (-2.0, 0 * Y0)):
    cost, slope, _ = linear_cost(rate, y0=y0)
    assert cost.error_sum == cost.squared_error_sum == cost.stiffness_sum == 0
    # At rate zero the field is zero and its derivative is not; at zero state both are.
    assert np.isfinite(slope) and (rate == 0 or slope == 0)


@settings(max_examples=20, deadline=None)
@given(st.floats(1e-3, 1e3), st.floats(-5, 5), st.floats(0.05, 0.4))
def test_error_scales_with_the_tolerances_and_adds_over_the_steps(factor, rate, step):
  with jax.enable_x64(True):
    whole, _, _ = linear_cost(rate, steps=8, step=step)
    scaled, _, _ = linear_cost(rate, steps=8, step=step, rtol=1e-3 * factor, atol=1e-6 * factor)
    np.testing.assert_allclose(scaled.error_sum * factor, whole.error_sum, rtol=1e-9)
    np.testing.assert_allclose(scaled.squared_error_sum, whole.squared_error_sum, rtol=1e-9)
    first, _, middle = linear_cost(rate, steps=4, step=step)
    second, _, _ = linear_cost(rate, start=4 * step, steps=4, step=step, y0=middle)
    # Errors that are rounding, at very small rates, depend on the last bit of the step size.
    floor = 1e-15 / 1e-3
    np.testing.assert_allclose(first.error_sum + second.error_sum, whole.error_sum, rtol=1e-6, atol=floor)
    assert int(first.steps) + int(second.steps) == int(whole.steps) == 8


def test_error_is_of_fifth_order(x64):
  sizes = np.array([0.05, 0.1, 0.2, 0.4])
  sums = [linear_cost(-1.0, steps=1, step=h, rtol=0, atol=1.0)[0].error_sum for h in sizes]
  slope = np.polyfit(np.log(sizes), np.log(np.array(sums) / sizes), 1)[0]
  np.testing.assert_allclose(slope, 5, atol=0.15)


def swing(t, y, params):
  return jnp.tanh(y @ params["kernel"]) * (1 + 20 * jnp.square(jnp.sin(2 * t)))


def unrolled(params, y0, mesh, rtol, atol):
  """The costs on a given mesh, written out from the tableau."""
  tableau = diffrax.Tsit5.tableau
  rows = [np.pad(row, (0, 7 - len(row))) for row in (np.zeros(0), *tableau.a_lower)]
  times = [0.0, *tableau.c]

  def step(carry, interval):
    y, error, stiffness = carry
    t, size = interval
    k = jnp.zeros((7, *y.shape))
    for i in range(7):
      state = y + size * jnp.tensordot(rows[i], k, 1)
      k = k.at[i].set(swing(t + times[i] * size, state, params))
    new = state
    scale = atol + rtol * jnp.maximum(jnp.abs(y), jnp.abs(new))
    norm = jnp.sqrt(jnp.mean(jnp.square(size * jnp.tensordot(tableau.b_error, k, 1) / scale)))
    before = y + size * jnp.tensordot(rows[5], k, 1)
    ratio = jnp.linalg.norm(k[6] - k[5]) / jnp.linalg.norm(new - before)
    return (new, error + norm * size, stiffness + ratio), None

  (y, error, stiffness), _ = jax.lax.scan(step, (y0, 0.0, 0.0), (mesh[:-1], jnp.diff(mesh)))
  return error + 0.1 * stiffness, (error, stiffness, y)


def test_adaptive_solve_is_the_plain_one_and_gradients_are_those_of_its_steps(x64):
  params = {"kernel": np.random.default_rng(0).normal(size=(2, 2))}
  controller = diffrax.PIDController(rtol=1e-4, atol=1e-5)
  arguments = diffrax.ODETerm(swing), diffrax.Tsit5(), 0.0, 2.0, 0.5, jnp.asarray(Y0)
  options = {"stepsize_controller": controller, "max_steps": 32, "saveat": diffrax.SaveAt(t0=True, steps=True)}

  def cost(params):
    solution, cost = solver_cost.solve_with_cost(*arguments, params, **options)
    return cost.error_sum + 0.1 * cost.stiffness_sum, (solution, cost)

  _, (alone, _) = jax.jit(cost)(params)
  (_, (solution, cost)), gradient = jax.jit(jax.value_and_grad(cost, has_aux=True))(params)
  plain = jax.jit(lambda params: diffrax.diffeqsolve(*arguments, params, **options))(params)
  # Differentiated programs round otherwise, plain solves' too, and the controller makes 1e-11 of an error's last bit.
  np.testing.assert_allclose(alone.ys, plain.ys, rtol=1e-12)
  np.testing.assert_allclose(solution.ys, plain.ys, rtol=1e-9)
  assert jax.tree.structure(solution) == jax.tree.structure(plain)
  steps = int(solution.stats["num_accepted_steps"])
  assert int(cost.steps) == steps and int(solution.stats["num_rejected_steps"]) > 1
  assert int(cost.evaluations) == 6 * int(plain.stats["num_steps"]) + 1
  reference = jax.jit(jax.value_and_grad(unrolled, has_aux=True))
  (_, expected), slope = reference(params, jnp.asarray(Y0), solution.ts[: steps + 1], 1e-4, 1e-5)
  np.testing.assert_allclose([cost.error_sum, cost.stiffness_sum], expected[:2], rtol=1e-9)
  np.testing.assert_allclose(solution.ys[steps], expected[2], rtol=1e-12)
  np.testing.assert_allclose(gradient["kernel"], slope["kernel"], rtol=1e-8)


IMPLICIT = ("Kvaerno3", "Kvaerno5", "ImplicitEuler", "KenCarp4", "Sil3")


@pytest.mark.parametrize("name", IMPLICIT)
def test_implicit_solvers(name, x64):
  """Alone or for the stiff of two terms: the plain solution, and derivatives on steps that are held fixed."""
  stiff = diffrax.ODETerm(lambda t, y, rate: -rate * (y - jnp.cos(t)))
  slow = diffrax.ODETerm(lambda t, y, rate: 0.1 * y)
  terms = diffrax.MultiTerm(slow, stiff) if name in ("KenCarp4", "Sil3") else stiff
  arguments = terms, getattr(diffrax, name)(), 0.0, 0.5, 0.05, jnp.array([1.0, 2.0])
  controller = diffrax.PIDController(rtol=1e-3, atol=1e-4)
  options = {"stepsize_controller": controller, "max_steps": 64, "adjoint": DIRECT}
  solution, cost = jax.jit(lambda rate: solver_cost.solve_with_cost(*arguments, rate, **options))(50.0)
  plain = jax.jit(lambda rate: diffrax.diffeqsolve(*arguments, rate, **options))(50.0)
  np.testing.assert_allclose(solution.ys, plain.ys, rtol=1e-12)
  assert int(cost.steps) == int(plain.stats["num_accepted_steps"]) and cost.error_sum > 0
  assert cost.stiffness_sum is None and cost.stiffness_mean is None and cost.evaluations is None

  exact = getattr(diffrax, name)(root_finder=diffrax.VeryChord(rtol=1e-12, atol=1e-12), root_find_max_steps=50)

  def on_fixed_steps(rate):
    steps = dict(rtol=1e-3, atol=1e-4, max_steps=4, adjoint=DIRECT)
    return solver_cost.solve_with_cost(terms, exact, 0.0, 0.2, 0.05, arguments[5], rate, **steps)[1].error_sum

  function = jax.jit(jax.value_and_grad(on_fixed_steps))
  difference = (function(50.0 + 1e-3)[0] - function(50.0 - 1e-3)[0]) / 2e-3
  np.testing.assert_allclose(function(50.0)[1], difference, rtol=1e-4)


@pytest.mark.parametrize("solver", [diffrax.Tsit5(), diffrax.Dopri5(), diffrax.HalfSolver(diffrax.Tsit5())])
def test_stiffness_in_float32_is_right_or_nothing(solver):
  """The states at one time differ by the third power of `h S`: at small steps rounding was taken for stiffness."""

  def estimate(step):
    terms = diffrax.ODETerm(lambda t, y, args: -0.3 * y)
    options = dict(rtol=1e-3, atol=1e-6, max_steps=4, adjoint=DIRECT)
    return solver_cost.solve_with_cost(terms, solver, 0.0, 4 * step, step, jnp.ones(2), **options)[1].stiffness_max

  function = jax.jit(jax.value_and_grad(estimate))
  for step in (0.001, 0.01, 0.02, 0.05, 0.1, 0.3, 1.0):
    value, slope = function(np.float32(step))
    assert np.isfinite(slope)
    assert abs(value - 0.3) < 0.01 if step >= 0.1 else value == 0 or abs(value - 0.3) < 0.03, step


def test_stages_that_rounding_cannot_tell_apart_are_no_estimate():
  """Dopri8's states differ by 1e-4 (h S)^5."""
  terms = diffrax.ODETerm(lambda t, y, args: -0.3 * y)
  solve = lambda dtype: solver_cost.solve_with_cost(
    terms, diffrax.Dopri8(), 0.0, 4.0, 1.0, jnp.ones(2, dtype), rtol=1e-3, atol=1e-6, max_steps=4, adjoint=DIRECT
  )[1]
  with jax.enable_x64(True):
    assert solve(jnp.float64).stiffness_mean == pytest.approx(0.3, rel=1e-6)
  single = solve(jnp.float32)
  assert single.stiffness_sum is None and single.stiffness_max is None and np.isfinite(single.error_mean)
  with pytest.raises(ValueError, match="none whose states differ by more than rounding"):
    solver_cost.combined_cost(single, stability_size=1.0)


@pytest.mark.parametrize("adjoint", [None, DIRECT])
def test_a_solve_over_no_time_costs_nothing(adjoint):
  def loss(rate, end):
    terms = diffrax.ODETerm(lambda t, y, rate: -rate * y)
    controller = diffrax.PIDController(rtol=1e-3, atol=1e-6)
    solution, cost = solver_cost.solve_with_cost(
      terms, diffrax.Tsit5(), 0.0, end, 0.1, jnp.ones(2), rate,
      stepsize_controller=controller, max_steps=16, adjoint=adjoint,
    )  # fmt: skip
    penalty = cost.error_mean + cost.stiffness_mean + solver_cost.combined_cost(cost, stability_size=3.5)
    return jnp.sum(solution.ys**2) + penalty, (cost, penalty)

  (value, (cost, penalty)), slope = jax.jit(jax.value_and_grad(loss, has_aux=True))(2.0, 0.0)
  assert (value, penalty, slope) == (2.0, 0.0, 0.0)
  assert all(leaf == 0 for leaf in (cost.error_sum, cost.squared_error_sum, cost.stiffness_max, cost.steps))


def mapped_cost(adjoint):
  def cost(rate):
    solution, cost = solver_cost.solve_with_cost(
      diffrax.ODETerm(lambda t, y, rate: rate * y), diffrax.Heun(), 0.0, 0.5, 0.25, jnp.ones(2), rate,
      adjoint=adjoint, rtol=0.0, atol=0.1, max_steps=2, throw=False,
    )  # fmt: skip
    assert cost.stiffness_sum is None  # Heun has no two stages at one time
    return cost.error_sum + solution.ys.sum()

  return jax.value_and_grad(cost)


def test_gradients_under_every_mapping(x64):
  """The default adjoint in vmap and sharded jit, the direct one in pmap and shard_map."""
  rates = np.linspace(-2, 1, 8)

  def closed_form(rate):  # two steps of z = rate / 4: y grows by 1 + z + z^2 / 2, the error is |z^2 / 2|
    z = rate / 4
    growth = 1 + z + z**2 / 2
    return 0.25 * z**2 / 2 / 0.1 * (1 + np.abs(growth)) + 2 * growth**2

  expected = closed_form(rates), (closed_form(rates + 1e-5) - closed_form(rates - 1e-5)) / 2e-5
  mesh = Mesh(jax.devices(), ("data",))
  specification = PartitionSpec("data")
  default = jax.jit(jax.vmap(mapped_cost(diffrax.RecursiveCheckpointAdjoint())))
  sharded = default(jax.device_put(rates, NamedSharding(mesh, specification)))
  direct = mapped_cost(diffrax.DirectAdjoint())
  one_each = lambda rates: jax.tree.map(lambda x: x[None], direct(rates[0]))
  over_devices = jax.shard_map(one_each, mesh=mesh, in_specs=specification, out_specs=specification, check_vma=False)
  for got in (sharded, jax.pmap(direct)(rates), jax.jit(over_devices)(rates)):
    for one, other in zip(got, expected):
      np.testing.assert_allclose(one, other, rtol=1e-7, atol=1e-9)


def test_stochastic_equations(x64):
  """SPaRK's error estimate enters the cost: value and gradient against differences on the same steps."""

  def cost(scale, size, key):
    noise = diffrax.VirtualBrownianTree(0.0, 1.0, 0.1, (2,), key, diffrax.SpaceTimeLevyArea)
    terms = diffrax.MultiTerm(
      diffrax.ODETerm(lambda t, y, scale: -scale * y**3),
      diffrax.ControlTerm(lambda t, y, scale: jnp.diag(0.3 * scale * y), noise),
    )
    solution, cost = solver_cost.solve_with_cost(
      terms, diffrax.SPaRK(), 0.0, 1.0, 0.5, jnp.array([1.0, 0.5]), scale,
      rtol=1e-2 * size, atol=1e-2 * size, max_steps=2, adjoint=DIRECT,
    )  # fmt: skip
    return cost.error_sum

  key = jax.random.key(0)
  function = jax.jit(jax.value_and_grad(cost))
  value, slope = function(1.0, 1.0, key)
  difference = (function(1.0 + 1e-5, 1.0, key)[0] - function(1.0 - 1e-5, 1.0, key)[0]) / 2e-5
  assert value > 1e-3
  np.testing.assert_allclose(slope, difference, rtol=1e-6)
  np.testing.assert_allclose(function(1.0, 4.0, key)[0], value / 4, rtol=1e-9)


def test_combined_cost_and_bad_input():
  cost = solver_cost.SolverCost(*jnp.array([3.0, 1.0, 4.0, 2.0]), jnp.int32(2), jnp.int32(13))
  assert float(solver_cost.combined_cost(cost, stability_size=4.0)) == pytest.approx(1.5 + 0.1 * 2 / 4)
  with pytest.raises(ValueError, match="stiffness estimate"):
    solver_cost.combined_cost(cost._replace(stiffness_sum=None), stability_size=1.0)
  with pytest.raises(ValueError, match="stability_size must lie"):
    solver_cost.combined_cost(cost, stability_size=0.0)
  with pytest.raises(ValueError, match="stiffness_weight must lie"):
    solver_cost.combined_cost(cost, stability_size=1.0, stiffness_weight=-1)
  with pytest.raises(ValueError, match="solver must be Tsit5"):
    solver_cost.stability_size(diffrax.Heun())
  terms = diffrax.ODETerm(lambda t, y, args: -y)
  solve = lambda solver=None, **options: solver_cost.solve_with_cost(
    terms, solver or diffrax.Tsit5(), 0.0, 1.0, 0.5, jnp.ones(2), **options
  )
  with pytest.raises(ValueError, match="rtol and atol must be given"):
    solve()
  with pytest.raises(ValueError, match="rtol must lie"):
    solve(rtol=float("nan"), atol=1.0)
  with pytest.raises(ValueError, match="atol must lie"):
    solve(rtol=1e-3, atol=0.0)
  with pytest.raises(ValueError, match="adjoint must differentiate"):
    solve(rtol=1e-3, atol=1e-3, adjoint=diffrax.BacksolveAdjoint())
  with pytest.raises(ValueError, match="solver must estimate its error"):
    solve(diffrax.Euler(), rtol=1e-3, atol=1e-3)


def test_constants_and_tableaux():
  assert solver_cost.stability_size(diffrax.HalfSolver(diffrax.Dopri5())) == 3.3066


EXEMPT = {
  "HeuristicSolver": "a solver of diffrax, whose steps the solves take",
  "SolverCost": "result of solve_with_cost",
  "combined_cost": "a sum of two numbers of a solve, in its tests",
  "solve_with_cost": "a whole solve by diffrax with functions of the caller",
  "stability_size": "a number of a solver",
}
