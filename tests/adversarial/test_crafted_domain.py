"""Crafted inputs: golden ones, finite differences of the sharpness-aware loss, what the two norms hold, devices."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, PartitionSpec

from jaxreg.adversarial.crafted_domain import craft_domain, craft_style, sharpness_aware_loss

EXEMPT = {
  name: "takes the model's loss; tested here" for name in ("craft_domain", "craft_style", "sharpness_aware_loss")
}


def _network(case):
  params = {name: jnp.asarray(case[name]) for name in ("W1", "b1", "W2", "b2")}
  labels = jnp.asarray(case["y"])

  def loss_fn(params, inputs):
    hidden = jnp.tanh(inputs.reshape(len(inputs), -1) @ params["W1"].T + params["b1"])
    logits = hidden @ params["W2"].T + params["b2"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

  return params, loss_fn


def _drawn(rng, batch=5, shape=(2, 3)):
  features = int(np.prod(shape))
  draw = lambda *shape: rng.normal(size=shape)
  case = {"W1": draw(4, features), "b1": draw(4), "W2": draw(3, 4), "b2": draw(3), "y": rng.integers(0, 3, batch)}
  return *_network(case), draw(batch, *shape)


@pytest.mark.golden
def test_golden_udim_crafted_inputs(golden, x64):
  for name, case, _ in golden("45-udim").cases("case"):
    hp = json.loads(str(case["hp"]))
    params, loss_fn = _network(case)
    inputs, rho = case["x"], hp["rho"]

    @jax.jit
    def of_case(params, inputs, loss_fn=loss_fn, rho=rho, step_size=hp["syn_lr"]):
      objective = sharpness_aware_loss(lambda params: loss_fn(params, inputs), params, rho=rho)
      crafted = craft_domain(loss_fn, params, inputs, step_size=step_size, rho=rho)
      # The released style variant moves nothing, as this one does with a step of 0.
      return objective, crafted, craft_style(loss_fn, params, inputs, step_size=0.0, rho=rho, channel_axis=1)

    objective, crafted, still = of_case(params, inputs)
    for variant in ("pooled", "domwise", "advstyle"):
      expected = case[f"udim_{variant}_out_perturbed_objective"]
      np.testing.assert_allclose(objective, expected, rtol=1e-9, err_msg=f"{name} {variant}")
    for variant in ("pooled", "domwise"):
      expected = case[f"udim_{variant}_out_x_pert"]
      np.testing.assert_allclose(crafted, expected, rtol=1e-9, atol=1e-12, err_msg=f"{name} {variant}")
    np.testing.assert_allclose(still, case["udim_advstyle_out_x_pert"], rtol=1e-9, atol=1e-12)


def test_the_objective_and_its_gradients(x64):
  params, loss_fn, inputs = _drawn(np.random.default_rng(0))
  loss = lambda params: loss_fn(params, inputs)
  value, gradient = jax.value_and_grad(loss)(params)
  norm = optax.tree.norm(gradient)
  np.testing.assert_allclose(sharpness_aware_loss(loss, params, rho=0.3), value + 0.3 * norm, rtol=1e-12)
  np.testing.assert_array_equal(sharpness_aware_loss(loss, params, rho=0.0), value)
  # The gradient of the gradient's norm is the Hessian times the unit gradient.
  slope = jax.grad(lambda params: sharpness_aware_loss(loss, params, rho=1.0) - loss(params))(params)
  ends = [jax.grad(loss)(jax.tree.map(lambda p, g, h=h: p + h * g / norm, params, gradient)) for h in (1e-5, -1e-5)]
  bent = jax.tree.map(lambda a, b: (a - b) / 2e-5, *ends)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-9), slope, bent)
  # And the step goes along the objective's gradient in the inputs.
  of_inputs = jax.grad(lambda x: sharpness_aware_loss(lambda params: loss_fn(params, x), params, rho=0.3))(inputs)
  by_batch = craft_domain(loss_fn, params, inputs, step_size=2.0, rho=0.3) - inputs
  np.testing.assert_allclose(by_batch, 2 * of_inputs / np.linalg.norm(of_inputs, axis=0), rtol=1e-10)
  by_example = craft_domain(loss_fn, params, inputs, step_size=2.0, rho=0.3, norm_axis="example") - inputs
  lengths = np.linalg.norm(of_inputs.reshape(len(inputs), -1), axis=1)[:, None, None]
  np.testing.assert_allclose(by_example, 2 * of_inputs / lengths, rtol=1e-10)


def test_what_the_norms_hold(x64):
  params, loss_fn, inputs = _drawn(np.random.default_rng(1), batch=1)
  params["W1"] = params["W1"].at[:, 2].set(0)  # a coordinate that the network does not see
  seen = np.arange(inputs.size).reshape(inputs.shape) != 2
  step = craft_domain(loss_fn, params, inputs, step_size=0.25, rho=0.0) - inputs
  np.testing.assert_allclose(np.abs(step), np.where(seen, 0.25, 0), rtol=1e-12)
  np.testing.assert_array_equal(craft_domain(loss_fn, params, inputs, step_size=0.0), inputs)
  params, loss_fn, inputs = _drawn(np.random.default_rng(1), batch=6)
  step = craft_domain(loss_fn, params, inputs, step_size=0.25) - inputs
  np.testing.assert_allclose(np.linalg.norm(step, axis=0), 0.25, rtol=1e-12)
  np.testing.assert_allclose(np.sum(step**2), 0.25**2 * inputs[0].size, rtol=1e-12)


def test_no_gradient_and_gradients_of_any_size():
  inputs = np.ones((3, 2), np.float32)
  flat = craft_domain(lambda w, x: jnp.sum(w) * 0 + jnp.sum(x) * 0, jnp.ones(2), inputs, step_size=1.0)
  np.testing.assert_array_equal(flat, inputs)
  for size in (1e-30, 1e30):
    for norm_axis in ("batch", "example"):
      loss_fn = lambda w, x, size=size: size * jnp.mean(x @ w)
      moved = craft_domain(loss_fn, jnp.array([1.0, -1.0]), inputs, step_size=1.0, rho=0.1, norm_axis=norm_axis)
      np.testing.assert_allclose(np.sum((moved - inputs) ** 2), 2 if norm_axis == "batch" else 3, rtol=1e-5)
  craft = lambda w, x: craft_domain(lambda w, x: jnp.mean(x @ w), w, x, step_size=1.0)
  assert craft(jnp.ones(2, jnp.bfloat16), inputs.astype(jnp.bfloat16)).dtype == jnp.bfloat16
  slope = jax.grad(lambda w: jnp.sum(craft(w, inputs)))(jnp.ones(2))
  assert not np.any(slope)


def test_a_split_batch_is_the_whole(x64):
  """Of a loss that is the mean over examples."""
  params, _, inputs = _drawn(np.random.default_rng(2), batch=4)
  score = lambda params, x: jnp.mean(jnp.sin(jnp.tanh(x.reshape(len(x), -1) @ params["W1"].T) @ params["W2"][0]))
  craft = lambda x, **options: craft_domain(score, params, x, step_size=0.5, rho=0.3, **options)
  mapped = jax.shard_map(
    lambda x: craft(x, axis_name="devices"),
    mesh=jax.make_mesh((2,), ("devices",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2]),
    in_specs=PartitionSpec("devices"),
    out_specs=PartitionSpec("devices"),
    check_vma=False,
  )
  np.testing.assert_allclose(jax.jit(mapped)(inputs), craft(inputs), rtol=1e-10)


def test_style_moves_the_channels_statistics_alone(x64):
  rng = np.random.default_rng(3)
  params, loss_fn, inputs = _drawn(rng, shape=(3, 2, 2))
  styled = np.asarray(craft_style(loss_fn, params, inputs, step_size=0.5, rho=0.1, channel_axis=1))
  plain = lambda x: (x - x.mean((2, 3), keepdims=True)) / x.std((2, 3), keepdims=True)
  np.testing.assert_allclose(plain(styled), plain(inputs), rtol=1e-8)
  # Every image's channel means move along the objective's gradient.
  objective = lambda x: sharpness_aware_loss(lambda params: loss_fn(params, x), params, rho=0.1)
  along = jax.grad(objective)(inputs)
  np.testing.assert_allclose((styled - inputs).mean((2, 3)), 0.5 * along.sum((2, 3)), rtol=1e-8, atol=1e-12)
  assert objective(styled) > objective(inputs)


def test_bad_input_is_refused():
  loss_fn, inputs = lambda w, x: jnp.sum(x) * w, np.ones((2, 3), np.float32)
  with pytest.raises(ValueError, match="norm_axis must be one of"):
    craft_domain(loss_fn, jnp.ones(()), inputs, step_size=1.0, norm_axis="channel")
  with pytest.raises(ValueError, match="loss_fn must return a floating scalar"):
    craft_domain(lambda w, x: x * w, jnp.ones(()), inputs, step_size=1.0)
  with pytest.raises(ValueError, match="step_size must lie in"):
    craft_domain(loss_fn, jnp.ones(()), inputs, step_size=-1.0)
  with pytest.raises(ValueError, match="inputs must be floating"):
    craft_domain(loss_fn, jnp.ones(()), inputs.astype(int), step_size=1.0)
  with pytest.raises(ValueError, match="channel_axis must be"):
    craft_style(loss_fn, jnp.ones(()), inputs, step_size=1.0, channel_axis=0)
  with pytest.raises(ValueError, match="two positions"):
    craft_style(loss_fn, jnp.ones(()), inputs, step_size=1.0)
  with pytest.raises(ValueError, match="rho must lie in"):
    sharpness_aware_loss(lambda w: w, jnp.ones(()), rho=-1.0)
