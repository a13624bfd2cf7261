import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxreg.metrics import grokking
from jaxreg.metrics.grokking import (
  nlm_alignment,
  nlm_direction,
  softmax_collapse_fraction,
  tensor_norms,
  zero_loss_fraction,
)
from jaxreg.models import MLP
from tests.conformance import BAD_LOGITS, BAD_VALUES, draw_layer, draw_logits, metric_row, row


@pytest.mark.golden
def test_golden_grokking_stability_collapse(golden, x64):
  cases = [arrays for _, arrays, _ in golden("40-grokking_stability").cases() if "out_ce64" in arrays]
  assert cases
  for case in cases:
    logits, labels = jnp.asarray(case["logits"]), jnp.asarray(case["labels"])
    losses = {}
    for bits in (32, 64):
      cast = logits.astype(f"float{bits}")
      # Not optax's difference of logsumexp and logit, which loses what is below one ulp of the logits.
      losses[bits] = -jnp.take_along_axis(jax.nn.log_softmax(cast), labels[:, None], axis=-1)[:, 0]
    np.testing.assert_allclose(losses[32], case["out_ce32"], atol=3e-7)
    np.testing.assert_allclose(losses[64].astype(np.float32), case["out_ce64"], rtol=3e-7, atol=5e-16)
    assert zero_loss_fraction(losses[32]) == pytest.approx(case["out_zero_terms32"], abs=1e-7)
    for bits in (16, 32, 64):
      fraction = lambda z, bits=bits: softmax_collapse_fraction(z, dtype=f"float{bits}")
      assert fraction(logits) == pytest.approx(case[f"out_collapse_frac{bits}"], abs=1e-7)
      np.testing.assert_array_equal(jax.vmap(fraction)(logits), case[f"out_collapse{bits}"])


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32, jnp.float64])
@pytest.mark.parametrize("classes", [2, 3, 50])
def test_collapse_flips_across_the_bracket(dtype, classes, x64):
  bits = jnp.finfo(dtype).nmant + 1
  certain = np.log(classes - 1) + (bits + 1) * np.log(2)
  never = (bits - 1) * np.log(2)
  for gap, expected in ((certain * 1.02 + 0.05, 1), (never * 0.98 - 0.05, 0)):
    for fraction in (softmax_collapse_fraction, jax.jit(softmax_collapse_fraction, static_argnames="dtype")):
      assert fraction(jnp.zeros((2, classes)).at[:, -1].set(float(gap)), dtype=dtype) == expected
      assert fraction(jnp.zeros((2, classes), dtype).at[:, 0].set(jnp.asarray(gap, dtype))) == expected


def test_collapse_of_extreme_logits():
  z = jnp.array([[1e4, -1e4], [1e4, 1e4], [-1e4, -1e4], [3e38, -3e38]])
  for dtype in (jnp.float16, jnp.bfloat16, jnp.float32):
    assert softmax_collapse_fraction(z, dtype=dtype) == 0.5
  assert softmax_collapse_fraction(z.T, axis=0) == 0.5


def test_collapse_bad_input():
  with pytest.raises(ValueError, match="float64"):
    softmax_collapse_fraction(jnp.zeros(3), dtype=jnp.float64)
  with pytest.raises(ValueError, match="dtype must be floating"):
    softmax_collapse_fraction(jnp.zeros(3), dtype=jnp.int32)
  with pytest.raises(ValueError, match="last_layer"):
    nlm_direction({"a": jnp.zeros(1)}, last_layer="b")
  with pytest.raises(ValueError, match="equal shapes"):
    nlm_alignment({"a": jnp.zeros(1)}, {"a": jnp.zeros(2)})


def bias_free_network():
  model = MLP((7, 6, 4), use_bias=False)
  x = jax.random.normal(jax.random.key(0), (9, 5), jnp.float64)
  y = jax.random.randint(jax.random.key(1), (9,), 0, 4)
  params = jax.tree.map(lambda p: p.astype(jnp.float64), model.init(jax.random.key(2), x)["params"])
  return model, params, x, y


def test_gradient_weight_products_of_a_homogeneous_network(x64):
  model, params, x, y = bias_free_network()
  logits = model.apply({"params": params}, x)

  def loss(params):
    return optax.softmax_cross_entropy_with_integer_labels(model.apply({"params": params}, x), y).mean()

  grads = jax.grad(loss)(params)
  products = jax.tree.leaves(jax.tree.map(jnp.vdot, grads, params))
  expected = jnp.mean(jnp.sum((jax.nn.softmax(logits) - jax.nn.one_hot(y, 4)) * logits, axis=-1))
  np.testing.assert_allclose(products, np.full(len(products), expected), rtol=1e-10)
  norms = jax.tree.map(lambda g, p: jnp.linalg.norm(g) * jnp.linalg.norm(p), grads, params)
  cosines = jax.tree.map(lambda norm: -expected / norm, norms)
  for found, wanted in zip(jax.tree.leaves(nlm_alignment(grads, params)), jax.tree.leaves(cosines)):
    np.testing.assert_allclose(found, wanted, rtol=1e-10)


def test_direction_scales_the_logits(x64):
  model, params, x, _ = bias_free_network()
  logits = model.apply({"params": params}, x)
  move = lambda direction: jax.tree.map(lambda p, d: p + 0.3 * d, params, direction)
  scaled = model.apply({"params": move(nlm_direction(params))}, x)
  np.testing.assert_allclose(scaled, 1.3**3 * logits, rtol=1e-10)
  for layer in ("Dense_2", ("Dense_2",)):
    scaled = model.apply({"params": move(nlm_direction(params, last_layer=layer))}, x)
    np.testing.assert_allclose(scaled, 1.3 * logits, rtol=1e-10)


def test_alignment_and_norms_at_extremes():
  params = {"a": jnp.array([1e30, 0.0]), "b": jnp.zeros(2), "c": jnp.array(2.0, jnp.bfloat16), "d": None}
  grads = {"a": jnp.array([-1e-30, 0.0]), "b": jnp.ones(2), "c": jnp.array(1.0, jnp.bfloat16), "d": None}
  found = jax.jit(nlm_alignment)(grads, params)
  assert (found["a"], found["b"], found["c"], found["d"]) == (1, 0, -1, None)
  assert tensor_norms(params)["a"] == jnp.float32(1e30)
  assert tensor_norms({"e": jnp.zeros((0, 3))})["e"] == 0
  assert nlm_alignment({}, {}) == {}


ROWS = [
  metric_row(
    grokking.softmax_collapse_fraction, arguments=lambda rng: (draw_logits(rng),), bad=BAD_LOGITS, dtype=jnp.float32
  ),
  metric_row(
    grokking.zero_loss_fraction,
    arguments=lambda rng: (np.maximum(draw_logits(rng)[:, 0], 0),),
    bad=(("losses", lambda losses: (losses.astype(np.int32),)),),
  ),
  row(
    grokking.nlm_alignment,
    lambda rng: (*draw_layer(rng), *draw_layer(rng)),
    bad=(("shapes", lambda grads, params: (grads, jax.tree.map(lambda leaf: leaf[..., 1:], params))),),
    differentiable=False,
    wide=True,
  ),
  row(grokking.nlm_direction, draw_layer, options=dict(last_layer="kernel"), bad=()),
  row(grokking.tensor_norms, draw_layer, bad=BAD_VALUES[:0], differentiable=False, wide=True),
]
