"""Robust losses: golden vectors, closed forms against brute force, the envelope rule, limits of the price."""

import functools
import json

import jax
import jax.numpy as jnp
import jax.test_util
import numpy as np
import optax
import pytest
from scipy import optimize, special

from jaxreg.adversarial import wasserstein
from tests.conformance import EXAMPLES, row

FEATURES = 3


def _linear(rng):
  return rng.normal(size=FEATURES), rng.normal(size=(EXAMPLES, FEATURES)), rng.integers(0, 2, EXAMPLES).astype(np.int32)


def _softplus(weights, z):
  return jax.nn.softplus(-z @ weights.astype(z.dtype))


def _through_margins(values, labels, unlabeled, price, unlabeled_price, weight):
  """`robust_self_training_loss` of a classifier by the sign of one number."""
  signed = lambda x, y, price: wasserstein.ramp_robust_loss(jnp.where(y == 1, 1, -1) * x, price=price)
  return wasserstein.robust_self_training_loss(
    signed, lambda x: x > 0, values, labels, unlabeled, price=price, unlabeled_price=unlabeled_price, weight=weight
  )


ROWS = [
  *(
    row(
      wasserstein.ramp_robust_loss,
      lambda rng: (rng.uniform(0.1, 0.9, EXAMPLES) * np.resize([1, -1], EXAMPLES),),
      bad=(("distances", lambda d: (d.astype(np.int32),)),),
      examples="any",
      options=dict(power=power, price=(0.1, 1.0)),
    )
    for power in (1, 2)
  ),
  row(
    wasserstein.logistic_robust_loss,
    _linear,
    call=lambda theta, x, y, price: wasserstein.logistic_robust_loss(theta, x, y, price=price)[0],
    bad=(
      ("weights", lambda w, x, y: (w[1:], x, y)),
      ("weights", lambda w, x, y: (w.astype(np.int32), x, y)),
      ("inputs", lambda w, x, y: (w, x.astype(np.int32), y)),
      ("labels", lambda w, x, y: (w, x, y[1:])),
      ("labels", lambda w, x, y: (w, x, y * 1.0)),
    ),
    options=dict(price=(0.05, 2.0)),
    # Of inputs 1e4 away the worst ones differ by less than a digit.
    extreme=lambda w, x, y: (w, 100 * x, y),
  ),
  *(
    row(
      wasserstein.robust_loss,
      lambda rng: _linear(rng)[:2],
      call=lambda theta, x, price, cost=cost, solver=solver: wasserstein.robust_loss(
        _softplus, theta, x, price=price, cost=cost, solver=solver, steps=8
      )[0],
      bad=(("inputs", lambda w, x: (w, x.astype(np.int32))),),
      options=dict(price=(4.0, 8.0)),
      differentiable=False,  # as if the worst inputs were constant, which only the exact ones may be
    )._replace(label=f"wasserstein.robust_loss-{cost}-{solver}")
    for cost, solver in (("squared_l2", "ascent"), ("squared_l2", "newton"), ("l2", "ascent"))
  ),
  row(
    wasserstein.robust_self_training_loss,
    lambda rng: (rng.normal(size=EXAMPLES), rng.integers(0, 2, EXAMPLES).astype(np.int32), rng.normal(size=8)),
    call=_through_margins,
    options=dict(price=(0.1, 0.5), unlabeled_price=(0.1, 0.5), weight=(0.0, 2.0)),
  ),
]


