"""Penalties, transformations and layers in Flax NNX, Equinox and Linen: the same numbers from the same weights."""

import functools

import chex
import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import PartitionSpec

from jaxreg import layers, pruning, quantization
from jaxreg.layers.weight_compander import compander_init, fold_params
from jaxreg.losses import z_loss_from_statistics
from jaxreg.metrics import flax_kernel, is_kernel, parameter_name, weight_stats
from jaxreg.pruning import compact_variables
from jaxreg.regularizers import freeze_support, group_ids, group_norms, orthogonal_penalty
from jaxreg.transforms import compand_weights, half_space_projection, orthogonalize_gradients, penalize, proximal

KERNELS = {"first": (3, 3, 4, 6), "second": (5, 7)}  # a convolution and a dense layer


def linen():
  rng = np.random.default_rng(0)
  layer = lambda shape: {
    "kernel": jnp.asarray(rng.normal(size=shape) / 3, jnp.float32),
    "bias": jnp.asarray(rng.normal(size=shape[-1]), jnp.float32),
  }
  return {name: layer(shape) for name, shape in KERNELS.items()}


def nnx_state():
  """The same weights as the state of an NNX model."""

  class Model(nnx.Module):
    def __init__(self):
      rngs = nnx.Rngs(0)
      self.first, self.second = nnx.Conv(4, 6, (3, 3), rngs=rngs), nnx.Linear(5, 7, rngs=rngs)

  state = nnx.state(Model(), nnx.Param)
  nnx.replace_by_pure_dict(state, linen())
  return state


class EquinoxModel(eqx.Module):
  first: eqx.nn.Conv2d
  second: eqx.nn.Linear

  def __init__(self):
    key = jax.random.key(0)
    self.first, self.second = eqx.nn.Conv2d(4, 6, 3, key=key), eqx.nn.Linear(5, 7, key=key)


def equinox_arrays():
  """The same weights as the arrays of an Equinox model, outputs first."""
  params = linen()
  arrays = eqx.filter(EquinoxModel(), eqx.is_array)
  where = lambda m: [m.first.weight, m.first.bias, m.second.weight, m.second.bias]
  first, second = params["first"], params["second"]
  values = [jnp.transpose(first["kernel"], (3, 2, 0, 1)), first["bias"][:, None, None], second["kernel"].T]
  return eqx.tree_at(where, arrays, [*values, second["bias"]])


TREES = {"linen": linen, "nnx": nnx_state, "equinox": equinox_arrays}
every_tree = pytest.mark.parametrize("make", TREES.values(), ids=TREES)


