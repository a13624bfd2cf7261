"""Losses of pairs of embeddings, forward and backward, against pytorch-metric-learning's."""

import functools
import os

import jax
import numpy as np

from experiments.benchmarks import Options
from experiments.benchmarks.timing import interleaved
from jaxreg.losses import metric_learning

TITLE = "Losses of pairs, value and gradient in the embeddings, against pytorch-metric-learning on the CPU, float32"
FEATURES, PER_CLASS = 128, 4
CHUNK = 512


def measure(options: Options):
  """Rows: one per loss and batch size."""
  pairs = _pairs()
  rows = []
  for batch in (64,) if options.quick else (512, 4096):
    rng = np.random.default_rng(0)
    embeddings = rng.normal(size=(batch, FEATURES)).astype(np.float32)
    labels = np.repeat(np.arange(batch // PER_CLASS), PER_CLASS).astype(np.int32)
    rows += [_row(name, *pair, embeddings, labels, options) for name, pair in pairs.items()]
  notes = [
    f"{FEATURES} features, {PER_CLASS} examples of every class, cosines of all pairs, no mining. Each time is the"
    " fastest of several calls that take turns; PyTorch uses as many threads as there are cores. `chunked` takes"
    f" {CHUNK} anchors at a time and computes similarities twice: its memory is linear in the batch.",
    "`difference` is that of the mean losses, relative; contrastive losses are reduced otherwise there (over the pairs"
    " that are not zero), and their values differ.",
  ]
  if any(row["PyTorch ms"] is None for row in rows):
    notes.append("PyTorch's columns are empty: pip install torch pytorch-metric-learning.")
  return rows, notes


def _pairs():
  """name -> our loss, and a function that makes theirs (None where it is not installed)."""
  ours = {
    "multi-similarity": functools.partial(
      metric_learning.multi_similarity_loss, beta=2.0, gamma=50.0, margin=0.5, lone_anchors=True
    ),
    "SupCon": functools.partial(metric_learning.supcon_loss, temperature=0.1),
    "contrastive": functools.partial(metric_learning.contrastive_loss, margin=0.0, reduction="mean"),
  }
  try:
    from pytorch_metric_learning import distances, losses
  except ImportError:
    return {name: (loss, None) for name, loss in ours.items()}
  theirs = {
    "multi-similarity": lambda: losses.MultiSimilarityLoss(alpha=2, beta=50, base=0.5),
    "SupCon": lambda: losses.SupConLoss(temperature=0.1),
    "contrastive": lambda: losses.ContrastiveLoss(pos_margin=1, neg_margin=0, distance=distances.CosineSimilarity()),
  }
  return {name: (loss, theirs[name]) for name, loss in ours.items()}


def _row(name, loss, make_theirs, embeddings, labels, options: Options):
  batch = len(embeddings)
  x, y = jax.device_put((embeddings, labels))

  def step(chunk):
    mean = lambda x: loss(x, y, chunk_size=chunk).mean()
    return jax.jit(jax.value_and_grad(mean))

  whole, chunked = step(None), step(min(CHUNK, batch // 2))
  calls = {"ours": lambda: whole(x), "chunked": lambda: chunked(x)}
  if make_theirs is not None:
    calls["theirs"] = _torch_call(make_theirs(), embeddings, labels)
  seconds = interleaved(calls, repeats=2 if options.quick else max(options.repeats, 7))
  row = {"loss": name, "batch": batch, "ms": 1e3 * seconds["ours"], "chunked ms": 1e3 * seconds["chunked"]}
  row |= {"PyTorch ms": None, "best / PyTorch": None, "difference": None}
  if make_theirs is not None:
    value, other = float(whole(x)[0]), calls["theirs"]()[0]
    row |= {
      "PyTorch ms": 1e3 * seconds["theirs"],
      "best / PyTorch": min(seconds["ours"], seconds["chunked"]) / seconds["theirs"],
      "difference": abs(value - other) / abs(other),
    }
  return row


def _torch_call(loss, embeddings, labels):
  import torch

  torch.set_num_threads(len(os.sched_getaffinity(0)))
  x = torch.tensor(embeddings, requires_grad=True)
  y = torch.tensor(labels.astype(np.int64))

  def call():
    x.grad = None
    value = loss(x, y)
    value.backward()
    return value.item(), x.grad.numpy()

  return call
