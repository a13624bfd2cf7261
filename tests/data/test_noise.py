"""Label-noise generators: rates, directions, traced rates."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxreg.data import noise
from jaxreg.data import noise as label_noise
from tests.conformance import EXAMPLES, row, unchanged

COUNT = 20_000


@pytest.fixture(scope="module")
def labels():
  return jax.random.randint(jax.random.key(9), (COUNT,), 0, 10)


@pytest.mark.parametrize("include_true, share", [(True, 0.9), (False, 1.0)])
@pytest.mark.parametrize("exact", [True, False])
def test_symmetric(labels, include_true, share, exact):
  draw = jax.jit(lambda rate: noise.symmetric_noise(
    jax.random.key(0), labels, rate=rate, num_classes=10, include_true=include_true, exact=exact))  # fmt: skip
  for rate in (0.0, 0.4, 1.0):
    wrong = float((draw(rate) != labels).mean())
    assert abs(wrong - share * rate) < 5 * np.sqrt(0.25 / COUNT)
  if exact and not include_true:
    assert int((draw(0.3) != labels).sum()) == round(0.3 * COUNT)
  off = (draw(1.0) - labels) % 10
  counts = np.bincount(np.asarray(off), minlength=10)[0 if include_true else 1 :]
  assert counts.min() > 0.9 * counts.mean()


def test_pair_flip(labels):
  noisy = noise.pair_flip_noise(jax.random.key(0), labels, rate=0.3, num_classes=10)
  assert set(np.unique((noisy - labels) % 10).tolist()) == {0, 1}
  assert abs(float((noisy != labels).mean()) - 0.3) < 0.02


def test_class_maps(labels):
  noisy = noise.class_map_noise(jax.random.key(0), labels, rate=1.0, mapping=noise.CIFAR10_CONFUSIONS)
  for source in range(10):
    assert set(noisy[labels == source].tolist()) == {noise.CIFAR10_CONFUSIONS.get(source, source)}
  assert len(noise.LETTER_CONFUSIONS) == 20
  assert all(noise.LETTER_CONFUSIONS[target] == source for source, target in noise.LETTER_CONFUSIONS.items())
  superclasses = np.array([0, 1, 0, 1, 0, 1])
  mapping = noise.superclass_mapping(superclasses)
  assert (superclasses[mapping] == superclasses).all() and (mapping != np.arange(6)).all()
  assert sorted(mapping.tolist()) == list(range(6))


def test_instance_dependent(labels):
  few = labels[:5000]
  inputs = jax.random.normal(jax.random.key(1), (5000, 6))
  draw = lambda key, inputs: noise.instance_dependent_noise(key, inputs, few, rate=0.3, num_classes=10)
  noisy = draw(jax.random.key(2), inputs)
  assert abs(float((noisy != few).mean()) - 0.3) < 0.03
  # With one input for all, the examples of a class are confused with the same few classes.
  same = draw(jax.random.key(2), jnp.broadcast_to(3 * inputs[:1], inputs.shape))
  mine = (few == 0) & (same != few)
  shares = np.bincount(np.asarray(same[mine]), minlength=10) / mine.sum()
  assert shares.max() > 0.5 and shares[0] == 0


KEY = jax.random.key(0)
EACH = {
  "symmetric": lambda labels, classes, **o: noise.symmetric_noise(KEY, labels, num_classes=classes, **o),
  "other": lambda labels, classes, **o: noise.symmetric_noise(
    KEY, labels, num_classes=classes, include_true=False, exact=True, **o),
  "pair": lambda labels, classes, **o: noise.pair_flip_noise(KEY, labels, num_classes=classes, **o),
  "map": lambda labels, classes, **o: noise.class_map_noise(KEY, labels, mapping=np.arange(classes)[::-1], **o),
  "instance": lambda labels, classes, **o: noise.instance_dependent_noise(
    KEY, jnp.ones((len(labels), 3)), labels, num_classes=classes, **o),
}  # fmt: skip
each_noise = pytest.mark.parametrize("name", EACH)


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "uint16", "uint32"])
@pytest.mark.parametrize("classes", [100, 128, 200])
@each_noise
def test_narrow_labels_give_the_noise_of_int32(name, classes, dtype):
  if classes - 1 > np.iinfo(dtype).max:
    return
  clean = np.arange(2000) % classes
  wanted = EACH[name](jnp.asarray(clean), classes, rate=0.8)
  noisy = EACH[name](clean.astype(dtype), classes, rate=0.8)
  assert noisy.dtype == dtype
  if dtype == "uint32" and name in ("symmetric", "other"):  # drawn in its own dtype, in other numbers
    wrong = float((noisy != clean.astype(dtype)).mean())
    assert abs(wrong - 0.8) < 0.05 and int(noisy.max()) < classes
  else:
    np.testing.assert_array_equal(np.asarray(noisy, int), wanted)


@each_noise
def test_labels_too_narrow_for_the_classes_are_widened(name):
  clean = (np.arange(2000) % 120).astype(np.int8)
  noisy = EACH[name](clean, 300, rate=1.0)
  assert noisy.dtype == jnp.int32
  np.testing.assert_array_equal(noisy, EACH[name](clean.astype(np.int32), 300, rate=1.0))
  if name != "instance":
    assert noisy.max() > 119 and noisy.min() >= 0


def test_targets_of_a_dict_are_widened():
  noisy = noise.class_map_noise(KEY, np.array([1, 2, 3], np.uint8), rate=1.0, mapping={1: 700, 2: 3})
  assert noisy.tolist() == [700, 3, 3]
  assert noise.class_map_noise(KEY, np.array([1, 2], np.uint8), rate=1.0, mapping={}).tolist() == [1, 2]
  many = np.repeat(np.arange(3), 200).astype(np.uint8)  # 600 classes of three superclasses
  mapping = noise.superclass_mapping(many)
  assert mapping[199] == 0 and mapping[400] == 401 and mapping.max() == 599


@pytest.mark.parametrize("outside", [-1, -100, 10, 255])
@each_noise
def test_labels_that_are_no_class(name, outside):
  clean = np.resize([0, outside, 9], 3000)
  with pytest.raises(ValueError, match=rf"labels must lie in \[0, 10\), got values from {min(0, outside)} to"):
    EACH[name](clean, 10, rate=0.5)
  noisy = jax.jit(lambda labels: EACH[name](labels, 10, rate=1.0))(jnp.asarray(clean))
  kept = noisy == outside
  np.testing.assert_array_equal(kept, clean == outside)
  assert noisy[~kept].min() >= 0 and noisy[~kept].max() < 10


def test_exact_counts_the_labels_that_are_classes():
  clean = jnp.asarray(np.resize([1, -1, 2, -1], 400))
  noisy = noise.symmetric_noise(KEY, clean, rate=0.3, num_classes=10, include_true=False, exact=True)
  assert int((noisy != clean).sum()) == 60


def test_short_mappings_are_refused():
  with pytest.raises(ValueError, match=r"labels must lie in \[0, 2\), got values from 0 to 2"):
    noise.class_map_noise(KEY, [0, 1, 2], rate=1.0, mapping=[1, 0])
  for mapping, came in (
    ([1, 2], "values from 1 to 2"), ([-1, 0], "values from -1 to 0"), ([[1, 0]], r"shape \(1, 2\)"),
    ([], "dtype float64"), (1, r"shape \(\)"), ([0.5, 1], "dtype float64"), (None, "dtype object"),
    ("ab", "dtype <U2"), ([[0], [0, 1]], "rows of different lengths"), ({1: None}, "dtype object"),
    ({1: "a"}, "dtype <U21"), ({0: 0.5}, "dtype float64"),
  ):  # fmt: skip
    with pytest.raises(ValueError, match=f"mapping must be .*{came}"):
      noise.class_map_noise(KEY, jnp.array([0, 1]), rate=1.0, mapping=mapping)
  for superclasses in ([0.5], [[0, 1]], None):
    with pytest.raises(ValueError, match="superclasses must be"):
      noise.superclass_mapping(superclasses)


@pytest.mark.parametrize("labels", [None, "abc", ["a"], [None, 1], [[1], [1, 2]], [0.5], True])
@each_noise
def test_labels_that_are_not_integers(name, labels):
  if name == "instance" and not hasattr(labels, "__len__"):
    return
  with pytest.raises(ValueError, match="labels must be integer class indices, got"):
    EACH[name](labels, 10, rate=0.5)


@each_noise
def test_rates_at_the_ends(name):
  clean = jnp.arange(5000) % 10
  np.testing.assert_array_equal(EACH[name](clean, 10, rate=0.0), clean)
  if name in ("other", "pair", "map"):
    assert not (EACH[name](clean, 10, rate=1.0) == clean).any()


def test_instance_dependent_spread_and_lengths():
  inputs, clean = jax.random.normal(KEY, (4000, 3)), jnp.zeros(4000, int)
  draw = jax.jit(lambda rate, spread: noise.instance_dependent_noise(
    KEY, inputs, clean, rate=rate, num_classes=4, spread=spread))  # fmt: skip
  for rate, spread, mean in (
    (0.0, 0.1, 0), (0.0, 0.0, 0), (0.3, 0.0, 0.3), (1.0, 0.0, 1), (0.01, 0.1, 0.0835), (0.1, 0.1, 0.1288),
    (0.2, 0.1, 0.2055), (0.9, 0.1, 1 - 0.1288), (0.5, 100.0, 0.5),
  ):  # fmt: skip
    wrong = float((draw(rate, spread) != 0).mean())  # means of truncated normals, from SciPy
    assert abs(wrong - mean) < 4 * np.sqrt(mean * (1 - mean) / 4000) + 1e-9
  for shape in ((3999,), (1,), (4000, 1), ()):
    with pytest.raises(ValueError, match=r"labels must be one for each of inputs \(4000, 3\), got shape"):
      noise.instance_dependent_noise(KEY, inputs, jnp.zeros(shape, int), rate=0.1, num_classes=4)
  with pytest.raises(ValueError, match="inputs must be floating"):
    noise.instance_dependent_noise(KEY, jnp.ones((4000, 3), int), clean, rate=0.1, num_classes=4)
  with pytest.raises(ValueError, match="spread must lie in"):
    noise.instance_dependent_noise(KEY, inputs, clean, rate=0.1, num_classes=4, spread=-1.0)
  assert noise.instance_dependent_noise(KEY, inputs[:0], clean[:0], rate=0.1, num_classes=4).shape == (0,)
  half = noise.instance_dependent_noise(KEY, inputs.astype(jnp.bfloat16), clean, rate=0.3, num_classes=4)
  assert float((half == draw(0.3, 0.1)).mean()) > 0.99


def test_instance_dependent_noise_of_many_classes_fits_into_memory():
  """Every example's map at a time would be 201 GB; the maps of the classes are 0.26."""
  draw = lambda inputs, labels: noise.instance_dependent_noise(KEY, inputs, labels, rate=0.2, num_classes=1000)
  shapes = jax.ShapeDtypeStruct((50_000, 64), jnp.float32), jax.ShapeDtypeStruct((50_000,), jnp.int32)
  assert jax.jit(draw).lower(*shapes).compile().memory_analysis().temp_size_in_bytes < 4e8


