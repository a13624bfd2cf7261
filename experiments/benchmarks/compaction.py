"""Removing the zero groups that WGSEF leaves: the same outputs from a smaller dense network, and what that saves."""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks import Options
from experiments.benchmarks.timing import interleaved
from jaxreg.models import MLP
from jaxreg.pruning import compaction
from jaxreg.regularizers import group_sparsity
from jaxreg.regularizers.groups import group_ids

TITLE = "Compaction: forward pass with the zero neurons and filters in place and removed, float32"
KEPT = (0.5, 0.25, 0.125)


class ConvNet(nn.Module):
  """3×3 convolutions with ReLU, a 2×2 pool after each but the first, and a dense layer; `features` as of `MLP`."""

  features: tuple[int, ...]

  @nn.compact
  def __call__(self, images: jax.Array) -> jax.Array:
    hidden = images
    for index, filters in enumerate(self.features[:-1]):
      hidden = nn.relu(nn.Conv(filters, (3, 3))(hidden))
      if index:
        hidden = nn.max_pool(hidden, (2, 2), strides=(2, 2))
    return nn.Dense(self.features[-1])(hidden.reshape(hidden.shape[0], -1))


def measure(options: Options):
  """Rows: one per network and share of groups kept."""
  width, filters, batch = (32, 8, 8) if options.quick else (2048, 64, 64)
  networks = {
    f"MLP 784-{width}-{width}-10": (MLP, (width, width, 10), (4 * batch, 28, 28, 1), ("Dense_0", "Dense_1", "Dense_2")),
    f"3 convolutions of {filters}, 32×32": (
      ConvNet,
      (filters, filters, filters, 10),
      (batch, 32, 32, 3),
      ("Conv_0", "Conv_1", "Conv_2", "Dense_0"),
    ),
  }
  rows = [_row(name, *network, kept, options) for name, network in networks.items() for kept in KEPT]
  notes = [
    "Each hidden layer's neurons or filters, with their biases, are pruned to the share kept by one step of WGSEF's"
    " proximal operator with a large strength, which selects the largest; layers are random. `compact` then removes the"
    " zero groups and the inputs that they fed. Dense kernels do not know that entries are zero, so pruning alone saves"
    " no time.",
  ]
  return rows, notes


def _row(name, build: Callable, features, shape, order, kept: float, options: Options):
  inputs = jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)
  model = build(features)
  params = dict(model.init(jax.random.key(0), inputs)["params"])
  for layer, outputs in zip(order[:-1], features):
    params[layer] = _prune(params[layer], round(kept * outputs))
  smaller = compaction.compact(params, order=order)
  small = build(tuple(smaller[layer]["kernel"].shape[-1] for layer in order))
  steps = {
    "ms pruned": (jax.jit(model.apply), {"params": params}),
    "ms compact": (jax.jit(small.apply), {"params": smaller}),
  }
  whole, compact = (step(variables, inputs) for step, variables in steps.values())
  seconds = interleaved(
    {key: lambda step=step, variables=variables: step(variables, inputs) for key, (step, variables) in steps.items()},
    repeats=2 if options.quick else 4 * options.repeats,
  )
  return {
    "network": name,
    "kept": kept,
    "parameters": _size(params),
    "compact parameters": _size(smaller),
    **{key: 1e3 * value for key, value in seconds.items()},
    "speed-up": seconds["ms pruned"] / seconds["ms compact"],
    "largest relative difference": float(jnp.abs(whole - compact).max() / jnp.abs(whole).max()),
  }


def _prune(layer: dict, k: int) -> dict:
  groups = group_ids(layer, kind="neuron" if layer["kernel"].ndim == 2 else "filter")
  pruned = group_sparsity.prox_wgsef(layer, groups, k=k, lam=1e6)
  return jax.tree.map(lambda new, old: jnp.where(new != 0, old, 0), pruned, layer)


def _size(params) -> int:
  return sum(leaf.size for leaf in jax.tree.leaves(params))