@pytest.mark.golden
def test_golden_17_robust_self_training(golden, x64):
  for name, case, _ in golden("17-robust_self_training").cases("case"):
    hp = json.loads(str(case["hp"]))
    theta, x, unlabeled = case["theta"], case["x"], case["xu"]
    labels, own = (case["y"] > 0).astype(np.int32), (case["pseudo_label"] > 0).astype(np.int32)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-13, err_msg=name)
    values, worst = wasserstein.logistic_robust_loss(theta, x, labels, price=hp["gamma"])
    close(values, case["logsq_out_phi"])
    close(worst, case["logsq_out_zstar"])
    moved = -case["y"] * ((np.asarray(worst) - x) @ theta) / np.linalg.norm(theta)
    np.testing.assert_allclose(moved, case["logsq_out_t"], rtol=1e-7, atol=1e-12, err_msg=name)  # digits left of x
    per_sample = jax.jacobian(lambda w: wasserstein.logistic_robust_loss(w, x, labels, price=hp["gamma"])[0])
    close(per_sample(theta), case["logsq_grad_theta_per_sample"])
    values = wasserstein.logistic_robust_loss(theta, unlabeled, own, price=hp["gamma_prime"])[0]
    close(values, case["logsq_unlab_out_phi"])

    prices = dict(price=hp["gamma"], unlabeled_price=hp["gamma_prime"], weight=hp["lam"])
    predict = lambda theta, z: (z @ theta > 0).astype(jnp.int32)
    logistic = lambda theta: lambda z, y, price: wasserstein.logistic_robust_loss(theta, z, y, price=price)[0]
    total = lambda theta, robust=logistic: wasserstein.robust_self_training_loss(
      robust(theta), functools.partial(predict, theta), x, labels, unlabeled, **prices
    )
    value, gradient = jax.value_and_grad(total)(theta)
    close(value, case["rss_logsq_out_objective"])
    close(gradient, case["rss_logsq_grad_theta"])

    for power in (1, 2):
      signed = lambda z, y, theta=theta: jnp.where(y == 1, 1, -1) * (z @ theta) / jnp.linalg.norm(theta)
      ramp = lambda theta, power=power: (
        lambda z, y, price: wasserstein.ramp_robust_loss(signed(z, y, theta), price=price, power=power)
      )
      close(ramp(theta)(x, labels, hp["gamma"]), case[f"ramp_p{power}_out_phi"])
      close(ramp(theta)(unlabeled, own, hp["gamma_prime"]), case[f"ramp_p{power}_unlab_out_phi"])
      close(total(theta, ramp), case[f"rss_ramp_p{power}_out_objective"])

    targets = case["softmax_y"]
    loss_fn = lambda params, z, targets=targets: optax.softmax_cross_entropy_with_integer_labels(
      z @ params[0].T + params[1], targets
    )
    options = dict(price=hp["softmax_gamma"], solver="newton", steps=60)
    params = case["softmax_W"], case["softmax_b"]
    of = lambda params, z=case["softmax_x"], f=loss_fn, o=options: wasserstein.robust_loss(f, params, z, **o)
    values, worst = of(params)
    close(values, case["softmax_out_phi"])
    close(worst, case["softmax_out_zstar"])
    gradients = jax.grad(lambda params, of=of: jnp.mean(of(params)[0]))(params)
    close(gradients[0], case["softmax_mean_grad_W"])
    close(gradients[1], case["softmax_mean_grad_b"])


def test_ramp_is_the_best_of_all_moves(x64):
  moves = np.linspace(0, 20, 20001)
  for power in (1, 2):
    for distance in (-0.3, 0.0, 0.2, 1.0, 3.0):
      for price in (0.0, 0.3, 1.0):
        expected = np.max((distance - moves <= 0) - price * moves**power)
        value = wasserstein.ramp_robust_loss(np.array(distance), price=price, power=power)
        np.testing.assert_allclose(value, max(expected, 0), atol=2e-3)
  np.testing.assert_array_equal(wasserstein.ramp_robust_loss(np.array([1e300, -1e300]), price=0.0, power=2), [1, 1])


