"""What to put inside a network: Flax modules and layers with update rules of their own."""

from jaxreg.layers.best_response import (
  BestResponseConv,
  BestResponseDense,
  BestResponseEmbed,
  BestResponseLSTMCell,
  materialize_best_response,
)
from jaxreg.layers.cosine_head import CosineHead, MultiHeadProjector, normalize_prototypes
from jaxreg.layers.domain_heads import DomainHeads
from jaxreg.layers.dual_head import DualHead, DualLogits, NonlinearHead
from jaxreg.layers.expert_router import ExpertAssignment, SparseTransportRouter, assign_tokens, expert_capacity
from jaxreg.layers.factored_output import FactoredOutput
from jaxreg.layers.loop_conv import loop_conv_general_dilated
from jaxreg.layers.max_min_activation import max_min
from jaxreg.layers.naive_bayes_head import NaiveBayesHead
from jaxreg.layers.nested_dropout import (
  NestedDropout,
  keep_leading_channels,
  nested_cutoff_probabilities,
  sample_cutoff,
)
from jaxreg.layers.noise_mask import NoiseMaskPolicy
from jaxreg.layers.per_example_noise import (
  per_example_color_jitter,
  per_example_cutout,
  per_example_dropout,
  per_example_scale_noise,
)
from jaxreg.layers.projection_head import FixedReweightingHead, MLPProjectionHead, WithHead, symmetric_relu
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
  "CosineHead",
  "Curve",
  "DomainHeads",
  "DualHead",
  "DualLogits",
  "ExpertAssignment",
  "FactoredOutput",
  "FixedReweightingHead",
  "MLPProjectionHead",
  "MultiHeadProjector",
  "NaiveBayesHead",
  "NestedDropout",
  "NonlinearHead",
  "SOFTSIGN",
  "SparseTransportRouter",
  "TANH",
  "WithHead",
  "NoiseMaskPolicy",
  "assign_tokens",
  "compand",
  "compander_init",
  "expert_capacity",
  "fold_params",
  "keep_leading_channels",
  "loop_conv_general_dilated",
  "materialize_best_response",
  "max_min",
  "nested_cutoff_probabilities",
  "normalize_prototypes",
  "per_example_color_jitter",
  "per_example_cutout",
  "per_example_dropout",
  "per_example_scale_noise",
  "sample_cutoff",
  "symmetric_relu",
  "uncompand",
]
