"""What to put inside a network: Flax modules and layers with update rules of their own."""

from jaxreg.layers.factored_output import (
  FactoredOutput,
  FactoredState,
  center_factored,
  decay_factored,
  factored_init,
  factored_sgd_step,
  factored_statistics,
  factored_value_and_grad,
  factored_weights,
  stabilize_factored,
  unfactorize,
)

__all__ = [
  "FactoredOutput",
  "FactoredState",
  "center_factored",
  "decay_factored",
  "factored_init",
  "factored_sgd_step",
  "factored_statistics",
  "factored_value_and_grad",
  "factored_weights",
  "stabilize_factored",
  "unfactorize",
]
