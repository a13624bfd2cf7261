"""Bundled data sets, streams for large ones, noise and mixing; heavy imports wait until a function needs them."""

from jaxreg.data.aggregation import aggregate, gaussian_private_bag_means, laplace_private_bag_means
from jaxreg.data.algorithmic import modular_arithmetic, sparse_parity
from jaxreg.data.bundled import digits, mnist_subset, photographs, split, standardize, tabular
from jaxreg.data.environments import (
  colored_digits,
  imbalanced_environments,
  rotate_images,
  rotated_environments,
)
from jaxreg.data.errors import MissingDataError
from jaxreg.data.gaussian_mixtures import (
  easy_covariance,
  gaussian_mixture,
  gaussian_mixture_bayes_error,
  gaussian_mixture_means,
  hard_covariance,
)
from jaxreg.data.idx import fashion_mnist, read_idx
from jaxreg.data.mixing import mixup
from jaxreg.data.noise import (
  CIFAR10_CONFUSIONS,
  LETTER_CONFUSIONS,
  class_map_noise,
  instance_dependent_noise,
  pair_flip_noise,
  superclass_mapping,
  symmetric_noise,
)
from jaxreg.data.stream import Stream, array_stream, read_tfds, tfds_stream
from jaxreg.data.tfds_builder import write_tfds

__all__ = [
  "CIFAR10_CONFUSIONS",
  "LETTER_CONFUSIONS",
  "MissingDataError",
  "Stream",
  "aggregate",
  "array_stream",
  "class_map_noise",
  "colored_digits",
  "digits",
  "easy_covariance",
  "fashion_mnist",
  "gaussian_mixture",
  "gaussian_mixture_bayes_error",
  "gaussian_mixture_means",
  "gaussian_private_bag_means",
  "hard_covariance",
  "imbalanced_environments",
  "instance_dependent_noise",
  "laplace_private_bag_means",
  "mixup",
  "mnist_subset",
  "modular_arithmetic",
  "pair_flip_noise",
  "photographs",
  "read_idx",
  "read_tfds",
  "rotate_images",
  "rotated_environments",
  "sparse_parity",
  "split",
  "standardize",
  "superclass_mapping",
  "symmetric_noise",
  "tabular",
  "tfds_stream",
  "write_tfds",
]
