import jax
import numpy as np
import pytest

from jaxreg.data.algorithmic import modular_arithmetic, sparse_parity


@pytest.mark.parametrize("operation", ["add", "subtract", "multiply"])
def test_every_pair_occurs_once_with_its_label(operation):
  p = 7
  train, test = modular_arithmetic(
    jax.random.key(0), modulus=p, operation=operation, train_fraction=0.4, encoding="tokens"
  )
  assert len(train["x"]) == round(0.4 * p * p) and len(train["x"]) + len(test["x"]) == p * p
  pairs = np.concatenate([train["x"], test["x"]])
  labels = np.concatenate([train["y"], test["y"]])
  assert len({tuple(pair) for pair in pairs}) == p * p
  function = {"add": lambda a, b: a + b, "subtract": lambda a, b: a - b, "multiply": lambda a, b: a * b}[operation]
  assert all(label == function(int(a), int(b)) % p for (a, b), label in zip(pairs, labels))


def test_one_hot_is_the_same_split():
  tokens, _ = modular_arithmetic(jax.random.key(1), modulus=5, encoding="tokens")
  one_hot, _ = modular_arithmetic(jax.random.key(1), modulus=5)
  assert one_hot["x"].dtype == np.float32 and one_hot["x"].shape == (12, 10)
  np.testing.assert_array_equal(one_hot["x"].reshape(-1, 2, 5).argmax(-1), tokens["x"])
  np.testing.assert_array_equal(one_hot["y"], tokens["y"])
  assert (one_hot["x"].sum(-1) == 2).all()


def test_key_decides_the_split():
  first, again, other = (modular_arithmetic(jax.random.key(k), modulus=11, encoding="tokens")[0] for k in (0, 0, 1))
  np.testing.assert_array_equal(first["x"], again["x"])
  assert (first["x"] != other["x"]).any()


def test_sparse_parity():
  train, test = sparse_parity(jax.random.key(0), num_bits=20, num_relevant=3, train_size=400, test_size=300)
  for part, size in ((train, 400), (test, 300)):
    assert part["x"].shape == (size, 20) and part["x"].dtype == np.float32 and part["y"].dtype == np.int32
    assert set(np.unique(part["x"])) == {0, 1}
    np.testing.assert_array_equal(part["y"], part["x"][:, :3].sum(-1).astype(int) % 2)
    assert 0.3 < part["y"].mean() < 0.7


@pytest.mark.parametrize(
  "arguments",
  [{"modulus": 1}, {"train_fraction": 0.0}, {"train_fraction": 1e-6}, {"operation": "divide"}, {"encoding": "x"}],
)
def test_bad_modular_arguments(arguments):
  with pytest.raises(ValueError, match=next(iter(arguments))):
    modular_arithmetic(jax.random.key(0), **{"modulus": 5, **arguments})


def test_bad_parity_arguments():
  with pytest.raises(ValueError, match="num_relevant"):
    sparse_parity(jax.random.key(0), num_bits=3, num_relevant=4, train_size=1, test_size=1)


EXEMPT = {
  "modular_arithmetic": "makes a data set on the host",
  "sparse_parity": "makes a data set on the host",
}
