"""H-consistency transforms, their inverse and bounds, Bayes risks and minimizability gaps."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize

from jaxreg.losses import comp_sum, h_consistency
from tests.conformance import CLASSES, EXAMPLES, draw_probabilities, elementwise_row, row

pytestmark = pytest.mark.usefixtures("x64")
TAUS = [0.0, 0.3, 0.5, 1 - 1e-9, 1.0, 1 + 1e-9, 1.2, 1.5, 1.8, 2 - 1e-4, 2 - 1e-12, 2.0, 3.0]
TRANSFORM = jax.jit(h_consistency.h_consistency_transform)
GAMMA = jax.jit(h_consistency.h_consistency_gamma)
GAMMA_BOUND = jax.jit(h_consistency.h_consistency_gamma_bound)
BAYES = jax.jit(h_consistency.bayes_conditional_risk)
SOFT = jax.jit(comp_sum.comp_sum_loss_with_soft_labels)


@pytest.mark.golden
def test_golden_03_comp_sum_bounds(golden):
  compared = 0
  for _, arrays, meta in golden("03-comp_sum").cases():
    tau, classes = meta["tau"], meta["n_classes"]
    pairs = (
      ("out_T_tau", "beta", functools.partial(TRANSFORM, tau=tau, classes=classes)),
      ("out_Gamma_tau", "t", functools.partial(GAMMA, tau=tau, classes=classes)),
      ("out_bayes_conditional_risk", "cond_probs", functools.partial(BAYES, tau=tau)),
      (
        "out_deterministic_best_loss",
        "score_bound",
        functools.partial(h_consistency.deterministic_bounded_risk, tau=tau, classes=classes),
      ),
    )
    for name, argument, function in pairs:
      np.testing.assert_allclose(function(jnp.asarray(arrays[argument])), arrays[name], rtol=1e-10, atol=1e-12)
      compared += 1
  assert compared


@pytest.mark.parametrize("classes", [2, 7])
@pytest.mark.parametrize("tau", TAUS)
def test_transform_is_convex_increasing_and_inverted(tau, classes):
  b = jnp.linspace(0.0, 1.0, 101)
  values = TRANSFORM(b, tau=tau, classes=classes)
  assert values[0] == 0
  assert jnp.all(jnp.diff(values) > 0)
  assert jnp.all(jnp.diff(values, 2) > -1e-14)
  np.testing.assert_allclose(GAMMA(values, tau=tau, classes=classes), b, atol=1e-9)
  beyond = GAMMA(jnp.array([-1.0, values[-1] * 1.01, 1e300]), tau=tau, classes=classes)
  np.testing.assert_array_equal(beyond, [0, 1, 1])


def test_transform_is_continuous_at_one_and_two():
  b = jnp.linspace(0.0, 1.0, 11)
  for low, high in ((1 - 1e-9, 1.0), (1.0, 1 + 1e-9), (2 - 1e-9, 2.0)):
    ends = [TRANSFORM(b, tau=tau, classes=5) for tau in (low, high)]
    np.testing.assert_allclose(*ends, rtol=1e-7, atol=1e-9)


def test_small_regrets_keep_their_digits():
  """Against the first term of the series in b."""
  b = 1e-5
  for tau in TAUS[:-4]:
    factor = 2.0 ** (1 - tau) if tau < 1 else 5.0 ** (1 - tau)
    expected = factor * b**2 / (2 * (2 - tau))
    np.testing.assert_allclose(TRANSFORM(b, tau=tau, classes=5), expected, rtol=1e-4)
    np.testing.assert_allclose(GAMMA(expected, tau=tau, classes=5), b, rtol=1e-4)


@settings(max_examples=25, deadline=None)
@given(st.floats(0.0, 3.0), st.integers(2, 50), st.floats(0.0, 2.0))
def test_closed_form_bounds_gamma(tau, classes, regret):
  with jax.enable_x64(True):
    gamma = GAMMA(jnp.float64(regret), tau=tau, classes=classes)
    bound = GAMMA_BOUND(jnp.float64(regret), tau=tau, classes=classes)
  assert gamma <= bound * (1 + 1e-9) + 1e-9


@pytest.mark.parametrize("tau", TAUS)
@pytest.mark.parametrize("classes", [2, 4])
def test_no_conditional_regret_beats_the_transform(tau, classes):
  rng = np.random.default_rng(0)
  draws = 10_000
  p = rng.dirichlet(np.ones(classes), draws)
  # Half of the scores at random, half close to the label law's, where the inequality is tight.
  logits = 2 * rng.normal(size=(draws, classes))
  logits[::2] = np.log(p[::2] + 1e-12) + 0.3 * logits[::2]
  regret = SOFT(jnp.asarray(logits), jnp.asarray(p), tau=tau) - BAYES(jnp.asarray(p), tau=tau)
  error_regret = p.max(1) - p[np.arange(draws), logits.argmax(1)]
  assert jnp.all(regret >= TRANSFORM(jnp.asarray(error_regret), tau=tau, classes=classes) - 1e-9)


@pytest.mark.parametrize("tau", [tau for tau in TAUS if tau <= 2])
def test_two_classes_attain_the_transform(tau):
  b = jnp.linspace(0.0, 1.0, 9)
  p = jnp.stack([(1 + b) / 2, (1 - b) / 2], axis=-1)
  regret = SOFT(jnp.zeros_like(p), p, tau=tau) - BAYES(p, tau=tau)
  np.testing.assert_allclose(regret, TRANSFORM(b, tau=tau, classes=2), atol=1e-12)


@pytest.mark.parametrize("tau", [0.0, 0.5, 1.0, 1.3, 1.5, 1.8])
def test_minimising_reaches_the_bayes_risk(tau):
  p = jnp.asarray(np.random.default_rng(3).dirichlet(2 * np.ones(4)))
  risk = jax.jit(jax.value_and_grad(lambda z: SOFT(z, p, tau=tau)))
  found = optimize.minimize(
    lambda z: [np.asarray(part) for part in risk(jnp.asarray(z))],
    np.zeros(4),
    jac=True,
    method="L-BFGS-B",
    options={"ftol": 1e-16, "gtol": 1e-10},
  )
  np.testing.assert_allclose(found.fun, BAYES(p, tau=tau), atol=1e-8)
  best = p ** (1 / (2 - tau))
  np.testing.assert_allclose(jax.nn.softmax(jnp.asarray(found.x)), best / best.sum(), atol=1e-4)


def test_bayes_risk_of_certain_labels_is_zero_and_continuous_in_tau():
  for tau in TAUS:
    np.testing.assert_allclose(BAYES(jnp.eye(3), tau=tau), 0, atol=1e-15)
  p = jnp.asarray(np.random.default_rng(0).dirichlet(np.ones(5), 20))
  for low, high in ((1 - 1e-9, 1.0), (1.0, 1 + 1e-9), (1.25 - 1e-12, 1.25), (2 - 1e-9, 2.0)):
    np.testing.assert_allclose(BAYES(p, tau=low), BAYES(p, tau=high), rtol=1e-7, atol=1e-8)


def test_gaps():
  conditional = jnp.array([0.1, 0.3, 0.5])
  np.testing.assert_allclose(h_consistency.minimizability_gap(jnp.float64(0.4), conditional), 0.1)
  weights = jnp.array([0.0, 0.0, 1.0])
  np.testing.assert_allclose(h_consistency.minimizability_gap(0.4, conditional, weights=weights), -0.1)
  # Scores at their bounds, the label's up and the others' down, reach the deterministic risk; it falls with tau.
  bounds = jnp.array([0.0, 0.5, 2.0])
  scores = bounds[:, None] * jnp.array([-1.0, 1.0, -1.0, -1.0])
  risks = [h_consistency.deterministic_bounded_risk(bounds, tau=tau, classes=4) for tau in TAUS]
  for tau, risk in zip(TAUS, risks):
    np.testing.assert_allclose(
      risk, comp_sum.comp_sum_loss(scores, jnp.array([1, 1, 1]), tau=tau), rtol=1e-10, atol=1e-12
    )
  assert jnp.all(jnp.diff(jnp.stack(risks), axis=0) <= 1e-15)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("tau", TAUS)
def test_finite_at_the_ends(dtype, tau):
  functions = (
    (TRANSFORM, jnp.array([0.0, 1e-30, 0.5, 1.0], dtype), {"classes": 1000}),
    (GAMMA, jnp.array([0.0, 1e-30, 0.1, 1e4], dtype), {"classes": 1000}),
    (GAMMA_BOUND, jnp.array([0.0, 1e-30, 0.1, 1e4], dtype), {"classes": 1000}),
    (BAYES, jnp.array([0.0, 1e-30, 1.0], dtype), {}),
  )
  for function, x, options in functions:
    value, gradient = jax.value_and_grad(lambda x: jnp.sum(function(x, tau=tau, **options)))(x)
    assert value.dtype == dtype and jnp.isfinite(value) and jnp.isfinite(gradient).all()


def test_bad_input():
  half = jnp.float64(0.5)
  for function in (TRANSFORM, GAMMA, GAMMA_BOUND, h_consistency.deterministic_bounded_risk):
    function = getattr(function, "__wrapped__", function)
    with pytest.raises(ValueError, match="tau must lie in"):
      function(half, tau=-1.0, classes=3)
    with pytest.raises(ValueError, match="classes must lie in"):
      function(half, tau=1.0, classes=1)
  with pytest.raises(ValueError, match="probabilities must be floating"):
    h_consistency.bayes_conditional_risk(jnp.array([1, 0]), tau=1.0)
  with pytest.raises(ValueError, match="equal shapes"):
    h_consistency.minimizability_gap(half, jnp.ones(3), weights=jnp.ones(1))


def test_many_classes_and_not_a_number():
  bound = h_consistency.h_consistency_gamma_bound
  assert bound(jnp.float32(0.0), tau=10.0, classes=1e6) == 0
  assert np.isfinite(bound(jnp.float32(1.0), tau=10.0, classes=1e6))
  np.testing.assert_allclose(jax.grad(lambda r: bound(r, tau=3.0, classes=10.0))(0.0), 200.0, rtol=1e-5)
  for function in (bound, h_consistency.h_consistency_gamma):
    assert np.isnan(function(jnp.float32(np.nan), tau=1.0, classes=2))


ROWS = [
  elementwise_row(
    h_consistency.h_consistency_transform, "error_regret", extreme=(0.0, 1.0), tau=(0.0, 3.0), classes=(2, 9)
  ),
  elementwise_row(h_consistency.h_consistency_gamma, "loss_regret", extreme=(0.0, 1e4), tau=(0.0, 3.0), classes=(2, 9)),
  elementwise_row(
    h_consistency.h_consistency_gamma_bound, "loss_regret", extreme=(0.0, 1e4), tau=(0.0, 3.0), classes=(2, 9)
  ),
  elementwise_row(
    h_consistency.deterministic_bounded_risk, "score_bound", extreme=(0.0, 1e4), tau=(0.0, 3.0), classes=(2, 9)
  ),
  row(
    h_consistency.bayes_conditional_risk,
    lambda rng: ((draw_probabilities(rng) + 1 / CLASSES) / 2,),  # away from zero, where the derivative is infinite
    extreme=lambda p: (np.resize(np.eye(CLASSES), p.shape),),
    bad=(("probabilities", lambda p: (np.ones(p.shape, np.int32),)),),
    examples="any",
    options=dict(tau=(0.0, 3.0)),
  ),
  row(
    h_consistency.minimizability_gap,
    lambda rng: (np.float64(rng.uniform(1, 2)), rng.uniform(0, 1, EXAMPLES)),
    bad=(
      ("best_risk", lambda risk, conditional: (np.int32(1), conditional)),
      ("best_conditional_risks", lambda risk, conditional: (risk, conditional.astype(np.int32))),
    ),
  ),
]
