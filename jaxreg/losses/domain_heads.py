"""Classifiers with a head per source domain and one for all of them: how they are trained, and how an unlabelled batch
of another domain chooses among them.

Logits of heads are `[heads, batch, classes]`; the last head is the global one, head d before it that of domain d.
"""

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from jaxreg.checks import as_array, check_float, check_hyperparameter, dtype_of, example_mask, widened_integers
from jaxreg.losses.labelled_logits import labelled, narrowed, widened

__all__ = [
  "adaptation_loss",
  "domain_heads_loss",
  "domain_mean",
  "head_entropies",
  "mixed_head_probabilities",
  "nearest_domain_weights",
  "weights_by_entropy",
]

MODES = ("batch", "example", "mixture")
METRICS = ("l1", "l2", "cosine")
PSEUDO_LABELS = ("own", "global", "mean", "mixed")
_LEAST_ENTROPY = 1e-12


def domain_heads_loss(head_logits: ArrayLike, labels: ArrayLike, domains: ArrayLike) -> jax.Array:
  """Half of the cross-entropy of the example's own domain's head, and half of the global head's.

  `domain_mean` of it is the paper's loss, in which domains count alike whatever their numbers of examples.

  >>> import jax.numpy as jnp
  >>> logits = jnp.array([[[0.0, 0.0]], [[3.0, 0.0]], [[0.0, 0.0]]])  # two domains and the global head, one example
  >>> domain_heads_loss(logits, jnp.array([0]), jnp.array([0])).round(3).tolist()
  [0.6930000185966492]

  Args:
    head_logits: floating `[domains + 1, batch, classes]`.
    labels: integers `[batch]`; those outside `[0, classes)` have loss 0.
    domains: integers `[batch]` in `[0, domains)`; an example of another domain has loss 0.

  Returns:
    `[batch]`, in the dtype of the logits.

  Raises:
    ValueError: when shapes or dtypes do not fit.

  Reference: Zhang, Wang, Liang, Zhang, Yu, Wang, Tao, Xie, "Domain-Specific Risk Minimization for Domain
    Generalization", KDD 2023, the training loss (as in the official code).
  """
  head_logits = _check_heads(head_logits)
  domains, known = _domains(domains, head_logits.shape[0] - 1, head_logits.shape[1:2])
  own = jnp.take_along_axis(head_logits, domains[None, :, None], axis=0)[0]
  labels = jnp.where(known, widened_integers(as_array("labels", labels)), -1) if _fits(labels, known) else labels
  values = [_cross_entropy(logits, labels) for logits in (own, head_logits[-1])]
  return narrowed((widened(values[0]) + widened(values[1])) / 2, head_logits.dtype)


def domain_mean(
  values: ArrayLike,
  domains: ArrayLike,
  *,
  num_domains: int,
  where: ArrayLike | None = None,
  axis_name: str | None = None,
) -> jax.Array:
  """The mean over domains of the mean over a domain's examples; domains without examples do not count.

  >>> import jax.numpy as jnp
  >>> domain_mean(jnp.array([1.0, 3.0, 10.0]), jnp.array([0, 0, 1]), num_domains=3).item()
  6.0

  Args:
    values: floating `[batch]`.
    domains: integers `[batch]` in `[0, num_domains)`; examples of other domains do not count.
    num_domains: at least 1; static.
    where: boolean `[batch]`: the examples that count.
    axis_name: the mapped axis over which the batch is split, or None.

  Returns:
    Scalar, in the dtype of the values; 0 of nothing.

  Raises:
    ValueError: when shapes or dtypes do not fit.

  Reference: none.
  """
  check_float("values", values)
  values = as_array("values", values)
  if values.ndim != 1:
    raise ValueError(f"values must be [batch], got shape {values.shape}.")
  check_hyperparameter("num_domains", num_domains, low=1)
  domains, known = _domains(domains, num_domains, values.shape)
  counted = known & example_mask(where, values.shape)
  wide = jnp.where(counted, widened(values), 0)
  members = jax.nn.one_hot(domains, num_domains, dtype=wide.dtype) * counted[:, None].astype(wide.dtype)
  sums, counts = jnp.matmul(wide, members, precision="highest"), jnp.sum(members, axis=0)
  if axis_name is not None:
    sums, counts = jax.lax.psum((sums, counts), axis_name)
  means = sums / jnp.maximum(counts, 1)
  return narrowed(jnp.sum(means) / jnp.maximum(jnp.sum(counts > 0), 1), values.dtype)


