"""Layers whose weights respond to hyperparameters: an elementary part plus a part gated by them.

With `lambda` the unconstrained hyperparameters, the weights of output unit i are
`W(lambda)_i = s W_i + (V lambda)_i R_i` and `b(lambda)_i = s b_i + (C lambda)_i r_i`. The gates act on outputs, so that
every example of a batch may have its own `lambda` at the cost of two matrix products.
"""

import math
from collections.abc import Callable, Mapping, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxreg.checks import check_float, dtype_of

__all__ = [
  "BestResponseConv",
  "BestResponseDense",
  "BestResponseEmbed",
  "BestResponseLSTMCell",
  "materialize_best_response",
]

GATE_SCALE = 0.01  # standard deviation of the first gates: larger ones make networks unstable at lambda around 5


class BestResponseDense(nn.Module):
  """A dense layer `s (x W + b) + (lambda V) * (x R) + (lambda C) * r`.

  >>> import jax, jax.numpy as jnp
  >>> layer, inputs, hyperparameters = BestResponseDense(3), jnp.ones((4, 5)), jnp.zeros((4, 2))
  >>> params = layer.init(jax.random.key(0), inputs, hyperparameters)["params"]
  >>> {name: value.shape for name, value in sorted(params.items())}  # doctest: +NORMALIZE_WHITESPACE
  {'bias': (3,), 'bias_gate': (2, 3), 'kernel': (5, 3), 'kernel_gate': (2, 3), 'response_bias': (3,),
   'response_kernel': (5, 3), 'scale': ()}
  >>> layer.apply({"params": params}, inputs, hyperparameters).shape
  (4, 3)

  Attributes:
    features: number of outputs.
    use_bias: whether there are `b`, `r` and `C`.
    use_scale: whether there is the learned scalar `s` (of the official code, not of the paper); otherwise it is 1.

  Reference: MacKay, Vicol, Lorraine, Duvenaud, Grosse, "Self-Tuning Networks: Bilevel Optimization of Hyperparameters
    using Structured Best-Response Functions", ICLR 2019, the structured best response.
  """

  features: int
  use_bias: bool = True
  use_scale: bool = True

  @nn.compact
  def __call__(
    self, inputs: ArrayLike, hyperparameters: ArrayLike | None = None, kernel_mask: ArrayLike | None = None
  ) -> jax.Array:
    """The layer's outputs.

    Args:
      inputs: floating `[..., inputs]`.
      hyperparameters: unconstrained, floating `[H]`, or `[examples, H]` (any leading part of the inputs' shape); None
        leaves the elementary part alone.
      kernel_mask: broadcasts against `[inputs, features]` and multiplies both kernels (DropConnect).

    Returns:
      `[..., features]` in the dtype of the inputs.

    Raises:
      ValueError: when an argument does not fit.
    """
    check_float("inputs", inputs)
    mask = 1 if kernel_mask is None else kernel_mask
    product = lambda kernel: inputs @ (kernel * mask).astype(inputs.dtype)
    shape = (inputs.shape[-1], self.features)
    return _respond(self, product, shape, inputs, hyperparameters)


class BestResponseConv(nn.Module):
  """A convolution whose output channels respond to hyperparameters as the units of `BestResponseDense` do.

  >>> import jax, jax.numpy as jnp
  >>> layer, inputs, hyperparameters = BestResponseConv(8, (3, 3), strides=(2, 2)), jnp.ones((2, 6, 6, 3)), jnp.zeros(4)
  >>> params = layer.init(jax.random.key(0), inputs, hyperparameters)
  >>> layer.apply(params, inputs, hyperparameters).shape
  (2, 3, 3, 8)

  Attributes:
    features: number of output channels.
    kernel_size: extent of the kernel in each spatial axis.
    strides: in each spatial axis; default 1.
    padding: `SAME`, `VALID`, or a pair (before, after) for each spatial axis.
    use_bias: whether there are biases.
    use_scale: whether there is the learned scalar on the elementary part.

  Reference: MacKay, Vicol, Lorraine, Duvenaud, Grosse, "Self-Tuning Networks: Bilevel Optimization of Hyperparameters
    using Structured Best-Response Functions", ICLR 2019, the convolutional best response.
  """

  features: int
  kernel_size: Sequence[int]
  strides: Sequence[int] | None = None
  padding: str | Sequence[tuple[int, int]] = "SAME"
  use_bias: bool = True
  use_scale: bool = True

  @nn.compact
  def __call__(self, inputs: ArrayLike, hyperparameters: ArrayLike | None = None) -> jax.Array:
    """The layer's outputs.

    Args:
      inputs: floating `[examples, *spatial, channels]`.
      hyperparameters: unconstrained, floating `[H]` or `[examples, H]`; None leaves the elementary part alone.

    Returns:
      `[examples, *spatial, features]` in the dtype of the inputs.

    Raises:
      ValueError: when an argument does not fit.
    """
    check_float("inputs", inputs)
    axes = len(self.kernel_size)
    if inputs.ndim != axes + 2:
      raise ValueError(f"inputs must be [examples, {axes} spatial axes, channels], got shape {inputs.shape}.")
    letters = "DHW"[-axes:]

    def convolve(kernel):
      return jax.lax.conv_general_dilated(
        inputs,
        kernel.astype(inputs.dtype),
        self.strides or (1,) * axes,
        self.padding,
        dimension_numbers=(f"N{letters}C", f"{letters}IO", f"N{letters}C"),
      )

    shape = (*self.kernel_size, inputs.shape[-1], self.features)
    return _respond(self, convolve, shape, inputs, hyperparameters)


