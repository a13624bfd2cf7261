"""HGP, Hutchinson and Fishr: golden values of the official code, the card's exact tests, heads that are not linear."""

import functools
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxreg.regularizers import head_alignment, linear_head
from jaxreg.regularizers.head_alignment import fishr_init, fishr_penalty, hgp_penalty, hutchinson_penalty
from tests.conformance import row
from tests.regularizers.golden_environments import close_to, environments_of, head_of, losses_of
from tests.regularizers.test_linear_head import BAD_HEAD, ENVIRONMENTS, assert_trees, draw, draw_head, mean_loss

_BAD = (
  ("features", lambda x, *rest: (x.astype(np.int32), *rest)),
  ("features", lambda x, y, *rest: (x[0], y[0], *rest)),
  ("labels", lambda x, y, *rest: (x, y[1:], *rest)),
  ("labels", lambda x, y, *rest: (x, y * 1.0, *rest)),
)


def _with_state(rng):
  features, labels, head = draw(rng)
  variances = {name: rng.uniform(size=(ENVIRONMENTS, *leaf.shape)) for name, leaf in head.items()}
  return features, labels, head, head_alignment.FishrState(variances)


_WEIGHTS = dict(gradient_weight=(0.0, 1.0))
ROWS = [
  row(
    hgp_penalty,
    draw,
    bad=(*_BAD, *BAD_HEAD),
    options=dict(product_weight=(0.5, 2.0), stop_reference=False, **_WEIGHTS),
  ),
  row(hutchinson_penalty, draw, bad=(*_BAD, *BAD_HEAD), options=dict(diagonal_weight=(0.5, 2.0), **_WEIGHTS)),
  row(
    fishr_penalty,
    _with_state,
    call=lambda *arguments, axis_name=None, **options: fishr_penalty(*arguments, **options),
    bad=(*_BAD, ("state", lambda x, y, head, state: (x, y, head, state.variances))),
    options=dict(decay=(0.0, 0.95)),
  ),
]
EXEMPT = {
  "FishrState": "state, carried by fishr_penalty",
  "fishr_init": "zeros; tested with fishr_penalty",
  "rademacher_probes": "random signs; tested with hutchinson_penalty",
}
HGP = functools.partial(hgp_penalty, product_weight=0.7, gradient_weight=0.3)
HUTCHINSON = functools.partial(hutchinson_penalty, diagonal_weight=0.7, gradient_weight=0.3)


def _split_probes(flat, head):
  """Probes like the head out of those of the official parameters, its transposed weight before its bias."""
  kernel, bias = np.split(np.asarray(flat, float), [head["kernel"].size], axis=-1)
  shape = (*flat.shape[:-1], *head["kernel"].T.shape)
  return {"kernel": np.swapaxes(kernel.reshape(shape), -1, -2), "bias": bias}


@pytest.mark.golden
def test_golden_37_hessian_alignment_totals(golden, x64):
  for name, case, _ in golden("37-hessian_alignment").cases("case"):
    hp, head = json.loads(str(case["hp"])), head_of(case)
    features, labels, where = environments_of(case)
    shared = dict(where=where, gradient_weight=hp["penalty_beta"])
    probes = _split_probes(case["hutch_probes"], head)
    of = {
      "hgp": functools.partial(hgp_penalty, product_weight=hp["penalty_alpha"], **shared),
      "hutch": functools.partial(hutchinson_penalty, diagonal_weight=hp["penalty_alpha"], probes=probes, **shared),
    }
    for method, penalty in of.items():
      total = lambda x, head, p=penalty, y=labels, w=where: losses_of(x, y, head, w).mean() + p(x, y, head)
      value, gradients = jax.jit(jax.value_and_grad(total, (0, 1)))(features, head)
      close = close_to(f"{name} {method}")
      close(penalty(features, labels, head), case[f"{method}_out_penalty"])
      close(value, case[f"{method}_out_loss"])
      close(gradients[1]["kernel"].T, case[f"{method}_grad_W"])
      close(gradients[1]["bias"], case[f"{method}_grad_b"])
      for environment, own in enumerate(where):
        close(gradients[0][environment][own], case[f"{method}_grad_feat{environment}"])