@pytest.mark.parametrize("price", [1e-3, 0.02, 0.3, 5.0])  # the first two with two maxima
def test_logistic_is_the_largest_over_all_inputs(price, x64):
  rng = np.random.default_rng(0)
  theta = rng.normal(size=3) * 2
  margins = np.concatenate([np.linspace(-30, 60, 19), np.linspace(1 / (2 * price) * 4, 600, 5)])
  x = margins[:, None] * theta / (theta @ theta) + 0.3 * np.linalg.svd(theta[None])[2][1]
  values, worst = wasserstein.logistic_robust_loss(theta, x, np.ones(len(x), int), price=price)
  grid = np.linspace(0, np.linalg.norm(theta) / (2 * price), 400_001)
  for margin, value in zip(x @ theta, values):
    tried = np.logaddexp(0, np.linalg.norm(theta) * grid - margin) - price * grid**2
    np.testing.assert_allclose(value, tried.max(), rtol=1e-8, atol=1e-12)
    assert value >= tried.max() - 1e-12
  along = np.cross(np.asarray(worst) - x, theta)
  np.testing.assert_allclose(along, 0, atol=1e-9)
  moved = (x - np.asarray(worst)) @ theta / np.linalg.norm(theta)
  residual = np.linalg.norm(theta) * special.expit(-np.asarray(worst) @ theta) - 2 * price * moved
  np.testing.assert_allclose(residual, 0, atol=1e-11)


def test_logistic_equals_a_search_in_all_dimensions(x64):
  rng = np.random.default_rng(1)
  theta, x = rng.normal(size=4), rng.normal(size=(3, 4))
  labels = np.array([0, 1, 1])
  values, _ = wasserstein.logistic_robust_loss(theta, x, labels, price=1.5)
  for example, label, value in zip(x, np.where(labels == 1, 1, -1), values):
    lost = lambda z, e=example, y=label: 1.5 * np.sum((z - e) ** 2) - np.logaddexp(0, -y * z @ theta)
    np.testing.assert_allclose(-optimize.minimize(lost, example, method="BFGS", tol=1e-10).fun, value, rtol=1e-7)
  # The smaller of both labels' losses is that of the classifier's own label.
  of = lambda label: wasserstein.logistic_robust_loss(theta, x, np.full(3, label), price=1.5)[0]
  own = wasserstein.logistic_robust_loss(theta, x, (x @ theta > 0).astype(int), price=1.5)[0]
  np.testing.assert_allclose(np.minimum(of(0), of(1)), own, rtol=1e-12)


def test_envelope_rule(x64):
  """Derivatives in weights, inputs and price are those of the maximum, and of the ascent unrolled."""
  rng = np.random.default_rng(2)
  theta, x, y = rng.normal(size=3), rng.normal(size=(4, 3)), np.array([0, 1, 0, 1])
  total = lambda theta, x, price: wasserstein.logistic_robust_loss(theta, x, y, price=price)[0].sum()
  jax.test_util.check_grads(total, (theta, x, 0.8), order=1, modes=("rev",), rtol=1e-6)
  sign = np.where(y == 1, 1.0, -1.0)
  loss_fn = lambda theta, z: jax.nn.softplus(-sign * (z @ theta))
  general = lambda theta, x, price: wasserstein.robust_loss(loss_fn, theta, x, price=price, steps=200)[0].sum()
  for argument in range(3):
    gradients = [jax.grad(f, argnums=argument)(theta, x, 0.8) for f in (total, general)]
    np.testing.assert_allclose(*gradients, rtol=1e-9)

  def unrolled(theta):
    z = x
    for _ in range(200):
      z = z + (jax.grad(lambda z: loss_fn(theta, z).sum())(z) - 2 * 0.8 * (z - x)) / 1.6
    return jnp.sum(loss_fn(theta, z) - 0.8 * jnp.sum((z - x) ** 2, -1))

  np.testing.assert_allclose(jax.grad(unrolled)(theta), jax.grad(total)(theta, x, 0.8), rtol=1e-7)


def test_limits_and_bounds(x64):
  rng = np.random.default_rng(3)
  theta, x, y = rng.normal(size=5), rng.normal(size=(20, 5)), rng.integers(0, 2, 20)
  plain = jax.nn.softplus(-np.where(y == 1, 1, -1) * (x @ theta))
  of = lambda price: np.asarray(wasserstein.logistic_robust_loss(theta, x, y, price=price)[0])
  np.testing.assert_allclose(of(1e8), plain, rtol=1e-6)
  values = [of(price) for price in (0.01, 0.1, 1.0, 10.0)]
  assert (np.diff(values, axis=0) <= 0).all() and (values[-1] >= plain).all()
  for price, value in zip((0.01, 0.1, 1.0, 10.0), values):
    assert (value - plain <= theta @ theta / (4 * price) + 1e-12).all()


