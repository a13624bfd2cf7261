"""What to put inside a network: Flax modules and layers with update rules of their own."""

from jaxreg.layers.best_response import (
  BestResponseConv,
  BestResponseDense,
  BestResponseEmbed,
  BestResponseLSTMCell,
  materialize_best_response,
)
from jaxreg.layers.expert_router import ExpertAssignment, SparseTransportRouter, assign_tokens, expert_capacity
from jaxreg.layers.factored_output import FactoredOutput
from jaxreg.layers.loop_conv import loop_conv_general_dilated
from jaxreg.layers.max_min_activation import max_min
from jaxreg.layers.naive_bayes_head import NaiveBayesHead
from jaxreg.layers.per_example_noise import (
  per_example_color_jitter,
  per_example_cutout,
  per_example_dropout,
  per_example_scale_noise,
)
from jaxreg.layers.weight_compander import (
  ARCTAN,
  SOFTSIGN,
  TANH,
  Companded,
  CompandedParams,
  Curve,
  compand,
  compander_init,
  fold_params,
  uncompand,
)

__all__ = [
  "ARCTAN",
  "BestResponseConv",
  "BestResponseDense",
  "BestResponseEmbed",
  "BestResponseLSTMCell",
  "Companded",
  "CompandedParams",
  "Curve",
  "ExpertAssignment",
  "FactoredOutput",
  "NaiveBayesHead",
  "SOFTSIGN",
  "SparseTransportRouter",
  "TANH",
  "assign_tokens",
  "compand",
  "compander_init",
  "expert_capacity",
  "fold_params",
  "loop_conv_general_dilated",
  "materialize_best_response",
  "max_min",
  "per_example_color_jitter",
  "per_example_cutout",
  "per_example_dropout",
  "per_example_scale_noise",
  "uncompand",
]
