"""Streams of batches whose position can be saved: over arrays in memory, and over data sets prepared by TFDS.

The order is a property of the data, not of the machines: epoch e visits a permutation drawn from (seed, e), batch after
batch, and each host reads its part of every batch. So runs on different numbers of hosts see the same batches.
"""

import contextlib
import functools
import io
import itertools
import json
import logging
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxreg.data.errors import MissingDataError
from jaxreg.data.fingerprint import array_fingerprint
from jaxreg.extras import extra_needed

__all__ = ["Stream", "array_stream", "read_tfds", "tfds_stream"]


class _Plan(NamedTuple):
  """Which examples are in batch k of this host; the whole of it is known before anything is read."""

  examples: int
  batch_size: int
  seed: int | None
  num_epochs: int | None
  drop_remainder: bool
  process_index: int
  process_count: int

  @property
  def per_epoch(self) -> int:
    return self.examples // self.batch_size if self.drop_remainder else -(-self.examples // self.batch_size)

  @property
  def batches(self) -> int:
    return sys.maxsize if self.num_epochs is None else self.num_epochs * self.per_epoch


class Stream:
  """An iterator of batches with a position: the number of batches that it has handed out.

  `array_stream` and `tfds_stream` build it. The position does not depend on the host, so one saved on any host can be
  restored on any other, and also on another number of hosts.
  """

  def __init__(
    self, make_batch: Callable[[int], dict], plan: _Plan, source: dict, *, threads: int = 0, workers: int = 0
  ):
    self._make_batch, self._plan, self._threads, self._workers = make_batch, plan, threads, workers
    self._source = source
    self._position, self._iterator = 0, None

  def __iter__(self) -> "Stream":
    return self

  def __next__(self) -> dict[str, np.ndarray]:
    if self._iterator is None:
      self._iterator = _batches(self._make_batch, self._position, self._plan.batches, self._threads, self._workers)
    batch = next(self._iterator)
    self._position += 1
    return batch

  def get_state(self) -> bytes:
    """The position and what it is a position in, for `set_state` of a stream built with the same arguments."""
    return json.dumps({"batch": self._position, **self.identity}).encode()

  def set_state(self, state: bytes) -> None:
    """Continues where the stream was when `get_state` was called, without reading what lies before.

    Raises:
      ValueError: when the state is of another stream (its `identity`).
    """
    saved = json.loads(state)
    position = saved.pop("batch")
    if saved != self.identity:
      raise ValueError(f"state must be of a stream with {self.identity}, got {saved}.")
    self.close()
    self._position = position

  def close(self) -> None:
    """Stops the threads or processes that read ahead; the stream can still be read on."""
    if hasattr(self._iterator, "close"):
      self._iterator.close()
    self._iterator = None

  @property
  def identity(self) -> dict:
    """What the batches depend on: source, transformation, sizes and seed, as JSON values."""
    plan = {name: getattr(self._plan, name) for name in ("examples", "batch_size", "seed", "drop_remainder")}
    return {**plan, **self._source}