def test_unsquared_cost(x64):
  theta, x = np.array([0.6, 0.8]), np.array([[0.5, 0.1], [-1.0, 2.0]])
  values, worst = wasserstein.robust_loss(_softplus, theta, x, price=1.01, cost="l2", steps=50)
  np.testing.assert_allclose(values, _softplus(theta, x), rtol=1e-12)
  np.testing.assert_array_equal(worst, x)
  bounded = lambda theta, z: jax.nn.sigmoid(-4 * (z @ theta))
  values, worst = wasserstein.robust_loss(bounded, theta, x, price=0.4, cost="l2", steps=500, step_size=0.1)
  moves = np.linspace(0, 5, 5001)
  expected = [np.max(1 / (1 + np.exp(4 * (e @ theta - moves))) - 0.4 * moves) for e in x[:1]]
  np.testing.assert_allclose(values[:1], expected, atol=1e-4)
  gradient = jax.grad(lambda x: wasserstein.robust_loss(_softplus, theta, x, price=1.01, cost="l2")[0].sum())(x)
  assert np.isfinite(gradient).all()


def test_unlabeled_term(x64):
  """It does not know the sign of theta, nor its length in the ramp; at a small price its minimum is L1-PCA's axis."""
  rng = np.random.default_rng(4)
  x = rng.normal(size=(200, 2)) * [0.5, 0.2] + np.where(rng.uniform(size=200) < 0.5, 1, -1)[:, None] * [1.0, 0.5]
  signed = lambda z, y, theta: jnp.where(y, 1, -1) * (z @ theta) / jnp.linalg.norm(theta)

  def total(theta, price=0.1):
    robust = lambda z, y, price: wasserstein.ramp_robust_loss(signed(z, y, theta), price=price)
    predict = lambda z: z @ theta > 0
    options = dict(price=1.0, unlabeled_price=price, weight=1.0, where=np.zeros(1, bool))
    return wasserstein.robust_self_training_loss(robust, predict, x[:1], np.zeros(1, bool), x, **options)

  angles = np.linspace(0, np.pi, 1801)
  axes = np.stack([np.cos(angles), np.sin(angles)], 1)
  found = axes[np.argmin(jax.jit(jax.vmap(total))(axes))]
  assert abs(found @ axes[np.argmax(np.abs(x @ axes.T).mean(0))]) > 0.9999
  np.testing.assert_allclose(total(-3 * axes[7]), total(axes[7]), rtol=1e-12)
  turn = np.array([[np.cos(1), -np.sin(1)], [np.sin(1), np.cos(1)]])
  robust = lambda theta: lambda z, y, price: wasserstein.logistic_robust_loss(theta, z, y.astype(int), price=price)[0]
  of = lambda theta, x: wasserstein.robust_self_training_loss(
    robust(theta), lambda z: z @ theta > 0, x[:5], np.arange(5) > 2, x, price=1.0, unlabeled_price=0.5, weight=2.0
  )
  np.testing.assert_allclose(of(axes[7], x), of(turn @ axes[7], x @ turn.T), rtol=1e-12)


def test_without_weight_it_is_the_labelled_term_and_more_classes_do_as_well(x64):
  rng = np.random.default_rng(5)
  params, x, labels, more = (
    rng.normal(size=(3, 4)),
    rng.normal(size=(6, 4)),
    rng.integers(0, 3, 6),
    rng.normal(size=(9, 4)),
  )

  def robust(params):
    def of(z, y, price):
      loss_fn = lambda params, z: optax.softmax_cross_entropy_with_integer_labels(z @ params.T, y)
      return wasserstein.robust_loss(loss_fn, params, z, price=price, solver="newton")[0]

    return of

  @functools.partial(jax.jit, static_argnums=1)
  def total(params, weight):
    predict = lambda z: jnp.argmax(z @ params.T, axis=-1)
    options = dict(price=3.0, unlabeled_price=5.0, weight=weight)
    return wasserstein.robust_self_training_loss(robust(params), predict, x, labels, more, **options)

  own = jnp.argmax(more @ params.T, axis=-1)
  terms = robust(params)(x, labels, 3.0).mean(), robust(params)(more, own, 5.0).mean()
  np.testing.assert_array_equal(total(params, 0.0), terms[0])
  np.testing.assert_allclose(total(params, 2.0), terms[0] + 2 * terms[1], rtol=1e-12)
  slope = jax.grad(total)(params, 2.0)
  for place in ((0, 1), (2, 3)):  # pseudo-labels do not change with so small a step
    step = np.zeros_like(params)
    step[place] = 1e-6
    expected = (total(params + step, 2.0) - total(params - step, 2.0)) / 2e-6
    np.testing.assert_allclose(slope[place], expected, rtol=1e-6, atol=1e-9)


