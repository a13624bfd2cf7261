"""Networks with their kernels: one description gives initial parameters, the finite network and the infinite one.

A `WideLayer` is three functions; layers compose in series and in parallel to layers again:

>>> import jax, jax.numpy as jnp
>>> from jaxreg.kernels.dual_activations import relu_dual
>>> network = serial(wide_dense(512, weight_variance=2.0), wide_activation(relu_dual()), wide_dense(1))
>>> inputs = jnp.eye(3)
>>> params, shape = network.init(jax.random.key(0), inputs.shape)
>>> network.apply(params, inputs).shape, shape, network_kernel(network)(inputs).ntk.shape
((3, 1), (3, 1), (3, 3))
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxreg.checks import as_array, check_hyperparameter
from jaxreg.kernels import convolutional, infinite_width
from jaxreg.kernels.dual_activations import DualActivation, check_dual
from jaxreg.kernels.empirical import empirical_ntk
from jaxreg.kernels.infinite_width import KernelState
from jaxreg.metrics.sizes import static_integer

__all__ = [
  "WideLayer",
  "monte_carlo_kernels",
  "network_kernel",
  "parallel",
  "serial",
  "wide_activation",
  "wide_average_pool",
  "wide_convolution",
  "wide_dense",
  "wide_flatten",
  "wide_global_average_pool",
  "wide_identity",
]


class WideLayer(NamedTuple):
  """A layer, or a network of them, of finite and of infinite width.

  Attributes:
    init: `(key, shape of the inputs) -> (params, shape of the outputs)`, shapes with the axis of inputs first.
    apply: `(params, inputs) -> outputs`.
    kernel: `state -> state`, a `KernelState` of the inputs to that of the outputs as the width grows.
  """

  init: Callable
  apply: Callable
  kernel: Callable


def network_kernel(network: WideLayer, *, start: Callable = infinite_width.input_state) -> Callable:
  """The kernel function of a whole network, `(inputs1, inputs2=None) -> KernelState`, also for `tiled_gram`.

  >>> import jax.numpy as jnp
  >>> network_kernel(wide_dense(8, weight_variance=2.0))(jnp.array([[1.0, 1.0]])).covariance.tolist()
  [[2.0]]

  Args:
    network: static.
    start: static; the state of the inputs: `input_state` for vectors, `image_state` for images that are averaged over
      positions later, `pixel_state` for those that are only flattened.

  Returns:
    The function.

  Reference: Novak et al., "Neural Tangents: Fast and Easy Infinite Neural Networks in Python", ICLR 2020, Section 2.1.
  """
  return lambda inputs1, inputs2=None: network.kernel(start(inputs1, inputs2))


def serial(*layers: WideLayer) -> WideLayer:
  """Layers one after the other.

  >>> serial(wide_dense(4), wide_dense(2)).init(jax.random.key(0), (5, 3))[1]
  (5, 2)

  Args:
    *layers: static.

  Returns:
    The network; its parameters are a list of those of the layers.

  Reference: none (composition).
  """

  def init(key, shape):
    params = []
    for index, layer in enumerate(layers):
      own, shape = layer.init(jax.random.fold_in(key, index), shape)
      params.append(own)
    return params, shape

  def apply(params, inputs):
    for own, layer in zip(params, layers, strict=True):
      inputs = layer.apply(own, inputs)
    return inputs

  def kernel(state):
    for layer in layers:
      state = layer.kernel(state)
    return state

  return WideLayer(init, apply, kernel)


def parallel(*branches: WideLayer) -> WideLayer:
  """The sum of the branches' outputs on the same inputs; with `wide_identity()` as one of them a residual block.

  For the kernel all branches but one must end in a dense layer or a convolution.

  >>> block = parallel(wide_identity(), wide_dense(3))
  >>> block.init(jax.random.key(0), (5, 3))[1]
  (5, 3)

  Args:
    *branches: static; at least one, with outputs of the same shape.

  Returns:
    The network; its parameters are a list of those of the branches.

  Raises:
    ValueError: without a branch, and by `init` when the outputs' shapes differ.

  Reference: none (independent Gaussian processes add their covariances).
  """
  if not branches:
    raise ValueError("branches must be at least one layer.")

  def init(key, shape):
    params, shapes = zip(*(b.init(jax.random.fold_in(key, i), shape) for i, b in enumerate(branches)), strict=True)
    if len(set(shapes)) > 1:
      raise ValueError(f"branches must have outputs of the same shape, got {shapes}.")
    return list(params), shapes[0]

  def apply(params, inputs):
    return sum(branch.apply(own, inputs) for own, branch in zip(params, branches, strict=True))

  def kernel(state):
    first, *others = (branch.kernel(state) for branch in branches)
    for other in others:
      first = infinite_width.add_states(first, other)
    return first

  return WideLayer(init, apply, kernel)


def wide_identity() -> WideLayer:
  """The layer that changes nothing.

  >>> wide_identity().apply((), 3.0)
  3.0

  Returns:
    The layer.

  Reference: none.
  """
  return _without_parameters(lambda shape: shape, lambda inputs: inputs, lambda state: state)


def _without_parameters(shape_of, function, kernel):
  return WideLayer(lambda key, shape: ((), shape_of(shape)), lambda params, inputs: function(inputs), kernel)


def wide_dense(width: int, *, weight_variance: ArrayLike = 1.0, bias_variance: ArrayLike = 0.0) -> WideLayer:
  """A dense layer in NTK parameterization, `y = sqrt(weight_variance / n) x W + sqrt(bias_variance) b`.

  >>> params, shape = wide_dense(4).init(jax.random.key(0), (5, 3))
  >>> params["weights"].shape, params["bias"].shape, shape
  ((3, 4), (4,), (5, 4))

  Args:
    width: static; number of outputs.
    weight_variance: as in `dense`.
    bias_variance: as in `dense`.

  Returns:
    The layer; its parameters are standard normal, the bias among them also at `bias_variance` 0, where it does nothing.

  Raises:
    ValueError: when an argument is out of range.

  Reference: Jacot, Gabriel, Hongler, "Neural Tangent Kernel: Convergence and Generalization in Neural Networks",
    NeurIPS 2018, Section 3.
  """
  width = static_integer("width", width, low=1)
  options = _variances(weight_variance, bias_variance)

  def init(key, shape):
    return _normal_params(key, (shape[-1], width)), (*shape[:-1], width)

  def apply(params, inputs):
    scale = jnp.sqrt(options["weight_variance"] / inputs.shape[-1])
    return scale * inputs @ params["weights"] + jnp.sqrt(options["bias_variance"]) * params["bias"]

  return WideLayer(init, apply, lambda state: infinite_width.dense(state, **options))


def _variances(weight_variance, bias_variance):
  check_hyperparameter("weight_variance", weight_variance, low=0)
  check_hyperparameter("bias_variance", bias_variance, low=0)
  return {"weight_variance": weight_variance, "bias_variance": bias_variance}


def _normal_params(key, shape):
  keys = jax.random.split(key)
  return {"weights": jax.random.normal(keys[0], shape), "bias": jax.random.normal(keys[1], shape[-1:])}


def wide_activation(dual: DualActivation) -> WideLayer:
  """An elementwise activation, with the kernel of its dual.

  >>> from jaxreg.kernels.dual_activations import relu_dual
  >>> wide_activation(relu_dual()).apply((), jnp.array([-1.0, 2.0])).tolist()
  [0.0, 2.0]

  Args:
    dual: static; the activation's dual.

  Returns:
    The layer.

  Raises:
    ValueError: when `dual` is not a dual activation.

  Reference: Lee et al., "Wide Neural Networks of Any Depth Evolve as Linear Models Under Gradient Descent", NeurIPS
    2019, Appendix E.
  """
  check_dual(dual)
  return _without_parameters(lambda shape: shape, dual.activation, lambda s: infinite_width.activate(s, dual))


def wide_convolution(
  channels: int,
  *,
  size: int,
  stride: int = 1,
  padding: str | int | Sequence = "SAME",
  weight_variance: ArrayLike = 1.0,
  bias_variance: ArrayLike = 0.0,
) -> WideLayer:
  """A convolution in NTK parameterization, with the kernel of `convolution`.

  >>> wide_convolution(4, size=3, stride=2).init(jax.random.key(0), (5, 8, 6, 3))[1]
  (5, 4, 3, 4)

  Args:
    channels: static; number of outputs per position.
    size, stride, padding, weight_variance, bias_variance: as in `convolution`.

  Returns:
    The layer, of images `[inputs, height, width, channels]`.

  Raises:
    ValueError: when an argument is out of range.

  Reference: Arora, Du, Hu, Li, Salakhutdinov, Wang, "On Exact Computation with an Infinitely Wide Neural Net", NeurIPS
    2019, Section 4.
  """
  channels = static_integer("channels", channels, low=1)
  options = _variances(weight_variance, bias_variance)
  window = {"size": size, "stride": stride, "padding": padding}
  patches = lambda images: convolutional.image_patches(images, **window)

  def init(key, shape):
    seen = jax.eval_shape(patches, jax.ShapeDtypeStruct(shape, jnp.float32)).shape
    return _normal_params(key, (seen[-1], channels)), (*seen[:-1], channels)

  inner = wide_dense(channels, **options)  # on the windows as channels
  apply = lambda params, images: inner.apply(params, patches(images))
  return WideLayer(init, apply, lambda state: convolutional.convolution(state, **window, **options))


def wide_flatten() -> WideLayer:
  """All positions and channels as one vector.

  >>> wide_flatten().init(jax.random.key(0), (5, 2, 2, 3))[1]
  (5, 12)

  Returns:
    The layer.

  Reference: Novak et al., "Bayesian Deep Convolutional Networks with Many Channels are Gaussian Processes", ICLR 2019,
    Section 3.1.
  """
  flat = lambda shape: (shape[0], math.prod(shape[1:]))
  return _without_parameters(flat, lambda x: x.reshape(flat(x.shape)), convolutional.flatten)


def wide_global_average_pool() -> WideLayer:
  """The mean over all positions; the kernel needs covariances of all pairs of them, from `image_state`.

  >>> wide_global_average_pool().init(jax.random.key(0), (5, 2, 2, 3))[1]
  (5, 3)

  Returns:
    The layer.

  Reference: Novak et al., "Bayesian Deep Convolutional Networks with Many Channels are Gaussian Processes", ICLR 2019,
    Section 3.2.1.
  """
  shape_of = lambda shape: (shape[0], shape[-1])
  return _without_parameters(shape_of, lambda x: x.mean((1, 2)), convolutional.global_average_pool)


def wide_average_pool(*, size: int) -> WideLayer:
  """Averages over disjoint windows; the kernel needs covariances of all pairs of positions, from `image_state`.

  >>> wide_average_pool(size=2).init(jax.random.key(0), (5, 4, 2, 3))[1]
  (5, 2, 1, 3)

  Args:
    size: static; height and width of a window, a divisor of the images'.

  Returns:
    The layer.

  Raises:
    ValueError: when `size` is not positive.

  Reference: Novak et al., "Bayesian Deep Convolutional Networks with Many Channels are Gaussian Processes", ICLR 2019,
    Section 3.2 (projection).
  """
  size = static_integer("size", size, low=1)
  shape_of = lambda shape: (shape[0], shape[1] // size, shape[2] // size, shape[3])

  def pool(x):
    n, h, w, c = x.shape
    return x.reshape(n, h // size, size, w // size, size, c).mean((2, 4))

  return _without_parameters(shape_of, pool, lambda state: convolutional.average_pool(state, size=size))


def monte_carlo_kernels(
  key: jax.Array,
  init: Callable,
  apply: Callable,
  inputs1: ArrayLike,
  inputs2: ArrayLike | None = None,
  *,
  samples: int,
) -> KernelState:
  """NNGP and tangent kernel of any architecture, as means over random finite networks and over their outputs.

  The error falls as the root of `samples` times outputs; width makes the tangent kernel's mean that of the limit.

  >>> network = serial(wide_dense(64), wide_dense(10))
  >>> init = lambda key: network.init(key, (1, 3))[0]
  >>> monte_carlo_kernels(jax.random.key(0), init, network.apply, jnp.eye(3), samples=4).ntk.shape
  (3, 3)

  Args:
    key: of all initial parameters.
    init: static; `key -> params`, a tree of arrays.
    apply: static; `(params, inputs) -> [inputs, outputs]` or `[inputs]`.
    inputs1: `[inputs1, ...]`.
    inputs2: `[inputs2, ...]`, or None for `inputs1` with itself.
    samples: static; number of networks, one after the other.

  Returns:
    State of shape `[inputs1, inputs2]`, as `fully_connected` gives it.

  Raises:
    ValueError: when `samples` is not positive or the outputs do not fit.

  Reference: Novak et al., "Bayesian Deep Convolutional Networks with Many Channels are Gaussian Processes", ICLR 2019,
    Section 4; Novak et al., "Neural Tangents: Fast and Easy Infinite Neural Networks in Python", ICLR 2020.
  """
  samples = static_integer("samples", samples, low=1)
  inputs1 = as_array("inputs1", inputs1)
  second = inputs1 if inputs2 is None else as_array("inputs2", inputs2)

  def one(key) -> Any:
    params = init(key)
    outputs = [apply(params, x) for x in (inputs1, second)]
    axes = (-1,) if outputs[0].ndim == 2 else ()
    ntk = empirical_ntk(apply, params, inputs1, inputs2, trace_axes=axes)
    first, other = (x.reshape(len(x), -1).astype(ntk.dtype) for x in outputs)
    covariance = jnp.matmul(first, other.T, precision="highest") / first.shape[1]
    return KernelState(covariance, jnp.mean(jnp.square(first), 1), jnp.mean(jnp.square(other), 1), ntk)

  keys = jax.random.split(key, samples)
  shapes = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(one, keys[0]))
  total, _ = jax.lax.scan(lambda total, key: (jax.tree.map(jnp.add, total, one(key)), None), shapes, keys)
  return jax.tree.map(lambda x: x / samples, total)
