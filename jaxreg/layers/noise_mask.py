"""The policy that draws noise masks: for every image the parameters of a Beta distribution per cell of a grid."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxreg.checks import check_float

__all__ = ["NoiseMaskPolicy"]


class NoiseMaskPolicy(nn.Module):
  """Logarithms of Beta parameters: a running base that all images share, and a part that depends on the image.

  `inertia * base + (1 - inertia) * head(features)`, with a head for each of the two parameters. In training the bases,
  which start uniformly in [0, 1), take over 1 percent of the heads' batch means after they were used.

  >>> import jax, jax.numpy as jnp
  >>> policy = NoiseMaskPolicy(cells=16)
  >>> variables = policy.init(jax.random.key(0), jnp.ones((4, 8)))
  >>> (log_alpha, log_beta), updated = policy.apply(variables, jnp.ones((4, 8)), mutable=["batch_stats", "bases"])
  >>> log_alpha.shape, sorted(updated)
  ((4, 16), ['bases', 'batch_stats'])

  Attributes:
    cells: of the grid, its rows times its columns.
    inertia: weight of the bases, in [0, 1].
    base_decay: of the bases' moving averages, in [0, 1].
    train: whether batches have their own statistics, and update those of the module and the bases.
    backbone: from inputs to features; None where the inputs are features.
    axis_name: the mapped axis over which the batch is split, or None.

  Reference: Yavuz, Yang, "Policy Gradient-Driven Noise Mask", arXiv 2406.14568, 2024 (as in the official code, which
    evaluates its heads twice in training and so moves their statistics twice).
  """

  cells: int
  inertia: float = 0.9
  base_decay: float = 0.99
  train: bool = True
  backbone: nn.Module | None = None
  axis_name: str | None = None

  @nn.compact
  def __call__(self, inputs: ArrayLike) -> tuple[jax.Array, jax.Array]:
    """The logarithms of both parameters.

    Args:
      inputs: what the backbone takes, or floating `[batch, features]`. Training needs
        `mutable=["batch_stats", "bases"]`.

    Returns:
      Two arrays `[batch, cells]`.
    """
    features = inputs if self.backbone is None else self.backbone(inputs)
    check_float("inputs", features)
    if jnp.ndim(features) != 2:
      raise ValueError(f"inputs must become features [batch, features], got shape {jnp.shape(features)}.")
    return tuple(self._parameter(name, jnp.asarray(features)) for name in ("alpha", "beta"))

  def _parameter(self, name, features):
    width, hidden = features.shape[1], features
    for place in ("first", "second"):
      hidden = nn.Dense(width, name=f"{name}_{place}")(hidden)
      norm = nn.BatchNorm(
        use_running_average=not self.train, momentum=0.9, use_fast_variance=False, axis_name=self.axis_name,
        name=f"{name}_{place}_norm",
      )  # fmt: skip
      hidden = nn.relu(norm(hidden))
    own = nn.Dense(self.cells, name=f"{name}_last")(hidden)
    draw = lambda: jax.random.uniform(self.make_rng("params"), (self.cells,), jnp.promote_types(own.dtype, jnp.float32))
    base = self.variable("bases", name, draw)
    result = self.inertia * base.value.astype(own.dtype) + (1 - self.inertia) * own
    if self.train and not self.is_initializing():
      mean = jnp.mean(jax.lax.stop_gradient(own).astype(base.value.dtype), axis=0)
      mean = mean if self.axis_name is None else jax.lax.pmean(mean, self.axis_name)
      if self.is_mutable_collection("bases"):
        base.value = self.base_decay * base.value + (1 - self.base_decay) * mean
    return result