def head_entropies(head_logits: ArrayLike) -> jax.Array:
  """The entropy of every head's prediction, `-sum_c p_c log p_c` in nats.

  >>> import jax.numpy as jnp
  >>> print(head_entropies(jnp.zeros((1, 1, 4))))
  [[1.3862944]]

  Args:
    head_logits: floating `[..., classes]`.

  Returns:
    `[...]`, in the dtype of the logits.

  Raises:
    ValueError: when the logits are not floating point.

  Reference: Zhang et al., KDD 2023.
  """
  check_float("head_logits", head_logits)
  head_logits = as_array("head_logits", head_logits)
  if head_logits.ndim < 1:
    raise ValueError("head_logits must have a class axis, got a scalar.")
  log_probabilities = jax.nn.log_softmax(widened(head_logits))
  return narrowed(-jnp.sum(jnp.exp(log_probabilities) * log_probabilities, axis=-1), head_logits.dtype)


def weights_by_entropy(
  head_logits: ArrayLike, *, mode: str = "batch", exponent: ArrayLike = 1.0, where: ArrayLike | None = None
) -> jax.Array:
  """How much each head counts for each example: heads that are sure count more.

  `batch` takes the head of the smallest mean entropy over the whole batch, which must be of one domain; `example` the
  surest head for each example; `mixture` gives weights proportional to `entropy ^ -exponent`. Sure is not right: a head
  of few or strongly correlated examples may be the surest one and wrong.

  >>> import jax.numpy as jnp
  >>> logits = jnp.array([[[0.0, 0.0], [9.0, 0.0]], [[1.0, 0.0], [1.0, 0.0]]])
  >>> [weights_by_entropy(logits, mode=mode).tolist() for mode in ("batch", "example")]
  [[[1.0, 1.0], [0.0, 0.0]], [[0.0, 1.0], [1.0, 0.0]]]

  Args:
    head_logits: floating `[heads, batch, classes]`.
    mode: `batch`, `example` or `mixture`; static.
    exponent: of the mixture, the paper's gamma, non-negative scalar: 0 weighs all heads alike, a large one takes the
      surest; may be traced.
    where: boolean `[batch]`: the examples that choose in `batch` mode.

  Returns:
    `[heads, batch]`, of sum 1 over the heads, constant under differentiation, in the dtype of the logits.

  Raises:
    ValueError: when shapes or dtypes do not fit, or the exponent is negative.

  Reference: Zhang et al., KDD 2023, the test-time selection. The official mixture leaves the global head out of the sum
    but not out of the weights; set `weights[-1]` to 0 for that.
  """
  head_logits = _check_heads(head_logits)
  if mode not in MODES:
    raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}.")
  check_hyperparameter("exponent", exponent, low=0, shape=())
  counted = example_mask(where, head_logits.shape[1:2])
  entropies = head_entropies(widened(jax.lax.stop_gradient(head_logits)))
  heads = head_logits.shape[0]
  if mode == "mixture":
    exponent = jnp.asarray(exponent, entropies.dtype)
    weights = jax.nn.softmax(-exponent * jnp.log(jnp.maximum(entropies, _LEAST_ENTROPY)), axis=0)
  else:
    if mode == "batch":
      total = jnp.sum(jnp.where(counted, entropies, 0), axis=1, keepdims=True)
      entropies = jnp.broadcast_to(total, entropies.shape)
    weights = jax.nn.one_hot(jnp.argmin(entropies, axis=0), heads, axis=0, dtype=entropies.dtype)
    weights = jnp.where(jnp.any(jnp.isnan(entropies), axis=0), jnp.nan, weights)
  return weights.astype(head_logits.dtype)


