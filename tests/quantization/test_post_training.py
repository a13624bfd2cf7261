"""The way from a floating-point network to integers in a file."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxreg.quantization import IntegerConv, IntegerDense, QConv, QDense, freeze_bounds, post_training


class Network(nn.Module):
  """Convolutions with groups, dilation and circular padding, and a dense layer."""

  conv: type = QConv
  dense: type = QDense
  weight_bits: int = 4

  @nn.compact
  def __call__(self, x):
    conv = functools.partial(self.conv, weight_bits=self.weight_bits, act_bits=8)
    x = nn.relu(conv(8, 3, padding="CIRCULAR", signed=True, name="first")(x))
    x = nn.relu(conv(8, (3, 3), feature_group_count=4, kernel_dilation=2, strides=2, name="second")(x))
    return self.dense(5, weight_bits=8, act_bits=8, name="last")(x.reshape(x.shape[0], -1))


@pytest.fixture(scope="module")
def trained():
  batches = [jax.random.normal(jax.random.key(seed), (16, 9, 9, 2)) for seed in range(4)]
  return jax.jit(Network().init)(jax.random.key(9), batches[0]), batches


@pytest.mark.usefixtures("optimized")
def test_from_floating_point_to_a_file_of_integers(trained, tmp_path):
  start, batches = trained
  variables = post_training.calibrate(Network(), start, batches)
  inputs, integers = batches[0], Network(IntegerConv, IntegerDense)
  expected = jax.jit(Network().apply)(variables, inputs)
  quantized = jax.jit(integers.apply)(variables, inputs)
  np.testing.assert_allclose(quantized, expected, rtol=1e-4, atol=1e-5)
  stored = post_training.integer_variables(integers, variables, inputs)
  dtypes = {name: layer["kernel"].dtype for name, layer in stored["integer"].items()}
  assert dtypes == {"first": jnp.int4, "second": jnp.int4, "last": jnp.int8}
  assert all(leaf.ndim == 1 for leaf in jax.tree.leaves(stored["params"]))
  np.testing.assert_array_equal(jax.jit(integers.apply)(stored, inputs), quantized)
  np.savez(tmp_path / "weights.npz", **post_training.export_integers(stored))
  with np.load(tmp_path / "weights.npz") as file:
    again = post_training.import_integers(dict(file))
  np.testing.assert_array_equal(jax.jit(integers.apply)(again, inputs), quantized)


def test_one_batch_is_enough_and_all_count_the_same(trained):
  start, batches = trained
  bounds = lambda batches, **options: post_training.calibrate(Network(), start, batches, **options)["quant_stats"]
  first = lambda stats: np.asarray(stats["first"]["input_bound"]["state"].bound)
  highest, lowest = (np.stack([f(np.asarray(x), (0, 1, 2)) for x in batches]) for f in (np.max, np.min))
  expected = lambda count: np.maximum(highest[:count].mean(0), -lowest[:count].mean(0))
  for count in (1, 4):
    np.testing.assert_allclose(first(bounds(batches[:count], per_tensor=False)), expected(count), rtol=1e-5)
    np.testing.assert_allclose(first(bounds(batches[:count])), [expected(count).max()] * 2, rtol=1e-5)
  # A layer of its own, too, starts from its first batch, and from zero where the paper's code is followed.
  for from_first_batch, fraction in ((True, 1.0), (False, 0.1)):
    layer = QConv(3, (1, 1), act_bits=4, signed=True, from_first_batch=from_first_batch)
    variables = layer.init(jax.random.key(0), batches[0])
    new = layer.apply(variables, batches[0], mutable=["quant_stats"])[1]["quant_stats"]
    bound = freeze_bounds(new, per_tensor=False)["input_bound"]["state"].bound
    np.testing.assert_allclose(bound, fraction * expected(1), rtol=1e-5)


def test_bounds_that_are_not_frozen_are_said(trained):
  start, batches = trained
  with pytest.raises(ValueError, match="first/input_bound, last/input_bound, second"):
    post_training.check_bounds(start)
  with pytest.raises(ValueError, match="frozen bounds"):
    post_training.integer_variables(Network(IntegerConv, IntegerDense), start, batches[0])
  layer = QDense(2, weight_bits=4, act_bits=4)
  variables = layer.init(jax.random.key(0), jnp.ones((3, 2)))
  with pytest.warns(UserWarning, match="not quantized"):
    layer.apply(variables, jnp.ones((3, 2)))
  outputs = IntegerDense(2, weight_bits=4, act_bits=4).apply(variables, jnp.ones((3, 2)))
  assert np.isnan(outputs).all()
  with pytest.raises(ValueError, match="at least one batch"):
    post_training.calibrate(Network(), start, [])
  with pytest.raises(ValueError, match="act_bits"):
    post_training.calibrate(QDense(2), QDense(2).init(jax.random.key(0), jnp.ones((3, 2))), [jnp.ones((3, 2))])


@pytest.mark.parametrize("size", [0, 1, 6, 7])
def test_packing(size):
  values = np.random.default_rng(size).integers(-8, 8, size)
  packed = post_training.pack_int4(values)
  assert packed.dtype == np.uint8 and packed.size == (size + 1) // 2
  np.testing.assert_array_equal(post_training.unpack_int4(packed, shape=(size,)), values)
  with pytest.raises(ValueError, match="-8 to 7"):
    post_training.pack_int4(np.array([8]))
  with pytest.raises(ValueError, match="shape must fit"):
    post_training.unpack_int4(packed, shape=(size + 2,))


EXEMPT = {
  "calibrate": "runs a network over batches, outside of jit by contract",
  "check_bounds": "reads concrete bounds",
  "export_integers": "NumPy arrays for a file",
  "import_integers": "NumPy arrays from a file",
  "integer_variables": "runs a network once and drops kernels",
  "pack_int4": "NumPy bytes",
  "unpack_int4": "NumPy bytes",
}
