"""The inconsistency of head gradients: golden losses, the examples' own gradients, the card's identities, masks."""

import json

import jax
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, PartitionSpec

from jaxreg.regularizers.domain_inconsistency import inconsistency_penalty
from tests.conformance import row

FEATURES, CLASSES, BATCH = 4, 3, 6


def _draw(rng, leading=()):
  labels = rng.integers(0, CLASSES, (*leading, BATCH)).astype(np.int32)
  head = {"kernel": rng.normal(size=(FEATURES, CLASSES)), "bias": rng.normal(size=CLASSES)}
  source = rng.normal(size=(*leading, BATCH, FEATURES))
  return source, source + 0.5 * rng.normal(size=source.shape), labels, head


_BAD = (
  ("features", lambda z, c, y, h: (z.astype(np.int32), c, y, h)),
  ("shapes", lambda z, c, y, h: (z, c[:1], y, h)),
  ("labels", lambda z, c, y, h: (z, c, y[..., 1:], h)),
  ("head", lambda z, c, y, h: (z, c, y, {"kernel": h["kernel"][1:]})),
)
ROWS = [
  row(inconsistency_penalty, lambda rng: _draw(rng, (2,)), bad=_BAD),
  row(inconsistency_penalty, _draw, bad=_BAD, options=dict(center="own")),
]


def _of_each(features, labels, head):
  """The examples' gradients, flat."""
  loss = lambda head, x, y: optax.softmax_cross_entropy_with_integer_labels(x @ head["kernel"] + head["bias"], y)
  found = jax.vmap(jax.grad(loss), (None, 0, 0))(head, features, labels)
  return {name: np.asarray(g).reshape(len(g), -1) for name, g in found.items()}


def _sizes(gradients):
  return sum(np.mean(np.sum(g**2, axis=1)) / g.shape[1] for g in gradients.values())


def test_it_is_that_of_the_examples_gradients(x64):
  source, crafted, labels, head = _draw(np.random.default_rng(0))
  one, two = (_of_each(features, labels, head) for features in (source, crafted))
  flat = [np.concatenate([g["kernel"], g["bias"]], axis=1) for g in (one, two)]
  mean = flat[0].mean(0)
  variances = [np.mean((g - mean) ** 2, axis=0) for g in flat]
  # Both squared distances to the mean of the two, averaged.
  middle = sum(variances) / 2
  expected = np.mean([np.mean((v - middle) ** 2) for v in variances]) + _sizes(two)
  np.testing.assert_allclose(inconsistency_penalty(source, crafted, labels, head), expected, rtol=1e-12)
  own = np.mean((flat[0].var(0) - flat[1].var(0)) ** 2) / 4 + _sizes(two)
  np.testing.assert_allclose(inconsistency_penalty(source, crafted, labels, head, center="own"), own, rtol=1e-12)


def test_equal_and_swapped_halves(x64):
  source, crafted, labels, head = _draw(np.random.default_rng(1))
  sizes = [_sizes(_of_each(features, labels, head)) for features in (source, crafted)]
  np.testing.assert_allclose(inconsistency_penalty(source, source, labels, head), sizes[0], rtol=1e-13)
  spread = lambda one, two, size, center: inconsistency_penalty(one, two, labels, head, center=center) - size
  for center in ("source", "own"):
    there, back = spread(source, crafted, sizes[1], center), spread(crafted, source, sizes[0], center)
    assert np.isclose(there, back, rtol=1e-10) == (center == "own")


def test_domains_are_summed_and_split_batches_gathered(x64):
  arguments = _draw(np.random.default_rng(2), (2,))
  source, crafted, labels, head = arguments
  value, slope = jax.value_and_grad(inconsistency_penalty, argnums=(0, 3))(*arguments)
  each = [inconsistency_penalty(source[i], crafted[i], labels[i], head) for i in range(2)]
  np.testing.assert_allclose(value, sum(each), rtol=1e-13)

  def part(source, crafted, labels):
    penalty = lambda source, head: inconsistency_penalty(source, crafted, labels, head, axis_name="devices")
    value, (own, of_head) = jax.value_and_grad(penalty, (0, 1))(source, head)
    # Of the devices' mean, that of one device's features is its part of it.
    return value[None], own / jax.lax.psum(1, "devices"), jax.lax.pmean(of_head, "devices")

  specs = PartitionSpec(None, "devices")
  mapped = jax.shard_map(
    part,
    mesh=jax.make_mesh((2,), ("devices",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2]),
    in_specs=specs,
    out_specs=(PartitionSpec("devices"), specs, PartitionSpec()),
    check_vma=False,
  )
  values, own, of_head = jax.jit(mapped)(source, crafted, labels)
  np.testing.assert_allclose(values, [value] * 2, rtol=1e-12)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-14), (own, of_head), slope)


def test_what_does_not_count_is_not_read():
  source, crafted, labels, head = jax.tree.map(
    lambda x: x.astype(np.float32) if x.dtype == float else x, _draw(np.random.default_rng(3))
  )
  kept = np.arange(BATCH) != 2
  expected = jax.jit(inconsistency_penalty)(source[kept], crafted[kept], labels[kept], head)
  spoil = lambda x: np.where(kept[:, None], x, np.nan)
  outside = np.where(kept, labels, 255).astype(np.uint8)
  for given, where in ((labels, kept), (outside, None)):
    penalty = lambda source, given=given, where=where: inconsistency_penalty(
      source, spoil(crafted), given, head, where=where
    )
    value, gradient = jax.jit(jax.value_and_grad(penalty))(spoil(source))
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    assert np.isfinite(gradient).all() and not np.any(gradient[2])
  assert inconsistency_penalty(source, crafted, np.full(BATCH, -1), head) == 0


@pytest.mark.golden
def test_golden_udim_inconsistency(golden, x64):
  for name, case, _ in golden("45-udim").cases("case"):
    hidden = lambda x, case=case: np.tanh(x.reshape(len(x), -1) @ case["W1"].T + case["b1"])
    head = {"kernel": case["W2"].T, "bias": case["b2"]}
    for variant, domains in (("pooled", 1), ("domwise", json.loads(str(case["hp"]))["num_domains"]), ("advstyle", 1)):
      block = lambda x, domains=domains: x.reshape(domains, -1, *x.shape[1:])
      crafted = block(hidden(case[f"udim_{variant}_out_x_pert"]))
      found = jax.jit(inconsistency_penalty)(block(hidden(case["x"])), crafted, block(case["y"]), head)
      expected = case[f"udim_{variant}_out_inconsistency"]
      np.testing.assert_allclose(found, expected, rtol=1e-9, err_msg=f"{name} {variant}")


def test_bad_input_is_refused():
  arguments = _draw(np.random.default_rng(4))
  with pytest.raises(ValueError, match="center must be one of"):
    inconsistency_penalty(*arguments, center="mean")
  with pytest.raises(ValueError, match="head must be a dict"):
    inconsistency_penalty(*arguments[:3], arguments[3]["kernel"])