def named_kernels(tree):
  """Kernels in Flax's layout by the first part of their names."""
  named = [(parameter_name(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)]
  return {name.split("/")[0]: flax_kernel(name, leaf) for name, leaf in named if is_kernel(name, leaf)}


def assert_same_kernels(tree, expected):
  actual, expected = named_kernels(tree), named_kernels(expected)
  assert set(actual) == set(expected) == set(KERNELS)
  for name in KERNELS:
    np.testing.assert_allclose(actual[name], expected[name], rtol=2e-6, atol=1e-6)


def kernel_paths(tree):
  names = [(parameter_name(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)]
  return {name.split("/")[0]: name for name, leaf in names if is_kernel(name, leaf)}


def steps(tx, tree, count=3):
  """Updates along gradients that depend on the value alone, so that layouts do not matter."""
  state = tx.init(tree)
  for _ in range(count):
    updates, state = tx.update(jax.tree.map(lambda w: jnp.sin(3 * w) + w, tree), state, tree)
    tree = optax.apply_updates(tree, updates)
  return tree


@every_tree
def test_compander(make):
  tree = make()
  companded, expected = compander_init(tree), compander_init(linen())
  assert sorted(companded.log_amplitude) == sorted(kernel_paths(tree).values()) and len(companded.log_amplitude) == 2
  for name, path in kernel_paths(tree).items():
    np.testing.assert_allclose(companded.log_amplitude[path], expected.log_amplitude[f"{name}/kernel"], rtol=1e-6)
  assert_same_kernels(fold_params(companded), fold_params(expected))
  tx = compand_weights(optax.adam(1e-2), optax.sgd(1e-3))
  assert_same_kernels(steps(tx, tree), steps(tx, linen()))


@every_tree
def test_weight_stats(make):
  for actual, expected in zip(weight_stats(named_kernels(make())), weight_stats(named_kernels(linen()))):
    np.testing.assert_allclose(actual, expected, rtol=1e-5)
  stats = weight_stats({name: leaf for name, leaf in named_kernels(make()).items()})
  np.testing.assert_allclose(weight_stats(_without_biases(make())).largest, stats.largest, rtol=1e-5)


def _without_biases(tree):
  keep = lambda path, leaf: leaf if is_kernel(parameter_name(path), leaf) else None
  return jax.tree_util.tree_map_with_path(keep, tree)


@every_tree
def test_orthogonality(make):
  tree = make()
  strides = {path: 1 if name == "first" else None for name, path in kernel_paths(tree).items()}
  penalty = functools.partial(orthogonal_penalty, strides=strides)
  expected = functools.partial(orthogonal_penalty, strides={"first/kernel": 1, "second/kernel": None})
  np.testing.assert_allclose(penalty(tree), expected(linen()), rtol=1e-5)
  tx, other = (optax.chain(penalize(f, 0.01), optax.sgd(0.1)) for f in (penalty, expected))
  assert_same_kernels(steps(tx, tree), steps(other, linen()))
  with pytest.raises(ValueError, match="strides must name kernels"):
    orthogonal_penalty(tree, {})


@every_tree
def test_groups_follow_the_outputs(make):
  layer = _layer(make(), "first")
  expected = linen()["first"]
  for kind in ("neuron", "element"):
    np.testing.assert_allclose(
      np.sort(group_norms(layer, kind=kind)) if kind == "neuron" else jnp.sum(group_norms(_kernel(layer), kind=kind)),
      np.sort(group_norms(expected, kind=kind)) if kind == "neuron" else jnp.sum(jnp.abs(expected["kernel"])),
      rtol=1e-5,
    )
  for kind, size in (("channel", 4), ("shape", 36)):
    norms = np.sort(group_norms(_without_biases(layer), kind=kind))
    assert norms.shape == (size,)
    np.testing.assert_allclose(norms, np.sort(group_norms(expected["kernel"], kind=kind)), rtol=1e-5)


def _layer(tree, name):
  return tree[name] if hasattr(tree, "keys") else getattr(tree, name)


def _kernel(layer):
  return flax_kernel("weight" if hasattr(layer, "weight") else "kernel", jax.tree.leaves(_without_biases(layer))[0])


def test_output_axes_from_the_caller():
  kernel = linen()["first"]["kernel"]
  turned = jnp.transpose(kernel, (3, 2, 0, 1))
  axes = dict(output_axis=0, input_axis=1)
  for kind in ("filter", "channel"):
    np.testing.assert_allclose(group_norms(turned, kind=kind, **axes), group_norms(kernel, kind=kind), rtol=1e-6)
  mask = freeze_support(turned.at[2].set(0), functools.partial(group_ids, kind="filter", **axes))
  assert mask.all((1, 2, 3)).tolist() == [True, True, False, True, True, True]
  with pytest.raises(ValueError, match="output_axis"):
    group_ids(turned, kind="filter", output_axis=4)


@every_tree
def test_half_spaces(make):
  tx = lambda kind: optax.chain(optax.sgd(0.4), half_space_projection(kind, epsilon=0.2))
  layer, expected = _layer(make(), "first"), linen()["first"]
  moved, wanted = steps(tx("neuron"), layer), steps(tx("neuron"), expected)
  zero = lambda tree: np.asarray((_kernel(tree) == 0).all((0, 1, 2)))
  assert zero(wanted).any() and not zero(wanted).all()
  np.testing.assert_array_equal(zero(moved), zero(wanted))
  np.testing.assert_allclose(_kernel(moved), wanted["kernel"], rtol=1e-5, atol=1e-6)


@every_tree
def test_masked_and_none_pass(make):
  tree = make()
  mask = jax.tree_util.tree_map_with_path(lambda path, leaf: is_kernel(parameter_name(path), leaf), tree)
  for tx in (orthogonalize_gradients(), compand_weights(optax.sgd(0.1)), penalize(_ridge, 0.1), proximal(_shrink, 0.1)):
    chain = optax.chain(optax.masked(tx, mask), optax.sgd(0.1))
    moved = steps(chain, tree)
    assert jax.tree.structure(moved) == jax.tree.structure(tree)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(moved))
  assert len(compander_init(_without_biases(tree)).log_amplitude) == 2


def _ridge(tree):
  return sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(tree))


