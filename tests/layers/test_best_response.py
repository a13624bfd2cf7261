"""Best-response layers: equal to materialized weights, affine in the hyperparameters, the official code's outputs."""

import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxreg.layers import best_response
from tests.conformance import EXAMPLES, draw_logits, module_row, row, waves

RNG = np.random.default_rng(0)
H = 3


def dense_params(rng, inputs, features, hyperparameters):
  shapes = {
    "kernel": (inputs, features), "response_kernel": (inputs, features), "kernel_gate": (hyperparameters, features),
    "bias": (features,), "response_bias": (features,), "bias_gate": (hyperparameters, features), "scale": (),
  }  # fmt: skip
  return {name: rng.normal(size=shape) for name, shape in shapes.items()}


@functools.partial(jax.jit, static_argnums=0)
def apply(layer, params, *arguments):
  return layer.apply({"params": params}, *arguments)


def test_dense_is_the_materialized_layer_for_one_and_for_distinct_hyperparameters(x64):
  params, inputs, positions = dense_params(RNG, 4, 5, H), RNG.normal(size=(6, 4)), RNG.normal(size=(6, H))
  layer = best_response.BestResponseDense(5)
  weights = lambda at, name: params["scale"] * params[name] + (at @ params[f"{name}_gate"]) * params[f"response_{name}"]
  expected = np.stack([x @ weights(at, "kernel") + weights(at, "bias") for x, at in zip(inputs, positions)])
  np.testing.assert_allclose(apply(layer, params, inputs, positions), expected, rtol=1e-10, atol=1e-10)
  one = inputs @ weights(positions[0], "kernel") + weights(positions[0], "bias")
  np.testing.assert_allclose(apply(layer, params, inputs, positions[0]), one, rtol=1e-10, atol=1e-10)
  plain = best_response.materialize_best_response(params, positions[0])
  np.testing.assert_allclose(apply(nn.Dense(5), plain, inputs), one, rtol=1e-10, atol=1e-10)
  # Axes between the examples and the features, and hyperparameters for leading axes.
  stacked = apply(layer, params, np.stack([inputs, inputs], 1), positions)
  np.testing.assert_allclose(stacked, np.stack([expected, expected], 1), rtol=1e-10, atol=1e-10)


def test_elementary_part_and_affinity(x64):
  params, inputs, positions = dense_params(RNG, 4, 5, H), RNG.normal(size=(6, 4)), RNG.normal(size=(2, 6, H))
  layer = best_response.BestResponseDense(5)
  elementary = params["scale"] * (inputs @ params["kernel"] + params["bias"])
  np.testing.assert_allclose(apply(layer, params, inputs, 0 * positions[0]), elementary, rtol=1e-12)
  np.testing.assert_allclose(apply(layer, params, inputs, None), elementary, rtol=1e-12)
  outputs = [apply(layer, params, inputs, at) for at in (positions[0], positions[1], positions.mean(0))]
  np.testing.assert_allclose(outputs[0] + outputs[1] - 2 * outputs[2], np.zeros((6, 5)), atol=1e-12)


def test_convolution_of_one_pixel_is_dense_on_every_pixel_and_a_plain_convolution(x64):
  params, images, positions = dense_params(RNG, 3, 4, H), RNG.normal(size=(2, 3, 5, 3)), RNG.normal(size=(2, H))
  dense = apply(best_response.BestResponseDense(4), params, images, positions)
  lifted = {name: value[None, None] if name.endswith("l") else value for name, value in params.items()}
  layer = best_response.BestResponseConv(4, (1, 1))
  assert {"kernel", "response_kernel"} == {name for name in params if name.endswith("l")}
  np.testing.assert_allclose(apply(layer, lifted, images, positions), dense, rtol=1e-12, atol=1e-12)
  wide = {**params, "kernel": RNG.normal(size=(3, 2, 3, 4)), "response_kernel": RNG.normal(size=(3, 2, 3, 4))}
  strided = best_response.BestResponseConv(4, (3, 2), strides=(2, 1), padding="VALID")
  plain = nn.Conv(4, (3, 2), strides=(2, 1), padding="VALID")
  expected = apply(plain, best_response.materialize_best_response(wide, positions[0]), images)
  np.testing.assert_allclose(apply(strided, wide, images, positions[0]), expected, rtol=1e-10, atol=1e-12)


def test_embedding(x64):
  params = {"embedding": RNG.normal(size=(7, 4)), "response_embedding": RNG.normal(size=(7, 4))}
  params["embedding_gate"] = RNG.normal(size=(H, 4))
  tokens, positions = RNG.integers(0, 7, (2, 5)), RNG.normal(size=(2, H))
  tables = [best_response.materialize_best_response(params, at)["embedding"] for at in positions]
  expected = np.stack([table[row] for table, row in zip(tables, tokens)])
  layer = best_response.BestResponseEmbed(7, 4)
  np.testing.assert_allclose(apply(layer, params, tokens, positions), expected, rtol=1e-12)
  np.testing.assert_allclose(apply(layer, params, tokens, None), params["embedding"][tokens], rtol=1e-12)


