"""`bench`: side-by-side timings in one process; a benchmark is a module with `measure(options)` and a `TITLE`."""

import dataclasses
import importlib
import pathlib

BENCHMARKS = {
  "sweep": "many trials as one program against one at a time and against PyTorch",
  "kernels": "Gram matrices of neural tangent kernels, fully connected and convolutional",
  "losses": "forward and backward of every classification loss against optax's cross-entropy",
  "large_outputs": "memory and time of softmax-like losses over many classes: plain, sharded, chunked",
  "z_loss": "a step of an output layer over up to 800,000 classes: softmaxes against the factored Z-loss",
  "pair_losses": "losses of pairs of embeddings against pytorch-metric-learning",
  "domains": "a step of every method of domain generalization against one of ERM",
  "robust_losses": "memory and time of robust losses by the number of steps of their attacks",
  "compaction": "a pruned network with its zero neurons and filters in place and removed",
  "loop_conv": "training convolutions within one loop on a CPU: another gradient than that of JAX",
  "ftwt": "a convolution with filters pruned per image: whole, masked, gathered",
  "sparse_ot": "optimal transport with k non-zeros per column against ott-jax's Sinkhorn",
  "dcdm": "conjugate directions from a network against conjugate gradients, plain and preconditioned",
  "overhead": "a step of `fit` against a hand-written jitted loop",
  "paper": "memory per device of the `paper` presets, compiled without running",
}


@dataclasses.dataclass(frozen=True)
class Options:
  """How to benchmark.

  Attributes:
    repeats: timed repetitions, of which the fastest counts.
    commit: write the record next to the ledger's instead of to `runs/`.
    quick: small sizes, to see that everything runs.
  """

  repeats: int = 5
  commit: bool = False
  quick: bool = False


def run(names: list[str], options: Options) -> None:
  """Runs benchmarks, prints their tables and writes their records."""
  from experiments.harness import records, report, tables

  folder = records.RESULTS if options.commit else pathlib.Path("runs")
  for name in names:
    module = importlib.import_module(f"experiments.benchmarks.{name}")
    rows, notes = module.measure(options)
    tables.show(rows, keys=list(rows[0])[:1], title=module.TITLE)
    for note in notes:
      print(note)
    path = folder / "benchmarks" / f"{name}.json"
    records.write(path, {"title": module.TITLE, "rows": rows, "notes": notes, **records.environment()})
    print(f"record: {path}")
  if options.commit:
    report.report()