def _shrink(tree, step):
  return jax.tree.map(lambda leaf: leaf / (1 + step), tree)


def test_selecting_nothing_is_refused():
  nothing = {"bias": jnp.ones(3)}
  for call in (
    lambda: compander_init(nothing),
    lambda: compand_weights(optax.sgd(0.1)).init(nothing),
    lambda: weight_stats(nothing),
    lambda: half_space_projection({"bias": None}),
    lambda: proximal({"bias": None}, 0.1),
  ):
    with pytest.raises(ValueError, match="select|kernel|kinds|prox"):
      call()


def test_orthogonal_gradients_of_sharded_leaves():
  rng = np.random.default_rng(1)
  draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  params, grads = {"w": draw(8, 3), "v": draw(16)}, {"w": draw(8, 3), "v": draw(16)}
  mesh = jax.make_mesh((4,), ("devices",), axis_types=(jax.sharding.AxisType.Auto,))
  for per_leaf in (True, False):
    tx = orthogonalize_gradients(per_leaf=per_leaf)
    sharded = orthogonalize_gradients(per_leaf=per_leaf, axis_name="devices")
    update = lambda g, p, tx=sharded: tx.update(g, tx.init(p), p)[0]
    split = PartitionSpec("devices")
    mapped = jax.jit(jax.shard_map(update, mesh=mesh, in_specs=(split, split), out_specs=split, check_vma=False))
    expected = jax.jit(functools.partial(update, tx=tx))(grads, params)
    chex.assert_trees_all_close(mapped(grads, params), expected, rtol=1e-5, atol=1e-6)


def test_half_spaces_of_sharded_groups():
  rng = np.random.default_rng(2)
  params, updates = (jnp.asarray(rng.normal(size=(8, 5)) * size, jnp.float32) for size in (1, 4))
  mesh = jax.make_mesh((4,), ("devices",), axis_types=(jax.sharding.AxisType.Auto,))
  update = lambda u, p, **options: half_space_projection("neuron", **options).update(u, optax.EmptyState(), p)[0]
  split = PartitionSpec("devices")
  one = functools.partial(update, axis_name="devices")
  mapped = jax.jit(jax.shard_map(one, mesh=mesh, in_specs=(split, split), out_specs=split, check_vma=False))
  expected = update(updates, params)
  assert 0 < (params + expected == 0).all(0).sum() < 5
  np.testing.assert_allclose(mapped(updates, params), expected, rtol=1e-6)


class Normalized(nn.Module):
  """Two convolutions and two dense layers with batch normalization in between."""

  widths: tuple

  @nn.compact
  def __call__(self, x, train=False):
    first, second, third = self.widths
    for width in (first, second):
      x = nn.relu(nn.BatchNorm(use_running_average=not train)(nn.Conv(width, (3, 3))(x)))
    x = nn.Dense(third)(x.reshape(x.shape[0], -1))
    return nn.Dense(2)(nn.relu(nn.BatchNorm(use_running_average=not train)(x)))