def array_stream(
  data: Mapping[str, Any],
  *,
  batch_size: int,
  seed: int | None,
  transform: Callable | None = None,
  process_index: int | None = None,
  process_count: int | None = None,
  num_epochs: int | None = None,
  drop_remainder: bool = True,
) -> Stream:
  """A stream of batches from arrays in memory, with the interface of `tfds_stream`.

  >>> import numpy as np
  >>> stream = array_stream({"x": np.arange(6.0)}, batch_size=2, seed=0)
  >>> first, position, second = next(stream), stream.get_state(), next(stream)
  >>> stream.set_state(position)
  >>> bool((next(stream)["x"] == second["x"]).all()), first["x"].shape, first["id"].dtype.name
  (True, (2,), 'int32')

  Args:
    data: arrays `[examples, ...]` by name.
    batch_size: examples per batch over all hosts.
    seed: non-negative; of the order of each epoch and of `transform`. None reads in order, for evaluation.
    transform: `(example, rng) -> example` on the dict of one example; the `np.random.Generator` depends on seed, epoch
      and example only. Slow for large batches, better to transform whole batches in the training step. It may put dicts
      into the example, which stay dicts.
    process_index: which host this is; default `jax.process_index()`.
    process_count: how many hosts there are, a divisor of `batch_size`; default `jax.process_count()`.
    num_epochs: after how many passes the stream ends; default never.
    drop_remainder: whether each epoch leaves out what does not fill a batch (others in each epoch). If not, its last
      batch is filled up with examples from its beginning, and every batch has an entry `"valid"`, False where it is so;
      `"id"` is -1 there, so that tables of per-example state stay as they are.

  Returns:
    A `Stream` of dicts of arrays `[batch_size // process_count, ...]`. `"id"` (int32) is the example's index in `data`,
    in place of an entry of that name. Text is left out, as devices cannot hold it; 64-bit integers become int32.

  Raises:
    ValueError: when an argument is out of range, the arrays differ in length, or an entry is neither numbers nor text.
  """
  if not isinstance(data, Mapping):
    raise ValueError(f"data must be arrays by name, got {type(data).__name__}.")
  data = {name: _array(name, values) for name, values in data.items()}
  lengths = {name: values.shape[:1] for name, values in data.items()}
  if not data or len(set(lengths.values())) != 1 or () in lengths.values():
    raise ValueError(f"data must be arrays with one common leading axis of examples, got leading sizes {lengths}.")
  examples = next(iter(lengths.values()))[0]
  plan = _plan(examples, batch_size, seed, num_epochs, drop_remainder, process_index, process_count)
  source = {"arrays": {name: array_fingerprint(values) for name, values in data.items()}, **_described(transform)}
  return Stream(functools.partial(_array_batch, data, transform, plan), plan, source)


def tfds_stream(
  name: str,
  split: str,
  *,
  batch_size: int,
  seed: int | None,
  data_dir=None,
  transform: Callable | None = None,
  process_index: int | None = None,
  process_count: int | None = None,
  num_epochs: int | None = None,
  drop_remainder: bool = True,
  threads: int = 4,
  workers: int = 0,
) -> Stream:
  """A stream of batches from a data set prepared by TFDS as array_record files, read ahead by grain.

  Nothing is downloaded or prepared here, and reading needs no TensorFlow. Every host must see the same files. Open only
  folders that you trust: TFDS imports the modules that a data set's `features.json` names.

  >>> import tempfile, numpy as np
  >>> from jaxreg.data.tfds_builder import write_tfds
  >>> with tempfile.TemporaryDirectory() as folder:
  ...   examples = {"image": np.zeros((6, 8, 8, 3), np.uint8), "label": np.arange(6)}
  ...   write_tfds("tiny_images", {"train": examples}, data_dir=folder)
  ...   stream = tfds_stream("tiny_images", "train", batch_size=3, seed=0, data_dir=folder)
  ...   batch = next(stream)
  ...   stream.close()
  >>> sorted(batch), batch["image"].shape, bool((batch["label"] == batch["id"]).all())
  (['id', 'image', 'label'], (3, 8, 8, 3), True)

  Args:
    name: TFDS's name, as `"imagenet2012"` or `"name/config:version"`.
    split: a split or a part of one, as `"train"` or `"train[:90%]"`.
    batch_size: examples per batch over all hosts.
    seed: non-negative; of the order of each epoch and of `transform`. None reads in order, for evaluation.
    data_dir: where the data are; default TFDS's own (`$TFDS_DATA_DIR` or `~/tensorflow_datasets`).
    transform: `(example, rng) -> example` on the dict of one example, as stored (images uint8 `[H, W, C]`, text bytes);
      the `np.random.Generator` depends on seed, epoch and example only. With `workers` it must be picklable.
    process_index: which host this is; default `jax.process_index()`.
    process_count: how many hosts there are, a divisor of `batch_size`; default `jax.process_count()`.
    num_epochs: after how many passes the stream ends; default never.
    drop_remainder: whether each epoch leaves out what does not fill a batch (others in each epoch). If not, its last
      batch is filled up with examples from its beginning, and every batch has an entry `"valid"`, False where it is so;
      `"id"` is -1 there, so that tables of per-example state stay as they are.
    threads: batches that are read at the same time, per worker; 0 reads only when asked.
    workers: processes that read; 0 reads in this one. They change the speed and nothing else.

  Returns:
    A `Stream` of dicts of arrays `[batch_size // process_count, ...]`. `"id"` (int32) is the example's index in the
    split as given, in stored order, in place of the data set's own `"id"` if it has one. Features of features stay
    dicts. Text is left out, as devices cannot hold it; 64-bit integers become int32.

  Raises:
    MissingDataError: when the set is not prepared; the message names the command.
    ValueError: when an argument is out of range, or examples differ in shape or entries.
  """
  if threads < 0 or workers < 0:
    raise ValueError(f"threads and workers must not be negative, got {threads} and {workers}.")
  source, channels = _open_tfds(name, split, data_dir)
  plan = _plan(len(source), batch_size, seed, num_epochs, drop_remainder, process_index, process_count)
  make_batch = functools.partial(_record_batch, source, channels, transform, plan)
  described = {"set": name, "split": split, **_described(transform)}
  return Stream(make_batch, plan, described, threads=threads, workers=workers)


