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
    bad=(("labels", lambda labels: (labels * 1.0,)),),
    differentiable=False,
    wide=True,
    options=dict(rate=(0.0, 1.0), **options),
  )


ROWS = [
  _noise(label_noise.class_map_noise, mapping=label_noise.CIFAR10_CONFUSIONS)._replace(label="noise.class_map_noise"),
  _noise(label_noise.pair_flip_noise, num_classes=10),
  _noise(label_noise.symmetric_noise, num_classes=10),
  _noise(label_noise.symmetric_noise, num_classes=10, include_true=False),
]


EXEMPT = {
  "CIFAR10_CONFUSIONS": "numbers",
  "LETTER_CONFUSIONS": "numbers",
  "instance_dependent_noise": "draws in the inputs' precision; its tests compare the distributions",
  "superclass_mapping": "of NumPy arrays on the host",
}
