"""A classifier for every source domain and one for all of them, on shared features."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxreg.checks import check_float

__all__ = ["DomainHeads"]


class DomainHeads(nn.Module):
  """Parallel classifiers `[heads, batch, classes]` of the same features, one per domain and a global one, the last.

  Train them with `losses.domain_heads_loss`; at test time `losses.weights_by_entropy` chooses among them.

  >>> import jax, jax.numpy as jnp
  >>> heads = DomainHeads(domains=3, classes=5)
  >>> params = heads.init(jax.random.key(0), jnp.ones((2, 4)))["params"]
  >>> heads.apply({"params": params}, jnp.ones((2, 4))).shape, params["last"]["kernel"].shape
  ((4, 2, 5), (4, 4, 5))

  Attributes:
    domains: number of source domains.
    classes: number of outputs of each head.
    nonlinear: whether a head has two hidden layers, of a half and a quarter of the features, with rectifiers.

  Reference: Zhang, Wang, Liang, Zhang, Yu, Wang, Tao, Xie, "Domain-Specific Risk Minimization for Domain
    Generalization", KDD 2023.
  """

  domains: int
  classes: int
  nonlinear: bool = False

  @nn.compact
  def __call__(self, features: ArrayLike) -> jax.Array:
    """The heads' logits.

    Args:
      features: floating `[batch, features]`.

    Returns:
      `[domains + 1, batch, classes]`.
    """
    check_float("features", features)
    if jnp.ndim(features) != 2:
      raise ValueError(f"features must be [batch, features], got shape {jnp.shape(features)}.")
    width = jnp.shape(features)[1]
    dense = nn.vmap(
      nn.Dense,
      in_axes=0,
      out_axes=0,
      axis_size=self.domains + 1,
      variable_axes={"params": 0},
      split_rngs={"params": True},
    )
    hidden = jnp.broadcast_to(jnp.asarray(features), (self.domains + 1, *jnp.shape(features)))
    if self.nonlinear:
      hidden = nn.relu(dense(max(width // 2, 1), name="first")(hidden))
      hidden = nn.relu(dense(max(width // 4, 1), name="second")(hidden))
    return dense(self.classes, name="last")(hidden)
