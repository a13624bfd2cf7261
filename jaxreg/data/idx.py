"""IDX files, the format in which MNIST and its successors are distributed, and Fashion-MNIST from them."""

import contextlib
import gzip
import math
import os
import pathlib
import sys
import zlib

import numpy as np

from jaxreg.data.errors import MissingDataError

__all__ = ["fashion_mnist", "read_idx"]

_DTYPES = {0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
_MAX_RANK = 64  # NumPy's
_PIECE = 2**18  # bytes; gzip makes a copy of what it is asked for
_MOST_INFLATED = 1032  # deflate's limit: a match of 258 bytes takes at least two bits


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
    path: the file; whether it is gzipped is seen from its first bytes, not from its name. Its header is read first, and
      nothing beyond what the header announces is inflated.

  Returns:
    An array of the file's shape and type, in the machine's byte order.

  Raises:
    FileNotFoundError: when there is no such file.
    ValueError: when it is not a complete IDX file.

  Reference:
    Y. LeCun, C. Cortes, C. J. C. Burges, "The MNIST database of handwritten digits", section "file formats".
  """
  with open(path, "rb") as plain:
    compressed = plain.read(2) == b"\x1f\x8b"
    plain.seek(0)
    stored = os.fstat(plain.fileno()).st_size
    try:
      with gzip.GzipFile(fileobj=plain) if compressed else contextlib.nullcontext(plain) as file:
        return _read(path, file, stored, compressed)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
      raise ValueError(f"{path} must be a complete gzip file, got: {error}.") from error


def _read(path, file, stored: int, compressed: bool) -> np.ndarray:
  """The array, for which no more memory is taken than a file of `stored` bytes can hold values for."""
  head = file.read(4)
  if len(head) < 4 or head[:2] != b"\0\0" or head[2] not in _DTYPES or head[3] > _MAX_RANK:
    raise ValueError(f"{path} must be an IDX file (two zero bytes, type, rank, sizes), got {head!r}.")
  sizes = file.read(4 * head[3])
  if len(sizes) < 4 * head[3]:
    raise ValueError(f"{path} must have {head[3]} sizes of 4 bytes, got {len(sizes)} bytes.")
  shape, dtype = tuple(np.frombuffer(sizes, ">u4").tolist()), np.dtype(_DTYPES[head[2]])
  values = math.prod(shape) * dtype.itemsize
  start = 4 + len(sizes)
  expected = f"{path} must have {start + values} bytes for shape {shape}"
  if start + values > (_MOST_INFLATED * stored if compressed else stored):
    raise ValueError(f"{expected}, got a{' compressed' if compressed else ''} file of {stored}.")
  raw = np.empty(values, np.uint8)
  got = _fill(file, memoryview(raw))
  if got < values:
    raise ValueError(f"{expected}, got {start + got}.")
  if file.read(1):
    raise ValueError(f"{expected}, got more.")
  try:
    array = raw.view(dtype).reshape(shape)
  except ValueError as error:  # no values, but sizes whose product NumPy cannot count
    raise ValueError(f"{path} must have a shape that an array can have, got {shape}.") from error
  return array if dtype.isnative else array.byteswap(inplace=True).view(dtype.newbyteorder("="))


def _fill(file, buffer: memoryview) -> int:
  """Reads until the buffer is full or the file ends, and returns the number of bytes read."""
  got = 0
  while got < len(buffer) and (count := file.readinto(buffer[got : got + _PIECE])):
    got += count
  return got


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
