"""Bagged linear regression: the estimator, its asymptotic risk against closed forms and simulation, bag sizes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxreg.kernels import bagged_regression as theory
from jaxreg.losses.aggregate import interpolated_bag_squared_loss
from tests.conformance import EXAMPLES, EXTREME, row, unchanged


@pytest.mark.golden
def test_golden_aggregate_theory(golden, x64):
  for name, arrays, meta in golden("06-aggregate").cases():
    close = lambda got, want: np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-12, err_msg=name)
    if meta["kind"] == "finite_sample":
      theta = theory.interpolated_ridge(arrays["X"], arrays["bag_mean_y"], rho=arrays["rho"])
      close(theta, arrays["out_theta_interp"])
    elif meta["kind"] == "asymptotic_risk":
      aspect, size, rho, noise, signal = arrays["inputs_psi_k_rho_sigma2_r2"].T
      close(theory.aggregate_fixed_point(aspect, size, rho), arrays["out_G"])
      bias, variance = theory.aggregate_risk(aspect, size, rho, noise=noise, signal=signal)
      close(bias, arrays["out_bias2"])
      close(variance, arrays["out_var"])
    else:
      aspect, noise, signal, clip, epsilon = arrays["inputs_psi_sigma2_r2_B_eps"].T
      got = theory.optimal_instance_bag_size(aspect, clip=clip, epsilon=epsilon, noise=noise, signal=signal)
      close(got, arrays["out_kstar_instance"])


def sample(bags=30, size=4, dimensions=7, seed=0):
  rng = np.random.default_rng(seed)
  return jnp.asarray(rng.normal(size=(bags, size, dimensions))), jnp.asarray(rng.normal(size=bags))


@pytest.mark.parametrize("rho, ridge", [(0.0, 0.0), (0.3, 0.0), (1.0, 0.2)])
def test_estimator_is_stationary(rho, ridge, x64):
  features, means = sample()
  objective = lambda theta: (
    interpolated_bag_squared_loss(features @ theta, means, rho=rho).mean() + ridge * jnp.sum(theta**2)
  )
  gradient = jax.grad(objective)(theory.interpolated_ridge(features, means, rho=rho, ridge=ridge))
  np.testing.assert_allclose(gradient, 0, atol=1e-10)


def test_instance_level_is_least_squares_on_repeated_means(x64):
  features, means = sample()
  expected = np.linalg.lstsq(features.reshape(-1, 7), np.repeat(means, 4))[0]
  np.testing.assert_allclose(theory.interpolated_ridge(features, means, rho=1.0), expected, rtol=1e-10)


def test_bag_level_with_few_bags_has_the_least_norm(x64):
  features, means = sample(bags=4)
  expected = np.linalg.pinv(features.mean(1)) @ means
  np.testing.assert_allclose(theory.interpolated_ridge(features, means, rho=0.0), expected, rtol=1e-9)


def test_fixed_point_satisfies_its_equation(x64):
  aspect, size, rho = np.meshgrid([0.05, 0.3, 0.9], [1, 2.5, 8], [1e-4, 0.2, 1.0, 7.0])
  g = theory.aggregate_fixed_point(aspect, size, rho)
  assert (g > 0).all()
  np.testing.assert_allclose(g / (1 + g) + (size - 1) * rho * g / (1 + rho * g), size * aspect, rtol=1e-10)


@pytest.mark.parametrize("bags", [12, 3])
@pytest.mark.parametrize("rho, ridge", [(0.0, 0.0), (0.0, 0.3), (0.4, 0.0), (0.4, 0.3)])
def test_gradients_of_the_estimator_at_weights_of_zero(x64, bags, rho, ridge):
  """One-sided differences where a weight is zero; of least-norm solutions in the features and the means."""
  rng = np.random.default_rng(0)
  features, means = jnp.asarray(rng.normal(size=(bags, 3, 5))), jnp.asarray(rng.normal(size=bags))
  direction = jnp.asarray(rng.normal(size=5))
  total = lambda features, means, rho, ridge: (
    direction @ theory.interpolated_ridge(features, means, rho=rho, ridge=ridge)
  )
  point = (features, means, jnp.float64(rho), jnp.float64(ridge))
  gradients = jax.jit(jax.grad(total, argnums=(0, 1, 2, 3)))(*point)
  singular = bags == 3 and rho == 0 and ridge == 0
  for index, name in ((2, "rho"), (3, "ridge")):
    if singular and name == "rho":
      assert jnp.isfinite(gradients[index])  # there the solution jumps
      continue
    h, at = 1e-5, list(point)
    values = []
    for multiple in (0, 1, 2):
      at[index] = point[index] + multiple * h
      values.append(float(total(*at)))
    difference = (-3 * values[0] + 4 * values[1] - values[2]) / (2 * h)
    np.testing.assert_allclose(gradients[index], difference, rtol=1e-4, atol=1e-5)
  for index in (0, 1):
    step = jnp.asarray(rng.normal(size=point[index].shape))
    at = lambda h, index=index, step=step: total(*point[:index], point[index] + h * step, *point[index + 1 :])
    np.testing.assert_allclose(jnp.vdot(gradients[index], step), (at(1e-6) - at(-1e-6)) / 2e-6, rtol=1e-5, atol=1e-7)
  second = jax.grad(lambda rho: jax.grad(lambda r: total(features, means, r, ridge))(rho))(point[2])
  assert jnp.isfinite(second)


def test_risk_in_closed_cases(x64):
  close = lambda got, want, **options: np.testing.assert_allclose(got, want, **{"rtol": 1e-9, "atol": 1e-12, **options})
  noise, signal = 0.7, 1.3
  risk = lambda *point: theory.aggregate_risk(*point, noise=noise, signal=signal)
  for rho in (0.0, 0.5, 1.0):  # single examples: ordinary least squares
    close(risk(0.4, 1, rho), (0, noise * 0.4 / 0.6))
  for aspect, size in ((0.1, 4), (0.3, 8), (0.7, 2)):  # instance level
    ratio = aspect / (1 - aspect)
    bias = signal * ((1 - 1 / size) ** 2 + ratio * (size - 1) / size**2)
    close(risk(aspect, size, 1.0), (bias, noise * ratio / size))
  close(risk(0.1, 4, 0.0), (0, noise * 0.4 / 0.6))  # bag level, more bags than dimensions
  close(risk(0.1, 4, 1e-10), (0, noise * 0.4 / 0.6), atol=1e-8)
  aspect, size, delta = 0.4, 4, 1.6  # bag level, fewer
  close(risk(aspect, size, 0.0), (signal * (1 - 1 / delta), noise / (delta - 1)))
  limit = signal * (delta - 1) * (size - delta + 1) / (delta * (size - delta))
  close(risk(aspect, size, 1e-9), (limit, noise * (size - 1) / ((size - delta) * (delta - 1))), rtol=1e-6)


def test_risk_against_simulation():
  bags, dimensions, size, rho = 200, 100, 4, 0.3
  truth = jnp.ones(dimensions) / 10

  def draw(key):
    keys = jax.random.split(key)
    features = jax.random.normal(keys[0], (bags, size, dimensions))
    noise = jax.random.normal(keys[1], (bags, size)).mean(1)
    means = features.mean(1) @ truth
    signal, error = (theory.interpolated_ridge(features, y, rho=rho) for y in (means, noise))
    return jnp.sum((signal - truth) ** 2), jnp.sum(error**2)

  bias, variance = jax.jit(lambda keys: jax.lax.map(draw, keys))(jax.random.split(jax.random.key(0), 20))
  expected = theory.aggregate_risk(dimensions / (bags * size), size, rho)
  np.testing.assert_allclose(expected, (0.3195, 0.1374), atol=6e-5)
  np.testing.assert_allclose((bias.mean(), variance.mean()), expected, rtol=0.08)


def test_best_weight_is_a_minimum(x64):
  best = theory.optimal_rho(0.1, 4)
  risk = lambda rho: sum(theory.aggregate_risk(0.1, 4, rho))
  # Around 0.137, a point of a grid, the risk is flat: it is 0.364 there too.
  np.testing.assert_allclose((risk(best), risk(0.137), risk(1.0)), (0.364, 0.364, 0.611), atol=6e-4)
  np.testing.assert_allclose(best, 0.137, rtol=0.03)
  assert risk(best) <= min(risk(best * 1.05), risk(best / 1.05))


@pytest.mark.parametrize(
  "aspect, noise, signal, clip, epsilon, real", [(0.3, 1, 1, 2, 1, 25.0), (0.1, 0.5, 2, 3, 0.5, 18.149)]
)
def test_best_bag_size_of_instance_level(aspect, noise, signal, clip, epsilon, real, x64):
  options = {"clip": clip, "epsilon": epsilon, "noise": noise, "signal": signal}
  np.testing.assert_allclose(theory.optimal_instance_bag_size(aspect, **options), real, atol=5e-4)
  size, _ = theory.optimal_bag_size(aspect, rho=1.0, largest=60, **options)
  assert abs(int(size) - real) <= 1


def test_private_bag_level_prefers_single_examples(x64):
  assert int(theory.optimal_bag_size(0.1, rho=0.0, clip=2.0, epsilon=1.0, largest=9)[0]) == 1


@pytest.mark.parametrize(
  "call, named",
  [
    (lambda: theory.aggregate_risk(1.2, 4, 0.1), "aspect"),
    (lambda: theory.aggregate_risk(0.2, 0.5, 0.1), "bag_size"),
    (lambda: theory.interpolated_ridge(jnp.zeros((3, 2)), jnp.zeros(3), rho=0.1), "features"),
    (lambda: theory.interpolated_ridge(jnp.zeros((3, 2, 1)), jnp.zeros(2), rho=0.1), "bag_means"),
    (lambda: theory.optimal_bag_size(0.2, rho=1.0, clip=1.0, epsilon=1.0, largest=0), "largest"),
    (lambda: theory.effective_noise(1.0, clip=1.0, epsilon=0.0, bag_size=2), "epsilon"),
  ],
)
def test_bad_input(call, named):
  with pytest.raises(ValueError, match=named):
    call()


def _aspects(rng):
  """Dimensions per example, bag sizes and weights of the spread."""
  return rng.uniform(0.1, 0.9, EXAMPLES), rng.uniform(1.1, 8, EXAMPLES), rng.uniform(0.1, 2, EXAMPLES)


ROWS = [
  row(theory.aggregate_fixed_point, _aspects, extreme=unchanged, examples="any", wide=True),
  row(
    theory.aggregate_risk,
    _aspects,
    call=lambda *arguments, **variances: list(theory.aggregate_risk(*arguments, **variances)),
    extreme=unchanged,
    wide=True,
    options=dict(noise=(0.5, 2.0), signal=(0.5, 2.0)),
  ),
  row(
    theory.effective_noise,
    lambda rng: (rng.uniform(0.5, 2, EXAMPLES),),
    extreme=unchanged,
    examples="any",
    wide=True,
    options=dict(clip=(0.5, 2.0), epsilon=(0.5, 2.0), bag_size=(1.0, 4.0)),
  ),
  row(
    theory.interpolated_ridge,
    lambda rng: (rng.normal(size=(6, 2, 3)), rng.normal(size=6)),
    extreme=lambda features, means: (EXTREME * features, EXTREME * means),
    bad=(
      ("features", lambda features, means: (features.astype(np.int32), means)),
      ("bag_means", lambda features, means: (features, means[1:])),
    ),
    wide=True,
    options=dict(rho=(0.1, 1.0), ridge=(0.1, 1.0)),
  ),
  row(
    theory.optimal_instance_bag_size,
    lambda rng: (rng.uniform(0.1, 0.9, EXAMPLES),),
    extreme=unchanged,
    examples="any",
    wide=True,
    options=dict(clip=(0.5, 2.0), epsilon=(0.5, 2.0)),
  ),
]


EXEMPT = {
  "optimal_bag_size": "the best of a list of sizes, where ties are decided by rounding",
  "optimal_rho": "a search on a flat optimum: rounding moves it more than it moves the risk",
}