def test_too_few_classes():
  for draw in (
    lambda: noise.symmetric_noise(KEY, jnp.zeros(3, int), rate=0.5, num_classes=0),
    lambda: noise.symmetric_noise(KEY, jnp.zeros(3, int), rate=0.5, num_classes=1, include_true=False),
    lambda: noise.pair_flip_noise(KEY, jnp.zeros(3, int), rate=0.5, num_classes=0),
    lambda: noise.instance_dependent_noise(KEY, jnp.ones((3, 2)), jnp.zeros(3, int), rate=0.5, num_classes=1),
  ):
    with pytest.raises(ValueError, match="num_classes must lie in"):
      draw()


def test_bad_rate(labels):
  for draw in (noise.symmetric_noise, noise.pair_flip_noise):
    with pytest.raises(ValueError, match="rate must lie in"):
      draw(jax.random.key(0), labels, rate=1.1, num_classes=10)


def _noise(function, **options):
  """`function(key, labels, …)`, other labels."""
  return row(
    function,
    lambda rng: (rng.integers(0, 10, EXAMPLES).astype(np.int32),),
    call=lambda labels, **options: function(jax.random.key(0), labels, **options),
    extreme=unchanged,
    bad=(("labels", lambda labels: (labels * 1.0,)), ("labels", lambda labels: (labels > 4,))),
    differentiable=False,
    wide=True,
    options=dict(rate=(0.0, 1.0), **options),
  )


ROWS = [
  _noise(label_noise.class_map_noise, mapping=label_noise.CIFAR10_CONFUSIONS)._replace(label="noise.class_map_noise"),
  _noise(label_noise.class_map_noise, mapping=np.arange(10)[::-1])._replace(label="noise.class_map_noise-array"),
  _noise(label_noise.pair_flip_noise, num_classes=10),
  _noise(label_noise.symmetric_noise, num_classes=10),
  _noise(label_noise.symmetric_noise, num_classes=10, include_true=False),
]


EXEMPT = {
  "CIFAR10_CONFUSIONS": "numbers",
  "LETTER_CONFUSIONS": "numbers",
  "instance_dependent_noise": "draws depend on how the inputs are rounded; its tests compare the distributions",
  "superclass_mapping": "of NumPy arrays on the host",
}
