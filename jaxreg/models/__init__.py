"""Whole networks that several recipes need, and closed-form probes."""

from jaxreg.models.direction_unet import DirectionUNet
from jaxreg.models.krnet import ActNorm, AffineCoupling, BoundedSupport, KRnet, PiecewiseQuadraticCDF
from jaxreg.models.linear_probe import (
  GaussianStats,
  LinearProbe,
  MinMaxScaling,
  NaiveBayesHead,
  empty_stats,
  gaussian_scores,
  gaussian_stats,
  logistic_probe,
  merge_stats,
  minmax_scale,
  minmax_scaling,
  probe_logits,
  stats_to_linear,
)
from jaxreg.models.mlp import MLP
from jaxreg.models.posterior_mean_mlp import PosteriorMeanMLP
from jaxreg.models.resnet import DEPTHS, ResNet, WideResNet

__all__ = [
  "ActNorm",
  "AffineCoupling",
  "BoundedSupport",
  "DEPTHS",
  "DirectionUNet",
  "GaussianStats",
  "KRnet",
  "LinearProbe",
  "MLP",
  "MinMaxScaling",
  "NaiveBayesHead",
  "PiecewiseQuadraticCDF",
  "PosteriorMeanMLP",
  "ResNet",
  "WideResNet",
  "empty_stats",
  "gaussian_scores",
  "gaussian_stats",
  "logistic_probe",
  "merge_stats",
  "minmax_scale",
  "minmax_scaling",
  "probe_logits",
  "stats_to_linear",
]
