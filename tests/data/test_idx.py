"""IDX files of every type, gzipped and plain, and the places where Fashion-MNIST is looked for."""

import gzip
import struct
import tracemalloc

import hypothesis
import hypothesis.extra.numpy as hnp
import numpy as np
import pytest

from jaxreg.data import idx
from jaxreg.data.errors import MissingDataError
from jaxreg.data.tfds_builder import write_tfds

CODES = {"u1": 8, "i1": 9, "i2": 0x0B, "i4": 0x0C, "f4": 0x0D, "f8": 0x0E}


def idx_bytes(array):
  code = CODES[array.dtype.str[1:]]
  head = bytes([0, 0, code, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
  return head + array.astype(array.dtype.newbyteorder(">")).tobytes()


def write_set(folder, train=7, test=3, compress=gzip.compress, suffix=".gz"):
  rng = np.random.default_rng(0)
  folder.mkdir(parents=True, exist_ok=True)
  arrays = {}
  for part, count in (("train", train), ("t10k", test)):
    arrays[part] = rng.integers(0, 256, (count, 28, 28)).astype(np.uint8), np.arange(count, dtype=np.uint8) % 10
    for kind, array in zip(("images-idx3", "labels-idx1"), arrays[part]):
      (folder / f"{part}-{kind}-ubyte{suffix}").write_bytes(compress(idx_bytes(array)))
  return arrays


@pytest.fixture
def nowhere(monkeypatch, tmp_path):
  """No data set is installed on this machine."""
  monkeypatch.setattr(idx.sys, "prefix", str(tmp_path / "prefix"))
  monkeypatch.delenv("JAXREG_DATA", raising=False)
  places = idx._places
  monkeypatch.setattr(idx, "_places", lambda: [place for place in places() if tmp_path in place.parents])
  return tmp_path


@hypothesis.settings(max_examples=30, deadline=None)
@hypothesis.given(
  hnp.arrays(hypothesis.strategies.sampled_from(sorted(CODES)), hnp.array_shapes(min_dims=0, min_side=0)),
  hypothesis.strategies.booleans(),
)
def test_roundtrip(tmp_path_factory, array, compressed):
  path = tmp_path_factory.mktemp("idx") / "file"
  raw = idx_bytes(array)
  path.write_bytes(gzip.compress(raw, 1) if compressed else raw)
  read = idx.read_idx(path)
  assert read.dtype == array.dtype and read.dtype.isnative
  np.testing.assert_array_equal(read, array)


@pytest.mark.parametrize(
  "damage",
  [
    lambda raw: b"",
    lambda raw: raw[:3],
    lambda raw: raw[:-1],
    lambda raw: raw + b"\0",
    lambda raw: b"PNG!" + raw[4:],
    lambda raw: b"\0\0\x07" + raw[3:],
    lambda raw: raw[:9],
    lambda raw: raw[:3] + b"\xff" + b"\1" * 1020,
    lambda raw: raw[:3] + b"\2" + b"\xff" * 8 + raw,
    lambda raw: raw[:3] + b"\4" + b"\0" * 4 + b"\xff" * 12,
    lambda raw: gzip.compress(raw[:3] + b"\2" + b"\xff" * 8 + raw),
    lambda raw: gzip.compress(raw + b"\0"),
    lambda raw: gzip.compress(raw)[:-1],
    lambda raw: gzip.compress(raw)[:-8] + bytes(8),
    lambda raw: gzip.compress(raw)[:-9],
    lambda raw: gzip.compress(raw)[:12] + b"\xff" * 30,
  ],
)
def test_damaged_file_names_itself(tmp_path, damage):
  path = tmp_path / "broken-file"
  path.write_bytes(damage(idx_bytes(np.arange(12, dtype=np.int32).reshape(3, 4))))
  with pytest.raises(ValueError, match="broken-file must"):
    idx.read_idx(path)


@pytest.mark.parametrize("shape", [(3,), (2**26 + 1,), (2**16, 2**16)])
def test_no_more_is_inflated_than_the_header_announces(tmp_path, shape):
  """128 MiB of zeros in 130 kB, with a header of few values, of half of them, and of more than deflate can hold."""
  head = bytes([0, 0, 8, len(shape)]) + struct.pack(f">{len(shape)}I", *shape)
  path = tmp_path / "bomb-file"
  path.write_bytes(gzip.compress(head + bytes(2**27), 9))
  tracemalloc.start()
  with pytest.raises(ValueError, match="bomb-file must have"):
    idx.read_idx(path)
  peak = tracemalloc.get_traced_memory()[1]
  tracemalloc.stop()
  announced = np.prod(shape)
  assert peak < 2**20 + (announced if announced < 2**27 else 0)


def test_memory_is_that_of_the_array(tmp_path):
  values = np.arange(2**20, dtype=np.float32)
  path = tmp_path / "file"
  path.write_bytes(gzip.compress(idx_bytes(values), 1))
  tracemalloc.start()
  read = idx.read_idx(path)
  peak = tracemalloc.get_traced_memory()[1]
  tracemalloc.stop()
  assert peak < values.nbytes + 2**20 and read.flags.writeable
  np.testing.assert_array_equal(read, values)


@pytest.mark.parametrize("compress, suffix", [(gzip.compress, ".gz"), (bytes, "")])
def test_fashion_mnist_from_a_folder(tmp_path, compress, suffix):
  arrays = write_set(tmp_path / "set", compress=compress, suffix=suffix)
  for part, (images, labels) in zip(idx.fashion_mnist(tmp_path / "set"), arrays.values()):
    assert part["x"].dtype == np.float32 and part["y"].dtype == np.int32
    np.testing.assert_array_equal(part["x"], images[..., None].astype(np.float32) / np.float32(255))
    np.testing.assert_array_equal(part["y"], labels)


def test_places_in_order(nowhere, monkeypatch):
  write_set(nowhere / "prefix" / "share" / "datasets" / "fashion-mnist", train=4)
  assert len(idx.fashion_mnist()[0]["y"]) == 4
  write_set(nowhere / "own" / "fashion-mnist", train=5)
  monkeypatch.setenv("JAXREG_DATA", str(nowhere / "own"))
  assert len(idx.fashion_mnist()[0]["y"]) == 5


def test_copy_prepared_by_tfds(nowhere):
  arrays = write_set(nowhere / "set", train=6, test=4)
  named = {"train": arrays["train"], "test": arrays["t10k"]}
  splits = {name: {"image": images[..., None], "label": labels} for name, (images, labels) in named.items()}
  write_tfds("fashion_mnist", splits, data_dir=nowhere / "tfds")
  for ours, theirs in zip(idx.fashion_mnist(data_dir=nowhere / "tfds"), idx.fashion_mnist(nowhere / "set")):
    for name in ("x", "y"):
      np.testing.assert_array_equal(ours[name], theirs[name])


def test_missing_set_names_the_command(nowhere):
  with pytest.raises(MissingDataError, match="apt-get install dataset-fashion-mnist.*tfds build fashion_mnist"):
    idx.fashion_mnist(data_dir=nowhere)
  write_set(nowhere / "half")
  (nowhere / "half" / "t10k-labels-idx1-ubyte.gz").unlink()
  with pytest.raises(FileNotFoundError, match="half"):
    idx.fashion_mnist(nowhere / "half")


def test_images_and_labels_must_fit(tmp_path):
  write_set(tmp_path)
  (tmp_path / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx_bytes(np.zeros(6, np.uint8))))
  with pytest.raises(ValueError, match="images and labels"):
    idx.fashion_mnist(tmp_path)


def test_installed_set():
  try:
    train, test = idx.fashion_mnist()
  except MissingDataError as error:
    pytest.skip(str(error))
  for part, count in ((train, 60_000), (test, 10_000)):
    assert part["x"].shape == (count, 28, 28, 1) and part["x"].min() == 0 and part["x"].max() == 1
    np.testing.assert_array_equal(np.bincount(part["y"]), np.full(10, count // 10))


EXEMPT = {
  "fashion_mnist": "reads files",
  "read_idx": "reads files",
}
