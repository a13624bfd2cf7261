"""Streams over arrays and over real array_record sets written into temporary folders."""

import io
import json
import subprocess
import sys

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from PIL import Image

from jaxreg.data.errors import MissingDataError
from jaxreg.data.stream import array_stream, read_tfds, tfds_stream
from jaxreg.data.tfds_builder import write_tfds
from jaxreg.losses import elr_init, elr_loss
from jaxreg.training import fit, gradient_task

COUNT = 23


def examples(count, size=32, seed=0):
  rng = np.random.default_rng(seed)
  return {"image": rng.integers(0, 256, (count, size, size, 3)).astype(np.uint8), "label": np.arange(count) % 10}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """A TFDS folder with small sets of the schemas of cifar10 and imagenet2012."""
  path = tmp_path_factory.mktemp("tfds")
  write_tfds("cifar10", {"train": examples(COUNT), "test": examples(7, seed=1)}, data_dir=path, shards=3)
  # A smooth picture, so that JPEG keeps it to a few grey levels.
  ramp = np.broadcast_to(np.arange(0, 240, 10, dtype=np.uint8)[:, None, None], (24, 16, 3))
  pictures = [np.broadcast_to(ramp, (24, 16, 3)), ramp.transpose(1, 0, 2), np.full((8, 8, 3), 90, np.uint8)]
  write_tfds("imagenet2012", {"train": {"image": pictures, "label": np.array([999, 0, 5])}}, data_dir=path, shards=1)
  return path


def noisy(example, rng):
  return {"image": example["image"].astype(np.float32) + rng.normal(), "label": example["label"]}


def open_stream(kind, folder, *, batch_size=4, seed=5, **options):
  if kind == "array":
    return array_stream(examples(COUNT), batch_size=batch_size, seed=seed, **options)
  return tfds_stream("cifar10", "train", data_dir=folder, batch_size=batch_size, seed=seed, **options)


def take(stream, count):
  batches = [next(stream) for _ in range(count)]
  stream.close()
  return batches


def assert_equal(batches, others):
  assert len(batches) == len(others)
  for batch, other in zip(batches, others):
    assert batch.keys() == other.keys()
    for name in batch:
      assert batch[name].dtype == other[name].dtype
      np.testing.assert_array_equal(batch[name], other[name])


KINDS = pytest.mark.parametrize("kind", ["array", "tfds"])


@KINDS
def test_batches_hold_the_examples_of_their_ids(kind, folder):
  data = examples(COUNT)
  for batch in take(open_stream(kind, folder), 12):
    assert {name: (array.dtype.name, array.shape) for name, array in batch.items()} == {
      "image": ("uint8", (4, 32, 32, 3)),
      "label": ("int32", (4,)),
      "id": ("int32", (4,)),
    }
    for name in data:
      np.testing.assert_array_equal(batch[name], data[name][batch["id"]])


@KINDS
def test_each_epoch_is_another_order_without_repetition(kind, folder):
  per_epoch = COUNT // 4
  ids = np.concatenate([batch["id"] for batch in take(open_stream(kind, folder), 3 * per_epoch)]).reshape(3, -1)
  assert all(len(set(epoch)) == 4 * per_epoch for epoch in ids)
  assert len({tuple(epoch) for epoch in ids}) == 3
  other = np.concatenate([batch["id"] for batch in take(open_stream(kind, folder, seed=6), per_epoch)])
  assert tuple(other) not in {tuple(epoch) for epoch in ids}  # grain's own shuffle uses seed + epoch, ours must not


