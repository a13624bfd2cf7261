"""Heads of domains: each is a classifier of its own."""

import jax
import numpy as np
import pytest

from jaxreg.layers import DomainHeads
from tests.conformance import EXAMPLES, module_row

ROWS = [
  module_row(
    DomainHeads(domains=2, classes=3, nonlinear=nonlinear),
    lambda rng: (rng.normal(size=(EXAMPLES, 8)),),
    bad=(("features", lambda x: (x.astype(np.int32),)), ("features", lambda x: (x[0],))),
    examples="none",
  )._replace(label=f"domain_heads.DomainHeads-{nonlinear}")
  for nonlinear in (False, True)
]


@pytest.mark.parametrize("nonlinear", [False, True])
def test_every_head_is_a_classifier_of_its_own(nonlinear):
  features = np.random.default_rng(0).normal(size=(5, 8)).astype(np.float32)
  module = DomainHeads(domains=2, classes=3, nonlinear=nonlinear)
  params = module.init(jax.random.key(0), features)["params"]
  logits = module.apply({"params": params}, features)
  for head in range(3):
    hidden = features
    for name in ("first", "second", "last") if nonlinear else ("last",):
      hidden = hidden @ params[name]["kernel"][head] + params[name]["bias"][head]
      hidden = hidden if name == "last" else np.maximum(hidden, 0)
    np.testing.assert_allclose(logits[head], hidden, rtol=1e-5, atol=1e-6)
  # Initial values differ, and have the scale of the features, not of the heads.
  kernel = np.asarray(params["last"]["kernel"])
  assert not np.allclose(kernel[0], kernel[1])
  wide = DomainHeads(domains=2, classes=500).init(jax.random.key(0), features)["params"]["last"]["kernel"]
  np.testing.assert_allclose(np.std(wide), 1 / np.sqrt(8), rtol=0.05)
