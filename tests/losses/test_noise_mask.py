"""Noise masks: golden vectors, densities and blurs against SciPy, and what both objectives do to a policy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import integrate, ndimage, stats

from jaxreg.layers import NoiseMaskPolicy
from jaxreg.losses import noise_mask
from tests.conformance import CLASSES, EXAMPLES, row

CELLS = 4


def _mask(rng):
  return rng.uniform(0.1, 0.9, (EXAMPLES, CELLS))


def _policy(rng):
  return rng.normal(size=(EXAMPLES, CELLS)), rng.normal(size=(EXAMPLES, CELLS))


def _call(log_alpha, log_beta, mask, logits, labels, **options):
  return noise_mask.noise_mask_loss(log_alpha, log_beta, mask, logits, labels, **options)[0]


_BAD = (
  ("log_alpha", lambda a, *rest: (a.astype(np.int32), *rest)),
  ("log_beta", lambda a, b, *rest: (a, b.astype(np.int32), *rest)),
  ("log_alpha|log_beta", lambda a, b, *rest: (a, b[:, 1:], *rest)),
  ("mask", lambda a, b, m, *rest: (a, b, m[1:], *rest)),
)
ROWS = [
  row(
    noise_mask.beta_log_density,
    lambda rng: (_mask(rng), *_policy(rng)),
    bad=(
      ("mask", lambda m, a, b: (m.astype(np.int32), a, b)),
      ("mask", lambda m, a, b: (m[1:], a, b)),
      ("log_alpha", lambda m, a, b: (m, a.astype(np.int32), b)),
    ),
    extreme=lambda m, a, b: (np.resize([0.0, 1.0, 0.5], m.shape), 3 * np.sign(a), 3 * np.sign(b)),
    examples="any",
    differentiable=False,  # the mask is constant
  ),
  *(
    row(
      noise_mask.noise_mask_loss,
      lambda rng: (
        *_policy(rng),
        _mask(rng),
        2 * rng.normal(size=(EXAMPLES, CLASSES)),
        rng.integers(0, CLASSES, EXAMPLES).astype(np.int32),
      ),
      call=_call,
      bad=(*_BAD, ("labels", lambda a, b, m, z, y: (a, b, m, z, y[1:]))),
      extreme=lambda a, b, m, z, y: (3 * np.sign(a), 3 * np.sign(b), np.resize([0.0, 1.0, 0.5], m.shape), 50 * z, y),
      options=dict(objective=objective),
    )  # fmt: skip
    for objective in noise_mask.OBJECTIVES
  ),
  row(
    noise_mask.enlarge_noise_mask,
    lambda rng: (_mask(rng),),
    bad=(("mask", lambda m: (m.astype(np.int32),)), ("mask", lambda m: (m[:, 1:],))),
    extreme=lambda m: (np.resize([0.0, 1.0], m.shape),),
    examples="any",
    options=dict(size=6, kernel_size=3),
  ),
]
EXEMPT = {
  "NoiseMaskTerms": "result of noise_mask_loss",
  "sample_noise_mask": "draws random numbers, which rejection makes different in other layouts; tested below",
}


@pytest.mark.golden
def test_golden_34_noise_mask(golden, x64):
  for name, case, hp in golden("34-noise_mask").cases("case"):
    close = functools.partial(np.testing.assert_allclose, rtol=1e-8, atol=1e-12, err_msg=name)
    variables = _variables(case)
    policy = NoiseMaskPolicy(cells=case["mask"].shape[1])
    (a, b), updated = policy.apply(variables, case["feat"], mutable=["batch_stats", "bases"])
    close(a, case["out_log_alpha"])
    close(b, case["out_log_beta"])
    for key in ("alpha", "beta"):
      close(updated["bases"][key], case[f"out_base_{key}_next"][0])
    options = dict(margin=0.0)
    density = noise_mask.beta_log_density(case["mask"], a, b, **options)
    close(density, case["out_logp"])
    labels = case["labels"]
    total = lambda a, b, z, objective, m=case["mask"], y=labels, o=options: noise_mask.noise_mask_loss(
      a, b, m, z, y, objective=objective, **o
    )
    differentiate = jax.value_and_grad(total, argnums=(0, 1, 2), has_aux=True)
    (loss, terms), gradients = differentiate(a, b, case["logits"], "official")
    close(loss, case["out_loss"])
    close(terms.log_density, case["out_loglik"].mean())
    for gradient, key in zip(gradients, ("log_alpha", "log_beta", "logits")):
      close(gradient, case[f"grad_{key}"])
    (loss, terms), gradients = differentiate(a, b, case["logits"], "reinforce")
    close(loss - terms.cross_entropy, case["out_reinforce"])
    for gradient, key in zip(gradients, ("log_alpha", "log_beta")):
      close(gradient, case[f"grad_{key}_reinforce"])
    size = case["out_mask_upsampled"].shape[-1]
    close(noise_mask.enlarge_noise_mask(case["mask"], size=size), case["out_mask_upsampled"])
    blur = dict(kernel_size=hp["kernel"], width=hp["sigma"])
    close(noise_mask.enlarge_noise_mask(case["mask"], size=size, **blur), case["out_mask_blurred"])


def _variables(case):
  """The official heads' parameters in the policy's names; linear weights are (out, in)."""
  params, stats = {}, {}
  for head in ("alpha", "beta"):
    for place, (linear, norm) in {"first": (0, 1), "second": (3, 4), "last": (6, None)}.items():
      of = lambda index, kind, head=head: case[f"{head}_{index}_{kind}"]
      params[f"{head}_{place}"] = {"kernel": of(linear, "weight").T, "bias": of(linear, "bias")}
      if norm is not None:
        params[f"{head}_{place}_norm"] = {"scale": of(norm, "weight"), "bias": of(norm, "bias")}
        width = of(norm, "bias").shape
        stats[f"{head}_{place}_norm"] = {"mean": np.zeros(width), "var": np.ones(width)}
  bases = {head: case[f"base_{head}"][0] for head in ("alpha", "beta")}
  return {"params": params, "batch_stats": stats, "bases": bases}


def test_density_is_scipys_and_integrates_to_one(x64):
  for a, b in ((0.0, 0.0), (-1.0, 1.5), (2.0, 0.3)):
    density = lambda m, a=a, b=b: noise_mask.beta_log_density(jnp.array([m]), jnp.array([a]), jnp.array([b]))[0]
    points = np.linspace(0.01, 0.99, 9)
    expected = stats.beta.logpdf(points, np.exp(a), np.exp(b))
    found = noise_mask.beta_log_density(points, np.full(9, a), np.full(9, b))
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12)
  total, _ = integrate.quad(lambda m: np.exp(float(density(m))), 1e-6, 1 - 1e-6, limit=50)
  np.testing.assert_allclose(total, 1, atol=1e-6)


def test_samples_have_the_distribution_and_no_gradient():
  a, b = jnp.full((4000, 1), 1.0), jnp.full((4000, 1), -0.5)
  mask = noise_mask.sample_noise_mask(jax.random.key(0), a, b)
  distance = stats.kstest(np.asarray(mask)[:, 0], stats.beta(np.exp(1.0), np.exp(-0.5)).cdf).statistic
  assert distance < 1.63 / np.sqrt(4000)  # one in a hundred
  drawn = lambda a: noise_mask.sample_noise_mask(jax.random.key(0), a, b).sum()
  assert not jax.grad(drawn)(a).any()
  extreme = noise_mask.sample_noise_mask(jax.random.key(1), jnp.full((50, 2), -6.0), jnp.full((50, 2), -6.0))
  assert extreme.min() >= 1e-6 and extreme.max() <= 1 - 1e-6
  density = noise_mask.beta_log_density(extreme, jnp.full((50, 2), -6.0), jnp.full((50, 2), -6.0))
  assert jnp.isfinite(density).all()


def test_uniform_masks_and_the_classifiers_gradient(x64):
  rng = np.random.default_rng(0)
  logits, labels, mask = rng.normal(size=(6, 3)), rng.integers(0, 3, 6), rng.uniform(0.1, 0.9, (6, 9))
  zeros = np.zeros((6, 9))
  cost = lambda z: optax.softmax_cross_entropy_with_integer_labels(z, labels).mean()
  np.testing.assert_allclose(_call(zeros, zeros, mask, logits, labels), np.log(9) * cost(logits), rtol=1e-12)
  a, b = rng.normal(size=(6, 9)), rng.normal(size=(6, 9))
  terms = noise_mask.noise_mask_loss(a, b, mask, logits, labels)[1]
  slope = jax.grad(_call, argnums=3)(a, b, mask, logits, labels)
  np.testing.assert_allclose(slope, terms.log_density * jax.grad(cost)(logits), rtol=1e-10)
  assert not np.any(jax.grad(_call, argnums=2)(a, b, mask, logits, labels))


def test_what_a_constant_cost_does_to_the_policy():
  """Nothing on average with the joint density; the sum of densities drives it unless masks are uniform."""
  logits, labels = jnp.zeros((200_000, 2)), jnp.zeros(200_000, int)

  def mean_slope(log_parameter, objective):
    a = jnp.full((200_000, 4), log_parameter)
    mask = noise_mask.sample_noise_mask(jax.random.key(2), a, a)
    slope = len(labels) * jax.grad(_call)(a, a, mask, logits, labels, objective=objective)
    return float(slope.mean()), float(slope.std() / np.sqrt(slope.size))

  for value in (-0.7, 0.0, 1.1):
    mean, error = mean_slope(value, "reinforce")
    assert abs(mean) < 4 * error
    mean, error = mean_slope(value, "official")
    assert (abs(mean) < 4 * error) == (value == 0) and np.sign(round(mean / error)) == np.sign(value)


def test_reinforce_is_the_gradient_of_the_expected_cost():
  """One cell with the cost -log p(m): by its closed form, E[(m - m0)^2] = var + bias^2."""
  size, target, a, b = 400_000, 0.3, 0.4, -0.2

  def expected(a):
    alpha, beta = jnp.exp(a), jnp.exp(b)
    total = alpha + beta
    return alpha * beta / (total**2 * (total + 1)) + (alpha / total - target) ** 2

  rows = lambda value: jnp.full((size, 1), value)
  mask = noise_mask.sample_noise_mask(jax.random.key(3), rows(a), rows(b))
  cost = (mask[:, 0] - target) ** 2
  logits = jnp.stack([jnp.zeros(size), jnp.log(jnp.expm1(cost))], axis=1)  # whose cross-entropy is the cost
  for baseline in (None, jnp.float32(cost.mean())):
    slope = size * jax.grad(_call)(
      rows(a), rows(b), mask, logits, jnp.zeros(size, int), objective="reinforce", baseline=baseline
    )
    error = float(slope.std() / np.sqrt(size))
    assert abs(float(slope.mean()) - float(jax.grad(expected)(a))) < 4 * error


def test_enlarging(x64):
  rng = np.random.default_rng(1)
  grid = rng.uniform(size=(3, 3))
  plain = np.kron(grid, np.ones((4, 4)))
  np.testing.assert_array_equal(noise_mask.enlarge_noise_mask(grid.ravel(), size=12), plain)
  blurred = np.asarray(noise_mask.enlarge_noise_mask(grid.ravel(), size=12, kernel_size=5, width=1.3))
  taps = np.exp(-(np.arange(-2, 3) ** 2) / (2 * 1.3**2))
  expected = plain
  for axis in (0, 1):
    expected = ndimage.correlate1d(expected, taps / taps.sum(), axis=axis, mode="mirror")
  np.testing.assert_allclose(blurred, expected, rtol=1e-12)
  assert blurred.min() >= grid.min() and blurred.max() <= grid.max()
  constant = noise_mask.enlarge_noise_mask(np.full(4, 0.3), size=7, kernel_size=3)
  np.testing.assert_allclose(constant, 0.3, rtol=1e-12)


def test_examples_that_do_not_count():
  rng = np.random.default_rng(2)
  a, b, mask = (rng.normal(size=(4, 4)).astype(np.float32) for _ in range(3))
  mask, logits = 1 / (1 + np.exp(-mask)), rng.normal(size=(4, 3)).astype(np.float32)
  labels, where = np.array([0, 2, -1, 1]), np.array([True, True, True, False])
  for objective in noise_mask.OBJECTIVES:
    expected = _call(a[:2], b[:2], mask[:2], logits[:2], labels[:2], objective=objective)
    hidden = [np.where(np.arange(4)[:, None] < 2, x, np.nan) for x in (a, b, mask, logits)]
    of = lambda *x, o=objective, w=where: _call(*x, labels, objective=o, where=w)
    value, gradients = jax.value_and_grad(of, argnums=(0, 1, 3))(*hidden)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    assert all(np.isfinite(g).all() and not np.any(g[2:]) for g in gradients)
    assert of(*hidden, w=np.zeros(4, bool)) == 0


@pytest.mark.parametrize("objective", noise_mask.OBJECTIVES)
def test_extreme_parameters_and_masks_stay_finite(objective):
  ends = np.array([-6.0, 6.0], np.float32)
  a, b, m = (x.reshape(1, -1) for x in np.meshgrid(ends, ends, np.array([0, 1e-6, 0.5, 1 - 1e-6, 1], np.float32)))
  logits, labels = np.array([[30.0, -30.0]], np.float32), np.array([1])
  of = lambda a, b, z: _call(a, b, m, z, labels, objective=objective)
  value, slopes = jax.value_and_grad(of, argnums=(0, 1, 2))(a, b, logits)
  assert np.isfinite(value) and all(np.isfinite(slope).all() for slope in slopes)


def test_bad_input():
  zeros = jnp.zeros((2, 4))
  for options, message in (
    (dict(objective="joint"), "objective must be one of"),
    (dict(baseline=0.0), "baseline must be None"),
    (dict(objective="reinforce", baseline=jnp.zeros(3)), "baseline"),
    (dict(where=jnp.ones(3, bool)), "where"),
    (dict(margin=0.5), "margin"),
  ):
    with pytest.raises(ValueError, match=message):
      _call(zeros, zeros, zeros + 0.5, zeros, jnp.zeros(2, int), **options)
  for options, message in (
    (dict(size=1), "size"),
    (dict(size=4, kernel_size=2), "odd"),
    (dict(size=4, width=0), "width"),
  ):
    with pytest.raises(ValueError, match=message):
      noise_mask.enlarge_noise_mask(zeros, **options)