@KINDS
def test_two_hosts_partition_every_batch(kind, folder):
  whole = take(open_stream(kind, folder, transform=noisy), 10)
  hosts = [take(open_stream(kind, folder, transform=noisy, process_index=i, process_count=2), 10) for i in range(2)]
  for batch, first, second in zip(whole, *hosts):
    assert len(first["id"]) == len(second["id"]) == 2
    assert_equal([batch], [{name: np.concatenate([first[name], second[name]]) for name in batch}])
  ids = np.concatenate([batch["id"] for host in hosts for batch in host[: COUNT // 4]])
  assert len(set(ids)) == len(ids) == 4 * (COUNT // 4)


@KINDS
@pytest.mark.parametrize("drawn", [0, 1, 5, 13])
def test_restored_position_continues_bit_identically(kind, folder, drawn):
  whole = take(open_stream(kind, folder, transform=noisy), drawn + 6)
  stream = open_stream(kind, folder, transform=noisy)
  assert_equal([next(stream) for _ in range(drawn)], whole[:drawn])
  state = stream.get_state()  # while batches are being read ahead
  assert isinstance(state, bytes) and stream.get_state() == state
  fresh = open_stream(kind, folder, transform=noisy)
  next(fresh)
  fresh.set_state(state)
  assert fresh.get_state() == state
  assert_equal(take(fresh, 6), whole[drawn:])
  assert_equal(take(stream, 6), whole[drawn:])
  stream.set_state(state)  # back in the same stream
  assert_equal(take(stream, 6), whole[drawn:])


@KINDS
def test_position_of_one_host_serves_two(kind, folder):
  stream = open_stream(kind, folder)
  take(stream, 7)
  state, rest = stream.get_state(), take(stream, 2)
  for i in range(2):
    half = open_stream(kind, folder, process_index=i, process_count=2)
    half.set_state(state)
    assert_equal(take(half, 2), [{name: array[2 * i : 2 * i + 2] for name, array in batch.items()} for batch in rest])


def test_restoring_reads_nothing_of_the_past():
  seen = []
  stream = array_stream(examples(COUNT, 2), batch_size=1, seed=0, transform=lambda row, _: seen.append(1) or row)
  position = json.loads(stream.get_state()) | {"batch": 10**12}
  stream.set_state(json.dumps(position).encode())
  next(stream)
  assert len(seen) == 1


@pytest.mark.parametrize("change", [{"seed": 6}, {"batch_size": 2}, {"drop_remainder": False}])
def test_state_of_another_stream_is_refused(folder, change):
  state = open_stream("array", folder).get_state()
  with pytest.raises(ValueError, match="state must be of a stream"):
    open_stream("array", folder, **change).set_state(state)


@KINDS
def test_transform_depends_on_seed_epoch_and_example_only(kind, folder):
  shift = lambda batch: {int(i): image.ravel()[0] for i, image in zip(batch["id"], batch["image"])}
  blank = lambda row, rng: {"image": np.float32(rng.normal(size=(1,)))}
  draws = []
  for size in (1, 4):
    batches = take(open_stream(kind, folder, batch_size=size, transform=blank), COUNT // size)
    draws.append({key: value for batch in batches for key, value in shift(batch).items()})
  common = draws[1].keys()
  assert all(draws[0][key] == draws[1][key] for key in common)
  assert len(set(draws[0].values())) == COUNT
  second = take(open_stream(kind, folder, batch_size=1, transform=blank), 2 * COUNT)[COUNT:]
  assert all(shift(batch) != {key: draws[0][key] for key in shift(batch)} for batch in second)


@KINDS
def test_ends_after_num_epochs(kind, folder):
  stream = open_stream(kind, folder, num_epochs=2)
  assert len(list(stream)) == 2 * (COUNT // 4)
  with pytest.raises(StopIteration):
    next(stream)
  again = open_stream(kind, folder, num_epochs=2)
  again.set_state(stream.get_state())
  assert list(again) == []


@hypothesis.settings(max_examples=30, deadline=None)
@hypothesis.given(st.integers(1, 40), st.integers(1, 9), st.integers(1, 4), st.none() | st.integers(0))
def test_without_dropping_every_example_is_valid_once(count, local, hosts, seed):
  streams = [
    array_stream(
      {"x": np.arange(count)}, batch_size=local * hosts, seed=seed, process_index=i, process_count=hosts, num_epochs=1,
      drop_remainder=False,
    )
    for i in range(hosts)
  ]  # fmt: skip
  parts = [list(stream) for stream in streams]
  assert len({len(part) for part in parts}) == 1
  batches = [batch for part in parts for batch in part]
  assert all(batch["x"].shape == (local,) for batch in batches)
  valid = np.concatenate([batch["id"][batch["valid"]] for batch in batches])
  np.testing.assert_array_equal(np.sort(valid), np.arange(count))
  assert all((batch["id"][~batch["valid"]] == -1).all() for batch in batches)


def test_filling_up_the_last_batch_visits_no_row_of_a_table_twice():
  state = elr_init(5, 3)
  logits = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
  data = {"x": logits, "y": np.array([0, 1, 2, 0, 1])}
  for batch in array_stream(data, batch_size=4, seed=0, num_epochs=1, drop_remainder=False):
    _, state = elr_loss(batch["x"], batch["y"], batch["id"], state=state)
  np.testing.assert_allclose(state.targets, 0.3 * jax.nn.softmax(logits), atol=1e-4)


def test_without_seed_in_stored_order(folder):
  batches = take(open_stream("tfds", folder, seed=None), 5)
  np.testing.assert_array_equal(np.concatenate([batch["id"] for batch in batches]), np.arange(20))
  np.testing.assert_array_equal(read_tfds("cifar10", "train", data_dir=folder)["label"], examples(COUNT)["label"])


def test_part_of_a_split_counts_from_its_beginning(folder):
  part = take(tfds_stream("cifar10", "train[10:]", batch_size=13, seed=None, data_dir=folder), 1)[0]
  np.testing.assert_array_equal(part["id"], np.arange(13))
  np.testing.assert_array_equal(part["image"], examples(COUNT)["image"][10:])


def test_reading_ahead_changes_nothing(folder):
  plain = take(open_stream("tfds", folder, transform=noisy, threads=0), 12)
  assert_equal(take(open_stream("tfds", folder, transform=noisy, threads=3), 12), plain)


@pytest.mark.slow
def test_worker_processes_change_nothing(folder):
  plain = take(open_stream("tfds", folder, transform=noisy, threads=0), 8)
  stream = open_stream("tfds", folder, transform=noisy, threads=1, workers=2)
  ahead = [next(stream) for _ in range(5)]
  stream.set_state(stream.get_state())  # what the workers had read ahead is given up
  assert_equal(ahead + take(stream, 3), plain)


def test_jpeg_of_several_sizes(folder):
  stream = tfds_stream("imagenet2012", "train", batch_size=3, seed=0, data_dir=folder, threads=0)
  with pytest.raises(ValueError, match="'image' of shapes .* give a transform"):
    next(stream)

  def crop(example, rng):
    assert example["image"].dtype == np.uint8 and example["file_name"].startswith(b"train_")
    return {**example, "image": example["image"][:8, :8]}

  stream = tfds_stream("imagenet2012", "train", batch_size=3, seed=None, data_dir=folder, transform=crop)
  batch = take(stream, 1)[0]
  assert sorted(batch) == ["id", "image", "label"] and batch["label"].tolist() == [999, 0, 5]
  np.testing.assert_allclose(batch["image"][0, :, 0, 0].astype(float), np.arange(0, 80, 10), atol=4)  # JPEG is lossy
  np.testing.assert_allclose(batch["image"][1, 0, :, 0].astype(float), np.arange(0, 80, 10), atol=4)


def test_grey_picture_in_a_colour_set(folder, tmp_path):
  import tensorflow_datasets as tfds
  from array_record.python.array_record_module import ArrayRecordWriter

  write_tfds("imagenet2012", {"train": {"image": examples(1)["image"], "label": [1]}}, data_dir=tmp_path, shards=1)
  features = tfds.builder("imagenet2012", data_dir=tmp_path).info.features
  grey = io.BytesIO()
  Image.fromarray(np.full((8, 8), 77, np.uint8)).save(grey, format="JPEG")
  example = features.encode_example({"image": grey.getvalue(), "label": 1, "file_name": "grey.JPEG"})
  writer = ArrayRecordWriter(str(next(tmp_path.rglob("*.array_record-*"))), "group_size:1")
  writer.write(features.serialize_example(example))
  writer.close()
  image = read_tfds("imagenet2012", "train", data_dir=tmp_path)["image"]
  assert image.shape == (1, 8, 8, 3) and (image == 77).all()


def test_set_of_ones_own(tmp_path):
  data = {
    "grey": np.arange(3 * 20, dtype=np.uint8).reshape(3, 4, 5, 1),
    "vector": np.random.default_rng(0).normal(size=(3, 2)).astype(np.float32),
    "label": np.array([2, 0, 1]),
  }
  write_tfds("my_own", {"train": data}, data_dir=tmp_path)
  read = read_tfds("my_own", "train", data_dir=tmp_path)
  for name in data:
    np.testing.assert_array_equal(read[name], data[name])
  with pytest.raises(FileExistsError):
    write_tfds("my_own", {"train": data}, data_dir=tmp_path)


def test_unfit_arrays_are_refused(tmp_path):
  with pytest.raises(ValueError, match="must share one length"):
    write_tfds("bad_set", {"train": {"x": np.zeros(3), "label": np.zeros(4, int)}}, data_dir=tmp_path)
  with pytest.raises(ValueError, match="entry 'label'"):
    write_tfds("cifar10", {"train": {"image": examples(2)["image"]}}, data_dir=tmp_path)


@pytest.mark.parametrize(
  "name, splits, options, message",
  [
    ("../evil", {"train": {"x": np.zeros(3)}}, {}, "name must be the name of a file or folder"),
    ("/evil", {"train": {"x": np.zeros(3)}}, {}, "name must be the name of a file or folder"),
    ("set/config", {"train": {"x": np.zeros(3)}}, {}, "name must be the name of a file or folder"),
    ("good", {"../../train": {"x": np.zeros(3)}}, {}, "a split must be the name of a file or folder"),
    ("good", {"train": {"../x": np.zeros(3)}}, {}, "an entry of 'train' must be the name of a file or folder"),
    ("good", {"train": {"x": np.zeros(3)}}, {"shards": 0}, "at least one shard"),
    ("good", {}, {}, "at least one shard and one split, got 2 and 0"),
    ("good", {"train": {"x": None}}, {}, "must share one length"),
    ("good", {"train": {"x": ["a", "b"]}}, {}, "must hold numbers, got dtype <U1"),
    ("good", {"train": {"x": [None, None]}}, {}, "must hold numbers, got dtype object"),
  ],
)
def test_nothing_is_written_for_bad_sets(tmp_path, name, splits, options, message):
  with pytest.raises(ValueError, match=message):
    write_tfds(name, splits, data_dir=tmp_path / "a" / "sets", **options)
  assert not list(tmp_path.rglob("*"))


@pytest.mark.parametrize("name", ["cifar10", "imagenet2012", "mnist_corrupted/fog"])
def test_missing_set_names_the_command(tmp_path, name, caplog, capfd):
  command = f"tfds build {name} --file_format=array_record --data_dir={tmp_path}"
  with pytest.raises(MissingDataError, match=f"`{command}` in an environment with tensorflow"):
    tfds_stream(name, "train", batch_size=2, seed=0, data_dir=tmp_path)
  assert not caplog.records and not capfd.readouterr().err  # TFDS's misleading warnings


def test_unknown_set_and_split(tmp_path, folder):
  with pytest.raises(MissingDataError, match="no data set of that name") as error:
    tfds_stream("no_such_set", "train", batch_size=2, seed=0, data_dir=tmp_path)
  assert len(str(error.value)) < 500  # TFDS lists all its sets
  with pytest.raises(ValueError, match="Unknown split 'dev'"):
    tfds_stream("cifar10", "dev", batch_size=2, seed=0, data_dir=folder)


def test_set_in_another_format_names_the_command(tmp_path):
  write_tfds("cifar10", {"train": examples(2)}, data_dir=tmp_path)
  for path in list(tmp_path.rglob("*array_record*")):
    path.rename(path.with_name(path.name.replace("array_record", "tfrecord")))
  info = next(tmp_path.rglob("dataset_info.json"))
  info.write_text(info.read_text().replace("array_record", "tfrecord"))
  with pytest.raises(MissingDataError, match="tfds convert_format .*--out_file_format=array_record"):
    tfds_stream("cifar10", "train", batch_size=2, seed=0, data_dir=tmp_path)


@pytest.mark.parametrize(
  "options, message",
  [
    ({"batch_size": 0}, "batch_size must be between 1 and the 23 examples of the data, got 0"),
    ({"batch_size": 24}, "batch_size must be between 1 and the 23 examples of the data, got 24"),
    ({"process_index": 0, "process_count": 3}, "batch_size must be a multiple of process_count = 3, got 4"),
    ({"process_index": 2, "process_count": 2}, "process_index must be in"),
    ({"seed": -1}, "seed must be non-negative or None, got -1"),
    ({"num_epochs": 0}, "num_epochs must be positive or None, got 0"),
  ],
)
@KINDS
def test_bad_arguments(kind, folder, options, message):
  with pytest.raises(ValueError, match=message):
    open_stream(kind, folder, **options)


def test_bad_arrays(folder):
  for data in ({}, {"x": np.zeros(3), "y": np.zeros(4)}, {"x": np.float32(1)}):
    with pytest.raises(ValueError, match="data must be arrays with one common leading axis"):
      array_stream(data, batch_size=1, seed=0)
  with pytest.raises(ValueError, match="integers must fit into int32"):
    next(array_stream({"x": np.array([2**40])}, batch_size=1, seed=0))
  with pytest.raises(ValueError, match="threads and workers must not be negative"):
    open_stream("tfds", folder, threads=-1)


@pytest.mark.parametrize(
  "values, held",
  [
    ([None, "a"], "objects of type NoneType, str"),
    ([None, None], "objects of type NoneType"),
    (np.array([2**70, 1]), "objects of type int"),
    (np.array(["2020-01-01", "2020-01-02"], "datetime64[D]"), "dtype datetime64"),
    ([[1.0], [1.0, 2.0]], "rows of different lengths"),
  ],
)
def test_neither_numbers_nor_text(values, held):
  """Nothing disappears from the batches without a word."""
  with pytest.raises(ValueError, match=f"'x' must be an array.*, got {held}"):
    array_stream({"x": values}, batch_size=1, seed=0)


@pytest.mark.parametrize("data", ["abc", None, np.zeros((3, 2)), [np.zeros(3)]])
def test_data_are_named(data):
  with pytest.raises(ValueError, match="data must be arrays by name, got"):
    array_stream(data, batch_size=1, seed=0)


@pytest.mark.parametrize("text", [["a", "bc", "d"], np.array(["a", b"bc", "d"], object), np.array([b"a", b"b", b"c"])])
def test_text_is_left_out(text):
  assert sorted(next(array_stream({"x": np.zeros(3), "text": text}, batch_size=2, seed=0))) == ["id", "x"]


def boxes(example, rng):
  number = example["x"].item()
  inner = {"area": np.float32(number / 2), "label": np.int64(number), "name": "box", "corners": [number, number + 1]}
  return {"x": example["x"], "boxes": {"first": inner, "count": np.int32(1)}}


def test_nested_features_stay():
  batch = next(array_stream({"x": np.arange(6)}, batch_size=3, seed=None, transform=boxes))
  assert sorted(batch) == ["boxes", "id", "x"] and sorted(batch["boxes"]["first"]) == ["area", "corners", "label"]
  first = batch["boxes"]["first"]
  assert first["label"].dtype == np.int32 and first["area"].tolist() == [0, 0.5, 1]
  assert first["corners"].tolist() == [[0, 1], [1, 2], [2, 3]] and batch["boxes"]["count"].tolist() == [1, 1, 1]


def test_nested_features_of_a_stored_set(tmp_path):
  import tensorflow_datasets as tfds
  from array_record.python.array_record_module import ArrayRecordWriter

  def write(name, corners):
    write_tfds(name, {"train": {"x": np.zeros((2, 1), np.float32)}}, data_dir=tmp_path, shards=1)
    scalar = tfds.features.Scalar(np.int32)
    inside = {"area": scalar, "corners": tfds.features.Sequence(scalar), "name": tfds.features.Text()}
    features = tfds.features.FeaturesDict({"x": scalar, "box": inside})
    features.save_config(str(tmp_path / name / "1.0.0"))
    writer = ArrayRecordWriter(str(next((tmp_path / name).rglob("*.array_record-*"))), "group_size:1")
    for number, each in enumerate(corners):
      box = {"area": number, "corners": each, "name": "a"}
      writer.write(features.serialize_example(features.encode_example({"x": number, "box": box})))
    writer.close()

  write("nested", [[1, 2], [3, 4]])
  read = read_tfds("nested", "train", data_dir=tmp_path)
  assert read["box"]["area"].tolist() == [0, 1] and read["box"]["corners"].tolist() == [[1, 2], [3, 4]]
  assert sorted(read["box"]) == ["area", "corners"]
  write("ragged", [[1, 2], [3]])
  with pytest.raises(ValueError, match="equal shapes, got 'box/corners' of shapes"):
    read_tfds("ragged", "train", data_dir=tmp_path)


@pytest.mark.parametrize(
  "transform, message",
  [
    (lambda example, rng: {"maybe": None}, "'maybe' must be an array of numbers or text, got objects of type NoneType"),
    (lambda example, rng: {"a": {"b": [1, None]}}, "'a/b' must be an array of numbers or text"),
    (lambda example, rng: {"a": {"b": 2**40}}, "integers must fit into int32, got 'a/b'"),
    (lambda example, rng: example["x"], "transform must return a dict of arrays, got int64"),
    (lambda example, rng: None, "transform must return a dict of arrays, got NoneType"),
    (lambda example, rng: {f"x{example['x']}": 1}, "must have the same entries, got x0, x1 in some only"),
    (lambda example, rng: {"a": {f"x{example['x']}": 1}}, "must have the same entries, got a/x0, a/x1 in some only"),
    (lambda example, rng: {"a": 1 if example["x"] else {"b": 1}}, "must be alike, got 'a' as a dict in some only"),
    (lambda example, rng: {"a": {"b": np.zeros(example["x"])}}, "must have equal shapes, got 'a/b' of shapes"),
    (lambda example, rng: {"a": [[1], [1, 2]]}, "'a' must be an array, got rows of different lengths"),
  ],
)
def test_bad_transforms(transform, message):
  with pytest.raises(ValueError, match=message):
    next(array_stream({"x": np.arange(2)}, batch_size=2, seed=None, transform=transform))


def test_training_on_nested_batches(tmp_path):
  def objective(params, extra, batch, context):
    return jnp.mean((params * batch["boxes"]["first"]["area"] - 1) ** 2), (extra, {})

  task = gradient_task(
    init_params=lambda key, hparams: (jnp.ones(()), ()),
    objective=objective,
    optimizer=lambda hparams: optax.sgd(hparams["learning_rate"]),
    data=lambda: array_stream({"x": np.arange(8)}, batch_size=4, seed=0, transform=boxes),
    batch_size=4,
    hparams={"learning_rate": 0.01},
  )
  options = {"log_every": 5, "progress": False, "tensorboard": False}
  whole = fit(task, steps=10, **options)
  assert whole.rows[-1]["loss"] < whole.rows[0]["loss"]
  fit(task, steps=5, folder=tmp_path, **options)
  assert float(fit(task, steps=10, folder=tmp_path, **options).state.params) == float(whole.state.params)


def classifier(folder):
  def objective(params, extra, batch, context):
    inputs = batch["image"].reshape(len(batch["label"]), -1) / 255.0 - 0.5
    loss = optax.softmax_cross_entropy_with_integer_labels(inputs @ params, batch["label"]).mean()
    return loss, (extra, {})

  return gradient_task(
    init_params=lambda key, hparams: (0.01 * jax.random.normal(key, (32 * 32 * 3, 10)), ()),
    objective=objective,
    optimizer=lambda hparams: optax.sgd(hparams["learning_rate"]),
    data=lambda: tfds_stream("cifar10", "train", batch_size=8, seed=1, data_dir=folder, transform=noisy),
    batch_size=8,
    hparams={"learning_rate": 0.01},
  )


def test_training_from_array_records_resumes_bit_identically(folder, tmp_path):
  task = classifier(folder)
  options = {"log_every": 5, "progress": False, "tensorboard": False}
  whole = fit(task, steps=40, **options)
  losses = [row["loss"] for row in whole.rows]
  assert losses[-1] < 0.5 * losses[0]  # 23 random pictures are learnt by heart
  fit(task, steps=15, folder=tmp_path, checkpoint_every=5, **options)
  resumed = fit(task, steps=40, folder=tmp_path, checkpoint_every=5, **options)
  assert jnp.array_equal(whole.state.params, resumed.state.params)


def test_reading_needs_no_tensorflow(folder):
  program = (
    "import sys, jaxreg, jaxreg.data.stream\n"
    "assert not {'grain', 'tensorflow_datasets', 'sklearn', 'mlxtend'} & set(sys.modules)\n"
    f"stream = jaxreg.data.stream.tfds_stream('cifar10', 'train', batch_size=2, seed=0, data_dir={str(folder)!r})\n"
    "next(stream)\n"
    "assert 'tensorflow' not in sys.modules\n"
  )
  done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
  assert done.returncode == 0, done.stderr
  assert done.stderr == ""  # no warnings either


def test_scalar_floats_of_a_set_are_single_precision(tmp_path):
  columns = {"x": np.arange(8.0, dtype=np.float32).reshape(4, 2), "y": np.arange(4, dtype=np.float32)}
  write_tfds("scalar_floats", {"train": columns}, data_dir=tmp_path)
  batch = next(tfds_stream("scalar_floats", split="train", batch_size=4, seed=None, data_dir=tmp_path))
  assert batch["y"].dtype == batch["x"].dtype == np.float32
  np.testing.assert_array_equal(batch["y"], columns["y"])


EXEMPT = {
  "Stream": "an iterator on the host",
  "array_stream": "an iterator on the host",
  "read_tfds": "reads files",
  "tfds_stream": "an iterator on the host",
}