def nearest_domain_weights(
  features: ArrayLike,
  centroids: ArrayLike,
  *,
  metric: str = "l2",
  exponent: ArrayLike | None = None,
  temperature: ArrayLike = 1.0,
) -> jax.Array:
  """How much each domain's head counts for each example, by the distance of its features to the domain's mean.

  >>> import jax.numpy as jnp
  >>> nearest_domain_weights(jnp.array([[0.9]]), jnp.array([[0.0], [1.0]])).tolist()
  [[0.0], [1.0]]

  Args:
    features: floating `[batch, features]`.
    centroids: floating `[domains, features]`, for example means of a `FeatureBank`.
    metric: `l1`, `l2` or `cosine`; static.
    exponent: weights proportional to `distance ^ -exponent`; None takes the nearest domain; may be traced. Not of
      `cosine`.
    temperature: of `cosine` when `exponent` is given: softmax of `cosine / temperature`, positive; may be traced.

  Returns:
    `[domains, batch]`, of sum 1 over the domains, constant under differentiation, in the dtype of the features. The
    global head has none: append a row of zeros before `mixed_head_probabilities`.

  Raises:
    ValueError: when shapes or dtypes do not fit or a hyperparameter is out of range.

  Reference: Zhang et al., KDD 2023. The official code takes the domain of the smallest cosine, the least similar one;
    this takes the most similar.
  """
  check_float("features", features)
  check_float("centroids", centroids)
  features, centroids = as_array("features", features), as_array("centroids", centroids)
  if features.ndim != 2 or centroids.ndim != 2 or features.shape[1] != centroids.shape[1]:
    raise ValueError(
      f"features must be [batch, features] and centroids [domains, features], got {features.shape} and"
      f" {centroids.shape}."
    )
  if metric not in METRICS:
    raise ValueError(f"metric must be one of {', '.join(METRICS)}, got {metric!r}.")
  if exponent is not None:
    check_hyperparameter("exponent", exponent, low=0, shape=())
  check_hyperparameter("temperature", temperature, low=0, open_low=True, shape=())
  dtype = features.dtype
  features, centroids = (widened(jax.lax.stop_gradient(x)) for x in (features, centroids))
  if metric == "cosine":
    unit = lambda x: x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), jnp.finfo(x.dtype).tiny)
    scores = jnp.matmul(unit(centroids), unit(features).T, precision="highest")
    soft = lambda: jax.nn.softmax(scores / jnp.asarray(temperature, scores.dtype), axis=0)
  else:
    scores = -jnp.linalg.norm(centroids[:, None] - features, ord=int(metric[1]), axis=-1)
    logarithms = jnp.log(jnp.maximum(-scores, _LEAST_ENTROPY))
    soft = lambda: jax.nn.softmax(-jnp.asarray(exponent, scores.dtype) * logarithms, axis=0)
  if exponent is not None:
    return soft().astype(dtype)
  weights = jax.nn.one_hot(jnp.argmax(scores, axis=0), len(centroids), axis=0, dtype=scores.dtype)
  return jnp.where(jnp.any(jnp.isnan(scores), axis=0), jnp.nan, weights).astype(dtype)


def mixed_head_probabilities(head_logits: ArrayLike, weights: ArrayLike) -> jax.Array:
  """The heads' predictions, weighted: `sum_k w_k softmax(z_k)`.

  >>> import jax.numpy as jnp
  >>> mixed_head_probabilities(jnp.zeros((2, 1, 2)), jnp.array([[0.5], [0.5]])).tolist()
  [[0.5, 0.5]]

  Args:
    head_logits: floating `[heads, batch, classes]`.
    weights: `[heads, batch]`, as `weights_by_entropy` returns them.

  Returns:
    `[batch, classes]`, in the dtype of the logits.

  Raises:
    ValueError: when shapes or dtypes do not fit.

  Reference: Zhang et al., KDD 2023.
  """
  head_logits = _check_heads(head_logits)
  weights = _check_weights(weights, head_logits)
  mixed = jnp.sum(weights[..., None] * jax.nn.softmax(widened(head_logits)), axis=0)
  return narrowed(mixed, head_logits.dtype)