def test_lstm_cell_is_flax_cell_with_materialized_weights(x64):
  cell, position = best_response.BestResponseLSTMCell(4), RNG.normal(size=H)
  params = {"input": dense_params(RNG, 3, 16, H), "recurrent": dense_params(RNG, 4, 16, H)}
  for layer in params.values():
    del layer["scale"]
  carry, inputs = (RNG.normal(size=(2, 4)), RNG.normal(size=(2, 4))), RNG.normal(size=(2, 3))
  mask = RNG.integers(0, 2, (4, 1))
  outer, inner = (best_response.materialize_best_response(params[name], position) for name in ("input", "recurrent"))
  plain = {}
  for index, gate in enumerate("ifgo"):
    columns = slice(4 * index, 4 * index + 4)
    plain[f"i{gate}"] = {"kernel": outer["kernel"][:, columns]}
    kernel = inner["kernel"][:, columns] * mask
    plain[f"h{gate}"] = {"kernel": kernel, "bias": (outer["bias"] + inner["bias"])[columns]}
  expected = apply(nn.LSTMCell(4), plain, carry, inputs)
  got = apply(cell, params, carry, inputs, position, mask)
  chex.assert_trees_all_close(got, expected, rtol=1e-10, atol=1e-12)


def test_initial_weights():
  layer = best_response.BestResponseDense(400)
  params = jax.jit(layer.init)(jax.random.key(0), jnp.ones((1, 25)), jnp.ones(H))["params"]
  for name in ("kernel", "response_kernel", "bias", "response_bias"):
    assert 0.19 < np.abs(params[name]).max() <= 0.2  # 25^-1/2
  for name in ("kernel_gate", "bias_gate"):
    np.testing.assert_allclose(np.std(params[name]), 0.01, rtol=0.1)
  assert params["scale"] == 1


def test_bfloat16_inputs_and_extreme_values():
  layer = best_response.BestResponseDense(5)
  params = jax.tree.map(jnp.float32, dense_params(RNG, 4, 5, H))
  inputs, positions = jnp.asarray(RNG.normal(size=(6, 4)), jnp.float32), jnp.asarray(RNG.normal(size=(6, H)))
  narrow = apply(layer, params, inputs.astype(jnp.bfloat16), positions)
  assert narrow.dtype == jnp.bfloat16
  np.testing.assert_allclose(narrow.astype(jnp.float32), apply(layer, params, inputs, positions), rtol=0.1, atol=0.3)
  loss = lambda params: jnp.mean(jnp.square(layer.apply({"params": params}, 1e4 * inputs, 50 * positions)))
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(jax.jit(jax.grad(loss))(params)))


@pytest.mark.parametrize(
  "layer, arguments, message",
  [
    (
      best_response.BestResponseDense(2),
      (np.ones((3, 2), np.int32), np.ones(1, np.float32)),
      "inputs must be floating",
    ),
    (best_response.BestResponseDense(2), (np.ones((3, 2), np.float32), np.ones((2, 1), np.float32)), "hyperparameters"),
    (
      best_response.BestResponseDense(2),
      (np.ones((3, 2), np.float32), np.float32(1)),
      "hyperparameters must have shape",
    ),
    (best_response.BestResponseConv(2, (1, 1)), (np.ones((3, 2), np.float32), None), "inputs must be .examples"),
    (best_response.BestResponseEmbed(2, 2), (np.ones(3, np.float32), None), "tokens must be integers"),
  ],
)
def test_bad_input(layer, arguments, message):
  with pytest.raises(ValueError, match=message):
    jax.eval_shape(layer.init, jax.random.key(0), *arguments)


def official(arrays, transpose):
  """The official parameters in ours: output features last, gates of weights and biases apart."""
  half = len(arrays["scalar_weight"]) // 2
  return {
    "kernel": transpose(arrays["elem_weight"]), "response_kernel": transpose(arrays["hnet_weight"]),
    "bias": arrays["elem_bias"], "response_bias": arrays["hnet_bias"], "scale": arrays["elem_scalar"].reshape(()),
    "kernel_gate": arrays["scalar_weight"][:half].T, "bias_gate": arrays["scalar_weight"][half:].T,
  }  # fmt: skip


