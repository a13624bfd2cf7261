"""Whole networks that several recipes need."""

from jaxreg.models.mlp import MLP
from jaxreg.models.resnet import DEPTHS, ResNet, WideResNet

__all__ = ["DEPTHS", "MLP", "ResNet", "WideResNet"]
