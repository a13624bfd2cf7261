"""Elastic layers: their quantizers, one program for all configurations, batch statistics."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from jaxreg.models.resnet import ResNet
from jaxreg.quantization import elastic, elastic_config
from jaxreg.quantization.elastic import ElasticConv, ElasticDense
from jaxreg.quantization.elastic_quantizer import ELASTIC_BITS, lsq_calibrate, lsq_quantize
from tests.quantization.test_elastic_quantizer import pulled


class Network(nn.Module):
  @nn.compact
  def __call__(self, inputs):
    hidden = nn.relu(ElasticDense(6, name="z_first")(inputs))
    hidden = nn.relu(ElasticDense(5, name="middle")(hidden))
    hidden = nn.relu(ElasticDense(4, name="b_third")(hidden))
    return ElasticDense(3, name="a_last")(hidden)


INPUTS = np.random.default_rng(0).normal(size=(7, 4)).astype(np.float32)
MODEL = Network()


@pytest.fixture(scope="module")
def network():
  """Calibrated variables and the layers."""

  def start(key):
    return elastic.calibrate_elastic(MODEL, MODEL.init(key, INPUTS), INPUTS)

  return jax.jit(start)(jax.random.key(0)), elastic_config.elastic_layers(MODEL, INPUTS)


@functools.cache
def run_program(layers):
  """Outputs and the gradient of a network's parameters, for any configuration."""

  def run(variables, config):
    held = {"calibration": variables["calibration"], "elastic": elastic_config.config_variables(config, layers)}

    def objective(params):
      outputs = MODEL.apply({"params": params, **held}, INPUTS)
      return jnp.sum(jnp.sin(outputs)), outputs

    return jax.grad(objective, has_aux=True)(variables["params"])

  return jax.jit(run)


def test_layers_are_found_in_the_order_of_their_calls(network):
  _, layers = network
  assert [layer.path for layer in layers] == [("z_first",), ("middle",), ("b_third",), ("a_last",)]
  assert [layer.weights for layer in layers] == [24, 30, 20, 12]
  assert [layer.inputs for layer in layers] == [4, 6, 5, 4]


def test_signs_are_those_of_the_inputs(network):
  signs = network[0]["calibration"]
  assert {name: bool(signs[name]["input_quantizer"]["signed"]) for name in signs} == {
    "z_first": True, "middle": False, "b_third": False, "a_last": False
  }  # fmt: skip


def test_one_program_serves_all_configurations(network):
  variables, layers = network
  run = run_program(tuple(layers))
  exact = run(variables, elastic_config.uniform_config(4, bits=0, end_bits=0))[1]
  errors = []
  for bits in ELASTIC_BITS:
    for per_channel, symmetric in ((False, True), (True, False)):
      config = elastic_config.uniform_config(
        4, bits=bits, per_channel=per_channel, weight_symmetric=symmetric, act_symmetric=symmetric
      )
      gradient, outputs = run(variables, config)
      errors.append(float(jnp.abs(outputs - exact).max()))
      check_touched(gradient, bits, per_channel, symmetric)
  assert run._cache_size() == 1
  assert errors[-1] < errors[0] and max(errors[-2:]) < 0.05


def check_touched(gradient, bits, per_channel, symmetric):
  """Only the column of the bits, of the tables in use, has a gradient."""
  inner = {path: leaf for path, leaf in flatten_dict(gradient).items() if path[0] in ("middle", "b_third")}
  used = "symmetric" if symmetric else "asymmetric"
  for (_, quantizer, *name), table in inner.items():
    if quantizer in ("kernel", "bias"):
      continue
    channel, own = per_channel and quantizer == "weight_quantizer", name[0].removeprefix("channel_")
    if own.rsplit("_", 1)[0] == used and name[0].startswith("channel_") == channel:
      assert (np.delete(table, bits - 2, axis=1) == 0).all()
      assert "offset" in own or (table[:, bits - 2] != 0).any()
    else:
      assert (table == 0).all()


def test_layer_agrees_with_the_quantizers(network):
  variables, layers = network
  config = elastic_config.uniform_config(4, bits=3, per_channel=True, weight_symmetric=False)
  _, outputs = run_program(tuple(layers))(variables, config)
  hidden = INPUTS
  for index, (name,) in enumerate(layer.path for layer in layers):
    own = jax.tree.map(np.asarray, variables["params"][name])
    column = 1 if 0 < index < 3 else 6
    bits = int(column + 2)
    weights, inputs = own["weight_quantizer"], own["input_quantizer"]
    kernel, _ = pulled(
      own["kernel"], weights["channel_asymmetric_scale"][:, column], weights["channel_asymmetric_offset"][:, column],
      np.zeros_like(own["kernel"]), bits, True, 1.0,
    )  # fmt: skip
    signed = bool(variables["calibration"][name]["input_quantizer"]["signed"])
    scale = inputs["symmetric_scale"][:, column]
    hidden, _ = pulled(hidden, scale, np.zeros_like(scale), np.zeros_like(hidden), bits, signed, 1.0)
    hidden = np.asarray(hidden) @ np.asarray(kernel) + own["bias"]
    hidden = np.maximum(hidden, 0) if index < 3 else hidden
  np.testing.assert_allclose(outputs, hidden, rtol=1e-4, atol=1e-5)


