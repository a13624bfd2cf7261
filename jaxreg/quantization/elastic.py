"""Elastic layers: one set of weights for any number of bits, per tensor or per channel, symmetric or not.

What a layer uses is data, an `ElasticConfig` in the collection `elastic`, so that one compiled program serves all
configurations.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.dtypes import promote_dtype
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.typing import ArrayLike

from jaxreg.quantization.elastic_quantizer import ELASTIC_BITS, ElasticQuantizer, calibrated_tables, has_sign
from jaxreg.quantization.layers import circular_padding, conv_dimensions, conv_window, layer_parameters

__all__ = ["ElasticConfig", "ElasticConv", "ElasticDense", "calibrate_elastic", "recalibrate_batch_norm"]


class ElasticConfig(NamedTuple):
  """How layers are quantized: scalars for one layer, arrays `[layers]` in the order of their calls for a network.

  Attributes:
    weight_bits: integers from 2 to 8, or 0 for floating point.
    act_bits: the same of the layer's inputs.
    per_channel: whether each output channel of the weights has its own step.
    weight_symmetric: whether the weights' grid has no offset.
    act_symmetric: whether the inputs' grid has none.
  """

  weight_bits: jax.Array
  act_bits: jax.Array
  per_channel: jax.Array
  weight_symmetric: jax.Array
  act_symmetric: jax.Array


class ElasticDense(nn.Module):
  """A dense layer with elastic quantization of its weights and inputs, configured by the collection `elastic`.

  >>> import jax, jax.numpy as jnp
  >>> layer = ElasticDense(2)
  >>> outputs, variables = jax.jit(layer.init_with_output)(jax.random.key(0), jnp.ones((5, 3)))
  >>> sorted(variables), outputs.shape
  (['calibration', 'elastic', 'params'], (5, 2))

  Attributes:
    features: number of outputs.
    use_bias: whether to add a bias, in floating point.
    dtype: of the computation, None for that of inputs and parameters.
    param_dtype: of kernel and bias.
    kernel_init: initializer of the weights.
    bias_init: initializer of the bias.

  Reference: Xu, Han, Tian, Yang, Zhang, "EQ-Net: Elastic Quantization Neural Networks", ICCV 2023, Section 3.1.
  """

  features: int
  use_bias: bool = True
  dtype: Any = None
  param_dtype: Any = jnp.float32
  kernel_init: Callable = nn.initializers.lecun_normal()
  bias_init: Callable = nn.initializers.zeros

  @nn.compact
  def __call__(self, inputs: ArrayLike) -> jax.Array:
    inputs, kernel, bias = _operands(self, inputs, (inputs.shape[-1], self.features))
    outputs = inputs @ kernel
    return outputs if bias is None else outputs + bias


class ElasticConv(nn.Module):
  """A convolution `[batch, …, channels]` with elastic quantization, configured by the collection `elastic`.

  `models.ResNet(conv=ElasticConv, dense=ElasticDense, …)` is an elastic residual network.

  >>> import jax, jax.numpy as jnp
  >>> layer = ElasticConv(2, (3, 3), strides=(2, 2))
  >>> outputs, variables = jax.jit(layer.init_with_output)(jax.random.key(0), jnp.ones((1, 8, 8, 3)))
  >>> outputs.shape
  (1, 4, 4, 2)

  Attributes:
    features: number of output channels.
    kernel_size: extent of the kernel in each spatial direction; one number for all of them.
    strides: one number per direction or for all of them, None for ones.
    padding: `SAME`, `VALID`, `CIRCULAR` or pairs of numbers.
    use_bias, dtype, param_dtype, kernel_init, bias_init: as in `ElasticDense`.

  Reference: Xu, Han, Tian, Yang, Zhang, "EQ-Net: Elastic Quantization Neural Networks", ICCV 2023, Section 3.1.
  """

  features: int
  kernel_size: int | Sequence[int]
  strides: int | Sequence[int] | None = None
  padding: str | Sequence[tuple[int, int]] = "SAME"
  use_bias: bool = True
  dtype: Any = None
  param_dtype: Any = jnp.float32
  kernel_init: Callable = nn.initializers.lecun_normal()
  bias_init: Callable = nn.initializers.zeros

  @nn.compact
  def __call__(self, inputs: ArrayLike) -> jax.Array:
    window = conv_window(self, inputs)
    inputs, kernel, bias = _operands(self, inputs, window.kernel_shape)
    inputs, padding = circular_padding(inputs, window)
    outputs = jax.lax.conv_general_dilated(
      inputs, kernel, window.strides, padding, dimension_numbers=conv_dimensions(inputs.ndim)
    )
    return outputs if bias is None else outputs + bias


def _operands(layer, inputs, shape):
  """Inputs and kernel on their grids, and the bias, all in the dtype of the computation."""
  highest = ELASTIC_BITS[-1]
  default = lambda: jax.tree.map(jnp.asarray, ElasticConfig(highest, highest, False, True, True))
  config = layer.variable("elastic", "config", default).value
  inputs, kernel, bias = promote_dtype(inputs, *layer_parameters(layer, shape), dtype=layer.dtype)
  kernel = ElasticQuantizer(channels=True, name="weight_quantizer")(
    kernel, bits=config.weight_bits, symmetric=config.weight_symmetric, per_channel=config.per_channel
  )
  inputs = ElasticQuantizer(name="input_quantizer")(inputs, bits=config.act_bits, symmetric=config.act_symmetric)
  return inputs, kernel, bias


def calibrate_elastic(model: nn.Module, variables: Mapping[str, Any], *arguments: Any, **options: Any) -> dict:
  """The variables of a network with all tables fitted to its weights and to the inputs of its layers on one batch.

  The batch runs through the network in floating point. Signs are decided here: inputs that are nowhere negative get a
  grid without a sign.

  >>> import jax, jax.numpy as jnp
  >>> layer, inputs = ElasticDense(2), jnp.abs(jax.random.normal(jax.random.key(1), (5, 3)))
  >>> variables = jax.jit(lambda key: calibrate_elastic(layer, layer.init(key, inputs), inputs))(jax.random.key(0))
  >>> bool(variables["calibration"]["input_quantizer"]["signed"])
  False

  Args:
    model: the network.
    variables: of `model.init`.
    *arguments: of the call, with the inputs of a calibration batch.
    **options: keyword arguments of the call.

  Returns:
    New variables.

  Raises:
    ValueError: when the network has no elastic layer.

  Reference: Xu, Han, Tian, Yang, Zhang, "EQ-Net: Elastic Quantization Neural Networks", ICCV 2023; its code fits the
    tables of a layer to inputs that are already quantized.
  """
  seen = {}

  def record(call, arguments, keywords, context):
    if not isinstance(context.module, ElasticQuantizer) or context.method_name != "__call__":
      return call(*arguments, **keywords)
    seen[context.module.path] = (arguments[0], context.module.channels)
    return arguments[0]

  with nn.intercept_methods(record):
    model.apply(variables, *arguments, **options)
  if not seen:
    raise ValueError("model must have elastic layers, got none.")
  params, signs = flatten_dict(variables["params"]), flatten_dict(variables["calibration"])
  for path, (values, channels) in seen.items():
    signs[(*path, "signed")] = has_sign(values, channels)
    for name, table in calibrated_tables(values, channels=channels).items():
      params[(*path, name)] = table.astype(params[(*path, name)].dtype)
  return {**variables, "params": unflatten_dict(params), "calibration": unflatten_dict(signs)}


def recalibrate_batch_norm(model: nn.Module, variables: Mapping[str, Any], batches: ArrayLike) -> dict:
  """The variables with batch statistics of their current configuration, from batches that train nothing.

  A supernet's moving averages mix all its configurations, so each needs statistics of its own before it is evaluated.

  >>> import jax, jax.numpy as jnp
  >>> from jaxreg.models.resnet import ResNet
  >>> model = ResNet(stages=(), classes=2, width=2)
  >>> batches = jax.random.normal(jax.random.key(0), (3, 4, 8, 8, 1))
  >>> start = lambda key: recalibrate_batch_norm(model, model.init(key, batches[0], train=False), batches)
  >>> new = jax.jit(start)(jax.random.key(1))
  >>> bool((new["batch_stats"]["stem_norm"]["mean"] != 0).all())
  True

  Args:
    model: a network whose call takes `train` and whose statistics are in the collection `batch_stats`.
    variables: of the network, with the configuration in `elastic`.
    batches: floating `[batches, examples, …]`, run through in order.

  Returns:
    The variables with new `batch_stats`.

  Reference: Xu, Han, Tian, Yang, Zhang, "EQ-Net: Elastic Quantization Neural Networks", ICCV 2023, Section 4.
  """

  def run(statistics, inputs):
    _, new = model.apply({**variables, "batch_stats": statistics}, inputs, train=True, mutable=["batch_stats"])
    return new["batch_stats"], None

  statistics, _ = jax.lax.scan(run, variables["batch_stats"], batches)
  return {**variables, "batch_stats": statistics}