def read_tfds(name: str, split: str, *, data_dir=None) -> dict[str, np.ndarray]:
  """All examples of a small data set prepared by TFDS, as arrays in stored order.

  As for `tfds_stream`, open only folders that you trust.

  >>> import tempfile, numpy as np
  >>> from jaxreg.data.tfds_builder import write_tfds
  >>> with tempfile.TemporaryDirectory() as folder:
  ...   write_tfds("tiny_vectors", {"train": {"x": np.eye(3, dtype=np.float32)}}, data_dir=folder)
  ...   read_tfds("tiny_vectors", "train", data_dir=folder)["x"].shape
  (3, 3)

  Args:
    name: TFDS's name.
    split: a split or a part of one.
    data_dir: where the data are; default TFDS's own.

  Returns:
    Arrays `[examples, ...]` by name, without text.

  Raises:
    MissingDataError: when the set is not prepared; the message names the command.
    ValueError: when examples differ in shape.
  """
  source, channels = _open_tfds(name, split, data_dir)
  return _stack([_decode(example, channels) for example in source])


def _described(transform) -> dict:
  """A transformation by its place in the code, through partials."""
  while isinstance(transform, functools.partial):
    transform = transform.func
  if transform is None:
    return {"transform": None}
  return {"transform": f"{transform.__module__}.{getattr(transform, '__qualname__', type(transform).__qualname__)}"}


def _plan(examples, batch_size, seed, num_epochs, drop_remainder, process_index, process_count) -> _Plan:
  count = jax.process_count() if process_count is None else process_count
  index = jax.process_index() if process_index is None else process_index
  if batch_size < 1 or (drop_remainder and batch_size > examples) or not examples:
    raise ValueError(f"batch_size must be between 1 and the {examples} examples of the data, got {batch_size}.")
  if count < 1 or not 0 <= index < count:
    raise ValueError(f"process_index must be in [0, process_count), got {index} of {count}.")
  if batch_size % count:
    raise ValueError(f"batch_size must be a multiple of process_count = {count}, got {batch_size}.")
  if seed is not None and seed < 0:
    raise ValueError(f"seed must be non-negative or None, got {seed}.")
  if num_epochs is not None and num_epochs < 1:
    raise ValueError(f"num_epochs must be positive or None, got {num_epochs}.")
  return _Plan(examples, batch_size, seed, num_epochs, drop_remainder, index, count)


@functools.lru_cache(maxsize=4)  # threads that read ahead may be in two epochs, of a training and a validation set
def _order(examples: int, seed: int, epoch: int) -> np.ndarray:
  return np.random.default_rng([seed, 1, epoch]).permutation(examples)


