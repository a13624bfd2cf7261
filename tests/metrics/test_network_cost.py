"""Compute cost and model size."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxreg.metrics import network_cost as cost
from jaxreg.models import ResNet
from jaxreg.models.quantized_resnet import quant_resnet
from jaxreg.quantization import ElasticDense, IntegerDense
from jaxreg.quantization.layers import PRECISIONS, Precision, QConv, QDense

UNIFORM = {bits: Precision(*bits, *bits) for bits in ((8, 8), (4, 4), (2, 4), (8, 16), (4, 8), (4, 2))}


def resnet_table(blocks, multiplier=1.0, image=224, classes=1000):
  model = ResNet(
    stages=tuple(blocks),
    classes=classes,
    width=int(64 * multiplier),
    bottleneck=True,
    large_images=True,
    stem_width=64,
  )
  return cost.layer_table(model, jax.ShapeDtypeStruct((1, image, image, 3), jnp.float32), train=False)


@pytest.fixture(scope="module")
def resnet50():
  return resnet_table((3, 4, 6, 3))


def test_resnet50_by_the_card(resnet50):
  table = resnet50
  full = cost.quant_cost(table)
  assert full[:3] == (1_046_831_169_536, 4_089_184_256 * 16, 408_046_592) and full[3:] == (1, 1, 1)
  assert sum(row.weights for row in table) == 25_502_912
  quadratic = lambda bits: cost.quant_cost(cost.assign_bits(table, UNIFORM[bits])).quadratic_ratio
  assert [quadratic(bits) for bits in ((8, 8), (4, 4), (4, 2), (8, 16))] == [0.25, 0.0625, 0.03125, 0.5]
  mixed = cost.quant_cost(cost.assign_bits(table, PRECISIONS["W4A4, ends W8A8"]))
  np.testing.assert_allclose([mixed.quadratic_ratio, mixed.linear_ratio], [0.0680051606, 0.257340214], rtol=1e-8)


def test_linear_cost_has_tiers(resnet50):
  linear = lambda bits: cost.quant_cost(cost.assign_bits(resnet50, UNIFORM[bits])).linear_ratio
  assert [linear(bits) for bits in ((2, 4), (4, 4), (4, 8), (8, 8), (8, 16))] == [0.25, 0.25, 0.5, 0.5, 1]


def test_attention_transposed_convolutions_and_other_layers_are_counted():
  class Network(nn.Module):
    @nn.compact
    def __call__(self, tokens):
      tokens = nn.MultiHeadDotProductAttention(num_heads=2, qkv_features=8, name="self")(tokens)
      tokens = ElasticDense(6, name="elastic")(tokens)
      tokens = IntegerDense(4, weight_bits=4, act_bits=8, name="integer")(tokens)
      images = nn.ConvTranspose(3, (2, 2), strides=(2, 2), name="up")(tokens.reshape(-1, 5, 2, 4))
      return nn.DenseGeneral((2, 3), axis=(-2, -1), name="general")(QConv(4, 3, name="integer_size")(images))

  table = cost.layer_table(Network(), jax.ShapeDtypeStruct((2, 10, 6), jnp.float32))
  counted = {row.name: (row.multiplications, row.weights) for row in table}
  assert counted == {
    **{f"self/{name}": (10 * 48, 48) for name in ("query", "key", "value", "out")},
    "self/attention": (2 * 10 * 10 * 8, 0),
    "elastic": (10 * 36, 36),
    "integer": (10 * 24, 24),
    "up": (10 * 2 * 2 * 4 * 3, 48),
    "integer_size": (10 * 4 * 9 * 3 * 4, 108),
    "general": (10 * 4 * 4 * 6, 96),
  }
  assert table[-3].name == "up" and dict((row.name, row) for row in table)["integer"].weight_bits == 4


def test_hand_counted_layers():
  class Network(nn.Module):
    @nn.compact
    def __call__(self, images):
      hidden = QConv(8, (3, 3), strides=(2, 2), weight_bits=8, act_bits=8, name="first")(images)
      hidden = nn.Conv(6, (1, 5), feature_group_count=2, padding="VALID", name="grouped")(hidden)
      hidden = nn.BatchNorm(use_running_average=True)(hidden)
      return QDense(4, weight_bits=2, name="last")(hidden.reshape(hidden.shape[0], -1))

  table = cost.layer_table(Network(), jax.ShapeDtypeStruct((2, 10, 12, 3), jnp.float32))
  assert table == [
    ("first", 5 * 6 * 9 * 3 * 8, 9 * 3 * 8, 8, 8),
    ("grouped", 5 * 2 * 5 * 4 * 6, 5 * 4 * 6, 16, 16),
    ("last", 5 * 2 * 6 * 4, 5 * 2 * 6 * 4, 16, 2),
  ]
  assert cost.quant_cost(table)[:3] == (
    6480 * 64 + 1200 * 256 + 240 * 32,
    6480 * 8 + 1200 * 16 + 240 * 16,
    216 * 8 + 120 * 16 + 240 * 2,
  )
  with pytest.raises(ValueError, match="at least one layer"):
    cost.quant_cost([])


def test_bits_of_a_quantized_network_are_read_from_its_layers():
  images = jax.ShapeDtypeStruct((1, 8, 8, 1), jnp.float32)
  precision = PRECISIONS["W4A4, ends W8A8"]
  own = cost.layer_table(quant_resnet((1, 1), precision, classes=3, width=4), images, train=False)
  plain = cost.layer_table(ResNet((1, 1), classes=3, width=4), images, train=False)
  assert own == cost.assign_bits(plain, precision)
  assert [row.name for row in own][::6] == ["stem", "head"]


@pytest.mark.golden
@pytest.mark.usefixtures("x64")
def test_golden_31_quantized_resnet_costs(golden):
  file, seen = golden("31-quantized_resnet"), 0
  for case, arrays, _ in file.cases():
    if "out_costs" not in arrays:
      continue
    meta = file.meta[case]
    table = resnet_table(meta["blocks"], meta["filter_multiplier"], meta["image"], meta["classes"])
    for values in arrays["out_costs"]:
      row = dict(zip(meta["columns"], values))
      bits = lambda place: dict(input_bits=int(row[f"{place}_lhs"]), weight_bits=int(row[f"{place}_rhs"]))
      places = ["first", *["mid"] * (len(table) - 2), "last"]
      got = cost.quant_cost([layer._replace(**bits(place)) for layer, place in zip(table, places)])
      for name, ours in (("compute_quadratic", "quadratic"), ("compute_linear", "linear"), ("memory_bits", "memory")):
        assert getattr(got, ours) == row[name]
        np.testing.assert_allclose(getattr(got, f"{ours}_ratio"), row[f"ratio_{ours}"], rtol=1e-12)
      seen += 1
  assert seen


EXEMPT = {
  "LayerCost": "Python integers",
  "NetworkCost": "Python numbers",
  "assign_bits": "of Python integers",
  "layer_table": "of a module's shapes",
  "quant_cost": "of Python integers",
}