@pytest.mark.golden
def test_golden_05_stn_layers(golden, x64):
  layers, file = 0, golden("05-stn")
  for case, arrays, _ in file.cases():
    meta = file.meta["cases"][case.removeprefix("case")]
    if meta.get("layer") == "HyperLinear":
      layer, weights = best_response.BestResponseDense(len(arrays["elem_bias"])), lambda w: np.transpose(w)
      outside = inside = lambda x: x
    elif meta.get("layer") == "HyperConv2d":
      layer = best_response.BestResponseConv(
        len(arrays["elem_bias"]), (meta["kernel"],) * 2, (meta["stride"],) * 2, [(meta["padding"],) * 2] * 2
      )
      weights, inside = (lambda w: np.transpose(w, (2, 3, 1, 0))), (lambda x: np.transpose(x, (0, 2, 3, 1)))
      outside = lambda x: np.transpose(x, (0, 3, 1, 2))
    else:
      continue
    layers += 1
    params, inputs, weight = official(arrays, weights), inside(arrays["input"]), inside(arrays["cotangent"])

    def loss(params, inputs, positions, layer=layer, cotangent=weight):
      outputs = layer.apply({"params": params}, inputs, positions)
      return jnp.sum(outputs * cotangent), outputs

    gradient = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))
    (_, outputs), (grads, grad_input, grad_position) = gradient(params, inputs, arrays["htensor"])
    check = functools.partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-9)
    check(outside(outputs), arrays["out"])
    check(outside(grad_input), arrays["grad_input"])
    check(grad_position, arrays["grad_htensor"])
    if "grad_scalar_weight" in arrays:
      check(np.concatenate([grads["kernel_gate"].T, grads["bias_gate"].T]), arrays["grad_scalar_weight"])
    for ours, theirs in (("kernel", "elem_weight"), ("response_kernel", "hnet_weight")):
      if f"grad_{theirs}" in arrays:
        check(grads[ours], weights(arrays[f"grad_{theirs}"]))
    for ours, theirs in (("bias", "elem_bias"), ("response_bias", "hnet_bias"), ("scale", "elem_scalar")):
      if f"grad_{theirs}" in arrays:
        check(grads[ours], arrays[f"grad_{theirs}"].reshape(grads[ours].shape))
  assert layers


def _responds(module, draw, **keywords):
  """`module(inputs, hyperparameters)`."""
  return module_row(module, lambda rng: (draw(rng), rng.normal(size=2)), examples="none", **keywords)


_EMBED = best_response.BestResponseEmbed(7, 3)


def test_lstm_cell_in_rnn():
  """`nn.RNN` takes the steps of a loop over time, with hyperparameters per example, and has gradients in them."""
  inputs, positions = RNG.normal(size=(2, 5, 3)).astype(np.float32), RNG.normal(size=(2, H)).astype(np.float32)
  mask = (RNG.uniform(size=(4, 16)) < 0.5).astype(np.float32)
  options = {"hyperparameters": positions, "recurrent_mask": mask}
  cell = best_response.BestResponseLSTMCell(4)
  params = nn.RNN(best_response.BestResponseLSTMCell(4, **options)).init(jax.random.key(0), inputs)
  inner = {"params": params["params"]["cell"]}
  carry, outputs = cell.initialize_carry(jax.random.key(0), inputs[:, 0].shape), []
  for step in range(5):
    carry, output = cell.apply(inner, carry, inputs[:, step], positions, mask)
    outputs.append(output)

  @jax.jit
  def run(positions):
    chosen = options | {"hyperparameters": positions}
    return nn.RNN(best_response.BestResponseLSTMCell(4, **chosen)).apply(params, inputs)

  np.testing.assert_allclose(run(positions), np.stack(outputs, 1), atol=1e-6)
  assert np.abs(jax.jit(jax.grad(lambda p: run(p).sum()))(positions)).max() > 0


ROWS = [
  _responds(best_response.BestResponseDense(3), draw_logits, wide=False),
  _responds(best_response.BestResponseConv(3, (3, 3)), lambda rng: rng.normal(size=(2, 4, 4, 2)), wide=False),
  row(
    best_response.BestResponseEmbed,
    lambda rng: (rng.normal(size=2), rng.integers(0, 7, EXAMPLES).astype(np.int32)),
    call=lambda hyperparameters, tokens: _EMBED.apply(waves(_EMBED, tokens, hyperparameters), tokens, hyperparameters),
    wide=True,
  ),
  row(
    best_response.materialize_best_response,
    lambda rng: (rng.normal(size=2),),
    call=lambda hyperparameters: best_response.materialize_best_response(
      waves(best_response.BestResponseDense(3), np.zeros((1, 4)), np.zeros(2))["params"], hyperparameters
    ),
    wide=True,
  ),
]
EXEMPT = {
  "BestResponseLSTMCell": "two BestResponseDense layers and gates; its tests compare it with Flax's cell",
}
