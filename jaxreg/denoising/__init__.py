"""Denoising: noise schedules, posterior means of clean data, and scores."""

from jaxreg.denoising.posterior_mean import (
  NoiseSchedule,
  empirical_posterior_mean,
  gaussian_mixture_posterior_mean,
  gaussian_mixture_score,
  linear_vp_schedule,
  posterior_mean_from_score,
  score_from_posterior_mean,
)

__all__ = [
  "NoiseSchedule",
  "empirical_posterior_mean",
  "gaussian_mixture_posterior_mean",
  "gaussian_mixture_score",
  "linear_vp_schedule",
  "posterior_mean_from_score",
  "score_from_posterior_mean",
]
