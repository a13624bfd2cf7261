"""Weight compander: weights as a bounded, odd, increasing function of the parameters that are trained.

The function is steep at zero and flat at its bound, so that small weights move away from zero and no weight dominates.
`compander_init` and `fold_params` reparameterize the parameters of any model, `Companded` one layer inside a model, and
`transforms.weight_compander.compand_weights` an optimizer whose caller keeps the plain weights.

The function `a arctan(v / b)` and the learning of `a` and `b` for each layer are unverified: the paper's text was not
at hand. The curve can therefore be exchanged.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxreg.checks import check_float, check_hyperparameter
from jaxreg.metrics.weights import he_deviation, input_axes, is_kernel, parameter_name

__all__ = [
  "ARCTAN",
  "Companded",
  "CompandedParams",
  "Curve",
  "SOFTSIGN",
  "TANH",
  "compand",
  "compander_init",
  "fold_params",
  "uncompand",
]

_LARGEST_INITIAL = 0.95  # of the bound; beyond it the slope is too small for a weight to come back


@dataclasses.dataclass(frozen=True)
class Curve:
  """An odd, bounded, increasing function with slope 1 at zero.

  Attributes:
    name: for messages.
    function: of an array.
    slope: its derivative.
    inverse: its inverse on `(-limit, limit)`.
    limit: its least upper bound.

  Reference: none.
  """

  name: str
  function: Callable[[jax.Array], jax.Array]
  slope: Callable[[jax.Array], jax.Array]
  inverse: Callable[[jax.Array], jax.Array]
  limit: float

  def __repr__(self):
    return self.name


ARCTAN = Curve("arctan", jnp.arctan, lambda u: 1 / (1 + u * u), jnp.tan, math.pi / 2)
TANH = Curve("tanh", jnp.tanh, lambda u: 1 - jnp.tanh(u) ** 2, jnp.arctanh, 1.0)
SOFTSIGN = Curve(
  "softsign", lambda u: u / (1 + jnp.abs(u)), lambda u: 1 / (1 + jnp.abs(u)) ** 2, lambda r: r / (1 - jnp.abs(r)), 1.0
)


def compand(values: ArrayLike, *, amplitude: ArrayLike, width: ArrayLike, curve: Curve = ARCTAN) -> jax.Array:
  """The weights `w = a arctan(v / b)` of parameters `v`, with `|w| < a pi / 2` and slope `a / b` at zero.

  >>> import jax.numpy as jnp
  >>> [round(w, 3) for w in compand(jnp.array([-1.0, 0.0, 1e30]), amplitude=2.0, width=1.0).tolist()]
  [-1.571, 0.0, 3.142]

  Args:
    values: floating `[...]`, the parameters v.
    amplitude: positive a, broadcasting against `values`; may be traced.
    width: positive b, broadcasting against `values`; may be traced.
    curve: static; the function, `ARCTAN`, `TANH`, `SOFTSIGN` or another `Curve`.

  Returns:
    `[...]`, the weights, strictly inside their bound up to rounding to the dtype of `values`.

  Raises:
    ValueError: when `values` are not floating point, or the amplitude or the width is not positive.

  Reference: Cakaj, Mehnert, Yang, "Weight Compander: A Simple Weight Reparameterization for Regularization",
    IJCNN 2023; the function is unverified.
  """
  values, (wide, amplitude, width) = _checked("values", values, amplitude, width)
  return _compand(wide, amplitude, width, curve).astype(values.dtype)


def uncompand(weights: ArrayLike, *, amplitude: ArrayLike, width: ArrayLike, curve: Curve = ARCTAN) -> jax.Array:
  """The parameters `v = b tan(w / a)` of weights `w`, the inverse of `compand`.

  A weight at or beyond the bound `a pi / 2` has no parameter; it gets that of the last weight inside, and no gradient.

  >>> import jax.numpy as jnp
  >>> weights = compand(jnp.array([-3.0, 0.5]), amplitude=2.0, width=1.0)
  >>> [round(v, 4) for v in uncompand(weights, amplitude=2.0, width=1.0).tolist()]
  [-3.0, 0.5]

  Args:
    weights: floating `[...]`.
    amplitude: positive a, broadcasting against `weights`; may be traced.
    width: positive b, broadcasting against `weights`; may be traced.
    curve: static; the function.

  Returns:
    `[...]`, the parameters.

  Raises:
    ValueError: when `weights` are not floating point, or the amplitude or the width is not positive.

  Reference: Cakaj, Mehnert, Yang, "Weight Compander: A Simple Weight Reparameterization for Regularization",
    IJCNN 2023; the function is unverified.
  """
  weights, (wide, amplitude, width) = _checked("weights", weights, amplitude, width)
  limit = curve.limit * (1 - 4 * jnp.finfo(wide.dtype).eps)
  inside = ~(jnp.abs(wide) >= limit * amplitude)
  ratio = jnp.where(inside, wide, 0) / amplitude
  last = curve.inverse(jnp.full_like(ratio, limit))
  return (width * jnp.where(inside, curve.inverse(ratio), jnp.sign(wide) * last)).astype(weights.dtype)


class CompandedParams(NamedTuple):
  """A model's parameters with companded kernels.

  The scales are positive, so their logarithms are what is trained. For an optimizer, `CompandedParams(raw="weights",
  log_amplitude="scales", log_width="scales")` is a label tree of `optax.multi_transform`.

  Attributes:
    raw: the parameters, with v in place of each companded kernel.
    log_amplitude: path of a kernel -> scalar log a.
    log_width: path of a kernel -> scalar log b.

  Reference: Cakaj, Mehnert, Yang, "Weight Compander: A Simple Weight Reparameterization for Regularization",
    IJCNN 2023.
  """

  raw: Any
  log_amplitude: dict[str, jax.Array]
  log_width: dict[str, jax.Array]


def compander_init(
  params,
  *,
  deviations: ArrayLike = 1.5,
  slope: ArrayLike = 1.0,
  select: Callable[[str, jax.Array], bool] = is_kernel,
  in_axes: Callable[[str, jax.Array], tuple[int, ...]] = input_axes,
  curve: Curve = ARCTAN,
) -> CompandedParams:
  """Companded parameters whose weights are those given, up to a clip at 0.95 of the bound.

  Each kernel has `a = deviations sqrt(2 / fan_in)` and `b = a / slope`.

  >>> import jax.numpy as jnp
  >>> params = {"Dense_0": {"kernel": jnp.array([[0.5], [-9.0]]), "bias": jnp.zeros(1)}}
  >>> companded = compander_init(params)
  >>> list(companded.log_amplitude), [round(w, 3) for w in fold_params(companded)["Dense_0"]["kernel"][:, 0].tolist()]
  (['Dense_0/kernel'], [0.5, -2.238])

  Args:
    params: pytree of floating arrays: Linen's, an `nnx.State`, or the arrays of an Equinox module
      (`eqx.filter(model, eqx.is_array)`).
    deviations: positive amplitude in He standard deviations, 1.5 to 3; may be traced.
    slope: positive slope a / b at zero, by which the rate of small weights grows squared; may be traced.
    select: static; `(path, leaf) -> bool`, the parameters to compand.
    in_axes: static; `(path, leaf) -> axes` that the layer sums over, whose sizes make the fan-in.
    curve: static; the function.

  Returns:
    The companded parameters; `raw` has the dtypes of `params`, the scales are float32 at least.

  Raises:
    ValueError: when a selected parameter is not floating point, nothing is selected, or `deviations` or `slope` is not
      positive.

  Reference: Cakaj, Mehnert, Yang, "Weight Compander: A Simple Weight Reparameterization for Regularization",
    IJCNN 2023; tying the scales to He's deviation is ours.
  """
  check_hyperparameter("deviations", deviations, low=0, open_low=True)
  check_hyperparameter("slope", slope, low=0, open_low=True)
  log_amplitude, log_width = {}, {}

  def reparameterize(path, leaf):
    name = parameter_name(path)
    if not select(name, leaf):
      return leaf
    check_float(f"params[{name}]", leaf)
    dtype = jnp.promote_types(jnp.result_type(leaf), jnp.float32)
    amplitude = jnp.asarray(deviations, dtype) * he_deviation(jnp.shape(leaf), in_axes=in_axes(name, leaf))
    log_amplitude[name], log_width[name] = jnp.log(amplitude), jnp.log(amplitude / slope)
    # Through the logarithms, so that folding finds the same scales.
    return _invert(leaf, jnp.exp(log_amplitude[name]), jnp.exp(log_width[name]), curve)

  raw = jax.tree_util.tree_map_with_path(reparameterize, params)
  if jax.tree.leaves(params) and not log_amplitude:
    names = ", ".join(parameter_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(params))
    raise ValueError(f"select must choose parameters to compand, got none of {names or 'an array without a name'}.")
  return CompandedParams(raw, log_amplitude, log_width)


def fold_params(companded: CompandedParams, *, curve: Curve = ARCTAN):
  """The weights of companded parameters, in the loss while training and once afterwards for inference.

  >>> import jax, jax.numpy as jnp
  >>> companded = compander_init({"kernel": jnp.array([[0.5], [0.25]])})
  >>> loss = lambda companded: jnp.sum(fold_params(companded)["kernel"] ** 2)
  >>> jax.grad(loss)(companded).raw["kernel"].shape
  (2, 1)

  Args:
    companded: what `compander_init` made.
    curve: static; the function.

  Returns:
    Parameters as the model has them.

  Raises:
    ValueError: when a companded parameter is not floating point.

  Reference: Cakaj, Mehnert, Yang, "Weight Compander: A Simple Weight Reparameterization for Regularization",
    IJCNN 2023.
  """

  def fold(path, leaf):
    name = parameter_name(path)
    if name not in companded.log_amplitude:
      return leaf
    amplitude, width = jnp.exp(companded.log_amplitude[name]), jnp.exp(companded.log_width[name])
    return compand(leaf, amplitude=amplitude, width=width, curve=curve)

  return jax.tree_util.tree_map_with_path(fold, companded.raw)


class Companded(nn.Module):
  """A layer with companded kernels; its parameters keep their names and hold v in place of the kernel.

  >>> import flax.linen as nn, jax, jax.numpy as jnp
  >>> layer = Companded(nn.Dense(3), learned=True)
  >>> params = layer.init(jax.random.key(0), jnp.ones((2, 4)))["params"]
  >>> sorted(params), sorted(params["layer"])
  (['kernel_log_amplitude', 'kernel_log_width', 'layer'], ['bias', 'kernel'])

  Attributes:
    layer: the wrapped module.
    deviations: amplitude in He standard deviations.
    slope: slope at zero.
    learned: whether amplitude and width are parameters; give them a tenth of the learning rate and no decay.
    select: `(path, leaf) -> bool`, which of the layer's parameters are companded.
    in_axes: `(path, leaf) -> axes` that the layer sums over, whose sizes make the fan-in.
    curve: the function.

  Reference: Cakaj, Mehnert, Yang, "Weight Compander: A Simple Weight Reparameterization for Regularization",
    IJCNN 2023.
  """

  layer: nn.Module
  deviations: float = 1.5
  slope: float = 1.0
  learned: bool = False
  select: Callable[[str, jax.Array], bool] = is_kernel
  in_axes: Callable[[str, jax.Array], tuple[int, ...]] = input_axes
  curve: Curve = ARCTAN

  @nn.compact
  def __call__(self, *args, **kwargs):
    check_hyperparameter("deviations", self.deviations, low=0, open_low=True)
    check_hyperparameter("slope", self.slope, low=0, open_low=True)
    call = nn.map_variables(
      lambda layer: layer(*args, **kwargs),
      "params",
      trans_in_fn=lambda variables: jax.tree_util.tree_map_with_path(self._fold, variables),
      trans_out_fn=lambda variables: jax.tree_util.tree_map_with_path(self._unfold, variables),
      init=self.is_initializing(),
    )
    return call(self.layer)

  def _fold(self, path, leaf):
    name = parameter_name(path[1:])  # the first name is the collection's
    if not self.select(name, leaf):
      return leaf
    amplitude, width = self._scales(name, leaf)
    if self.learned:
      amplitude, width = (
        jnp.exp(self.param(f"{name.replace('/', '_')}_log_{kind}", lambda _, value=value: jnp.log(jnp.float32(value))))
        for kind, value in (("amplitude", amplitude), ("width", width))
      )
    return compand(leaf, amplitude=amplitude, width=width, curve=self.curve)

  def _unfold(self, path, leaf):
    name = parameter_name(path[1:])
    return _invert(leaf, *self._scales(name, leaf), self.curve) if self.select(name, leaf) else leaf

  def _scales(self, name, leaf):
    amplitude = self.deviations * he_deviation(leaf.shape, in_axes=self.in_axes(name, leaf))
    return amplitude, amplitude / self.slope


def _invert(weights, amplitude, width, curve):
  """`uncompand` of weights clipped to where the slope still lets them move."""
  wide = jnp.asarray(weights, jnp.promote_types(jnp.result_type(weights), jnp.float32))
  largest = jnp.asarray(_LARGEST_INITIAL * curve.limit * amplitude, wide.dtype)
  clipped = jnp.clip(wide, -largest, largest)
  return uncompand(clipped, amplitude=amplitude, width=width, curve=curve).astype(weights.dtype)


def _broadcasts(shape, target):
  return len(shape) <= len(target) and all(a in (1, b) for a, b in zip(shape[::-1], target[::-1]))


def _checked(name, array, amplitude, width):
  """The array, and it with both scales as float32 at least, in one shape."""
  check_float(name, array)
  check_hyperparameter("amplitude", amplitude, low=0, open_low=True)
  check_hyperparameter("width", width, low=0, open_low=True)
  array = jnp.asarray(array)
  for scale_name, scale in (("amplitude", amplitude), ("width", width)):
    if not _broadcasts(jnp.shape(scale), array.shape):
      raise ValueError(f"{scale_name} must broadcast against {name} {array.shape}, got shape {jnp.shape(scale)}.")
  dtype = jnp.promote_types(array.dtype, jnp.float32)
  return array, tuple(jnp.broadcast_to(jnp.asarray(x, dtype), array.shape) for x in (array, amplitude, width))


@functools.partial(jax.custom_jvp, nondiff_argnums=(3,))
def _compand(values, amplitude, width, curve):
  """Strictly inside the bound: the rounded limit of the curve may lie outside."""
  limit = curve.limit * (1 - 2 * jnp.finfo(values.dtype).eps)
  return amplitude * jnp.clip(curve.function(_ratio(values, width)), -limit, limit)


@_compand.defjvp
def _compand_jvp(curve, primals, tangents):
  # Written out, because autodiff of v / b is 0 times infinity where the quotient overflows.
  values, amplitude, width = primals
  ratio = _ratio(values, width)
  steep = amplitude / width * curve.slope(ratio)
  change = steep * tangents[0] + curve.function(ratio) * tangents[1] - steep * ratio * tangents[2]
  return _compand(values, amplitude, width, curve), change


def _ratio(values, width):
  largest = float(jnp.finfo(values.dtype).max) ** 0.45  # whose square is finite
  return jnp.clip(values / width, -largest, largest)
