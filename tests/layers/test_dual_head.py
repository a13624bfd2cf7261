"""Two heads on one backbone: golden outputs, and which parameters each head's loss reaches."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxreg.layers.dual_head import DualHead, NonlinearHead
from tests.conformance import EXAMPLES, module_row

FEATURES = jnp.asarray(np.random.default_rng(0).normal(size=(6, 4)), jnp.float32)


@pytest.mark.golden
def test_golden_dhkd_head(golden, x64):
  names = []
  for name, arrays, _ in golden("47-dhkd").cases("head"):
    names.append(name)
    of = {key: jnp.asarray(value) for key, value in arrays.items()}
    head = NonlinearHead(of["b2"].size, of["b1"].size, epsilon=float(of["bn_eps"]))
    params = {
      "first": {"kernel": of["w1"].T, "bias": of["b1"]},
      "norm": {"scale": of["bn_scale"], "bias": of["bn_bias"]},
      "last": {"kernel": of["w2"].T, "bias": of["b2"]},
    }
    variables = {"params": params, "batch_stats": {"norm": {"mean": of["bn_mean"], "var": of["bn_var"]}}}
    out = head.apply(variables, of["x"], train=False)
    np.testing.assert_allclose(out, of["out"], rtol=1e-8, atol=1e-8, err_msg=name)
  assert names


@pytest.mark.parametrize("hidden", [None, 8])
def test_each_loss_reaches_its_own_head(hidden):
  head = DualHead(classes=3, hidden=hidden)
  variables = head.init(jax.random.key(0), FEATURES, train=False)

  def loss(params, features, which):
    logits, _ = head.apply(
      {**variables, "params": params},
      features,
      train=True,
      rngs={"dropout": jax.random.key(1)},
      mutable=["batch_stats"],
    )
    return jnp.sum(jnp.sin(logits[which]))

  for which, own, other in ((0, "main", "auxiliary"), (1, "auxiliary", "main")):
    on_params, on_features = jax.grad(loss, (0, 1))(variables["params"], FEATURES, which)
    assert all(np.any(leaf) for leaf in jax.tree.leaves(on_params[own]["kernel"] if hidden is None else on_features))
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(on_params[other]))
    assert np.any(on_features)


def test_inference_needs_the_main_head_alone():
  head = DualHead(classes=3, hidden=8)
  variables = head.init(jax.random.key(0), FEATURES, train=False)
  both = head.apply(variables, FEATURES, train=False)
  alone = head.apply({"params": {"main": variables["params"]["main"]}}, FEATURES, method="main_only")
  np.testing.assert_array_equal(alone, both.main)
  assert np.any(both.main != both.auxiliary)


def test_dropout_comes_before_the_normalisation():
  """Dropped units are zero before they are normalised, and so not after it."""
  head = NonlinearHead(classes=2, hidden=16, dropout=0.5)
  variables = head.init(jax.random.key(0), FEATURES, train=False)
  _, new = head.apply(
    variables, FEATURES, train=True, rngs={"dropout": jax.random.key(1)}, mutable=["batch_stats", "intermediates"],
    capture_intermediates=True,
  )  # fmt: skip
  captured = new["intermediates"]
  dropped = np.asarray(captured["Dropout_0"]["__call__"][0]) == 0
  assert dropped.any() and np.asarray(captured["norm"]["__call__"][0])[dropped].any()


ROWS = [
  module_row(
    NonlinearHead(classes=3, hidden=4),
    lambda rng: (rng.normal(size=(EXAMPLES, 5)),),
    options=dict(train=False),
  ),
  module_row(
    DualHead(classes=3, hidden=4),
    lambda rng: (rng.normal(size=(EXAMPLES, 5)),),
    options=dict(train=False),
    call=lambda module, variables, features: jnp.concatenate(module.apply(variables, features, train=False), axis=-1),
  ),
]


EXEMPT = {"DualLogits": "result of DualHead"}