def adaptation_loss(
  head_logits: ArrayLike,
  *,
  threshold: ArrayLike,
  pseudo_labels: str = "own",
  weights: ArrayLike | None = None,
  where: ArrayLike | None = None,
  double_softmax: bool = False,
) -> jax.Array:
  """Self-training at test time: the cross-entropy of every head with confident pseudo-labels, summed over the heads.

  Of a head it is the mean over the examples whose pseudo-label has at least the confidence `threshold`, and 0 if there
  are none. Labels and confidences are constants. For an update of the heads only, stop the gradient of the features.

  >>> import jax.numpy as jnp
  >>> logits = jnp.array([[[2.0, 0.0], [0.1, 0.0]], [[2.0, 0.0], [0.1, 0.0]]])
  >>> adaptation_loss(logits, threshold=0.8).round(3).item()  # each head is sure of the first example
  0.2540000081062317

  Args:
    head_logits: floating `[heads, batch, classes]`.
    threshold: the paper's beta, non-negative scalar: 0 takes all examples, one above 1 none; may be traced.
    pseudo_labels: whose predictions are the labels of a head; `own`, the `global` head's, the `mean` of all heads, or
      `mixed` by `weights`; static.
    weights: `[heads, batch]`, needed for `mixed` and for nothing else.
    where: boolean `[batch]`: the examples that count.
    double_softmax: whether confidences of `mean` and `mixed` are those of a softmax of the probabilities, as in the
      official code, where a threshold of 0.75 therefore takes no example; static.

  Returns:
    Scalar, in the dtype of the logits.

  Raises:
    ValueError: when shapes or dtypes do not fit or a hyperparameter is out of range.

  Reference: Zhang et al., KDD 2023, the online adaptation (as in the official code).
  """
  head_logits = _check_heads(head_logits)
  if pseudo_labels not in PSEUDO_LABELS:
    raise ValueError(f"pseudo_labels must be one of {', '.join(PSEUDO_LABELS)}, got {pseudo_labels!r}.")
  if (weights is None) != (pseudo_labels != "mixed"):
    raise ValueError("weights must be given for pseudo_labels='mixed', and for nothing else.")
  check_hyperparameter("threshold", threshold, low=0, shape=())
  counted = example_mask(where, head_logits.shape[1:2])
  wide = jnp.where(counted[:, None], widened(head_logits), 0)
  own = jax.lax.stop_gradient(jax.nn.softmax(wide))
  if pseudo_labels == "own":
    taught = own
  elif pseudo_labels == "global":
    taught = jnp.broadcast_to(own[-1], own.shape)
  else:
    mixed = jnp.mean(own, axis=0)
    if weights is not None:
      kept = jnp.where(counted, _check_weights(weights, head_logits), 0)
      mixed = jnp.sum(jax.lax.stop_gradient(kept)[..., None] * own, axis=0)
    taught = jnp.broadcast_to(jax.nn.softmax(mixed) if double_softmax else mixed, own.shape)
  sure = counted & (jnp.max(taught, axis=-1) >= jnp.asarray(threshold, taught.dtype))
  each = optax.softmax_cross_entropy_with_integer_labels(wide, jnp.argmax(taught, axis=-1))
  means = jnp.sum(jnp.where(sure, each, 0), axis=1) / jnp.maximum(jnp.sum(sure, axis=1), 1)
  return narrowed(jnp.sum(means), head_logits.dtype)


def _check_heads(head_logits):
  check_float("head_logits", head_logits)
  head_logits = as_array("head_logits", head_logits)
  if head_logits.ndim != 3 or head_logits.shape[0] < 2:
    raise ValueError(f"head_logits must be [heads, batch, classes] of at least two heads, got {head_logits.shape}.")
  return head_logits


def _check_weights(weights, head_logits):
  check_float("weights", weights)
  weights = as_array("weights", weights)
  if weights.shape != head_logits.shape[:2]:
    raise ValueError(f"weights must be [heads, batch], expected {head_logits.shape[:2]}, got {weights.shape}.")
  return weights.astype(jnp.promote_types(head_logits.dtype, jnp.float32))


def _domains(domains, num_domains, shape):
  """Widened ids in range, and which were."""
  if not jnp.issubdtype(dtype_of("domains", domains), jnp.integer) or jnp.shape(domains) != shape:
    raise ValueError(
      f"domains must be integers of shape {shape}, got {jnp.shape(domains)} of dtype {jnp.result_type(domains)}."
    )
  domains = widened_integers(as_array("domains", domains))
  known = (domains >= 0) & (domains < num_domains)
  return jnp.where(known, domains, 0), known


def _fits(labels, known):
  """Whether labels are what `labelled` takes; what is not, it refuses."""
  return jnp.issubdtype(dtype_of("labels", labels), jnp.integer) and jnp.shape(labels) == known.shape


def _cross_entropy(logits, labels):
  batch = labelled(logits, labels)
  return batch.values(optax.softmax_cross_entropy_with_integer_labels(batch.logits, batch.labels))