def test_plugs_into_the_residual_network():
  model = ResNet(stages=(1,), classes=3, width=2, conv=ElasticConv, dense=ElasticDense)
  images = np.random.default_rng(0).normal(size=(2, 4, 4, 1)).astype(np.float32)
  layers = elastic_config.elastic_layers(model, images, train=False)
  assert [layer.path[0] for layer in layers] == ["stem", "stage0_block0_conv0", "stage0_block0_conv1", "head"]

  @jax.jit
  def outputs(key, config):
    variables = elastic.calibrate_elastic(model, model.init(key, images, train=False), images, train=False)
    plain = ResNet(stages=(1,), classes=3, width=2)
    kept = jax.tree_util.tree_map_with_path(
      lambda path, _: functools.reduce(lambda tree, key: tree[key.key], path, variables["params"]),
      jax.eval_shape(functools.partial(plain.init, train=False), key, images)["params"],
    )
    expected = plain.apply({"params": kept, "batch_stats": variables["batch_stats"]}, images, train=False)
    config = elastic_config.config_variables(config, layers)
    return model.apply({**variables, "elastic": config}, images, train=False), expected

  exact, expected = outputs(jax.random.key(0), elastic_config.uniform_config(4, bits=0, end_bits=0))
  np.testing.assert_allclose(exact, expected, rtol=1e-5, atol=1e-6)
  near, _ = outputs(jax.random.key(0), elastic_config.uniform_config(4, bits=8))
  np.testing.assert_allclose(near, expected, atol=0.05 * np.abs(expected).max())


class Normalized(nn.Module):
  @nn.compact
  def __call__(self, inputs, *, train):
    hidden = ElasticDense(2, use_bias=False, name="layer")(inputs)
    return nn.BatchNorm(use_running_average=not train, momentum=0.9)(hidden)


def test_batch_statistics_are_those_of_the_configuration():
  model, batches = Normalized(), np.random.default_rng(0).normal(size=(3, 5, 4)).astype(np.float32)

  @jax.jit
  def run(key):
    variables = model.init(key, batches[0], train=False)
    plain = jax.tree.map(jnp.asarray, elastic.ElasticConfig(0, 0, False, True, True))
    new = elastic.recalibrate_batch_norm(model, {**variables, "elastic": {"layer": {"config": plain}}}, batches)
    return variables, new

  variables, new = run(jax.random.key(0))
  means = (batches @ np.asarray(variables["params"]["layer"]["kernel"])).mean(1)
  expected = 0.1 * (0.81 * means[0] + 0.9 * means[1] + means[2])
  np.testing.assert_allclose(new["batch_stats"]["BatchNorm_0"]["mean"], expected, rtol=1e-4, atol=1e-6)
  jax.tree.map(np.testing.assert_array_equal, new["params"], variables["params"])


def test_bad_input():
  values = jnp.ones((3, 2))
  with pytest.raises(ValueError, match="bits must be an integer"):
    lsq_quantize(values, jnp.array(1.0), bits=2.0)
  with pytest.raises(ValueError, match="bits must lie in"):
    lsq_quantize(values, jnp.array(1.0), bits=0)
  with pytest.raises(ValueError, match="scale must broadcast"):
    lsq_quantize(values, jnp.ones(3), bits=2)
  with pytest.raises(ValueError, match="values must be floating"):
    lsq_quantize(jnp.ones(3, int), jnp.array(1.0), bits=2)
  with pytest.raises(ValueError, match="candidates must lie in"):
    lsq_calibrate(values, symmetric=True, candidates=0)
  with pytest.raises(ValueError, match="values must not be empty"):
    lsq_calibrate(values[:0], symmetric=True)
  with pytest.raises(ValueError, match="bits must be 0 or in"):
    elastic_config.uniform_config(4, bits=9)
  with pytest.raises(ValueError, match="candidates must lie in"):
    elastic_config.sample_config(jax.random.key(0), 4, candidates=(1, 2))
  with pytest.raises(ValueError, match="config must have arrays"):
    elastic_config.config_variables(
      elastic_config.uniform_config(4, bits=2), elastic_config.elastic_layers(ElasticDense(2), values)
    )
  with pytest.raises(ValueError, match="model must have elastic layers"):
    elastic.calibrate_elastic(nn.Dense(2), {"params": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}}, values)


EXEMPT = {
  "ElasticConfig": "what the layers are told",
  "ElasticConv": "a module around lsq_quantize",
  "ElasticDense": "a module around lsq_quantize",
  "calibrate_elastic": "of a module",
  "recalibrate_batch_norm": "of a module",
}
