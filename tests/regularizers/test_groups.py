"""Group ids by kind, and masks of the support."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxreg.regularizers import groups
from jaxreg.regularizers.group_sparsity import (
  prox_wgsef,
  wgsef,
)
from jaxreg.regularizers.groups import freeze_support, group_ids, group_norms, sum_groups
from tests.conformance import LAYER_GROUPS, draw_layer, penalty_row, row


def test_kinds():
  kernel = np.random.default_rng(13).normal(size=(3, 3, 4, 5)).astype(np.float32)
  axes = {"filter": (0, 1, 2), "neuron": (0, 1, 2), "channel": (0, 1, 3), "shape": (3,), "element": ()}
  for kind, summed in axes.items():
    expected = np.sqrt(np.sum(kernel**2, axis=summed)).ravel()
    np.testing.assert_allclose(group_norms(kernel, kind=kind), expected, rtol=1e-5)
    ids = group_ids(kernel, kind=kind)
    full = np.broadcast_to(ids, kernel.shape)
    compare = lambda f, ids=ids, full=full: np.testing.assert_allclose(f(ids), f(full), rtol=1e-5, atol=1e-6)
    compare(lambda ids: wgsef(kernel, ids, k=3))
    compare(lambda ids: prox_wgsef(kernel, ids, k=3, lam=0.1))
    compare(lambda ids: sum_groups(kernel, jnp.asarray(ids), num_groups=ids.max() + 1))


def test_freeze_support():
  params = {
    "Conv_0": {"kernel": jnp.ones((3, 3, 2, 3)).at[..., 1].set(0).at[0, 0, 0, 0].set(0), "bias": jnp.zeros(3)},
    "Dense_0": {"kernel": jnp.zeros((2, 2))},
  }
  mask = freeze_support(params, {"Conv_0": "filter", "Dense_0": None})
  assert mask["Conv_0"]["kernel"].all(axis=(0, 1, 2)).tolist() == [True, False, True]
  assert mask["Conv_0"]["bias"].tolist() == [True, False, True]
  assert mask["Dense_0"]["kernel"].all()


ROWS = [
  penalty_row(groups.sum_groups, LAYER_GROUPS, num_groups=4, wide=True),
  row(
    groups.scale_groups,
    lambda rng: (*draw_layer(rng), rng.uniform(size=4)),
    call=lambda values, factors: groups.scale_groups(values, LAYER_GROUPS, factors),
    bad=(("groups", lambda values, factors: (jax.tree.map(lambda leaf: leaf[None], values), factors)),),
  ),
  row(groups.group_norms, draw_layer, wide=True, options=dict(kind="neuron")),
  row(
    groups.freeze_support,
    draw_layer,
    call=lambda params: groups.freeze_support(params, {"kernel": "neuron", "bias": None}),
    differentiable=False,
    wide=True,
  ),
]


EXEMPT = {
  "group_ids": "reads shapes only and returns NumPy ids; group_norms carries it",
  "resolve_groups": "reads shapes only; group_norms carries it",
}
