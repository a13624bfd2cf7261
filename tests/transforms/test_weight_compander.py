"""The compander as an optimizer does what an optimizer of companded parameters does."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxreg.layers.weight_compander import CompandedParams, compander_init, fold_params
from jaxreg.transforms.weight_compander import compand_weights
from tests.conformance import transform_row

PARAMS = {
  "Dense_0": {"kernel": np.linspace(-0.8, 0.9, 12, dtype=np.float32).reshape(4, 3), "bias": np.zeros(3, np.float32)}
}
INPUTS = np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32)


def loss(params):
  return jnp.mean((INPUTS @ params["Dense_0"]["kernel"] + params["Dense_0"]["bias"] - 3.0) ** 2)


def descend(tx, objective, params, length=5):
  def step(carry, _):
    params, state = carry
    updates, state = tx.update(jax.grad(objective)(params), state, params)
    return (optax.apply_updates(params, updates), state), None

  return jax.lax.scan(step, (params, tx.init(params)), None, length=length)[0]


@pytest.mark.parametrize("learned", [False, True])
def test_same_path_as_companded_parameters(learned):
  base = optax.chain(optax.add_decayed_weights(1e-2), optax.sgd(0.1, momentum=0.9))
  scales = optax.sgd(0.01) if learned else None

  @jax.jit
  def both(params):
    weights, state = descend(compand_weights(base, scales, slope=2.0), loss, params)
    labels = CompandedParams("weights", "scales", "scales")
    several = optax.multi_transform({"weights": base, "scales": scales or optax.set_to_zero()}, labels)
    companded, _ = descend(several, lambda c: loss(fold_params(c)), compander_init(params, slope=2.0))
    return weights, state, companded, fold_params(companded)

  weights, state, companded, expected = both(PARAMS)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), weights, expected)
  assert set(state.raw) == {"Dense_0/kernel"}
  np.testing.assert_allclose(
    state.log_amplitude["Dense_0/kernel"], companded.log_amplitude["Dense_0/kernel"], rtol=1e-5
  )
  kept = np.isclose(state.log_amplitude["Dense_0/kernel"], np.log(1.5 * np.sqrt(2 / 4)), rtol=1e-5)
  assert kept != learned


def test_gradients_at_other_parameters_are_pulled_back():
  """An optimizer that asks for the gradient at its own parameters gets it for v."""

  def update(updates, state, params, *, grad_fn):
    elsewhere = grad_fn(jax.tree.map(lambda leaf: leaf + 0.1, params))
    return jax.tree.map(lambda a, b: -0.1 * (a + b), updates, elsewhere), state

  twice = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)

  @jax.jit
  def both(params):
    tx, companded = compand_weights(twice), compander_init(params)
    given, _ = tx.update(jax.grad(loss)(params), tx.init(params), params, grad_fn=jax.grad(loss))
    own = lambda raw: loss(fold_params(companded._replace(raw=raw)))
    # The optimizer's parameters at the first step are clipped nowhere here, so both gradients are the same.
    updates, _ = twice.update(jax.grad(own)(companded.raw), (), companded.raw, grad_fn=jax.grad(own))
    moved = companded._replace(raw=optax.apply_updates(companded.raw, updates))
    return optax.apply_updates(params, given), fold_params(moved)

  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), *both(PARAMS))


def test_bfloat16_weights_follow_float32_parameters():
  params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.bfloat16), PARAMS)
  weights, state = jax.jit(lambda params: descend(compand_weights(optax.sgd(1e-4)), loss, params, length=50))(params)
  kernel = compander_init(PARAMS)._replace(raw={"Dense_0": {"kernel": state.raw["Dense_0/kernel"]}})
  assert state.raw["Dense_0/kernel"].dtype == jnp.float32 and weights["Dense_0"]["kernel"].dtype == jnp.bfloat16
  expected = fold_params(kernel)["Dense_0"]["kernel"]
  # Two roundings: of the update, and of its sum with the weight.
  np.testing.assert_allclose(weights["Dense_0"]["kernel"].astype(jnp.float32), expected, rtol=2**-7, atol=2**-8)


def test_bad_input():
  tx = compand_weights(optax.sgd(0.1))
  with pytest.raises(ValueError, match="params must be given"):
    tx.update(PARAMS, tx.init(PARAMS))
  with pytest.raises(ValueError, match="deviations must lie in"):
    compand_weights(optax.sgd(0.1), deviations=0.0)


TRANSFORMS = [
  transform_row(
    compand_weights,
    lambda base, deviations=1.5, slope=1.0: compand_weights(base, deviations=deviations, slope=slope),
    deviations=(1.0, 3.0),
    slope=(1.0, 2.0),
  ),
]


EXEMPT = {
  "CompandWeightsState": "state, carried by compand_weights",
}
