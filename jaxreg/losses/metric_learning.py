"""Losses of pairs of embeddings: one form of which contrastive, multi-similarity and other losses are instances.

Every example of a batch is an anchor, the other examples of its label are its positives, all others its negatives.
Losses of embeddings return a value for each anchor; their mean is what is usually minimised. Examples whose label is
negative, or that `where` leaves out, are neither anchors nor positives nor negatives: their embeddings are not read.
With `chunk_size` the similarities of a few anchors exist at a time, and are computed again in the backward pass: memory
grows linearly with the batch, and processors with caches are faster. Under `pmap` or `shard_map` every device takes its
own examples as anchors and those of all devices as positives and negatives (`axis_name`); gradients of the sum of all
devices' values are then those of one device. Under a sharded `jit` nothing is needed.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxreg.checks import as_array, check_float, check_hyperparameter, dtype_of, example_mask, widened_integers
from jaxreg.losses.labelled_logits import narrowed, widened
from jaxreg.metrics.norms import normalized_rows
from jaxreg.metrics.pairs import Rows, in_blocks, pairs_of

__all__ = [
  "PairLossForm",
  "PairTerm",
  "binomial_deviance_form",
  "contrastive_form",
  "contrastive_loss",
  "general_pair_loss",
  "lifted_structure_form",
  "multi_similarity_form",
  "multi_similarity_loss",
  "nca_form",
  "normalized_embeddings",
  "pair_loss",
  "proxy_anchor_form",
  "supcon_form",
  "supcon_loss",
]

REDUCTIONS = ("sum", "mean", "log_sum_exp")


def _identity(x):
  return x


class PairTerm(NamedTuple):
  """What the positives, or the negatives, of an anchor add to its loss: `outer(reduction of pair(s))`.

  Attributes:
    pair: elementwise function of similarities; with `log_sum_exp` the logarithm of a pair's summand.
    reduction: `sum`; `mean`, the sum divided by the number of pairs; or `log_sum_exp`, the logarithm of the sum of
      exponentials, which does not overflow.
    outer: of the reduced value. An anchor without such pairs gets 0.
  """

  pair: Callable[[jax.Array], jax.Array]
  reduction: str = "sum"
  outer: Callable[[jax.Array], jax.Array] = _identity


class PairLossForm(NamedTuple):
  """A loss of an anchor in terms of its similarities s: `outer(positive term + negative term)`.

  Attributes:
    positive: the term of the positives, which draws them nearer.
    negative: the term of the negatives.
    outer: of the sum of both.
    contrast_all: whether the negative term is over all other examples, positives among them.
  """

  positive: PairTerm
  negative: PairTerm
  outer: Callable[[jax.Array], jax.Array] = _identity
  contrast_all: bool = False


def contrastive_form(*, margin: ArrayLike = 0.5, reduction: str = "sum") -> PairLossForm:
  """`- sum of s over positives + sum of [s - margin]_+ over negatives`.

  >>> import jax.numpy as jnp
  >>> form = contrastive_form(margin=0.5)
  >>> general_pair_loss(jnp.array([[0.75, 0.75]]), jnp.array([[1.0, 0.0]]), form=form).tolist()
  [-0.5]

  Args:
    margin: m, the similarity up to which negatives do not count; a scalar, may be traced.
    reduction: static; `sum`, or `mean` over the pairs of a kind.

  Returns:
    `PairLossForm`.

  Raises:
    ValueError: when an argument is out of range.

  Reference: Hadsell, Chopra, LeCun, "Dimensionality Reduction by Learning an Invariant Mapping", CVPR 2006; in the form
    of Venkataramanan et al., ICLR 2022.
  """
  check_hyperparameter("margin", margin, shape=())
  if reduction not in ("sum", "mean"):
    raise ValueError(f"reduction must be sum or mean, got {reduction!r}.")
  hinge = lambda s: jax.nn.relu(s - _as(s, margin))
  return PairLossForm(PairTerm(jnp.negative, reduction), PairTerm(hinge, reduction))


def multi_similarity_form(*, beta: ArrayLike = 2.0, gamma: ArrayLike = 40.0, margin: ArrayLike = 0.5) -> PairLossForm:
  """`log(1 + sum of exp(-beta (s - m))) / beta` over positives plus `log(1 + sum of exp(gamma (s - m))) / gamma`.

  >>> import jax.numpy as jnp, numpy as np
  >>> form = multi_similarity_form(beta=1.0, gamma=1.0, margin=0.5)
  >>> print(np.asarray(general_pair_loss(jnp.array([[0.5, 0.5]]), jnp.array([[1.0, 0.0]]), form=form)).round(4))
  [1.3863]

  Args:
    beta: positive scalar; may be traced, as the others. Some call it alpha.
    gamma: positive scalar. Some call it beta.
    margin: m, scalar. Some call it base.

  Returns:
    `PairLossForm`.

  Raises:
    ValueError: when a hyperparameter is out of range.

  Reference: Wang, Han, Huang, Dong, Scott, "Multi-Similarity Loss with General Pair Weighting for Deep Metric
    Learning", CVPR 2019, equation 15, without the mining of pairs.
  """
  check_hyperparameter("beta", beta, low=0, open_low=True, shape=())
  check_hyperparameter("gamma", gamma, low=0, open_low=True, shape=())
  check_hyperparameter("margin", margin, shape=())
  return PairLossForm(
    PairTerm(
      lambda s: -_as(s, beta) * (s - _as(s, margin)), "log_sum_exp", lambda z: jax.nn.softplus(z) / _as(z, beta)
    ),
    PairTerm(
      lambda s: _as(s, gamma) * (s - _as(s, margin)), "log_sum_exp", lambda z: jax.nn.softplus(z) / _as(z, gamma)
    ),
  )


def binomial_deviance_form(*, beta: ArrayLike = 2.0, gamma: ArrayLike = 40.0, margin: ArrayLike = 0.5) -> PairLossForm:
  """Sums of `log(1 + exp(-beta (s - m)))` over positives and of `log(1 + exp(gamma (s - m)))` over negatives.

  >>> import jax.numpy as jnp, numpy as np
  >>> form = binomial_deviance_form(margin=0.5)
  >>> print(np.asarray(general_pair_loss(jnp.array([[0.5, 0.5]]), jnp.array([[1.0, 0.0]]), form=form)).round(4))
  [1.3863]

  Args:
    beta: positive scalar; may be traced, as the others.
    gamma: positive scalar.
    margin: scalar.

  Returns:
    `PairLossForm`.

  Raises:
    ValueError: when a hyperparameter is out of range.

  Reference: Yi, Lei, Liao, Li, "Deep Metric Learning for Person Re-Identification", ICPR 2014; in the form of
    Venkataramanan et al., ICLR 2022 (that this is the form meant there is not verified).
  """
  form = multi_similarity_form(beta=beta, gamma=gamma, margin=margin)
  softplus = lambda term: PairTerm(lambda s: jax.nn.softplus(term.pair(s)))
  return PairLossForm(softplus(form.positive), softplus(form.negative))


def lifted_structure_form(*, margin: ArrayLike = 1.0) -> PairLossForm:
  """`[log sum of exp(-s) over positives + log sum of exp(s - margin) over negatives]_+`.

  >>> import jax.numpy as jnp
  >>> general_pair_loss(jnp.array([[0.25, 1.5]]), jnp.array([[1.0, 0.0]]), form=lifted_structure_form()).tolist()
  [0.25]

  Args:
    margin: scalar; may be traced.

  Returns:
    `PairLossForm`.

  Raises:
    ValueError: when `margin` is no scalar.

  Reference: Oh Song, Xiang, Jegelka, Savarese, "Deep Metric Learning via Lifted Structured Feature Embedding", CVPR
    2016; in the form of Venkataramanan et al., ICLR 2022 (not verified).
  """
  check_hyperparameter("margin", margin, shape=())
  return PairLossForm(
    PairTerm(jnp.negative, "log_sum_exp"), PairTerm(lambda s: s - _as(s, margin), "log_sum_exp"), jax.nn.relu
  )


def nca_form(*, temperature: ArrayLike = 1.0) -> PairLossForm:
  """`- log sum of exp(s / T) over positives + log sum of exp(s / T) over negatives`.

  >>> import jax.numpy as jnp, numpy as np
  >>> print(np.asarray(general_pair_loss(jnp.array([[0.5, 0.75]]), jnp.array([[1.0, 0.0]]), form=nca_form())).round(4))
  [0.25]

  Args:
    temperature: T, positive scalar; may be traced.

  Returns:
    `PairLossForm`.

  Raises:
    ValueError: when `temperature` is not positive.

  Reference: Goldberger, Roweis, Hinton, Salakhutdinov, "Neighbourhood Components Analysis", NeurIPS 2004; in the form
    of Venkataramanan et al., ICLR 2022 (not verified).
  """
  check_hyperparameter("temperature", temperature, low=0, open_low=True, shape=())
  scaled = lambda s: s / _as(s, temperature)
  return PairLossForm(PairTerm(scaled, "log_sum_exp", jnp.negative), PairTerm(scaled, "log_sum_exp"))


def proxy_anchor_form(*, alpha: ArrayLike = 32.0, margin: ArrayLike = 0.1) -> PairLossForm:
  """`log(1 + sum of exp(-alpha (s - m)))` over positives plus `log(1 + sum of exp(alpha (s + m)))` over negatives.

  The anchors are proxies, one for each class, and the examples the batch: `general_pair_loss` of their similarities
  `[classes, batch]`. The paper takes the mean of the first term over the proxies that have positives, and that of the
  second over all.

  >>> import jax.numpy as jnp, numpy as np
  >>> form = proxy_anchor_form(alpha=1.0, margin=0.0)
  >>> print(np.asarray(general_pair_loss(jnp.array([[0.0, 0.0]]), jnp.array([[1.0, 0.0]]), form=form)).round(4))
  [1.3863]

  Args:
    alpha: positive scalar; may be traced.
    margin: m, scalar; may be traced.

  Returns:
    `PairLossForm`.

  Raises:
    ValueError: when a hyperparameter is out of range.

  Reference: Kim, Kim, Cho, Kwak, "Proxy Anchor Loss for Deep Metric Learning", CVPR 2020, equation 4.
  """
  check_hyperparameter("alpha", alpha, low=0, open_low=True, shape=())
  check_hyperparameter("margin", margin, shape=())
  return PairLossForm(
    PairTerm(lambda s: -_as(s, alpha) * (s - _as(s, margin)), "log_sum_exp", jax.nn.softplus),
    PairTerm(lambda s: _as(s, alpha) * (s + _as(s, margin)), "log_sum_exp", jax.nn.softplus),
  )


def supcon_form(*, temperature: ArrayLike = 0.5) -> PairLossForm:
  """`- mean of s / T over positives + log sum of exp(s / T) over all others`.

  >>> import jax.numpy as jnp, numpy as np
  >>> form = supcon_form(temperature=1.0)
  >>> print(np.asarray(general_pair_loss(jnp.array([[0.0, 0.0]]), jnp.array([[1.0, 0.0]]), form=form)).round(4))
  [0.6931]

  Args:
    temperature: T, positive scalar; may be traced.

  Returns:
    `PairLossForm`.

  Raises:
    ValueError: when `temperature` is not positive.

  Reference: Khosla et al., "Supervised Contrastive Learning", NeurIPS 2020, equation 2.
  """
  check_hyperparameter("temperature", temperature, low=0, open_low=True, shape=())
  scaled = lambda s: s / _as(s, temperature)
  return PairLossForm(PairTerm(scaled, "mean", jnp.negative), PairTerm(scaled, "log_sum_exp"), contrast_all=True)


def general_pair_loss(
  similarities: ArrayLike, soft_labels: ArrayLike, *, form: PairLossForm, where: ArrayLike | None = None
) -> jax.Array:
  """A loss of pairs whose labels, relative to the anchor, may lie between 0 (negative) and 1 (positive).

  A pair of label y enters the positive term with weight y and the negative one with weight 1 - y; one of weight 0 is
  left out of a term, whatever its similarity.

  >>> import jax.numpy as jnp, numpy as np
  >>> similarities = jnp.array([[0.8, 0.6, 0.1]])
  >>> value = general_pair_loss(similarities, jnp.array([[1.0, 0.5, 0.0]]), form=contrastive_form(margin=0.5))
  >>> print(np.asarray(value).round(3))
  [-1.05]

  Args:
    similarities: floating `[anchors, examples]`.
    soft_labels: floating, of the same shape or one that broadcasts to it, in [0, 1].
    form: the loss.
    where: boolean, of the same shape or one that broadcasts to it: the pairs that count.

  Returns:
    `[anchors]`. An anchor without positives, or without negatives, has a term of 0 in their place.

  Raises:
    ValueError: when shapes or dtypes do not fit.

  Reference: Venkataramanan, Psomas, Kijak, Amsaleg, Karantzalos, Avrithis, "It Takes Two to Tango: Mixup for Deep
    Metric Learning", ICLR 2022, the general loss and its mixed form.
  """
  similarities, soft_labels = as_array("similarities", similarities), as_array("soft_labels", soft_labels)
  check_float("similarities", similarities)
  check_float("soft_labels", soft_labels)
  if similarities.ndim != 2:
    raise ValueError(f"similarities must be [anchors, examples], got shape {similarities.shape}.")
  check_form(form)
  wide = widened(similarities)
  weights = _broadcast("soft_labels", soft_labels, wide.shape).astype(wide.dtype)
  counted = jnp.ones(wide.shape, bool) if where is None else _broadcast("where", as_array("where", where), wide.shape)
  if counted.dtype != bool:
    raise ValueError(f"where must be boolean, got dtype {counted.dtype}.")
  wide, weights = jnp.where(counted, wide, 0), jnp.where(counted, weights, 0)
  contrast = jnp.ones_like(weights) if form.contrast_all else 1 - weights
  values = _of_terms(form, wide, (weights, (weights != 0) & counted), (contrast, (contrast != 0) & counted))
  return narrowed(values, similarities.dtype)


def pair_loss(
  embeddings: ArrayLike,
  labels: ArrayLike,
  *,
  form: PairLossForm,
  normalize: bool = True,
  lone_anchors: bool = False,
  where: ArrayLike | None = None,
  chunk_size: int | None = None,
  axis_name: str | None = None,
) -> jax.Array:
  """The loss of a form, for each example as the anchor, over all pairs of a batch.

  >>> import jax.numpy as jnp
  >>> embeddings, labels = jnp.array([[2.0, 0.0], [1.0, 0.0], [0.0, 3.0]]), jnp.array([4, 4, 7])
  >>> pair_loss(embeddings, labels, form=contrastive_form(margin=0.5)).tolist()
  [-1.0, -1.0, 0.0]

  Args:
    embeddings: floating `[batch, features]`.
    labels: integers `[batch]` of any width; an example with a negative one does not count.
    form: the loss of an anchor.
    normalize: static; whether similarities are cosines, else inner products.
    lone_anchors: static; whether an anchor without positives counts with its negatives, as in
      pytorch-metric-learning. If not, its loss is 0; it is a negative of others either way.
    where: boolean `[batch]`, the examples that count.
    chunk_size: static; how many anchors at a time; None takes all.
    axis_name: static; under `pmap` or `shard_map`, the axis that splits the batch.

  Returns:
    `[batch]`, the loss of each anchor; 0 for examples that do not count.

  Raises:
    ValueError: when shapes or dtypes do not fit.

  Reference: Venkataramanan et al., ICLR 2022, the general loss.
  """
  check_form(form)
  batch = embedded(embeddings, labels, where=where, normalize=normalize, axis_name=axis_name)

  def values(similarities, positive, negative):
    contrast = positive | negative if form.contrast_all else negative
    found = _of_terms(form, similarities, (None, positive), (None, contrast))
    return found if lone_anchors else jnp.where(jnp.any(positive, axis=-1), found, 0)

  return batch.values(map_anchors(values, batch, chunk_size))


def contrastive_loss(
  embeddings: ArrayLike,
  labels: ArrayLike,
  *,
  margin: ArrayLike = 0.5,
  reduction: str = "sum",
  lone_anchors: bool = False,
  where: ArrayLike | None = None,
  chunk_size: int | None = None,
  axis_name: str | None = None,
) -> jax.Array:
  """The contrastive loss of cosines, `- sum of s over positives + sum of [s - margin]_+ over negatives`.

  >>> import jax.numpy as jnp, numpy as np
  >>> embeddings, labels = jnp.array([[2.0, 0.0], [1.0, 0.0], [1.0, 1.0]]), jnp.array([0, 0, 1])
  >>> print(np.asarray(contrastive_loss(embeddings, labels)).round(3))
  [-0.793 -0.793  0.   ]

  Args:
    embeddings: floating `[batch, features]`.
    labels: integers `[batch]`; see `pair_loss`, also for the arguments below that are not said here.
    margin: as in `contrastive_form`.
    reduction: static; as in `contrastive_form`.
    lone_anchors: static.
    where: boolean `[batch]`.
    chunk_size: static.
    axis_name: static.

  Returns:
    `[batch]`, the loss of each anchor.

  Raises:
    ValueError: when shapes do not fit or a hyperparameter is out of range.

  Reference: Hadsell, Chopra, LeCun, CVPR 2006; in the form of Venkataramanan et al., ICLR 2022.
  """
  form = contrastive_form(margin=margin, reduction=reduction)
  options = dict(lone_anchors=lone_anchors, where=where, chunk_size=chunk_size, axis_name=axis_name)
  return pair_loss(embeddings, labels, form=form, **options)


def multi_similarity_loss(
  embeddings: ArrayLike,
  labels: ArrayLike,
  *,
  beta: ArrayLike = 2.0,
  gamma: ArrayLike = 40.0,
  margin: ArrayLike = 0.5,
  lone_anchors: bool = False,
  where: ArrayLike | None = None,
  chunk_size: int | None = None,
  axis_name: str | None = None,
) -> jax.Array:
  """The multi-similarity loss over all pairs of a batch, without mining; see `multi_similarity_form`.

  >>> import jax.numpy as jnp, numpy as np
  >>> embeddings, labels = jnp.array([[2.0, 0.0], [1.0, 0.0], [0.0, 3.0]]), jnp.array([0, 0, 1])
  >>> print(np.asarray(multi_similarity_loss(embeddings, labels)).round(3))
  [0.157 0.157 0.   ]

  Args:
    embeddings: floating `[batch, features]`.
    labels: integers `[batch]`; see `pair_loss`, also for the arguments below that are not said here.
    beta: positive scalar.
    gamma: positive scalar.
    margin: scalar.
    lone_anchors: static.
    where: boolean `[batch]`.
    chunk_size: static.
    axis_name: static.

  Returns:
    `[batch]`, the loss of each anchor.

  Raises:
    ValueError: when shapes do not fit or a hyperparameter is out of range.

  Reference: Wang, Han, Huang, Dong, Scott, CVPR 2019, equation 15.
  """
  form = multi_similarity_form(beta=beta, gamma=gamma, margin=margin)
  options = dict(lone_anchors=lone_anchors, where=where, chunk_size=chunk_size, axis_name=axis_name)
  return pair_loss(embeddings, labels, form=form, **options)


def supcon_loss(
  embeddings: ArrayLike,
  labels: ArrayLike,
  *,
  temperature: ArrayLike = 0.5,
  where: ArrayLike | None = None,
  chunk_size: int | None = None,
  axis_name: str | None = None,
) -> jax.Array:
  """The supervised contrastive loss (SupCon): cross-entropy to each positive among all other examples.

  Of several views of the same inputs stack the embeddings and repeat the labels (`jnp.tile(labels, views)`). Where
  every input is a label of its own and has two views, this is NT-Xent, `optax.losses.ntxent`.

  >>> import jax.numpy as jnp, numpy as np
  >>> embeddings, labels = jnp.array([[2.0, 0.0], [1.0, 0.0], [0.0, 3.0]]), jnp.array([0, 0, 1])
  >>> print(np.asarray(supcon_loss(embeddings, labels, temperature=1.0)).round(3))
  [0.313 0.313 0.   ]

  Args:
    embeddings: floating `[batch, features]`; their lengths do not count.
    labels: integers `[batch]`; see `pair_loss`, also for the arguments below that are not said here.
    temperature: positive scalar; may be traced.
    where: boolean `[batch]`.
    chunk_size: static.
    axis_name: static.

  Returns:
    `[batch]`, the loss of each anchor; 0 of one without positives.

  Raises:
    ValueError: when shapes do not fit or `temperature` is not positive.

  Reference: Khosla, Teterwak, Wang, Sarna, Tian, Isola, Maschinot, Liu, Krishnan, "Supervised Contrastive Learning",
    NeurIPS 2020, equation 2.
  """
  form = supcon_form(temperature=temperature)
  return pair_loss(embeddings, labels, form=form, where=where, chunk_size=chunk_size, axis_name=axis_name)


def normalized_embeddings(embeddings: ArrayLike) -> jax.Array:
  """Embeddings of length one, in float32 at least; those of zeros, and the gradient there, stay zero.

  >>> import jax.numpy as jnp, numpy as np
  >>> print(np.asarray(normalized_embeddings(jnp.array([[3e30, 4e30], [0.0, 0.0]]))).round(3))
  [[0.6 0.8]
   [0.  0. ]]

  Args:
    embeddings: floating `[..., features]`.

  Returns:
    `[..., features]`.

  Raises:
    ValueError: when the embeddings are not floating point or a scalar.

  Reference: none.
  """
  embeddings = as_array("embeddings", embeddings)
  check_float("embeddings", embeddings)
  if embeddings.ndim < 1:
    raise ValueError("embeddings must have an axis of features, got a scalar.")
  return normalized_rows(widened(embeddings))


class Embedded(NamedTuple):
  """A batch as the losses of pairs compute with it."""

  anchors: Rows  # this device's
  others: Rows  # all devices'
  dtype: np.dtype  # of the embeddings as they came, and of the loss

  def values(self, values: jax.Array) -> jax.Array:
    """A loss as it is returned: 0 for examples that do not count, in the dtype of the embeddings."""
    return narrowed(jnp.where(self.anchors.counted, values, 0), self.dtype)


def embedded(embeddings, labels, *, where=None, normalize: bool = True, axis_name: str | None = None) -> Embedded:
  """Checked embeddings and labels in one form, with those of all devices; see `pair_loss` for the arguments.

  >>> import jax.numpy as jnp
  >>> batch = embedded(jnp.ones((2, 4)), jnp.array([3, -1]))
  >>> batch.anchors.embeddings.tolist(), batch.anchors.counted.tolist()
  ([[0.5, 0.5, 0.5, 0.5], [0.0, 0.0, 0.0, 0.0]], [True, False])
  """
  embeddings, labels = as_array("embeddings", embeddings), as_array("labels", labels)
  check_float("embeddings", embeddings)
  if embeddings.ndim != 2:
    raise ValueError(f"embeddings must be [batch, features], got shape {embeddings.shape}; use vmap for more.")
  if not jnp.issubdtype(dtype_of("labels", labels), jnp.integer) or labels.shape != embeddings.shape[:1]:
    raise ValueError(
      f"labels must be integers of shape {embeddings.shape[:1]}, got {labels.shape} of dtype {labels.dtype}."
    )
  counted = labels >= 0
  if where is not None:
    counted &= example_mask(where, labels.shape)
  rows = jnp.where(counted[:, None], widened(embeddings), 0)
  rows = normalized_embeddings(rows) if normalize else rows
  places = jnp.arange(len(rows), dtype=jnp.int32)
  if axis_name is not None:
    places += len(rows) * jax.lax.axis_index(axis_name)
  anchors = Rows(rows, widened_integers(labels), counted, places)
  others = anchors if axis_name is None else jax.lax.all_gather(anchors, axis_name, tiled=True)
  return Embedded(anchors, others, embeddings.dtype)


def map_anchors(function: Callable, batch: Embedded, chunk_size: int | None = None) -> Any:
  """Applies a function of the pairs of some anchors to all of them, a chunk at a time.

  >>> import jax.numpy as jnp
  >>> batch = embedded(jnp.ones((3, 2)), jnp.array([0, 0, 1]))
  >>> count = lambda similarities, positive, negative: (positive.sum(-1), negative.sum(-1))
  >>> [found.tolist() for found in map_anchors(count, batch, 2)]
  [[1, 1, 0], [1, 1, 2]]

  Args:
    function: `(similarities, positive, negative) -> tree of arrays [anchors, ...]`, given `[anchors, examples]`.
    batch: from `embedded`.
    chunk_size: how many anchors at a time; None takes all.

  Returns:
    The results of all anchors.
  """
  if chunk_size is not None and chunk_size < 1:
    raise ValueError(f"chunk_size must be positive, got {chunk_size}.")
  of_rows = lambda rows: function(*pairs_of(rows, batch.others))
  if chunk_size is None or chunk_size >= len(batch.anchors.labels):
    # Of all that is [anchors, examples] only the similarities are kept for the backward pass.
    return jax.checkpoint(lambda: of_rows(batch.anchors), policy=jax.checkpoint_policies.dots_saveable)()
  return in_blocks(jax.checkpoint(of_rows), batch.anchors, chunk_size)


def check_form(form) -> None:
  """Raises ValueError unless `form` is a `PairLossForm` with known reductions."""
  if not isinstance(form, PairLossForm):
    raise ValueError(f"form must be a PairLossForm, got {type(form).__name__}.")
  for term in (form.positive, form.negative):
    if term.reduction not in REDUCTIONS:
      raise ValueError(f"reduction must be one of {', '.join(REDUCTIONS)}, got {term.reduction!r}.")


def _of_terms(form: PairLossForm, similarities, positive, negative):
  """The loss of each anchor; `positive` and `negative` are (weights or None, mask)."""
  terms = (_reduced(term, similarities, *of) for term, of in ((form.positive, positive), (form.negative, negative)))
  return form.outer(sum(terms))


def _reduced(term: PairTerm, similarities, weights, mask):
  empty = ~jnp.any(mask, axis=-1)
  values = term.pair(similarities)
  weighted = (lambda x: x) if weights is None else (lambda x: weights * x)
  if term.reduction == "log_sum_exp":
    largest = jax.lax.stop_gradient(jnp.max(values, axis=-1, where=mask, initial=-jnp.inf, keepdims=True))
    largest = jnp.where(empty[:, None], 0, largest)
    total = jnp.sum(jnp.where(mask, weighted(jnp.exp(jnp.where(mask, values - largest, 0))), 0), axis=-1)
    found = jnp.log(jnp.where(empty, 1, total)) + largest[:, 0]
  else:
    found = jnp.sum(jnp.where(mask, weighted(values), 0), axis=-1)
    if term.reduction == "mean":
      found /= jnp.maximum(jnp.sum(mask, axis=-1), 1).astype(found.dtype)
  return jnp.where(empty, 0, term.outer(found))


def _as(like, value):
  return jnp.asarray(value, like.dtype)


def _broadcast(name, array, shape):
  try:
    return jnp.broadcast_to(array, shape)
  except ValueError:
    raise ValueError(f"{name} must broadcast to the shape of the similarities {shape}, got {array.shape}.") from None
