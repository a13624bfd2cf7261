"""V-REx, IRM, CORAL, MMD and IGA: golden values of the official code, the card's exact tests, masks."""

import functools
import json

import jax
import numpy as np
import optax
import pytest

from jaxreg.regularizers import environment_penalties, linear_head
from tests.conformance import row
from tests.regularizers.golden_environments import close_to, environments_of, head_of, losses_of

ENVIRONMENTS, BATCH, SIZE = 3, 6, 4
SHAPE = (ENVIRONMENTS, BATCH)


def _features(rng):
  return (rng.normal(size=(*SHAPE, SIZE)),)


def _classification(rng):
  return rng.normal(size=(*SHAPE, 3)), rng.integers(0, 3, SHAPE).astype(np.int32)


def _losses(rng):
  return (rng.uniform(size=SHAPE),)


_BAD_LOSSES = (("losses", lambda x: (x.astype(np.int32),)), ("losses", lambda x: (x[0],)))
_BAD_FEATURES = (("features", lambda x: (x.astype(np.int32),)), ("features", lambda x: (x[0],)))
ROWS = [
  row(environment_penalties.environment_risks, _losses, bad=_BAD_LOSSES),
  row(environment_penalties.vrex_penalty, _losses, bad=_BAD_LOSSES),
  *(
    row(
      environment_penalties.irm_penalty,
      _classification,
      bad=(
        ("logits", lambda z, y: (z.astype(np.int32), y)),
        ("logits", lambda z, y: (z[0], y[0])),
        ("labels", lambda z, y: (z, y[1:])),
        ("labels", lambda z, y: (z, y * 1.0)),
      ),
      options=dict(split=split),
    )
    for split in (True, False)
  ),
  row(environment_penalties.coral_penalty, _features, bad=_BAD_FEATURES),
  row(environment_penalties.mmd_penalty, _features, bad=_BAD_FEATURES),
  row(
    environment_penalties.iga_penalty,
    lambda rng: ({"kernel": rng.normal(size=(ENVIRONMENTS, 3, 2)), "bias": rng.normal(size=(ENVIRONMENTS, 2))},),
    bad=(
      ("gradients", lambda g: (jax.tree.map(lambda leaf: leaf.astype(np.int32), g),)),
      ("gradients", lambda g: ({**g, "bias": g["bias"][1:]},)),
    ),
    wide=True,
  ),
]


@pytest.mark.golden
def test_golden_37_hessian_alignment_of_features(golden, x64):
  for name, case, _ in golden("37-hessian_alignment").cases("case"):
    hp, head = json.loads(str(case["hp"])), head_of(case)
    features, labels, where = environments_of(case)
    for method in ("coral", "mmd"):
      penalty = functools.partial(getattr(environment_penalties, f"{method}_penalty"), where=where)
      total = lambda x, p=penalty, y=labels, h=head, w=where, gamma=hp["mmd_gamma"]: (
        losses_of(x, y, h, w).mean() + gamma * p(x)
      )
      close = close_to(f"{name} {method}")
      close(penalty(features), case[f"{method}_out_penalty"])
      gradient = jax.grad(total)(features)
      for environment, own in enumerate(where):
        close(gradient[environment][own], case[f"{method}_grad_feat{environment}"])


@pytest.mark.golden
def test_golden_37_hessian_alignment_of_risks(golden, x64):
  for name, case, _ in golden("37-hessian_alignment").cases("case"):
    hp, head = json.loads(str(case["hp"])), head_of(case)
    features, labels, where = environments_of(case)
    logits = lambda x, head: x @ head["kernel"] + head["bias"]

    def vrex(x, head, labels=labels, where=where, weight=hp["vrex_lambda"], logits=logits):
      losses = optax.softmax_cross_entropy_with_integer_labels(logits(x, head), labels)
      penalty = environment_penalties.vrex_penalty(losses, where=where)
      return environment_penalties.environment_risks(losses, where=where).mean() + weight * penalty, penalty

    def iga(x, head, labels=labels, where=where, weight=hp["iga_penalty"]):
      gradients = linear_head.head_gradient(x, labels, head, where=where)
      penalty = environment_penalties.iga_penalty(gradients)
      return losses_of(x, labels, head, where).mean() + weight * penalty, penalty

    for method, total in (("vrex", vrex), ("iga", iga)):
      (value, penalty), gradients = jax.value_and_grad(total, (0, 1), has_aux=True)(features, head)
      close = close_to(f"{name} {method}")
      close(penalty, case[f"{method}_out_penalty"])
      if f"{method}_out_loss" in case:
        close(value, case[f"{method}_out_loss"])
      close(gradients[1]["kernel"].T, case[f"{method}_grad_W"])
      close(gradients[1]["bias"], case[f"{method}_grad_b"])
      for environment, own in enumerate(where):
        close(gradients[0][environment][own], case[f"{method}_grad_feat{environment}"])

    irm = lambda x, y=labels, w=where, h=head: environment_penalties.irm_penalty(logits(x, h), y, where=w)
    close = close_to(f"{name} irm")
    alone = [
      environment_penalties.irm_penalty(logits(x[None], head), y[None], where=w[None])
      for x, y, w in zip(features, labels, where)
    ]
    close(np.asarray(alone), case["irm_out_penalty_per_env"])
    gradient = jax.grad(irm)(features)
    for environment, own in enumerate(where):
      close(gradient[environment][own], case[f"irm_grad_feat{environment}"])


