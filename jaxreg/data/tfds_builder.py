"""Writes arrays as a TFDS data set of array_record files, without TensorFlow; for tests and for data of one's own."""

import io
import itertools
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxreg.data.names import check_file_name
from jaxreg.extras import extra_needed

__all__ = ["write_tfds"]


def write_tfds(name: str, splits: Mapping[str, Mapping[str, Any]], *, data_dir, shards: int = 2) -> None:
  """Writes arrays as a data set that TFDS, and so `stream.tfds_stream`, reads by name.

  For a name that TFDS knows (`"imagenet2012"`, `"cifar10"`) the files have that set's schema, version and encoding, so
  that code for the real set reads them unchanged; text that is not given is made up from the example's number. For any
  other name uint8 `[N, H, W, C]` become PNG images, integers `[N]` class labels and everything else tensors.

  >>> import tempfile, numpy as np
  >>> from jaxreg.data.stream import read_tfds
  >>> with tempfile.TemporaryDirectory() as folder:
  ...   examples = {"image": np.zeros((4, 32, 32, 3), np.uint8), "label": np.array([3, 1, 4, 1])}
  ...   write_tfds("cifar10", {"train": examples, "test": examples}, data_dir=folder)
  ...   read_tfds("cifar10", "test", data_dir=folder)["label"].tolist()
  [3, 1, 4, 1]

  Args:
    name: the data set's name, in lower case, without path parts.
    splits: arrays `[examples, ...]` by name, by split; images may be a list of `[H, W, C]` of different sizes. Names
      have no path parts.
    data_dir: TFDS's folder; the files go to `<data_dir>/<name>/<version>`.
    shards: files per split.

  Raises:
    FileExistsError: when the data set is already there.
    ValueError: when a name has path parts, or the arrays of a split differ in length or do not fit the schema.
  """
  with extra_needed("data", "write_tfds"):
    import tensorflow_datasets as tfds

  _check(name, splits, shards)
  features, version = _schema(name, next(iter(splits.values())), data_dir)
  folder = pathlib.Path(data_dir, name, version)
  folder.mkdir(parents=True)
  infos = [_write_split(folder, name, split, columns, features, shards) for split, columns in splits.items()]
  tfds.folder_dataset.write_metadata(
    data_dir=folder, features=features, split_infos=infos, version=version, description=f"{name}, written by jaxreg",
    check_data=False,  # its check reads with TensorFlow
  )  # fmt: skip


def _check(name, splits, shards) -> None:
  check_file_name("name", name)
  if shards < 1 or not splits:
    raise ValueError(f"there must be at least one shard and one split, got {shards} and {len(splits)}.")
  for split, columns in splits.items():
    check_file_name("a split", split)
    for key in columns:  # TFDS writes the names of classes to files that are named by the entry
      check_file_name(f"an entry of {split!r}", key)
    lengths = {key: len(values) if hasattr(values, "__len__") else type(values) for key, values in columns.items()}
    if len(set(lengths.values())) != 1 or not all(isinstance(n, int) and n >= shards for n in lengths.values()):
      raise ValueError(f"arrays of {split!r} must share one length of at least {shards} shards, got {lengths}.")


def _schema(name: str, columns: Mapping[str, Any], data_dir):
  with extra_needed("data", "write_tfds"):
    import tensorflow_datasets as tfds

  if name in tfds.list_builders(with_community_datasets=False):
    builder = tfds.builder(name, data_dir=data_dir)
    return builder.info.features, str(builder.version)
  return tfds.features.FeaturesDict({key: _feature(values) for key, values in columns.items()}), "1.0.0"


def _feature(values):
  with extra_needed("data", "write_tfds"):
    import tensorflow_datasets as tfds

  first = np.asarray(values[0])
  if first.dtype.kind not in "biufc":
    raise ValueError(f"arrays of a set that TFDS does not know must hold numbers, got dtype {first.dtype}.")
  if first.dtype == np.uint8 and first.ndim == 3:
    same = isinstance(values, np.ndarray)
    return tfds.features.Image(shape=first.shape if same else (None, None, first.shape[-1]), encoding_format="png")
  if first.dtype.kind in "iu" and first.ndim == 0:
    return tfds.features.ClassLabel(num_classes=int(np.max(values)) + 1)
  return tfds.features.Tensor(shape=first.shape, dtype=first.dtype)


def _write_split(folder, name: str, split: str, columns, features, shards: int):
  with extra_needed("data", "write_tfds"):
    import tensorflow_datasets as tfds
    from array_record.python.array_record_module import ArrayRecordWriter

  count = len(next(iter(columns.values())))
  edges = [round(shard * count / shards) for shard in range(shards + 1)]
  size = 0
  for shard, (start, stop) in enumerate(itertools.pairwise(edges)):
    path = folder / f"{name}-{split}.array_record-{shard:05d}-of-{shards:05d}"
    writer = ArrayRecordWriter(str(path), "group_size:1")  # as TFDS writes: each record can be read alone
    for i in range(start, stop):
      example = {key: _value(feature, key, columns, split, i) for key, feature in features.items()}
      record = features.serialize_example(features.encode_example(example))
      size += len(record)
      writer.write(record)
    writer.close()
  template = tfds.core.ShardedFileTemplate(folder, dataset_name=name, split=split, filetype_suffix="array_record")
  lengths = [stop - start for start, stop in itertools.pairwise(edges)]
  return tfds.core.SplitInfo(name=split, shard_lengths=lengths, num_bytes=size, filename_template=template)


def _value(feature, key: str, columns, split: str, i: int):
  with extra_needed("data", "write_tfds"):
    import tensorflow_datasets as tfds
    from PIL import Image

  if key not in columns and isinstance(feature, tfds.features.Text):
    return f"{split}_{i:08d}"
  if key not in columns:
    raise ValueError(f"the schema has an entry {key!r}, got only {sorted(columns)}.")
  value = np.asarray(columns[key][i])
  if not isinstance(feature, tfds.features.Image):
    return value.item() if value.ndim == 0 else value
  encoded = io.BytesIO()  # bytes, because TFDS encodes arrays with TensorFlow
  picture = Image.fromarray(value[..., 0] if value.shape[-1] == 1 else value)
  picture.save(encoded, format="JPEG" if feature._encoding_format == "jpeg" else "PNG")
  return encoded.getvalue()