@pytest.mark.golden
def test_golden_37_hessian_alignment_sigmoid(golden, x64):
  for name, case, _ in golden("37-hessian_alignment").cases("cm"):
    head = head_of(case)
    features, labels, where = environments_of(case)
    shared = dict(where=where, gradient_weight=1.0, stop_reference=False)
    probes = _split_probes(case["hutch_probes"], head)
    of = {
      "hgp": functools.partial(hgp_penalty, product_weight=1.0, **shared),
      "hutch": functools.partial(hutchinson_penalty, diagonal_weight=1.0, probes=probes, **shared),
    }
    for method, penalty in of.items():  # the script sums over the environments
      total = lambda x, head, p=penalty, y=labels: len(x) * p(x, y, head)
      value, gradients = jax.jit(jax.value_and_grad(total, (0, 1)))(features, head)
      close = close_to(f"{name} {method}")
      close(value, case[f"{method}_out_penalty"])
      close(gradients[1]["kernel"].T, case[f"{method}_grad_W"])
      close(gradients[1]["bias"], case[f"{method}_grad_b"])
      for environment in range(len(features)):
        close(gradients[0][environment], case[f"{method}_grad_feat{environment}"])


@pytest.mark.golden
def test_golden_37_hessian_alignment_fishr(golden, x64):
  for name, case, _ in golden("37-hessian_alignment").cases("case"):
    hp, head = json.loads(str(case["hp"])), head_of(case)
    features, labels, where = environments_of(case)
    state = fishr_init(head, environments=len(features))

    @jax.jit
    def both(features, labels, where, state, hp=hp, head=head):
      def total(features):
        penalty, new = fishr_penalty(features, labels, head, state, decay=hp["fishr_ema"], where=where)
        logits = features @ head["kernel"] + head["bias"]
        pooled = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return jnp.sum(pooled * where) / jnp.sum(where) + hp["fishr_lambda"] * penalty, (penalty, new)

      return jax.value_and_grad(total, has_aux=True)(features)

    for step in (0, 1):
      (value, (penalty, state)), gradient = both(features, labels, where, state)
      close = close_to(f"{name} {step}")
      close(penalty, case[f"fishr_out_penalty_step{step}"])
      close(value, case[f"fishr_out_loss_step{step}"])
      for environment, own in enumerate(where):
        found = gradient[environment][own]
        close(found, case[f"fishr_grad_feat{environment}_step{step}"])
      features, labels, where = 0.7 * features[:, ::-1], labels[:, ::-1], where[:, ::-1]


def test_penalties_are_those_written_out(x64):
  features, labels, head = draw(np.random.default_rng(0))
  gradients = [jax.grad(mean_loss)(head, x, y) for x, y in zip(features, labels)]
  mean = jax.tree.map(lambda *g: sum(g) / len(g), *gradients)
  product = lambda x, y, u: jax.jvp(lambda h: jax.grad(mean_loss)(h, x, y), (head,), (u,))[1]
  products = [product(x, y, g) for x, y, g in zip(features, labels, gradients)]
  reference = jax.tree.map(lambda *g: sum(g) / len(g), *(product(x, y, mean) for x, y in zip(features, labels)))
  square = lambda a, b: optax.global_norm(jax.tree.map(jnp.subtract, a, b)) ** 2
  expected = np.mean([0.7 * square(h, reference) + 0.3 * square(g, mean) for h, g in zip(products, gradients)])
  np.testing.assert_allclose(HGP(features, labels, head), expected, rtol=1e-12)


def test_equal_environments_and_a_single_one_have_no_penalty(x64):
  features, labels, head = draw(np.random.default_rng(1))
  same = np.repeat(features[:1], ENVIRONMENTS, 0), np.repeat(labels[:1], ENVIRONMENTS, 0)
  probes = head_alignment.rademacher_probes(jax.random.key(0), head, samples=4)
  fishr = lambda x, y, head: fishr_penalty(x, y, head, fishr_init(head, environments=len(x)), decay=0.9)[0]
  for penalty in (HGP, HUTCHINSON, functools.partial(HUTCHINSON, probes=probes), fishr):
    for x, y in (same, (features[:1], labels[:1])):
      value, gradient = jax.jit(jax.value_and_grad(penalty))(x, y, head)
      np.testing.assert_allclose(value, 0, atol=1e-24)
      np.testing.assert_allclose(gradient, 0, atol=1e-12)
    assert penalty(features, labels, head) > 1e-3


