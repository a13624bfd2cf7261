"""KRnet: a normalizing flow on a box, of triangular structure, that can be sampled and evaluated."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxreg.checks import check_float

__all__ = ["ActNorm", "AffineCoupling", "BoundedSupport", "KRnet", "PiecewiseQuadraticCDF"]

RATIO = 1.2  # of the widths of neighbouring cells of the CDF
BOUND = 50.0  # outside of [-BOUND, BOUND] the CDF layer is the identity
STRENGTH = 0.6  # of a coupling's scaling, below 1


class BoundedSupport(nn.Module):
  """The logit of the affine map of a box onto (0, 1).

  >>> layer = BoundedSupport(low=-1.0, high=1.0)
  >>> layer.apply({}, jnp.zeros((1, 2)))[0].tolist(), layer.apply({}, jnp.zeros((1, 2)), method="inverse").tolist()
  ([[0.0, 0.0]], [[0.0, 0.0]])

  Attributes:
    low: lower bound, one number for every coordinate or a tuple of one per coordinate; somewhat below that of the
      domain, as densities vanish there.
    high: upper bound, likewise.
    clip: distance in (0, 1) that points keep from its ends.

  Reference: Tang, Wan, Yang, "DAS-PINNs: A Deep Adaptive Sampling Method for Solving High-Dimensional Partial
    Differential Equations", JCP 2023; as in the authors' code.
  """

  low: float | tuple[float, ...]
  high: float | tuple[float, ...]
  clip: float = 1e-6

  def setup(self):
    if not np.all(np.less(self.low, self.high)):
      raise ValueError(f"low must be below high, got {self.low} and {self.high}.")

  def __call__(self, points: ArrayLike) -> tuple[jax.Array, jax.Array]:
    """Unbounded values and the log determinant of points `[n, d]`: `[n, d]`, `[n]`."""
    # 1 - 1e-10 is 1 in float32.
    clip = max(self.clip, jnp.finfo(points.dtype).eps)
    wide = points.astype(jnp.promote_types(points.dtype, jnp.float32))
    low, size = self._box(wide)
    share = jnp.clip((wide - low) / size, clip, 1 - clip)
    log, log_rest = jnp.log(share), jnp.log1p(-share)
    logdet = -jnp.sum(log + log_rest + jnp.log(size), axis=-1)
    return (log - log_rest).astype(points.dtype), logdet.astype(points.dtype)

  def inverse(self, values: ArrayLike) -> jax.Array:
    """The points of unbounded values."""
    low, size = self._box(values)
    return low + size * jax.nn.sigmoid(values)

  def _box(self, points):
    """The lower bound and the length of every coordinate, `[d]`."""
    bounds = {"low": np.asarray(self.low, np.float64), "high": np.asarray(self.high, np.float64)}
    for name, bound in bounds.items():
      if bound.shape not in ((), points.shape[-1:]):
        raise ValueError(f"{name} must be a number or {points.shape[-1]} numbers, got {bound.tolist()}.")
    low, high = (np.broadcast_to(bound, points.shape[-1:]) for bound in bounds.values())
    return jnp.asarray(low, points.dtype), jnp.asarray(high - low, points.dtype)


class ActNorm(nn.Module):
  """The affine map `(x + shift) exp(log_scale)` of every coordinate; its first values come from the batch of `init`.

  >>> layer, points = ActNorm(2), jnp.array([[0.0, 4.0], [2.0, 8.0]])
  >>> layer.apply(layer.init(jax.random.key(0), points), points)[0].mean(0).tolist()
  [0.0, 0.0]

  Attributes:
    features: number of coordinates.

  Reference: Kingma, Dhariwal, "Glow: Generative Flow with Invertible 1x1 Convolutions", NeurIPS 2018, Section 3.1; with
    a third of the logarithm of the scale, as in the code of Tang, Wan and Yang.
  """

  features: int

  def setup(self):
    zeros, shape = nn.initializers.zeros, (self.features,)
    self.shift = self.param("shift", zeros, shape)
    self.log_scale = self.param("log_scale", zeros, shape)
    self.first_shift = self.variable("first", "shift", jnp.zeros, shape)
    self.first_log_scale = self.variable("first", "log_scale", jnp.zeros, shape)

  def __call__(self, points: ArrayLike) -> tuple[jax.Array, jax.Array]:
    """Values and the log determinant of points `[n, features]`: `[n, features]`, `[n]`."""
    if self.is_initializing():
      self.first_shift.value = -jnp.mean(points, axis=0)
      self.first_log_scale.value = -jnp.log(jnp.std(points, axis=0) + 1e-6) / 3
    shift, log_scale = self._map()
    return (points + shift) * jnp.exp(log_scale), jnp.full(len(points), jnp.sum(log_scale))

  def inverse(self, values: ArrayLike) -> jax.Array:
    """The points of values."""
    shift, log_scale = self._map()
    return values * jnp.exp(-log_scale) - shift

  def _map(self):
    first_shift, first_log_scale = jax.lax.stop_gradient((self.first_shift.value, self.first_log_scale.value))
    return self.shift + first_shift, jnp.clip(self.log_scale + first_log_scale, -5, 5)


class AffineCoupling(nn.Module):
  """The last coordinates scaled by `1 + 0.6 tanh` and shifted by `exp(log_gamma) tanh` of a network of the first ones.

  >>> layer, points = AffineCoupling(features=3, split=1, width=8), jnp.ones((2, 3))
  >>> variables = jax.jit(layer.init)(jax.random.key(0), points)
  >>> values, logdet = jax.jit(layer.apply)(variables, points)
  >>> values.shape, logdet.shape
  ((2, 3), (2,))

  Attributes:
    features: number of coordinates.
    split: how many of them stay as they are.
    width: of the two hidden layers.

  Reference: Tang, Wan, Liao, "Deep Density Estimation via Invertible Block-Triangular Mapping", Theoretical and Applied
    Mechanics Letters 2020; as in the authors' code.
  """

  features: int
  split: int
  width: int

  def setup(self):
    moved = self.features - self.split
    self.layers = [nn.Dense(self.width), nn.Dense(self.width), nn.Dense(2 * moved)]
    self.log_gamma = self.param("log_gamma", nn.initializers.zeros, (moved,))

  def __call__(self, points: ArrayLike) -> tuple[jax.Array, jax.Array]:
    """Values and the log determinant of points `[n, features]`: `[n, features]`, `[n]`."""
    kept, moved = points[:, : self.split], points[:, self.split :]
    scale, shift = self._map(kept)
    return jnp.concatenate([kept, moved * (1 + scale) + shift], -1), jnp.sum(jnp.log1p(scale), axis=-1)

  def inverse(self, values: ArrayLike) -> jax.Array:
    """The points of values."""
    kept, moved = values[:, : self.split], values[:, self.split :]
    scale, shift = self._map(kept)
    return jnp.concatenate([kept, (moved - shift) / (1 + scale)], -1)

  def _map(self, kept):
    hidden = nn.relu(self.layers[1](nn.relu(self.layers[0](kept))))
    outputs = jnp.tanh(self.layers[2](hidden))
    return STRENGTH * outputs[:, 1::2], jnp.exp(jnp.clip(self.log_gamma, -5, 5)) * outputs[:, 0::2]


class PiecewiseQuadraticCDF(nn.Module):
  """A learnable increasing map of [-50, 50] onto itself in every coordinate: the CDF of a piecewise linear density.

  Cells are finest in the middle; without training, and outside, it is the identity.

  >>> layer, points = PiecewiseQuadraticCDF(features=2, bins=4), jnp.array([[0.5, -60.0]])
  >>> values, logdet = layer.apply(layer.init(jax.random.key(0), points), points)
  >>> bool(jnp.allclose(values, points, atol=1e-4)), bool(jnp.allclose(logdet, 0, atol=1e-6))
  (True, True)

  Attributes:
    features: number of coordinates.
    bins: number of cells, even.

  Reference: Wan, Tang, "Augmented KRnet for Density Estimation and Approximation", arXiv 2021; as in the authors' code.
  """

  features: int
  bins: int

  def setup(self):
    if self.bins < 2 or self.bins % 2:
      raise ValueError(f"bins must be a positive even number, got {self.bins}.")
    self.log_density = self.param("log_density", nn.initializers.zeros, (self.bins - 1, self.features))

  def __call__(self, points: ArrayLike) -> tuple[jax.Array, jax.Array]:
    """Values and the log determinant of points `[n, features]`: `[n, features]`, `[n]`."""
    share, inside = _share(points)
    start, mass, density, slope = self._cell(share, by="start")
    offset = share - start
    values = BOUND * (2 * (mass + offset * (density + slope * offset / 2)) - 1)
    log_density = jnp.where(inside, jnp.log(density + slope * offset), 0)
    return jnp.where(inside, values, points), jnp.sum(log_density, axis=-1)

  def inverse(self, values: ArrayLike) -> jax.Array:
    """The points of values."""
    share, inside = _share(values)
    start, mass, density, slope = self._cell(share, by="mass")
    rest = share - mass
    # The root that is stable where the slope is 0; under the square root is the square of the density there.
    offset = 2 * rest / (density + jnp.sqrt(jnp.maximum(density**2 + 2 * slope * rest, 1e-30)))
    return jnp.where(inside, BOUND * (2 * (start + offset) - 1), values)

  def _cell(self, share, *, by):
    """Of the cell of each value: where it starts, the mass before it, the density there, and its slope."""
    mesh = jnp.asarray(_mesh(self.bins)[:, None], share.dtype)
    width = jnp.diff(mesh, axis=0)
    # Normalised so that the mass is 1; the density is 1 at both ends.
    inner = jax.nn.softmax(self.log_density + jnp.log((width[:-1] + width[1:]) / 2), axis=0)
    inner *= (1 - width[0]) / ((width[:-1] + width[1:]) / 2)
    density = jnp.pad(inner, ((1, 1), (0, 0)), constant_values=1)
    parts = width * (density[:-1] + density[1:]) / 2
    mass = jnp.pad(jnp.cumsum(parts, axis=0), ((1, 0), (0, 0)))
    slope = jnp.diff(density, axis=0) / width
    edges = {"start": jnp.broadcast_to(mesh, mass.shape), "mass": mass}
    index = jnp.sum(share >= edges[by][1:-1, None], axis=0)
    return tuple(jnp.take_along_axis(table, index, axis=0) for table in (edges["start"], mass, density, slope))


class KRnet(nn.Module):
  """A density on a box: couplings that freeze one group of coordinates after the other, then a CDF for the rest.

  Initialise it with a batch of the domain's points, of which activation normalization takes means and deviations. A
  fresh flow is not uniform; fit it by maximum likelihood first where that matters.

  >>> flow, points = KRnet(features=2, depth=2, width=4, bins=2), jnp.array([[0.0, 0.5], [-0.5, 0.9]])
  >>> variables = jax.jit(flow.init)(jax.random.key(0), points)
  >>> jax.jit(flow.apply)(variables, points).shape
  (2,)
  >>> jax.eval_shape(lambda key: flow.apply(variables, key, 5, method="sample"), jax.random.key(1)).shape
  (5, 2)

  Attributes:
    features: dimension of the box.
    depth: couplings before each freezing, even, so that the order of coordinates is restored.
    width: of the couplings' hidden layers.
    bins: cells of the CDF, even.
    group: coordinates frozen at a time.
    low: lower bound of the box, one number for every coordinate or a tuple of one per coordinate.
    high: upper bound of the box, likewise.

  Reference: Tang, Wan, Yang, "DAS-PINNs: A Deep Adaptive Sampling Method for Solving High-Dimensional Partial
    Differential Equations", JCP 2023, the flow; as in the authors' code.
  """

  features: int
  depth: int = 6
  width: int = 24
  bins: int = 32
  group: int = 1
  low: float | tuple[float, ...] = -1.01
  high: float | tuple[float, ...] = 1.01

  def setup(self):
    if self.depth < 2 or self.depth % 2:
      raise ValueError(f"depth must be a positive even number, got {self.depth}.")
    self.support = BoundedSupport(self.low, self.high, clip=1e-10 if self.features == 2 else 1e-6)
    stages = -(-self.features // self.group)
    self.blocks = [self._stage(self.features - i * self.group) for i in range(stages - 1)]
    rest = self.features - (stages - 1) * self.group
    self.last_norm, self.last_cdf = ActNorm(rest), PiecewiseQuadraticCDF(rest, self.bins)

  def _stage(self, active):
    splits = [active - self.group, self.group] * (self.depth // 2)
    return [(ActNorm(active), AffineCoupling(active, split, self.width)) for split in splits]

  def __call__(self, points: ArrayLike) -> jax.Array:
    """The log density of points.

    Args:
      points: floating `[n, features]`.

    Returns:
      `[n]`, per volume of the box's coordinates.

    Raises:
      ValueError: when the points do not fit.
    """
    latent, logdet = self.forward(points)
    return jnp.sum(jax.scipy.stats.norm.logpdf(latent), axis=-1) + logdet

  def forward(self, points: ArrayLike) -> tuple[jax.Array, jax.Array]:
    """Latent values of points `[n, features]`, and the map's log determinant `[n]`."""
    check_float("points", points)
    if points.ndim != 2 or points.shape[-1] != self.features:
      raise ValueError(f"points must have shape [n, {self.features}], got {points.shape}.")
    values, total = self.support(points)
    frozen = []
    for stage in self.blocks:
      for norm, coupling in stage:
        values, logdet = norm(values)
        total += logdet
        values, logdet = coupling(values)
        total += logdet
        values = values[:, ::-1]
      frozen.append(values[:, -self.group :])
      values = values[:, : -self.group]
    values, logdet = self.last_norm(values)
    total += logdet
    values, logdet = self.last_cdf(values)
    return jnp.concatenate([values, *frozen[::-1]], -1), total + logdet

  def inverse(self, latent: ArrayLike) -> jax.Array:
    """The points of latent values, `[n, features]` both."""
    rest = self.features - len(self.blocks) * self.group
    values = self.last_norm.inverse(self.last_cdf.inverse(latent[:, :rest]))
    for stage in reversed(self.blocks):
      values = jnp.concatenate([values, latent[:, values.shape[-1] : values.shape[-1] + self.group]], -1)
      for norm, coupling in reversed(stage):
        values = norm.inverse(coupling.inverse(values[:, ::-1]))
    return self.support.inverse(values)

  def sample(self, key: jax.Array, count: int) -> jax.Array:
    """Points `[count, features]` of the density; some may lie between the domain's border and the box's."""
    return self.inverse(jax.random.normal(key, (count, self.features)))


def _share(points):
  """Where in [0, 1] a value of [-BOUND, BOUND] lies, and whether it does."""
  wide = points.astype(jnp.promote_types(points.dtype, jnp.float32))  # the bound is far larger than most points
  inside = jnp.abs(wide) < BOUND
  return (jnp.where(inside, wide, 0) + BOUND) / (2 * BOUND), inside


def _mesh(bins):
  """Nodes in [0, 1], in cells whose widths grow away from the middle."""
  half = np.cumsum(RATIO ** np.arange(bins // 2))
  half = np.concatenate([[0], half / half[-1]]) / 2
  return np.concatenate([0.5 - half[::-1], 0.5 + half[1:]])
