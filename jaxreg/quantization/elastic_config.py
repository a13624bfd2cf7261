"""Configurations of elastic networks: which layers there are, and uniform and random choices for them."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import unflatten_dict
from jax.typing import ArrayLike

from jaxreg.metrics.sizes import is_integer
from jaxreg.quantization.elastic import ElasticConfig, ElasticConv, ElasticDense
from jaxreg.quantization.elastic_quantizer import ELASTIC_BITS

__all__ = ["ElasticLayer", "config_variables", "elastic_layers", "sample_config", "sample_forms", "uniform_config"]


class ElasticLayer(NamedTuple):
  """One elastic layer of a network.

  Attributes:
    path: names of the module from the root.
    weights: number of weights.
    inputs: number of inputs for one example.
  """

  path: tuple[str, ...]
  weights: int
  inputs: int


def elastic_layers(model: nn.Module, *arguments: Any, **options: Any) -> list[ElasticLayer]:
  """The elastic layers of a network in the order of their calls, from shapes alone.

  >>> import jax.numpy as jnp
  >>> elastic_layers(ElasticDense(5), jnp.zeros((2, 3)))
  [ElasticLayer(path=(), weights=15, inputs=3)]

  Args:
    model: the network.
    *arguments: what it is called with, arrays or `jax.ShapeDtypeStruct`, with a batch as first axis.
    **options: static keyword arguments of the call.

  Returns:
    One entry per layer.

  Reference: none.
  """
  found = []

  def record(call, arguments, keywords, context):
    outputs = call(*arguments, **keywords)
    layer = context.module
    if isinstance(layer, (ElasticConv, ElasticDense)) and context.method_name == "__call__":
      inputs = arguments[0]
      weights = layer.variables["params"]["kernel"].size
      found.append(ElasticLayer(layer.path, weights, inputs.size // inputs.shape[0]))
    return outputs

  with nn.intercept_methods(record):
    jax.eval_shape(lambda key, *arguments: model.init(key, *arguments, **options), jax.random.key(0), *arguments)
  return found


def config_variables(config: ElasticConfig, layers: Sequence[ElasticLayer]) -> dict:
  """A network's configuration as its collection `elastic`.

  >>> import jax.numpy as jnp
  >>> layers = elastic_layers(ElasticDense(5), jnp.zeros((2, 3)))
  >>> int(config_variables(uniform_config(1, bits=4, end_bits=2), layers)["config"].weight_bits)
  2

  Args:
    config: arrays `[layers]`.
    layers: what `elastic_layers` returns.

  Returns:
    Nested dicts, for `model.apply({"params": …, "calibration": …, "elastic": …}, …)`.

  Raises:
    ValueError: when the numbers of layers differ.

  Reference: none.
  """
  if jnp.shape(config.weight_bits) != (len(layers),):
    raise ValueError(f"config must have arrays of shape {(len(layers),)}, got {jnp.shape(config.weight_bits)}.")
  each = {
    (*layer.path, "config"): jax.tree.map(lambda leaf, index=index: jnp.asarray(leaf)[index], config)
    for index, layer in enumerate(layers)
  }
  return unflatten_dict(each)


def uniform_config(
  layers: int,
  *,
  bits: ArrayLike,
  end_bits: ArrayLike = ELASTIC_BITS[-1],
  per_channel: ArrayLike = False,
  weight_symmetric: ArrayLike = True,
  act_symmetric: ArrayLike = True,
) -> ElasticConfig:
  """The same for all layers, except for the bits of the first and the last one.

  >>> uniform_config(4, bits=3).weight_bits.tolist()
  [8, 3, 3, 8]

  Args:
    layers: static; number of layers.
    bits: of weights and inputs of the inner layers; may be traced.
    end_bits: of the first and the last layer; may be traced.
    per_channel, weight_symmetric, act_symmetric: as in `ElasticConfig`; may be traced.

  Returns:
    Arrays `[layers]`.

  Raises:
    ValueError: when a number of bits is neither 0 nor in [2, 8].

  Reference: Xu, Han, Tian, Yang, Zhang, "EQ-Net: Elastic Quantization Neural Networks", ICCV 2023, Section 3.1.
  """
  for name, value in (("bits", bits), ("end_bits", end_bits)):
    if not isinstance(value, jax.Array) and is_integer(value) and value not in (0, *ELASTIC_BITS):
      raise ValueError(f"{name} must be 0 or in [{ELASTIC_BITS[0]}, {ELASTIC_BITS[-1]}], got {value}.")
  all_bits = jnp.where(_inner(layers), bits, end_bits).astype(jnp.int32)
  forms = (
    jnp.broadcast_to(jnp.asarray(form, bool), (layers,)) for form in (per_channel, weight_symmetric, act_symmetric)
  )
  return ElasticConfig(all_bits, all_bits, *forms)


def sample_forms(key: jax.Array, config: ElasticConfig) -> ElasticConfig:
  """The same bits, with granularity and symmetry drawn anew for each layer.

  >>> import jax
  >>> sample_forms(jax.random.key(0), uniform_config(4, bits=3)).weight_bits.tolist()
  [8, 3, 3, 8]

  Args:
    key: threefry key.
    config: arrays `[layers]`.

  Returns:
    The new configuration.

  Reference: Xu, Han, Tian, Yang, Zhang, "EQ-Net: Elastic Quantization Neural Networks", ICCV 2023, Section 3.2.
  """
  forms = jax.random.bernoulli(key, 0.5, (3, *jnp.shape(config.weight_bits)))
  return ElasticConfig(config.weight_bits, config.act_bits, *forms)


def sample_config(
  key: jax.Array, layers: int, *, candidates: Sequence[int] = ELASTIC_BITS, end_bits: int = ELASTIC_BITS[-1]
) -> ElasticConfig:
  """Bits of weights and of inputs, granularity and symmetry drawn for each layer; the end layers keep their bits.

  >>> import jax
  >>> config = sample_config(jax.random.key(0), 5, candidates=(2, 4))
  >>> config.weight_bits[0].item(), set(config.act_bits[1:-1].tolist()) <= {2, 4}
  (8, True)

  Args:
    key: threefry key.
    layers: static; number of layers.
    candidates: static; numbers of bits to draw from.
    end_bits: of the first and the last layer.

  Returns:
    Arrays `[layers]`.

  Raises:
    ValueError: when a candidate is not in [2, 8].

  Reference: Xu, Han, Tian, Yang, Zhang, "EQ-Net: Elastic Quantization Neural Networks", ICCV 2023, Section 3.2.
  """
  if not set(candidates) <= set(ELASTIC_BITS):
    raise ValueError(f"candidates must lie in [{ELASTIC_BITS[0]}, {ELASTIC_BITS[-1]}], got {tuple(candidates)}.")
  bit_key, form_key = jax.random.split(key)
  drawn = jax.random.choice(bit_key, jnp.asarray(candidates, jnp.int32), (2, layers))
  bits = jnp.where(_inner(layers), drawn, end_bits)
  config = uniform_config(layers, bits=candidates[0])
  return sample_forms(form_key, config._replace(weight_bits=bits[0], act_bits=bits[1]))


def _inner(layers):
  place = jnp.arange(layers)
  return (place > 0) & (place < layers - 1)