def _rows(plan: _Plan, batch: int):
  """The ids of this host's part of a batch, which of them are not filling, and the generator of an example."""
  epoch, index = divmod(batch, plan.per_epoch)
  local = plan.batch_size // plan.process_count
  places = index * plan.batch_size + plan.process_index * local + np.arange(local)
  ids = places % plan.examples
  if plan.seed is not None:
    ids = _order(plan.examples, plan.seed, epoch)[ids]
  valid = places < plan.examples
  extra = {"id": np.where(valid, ids, -1).astype(np.int32)}
  if not plan.drop_remainder:
    extra["valid"] = valid
  return ids, extra, lambda i: np.random.default_rng([plan.seed or 0, 2, epoch, i])


def _array_batch(data, transform, plan: _Plan, batch: int) -> dict[str, np.ndarray]:
  ids, extra, generator = _rows(plan, batch)
  if transform is None:
    return _for_devices({name: values[ids] for name, values in data.items()}) | extra
  rows = ({name: values[i] for name, values in data.items()} for i in ids)
  return _stack([_transformed(transform, row, generator(i)) for row, i in zip(rows, ids)]) | extra


def _record_batch(source, channels, transform, plan: _Plan, batch: int) -> dict[str, np.ndarray]:
  ids, extra, generator = _rows(plan, batch)
  rows = [_decode(example, channels) for example in source.__getitems__(ids.tolist())]
  if transform is not None:
    rows = [_transformed(transform, row, generator(i)) for row, i in zip(rows, ids)]
  return _stack(rows) | extra


def _decode(example: Mapping[str, Any], channels: Mapping[str, int]) -> dict[str, Any]:
  # TFDS's own decoder returns grey images of a colour set with one channel, and with OpenCV other bits than with PIL.
  with extra_needed("data", "reading images"):
    from PIL import Image

  example = dict(example)
  for name, count in channels.items():
    with Image.open(io.BytesIO(example[name])) as image:
      pixels = np.asarray(image.convert({1: "L", 3: "RGB", 4: "RGBA"}[count]))
    example[name] = pixels.reshape(*pixels.shape[:2], count)
  return example


def _transformed(transform, example: dict[str, Any], rng) -> Mapping[str, Any]:
  result = transform(example, rng)
  if not isinstance(result, Mapping):
    raise ValueError(f"transform must return a dict of arrays, got {type(result).__name__}.")
  return result


def _stack(rows: list[Mapping[str, Any]], place: str = "") -> dict[str, Any]:
  """Examples one above another; dicts within an example stay dicts."""
  columns = {}
  for row in rows:
    if row.keys() != rows[0].keys():
      named = sorted(place + str(name) for name in row.keys() ^ rows[0].keys())
      raise ValueError(f"examples of a batch must have the same entries, got {', '.join(named)} in some only.")
  for name in rows[0]:
    values, named = [row[name] for row in rows], f"{place}{name}"
    nested = {isinstance(value, Mapping) for value in values}
    if len(nested) > 1:
      raise ValueError(f"examples of a batch must be alike, got {named!r} as a dict in some only.")
    columns[name] = _stack(values, f"{named}/") if True in nested else _stack_arrays(named, values)
  return _for_devices(columns, place)


def _stack_arrays(name: str, values: list) -> np.ndarray:
  # TFDS gives a scalar of any float type as a Python number.
  values = [np.float32(value) if type(value) is float else _array(name, value) for value in values]
  shapes = {value.shape for value in values}
  if len(shapes) > 1:
    raise ValueError(
      f"examples of a batch must have equal shapes, got {name!r} of shapes {sorted(shapes)[:3]}; give a transform"
      " that brings them to one shape."
    )
  return np.stack(values)


def _array(name: str, value) -> np.ndarray:
  """An array of numbers or of text; what NumPy can only keep as Python's objects has no shape for a device."""
  try:
    array = np.asarray(value)
  except ValueError as error:
    raise ValueError(f"{name!r} must be an array, got rows of different lengths.") from error
  if _is_text(array) or (array.dtype.kind in "biufcV" and not array.dtype.fields):  # V: bfloat16 and its like
    return array
  objects = sorted({type(each).__name__ for each in array.ravel()})
  held = f"dtype {array.dtype}" if array.dtype.kind != "O" else f"objects of type {', '.join(objects)}"
  raise ValueError(f"{name!r} must be an array of numbers or text, got {held}.")


