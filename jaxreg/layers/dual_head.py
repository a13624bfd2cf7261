"""Two classification heads on one backbone: one for the labels, one for a teacher's logits."""

from typing import NamedTuple

import flax.linen as nn
import jax
from jax.typing import ArrayLike

__all__ = ["DualHead", "DualLogits", "NonlinearHead"]


class DualLogits(NamedTuple):
  """The outputs of both heads, `[..., classes]` each."""

  main: jax.Array
  auxiliary: jax.Array


class NonlinearHead(nn.Module):
  """A small classifier: dense, dropout, batch normalisation (in this order), rectifier, dense.

  >>> import jax, jax.numpy as jnp
  >>> head = NonlinearHead(classes=3, hidden=8)
  >>> variables = head.init(jax.random.key(0), jnp.ones((2, 4)), train=False)
  >>> head.apply(variables, jnp.ones((2, 4)), train=False).shape
  (2, 3)

  Training needs a key `dropout` and `mutable=["batch_stats"]`.

  Attributes:
    classes: number of outputs.
    hidden: width of the hidden layer.
    dropout: rate, in [0, 1).
    epsilon: added to the variance.
    axis_name: the mapped axis over which batch statistics are averaged, or None.

  Reference: Yang, Zong, Huang, Feng, An, "Dual-Head Knowledge Distillation: Enhancing Logits Utilization with an
    Auxiliary Head", KDD 2025, the auxiliary head (as in the official code).
  """

  classes: int
  hidden: int = 200
  dropout: float = 0.1
  epsilon: float = 1e-5
  axis_name: str | None = None

  @nn.compact
  def __call__(self, features: ArrayLike, *, train: bool) -> jax.Array:
    hidden = nn.Dense(self.hidden, name="first")(features)
    hidden = nn.Dropout(self.dropout, deterministic=not train)(hidden)
    hidden = nn.BatchNorm(
      use_running_average=not train, momentum=0.9, epsilon=self.epsilon, axis_name=self.axis_name, name="norm"
    )(hidden)
    return nn.Dense(self.classes, name="last")(nn.relu(hidden))


class DualHead(nn.Module):
  """A linear main head, and an auxiliary one that sees the same features and is thrown away after training.

  Cross-entropy goes to `main`, a distillation loss of logits such as `losses.binary_kl_norm_loss` to `auxiliary`; the
  backbone gets the gradients of both. `main_only` leaves the auxiliary head out, for inference.

  >>> import jax, jax.numpy as jnp
  >>> head = DualHead(classes=3)
  >>> variables = head.init(jax.random.key(0), jnp.ones((2, 4)), train=False)
  >>> logits = head.apply(variables, jnp.ones((2, 4)), train=True)
  >>> main = head.apply({"params": {"main": variables["params"]["main"]}}, jnp.ones((2, 4)), method="main_only")
  >>> logits.auxiliary.shape, bool((main == logits.main).all())
  ((2, 3), True)

  Attributes:
    classes: number of outputs of each head.
    hidden: width of the auxiliary head's hidden layer, see `NonlinearHead` (for a teacher of another family); None
      makes it linear, too.
    dropout: the auxiliary head's rate.
    axis_name: as in `NonlinearHead`.

  Reference: Yang et al., KDD 2025, the two heads.
  """

  classes: int
  hidden: int | None = None
  dropout: float = 0.1
  axis_name: str | None = None

  def setup(self):
    self.main = nn.Dense(self.classes)
    if self.hidden is None:
      self.auxiliary = nn.Dense(self.classes)
    else:
      self.auxiliary = NonlinearHead(self.classes, self.hidden, self.dropout, axis_name=self.axis_name)

  def __call__(self, features: ArrayLike, *, train: bool) -> DualLogits:
    """Both heads' logits of features `[..., features]`."""
    options = {} if self.hidden is None else {"train": train}
    return DualLogits(self.main(features), self.auxiliary(features, **options))

  def main_only(self, features: ArrayLike) -> jax.Array:
    """The main head's logits `[..., classes]`."""
    return self.main(features)
