"""Mixed precision for an elastic network: average bits, a predictor of accuracy, and a genetic search over bits."""

from collections.abc import Callable, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxreg.checks import check_hyperparameter
from jaxreg.quantization.elastic import ElasticConfig
from jaxreg.quantization.elastic_quantizer import ELASTIC_BITS

__all__ = ["AccuracyPredictor", "average_bits", "encode_config", "evolve_bits"]


def average_bits(bits: ArrayLike, sizes: ArrayLike | Sequence[int]) -> jax.Array:
  """The mean of the inner layers' bits, weighted by their sizes, `sum_l b_l P_l / sum_l P_l` over layers 2 to L - 1.

  >>> import jax.numpy as jnp
  >>> float(average_bits(jnp.array([8, 2, 4, 8]), (1000, 300, 100, 1000)))
  2.5

  Args:
    bits: integers `[layers]`, at least three.
    sizes: positive `[layers]`: numbers of weights for the weights' bits, of inputs for theirs.

  Returns:
    Scalar, float32 at least.

  Raises:
    ValueError: when the shapes differ or there is no inner layer.

  Reference: Xu, Han, Tian, Yang, Zhang, "EQ-Net: Elastic Quantization Neural Networks", ICCV 2023, Section 3.3.
  """
  if jnp.ndim(bits) != 1 or jnp.shape(bits) != jnp.shape(sizes) or jnp.shape(bits)[0] < 3:
    raise ValueError(
      f"bits and sizes must be arrays [layers] of at least three, got {jnp.shape(bits)} and {jnp.shape(sizes)}."
    )
  dtype = jnp.promote_types(jnp.result_type(float), jnp.float32)
  weights = jnp.asarray(sizes, dtype)[1:-1]
  inner = jnp.asarray(bits)[1:-1].astype(dtype)
  # Relative to one layer's bits, so that equal bits have exactly them as their mean.
  return inner[0] + jnp.sum((inner - inner[0]) * weights) / jnp.sum(weights)


def encode_config(config: ElasticConfig) -> jax.Array:
  """Features of a configuration: granularity and the two symmetries as pairs, and the bits of each layer, one-hot.

  The forms are those of the first layer, as the predictor is for configurations with one form in all layers. The bits
  of the first and the last layer, which do not vary, are left zero.

  >>> from jaxreg.quantization.elastic_config import uniform_config
  >>> features = encode_config(uniform_config(4, bits=3))
  >>> features.shape, features[:6].tolist(), float(features[6:].sum())
  ((62,), [1.0, 0.0, 1.0, 0.0, 1.0, 0.0], 4.0)

  Args:
    config: arrays `[layers]`.

  Returns:
    `[6 + 14 layers]`: per tensor, per channel; weights symmetric, asymmetric; inputs symmetric, asymmetric; the bits of
    all layers' weights, then of their inputs.

  Reference: Xu, Han, Tian, Yang, Zhang, "EQ-Net: Elastic Quantization Neural Networks", ICCV 2023, Section 3.3; the
    official code leaves asymmetric pairs zero.
  """
  pair = lambda first: jnp.stack([first, ~first])
  forms = [pair(~config.per_channel[0]), pair(config.weight_symmetric[0]), pair(config.act_symmetric[0])]

  def one_hot(bits):
    place = jnp.arange(bits.size)
    inner = (place > 0) & (place < bits.size - 1)
    return ((bits[:, None] == jnp.asarray(ELASTIC_BITS)) & inner[:, None]).ravel()

  return jnp.concatenate([*forms, one_hot(config.weight_bits), one_hot(config.act_bits)]).astype(jnp.float32)


class AccuracyPredictor(nn.Module):
  """A multilayer perceptron from a configuration's features to accuracy: the base accuracy plus what is learned.

  >>> import jax, jax.numpy as jnp
  >>> model = AccuracyPredictor(base=0.9, hidden=(8,))
  >>> variables = model.init(jax.random.key(0), jnp.zeros((3, 62)))
  >>> [round(accuracy, 3) for accuracy in model.apply(variables, jnp.zeros((3, 62))).tolist()]
  [0.9, 0.9, 0.9]

  Attributes:
    base: constant accuracy, usually the mean of those fitted; accuracies are in [0, 1].
    hidden: widths of the hidden layers.

  Reference: Xu, Han, Tian, Yang, Zhang, "EQ-Net: Elastic Quantization Neural Networks", ICCV 2023, Section 3.3 (the
    conditional quantization-aware accuracy predictor); sizes as in the official code.
  """

  base: float | jax.Array = 0.0
  hidden: Sequence[int] = (200,) * 6

  @nn.compact
  def __call__(self, features: ArrayLike) -> jax.Array:
    values = features
    for width in self.hidden:
      values = nn.relu(nn.Dense(width)(values))
    return self.base + nn.Dense(1)(values)[..., 0]