def _is_text(array: np.ndarray) -> bool:
  if array.dtype.kind == "O":  # an empty one says nothing, and holds nothing that could be lost
    return all(isinstance(value, (str, bytes)) for value in array.ravel())
  return array.dtype.kind in "SUT"


def _for_devices(columns: dict[str, Any], place: str = "") -> dict[str, Any]:
  """Without text, which no device holds, and with narrow integers."""
  return {
    name: values if isinstance(values, dict) else _narrow(place + name, values)
    for name, values in columns.items()
    if isinstance(values, dict) or not _is_text(values)
  }


def _narrow(name: str, values: np.ndarray) -> np.ndarray:
  if values.dtype not in (np.int64, np.uint64):
    return values
  narrow = values.astype(np.int32)
  if not np.array_equal(narrow, values):
    raise ValueError(f"integers must fit into int32, got {name!r} up to {np.abs(values).max()}.")
  return narrow


def _batches(make_batch, start: int, stop: int, threads: int, workers: int) -> Iterator[dict[str, np.ndarray]]:
  if not threads and not workers:
    return map(make_batch, itertools.takewhile(lambda batch: batch < stop, itertools.count(start)))
  with extra_needed("data", "reading ahead"):
    import grain

  # Grain counts from `start`, so restoring a position is opening the stream there, whatever reads ahead.
  options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads)
  batches = grain.MapDataset.range(start, stop).map(make_batch).to_iter_dataset(options)
  if workers:
    with extra_needed("data", "reading ahead"):
      from absl import flags

    if not flags.FLAGS.is_parsed():  # grain's workers read absl flags, which only programs run by absl have parsed
      flags.FLAGS.mark_as_parsed()
    batches = batches.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers))
  return iter(batches)


def _open_tfds(name: str, split: str, data_dir):
  """The random-access source of a split, images as stored bytes, and the channels of each image by name."""
  with extra_needed("data", "reading a TFDS data set"):
    import tensorflow_datasets as tfds

  folder = data_dir or tfds.core.constants.DATA_DIR
  with _quiet():
    try:
      builder = tfds.builder(name, data_dir=data_dir)
    except tfds.core.DatasetNotFoundError:
      raise MissingDataError(
        f"{name} is not in {folder}, and tensorflow-datasets has no data set of that name; check the name, or run"
        f" `tfds build --file_format=array_record --data_dir={folder}` in the folder of its builder, with tensorflow"
        " installed."
      ) from None  # TFDS's message is the list of all its data sets
    if not builder.is_prepared():
      raise MissingDataError(
        f"{name} is not prepared in {builder.data_dir}. Prepare it with"
        f" `tfds build {name} --file_format=array_record --data_dir={folder}` in an environment with tensorflow and"
        " tensorflow-datasets (only preparing needs tensorflow; some sets, as imagenet2012, first want their archives"
        f" put into {folder}/downloads/manual)."
      )
    features = builder.info.features
    images = (key for key, feature in features.items() if isinstance(feature, tfds.features.Image))
    channels = {key: features[key].shape[-1] for key in images if features[key].np_dtype == np.uint8}
    try:
      source = builder.as_data_source(split, decoders={key: tfds.decode.SkipDecoding() for key in channels})
    except NotImplementedError as error:
      raise MissingDataError(
        f"{name} in {builder.data_dir} is not stored as array_record, which reading needs. Add that format with"
        f" `tfds convert_format --dataset_version_dir={builder.data_dir} --out_file_format=array_record`."
      ) from error
  return source, channels


@contextlib.contextmanager
def _quiet():
  """Keeps TFDS's warnings about folders without data to itself: our error says it better."""
  logger = logging.getLogger("absl")
  level = logger.level
  logger.setLevel(logging.ERROR)
  try:
    yield
  finally:
    logger.setLevel(level)
