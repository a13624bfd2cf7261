"""Denoising score matching and regression on clean data are the same; golden values are in tests/kernels."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxreg.denoising.posterior_mean import linear_vp_schedule, score_from_posterior_mean
from jaxreg.losses import score_matching
from tests.conformance import BAD_SAME_SHAPE, EXAMPLES, draw_logits, extreme_logits, row

CLEAN, NOISE, PREDICTIONS = np.random.default_rng(0).normal(size=(3, 20, 4))


def test_losses_are_equal_at_every_time(x64):
  signal, variance = linear_vp_schedule(jnp.linspace(0.05, 1.0, 20), start_rate=0.1, end_rate=8.0)
  noisy = signal[:, None] * CLEAN + jnp.sqrt(variance)[:, None] * NOISE
  scores = score_from_posterior_mean(jnp.asarray(PREDICTIONS), noisy, signal=signal, variance=variance)
  weight = score_matching.score_regression_weight(signal, variance)
  weighted = score_matching.denoising_score_matching_loss(
    scores, noisy, CLEAN, signal=signal, variance=variance, weight=weight
  )
  np.testing.assert_allclose(weighted, score_matching.posterior_mean_squared_loss(PREDICTIONS, CLEAN), rtol=1e-10)


def test_bad_hyperparameters():
  arrays = CLEAN, CLEAN, CLEAN
  for changes in (dict(variance=0.0), dict(variance=float("nan")), dict(weight=-1.0), dict(signal=float("nan"))):
    with pytest.raises(ValueError, match=f"{next(iter(changes))} must lie in"):
      score_matching.denoising_score_matching_loss(*arrays, **{"signal": 0.5, "variance": 0.5, **changes})


ROWS = [
  row(
    score_matching.posterior_mean_squared_loss,
    lambda rng: (draw_logits(rng), draw_logits(rng)),
    extreme=lambda predictions, clean: (extreme_logits(predictions)[0], -extreme_logits(clean)[0]),
    bad=(*BAD_SAME_SHAPE, ("predictions", lambda f, clean: (f.astype(np.int32), clean))),
    examples="any",
  ),
  row(
    score_matching.denoising_score_matching_loss,
    lambda rng: (draw_logits(rng), draw_logits(rng), draw_logits(rng)),
    extreme=lambda *arrays: tuple(extreme_logits(array)[0] for array in arrays),
    bad=(
      ("shapes", lambda s, x, clean: (s, x[1:], clean)),
      ("shapes", lambda s, x, clean: (s, x, clean[:1])),
      ("scores", lambda s, x, clean: (s.astype(np.int32), x, clean)),
    ),
    examples="any",
    options=dict(signal=(0.2, 0.9), variance=(0.1, 0.9), weight=(0.5, 2.0)),
  ),
  row(
    score_matching.score_regression_weight,
    lambda rng: (rng.uniform(0.1, 0.9, EXAMPLES), rng.uniform(0.1, 0.9, EXAMPLES)),
    extreme=lambda signal, variance: (np.resize([1e-4, 1.0], signal.shape), np.resize([1.0, 0.0], variance.shape)),
    bad=(*BAD_SAME_SHAPE, ("signal", lambda signal, variance: (signal.astype(np.int32), variance))),
    examples="any",
  ),
]
