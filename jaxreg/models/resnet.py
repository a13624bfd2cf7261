"""Residual networks for small images and for ImageNet, and pre-activation ones, wide ones among them."""

import functools
from collections.abc import Callable, Sequence

import flax.linen as nn
import jax
from jax.typing import ArrayLike

__all__ = ["DEPTHS", "PreActivationResNet", "ResNet", "WideResNet"]

# depth -> blocks in each stage, whether blocks have a bottleneck.
DEPTHS = {
  18: ((2, 2, 2, 2), False),
  34: ((3, 4, 6, 3), False),
  50: ((3, 4, 6, 3), True),
  101: ((3, 4, 23, 3), True),
  152: ((3, 8, 36, 3), True),
}


class ResNet(nn.Module):
  """A residual network with batch normalisation, whose stages halve the resolution and double the width.

  >>> import jax, jax.numpy as jnp
  >>> model = ResNet(stages=(1, 1), classes=10, width=4)
  >>> variables = model.init(jax.random.key(0), jnp.zeros((2, 8, 8, 3)), train=False)
  >>> logits, new = model.apply(variables, jnp.ones((2, 8, 8, 3)), train=True, mutable=["batch_stats"])
  >>> logits.shape, sorted(variables)
  ((2, 10), ['batch_stats', 'params'])

  Attributes:
    stages: blocks in each stage; `DEPTHS` has the usual ones, `ResNet.of_depth` builds from them.
    classes: number of outputs.
    width: channels of the first stage.
    bottleneck: whether blocks are 1×1, 3×3, 1×1 with four times as many channels outside, else two 3×3.
    large_images: whether the stem is 7×7 with stride 2 and a max pool (ImageNet), else 3×3 (CIFAR).
    axis_name: the mapped axis over which batch statistics are averaged, or None. Under a sharded `jit` they are those
      of the whole batch by themselves.
    conv: module class of the convolutions.
    dense: module class of the output layer.
    stem: module class of the first convolution, None for that of the others.
    stem_width: channels of the first convolution, None for those of the first stage.

  Reference: He, Zhang, Ren, Sun, "Deep Residual Learning for Image Recognition", CVPR 2016; the stride sits in the 3×3
    convolution, and each block's last scale starts at zero (Goyal et al., 2017, Section 5.1).
  """

  stages: Sequence[int]
  classes: int
  width: int = 64
  bottleneck: bool = False
  large_images: bool = False
  axis_name: str | None = None
  conv: Callable = nn.Conv
  dense: Callable = nn.Dense
  stem: Callable | None = None
  stem_width: int | None = None

  @classmethod
  def of_depth(cls, depth: int, **options) -> "ResNet":
    """The network of a usual depth: 18, 34, 50, 101 or 152; other arguments as the class's."""
    if depth not in DEPTHS:
      raise ValueError(f"depth must be one of {', '.join(map(str, DEPTHS))}, got {depth}.")
    stages, bottleneck = DEPTHS[depth]
    return cls(stages=stages, bottleneck=bottleneck, **options)

  @nn.compact
  def __call__(self, images: ArrayLike, *, train: bool) -> jax.Array:
    plain = dict(use_bias=False, kernel_init=nn.initializers.he_normal())
    conv, stem = functools.partial(self.conv, **plain), functools.partial(self.stem or self.conv, **plain)
    norm = _norm(train, self.axis_name)
    stem_width = self.stem_width or self.width
    if self.large_images:
      hidden = stem(stem_width, (7, 7), strides=(2, 2), padding=[(3, 3), (3, 3)], name="stem")(images)
    else:
      hidden = stem(stem_width, (3, 3), name="stem")(images)
    hidden = nn.relu(norm(name="stem_norm")(hidden))
    if self.large_images:
      hidden = nn.max_pool(hidden, (3, 3), strides=(2, 2), padding=[(1, 1), (1, 1)])
    block = _bottleneck_block if self.bottleneck else _basic_block
    for stage, blocks in enumerate(self.stages):
      for index in range(blocks):
        stride = 2 if stage > 0 and index == 0 else 1
        hidden = block(hidden, self.width * 2**stage, stride, conv, norm, name=f"stage{stage}_block{index}")
    return self.dense(self.classes, name="head")(hidden.mean((1, 2)))


class PreActivationResNet(nn.Module):
  """A residual network for images of about 32×32 pixels, whose blocks normalise and rectify before they convolve.

  >>> import jax, jax.numpy as jnp
  >>> model = PreActivationResNet(stages=(1, 1), classes=10, width=4)
  >>> variables = model.init(jax.random.key(0), jnp.zeros((2, 8, 8, 3)), train=False)
  >>> model.apply(variables, jnp.ones((2, 8, 8, 3)), train=False).shape
  (2, 10)

  Attributes:
    stages: blocks of two 3×3 convolutions in each stage; (2, 2, 2, 2) is ResNet-18.
    classes: number of outputs.
    width: channels of the stem and the first stage; further stages double it and halve the resolution.
    widen: factor on the widths of the stages, not on the stem's.
    axis_name: as in `ResNet`.

  Reference: He, Zhang, Ren, Sun, "Identity Mappings in Deep Residual Networks", ECCV 2016, Figure 4e.
  """

  stages: Sequence[int]
  classes: int
  width: int = 64
  widen: int = 1
  axis_name: str | None = None

  @nn.compact
  def __call__(self, images: ArrayLike, *, train: bool) -> jax.Array:
    hidden = _pre_activation_features(images, self.stages, self.width, self.widen, train, self.axis_name)
    return nn.Dense(self.classes, name="head")(hidden)


