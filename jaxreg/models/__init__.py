"""Whole networks that several recipes need, and closed-form probes."""

from jaxreg.models.direction_unet import DirectionUNet
from jaxreg.models.krnet import ActNorm, AffineCoupling, BoundedSupport, KRnet, PiecewiseQuadraticCDF
from jaxreg.models.mlp import MLP
from jaxreg.models.posterior_mean_mlp import PosteriorMeanMLP
from jaxreg.models.quantized_resnet import quant_resnet
from jaxreg.models.resnet import DEPTHS, PreActivationResNet, ResNet, WideResNet
from jaxreg.models.shufflenet import ShuffleNetV2

__all__ = [
  "ActNorm",
  "AffineCoupling",
  "BoundedSupport",
  "DEPTHS",
  "DirectionUNet",
  "KRnet",
  "MLP",
  "PiecewiseQuadraticCDF",
  "PosteriorMeanMLP",
  "PreActivationResNet",
  "ResNet",
  "ShuffleNetV2",
  "WideResNet",
  "quant_resnet",
]
