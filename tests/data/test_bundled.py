"""The bundled data sets."""

import numpy as np
import pytest

from jaxreg.data import bundled


@pytest.mark.parametrize("load, shape", [(bundled.digits, (1797, 8, 8, 1)), (bundled.mnist_subset, (5000, 28, 28, 1))])
def test_images(load, shape):
  data = load()
  assert data["x"].shape == shape and data["x"].dtype == np.float32 and data["y"].dtype == np.int32
  assert data["x"].min() == 0 and data["x"].max() == 1 and set(np.unique(data["y"])) == set(range(10))


@pytest.mark.parametrize("name", bundled.TABULAR)
def test_tables(name):
  data = bundled.tabular(name)
  assert data["x"].dtype == np.float32 and len(data["x"]) == len(data["y"])
  with pytest.raises(ValueError, match="name must be one of"):
    bundled.tabular("boston")


def test_split_and_standardize():
  data = {"x": np.arange(20, dtype=np.float32)[:, None], "id": np.arange(20)}
  parts = bundled.split(data, sizes=(12, 5), seed=1)
  ids = np.concatenate([part["id"] for part in parts])
  assert len(set(ids.tolist())) == 17
  np.testing.assert_array_equal(parts[0]["x"][:, 0], parts[0]["id"])
  np.testing.assert_array_equal(bundled.split(data, sizes=(12,), seed=1)[0]["id"], parts[0]["id"])
  train, test = bundled.standardize(*parts)
  np.testing.assert_allclose([train["x"].mean(), train["x"].std()], [0, 1], atol=1e-6)
  assert test["x"].dtype == np.float32
  with pytest.raises(ValueError, match="sizes must add up"):
    bundled.split(data, sizes=(15, 6))
  with pytest.raises(ValueError, match="sizes must not be negative"):
    bundled.split(data, sizes=(15, -1))
  with pytest.raises(ValueError, match="data must be arrays with one common leading axis"):
    bundled.split({**data, "short": np.arange(19)}, sizes=(15,))
  with pytest.raises(ValueError, match="data must be arrays with one common leading axis"):
    bundled.split({"x": None}, sizes=(1,))


EXEMPT = {
  "digits": "reads files",
  "mnist_subset": "reads files",
  "photographs": "reads files",
  "split": "of NumPy arrays on the host",
  "standardize": "of NumPy arrays on the host",
  "tabular": "reads files",
}
