"""Quantized layers and residual networks."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxreg.models import ResNet
from jaxreg.models.quantized_resnet import quant_resnet
from jaxreg.quantization import bounds
from jaxreg.quantization.fake_quant import fake_quant_activation, fake_quant_weight
from jaxreg.quantization.layers import PRECISIONS, Precision, QConv, QDense
from tests.conformance import EXAMPLES, draw_logits, module_row

IMAGES = np.random.default_rng(0).normal(size=(4, 4, 4, 1)).astype(np.float32)
MIXED = Precision(4, 4, 8, 8)


def resnet(precision, **options):
  return quant_resnet((1,), precision, classes=3, width=2, **options)


@functools.cache
def variables():
  """Of a quantized network at its start, and with bounds after one batch in training."""

  @jax.jit
  def run():
    start = resnet(MIXED).init(jax.random.key(0), IMAGES, train=False)
    _, new = resnet(MIXED).apply(start, IMAGES, train=True, mutable=["batch_stats", "quant_stats"])
    frozen = {**start, "quant_stats": bounds.freeze_bounds(new["quant_stats"])}
    _, later = resnet(MIXED).apply(frozen, IMAGES, train=True, mutable=["batch_stats", "quant_stats"])
    outputs = [resnet(p).apply(frozen, IMAGES, train=False) for p in (MIXED, PRECISIONS["bfloat16"])]
    return start, frozen, later, outputs

  return run()


@pytest.mark.parametrize(
  ("kind", "extra"),
  [
    ("conv", {}),
    ("conv", dict(padding="CIRCULAR", kernel_dilation=(1, 2))),
    ("conv", dict(feature_group_count=3, kernel_dilation=2)),
    ("dense", {}),
  ],
)
def test_layers_are_flax_layers_on_rounded_operands(kind, extra):
  x = np.random.default_rng(1).uniform(-0.3, 1, (2, 5, 6, 3)).astype(np.float32)
  if kind == "conv":
    options = dict(features=6, kernel_size=(3, 2), strides=(2, 1), **extra)
    plain, own = nn.Conv(**options), functools.partial(QConv, **options)
  else:
    plain, own = nn.Dense(4), functools.partial(QDense, 4)
  bits = own(weight_bits=4, act_bits=3)
  state = bits.init(jax.random.key(0), x)
  state["params"]["bias"] += 0.3
  stats = bounds.freeze_bounds(bits.apply(state, x, mutable=["quant_stats"])[1]["quant_stats"], per_tensor=False)
  state["quant_stats"] = stats

  @jax.jit
  def run(params):
    grid = fake_quant_activation(x, bits=3, bound=stats["input_bound"]["state"].bound, signed=False)
    rounded = {**params, "kernel": fake_quant_weight(params["kernel"], bits=4)}
    short = lambda a: jax.lax.reduce_precision(a, 8, 7)
    brief = {**params, "kernel": short(params["kernel"])}
    return (
      (own().apply({"params": params}, x), plain.apply({"params": params}, x)),
      (bits.apply(state, x), plain.apply({"params": rounded}, grid)),
      (own(weight_bits=16, act_bits=16).apply({"params": params}, x), plain.apply({"params": brief}, short(x))),
    )

  for ours, theirs in run(state["params"]):
    np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-6)


def test_parameters_are_those_of_the_float_network():
  plain = jax.eval_shape(lambda: ResNet((1,), classes=3, width=2).init(jax.random.key(0), IMAGES, train=False))
  shapes = lambda tree: jax.tree.map(jnp.shape, tree)
  start = variables()[0]
  assert shapes(start["params"]) == shapes(plain["params"])
  assert shapes(start["batch_stats"]) == shapes(plain["batch_stats"])
  assert len(start["quant_stats"]) == 4  # stem, two convolutions, head


class Layers(nn.Module):
  """Two convolutions and a dense layer; `bits` of activations may be None."""

  bits: int | None

  @nn.compact
  def __call__(self, x):
    x = nn.relu(QConv(3, (3, 3), weight_bits=8, act_bits=self.bits, signed=True)(x))
    x = nn.relu(QConv(3, (3, 3), weight_bits=4, act_bits=self.bits)(x))
    return QDense(3, weight_bits=4, act_bits=self.bits)(x.reshape(4, -1))


def test_a_step_before_the_start_is_one_with_quantized_weights_only_bit_for_bit():
  labels = np.array([0, 1, 2, 0])
  start = jax.jit(Layers(4).init)(jax.random.key(0), IMAGES)

  @functools.partial(jax.jit, static_argnums=1)
  def step(state, bits):
    def loss(params):
      logits, new = Layers(bits).apply({**state, "params": params}, IMAGES, mutable=["quant_stats"])
      return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), new

    gradient, new = jax.grad(loss, has_aux=True)(state["params"])
    return jax.tree.map(lambda p, g: p - 0.1 * g, state["params"], gradient), new

  with jax.disable_jit():  # compiled, two programs may round their sums differently
    (quantized, new), (weights_only, _) = step(start, 4), step({"params": start["params"]}, None)
  jax.tree.map(np.testing.assert_array_equal, quantized, weights_only)
  calibrated, _ = step({**start, "quant_stats": bounds.freeze_bounds(new["quant_stats"])}, 4)
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(calibrated))
  assert (np.asarray(calibrated["QDense_0"]["kernel"]) != weights_only["QDense_0"]["kernel"]).any()


def test_traced_bits_are_static_bits():
  _, state, _, expected = variables()
  traced = jax.jit(lambda precision: resnet(precision).apply(state, IMAGES, train=False))
  for precision, outputs in zip((MIXED, PRECISIONS["bfloat16"]), expected):
    np.testing.assert_allclose(traced(Precision(*map(np.int32, precision))), outputs, rtol=1e-5, atol=1e-6)


def test_statistics_move_in_training_only_and_bounds_stay():
  start, frozen, later, _ = variables()
  inputs = lambda tree, name: jax.tree.map(np.asarray, tree["quant_stats"][name]["input_bound"]["state"])
  stem = functools.partial(inputs, name="stem")
  np.testing.assert_allclose(stem(frozen).maximum, IMAGES.max((0, 1, 2)), rtol=1e-6)
  np.testing.assert_allclose(stem(frozen).bound, [max(IMAGES.max(), -IMAGES.min())], rtol=1e-6)
  moved = [(inputs(frozen, name), inputs(later, name)) for name in frozen["quant_stats"] if name == "head"]
  assert stem(later).bound == stem(frozen).bound
  assert any((old.maximum != new.maximum).any() and (old.bound == new.bound).all() for old, new in moved)
  assert stem(start).bound == -1


def test_bad_input():
  with pytest.raises(ValueError, match="depth must be one of"):
    quant_resnet(20, PRECISIONS["W4A4"], classes=3)
  with pytest.raises(ValueError, match="weight_bits must lie in"):
    jax.eval_shape(lambda: QDense(2, weight_bits=17).init(jax.random.key(0), jnp.ones((1, 2))))
  with pytest.raises(ValueError, match="act_bits must lie in"):
    jax.eval_shape(lambda: QDense(2, act_bits=0).init(jax.random.key(0), jnp.ones((1, 2))))


ROWS = [
  module_row(QDense(3, weight_bits=4, act_bits=4), lambda rng: (draw_logits(rng),), differentiable=False),
  module_row(
    QConv(3, (3, 3), weight_bits=4, act_bits=4),
    lambda rng: (rng.normal(size=(EXAMPLES, 4, 4, 2)),),
    differentiable=False,
  ),
]


EXEMPT = {
  "ActivationBound": "keeps the state of activation_bound_update, in QDense and QConv",
  "PRECISIONS": "numbers",
  "Precision": "numbers",
}