class WideResNet(nn.Module):
  """A wide residual network with pre-activation blocks for images of about 32×32 pixels.

  >>> import jax, jax.numpy as jnp
  >>> model = WideResNet(depth=10, widen=1, classes=10)
  >>> variables = model.init(jax.random.key(0), jnp.zeros((2, 8, 8, 3)), train=False)
  >>> model.apply(variables, jnp.ones((2, 8, 8, 3)), train=False).shape
  (2, 10)

  Attributes:
    depth: 6 n + 4 layers.
    widen: factor on the widths of the stages, `width` times 1, 2 and 4.
    classes: number of outputs.
    width: of the stem, 16 in the paper.
    axis_name: as in `ResNet`.

  Reference: Zagoruyko, Komodakis, "Wide Residual Networks", BMVC 2016, Table 1.
  """

  depth: int
  widen: int
  classes: int
  width: int = 16
  axis_name: str | None = None

  @nn.compact
  def __call__(self, images: ArrayLike, *, train: bool) -> jax.Array:
    if self.depth < 10 or (self.depth - 4) % 6:
      raise ValueError(f"depth must be 6 n + 4 with n >= 1, got {self.depth}.")
    stages = ((self.depth - 4) // 6,) * 3
    hidden = _pre_activation_features(images, stages, self.width, self.widen, train, self.axis_name)
    return nn.Dense(self.classes, name="head")(hidden)


def _pre_activation_features(images, stages, width, widen, train, axis_name):
  """What the output layer of a pre-activation network sees; to be called in a compact module."""
  conv = functools.partial(nn.Conv, use_bias=False, kernel_init=nn.initializers.he_normal())
  norm = _norm(train, axis_name)
  hidden = conv(width, (3, 3), name="stem")(images)
  for stage, blocks in enumerate(stages):
    for index in range(blocks):
      stride, name = 2 if stage > 0 and index == 0 else 1, f"stage{stage}_block{index}"
      hidden = _pre_activation_block(hidden, width * widen * 2**stage, stride, conv, norm, name=name)
  return nn.relu(norm(name="head_norm")(hidden)).mean((1, 2))


def _norm(train: bool, axis_name: str | None):
  # Without a mapped axis during `init` there is nothing to average over.
  return functools.partial(nn.BatchNorm, use_running_average=not train, momentum=0.9, axis_name=axis_name)


def _basic_block(inputs, width, stride, conv, norm, *, name):
  hidden = conv(width, (3, 3), strides=(stride, stride), name=f"{name}_conv0")(inputs)
  hidden = nn.relu(norm(name=f"{name}_norm0")(hidden))
  hidden = conv(width, (3, 3), name=f"{name}_conv1")(hidden)
  hidden = norm(scale_init=nn.initializers.zeros, name=f"{name}_norm1")(hidden)
  return nn.relu(hidden + _shortcut(inputs, width, stride, conv, norm, name))


def _bottleneck_block(inputs, width, stride, conv, norm, *, name):
  hidden = nn.relu(norm(name=f"{name}_norm0")(conv(width, (1, 1), name=f"{name}_conv0")(inputs)))
  hidden = conv(width, (3, 3), strides=(stride, stride), name=f"{name}_conv1")(hidden)
  hidden = nn.relu(norm(name=f"{name}_norm1")(hidden))
  hidden = conv(4 * width, (1, 1), name=f"{name}_conv2")(hidden)
  hidden = norm(scale_init=nn.initializers.zeros, name=f"{name}_norm2")(hidden)
  return nn.relu(hidden + _shortcut(inputs, 4 * width, stride, conv, norm, name))


def _shortcut(inputs, width, stride, conv, norm, name):
  if inputs.shape[-1] == width and stride == 1:
    return inputs
  projected = conv(width, (1, 1), strides=(stride, stride), name=f"{name}_shortcut")(inputs)
  return norm(name=f"{name}_shortcut_norm")(projected)


def _pre_activation_block(inputs, width, stride, conv, norm, *, name):
  active = nn.relu(norm(name=f"{name}_norm0")(inputs))
  hidden = conv(width, (3, 3), strides=(stride, stride), name=f"{name}_conv0")(active)
  hidden = nn.relu(norm(name=f"{name}_norm1")(hidden))
  hidden = conv(width, (3, 3), name=f"{name}_conv1")(hidden)
  if inputs.shape[-1] == width and stride == 1:
    return hidden + inputs
  return hidden + conv(width, (1, 1), strides=(stride, stride), name=f"{name}_shortcut")(active)
