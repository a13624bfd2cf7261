"""Fish: golden parameters of the official code, optax's lookahead, limits."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxreg.transforms import fish, gradient_matching
from tests.conformance import transform_row
from tests.regularizers.golden_environments import head_of

TRANSFORMS = [
  transform_row(
    gradient_matching.fish,
    lambda base, environments=2, meta_learning_rate=0.5: gradient_matching.fish(
      base, environments=environments, meta_learning_rate=meta_learning_rate
    ),
    environments=(1, 3),
    meta_learning_rate=(0.1, 1.0),
  )
]
EXEMPT = {"FishState": "state of fish"}


def mean_loss(head, features, labels):
  logits = features @ head["kernel"] + head["bias"]
  return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


@pytest.mark.golden
def test_golden_37_hessian_alignment_fish(golden, x64):
  for name, case, _ in golden("37-hessian_alignment").cases("case"):
    hp, head = json.loads(str(case["hp"])), head_of(case)
    tx = fish(optax.adam(hp["fish_lr"]), environments=hp["E"], meta_learning_rate=hp["fish_meta_lr"])
    state = tx.init(head)
    for step in (0, 1):
      for environment in range(hp["E"]):
        gradient = jax.grad(mean_loss)(head, case[f"feat{environment}"], case[f"label{environment}"])
        updates, state = tx.update(gradient, state, head)
        head = optax.apply_updates(head, updates)
      np.testing.assert_allclose(head["kernel"].T, case[f"fish_out_W_step{step}"], rtol=1e-9, err_msg=name)
      np.testing.assert_allclose(head["bias"], case[f"fish_out_b_step{step}"], rtol=1e-9, err_msg=name)


def test_rounds_are_those_of_lookahead():
  optimizer, start = optax.adam(0.1), {"w": jnp.ones(3)}
  tx = fish(optimizer, environments=3, meta_learning_rate=0.4)
  other = optax.lookahead(optimizer, 3, 0.4)
  params, pair = start, optax.LookaheadParams.init_synced(start)
  state, slow = tx.init(params), other.init(pair)
  update, step = jax.jit(tx.update), jax.jit(other.update)
  for index, gradient in enumerate(np.random.default_rng(0).normal(size=(9, 3))):
    gradient = {"w": jnp.asarray(gradient, jnp.float32)}
    updates, state = update(gradient, state, params)
    params = optax.apply_updates(params, updates)
    updates, slow = step(gradient, slow, pair)
    pair = optax.apply_updates(pair, updates)
    np.testing.assert_allclose(params["w"], pair.fast["w"], rtol=1e-5, err_msg=str(index))


def test_the_whole_way_is_the_inner_optimizer():
  optimizer, params = optax.sgd(0.1), {"w": jnp.ones(3)}
  gradient = {"w": jnp.arange(3.0)}
  tx = fish(optimizer, environments=2, meta_learning_rate=1.0)
  state, expected = tx.init(params), params
  for _ in range(4):
    updates, state = tx.update(gradient, state, params)
    params = optax.apply_updates(params, updates)
    expected = jax.tree.map(lambda p, g: p - 0.1 * g, expected, gradient)
  np.testing.assert_allclose(params["w"], expected["w"], rtol=1e-6)


def test_parameters_that_are_not_trained_have_no_update():
  params = {"first": jnp.ones(2), "frozen": jnp.ones(3), "last": jnp.ones(())}
  tx = fish(optax.sgd(0.1), environments=2, meta_learning_rate=0.5)
  updates, _ = tx.update({"first": jnp.ones(2), "frozen": None, "last": jnp.ones(())}, tx.init(params), params)
  assert updates["frozen"] is None and updates["first"].shape == (2,)
  with pytest.raises(ValueError, match="shapes"):
    tx.update({"first": jnp.ones(3), "frozen": None, "last": jnp.ones(())}, tx.init(params), params)
