"""Algorithmic data sets on which networks grok: modular arithmetic and sparse parity."""

import jax
import numpy as np

from jaxreg.checks import check_hyperparameter

__all__ = ["modular_arithmetic", "sparse_parity"]

_OPERATIONS = {"add": np.add, "subtract": np.subtract, "multiply": np.multiply}


def modular_arithmetic(
  key: jax.Array, *, modulus: int, operation: str = "add", train_fraction: float = 0.5, encoding: str = "one_hot"
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
  """All pairs `(a, b)` with the label `(a op b) mod modulus`, split at random into training and test examples.

  >>> import jax
  >>> train, test = modular_arithmetic(jax.random.key(0), modulus=5, train_fraction=0.4)
  >>> train["x"].shape, test["x"].shape, train["y"].dtype
  ((10, 10), (15, 10), dtype('int32'))
  >>> train, _ = modular_arithmetic(jax.random.key(0), modulus=5, operation="subtract", encoding="tokens")
  >>> bool((train["y"] == (train["x"][:, 0] - train["x"][:, 1]) % 5).all())
  True

  Args:
    key: decides the split and the order of the examples.
    modulus: number of residues, at least 2.
    operation: "add", "subtract" or "multiply".
    train_fraction: in (0, 1): the share of the `modulus^2` pairs to train on, rounded to whole pairs.
    encoding: "one_hot" for float32 `x[n, 2 modulus]`, the one-hot of `a` before that of `b`; "tokens" for int32
      `x[n, 2]`.

  Returns:
    `(train, test)`, each with inputs `x` and int32 labels `y[n]`.

  Raises:
    ValueError: when an argument lies outside its domain or a split would be empty.

  Reference: Prieto, Barsbey, Mediano, Birdal, "Grokking at the Edge of Numerical Stability", ICLR 2025, Section 2 (the
    operands of their transformer runs leave out 0; these do not).
  """
  check_hyperparameter("modulus", modulus, low=2)
  check_hyperparameter("train_fraction", train_fraction, low=0, high=1, open_low=True, open_high=True)
  if operation not in _OPERATIONS:
    raise ValueError(f"operation must be one of {sorted(_OPERATIONS)}, got {operation!r}.")
  if encoding not in ("one_hot", "tokens"):
    raise ValueError(f"encoding must be 'one_hot' or 'tokens', got {encoding!r}.")
  train_size = round(train_fraction * modulus**2)
  if not 0 < train_size < modulus**2:
    raise ValueError(f"train_fraction must leave pairs on both sides, got {train_fraction} of {modulus**2} pairs.")
  order = np.asarray(jax.random.permutation(key, modulus**2))
  pairs = np.stack(np.divmod(order, modulus), axis=1).astype(np.int32)
  labels = (_OPERATIONS[operation](pairs[:, 0], pairs[:, 1]) % modulus).astype(np.int32)
  inputs = np.eye(modulus, dtype=np.float32)[pairs].reshape(len(pairs), -1) if encoding == "one_hot" else pairs
  return _split(inputs, labels, train_size)


def sparse_parity(
  key: jax.Array, *, num_bits: int, num_relevant: int, train_size: int, test_size: int
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
  """Uniform bit strings labelled with the parity of their first `num_relevant` bits.

  Bits are drawn independently, so that a short string may occur in both splits.

  >>> import jax
  >>> train, test = sparse_parity(jax.random.key(0), num_bits=30, num_relevant=3, train_size=100, test_size=50)
  >>> train["x"].shape, test["x"].shape
  ((100, 30), (50, 30))
  >>> bool((train["y"] == train["x"][:, :3].sum(axis=1) % 2).all())
  True

  Args:
    key: decides the bits.
    num_bits: total number of bits.
    num_relevant: number of bits that the label depends on (`k`), at most `num_bits`.
    train_size: number of training examples.
    test_size: number of test examples.

  Returns:
    `(train, test)`, each with float32 bits `x[n, num_bits]` in {0, 1} and int32 labels `y[n]` in {0, 1}.

  Raises:
    ValueError: when an argument lies outside its domain.

  Reference: Prieto, Barsbey, Mediano, Birdal, "Grokking at the Edge of Numerical Stability", ICLR 2025, Section 2.
  """
  check_hyperparameter("num_bits", num_bits, low=1)
  check_hyperparameter("num_relevant", num_relevant, low=1, high=num_bits)
  check_hyperparameter("train_size", train_size, low=1)
  check_hyperparameter("test_size", test_size, low=1)
  bits = np.asarray(jax.random.bernoulli(key, 0.5, (train_size + test_size, num_bits)))
  labels = (bits[:, :num_relevant].sum(axis=1) % 2).astype(np.int32)
  return _split(bits.astype(np.float32), labels, train_size)


def _split(inputs, labels, train_size):
  return tuple({"x": inputs[part], "y": labels[part]} for part in (slice(train_size), slice(train_size, None)))