def evolve_bits(
  key: jax.Array,
  score: Callable[[ElasticConfig], ArrayLike],
  *,
  config: ElasticConfig,
  weight_sizes: Sequence[int],
  act_sizes: Sequence[int],
  target: ArrayLike,
  slack: ArrayLike = 0.5,
  candidates: Sequence[int] = ELASTIC_BITS,
  population: int = 100,
  generations: int = 500,
  parent_share: float = 0.25,
  mutation_rate: ArrayLike = 0.1,
) -> tuple[ElasticConfig, jax.Array]:
  """Genetic search for the inner layers' bits with the highest score among those with a given average.

  The best quarter of the population are parents. Half of the children are a parent with genes drawn anew at the
  mutation rate, half take each gene from one of two parents. Children whose average weight or input bits are outside
  `(target - slack, target]` rank below all that are inside, by how far they are outside; parents stay until beaten.

  >>> import jax, jax.numpy as jnp
  >>> from jaxreg.quantization.elastic_config import uniform_config
  >>> early = lambda config: -jnp.sum(jnp.arange(6) * config.weight_bits)  # bits are worth most in early layers
  >>> best, _ = jax.jit(lambda key: evolve_bits(
  ...   key, early, config=uniform_config(6, bits=2), weight_sizes=(1,) * 6, act_sizes=(1,) * 6, target=5.0, slack=0.1,
  ...   candidates=(2, 8), generations=20))(jax.random.key(0))
  >>> best.weight_bits.tolist()
  [8, 8, 8, 2, 2, 8]

  Args:
    key: threefry key.
    score: configuration -> scalar, such as a predictor's; it is mapped over the population by `vmap`.
    config: arrays `[layers]`, whose forms and end layers are kept.
    weight_sizes: numbers of weights `[layers]`.
    act_sizes: numbers of inputs `[layers]`.
    target: largest average of weight bits and of input bits; may be traced.
    slack: width of the interval below the target; may be traced.
    candidates: static; numbers of bits to choose from.
    population: static; number of children in each generation.
    generations: static.
    parent_share: static; share of the population that are parents.
    mutation_rate: probability of a gene to be drawn anew; may be traced.

  Returns:
    The best configuration and its score; its averages are inside the interval if the search found any such.

  Raises:
    ValueError: when a share or rate is outside (0, 1], or `slack` is not positive.

  Reference: Xu, Han, Tian, Yang, Zhang, "EQ-Net: Elastic Quantization Neural Networks", ICCV 2023, Section 3.3;
    rejection of children is unconditional there.
  """
  check_hyperparameter("parent_share", parent_share, low=0, high=1, open_low=True)
  check_hyperparameter("mutation_rate", mutation_rate, low=0, high=1)
  check_hyperparameter("slack", slack, low=0, open_low=True)
  check_hyperparameter("target", target, low=min(candidates), high=max(candidates) + 1)
  inner, parents = len(weight_sizes) - 2, max(2, round(parent_share * population))
  choices = jnp.asarray(candidates, jnp.int32)

  def express(genes):
    bits = choices[genes]
    return config._replace(
      weight_bits=jnp.asarray(config.weight_bits).at[1:-1].set(bits[0]),
      act_bits=jnp.asarray(config.act_bits).at[1:-1].set(bits[1]),
    )

  def measure(genes):
    own = express(genes)
    outside = jnp.zeros(())
    for average in (average_bits(own.weight_bits, weight_sizes), average_bits(own.act_bits, act_sizes)):
      inside = (average > target - slack) & (average <= target)
      outside += jnp.where(inside, 0, jnp.maximum(jnp.maximum(average - target, target - slack - average), 1e-6))
    return score(own), outside

  def select(genes, values, outside):
    best = jnp.lexsort((-values, outside))[:parents]
    return genes[best], values[best], outside[best]

  def generation(pool, key):
    genes = pool[0]
    children = _children(key, genes, population, len(candidates), mutation_rate)
    everyone = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), pool, (children, *jax.vmap(measure)(children)))
    return select(*everyone), None

  first, rest = jax.random.split(key)
  # Individuals of every average, from all layers alike to all drawn freely.
  keys = jax.random.split(first, 3)
  alike = jax.random.randint(keys[0], (population, 2, 1), 0, len(candidates))
  free = jax.random.randint(keys[1], (population, 2, inner), 0, len(candidates))
  share = jnp.linspace(0, 1, population)[:, None, None]
  genes = jnp.where(jax.random.uniform(keys[2], free.shape) < share, free, alike)
  pool = select(genes, *jax.vmap(measure)(genes))
  (genes, values, _), _ = jax.lax.scan(generation, pool, jax.random.split(rest, generations))
  return express(genes[0]), values[0]


def _children(key, parents, count, choices, mutation_rate):
  """Half mutants, half crossings, `[count, …]` genes."""
  keys = jax.random.split(key, 5)
  mothers = parents[jax.random.randint(keys[0], (count,), 0, len(parents))]
  fathers = parents[jax.random.randint(keys[1], (count,), 0, len(parents))]
  drawn = jax.random.randint(keys[2], mothers.shape, 0, choices)
  mutants = jnp.where(jax.random.uniform(keys[3], mothers.shape) < mutation_rate, drawn, mothers)
  crossed = jnp.where(jax.random.bernoulli(keys[4], 0.5, mothers.shape), mothers, fathers)
  return jnp.where((jnp.arange(count) < count // 2)[:, None, None], mutants, crossed)
