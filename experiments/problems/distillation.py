"""What recipes of distillation share: Gaussian classes around random directions, and SGD whose rate falls in steps."""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import optax

__all__ = ["gaussian_classes", "index_data", "stepwise_sgd"]


def gaussian_classes(
  key: jax.Array, *, classes: int, features: int, norm: float, sizes: Mapping[str, int]
) -> dict[str, dict[str, jax.Array]]:
  """Equally likely classes with the identity as covariance, around means of one norm in random directions.

  >>> parts = gaussian_classes(jax.random.key(0), classes=3, features=2, norm=2.0, sizes={"train": 5, "test": 4})
  >>> parts["train"]["x"].shape, parts["test"]["y"].shape
  ((5, 2), (4,))

  Args:
    key: of the means and the examples: traced, so that every run of a sweep has its own data.
    classes: number of classes.
    features: number of inputs.
    norm: of the means.
    sizes: part -> number of examples.

  Returns:
    part -> `x`, `[examples, features]`, and `y`, integers `[examples]`.
  """
  key, draw = jax.random.split(key)
  means = jax.random.normal(draw, (classes, features))
  means *= norm / jnp.linalg.norm(means, axis=1, keepdims=True)

  def part(key, examples):
    of_labels, of_inputs = jax.random.split(key)
    labels = jax.random.randint(of_labels, (examples,), 0, classes)
    return {"x": means[labels] + jax.random.normal(of_inputs, (examples, features)), "y": labels}

  keys = jax.random.split(key, len(sizes))
  return {name: part(keys[index], size) for index, (name, size) in enumerate(sizes.items())}


def index_data(examples: int) -> dict[str, jax.Array]:
  """The `data` of a task whose inputs are drawn from the run's key: the examples' numbers, as `row`."""
  return {"row": jnp.arange(examples, dtype=jnp.int32)}


def stepwise_sgd(
  hparams: Mapping, steps: int, *, decay_at: Sequence[float], nesterov: bool = False, clip: float | None = None
) -> optax.GradientTransformation:
  """SGD with momentum 0.9 and coupled weight decay; the rate falls tenfold after some fractions of the steps.

  Args:
    hparams: with `learning_rate` and `weight_decay`.
    steps: of the run.
    decay_at: fractions of the steps, in (0, 1).
    nesterov: whether the momentum is Nesterov's.
    clip: the largest global norm of the gradient; None clips nothing.

  Returns:
    The optimizer.
  """
  schedule = optax.piecewise_constant_schedule(1.0, {int(fraction * steps): 0.1 for fraction in decay_at})
  return optax.chain(
    optax.identity() if clip is None else optax.clip_by_global_norm(clip),
    optax.add_decayed_weights(hparams["weight_decay"]),
    optax.trace(0.9, nesterov=nesterov),
    optax.scale_by_schedule(lambda step: -hparams["learning_rate"] * schedule(step)),
  )
