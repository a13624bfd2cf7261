"""ShuffleNetV2 for small images: half of the channels pass, the other half is convolved, then they are shuffled."""

import functools
from collections.abc import Callable, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

__all__ = ["ShuffleNetV2"]


class ShuffleNetV2(nn.Module):
  """A light network of depthwise and 1×1 convolutions, for images of about 32×32 pixels.

  >>> import jax, jax.numpy as jnp
  >>> model = ShuffleNetV2(classes=10, blocks=(1, 1), widths=(8, 16), last=32)
  >>> variables = model.init(jax.random.key(0), jnp.zeros((2, 8, 8, 3)), train=False)
  >>> model.apply(variables, jnp.ones((2, 8, 8, 3)), train=False).shape
  (2, 10)

  Attributes:
    classes: number of outputs.
    blocks: blocks of each stage that keep the resolution; a further one before them halves it.
    widths: channels of the stages, even.
    stem: channels of the first convolution, even.
    last: channels of the 1×1 convolution before the mean over the image.
    axis_name: the mapped axis over which batch statistics are averaged, or None.
    dense: module class of the output layer, called with `classes` and `name`.

  Reference: Ma, Zhang, Zheng, Sun, "ShuffleNet V2: Practical Guidelines for Efficient CNN Architecture Design", ECCV
    2018, Table 5; for small images the stem is a 1×1 convolution without a pool, as is usual in distillation.
  """

  classes: int
  blocks: Sequence[int] = (3, 7, 3)
  widths: Sequence[int] = (116, 232, 464)
  stem: int = 24
  last: int = 1024
  axis_name: str | None = None
  dense: Callable = nn.Dense

  @nn.compact
  def __call__(self, images: ArrayLike, *, train: bool) -> jax.Array:
    conv = functools.partial(nn.Conv, use_bias=False, kernel_init=nn.initializers.he_normal())
    norm = functools.partial(nn.BatchNorm, use_running_average=not train, momentum=0.9, axis_name=self.axis_name)
    hidden = nn.relu(norm(name="stem_norm")(conv(self.stem, (1, 1), name="stem")(images)))
    for stage, (blocks, width) in enumerate(zip(self.blocks, self.widths)):
      for index in range(blocks + 1):
        branch = functools.partial(_branch, width=width // 2, conv=conv, norm=norm, stride=1 if index else 2)
        kept, name = hidden, f"stage{stage}_block{index}"
        if index:
          kept, hidden = jnp.split(hidden, 2, axis=-1)
        else:
          kept = _downsampled(hidden, width // 2, conv, norm, name)
        hidden = _shuffled(jnp.concatenate([kept, branch(hidden, name=name)], axis=-1))
    hidden = nn.relu(norm(name="last_norm")(conv(self.last, (1, 1), name="last")(hidden)))
    return self.dense(self.classes, name="head")(hidden.mean((1, 2)))


def _branch(hidden, *, width, conv, norm, stride, name):
  hidden = nn.relu(norm(name=f"{name}_norm0")(conv(width, (1, 1), name=f"{name}_conv0")(hidden)))
  hidden = conv(width, (3, 3), strides=stride, feature_group_count=width, name=f"{name}_conv1")(hidden)
  hidden = norm(name=f"{name}_norm1")(hidden)
  return nn.relu(norm(name=f"{name}_norm2")(conv(width, (1, 1), name=f"{name}_conv2")(hidden)))


def _downsampled(hidden, width, conv, norm, name):
  channels = hidden.shape[-1]
  hidden = conv(channels, (3, 3), strides=2, feature_group_count=channels, name=f"{name}_short0")(hidden)
  hidden = conv(width, (1, 1), name=f"{name}_short1")(norm(name=f"{name}_short_norm0")(hidden))
  return nn.relu(norm(name=f"{name}_short_norm1")(hidden))


def _shuffled(hidden):
  """Channels of two halves, alternating."""
  *outer, channels = hidden.shape
  return hidden.reshape(*outer, 2, channels // 2).swapaxes(-1, -2).reshape(hidden.shape)
