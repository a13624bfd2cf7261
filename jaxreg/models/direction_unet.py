"""The convolutional network that proposes directions for linear systems on grids."""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

__all__ = ["DirectionUNet"]


class DirectionUNet(nn.Module):
  """Residual convolutions on a grid and on one of half the resolution; it sees a residual and nothing else.

  Inputs `[batch, *grid]` with grid axes of even length; outputs of the same shape. The defaults are the network of the
  64^3 grids, `fine_before=6, coarse=10, fine_after=6` is that of the 128^3 grids.

  >>> import jax, jax.numpy as jnp
  >>> model = DirectionUNet(dimensions=3)
  >>> params = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 4, 4, 4)))["params"]
  >>> sum(leaf.size for leaf in jax.tree.leaves(params))
  97457

  Attributes:
    dimensions: of the grid.
    channels: filters of every convolution.
    fine_before: convolutions with ReLU before the coarse level, even, at least 2; a linear one precedes them.
    coarse: convolutions on the coarse level, even.
    fine_after: convolutions after it, even.
    conv_general_dilated: what convolves; `layers.loop_conv_general_dilated` trains faster in a loop on a CPU.

  Reference: Kaneda, Akar, Chen, Kala, Hyde, Teran, "A Deep Conjugate Direction Method for Iteratively Solving Linear
    Systems", ICML 2023, the network (Section 5.1).
  """

  dimensions: int = 2
  channels: int = 16
  fine_before: int = 4
  coarse: int = 6
  fine_after: int = 4
  conv_general_dilated: Callable = jax.lax.conv_general_dilated

  @nn.compact
  def __call__(self, residual: ArrayLike) -> jax.Array:
    if residual.ndim != self.dimensions + 1 or any(size % 2 for size in residual.shape[1:]):
      raise ValueError(f"residual must be [batch, *grid] with {self.dimensions} even grid axes, got {residual.shape}.")
    options = {"conv_general_dilated": self.conv_general_dilated}
    conv = lambda x: nn.Conv(self.channels, (3,) * self.dimensions, **options)(x)
    after = nn.relu(conv(conv(residual[..., None])))
    skip = nn.relu(conv(after))
    for _ in range(self.fine_before // 2 - 1):
      after = nn.relu(conv(skip)) + after
      skip = nn.relu(conv(after))
    halves = (2,) * self.dimensions
    hidden = nn.avg_pool(skip, halves, strides=halves)
    for _ in range(self.coarse // 2):
      hidden = nn.relu(conv(nn.relu(conv(hidden)))) + hidden
    for axis in range(1, self.dimensions + 1):
      hidden = jnp.repeat(hidden, 2, axis=axis)
    hidden = hidden + skip
    for _ in range(self.fine_after // 2):
      hidden = nn.relu(conv(nn.relu(conv(hidden)))) + hidden
    return nn.Dense(1)(hidden)[..., 0]