def test_equal_environments_have_no_penalty(x64):
  rng = np.random.default_rng(0)
  same = lambda array: np.repeat(array[:1], ENVIRONMENTS, 0)
  gradients = {"w": same(rng.normal(size=(1, 5)))}
  for value in (
    environment_penalties.vrex_penalty(same(_losses(rng)[0])),
    environment_penalties.coral_penalty(same(_features(rng)[0])),
    environment_penalties.mmd_penalty(same(_features(rng)[0])),
    environment_penalties.iga_penalty(gradients),
    environment_penalties.coral_penalty(_features(rng)[0][:1]),
    environment_penalties.mmd_penalty(_features(rng)[0][:1]),
  ):
    np.testing.assert_allclose(value, 0, atol=1e-14)


def test_irm_is_the_slope_in_a_factor_of_the_logits(x64):
  rng = np.random.default_rng(1)
  features, head = _features(rng)[0], {"kernel": rng.normal(size=(SIZE, 3)), "bias": rng.normal(size=3)}
  labels = _classification(rng)[1]
  logits = features @ head["kernel"] + head["bias"]
  loss = lambda s, z, y: optax.softmax_cross_entropy_with_integer_labels(s * z, y).mean()
  slopes = jax.vmap(lambda z, y: jax.grad(loss)(1.0, z, y))(logits, labels)
  found = environment_penalties.irm_penalty(logits, labels, split=False)
  np.testing.assert_allclose(found, np.mean(slopes**2), rtol=1e-12)
  inner = jax.vmap(lambda x, y: optax.tree.vdot(head, linear_head.head_gradient(x, y, head)))(features, labels)
  np.testing.assert_allclose(inner, slopes, rtol=1e-10)
  binary = lambda s, z, y: optax.sigmoid_binary_cross_entropy(s * z, y).mean()
  labels = labels % 2
  slopes = jax.vmap(lambda z, y: jax.grad(binary)(1.0, z, y))(logits[..., 0], labels)
  found = environment_penalties.irm_penalty(logits[..., :1], labels, split=False)
  np.testing.assert_allclose(found, np.mean(slopes**2), rtol=1e-12)


def test_vrex_is_the_population_variance(x64):
  losses = _losses(np.random.default_rng(2))[0]
  np.testing.assert_allclose(environment_penalties.vrex_penalty(losses), np.var(losses.mean(1)), rtol=1e-12)


def test_coral_turns_and_shifts_with_the_features(x64):
  rng = np.random.default_rng(3)
  features = _features(rng)[0]
  turn, _ = np.linalg.qr(rng.normal(size=(SIZE, SIZE)))
  expected = environment_penalties.coral_penalty(features)
  np.testing.assert_allclose(environment_penalties.coral_penalty(features @ turn + rng.normal(size=SIZE)), expected)


def test_what_does_not_count_is_not_read(x64):
  rng = np.random.default_rng(4)
  mask = np.ones(SHAPE, bool)
  mask[:, 4:], mask[2] = False, False
  features, (logits, labels), losses = _features(rng)[0], _classification(rng), _losses(rng)[0]
  irm = lambda z, **options: environment_penalties.irm_penalty(z, labels[: len(z), : z.shape[1]], **options)
  for function, values in (
    (environment_penalties.coral_penalty, features),
    (environment_penalties.mmd_penalty, features),
    (environment_penalties.vrex_penalty, losses),
    (irm, logits),
  ):
    spoiled = np.where(mask.reshape(*SHAPE, *[1] * (values.ndim - 2)), values, np.nan)
    program = jax.jit(jax.value_and_grad(function))
    expected, slope = program(values[:2, :4])
    found, gradient = program(spoiled, where=mask)
    np.testing.assert_allclose(found, expected, rtol=1e-9)
    np.testing.assert_allclose(gradient[:2, :4], slope, rtol=1e-9, atol=1e-12)
    assert np.isfinite(gradient).all() and not np.any(gradient[~mask])
    assert not any(np.any(leaf) for leaf in program(spoiled, where=np.zeros_like(mask)))
  outside = environment_penalties.irm_penalty(np.where(mask[..., None], logits, np.nan), np.where(mask, labels, -100))
  np.testing.assert_allclose(outside, irm(logits[:2, :4]), rtol=1e-9)


def test_wrong_options_are_refused():
  with pytest.raises(ValueError, match="gammas must be"):
    environment_penalties.mmd_penalty(np.ones((2, 3, 1), np.float32), gammas=1.0)
