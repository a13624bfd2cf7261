"""The learned quantizer, its calibration, elastic layers and their configurations."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxreg.models.resnet import ResNet
from jaxreg.quantization import elastic
from jaxreg.quantization.elastic import ELASTIC_BITS, ElasticConv, ElasticDense, lsq_calibrate, lsq_quantize


@jax.jit
def pulled(values, scale, offset, cotangent, bits, signed, factor):
  """The quantized values and the gradients in values, scale and offset."""
  call = lambda x, s, o: lsq_quantize(x, s, o, bits=bits, signed=signed, gradient_factor=factor)
  out, pull = jax.vjp(call, values, scale, offset)
  return out, pull(cotangent)


@functools.partial(jax.jit, static_argnames=("symmetric", "per_channel", "candidates"))
def calibrated(values, signed, symmetric, per_channel=False, candidates=80):
  return lsq_calibrate(
    values, symmetric=symmetric, per_channel=per_channel, signed=signed, candidates=candidates
  )  # fmt: skip


def largest_integer(bits, signed):
  return 2 ** (bits - 1) - 1 if signed else 2**bits - 1


@pytest.mark.golden
def test_golden_11_eq_net_quantizers(golden, x64):
  file = golden("11-eq_net")
  for _, arrays, _ in file.cases():
    if "w" in arrays:
      check_golden_weights(arrays, file.meta["bits"])
    kinds = {name.removeprefix("x_") for name in arrays if name.startswith("x_")}
    for kind in kinds:
      check_golden_activations(arrays, kind, file.meta["bits"])


def check_golden_weights(arrays, bits):
  weights = arrays["w"]  # outputs first
  for granularity in ("layer", "channel"):
    for form in ("sym", "asym"):
      name = f"{form}_{granularity}"
      candidates = 5 if (form, granularity) == ("sym", "channel") else 80
      found = calibrated(jnp.moveaxis(weights, 0, -1), True, form == "sym", granularity == "channel", candidates)
      check_table(found, arrays, name)
      factor = lambda p: 1 / np.sqrt(p * weights.size)
      if granularity == "channel":
        factor = lambda p: 2 / np.sqrt(p * weights.size / weights.shape[1])
      for index, b in enumerate(bits):
        suffix = f"bits{index}_{granularity}_{form}"
        axes = (-1,) + (1,) * (weights.ndim - 1)
        check_golden_quantizer(arrays, "w", "cotangent", name, suffix, b, True, factor, lambda s: s.reshape(axes))


def check_golden_activations(arrays, kind, bits):
  values = arrays[f"x_{kind}"]
  signed = bool((values < -1e-9).any())
  for form in ("sym", "asym"):
    check_table(calibrated(values, signed, form == "sym"), arrays, f"{form}_{kind}")
    factor = lambda p: 1 / np.sqrt(p * values.size)
    for index, b in enumerate(bits):
      suffix = f"{kind}_bits{index}_{form}"
      reshape = lambda s: s.reshape((1,) * values.ndim)
      check_golden_quantizer(arrays, "x", f"cotangent_{kind}", f"{form}_{kind}", suffix, b, signed, factor, reshape)


def check_table(found, arrays, name):
  np.testing.assert_allclose(found.scale, arrays[f"init_scale_{name}"], rtol=1e-8)
  np.testing.assert_allclose(found.offset, arrays[f"init_beta_{name}"], rtol=1e-8)


def check_golden_quantizer(arrays, letter, cotangent, table, suffix, bits, signed, factor, reshape):
  column = bits - ELASTIC_BITS[0]
  scale = arrays[f"init_scale_{table}"][:, column]
  used = arrays.get(f"used_beta_{table}", arrays[f"init_beta_{table}"])[:, column]
  values = arrays["w"] if letter == "w" else arrays["x_" + cotangent.removeprefix("cotangent_")]
  out, (grad_values, grad_scale, grad_offset) = pulled(
    values, reshape(scale), reshape(used), arrays[cotangent], bits, signed, factor(largest_integer(bits, signed))
  )
  np.testing.assert_allclose(out, arrays[f"out_{letter}q_{suffix}"], rtol=1e-8, atol=1e-12)
  np.testing.assert_allclose(grad_values, arrays[f"grad_{letter}_{suffix}"], rtol=1e-8, atol=1e-12)
  np.testing.assert_allclose(np.ravel(grad_scale), arrays[f"grad_scale_{suffix}"], rtol=1e-8, atol=1e-12)
  if f"grad_beta_{suffix}" in arrays:
    np.testing.assert_allclose(np.ravel(grad_offset), arrays[f"grad_beta_{suffix}"], rtol=1e-8, atol=1e-12)


@given(st.integers(0, 2**32 - 1), st.integers(2, 8), st.booleans(), st.booleans())
@settings(max_examples=30, deadline=None)
def test_grid_gradients_and_zero_point(seed, bits, signed, wide):
  rng = np.random.default_rng(seed)
  values, cotangent = rng.normal(size=40), rng.normal(size=40)
  scale = (9.0 if wide else 0.5) * rng.uniform(0.5, 1) / 2 ** (bits - 1)
  step = scale + 1e-6
  zero_point = rng.integers(-3, 4)
  offset = -step * zero_point if signed else min(values.min(), -9.0 if wide else 0.0) - step / 3
  with jax.enable_x64(True):
    out, gradients = pulled(values, jnp.float64(scale), jnp.float64(offset), cotangent, bits, signed, jnp.float64(0.7))
    out, (grad_values, grad_scale, grad_offset) = np.asarray(out), jax.tree.map(np.asarray, gradients)
  low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
  ratio = (values - offset) / step
  integers = np.round(np.clip(ratio, low, high))
  found = (out - offset) / step
  np.testing.assert_allclose(found, np.round(found), atol=1e-9)
  assert low <= np.round(found).min() and np.round(found).max() <= high and len(np.unique(integers)) <= 2**bits
  inside = (low <= ratio) & (ratio <= high)
  np.testing.assert_allclose(out, integers * step + offset, rtol=1e-9, atol=1e-12)
  np.testing.assert_allclose(grad_values, cotangent * inside, rtol=1e-9, atol=1e-12)
  on_scale = np.where(inside, integers - ratio, integers)
  np.testing.assert_allclose(grad_scale, 0.7 * np.sum(cotangent * on_scale), rtol=1e-9, atol=1e-9)
  np.testing.assert_allclose(grad_offset, 0.7 * np.sum(cotangent * ~inside), rtol=1e-9, atol=1e-12)
  if inside.all():
    assert grad_offset == 0
  if signed:  # the form with an integer zero point
    shifted = step * (np.clip(np.round(values / step) + zero_point, low, high) - zero_point)
    tied = np.abs(np.abs(values / step) % 1 - 0.5) < 1e-6
    np.testing.assert_allclose(np.where(tied, out, shifted), out, atol=1e-9)


def test_ends_of_the_grid_have_the_whole_gradient():
  """As the zeros of a ReLU, on which `jnp.clip` would halve it."""
  values = jnp.array([0.0, 3.0, -1.0, 4.0])
  gradient = jax.grad(lambda x: lsq_quantize(x, jnp.array(1.0 - 1e-6), bits=2, signed=False).sum())(values)
  np.testing.assert_array_equal(gradient, [1, 1, 0, 0])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_finite_at_extremes(dtype):
  values = jnp.array([1e4, -1e4, 0.0, 1e-4], dtype)
  for scale in (0.0, 1e-4, 1e4):
    out, gradients = pulled(values, jnp.float32(scale), jnp.float32(0), jnp.ones_like(values), 8, True, 1.0)
    assert out.dtype == dtype and all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves((out, gradients)))


def test_more_bits_and_more_channels_are_more_accurate():
  weights = np.random.default_rng(0).normal(size=(6, 5, 4)).astype(np.float32) * np.array([0.1, 1, 2, 5], np.float32)
  errors = {}
  for per_channel in (False, True):
    table = calibrated(weights, True, False, per_channel)
    for bits in (2, 4, 8):
      out, _ = pulled(weights, *(leaf[:, bits - 2] for leaf in table), np.zeros_like(weights), bits, True, 1.0)
      errors[per_channel, bits] = np.mean(np.abs(out - weights) ** 2.4)
  for bits in (2, 4, 8):
    assert errors[True, bits] <= errors[False, bits]
  for per_channel in (False, True):
    assert errors[per_channel, 8] <= errors[per_channel, 4] <= errors[per_channel, 2]


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

  return jax.jit(start)(jax.random.key(0)), elastic.elastic_layers(MODEL, INPUTS)


@functools.cache
def run_program(layers):
  """Outputs and the gradient of a network's parameters, for any configuration."""

  def run(variables, config):
    held = {"calibration": variables["calibration"], "elastic": elastic.config_variables(config, layers)}

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
  exact = run(variables, elastic.uniform_config(4, bits=0, end_bits=0))[1]
  errors = []
  for bits in ELASTIC_BITS:
    for per_channel, symmetric in ((False, True), (True, False)):
      config = elastic.uniform_config(
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
  config = elastic.uniform_config(4, bits=3, per_channel=True, weight_symmetric=False)
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


def test_sampled_configurations():
  keys = jax.random.split(jax.random.key(0), 500)
  configs = jax.jit(jax.vmap(functools.partial(elastic.sample_config, layers=5, candidates=(2, 4, 8))))(keys)
  for bits in (configs.weight_bits, configs.act_bits):
    assert (bits[:, [0, -1]] == 8).all()
    assert set(np.unique(bits[:, 1:-1])) == {2, 4, 8}
    np.testing.assert_allclose(np.mean(bits[:, 1:-1] == 4, axis=0), 1 / 3, atol=0.12)
  forms = np.stack([configs.per_channel, configs.weight_symmetric, configs.act_symmetric])
  np.testing.assert_allclose(forms.mean(1), 0.5, atol=0.12)
  assert np.abs(np.corrcoef(forms.transpose(0, 2, 1).reshape(15, -1)) - np.eye(15)).max() < 0.25


def test_plugs_into_the_residual_network():
  model = ResNet(stages=(1,), classes=3, width=2, conv=ElasticConv, dense=ElasticDense)
  images = np.random.default_rng(0).normal(size=(2, 4, 4, 1)).astype(np.float32)
  layers = elastic.elastic_layers(model, images, train=False)
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
    config = elastic.config_variables(config, layers)
    return model.apply({**variables, "elastic": config}, images, train=False), expected

  exact, expected = outputs(jax.random.key(0), elastic.uniform_config(4, bits=0, end_bits=0))
  np.testing.assert_allclose(exact, expected, rtol=1e-5, atol=1e-6)
  near, _ = outputs(jax.random.key(0), elastic.uniform_config(4, bits=8))
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
    elastic.uniform_config(4, bits=9)
  with pytest.raises(ValueError, match="candidates must lie in"):
    elastic.sample_config(jax.random.key(0), 4, candidates=(1, 2))
  with pytest.raises(ValueError, match="config must have arrays"):
    elastic.config_variables(elastic.uniform_config(4, bits=2), elastic.elastic_layers(ElasticDense(2), values))
  with pytest.raises(ValueError, match="model must have elastic layers"):
    elastic.calibrate_elastic(nn.Dense(2), {"params": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}}, values)
