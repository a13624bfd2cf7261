"""IDX files, the format in which MNIST and its successors are distributed, and Fashion-MNIST from them."""

import gzip
import os
import pathlib
import sys
import zlib

import numpy as np

from jaxreg.data.errors import MissingDataError

__all__ = ["fashion_mnist", "read_idx"]

_DTYPES = {0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}


def read_idx(path) -> np.ndarray:
  """Reads one IDX file, gzipped or plain.

  The format: two zero bytes, a byte for the type, one for the rank, the sizes as big-endian 32-bit integers, then the
  values in C order.

  >>> import pathlib, tempfile
  >>> with tempfile.TemporaryDirectory() as folder:
  ...   path = pathlib.Path(folder, "labels-idx1-ubyte")
  ...   _ = path.write_bytes(bytes([0, 0, 8, 1, 0, 0, 0, 3, 7, 8, 9]))
  ...   read_idx(path).tolist()
  [7, 8, 9]

  Args:
    path: the file; whether it is gzipped is seen from its first bytes, not from its name.

  Returns:
    An array of the file's shape and type, in the machine's byte order.

  Raises:
    FileNotFoundError: when there is no such file.
    ValueError: when it is not a complete IDX file.

  Reference:
    Y. LeCun, C. Cortes, C. J. C. Burges, "The MNIST database of handwritten digits", section "file formats".
  """
  raw = pathlib.Path(path).read_bytes()
  if raw[:2] == b"\x1f\x8b":
    try:
      raw = gzip.decompress(raw)
    except (EOFError, OSError, zlib.error) as error:
      raise ValueError(f"{path} must be a complete gzip file, got: {error}.") from error
  if len(raw) < 4 or raw[:2] != b"\0\0" or raw[2] not in _DTYPES or len(raw) < 4 + 4 * raw[3]:
    raise ValueError(f"{path} must be an IDX file (two zero bytes, type, rank, sizes), got {raw[:4]!r}.")
  start, dtype = 4 + 4 * raw[3], np.dtype(_DTYPES[raw[2]])
  shape = tuple(np.frombuffer(raw, ">u4", raw[3], 4).tolist())
  expected = start + int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
  if len(raw) != expected:
    raise ValueError(f"{path} must have {expected} bytes for shape {shape}, got {len(raw)}.")
  return np.frombuffer(raw, dtype, offset=start).reshape(shape).astype(dtype.newbyteorder("="))


def fashion_mnist(folder=None, *, data_dir=None) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
  """Fashion-MNIST: 60,000 training and 10,000 test images of ten kinds of clothing, 28 by 28.

  Searched in this order: `$JAXREG_DATA/fashion-mnist`; `share/datasets/fashion-mnist` under Python's prefix,
  `/usr/local` and `/usr` (where Debian's package puts it); a copy prepared by TFDS (its images take seconds to decode).

  >>> from jaxreg.data.errors import MissingDataError
  >>> try:
  ...   train, test = fashion_mnist("/no/such/folder")
  ... except MissingDataError as error:
  ...   print(str(error)[:31])
  Fashion-MNIST is not in /no/suc

  Args:
    folder: where the four IDX files are, gzipped or plain, instead of the places above.
    data_dir: TFDS's folder; default TFDS's own.

  Returns:
    `(train, test)`, each `{"x": float32 [examples, 28, 28, 1] in [0, 1], "y": int32 [examples] in [0, 10)}`.

  Raises:
    MissingDataError: when it is in none of these places.
    ValueError: when a file is damaged.

  Reference:
    H. Xiao, K. Rasul, R. Vollgraf, "Fashion-MNIST: a Novel Image Dataset for Benchmarking Machine Learning Algorithms",
    2017.
  """
  places = [pathlib.Path(folder)] if folder is not None else _places()
  for place in places:
    files = [_find(place, part, kind) for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")]
    if all(files):
      arrays = [read_idx(file) for file in files]
      return _examples(*arrays[:2]), _examples(*arrays[2:])
  if folder is None:
    prepared = _prepared(data_dir)
    if prepared is not None:
      return prepared
  raise MissingDataError(
    f"Fashion-MNIST is not in {', '.join(map(str, places))}{'' if folder is not None else ' nor prepared by TFDS'}."
    " On Debian or Ubuntu install it with `apt-get install dataset-fashion-mnist`; elsewhere run"
    " `tfds build fashion_mnist --file_format=array_record` in an environment with tensorflow and tensorflow-datasets"
    " (only preparing needs tensorflow), or put the four IDX files into $JAXREG_DATA/fashion-mnist."
  )


def _places() -> list[pathlib.Path]:
  own = os.environ.get("JAXREG_DATA")
  prefixes = dict.fromkeys([sys.prefix, "/usr/local", "/usr"])
  shared = [pathlib.Path(prefix, "share", "datasets", "fashion-mnist") for prefix in prefixes]
  return ([pathlib.Path(own, "fashion-mnist")] if own else []) + shared


def _find(place: pathlib.Path, part: str, kind: str) -> pathlib.Path | None:
  names = (place / f"{part}-{kind}-ubyte{suffix}" for suffix in ("", ".gz"))
  return next((name for name in names if name.is_file()), None)


def _examples(images: np.ndarray, labels: np.ndarray) -> dict[str, np.ndarray]:
  if images.ndim != 3 or labels.shape != images.shape[:1]:
    raise ValueError(f"images and labels must be [N, H, W] and [N], got {images.shape} and {labels.shape}.")
  return {"x": images[..., None].astype(np.float32) / np.float32(255), "y": labels.astype(np.int32)}


def _prepared(data_dir):
  from jaxreg.data.stream import read_tfds  # here, because IDX files can be read without TFDS

  try:
    parts = [read_tfds("fashion_mnist", split, data_dir=data_dir) for split in ("train", "test")]
  except (ImportError, MissingDataError):
    return None
  return tuple(_examples(part["image"][..., 0], part["label"]) for part in parts)