class BestResponseEmbed(nn.Module):
  """An embedding `E_t + (lambda V) * R_t` of tokens t, gated in each dimension.

  >>> import jax, jax.numpy as jnp
  >>> layer, tokens, hyperparameters = BestResponseEmbed(10, 4), jnp.array([[1, 2, 3]]), jnp.zeros((1, 2))
  >>> params = layer.init(jax.random.key(0), tokens, hyperparameters)
  >>> layer.apply(params, tokens, hyperparameters).shape
  (1, 3, 4)

  Attributes:
    num_embeddings: number of tokens.
    features: dimensions of the embedding.

  Reference: MacKay, Vicol, Lorraine, Duvenaud, Grosse, "Self-Tuning Networks: Bilevel Optimization of Hyperparameters
    using Structured Best-Response Functions", ICLR 2019; the embedding is that of the official code.
  """

  num_embeddings: int
  features: int

  @nn.compact
  def __call__(self, tokens: ArrayLike, hyperparameters: ArrayLike | None = None) -> jax.Array:
    """The embeddings.

    Args:
      tokens: integers in [0, num_embeddings), `[...]`.
      hyperparameters: unconstrained, floating `[H]` or `[examples, H]`; None leaves the elementary part alone.

    Returns:
      `[..., features]`.

    Raises:
      ValueError: when an argument does not fit.
    """
    if not jnp.issubdtype(dtype_of("tokens", tokens), jnp.integer):
      raise ValueError(f"tokens must be integers, got dtype {jnp.result_type(tokens)}.")
    shape = (self.num_embeddings, self.features)
    outputs = self.param("embedding", _uniform(0.1), shape)[tokens]
    if hyperparameters is None:
      return outputs
    _check_hyperparameters(hyperparameters, jnp.shape(tokens))
    response = self.param("response_embedding", _uniform(0.1), shape)[tokens]
    gate = _gate(self, "embedding_gate", hyperparameters, self.features)
    return outputs + _align(gate, outputs.ndim).astype(outputs.dtype) * response


class BestResponseLSTMCell(nn.RNNCellBase):
  """An LSTM cell whose two linear maps, of the inputs and of the hidden state, are `BestResponseDense` layers.

  >>> import jax, jax.numpy as jnp
  >>> cell, inputs, hyperparameters = BestResponseLSTMCell(4), jnp.ones((2, 3)), jnp.zeros((2, 5))
  >>> carry = cell.initialize_carry(jax.random.key(0), inputs.shape)
  >>> params = cell.init(jax.random.key(0), carry, inputs, hyperparameters)
  >>> (memory, hidden), outputs = cell.apply(params, carry, inputs, hyperparameters)
  >>> outputs.shape
  (2, 4)

  In `nn.RNN`, which hands a cell nothing but inputs, hyperparameters and mask are attributes:

  >>> rnn = nn.RNN(BestResponseLSTMCell(4, hyperparameters=hyperparameters))
  >>> rnn.init_with_output(jax.random.key(0), jnp.ones((2, 7, 3)))[0].shape
  (2, 7, 4)

  Attributes:
    features: size of the memory and of the hidden state.
    hyperparameters: those of calls without hyperparameters.
    recurrent_mask: that of calls without a mask.

  Reference: MacKay, Vicol, Lorraine, Duvenaud, Grosse, "Self-Tuning Networks: Bilevel Optimization of Hyperparameters
    using Structured Best-Response Functions", ICLR 2019; the cell is that of the official code.
  """

  features: int
  hyperparameters: jax.Array | None = None
  recurrent_mask: jax.Array | None = None

  @nn.compact
  def __call__(
    self,
    carry: tuple[jax.Array, jax.Array],
    inputs: ArrayLike,
    hyperparameters: ArrayLike | None = None,
    recurrent_mask: ArrayLike | None = None,
  ):
    """One step.

    Args:
      carry: memory and hidden state, floating `[..., features]` each.
      inputs: floating `[..., inputs]`.
      hyperparameters: unconstrained, floating `[H]` or `[examples, H]`; None leaves the elementary part alone.
      recurrent_mask: broadcasts against `[features, 4 features]` and multiplies the kernels of the hidden state, the
        same at all steps of a sequence (DropConnect).

    Returns:
      The new carry, and the hidden state as output.

    Raises:
      ValueError: when an argument does not fit.
    """
    hyperparameters = self.hyperparameters if hyperparameters is None else hyperparameters
    recurrent_mask = self.recurrent_mask if recurrent_mask is None else recurrent_mask
    memory, hidden = carry
    total = BestResponseDense(4 * self.features, use_scale=False, name="input")(inputs, hyperparameters)
    total += BestResponseDense(4 * self.features, use_scale=False, name="recurrent")(
      hidden, hyperparameters, recurrent_mask
    )
    write, keep, candidate, read = jnp.split(total, 4, axis=-1)
    memory = jax.nn.sigmoid(keep) * memory + jax.nn.sigmoid(write) * jnp.tanh(candidate)
    hidden = jax.nn.sigmoid(read) * jnp.tanh(memory)
    return (memory, hidden), hidden

  @nn.nowrap
  def initialize_carry(self, rng: jax.Array, input_shape: Sequence[int]) -> tuple[jax.Array, jax.Array]:
    """Zero memory and hidden state, float32, for inputs `[..., inputs]` of a shape; the key is not used."""
    del rng
    zeros = jnp.zeros((*input_shape[:-1], self.features))
    return zeros, zeros

  @property
  def num_feature_axes(self) -> int:
    """1: the last axis of the inputs holds features."""
    return 1


