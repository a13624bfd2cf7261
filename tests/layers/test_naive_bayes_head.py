"""The head is the naive Bayes classifier, streamed or fitted at once."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxreg.layers import naive_bayes_head
from jaxreg.metrics import gaussian_probe
from jaxreg.metrics.gaussian_probe import gaussian_stats, stats_to_linear
from tests.conformance import module_row
from tests.metrics.test_linear_probe import CLASSES, FEATURES, close, draw


def test_head(x64):
  features, labels = draw(7)
  head = naive_bayes_head.NaiveBayesHead(features=FEATURES, classes=CLASSES)
  variables = head.init(jax.random.key(0), features)
  apply = lambda variables, x, y, method: head.apply(variables, x, y, method=method, mutable=["stats"])[1]
  streamed = apply(variables, features[:13], labels[:13], "partial_fit")
  streamed = apply(streamed, features[13:], labels[13:], "partial_fit")
  fitted = apply(streamed, features, labels, "fit")
  close(streamed, fitted, rtol=1e-6)  # the head keeps float32 until it is fitted
  stats = gaussian_stats(features, labels, num_classes=CLASSES)
  np.testing.assert_allclose(head.apply(fitted, features), gaussian_probe.gaussian_scores(stats, features), rtol=1e-6)
  close(head.apply(fitted, method="linear"), stats_to_linear(stats), rtol=1e-6)
  gradient = jax.grad(lambda x: head.apply(fitted, x)[:, 0].sum())(features)
  variance = 1 / np.asarray(stats_to_linear(stats).weights / stats.mean)[0]
  np.testing.assert_allclose(gradient, (stats.mean[0] - features) / variance, rtol=1e-6)

  def episode(x, y):  # support set and queries of a task; the gradient reaches the support's features too
    fitted = head.apply(variables, x[:20], y[:20], method="fit", mutable=["stats"])[1]
    logits = head.apply(fitted, x[20:])
    return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), y[20:, None], 1))

  tasks = jnp.stack([features, features + 0.1]), jnp.stack([labels, labels])
  losses, gradients = jax.vmap(jax.value_and_grad(episode))(*tasks)
  assert np.isfinite(losses).all() and np.abs(gradients[:, :20]).max() > 0
  np.testing.assert_allclose(losses[0], episode(features, labels), rtol=1e-9)


ROWS = [
  module_row(
    naive_bayes_head.NaiveBayesHead(features=FEATURES, classes=CLASSES),
    lambda rng: (rng.normal(size=(16, FEATURES)),),
    wide=False,
  ),
]
