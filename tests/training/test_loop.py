"""The order of the data: a function of key and step, however training is cut into chunks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxreg.training import examples
from jaxreg.training.loop import batch_ids, run_chunk


@pytest.mark.parametrize("count, batch", [(10, 3), (64, 64), (1797, 64), (70_000, 1000)])
def test_every_epoch_is_a_permutation_and_chunks_do_not_matter(count, batch):
  key, per_epoch = jax.random.key(3), count // batch
  steps = 2 * per_epoch + 1
  ids = np.asarray(batch_ids(key, jnp.int32(0), steps=steps, examples=count, batch_size=batch))
  epochs = [ids[e * per_epoch : (e + 1) * per_epoch].ravel() for e in range(2)]
  for epoch in epochs:
    assert len(np.unique(epoch)) == per_epoch * batch and epoch.min() >= 0 and epoch.max() < count
  assert not np.array_equal(*epochs)
  for start in (1, per_epoch - 1, per_epoch):
    part = batch_ids(key, jnp.int32(start), steps=steps - start, examples=count, batch_size=batch)
    np.testing.assert_array_equal(part, ids[start:])


def test_all_orders_are_equally_likely():
  draws = jax.vmap(lambda key: batch_ids(key, jnp.int32(0), steps=1, examples=4, batch_size=4)[0])(
    jax.random.split(jax.random.key(0), 24_000)
  )
  codes = np.asarray(draws) @ np.array([64, 16, 4, 1])
  counts = np.unique(codes, return_counts=True)[1]
  assert len(counts) == 24
  assert ((counts - 1000) ** 2 / 1000).sum() < 50  # chi-square with 23 degrees of freedom: 0.1 % are above 49.7


def test_positions_of_an_example_are_uniform():
  draws = jax.vmap(lambda key: batch_ids(key, jnp.int32(0), steps=10, examples=100, batch_size=10))(
    jax.random.split(jax.random.key(1), 5000)
  )
  step = np.argmax((np.asarray(draws) == 7).any(-1), axis=1)
  counts = np.bincount(step, minlength=10)
  assert ((counts - 500) ** 2 / 500).sum() < 27.9  # chi-square, 9 degrees of freedom, 0.1 %


def test_first_non_finite_step_is_counted():
  task = examples.least_squares()
  state = task.init(jax.random.key(0), task.hparams)
  _, _, finite = run_chunk(task, state, task.data, {"learning_rate": 1e12}, 20)
  losses = [run_chunk(task, state, task.data, {"learning_rate": 1e12}, n)[2] for n in (1, int(finite), int(finite) + 1)]
  assert [int(n) for n in losses] == [1, int(finite), int(finite)]


def test_batch_larger_than_the_data_is_refused():
  task = examples.least_squares(examples=8, batch_size=16)
  with pytest.raises(ValueError, match="batch_size must be at most the 8 examples"):
    run_chunk(task, task.init(jax.random.key(0), task.hparams), task.data, task.hparams, 1)