def test_nothing_comes_from_under_the_masks():
  rng = np.random.default_rng(6)
  theta, x, more = (rng.normal(size=shape).astype(np.float32) for shape in ((3,), (4, 3), (5, 3)))
  labels, kept, others = np.array([0, 1, 1, 0]), np.array([1, 1, 0, 1], bool), np.array([1, 0, 1, 1, 0], bool)

  def total(theta, x, more, labels, **masks):
    robust = lambda z, y, price: wasserstein.logistic_robust_loss(theta, z, y, price=price)[0]
    options = dict(price=1.0, unlabeled_price=0.5, weight=2.0, **masks)
    predict = lambda z: (z @ theta > 0).astype(jnp.int32)
    return wasserstein.robust_self_training_loss(robust, predict, x, labels, more, **options)

  expected, slope = jax.value_and_grad(total)(theta, x[kept], more[others], labels[kept])
  hide = lambda array, mask: np.where(mask[:, None], array, np.nan)
  masks = dict(where=kept, where_unlabeled=others)
  value, gradient = jax.value_and_grad(total)(theta, hide(x, kept), hide(more, others), labels, **masks)
  np.testing.assert_allclose(value, expected, rtol=1e-6)
  np.testing.assert_allclose(gradient, slope, rtol=1e-5, atol=1e-6)
  nothing = dict(where=np.zeros(4, bool), where_unlabeled=np.zeros(5, bool))
  assert total(theta, x, more, labels, **nothing) == 0
  with pytest.raises(ValueError, match="robust must return one value per example"):
    wasserstein.robust_self_training_loss(
      lambda z, y, price: z, lambda z: z, x, labels, more, price=1.0, unlabeled_price=1.0, weight=1.0
    )


def test_edges():
  x, labels = jnp.array([[1.0], [jnp.nan], [2.0]]), jnp.array([1, -1, 255], jnp.int32)
  for theta in (jnp.array([1.0]), jnp.zeros(1)):
    of = lambda theta, x: wasserstein.logistic_robust_loss(theta, x, labels, price=1.0)[0]
    values, (slope, along) = of(theta, x), jax.grad(lambda t, x: of(t, x).sum(), argnums=(0, 1))(theta, x)
    assert np.isfinite(values).all() and not np.any(values[1:]) and np.isfinite(slope).all() and not np.any(along[1:])
  narrow = wasserstein.logistic_robust_loss(theta, x[:1].astype(jnp.bfloat16), jnp.ones(1, jnp.uint8), price=1.0)
  assert all(each.dtype == jnp.bfloat16 for each in narrow)
  values, worst = wasserstein.robust_loss(_softplus, jnp.ones(2), jnp.zeros((0, 2)), price=1.0, solver="newton")
  assert values.shape == (0,) and worst.shape == (0, 2)
  for options, message in (
    (dict(price=0.0), "price"),
    (dict(price=1.0, cost="l1"), "cost must be one of"),
    (dict(price=1.0, cost="l2", solver="newton"), "newton not with l2"),
    (dict(price=1.0, steps=0), "steps must be a positive integer"),
  ):
    with pytest.raises(ValueError, match=message):
      wasserstein.robust_loss(_softplus, jnp.ones(2), jnp.zeros((3, 2)), **options)
  with pytest.raises(ValueError, match="one value per example"):
    wasserstein.robust_loss(lambda p, z: z, jnp.ones(2), jnp.zeros((3, 2)), price=1.0)
