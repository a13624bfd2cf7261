"""Many classes: chunked losses equal the plain ones, and plain ones work with the classes sharded over a mesh."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxreg.losses import chunked, comp_sum, label_dro
from jaxreg.losses.chunked import OutputLayer
from jaxreg.losses.stablemax import stablemax_cross_entropy
from tests.conformance import loss_row

PAIRS = {
  "comp_sum": (chunked.chunked_comp_sum_loss, comp_sum.comp_sum_loss, {"tau": 1.4}),
  "cross_entropy": (chunked.chunked_comp_sum_loss, comp_sum.comp_sum_loss, {"tau": 1.0}),
  "stablemax": (chunked.chunked_stablemax_cross_entropy, stablemax_cross_entropy, {}),
  "ldr": (chunked.chunked_ldr_kl_loss, label_dro.ldr_kl_loss, {"temperature": 0.7, "margin": 0.3}),
  "ldr_l1": (
    functools.partial(chunked.chunked_ldr_kl_loss, normalize="l1_mean"),
    functools.partial(label_dro.ldr_kl_loss, normalize="l1_mean"),
    {"temperature": 0.7, "margin": 0.3},
  ),
  "ldr_softplus": (
    functools.partial(chunked.chunked_ldr_kl_loss, normalize="softplus_mean"),
    functools.partial(label_dro.ldr_kl_loss, normalize="softplus_mean"),
    {"temperature": 0.7, "margin": 0.3},
  ),
}
every_loss = pytest.mark.parametrize("name", PAIRS)


def problem(batch, classes, features=3, seed=0, dtype=np.float64):
  rng = np.random.default_rng(seed)
  layer = OutputLayer(
    jnp.asarray(rng.normal(size=(batch, features)), dtype),
    jnp.asarray(2 * rng.normal(size=(features, classes)), dtype),
    jnp.asarray(rng.normal(size=classes), dtype),
  )
  return layer, jnp.asarray(rng.integers(0, classes, batch), jnp.int32)


def logits_of(layer):
  return layer.features @ layer.kernel + layer.bias


def weighted(loss, labels):
  """A scalar that weighs examples differently."""
  weights = jnp.arange(1.0, labels.size + 1).reshape(labels.shape)
  return lambda outputs, hyperparameters: jnp.sum(weights * loss(outputs, labels, **hyperparameters))


@every_loss
@pytest.mark.parametrize("classes, chunk", [(2, 1), (7, 3), (12, 20)])
def test_values_and_gradients_are_those_of_the_plain_form(name, classes, chunk, x64):
  fast, plain, hyperparameters = PAIRS[name]
  layer, labels = problem(4, classes, seed=classes)
  chunks = functools.partial(fast, chunk_size=chunk)
  gradient = lambda loss: jax.value_and_grad(weighted(loss, labels), argnums=(0, 1))

  @jax.jit
  def results(layer):
    expected = gradient(lambda layer, labels, **h: plain(logits_of(layer), labels, **h))(layer, hyperparameters)
    of_logits, of_plain = (gradient(loss)(logits_of(layer), hyperparameters) for loss in (chunks, plain))
    return (gradient(chunks)(layer, hyperparameters), of_logits), (expected, of_plain)

  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-10), *results(layer))


@every_loss
def test_extreme_logits(name):
  fast, plain, hyperparameters = PAIRS[name]
  logits = 1e4 * jnp.array([[1.0, -1, 0, 0], [-1, 1, 1, 1], [0, 0, 0, 0], [1, 1, 1, 1], [1, 1, -1, 1e-4]])
  labels = jnp.array([1, 0, 2, 3, 0])
  for dtype in (jnp.float32, jnp.bfloat16):
    gradient = lambda loss: jax.value_and_grad(weighted(loss, labels))(logits.astype(dtype), hyperparameters)
    value, slope = gradient(functools.partial(fast, chunk_size=3))
    want_value, want_slope = gradient(plain)
    assert slope.dtype == dtype and np.isfinite(np.asarray(slope, np.float32)).all()
    tolerance = {"rtol": 1e-5 if dtype == jnp.float32 else 2e-2}
    np.testing.assert_allclose(np.float32(value), np.float32(want_value), **tolerance)
    np.testing.assert_allclose(np.float32(slope), np.float32(want_slope), **tolerance, atol=1e-6)


@pytest.mark.parametrize("normalize", label_dro.NORMALIZATIONS)
def test_all_temperatures_keep_their_digits_in_float32(normalize):
  layer, labels = problem(6, 50, dtype=np.float32)
  logits = np.asarray(logits_of(layer))
  chunks = functools.partial(chunked.chunked_ldr_kl_loss, chunk_size=7, normalize=normalize)
  plain = functools.partial(label_dro.ldr_kl_loss, normalize=normalize)
  temperatures = np.array([0.0, 1e-3, 1.0, 100.0, 1e6, np.inf])

  def results(loss, dtype):
    one = lambda z, t: weighted(loss, labels)(z, {"temperature": t, "margin": jnp.asarray(0.25, dtype)})
    return jax.jit(jax.vmap(jax.value_and_grad(one), (None, 0)))(logits.astype(dtype), temperatures.astype(dtype))

  value, slope = results(chunks, np.float32)
  with jax.enable_x64(True):
    want, want_slope = results(plain, np.float64)
  # Values of both signs are summed with weights up to 6.
  np.testing.assert_allclose(value, want, rtol=5e-6, atol=2e-5)
  np.testing.assert_allclose(slope, want_slope, rtol=2e-4, atol=2e-5)


@every_loss
def test_leading_shapes_vmap_and_jit(name):
  fast, plain, hyperparameters = PAIRS[name]
  layer, labels = problem(6, 10, dtype=np.float32)
  fast = functools.partial(fast, chunk_size=4, **hyperparameters)
  folded = layer._replace(features=layer.features.reshape(2, 3, -1))
  expected = plain(logits_of(folded), labels.reshape(2, 3), **hyperparameters)
  np.testing.assert_allclose(jax.jit(fast)(folded, labels.reshape(2, 3)), expected, rtol=1e-5, atol=1e-6)
  mapped = jax.vmap(lambda x, y: fast(layer._replace(features=x), y))(folded.features, labels.reshape(2, 3))
  np.testing.assert_allclose(mapped, expected, rtol=1e-5, atol=1e-6)


@every_loss
def test_no_array_of_all_logits(name):
  fast, _, hyperparameters = PAIRS[name]
  batch, classes = 64, 20_000
  fast = functools.partial(fast, chunk_size=500, **hyperparameters)
  layer = OutputLayer(jax.ShapeDtypeStruct((batch, 8), np.float32), jax.ShapeDtypeStruct((8, classes), np.float32))
  logits, labels = jax.ShapeDtypeStruct((batch, classes), np.float32), jax.ShapeDtypeStruct((batch,), np.int32)
  step = jax.jit(jax.value_and_grad(lambda outputs, labels: fast(outputs, labels).mean()))
  # Gradients are results, not temporaries; with a normalisation there are those of two passes to be added.
  for outputs, arrays in ((layer, 0.3), (logits, 1.15 if "_" in name and "ldr" in name else 0.25)):
    memory = step.lower(outputs, labels).compile().memory_analysis()
    assert memory.temp_size_in_bytes < arrays * batch * classes * 4


@every_loss
def test_plain_form_with_the_classes_sharded(name):
  """Each device holds a slice of the classes; what they exchange is one number per example at a time."""
  _, plain, hyperparameters = PAIRS[name]
  batch, classes = 8, 4000
  layer, labels = problem(batch, classes, dtype=np.float32)
  mesh = Mesh(np.asarray(jax.devices()), ("model",), axis_types=(AxisType.Auto,))
  sharded = NamedSharding(mesh, PartitionSpec(None, "model"))
  step = lambda logits, labels: jax.value_and_grad(lambda z: plain(z, labels, **hyperparameters).mean())(logits)
  expected = jax.jit(step)(logits_of(layer), labels)
  logits = jax.device_put(logits_of(layer), sharded)
  split = jax.jit(step, out_shardings=(None, sharded))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), split(logits, labels), expected)
  program = split.lower(logits, labels).compile().as_text()
  exchanged = re.findall(r"= (.*?) (all-gather|all-reduce|all-to-all|collective-permute)\(", program)
  assert exchanged
  for shapes, _ in exchanged:
    sizes = [np.prod([int(d) for d in dims.split(",") if d]) for dims in re.findall(r"\w+\[([\d,]*)\]", shapes)]
    assert max(sizes) <= batch, (shapes, "is more than a number per example")


ROWS = [
  loss_row(chunked.chunked_comp_sum_loss, chunk_size=2, tau=(0.5, 2.5)),
  loss_row(chunked.chunked_ldr_kl_loss, chunk_size=3, temperature=(0.3, 3.0), margin=(0.0, 0.5)),
  loss_row(chunked.chunked_stablemax_cross_entropy, chunk_size=2),
]


EXEMPT = {
  "OutputLayer": "argument of the chunked losses, tested with them",
}
