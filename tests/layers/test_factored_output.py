"""The factored output layer trains beside an optimizer as the dense layer does."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxreg.layers.factored_output import FactoredOutput
from jaxreg.solvers import factored_output as fo
from tests.conformance import EXAMPLES, row, unchanged
from tests.solvers.test_factored_output import CLASSES, FEATURES, check_state, dense_loss, state_of, z


class Network(nn.Module):
  """A hidden layer below the factored one."""

  @nn.compact
  def __call__(self, x, labels, learning_rate=0.0):
    hidden = nn.tanh(nn.Dense(FEATURES)(x))
    return FactoredOutput(CLASSES, loss=z, scale=1.0, stabilize_every=3, name="out")(hidden, labels, learning_rate)


def make_network_step(optimizer):
  def step(variables, opt_state, x, labels):
    def objective(params):
      losses, updated = Network().apply(
        {"params": params, "factored": variables["factored"]}, x, labels, 0.2, mutable=["factored"]
      )
      return losses.mean(), updated["factored"]

    (value, factored), gradient = jax.value_and_grad(objective, has_aux=True)(variables["params"])
    updates, opt_state = optimizer.update(gradient, opt_state)
    return {"params": optax.apply_updates(variables["params"], updates), "factored": factored}, opt_state, value

  return jax.jit(step, donate_argnums=(0, 1))


def test_module_trains_beside_an_optimizer_like_the_dense_network(x64):
  rng = np.random.default_rng(0)
  x, labels = jnp.asarray(rng.normal(size=(8, 3))), jnp.asarray(rng.integers(0, CLASSES, 8))
  variables = Network().init(jax.random.key(0), x, labels)
  variables = jax.tree.map(lambda leaf: leaf.astype(jnp.float64) if leaf.dtype == jnp.float32 else leaf, variables)
  # The Gram matrix of the cast weights, to more than float32's digits.
  variables["factored"]["out"]["state"] = fo.unfactorize(variables["factored"]["out"]["state"])
  optimizer = optax.adam(0.01)
  params = (
    jax.tree.map(jnp.copy, variables["params"]["Dense_0"]),
    fo.factored_weights(variables["factored"]["out"]["state"]),
  )

  @jax.jit
  def dense_step(params, opt_state):
    def objective(params):
      hidden = jnp.tanh(x @ params[0]["kernel"] + params[0]["bias"])
      return dense_loss(z, params[1], hidden, labels)

    value, gradient = jax.value_and_grad(objective)(params)
    updates, opt_state = optimizer.update(gradient[0], opt_state)
    return (optax.apply_updates(params[0], updates), params[1] - 0.2 * gradient[1]), opt_state, value

  dense_state, state, step = (
    optimizer.init(params[0]),
    optimizer.init(variables["params"]),
    make_network_step(optimizer),
  )
  for _ in range(7):
    before = variables["factored"]["out"]["state"].factor
    variables, state, value = step(variables, state, x, labels)
    assert before.is_deleted()
    params, dense_state, expected = dense_step(params, dense_state)
    np.testing.assert_allclose(value, expected, rtol=1e-9)
  np.testing.assert_allclose(variables["params"]["Dense_0"]["kernel"], params[0]["kernel"], rtol=1e-8)
  check_state(variables["factored"]["out"]["state"], params[1], 1e-9)
  evaluated = Network().apply(variables, x, labels)  # not mutable: nothing changes
  assert evaluated.shape == (8,)


_LAYER = FactoredOutput(CLASSES, loss=z)

ROWS = [
  row(
    FactoredOutput,
    lambda rng: (
      rng.normal(size=(EXAMPLES, FEATURES)),
      rng.integers(0, CLASSES, EXAMPLES).astype(np.int32),
      rng.normal(size=(CLASSES, FEATURES)),
    ),
    call=lambda inputs, labels, factor: _LAYER.apply({"factored": {"state": state_of(factor)}}, inputs, labels),
    extreme=unchanged,
    wide=True,
  ),
]