def test_all_signs_give_the_exact_diagonal(x64):
  rng = np.random.default_rng(2)
  features, labels, _ = draw(rng, 2)
  features, head = features[..., :2], jax.tree.map(lambda x: x[:2], draw_head(rng, 2))
  signs = np.array(list(itertools.product([-1.0, 1.0], repeat=6)))
  all_signs = _split_probes(signs, head)
  own = jax.tree.map(lambda leaf: np.repeat(leaf[None], ENVIRONMENTS + 1, 0), all_signs)
  exact = HUTCHINSON(features, labels, head)
  for probes in (all_signs, own):
    np.testing.assert_allclose(HUTCHINSON(features, labels, head, probes=probes), exact, rtol=1e-12)


def test_independent_probes_add_their_variance(x64):
  features, labels, head = draw(np.random.default_rng(3), 2)
  samples, draws = 3, 2000
  only = functools.partial(hutchinson_penalty, features, labels, head, diagonal_weight=1.0, gradient_weight=0.0)

  def drawn(key):
    probes = head_alignment.rademacher_probes(key, head, samples=samples, environments=ENVIRONMENTS)
    return only(probes=probes)

  found = jax.jit(jax.vmap(drawn))(jax.random.split(jax.random.key(0), draws))
  flat, unravel = jax.flatten_util.ravel_pytree(head)
  hessians = [jax.hessian(lambda v, x=x, y=y: mean_loss(unravel(v), x, y))(flat) for x, y in zip(features, labels)]
  hessians.append(sum(hessians) / ENVIRONMENTS)
  variances = [(jnp.sum(h**2) - jnp.sum(jnp.diag(h) ** 2)) / samples for h in hessians]
  expected = only() + np.mean(variances[:-1]) + variances[-1]
  np.testing.assert_allclose(found.mean(), expected, atol=3 * found.std() / np.sqrt(draws))
  # Shared signs: the differences of the environments alone.
  shared = jax.jit(jax.vmap(lambda key: only(probes=head_alignment.rademacher_probes(key, head, samples=samples))))
  estimates = shared(jax.random.split(jax.random.key(1), draws))
  differences = [(jnp.sum((h - hessians[-1]) ** 2) - jnp.sum(jnp.diag(h - hessians[-1]) ** 2)) for h in hessians[:-1]]
  expected = only() + np.mean(differences) / samples
  np.testing.assert_allclose(estimates.mean(), expected, atol=3 * estimates.std() / np.sqrt(draws))


def test_what_the_stopped_reference_changes(x64):
  features, labels, head = draw(np.random.default_rng(4))
  slope = lambda product, gradient, stop: jax.grad(
    lambda h: hgp_penalty(features, labels, h, product_weight=product, gradient_weight=gradient, stop_reference=stop)
  )(head)
  assert_trees(slope(0.0, 1.0, True), slope(0.0, 1.0, False))
  one, other = slope(1.0, 0.0, True), slope(1.0, 0.0, False)
  assert np.abs(one["kernel"] - other["kernel"]).max() > 1e-3


def test_fishr_s_past_is_constant(x64):
  rng = np.random.default_rng(5)
  features, labels, head = draw(rng)
  first = fishr_init(head, environments=ENVIRONMENTS)
  step = lambda x, state: fishr_penalty(x, labels, head, state, decay=0.9)
  through = jax.grad(lambda x: step(features, step(x, first)[1])[0])(features)
  assert not np.any(through)
  # The gradient does not depend on the decay at first; the value grows while the average settles.
  slopes = [jax.grad(lambda x, d=d: fishr_penalty(x, labels, head, first, decay=d)[0])(features) for d in (0.0, 0.9)]
  np.testing.assert_allclose(*slopes, rtol=1e-10, atol=1e-14)
  value, state = step(features, first)
  np.testing.assert_allclose(step(features, state)[0], 1.9**2 * value, rtol=1e-12)


@pytest.mark.parametrize("classes", [1, 3])
def test_a_linear_head_given_as_a_function(classes, x64):
  features, labels, head = draw(np.random.default_rng(6), classes)
  where = np.ones(labels.shape, bool)
  where[0, 4:], where[2] = False, False
  linear = lambda head, x: x @ head["kernel"] + head["bias"]
  probes = head_alignment.rademacher_probes(jax.random.key(2), head, samples=3, environments=ENVIRONMENTS)
  state = fishr_init(head, environments=ENVIRONMENTS)
  fishr = lambda *arguments, **options: fishr_penalty(*arguments, state, decay=0.5, **options)[0]
  for penalty in (HGP, functools.partial(HUTCHINSON, probes=probes), fishr):
    closed, general = (
      jax.jit(jax.value_and_grad(functools.partial(penalty, where=where, **options), (0, 2)))(features, labels, head)
      for options in ({}, {"apply": linear})
    )
    assert_trees(general, closed, rtol=1e-9, atol=1e-11)


