"""A linear output layer over very many classes that trains itself by exact SGD in factored form."""

from collections.abc import Callable

import flax.linen as nn
import jax
from jax.typing import ArrayLike

from jaxreg.losses.spherical import SphericalStatistics
from jaxreg.solvers.factored_output import factored_init, factored_statistics, factored_value_and_grad

__all__ = ["FactoredOutput"]


class FactoredOutput(nn.Module):
  """A linear output layer with a spherical loss that trains itself by SGD inside of the forward pass.

  Called with its collection mutable, it returns the losses and holds the updated state; the losses can be
  differentiated in the inputs, so that an optax optimizer trains the layers below. Called otherwise it changes nothing.
  The layer's own objective is the mean of the losses over the batch, whatever the caller makes of them.

  >>> import jax, jax.numpy as jnp
  >>> from jaxreg.losses.spherical import z_loss_from_statistics
  >>> layer = FactoredOutput(classes=10, loss=lambda s: z_loss_from_statistics(s, classes=10))
  >>> inputs, labels = jnp.ones((2, 4)), jnp.array([3, 5])
  >>> variables = layer.init(jax.random.key(0), inputs, labels)
  >>> losses, variables = layer.apply(variables, inputs, labels, learning_rate=0.1, mutable=["factored"])
  >>> losses.shape, int(variables["factored"]["state"].step)
  ((2,), 1)

  Attributes:
    classes: number of classes.
    loss: `SphericalStatistics -> [examples]`.
    scale: standard deviation of the first weights.
    stabilize_every: steps between calls of `stabilize_factored`.
    axis_name: mapped axis over which the batch is split; see `factored_value_and_grad`.

  Reference: Vincent, de Brebisson, Bouthillier, "Efficient Exact Gradient Update for Training Deep Networks with Very
    Large Sparse Targets", NeurIPS 2015.
  """

  classes: int
  loss: Callable[[SphericalStatistics], jax.Array]
  scale: float = 1e-3
  stabilize_every: int = 100
  axis_name: str | None = None

  @nn.compact
  def __call__(self, inputs: ArrayLike, labels: ArrayLike, learning_rate: ArrayLike = 0.0) -> jax.Array:
    """The losses of a batch, and the layer's update where the collection `factored` is mutable.

    Args:
      inputs: floating `[examples, features]`.
      labels: integers in [0, classes), `[examples]`; or `[examples, k]`, different within a row.
      learning_rate: non-negative; may be traced.

    Returns:
      `[examples]`.

    Raises:
      ValueError: when an argument does not fit.
    """
    state = self.variable(
      "factored",
      "state",
      lambda: factored_init(self.make_rng("params"), self.classes, inputs.shape[-1], scale=self.scale),
    )
    old = jax.lax.stop_gradient(state.value)
    if self.is_mutable_collection("factored") and not self.is_initializing():
      update = factored_value_and_grad(self.loss, stabilize_every=self.stabilize_every, axis_name=self.axis_name)
      constant = jax.lax.stop_gradient((inputs, learning_rate))
      state.value = update(old, constant[0], labels, constant[1])[2]
    return self.loss(factored_statistics(old, inputs, labels))