def test_compaction_with_batch_normalization():
  x = jax.random.normal(jax.random.key(0), (4, 5, 5, 3))
  variables = Normalized((6, 5, 7)).init(jax.random.key(1), x)
  wave = lambda leaf: leaf + 0.3 * jnp.cos(jnp.arange(leaf.size, dtype=leaf.dtype)).reshape(leaf.shape)
  variables = jax.tree.map(wave, variables)
  params, stats = variables["params"], variables["batch_stats"]
  zero = lambda tree, places: jax.tree.map(lambda leaf: leaf.at[..., jnp.array(places)].set(0), tree)
  params["BatchNorm_0"] = zero(params["BatchNorm_0"], [1, 4])  # scale and bias, whatever the kernel
  params["Conv_1"], stats["BatchNorm_1"]["mean"] = (
    zero(params["Conv_1"], [0, 2]),
    zero(stats["BatchNorm_1"]["mean"], [0, 2]),
  )
  params["BatchNorm_1"]["bias"] = zero(params["BatchNorm_1"]["bias"], [0])  # output 2 becomes a constant, which stays
  params["BatchNorm_2"] = zero(params["BatchNorm_2"], [6])
  order = ("Conv_0", "BatchNorm_0", "Conv_1", "BatchNorm_1", "Dense_0", "BatchNorm_2", "Dense_1")
  smaller = compact_variables(variables, order=order)
  widths = [smaller["params"][name]["kernel"].shape[-1] for name in ("Conv_0", "Conv_1", "Dense_0")]
  assert widths == [4, 4, 6]
  outputs = [Normalized(tuple(w)).apply(v, x) for w, v in (((6, 5, 7), variables), (widths, smaller))]
  np.testing.assert_allclose(outputs[0], outputs[1], rtol=1e-4, atol=1e-5)
  for bad in (("BatchNorm_0", "Conv_1"), ("Conv_0", "BatchNorm_0"), ("Conv_0", "BatchNorm_0", "BatchNorm_1", "Conv_1")):
    with pytest.raises(ValueError, match="order must be layers"):
      compact_variables(variables, order=bad)


def seen(module):
  """The first output that can be differentiated."""

  def call(*arguments):
    outputs = jax.tree.leaves(module(*arguments))
    return next(leaf for leaf in outputs if jnp.issubdtype(leaf.dtype, jnp.floating))

  return call


HYPERPARAMETERS = jnp.zeros((2, 2))
# One of each kind: module, arguments but the inputs, and the inputs' shape.
LAYERS = {
  "BestResponseDense": (lambda: layers.BestResponseDense(3), (HYPERPARAMETERS,), (4,)),
  "Companded": (lambda: layers.Companded(nn.Dense(3), learned=True), (), (4,)),
  "ElasticDense": (lambda: quantization.ElasticDense(3), (), (4,)),
  "FactoredOutput": (lambda: layers.FactoredOutput(5, _z_loss), (jnp.array([1, 4]),), (4,)),
  "MaskHead": (lambda: pruning.MaskHead(3), (), (4, 4, 2)),
  "NaiveBayesHead": (lambda: layers.NaiveBayesHead(features=4, classes=3), (), (4,)),
  "QConv": (lambda: quantization.QConv(3, (3, 3)), (), (5, 5, 2)),
  "QDense": (lambda: quantization.QDense(3), (), (4,)),
  "SparseTransportRouter": (lambda: layers.SparseTransportRouter(2, multiple_of=1), (), (4, 3)),
}


def _z_loss(statistics):
  return z_loss_from_statistics(statistics, classes=5)


@pytest.mark.parametrize("name", LAYERS)
def test_layers_through_the_bridge(name):
  """The NNX form of each kind of layer holds Linen's variables, computes the same and has the same gradients."""
  make, rest, shape = LAYERS[name]
  x = jax.random.normal(jax.random.key(0), (2, *shape))
  key = jax.random.key(1)
  model = nnx.bridge.lazy_init(nnx.bridge.ToNNX(make()), x, *rest, rngs=key)
  variables = make().init(key, x, *rest)
  apply = seen(lambda x: make().apply(variables, x, *rest))
  np.testing.assert_allclose(seen(model)(x, *rest), apply(x), rtol=1e-6)
  total = lambda outputs: jnp.sum(jnp.sin(outputs))
  gradient = jax.grad(lambda x: total(seen(model)(x, *rest)))(x)
  np.testing.assert_allclose(gradient, jax.grad(lambda x: total(apply(x)))(x), rtol=1e-5, atol=1e-6)