def test_what_does_not_count_is_not_read():
  features, labels, head = draw(np.random.default_rng(7))
  head = jax.tree.map(np.float32, head)
  mask = np.ones(labels.shape, bool)
  mask[:, 5:], mask[2] = False, False
  spoiled, outside = np.where(mask[..., None], features, np.nan).astype(np.float32), np.where(mask, labels, -1)
  kept = features[:2, :5].astype(np.float32)
  before = fishr_init(head, environments=ENVIRONMENTS)
  fishr = lambda x, y, head, **where: fishr_penalty(
    x, y, head, fishr_init(head, environments=len(x)), decay=0.5, **where
  )[0]
  for penalty in (HGP, HUTCHINSON, fishr):
    expected, slope = jax.jit(jax.value_and_grad(penalty))(kept, labels[:2, :5], head)
    for given, where in ((labels, mask), (outside, None)):
      found, gradient = jax.jit(jax.value_and_grad(penalty))(spoiled, given, head, where=where)
      np.testing.assert_allclose(found, expected, rtol=1e-5)
      np.testing.assert_allclose(gradient[:2, :5], slope, rtol=1e-4, atol=1e-6)
      assert np.isfinite(gradient).all() and not np.any(gradient[~mask])
    nothing = jax.jit(jax.value_and_grad(penalty))(spoiled, labels, head, where=np.zeros_like(mask))
    assert not any(np.any(leaf) for leaf in nothing)
  old = jax.tree.map(lambda leaf: leaf + 1, before)
  _, new = fishr_penalty(spoiled, outside, head, old, decay=0.5)
  np.testing.assert_array_equal(new.variances["kernel"][2], 1)


def test_gaps_bound_how_differently_two_losses_change(x64):
  """To third order in the displacement, at random heads."""
  rng = np.random.default_rng(8)
  for _ in range(5):
    features, labels, head = draw(rng)
    flat, unravel = jax.flatten_util.ravel_pytree(head)
    move = rng.normal(size=flat.shape)
    move *= 1e-2 / np.linalg.norm(move)
    loss = lambda v, e: mean_loss(unravel(v), features[e], labels[e])
    gap = lambda v: loss(v, 0) - loss(v, 1)
    slope, curvature = jax.grad(gap)(flat), jnp.linalg.norm(jax.hessian(gap)(flat), ord=2)
    bound = 1e-2 * jnp.linalg.norm(slope) + 5e-5 * curvature
    assert abs(gap(flat + move) - gap(flat)) <= bound + 1e-6 * 30
    own = [linear_head.head_gradient(features[e], labels[e], head) for e in (0, 1)]
    closed = jax.flatten_util.ravel_pytree(jax.tree.map(jnp.subtract, *own))[0]
    np.testing.assert_allclose(closed, slope, rtol=1e-10, atol=1e-13)


def test_wrong_options_are_refused():
  features, labels, head = draw(np.random.default_rng(9))
  linear = lambda head, x: x @ head["kernel"] + head["bias"]
  with pytest.raises(ValueError, match="probes must be given"):
    HUTCHINSON(features, labels, head, apply=linear)
  with pytest.raises(ValueError, match="probes must be a tree"):
    HUTCHINSON(features, labels, head, probes={"kernel": np.ones((3, *head["kernel"].shape))})
  for leading in ((), (ENVIRONMENTS, 3), (1, 1, 3)):
    with pytest.raises(ValueError, match="probes must be like"):
      HUTCHINSON(features, labels, head, probes=jax.tree.map(lambda x, n=leading: np.ones((*n, *x.shape)), head))
  with pytest.raises(ValueError, match="apply must return"):
    HGP(features, labels, head, apply=lambda head, x: x[0] @ head["kernel"])
  with pytest.raises(ValueError, match="gradient_weight must lie"):
    hgp_penalty(features, labels, head, product_weight=1.0, gradient_weight=-1.0)
  with pytest.raises(ValueError, match="decay must lie"):
    fishr_penalty(features, labels, head, fishr_init(head, environments=ENVIRONMENTS), decay=1.0)
  with pytest.raises(ValueError, match="state must hold"):
    fishr_penalty(features, labels, head, fishr_init(head, environments=2), decay=0.5)
  with pytest.raises(ValueError, match="samples must be a positive integer"):
    head_alignment.rademacher_probes(jax.random.key(0), head, samples=0)
