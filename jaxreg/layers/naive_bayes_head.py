"""A classification layer that is fitted instead of trained: naive Bayes on the features that it was given."""

import flax.linen as nn
import jax
from jax.typing import ArrayLike

from jaxreg.metrics.gaussian_probe import (
  empty_stats,
  gaussian_scores,
  gaussian_stats,
  merge_stats,
  stats_to_linear,
)
from jaxreg.metrics.linear_probe import LinearProbe

__all__ = ["NaiveBayesHead"]


class NaiveBayesHead(nn.Module):
  """A classification layer without trained parameters: naive Bayes of the examples that it was given.

  Its statistics are the collection `stats`. `partial_fit` adds examples, `fit` starts anew (both need
  `mutable=["stats"]`), calling it gives logits, through which gradients flow to the features.

  >>> import jax, jax.numpy as jnp
  >>> head = NaiveBayesHead(features=1, classes=2)
  >>> variables = head.init(jax.random.key(0), jnp.zeros((1, 1)))
  >>> examples = jnp.array([[0.0], [2.0], [4.0], [6.0]]), jnp.array([0, 0, 1, 1])
  >>> _, variables = head.apply(variables, *examples, method="partial_fit", mutable=["stats"])
  >>> head.apply(variables, jnp.array([[1.0], [5.0]])).argmax(-1).tolist()
  [0, 1]

  Attributes:
    features: number of features.
    classes: number of classes.
    eps: added to every variance.
    relative_floor: the smallest variance allowed, as a share of the mean variance.
    prior: `empirical` or `uniform`.
    axis_name: the mapped axis that splits the examples of `fit` and `partial_fit`, if any.

  Reference: Zheng, Wu, Bao, Cao, Li, Zhu, "Revisiting Discriminative vs. Generative Classifiers: Theory and
    Implications", ICML 2023.
  """

  features: int
  classes: int
  eps: float = 1e-9
  relative_floor: float = 0.0
  prior: str = "empirical"
  axis_name: str | None = None

  def setup(self):
    self.stats = self.variable("stats", "gaussian", empty_stats, self.classes, self.features)

  def __call__(self, features: ArrayLike) -> jax.Array:
    """Logits `[..., classes]` of features `[..., features]`."""
    return gaussian_scores(
      self.stats.value, features, eps=self.eps, relative_floor=self.relative_floor, prior=self.prior
    )

  def partial_fit(self, features: ArrayLike, labels: ArrayLike) -> None:
    """Adds examples `[examples, features]` with labels `[examples]`."""
    self.stats.value = merge_stats(self.stats.value, self._stats(features, labels))

  def fit(self, features: ArrayLike, labels: ArrayLike) -> None:
    """Forgets what was given before, then adds examples."""
    self.stats.value = self._stats(features, labels)

  def linear(self) -> LinearProbe:
    """The same classifier as weights and bias."""
    return stats_to_linear(self.stats.value, eps=self.eps, relative_floor=self.relative_floor, prior=self.prior)

  def _stats(self, features, labels):
    return gaussian_stats(features, labels, num_classes=self.classes, axis_name=self.axis_name)
