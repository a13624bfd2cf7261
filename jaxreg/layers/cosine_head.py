"""Classifiers by cosine to prototypes, and several clustering heads of that kind side by side."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxreg.metrics.weights import parameter_name

__all__ = ["CosineHead", "MultiHeadProjector", "normalize_prototypes"]


class CosineHead(nn.Module):
  """Cosines of the features to prototypes, which are parameters of unit norm.

  They start with norm 1; keep it there by `normalize_prototypes` after every update (or before every pass, which is the
  same), for here they are not divided by their norms. Without that, weight decay shrinks all logits.

  >>> import jax, jax.numpy as jnp
  >>> head = CosineHead(classes=3)
  >>> variables = head.init(jax.random.key(0), jnp.ones((2, 4)))
  >>> bool((jnp.abs(head.apply(variables, 100 * jnp.ones((2, 4)))) <= 1).all())
  True

  Attributes:
    classes: number of prototypes.

  Reference: Gu, Zhang, Xu, He, "Class-relation Knowledge Distillation for Novel Class Discovery", ICCV 2023, the known
    head (as in the official code).
  """

  classes: int

  @nn.compact
  def __call__(self, features: ArrayLike) -> jax.Array:
    features = jnp.asarray(features)
    prototypes = self.param("prototypes", _unit_normal, (self.classes, features.shape[-1]))
    unit, prototypes = nn.dtypes.promote_dtype(_unit(features), prototypes)
    return unit @ prototypes.T


class MultiHeadProjector(nn.Module):
  """Heads that cluster the same features independently: dense, batch normalisation, rectifier, dense, cosines.

  Features `[examples, features]` give logits `[heads, examples, clusters]`. Several views of the examples go through
  one after another, each with its own batch statistics.

  >>> import jax, jax.numpy as jnp
  >>> heads = MultiHeadProjector(heads=2, clusters=5, hidden=8, features=4)
  >>> variables = heads.init(jax.random.key(0), jnp.ones((3, 6)), train=False)
  >>> heads.apply(variables, jnp.ones((3, 6)), train=False).shape
  (2, 3, 5)

  Attributes:
    heads: number of heads.
    clusters: prototypes of each head.
    hidden: width of the hidden layer.
    features: width of what is compared with the prototypes.
    axis_name: the mapped axis over which batch statistics are averaged, or None.

  Reference: Fini, Sangineto, Lathuiliere, Zhong, Nabi, Ricci, "A Unified Objective for Novel Class Discovery", ICCV
    2021, the clustering heads; sizes of Gu et al., ICCV 2023.
  """

  heads: int
  clusters: int
  hidden: int = 2048
  features: int = 256
  axis_name: str | None = None

  @nn.compact
  def __call__(self, features: ArrayLike, *, train: bool) -> jax.Array:
    every = nn.vmap(
      _Projector, variable_axes={"params": 0, "batch_stats": 0}, split_rngs={"params": True}, in_axes=None,
      axis_size=self.heads,
    )  # fmt: skip
    return every(self.clusters, self.hidden, self.features, train, self.axis_name, name="each")(features)


def normalize_prototypes(params: Any) -> Any:
  """The parameters, with all rows of those named `prototypes` divided by their norms; rows of zeros stay.

  >>> import jax.numpy as jnp
  >>> params = {"known": {"prototypes": jnp.array([[3.0, 4.0]])}, "bias": jnp.array([2.0])}
  >>> normalized = normalize_prototypes(params)
  >>> normalized["known"]["prototypes"].round(3).tolist(), normalized["bias"].tolist()
  ([[0.6000000238418579, 0.800000011920929]], [2.0])

  Args:
    params: a tree of arrays: Flax's, NNX's or Equinox's.

  Returns:
    A tree of the same structure, shapes and dtypes.

  Reference: Fini et al., ICCV 2021 (official code).
  """

  def normalized(path, leaf):
    return _unit(leaf) if parameter_name(path).split("/")[-1].strip(".") == "prototypes" else leaf

  return jax.tree_util.tree_map_with_path(normalized, params)


class _Projector(nn.Module):
  clusters: int
  hidden: int
  features: int
  train: bool
  axis_name: str | None

  @nn.compact
  def __call__(self, features):
    hidden = nn.Dense(self.hidden, name="first")(features)
    norm = nn.BatchNorm(use_running_average=not self.train, momentum=0.9, axis_name=self.axis_name, name="norm")
    hidden = nn.Dense(self.features, name="last")(nn.relu(norm(hidden)))
    return CosineHead(self.clusters, name="cosine")(hidden)


def _unit_normal(key, shape, dtype=jnp.float32):
  return _unit(jax.random.normal(key, shape, dtype))


def _unit(rows):
  """Rows of norm 1, computed in float32 at least from entries divided by the largest; zeros stay, without gradient."""
  wide = rows.astype(jnp.promote_types(rows.dtype, jnp.float32))
  largest = jax.lax.stop_gradient(jnp.max(jnp.abs(wide), axis=-1, keepdims=True))
  scaled = wide / jnp.where(largest == 0, 1, largest)
  squared = jnp.sum(scaled**2, axis=-1, keepdims=True)
  return jnp.where(squared == 0, 0, scaled / jnp.sqrt(jnp.where(squared == 0, 1, squared))).astype(rows.dtype)
