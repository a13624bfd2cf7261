"""Adversarial adaptive sampling: the closed form, the transport identity, which gradients flow, and the equations."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxreg.models import MLP
from jaxreg.solvers import adaptive_sampling, peak_equations
from tests.conformance import EXAMPLES, row


def cosines(points, coefficients, level=1.0):
  return level + sum(a * np.cos((j + 1) * np.pi * points) for j, a in enumerate(coefficients))


@pytest.mark.parametrize("coefficients", [(0.4, -0.3, 0.2), (0.0,)])
def test_maximum_over_densities_on_a_grid_is_the_closed_form(coefficients, x64):
  """Without cosines, at a constant residual, the uniform density is best."""
  cells, smoothness = 60, 0.05
  points = (np.arange(cells) + 0.5) / cells
  squared, step = cosines(points, coefficients), 1 / cells
  # The objective is quadratic: its stationary point solves a linear system, mirrored cells at both ends.
  second = (np.diag(np.full(cells, -2.0)) + np.eye(cells, k=1) + np.eye(cells, k=-1)) / step**2
  second[0, 0] = second[-1, -1] = -1 / step**2
  system = np.block([[2 * smoothness * second, -np.ones((cells, 1))], [np.ones((1, cells)) * step, np.zeros((1, 1))]])
  density = np.linalg.solve(system, np.concatenate([-squared, [1]]))[:-1]
  objective = step * (squared @ density) - smoothness * np.sum(np.diff(density) ** 2) / step
  adversary = adaptive_sampling.optimal_adversary_1d(
    jnp.asarray(points), jnp.asarray(coefficients), level=1.0, smoothness=smoothness
  )
  assert density.min() > 0
  np.testing.assert_allclose(adversary.density, density, rtol=1e-3)
  np.testing.assert_allclose(adversary.objective, objective, rtol=1e-3)
  if not any(coefficients):
    np.testing.assert_allclose(density, 1, rtol=1e-9)
  else:  # smooth adversaries are uniform
    wide = adaptive_sampling.optimal_adversary_1d(
      jnp.asarray(points), jnp.asarray(coefficients), level=1.0, smoothness=1e6
    )
    np.testing.assert_allclose(wide.density, 1, atol=1e-6)


def test_transport_identity():
  rng, volume = np.random.default_rng(0), 4.0
  squared, density = rng.exponential(size=200), rng.exponential(size=200)
  cell = volume / 200
  density /= density.sum() * cell
  level = squared.sum() * cell
  moved = cell * (density @ (squared / level)) - cell * density.sum() / volume
  np.testing.assert_allclose(cell * (squared @ density) - level / volume, level * moved, rtol=1e-10)


def toy_log_density(alpha, points):
  """A normal density whose mean and log scale are `alpha`."""
  return jnp.sum(jax.scipy.stats.norm.logpdf(points, alpha[0], jnp.exp(alpha[1])), axis=-1)


@functools.partial(jax.jit, static_argnames="baseline")
def sampler_gradient(alpha, old, points, squared, smoothness, baseline=0.0):
  def loss(alpha, squared):
    log_density, score = adaptive_sampling.log_density_and_score(lambda x: toy_log_density(alpha, x), points)
    old_log_density = toy_log_density(old, points)
    return jnp.mean(
      adaptive_sampling.aas_sampler_loss(
        log_density, score, squared, old_log_density, smoothness=smoothness, baseline=baseline
      )
    )

  return jax.grad(loss, argnums=(0, 1))(alpha, squared)


def test_sampler_gradient_is_that_of_the_score_function(x64):
  rng, alpha = np.random.default_rng(0), jnp.array([0.3, -0.2])
  points, squared = jnp.asarray(rng.normal(size=(50, 2))), jnp.asarray(rng.exponential(size=50))
  gradient, to_residuals = sampler_gradient(alpha, alpha, points, squared, 0.0)
  scores = np.asarray(jax.jit(jax.jacfwd(toy_log_density))(alpha, points))
  np.testing.assert_allclose(gradient, -np.mean(np.asarray(squared)[:, None] * scores, 0), rtol=1e-10, atol=1e-12)
  np.testing.assert_array_equal(to_residuals, 0)
  # The smoothness term as the formula says, away from p = p' too.
  other = jnp.array([0.1, 0.1])
  gradient, _ = sampler_gradient(alpha, other, points, 0 * squared, 1.0)
  density = lambda alpha: np.exp(np.asarray(toy_log_density(alpha, points)))
  slope = lambda alpha: density(alpha)[:, None] * -(np.asarray(points) - alpha[0]) / np.exp(2 * alpha[1])
  value = lambda alpha: np.mean(np.sum(slope(alpha) ** 2, 1) / density(other))
  for index in range(2):
    shift = np.eye(2)[index] * 1e-5
    numeric = (value(np.asarray(alpha) + shift) - value(np.asarray(alpha) - shift)) / 2e-5
    np.testing.assert_allclose(gradient[index], numeric, rtol=1e-6)


def test_constants_in_the_residual_do_not_move_the_sampler_on_average(x64):
  rng, alpha, count = np.random.default_rng(0), jnp.array([0.3, -0.2]), 20_000
  points = 0.3 + np.exp(-0.2) * rng.normal(size=(count, 2))
  squared = jnp.asarray(np.sum(points**2, 1))
  more, _ = sampler_gradient(alpha, alpha, jnp.asarray(points), squared + 1, 0.0)
  less, _ = sampler_gradient(alpha, alpha, jnp.asarray(points), squared, 0.0)
  centred, _ = sampler_gradient(alpha, alpha, jnp.asarray(points), squared + 1, 0.0, baseline=1.0)
  # The scores' variances are 2 / scale^2 and 4.
  errors = 3 * np.sqrt(np.array([2 * np.exp(0.4), 4.0]) / count)
  assert (np.abs(more - less) < errors).all()
  np.testing.assert_allclose(centred, less, rtol=1e-9)


def test_no_gradient_from_the_solution_to_the_sampler():
  residual = lambda theta, x: theta * x[:, 0]

  @jax.jit
  def gradients(theta, alpha):
    loss = lambda theta, alpha: adaptive_sampling.aas_pinn_loss(
      lambda x: residual(theta, x),
      alpha * jnp.array([[1.0], [3.0]]),
      boundary_residual=lambda x: residual(theta, x),
      boundary_points=alpha * jnp.array([[2.0]]),
      boundary_weight=10.0,
    )
    return loss(theta, alpha), jax.grad(loss, argnums=(0, 1))(theta, alpha)

  value, (to_theta, to_alpha) = gradients(2.0, 1.0)
  np.testing.assert_allclose([value, to_theta, to_alpha], [180, 180, 0])


def test_cross_entropy_and_normalization():
  log_density, squared, old = jnp.array([-1.0, 2.0]), jnp.array([2.0, 4.0]), jnp.array([0.0, jnp.log(2.0)])
  losses = adaptive_sampling.das_cross_entropy_loss(log_density, squared, old)
  np.testing.assert_allclose(losses, [2, -4], rtol=1e-6)
  normalized = adaptive_sampling.normalize_squared_residuals(squared, old, volume=4.0)
  np.testing.assert_allclose(normalized, squared * 4 / 2, rtol=1e-6)
  np.testing.assert_array_equal(adaptive_sampling.normalize_squared_residuals(0 * squared, old, volume=4.0), 0)


def test_extreme_densities_and_residuals():
  log_density = jnp.array([-1e4, 1e4, 0.0])
  total = lambda log_density, score: jnp.sum(
    adaptive_sampling.aas_sampler_loss(
      log_density, score, jnp.array([1e8, 0.0, 1.0]), log_density[::-1], smoothness=0.1, baseline=1.0
    )
  )
  values = jax.jit(jax.value_and_grad(total, argnums=(0, 1)))(log_density, 1e4 * jnp.ones((3, 2)))
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(values))


EQUATIONS = {
  "one peak": (2, peak_equations.poisson_peak_equation()),
  "two peaks": (2, peak_equations.two_peaks_equation()),
  "ten dimensions": (10, peak_equations.cubic_peak_equation()),
}


@pytest.mark.parametrize("name", EQUATIONS)
def test_solutions_solve_their_equations(name, x64):
  dimension, equation = EQUATIONS[name]
  centers = np.resize([[0.5, 0.5], [-0.5, -0.5]], (40, 2)) if dimension == 2 else np.zeros((40, dimension))
  points = jnp.asarray(centers + 0.05 * np.random.default_rng(0).normal(size=centers.shape))

  @jax.jit
  @jax.vmap
  def evaluate(point):
    return equation.residual(equation.solution, point), equation.source(point)

  residuals, sources = evaluate(points)
  assert np.abs(residuals).max() < 1e-6 * np.abs(sources).max()


@pytest.mark.parametrize("name", EQUATIONS)
def test_derivatives_in_one_pass_are_those_of_automatic_differentiation(name, x64):
  dimension, equation = EQUATIONS[name]
  model = MLP((7, 5, 1), activation=jnp.tanh)
  points = jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (6, dimension)))
  params = jax.jit(model.init)(jax.random.key(0), points)["params"]
  params = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf, np.float64) + 0.1), params)

  @jax.jit
  def compare(params):
    network = lambda params: lambda x: model.apply({"params": params}, x[None])[0, 0]
    derivatives = adaptive_sampling.tanh_network_derivatives(params, points)
    at_once = lambda params: equation.residuals(adaptive_sampling.tanh_network_derivatives(params, points), points)
    one_by_one = lambda params: jax.vmap(lambda x: equation.residual(network(params), x))(points)
    slopes = [jax.grad(lambda params, f=f: jnp.sum(f(params) ** 2))(params) for f in (at_once, one_by_one)]
    return (derivatives.value, at_once(params), slopes[0]), (
      jax.vmap(network(params))(points), one_by_one(params), slopes[1],
    )  # fmt: skip

  chex.assert_trees_all_close(*compare(params), rtol=1e-9, atol=1e-9)


def test_samples_lie_in_the_box():
  sample = lambda key, count: jax.random.normal(key, (count, 2)) * 0.7
  draw = jax.jit(lambda key: adaptive_sampling.sample_in_box(key, sample, 64, low=-1.0, high=1.0))
  points = np.asarray(draw(jax.random.key(0)))
  assert points.shape == (64, 2) and np.abs(points).max() <= 1
  raw = np.asarray(sample(jax.random.key(0), 80))
  kept = raw[(np.abs(raw) <= 1).all(1)]
  np.testing.assert_allclose(points[: len(kept)], kept[:64], rtol=1e-6)
  np.testing.assert_array_equal(np.abs(points[len(kept) :]).max(1), 1)


def layer(inputs, outputs):
  return {"Dense_0": {"kernel": jnp.ones((inputs, outputs)), "bias": jnp.ones(outputs)}}


@pytest.mark.parametrize(
  "call, message",
  [
    (lambda: adaptive_sampling.aas_pinn_loss(lambda x: x[:, 0], jnp.ones((2, 1), int)), "points must be floating"),
    (
      lambda: adaptive_sampling.aas_pinn_loss(lambda x: x[:, 0], jnp.ones((2, 1)), boundary_points=jnp.ones((2, 1))),
      "must be given together",
    ),
    (
      lambda: adaptive_sampling.aas_sampler_loss(
        jnp.ones(2), jnp.ones(2), jnp.ones(2), jnp.ones(2), smoothness=1.0
      ),
      "score must have shape",
    ),
    (
      lambda: adaptive_sampling.das_cross_entropy_loss(jnp.ones(2), jnp.ones(1), jnp.ones(2)),
      "arrays must have equal shapes",
    ),
    (
      lambda: adaptive_sampling.normalize_squared_residuals(jnp.ones(2), jnp.ones(2), volume=0.0),
      "volume must lie in",
    ),
    (
      lambda: adaptive_sampling.optimal_adversary_1d(jnp.ones(2), jnp.ones(2), level=1.0, smoothness=0.0),
      "smoothness must lie in",
    ),
    (lambda: adaptive_sampling.tanh_network_derivatives(layer(3, 1), jnp.ones((2, 2))), "points must have shape"),
    (lambda: adaptive_sampling.tanh_network_derivatives(layer(2, 3), jnp.ones((2, 2))), "must have one output, got 3"),
    (lambda: peak_equations.poisson_peak_equation(sharpness=float("nan")), "sharpness must lie in"),
  ],
)  # fmt: skip
def test_bad_input(call, message):
  with pytest.raises(ValueError, match=message):
    call()


@pytest.mark.golden
def test_golden_36_aas_adversary(golden, x64):
  seen, file = 0, golden("36-aas")
  for case, arrays, _ in file.cases():
    if "coef" not in arrays:
      continue
    seen += 1
    coefficients, smoothness = arrays["coef"], file.meta["cases"][case.removeprefix("case")]["beta"]
    level = arrays["r2"] - cosines(arrays["x"], coefficients, 0.0)
    np.testing.assert_allclose(level, level[0], rtol=1e-10)
    adversary = adaptive_sampling.optimal_adversary_1d(
      jnp.asarray(arrays["x"]), jnp.asarray(coefficients), level=level[0], smoothness=smoothness
    )
    np.testing.assert_allclose(adversary.density, arrays["out_pstar"], rtol=1e-8)
    np.testing.assert_allclose(adversary.objective, arrays["out_max_objective"], rtol=1e-8)
  assert seen


_BAD_DENSITIES = (
  ("shapes", lambda log_density, *rest: (log_density[1:], *rest)),
  ("log_density", lambda log_density, *rest: (log_density.astype(np.int32), *rest)),
)


ROWS = [
  row(
    adaptive_sampling.aas_sampler_loss,
    lambda rng: (rng.normal(size=EXAMPLES), rng.normal(size=(EXAMPLES, 2)), *rng.uniform(size=(2, EXAMPLES))),
    bad=(*_BAD_DENSITIES, ("score", lambda log_density, score, *rest: (log_density, score[:1], *rest))),
    examples="any",
    options=dict(smoothness=(0.0, 0.5), baseline=(0.0, 1.0)),
  ),
  row(
    adaptive_sampling.das_cross_entropy_loss,
    lambda rng: (rng.normal(size=EXAMPLES), *rng.uniform(size=(2, EXAMPLES))),
    bad=_BAD_DENSITIES,
    examples="any",
  ),
]


EXEMPT = {
  "Derivatives": "result of tanh_network_derivatives",
  "OptimalAdversary": "result of optimal_adversary_1d",
  "aas_pinn_loss": "takes functions of the caller",
  "laplacian": "takes a function of the caller",
  "log_density_and_score": "takes a function of the caller",
  "normalize_squared_residuals": "divides by a mean, which extreme densities make extreme",
  "optimal_adversary_1d": "a closed form for tests, in the golden test",
  "sample_in_box": "takes a function of the caller",
  "tanh_network_derivatives": "takes a network's parameters; has its own test",
}