def materialize_best_response(params: Mapping[str, ArrayLike], hyperparameters: ArrayLike) -> dict[str, jax.Array]:
  """The weights of an ordinary layer, `W(lambda) = s W + (lambda V) * R`, at one value of the hyperparameters.

  >>> import jax, jax.numpy as jnp
  >>> layer, inputs, hyperparameters = BestResponseDense(3), jnp.ones((4, 5)), jnp.array([1.0, -2.0])
  >>> params = layer.init(jax.random.key(0), inputs, hyperparameters)["params"]
  >>> plain = nn.Dense(3).apply({"params": materialize_best_response(params, hyperparameters)}, inputs)
  >>> bool(jnp.allclose(plain, layer.apply({"params": params}, inputs, hyperparameters), atol=1e-5))
  True

  Args:
    params: of one `BestResponseDense`, `BestResponseConv` or `BestResponseEmbed`.
    hyperparameters: unconstrained, floating `[H]`.

  Returns:
    `kernel` and `bias`, or `embedding`, as `nn.Dense`, `nn.Conv` and `nn.Embed` take them.

  Raises:
    ValueError: when the hyperparameters are not a vector.

  Reference: MacKay, Vicol, Lorraine, Duvenaud, Grosse, "Self-Tuning Networks: Bilevel Optimization of Hyperparameters
    using Structured Best-Response Functions", ICLR 2019, the structured best response.
  """
  _check_hyperparameters(hyperparameters, ())
  scale = params.get("scale", 1)
  return {
    name: scale * params[name] + (hyperparameters @ params[f"{name}_gate"]) * params[f"response_{name}"]
    for name in ("kernel", "bias", "embedding")
    if name in params
  }


def _respond(layer, linear: Callable, shape, inputs, hyperparameters):
  """Elementary and gated part of a layer whose map without bias is `linear(kernel)`."""
  draw, features = _uniform(math.prod(shape[:-1]) ** -0.5), shape[-1]
  cast = lambda array: array.astype(inputs.dtype)
  outputs = linear(layer.param("kernel", draw, shape))
  if layer.use_bias:
    outputs += cast(layer.param("bias", draw, (features,)))
  if layer.use_scale:
    outputs *= cast(layer.param("scale", nn.initializers.ones, ()))
  if hyperparameters is None:
    return outputs
  _check_hyperparameters(hyperparameters, inputs.shape[:-1])
  gate = _gate(layer, "kernel_gate", hyperparameters, features)
  outputs += cast(_align(gate, outputs.ndim)) * linear(layer.param("response_kernel", draw, shape))
  if layer.use_bias:
    gated = _gate(layer, "bias_gate", hyperparameters, features) * layer.param("response_bias", draw, (features,))
    outputs += cast(_align(gated, outputs.ndim))
  return outputs


def _gate(layer, name, hyperparameters, features):
  weights = layer.param(name, nn.initializers.normal(GATE_SCALE), (hyperparameters.shape[-1], features))
  # Not in bfloat16: gates are small and differ little between neighbouring hyperparameters.
  wide = jnp.promote_types(hyperparameters.dtype, jnp.float32)
  return hyperparameters.astype(wide) @ weights.astype(jnp.promote_types(weights.dtype, wide))


def _align(gate, ndim):
  """`[examples, features]` with axes of size 1 in between, so that it broadcasts against the outputs."""
  return jnp.expand_dims(gate, tuple(range(gate.ndim - 1, ndim - 1)))


def _uniform(bound):
  def draw(key, shape, dtype=jnp.float32):
    return jax.random.uniform(key, shape, dtype, -bound, bound)

  return draw


def _check_hyperparameters(hyperparameters, leading):
  check_float("hyperparameters", hyperparameters)
  shape = jnp.shape(hyperparameters)
  if not shape or shape[:-1] != tuple(leading)[: len(shape) - 1]:
    raise ValueError(
      f"hyperparameters must have shape [H] or leading axes of the inputs' {tuple(leading)} before H, got {shape}."
    )
