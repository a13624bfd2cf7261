"""Conformance rows of tables by id; the losses that carry a table test them over devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxreg import losses
from jaxreg.losses import example_table
from tests.conformance import EXAMPLES, TABLE, draw_ids, row

ROWS = [
  row(
    example_table.gather_rows,
    lambda rng: (rng.normal(size=(TABLE, 3)), draw_ids(rng)),
    wide=True,
  ),
  row(
    example_table.update_rows,
    lambda rng: (rng.normal(size=(TABLE, 3)), draw_ids(rng), rng.normal(size=(EXAMPLES, 3))),
  ),
]


def test_ids_outside_the_table_read_and_change_nothing():
  table, ids = jnp.arange(12.0).reshape(4, 3), jnp.array([-1, 4, 2, -5])
  rows = example_table.gather_rows(table, ids, default=9.0)
  np.testing.assert_array_equal(rows, [[9.0] * 3, [9.0] * 3, [6.0, 7.0, 8.0], [9.0] * 3])
  changed = example_table.update_rows(table, ids, jnp.full((4, 3), -1.0))
  np.testing.assert_array_equal(changed, table.at[2].set(-1.0))


@pytest.mark.parametrize("compiled", [False, True])
def test_rows_of_an_id_that_occurs_twice_are_averaged(compiled):
  update = jax.jit(example_table.update_rows) if compiled else example_table.update_rows
  ids, rows = jnp.array([3, 0, 3, -1, 3, -1]), jnp.array([1.0, 5.0, 2.0, 7.0, 6.0, 8.0])
  expected = [5.0, 0.0, 0.0, 3.0, 0.0]
  order = jnp.array([4, 3, 2, 0, 1, 5])
  np.testing.assert_allclose(update(jnp.zeros(5), ids, rows), expected)
  np.testing.assert_allclose(update(jnp.zeros(5), ids[order], rows[order]), expected)
  several = jax.vmap(update)(jnp.zeros((2, 5)), jnp.stack([ids] * 2), jnp.stack([rows] * 2))
  np.testing.assert_allclose(several[1], expected)


def test_unique_ids_skip_the_sorting():
  arguments = jnp.zeros(5), jnp.array([3, 0]), jnp.array([1.0, 2.0])
  text = lambda **options: str(jax.make_jaxpr(lambda *a: example_table.update_rows(*a, **options))(*arguments))
  assert "name=sort\n" in text() and "name=sort\n" not in text(unique_ids=True)
  assert example_table.update_rows(*arguments, unique_ids=True).tolist() == [2.0, 0, 0, 1.0, 0]


STATEFUL = {
  "elr": lambda z, y, ids, state, **options: losses.elr_loss(z, y, ids, state=state, **options),
  "aldr": lambda z, y, ids, state, **options: losses.aldr_kl_loss(z, y, ids, state=state, **options),
  "ps_kd": lambda z, y, ids, state, **options: losses.ps_kd_loss(z, y, ids, state=state, alpha=0.5, **options),
}
STATES = {
  "elr": lambda: losses.elr_init(6, 4),
  "aldr": lambda: losses.aldr_kl_init(6, temperature=2.0),
  "ps_kd": lambda: losses.ps_kd_init(6, 4),
}


@pytest.mark.parametrize("kind", STATEFUL)
def test_an_example_mask_and_padding_are_as_if_the_examples_were_not_there(kind):
  rng = np.random.default_rng(0)
  logits, labels = jnp.asarray(rng.normal(size=(5, 4)), jnp.float32), jnp.array([0, 1, 2, 3, 1])
  ids, where = jnp.array([4, 0, 2, 5, 1]), jnp.array([True, False, True, True, False])
  spoiled = jnp.where(where[:, None], logits, jnp.nan)
  kept = np.flatnonzero(where)
  expected, reference = STATEFUL[kind](logits[kept], labels[kept], ids[kept], STATES[kind]())
  call = lambda z, ids, **options: STATEFUL[kind](z, labels, ids, STATES[kind](), **options)
  values, state = call(spoiled, ids, where=where)
  np.testing.assert_allclose(values[kept], expected, rtol=1e-6)
  assert values[1] == values[4] == 0
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), state, reference)
  _, padded = call(logits, jnp.where(where, ids, -1))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), padded, reference)
  gradient = jax.grad(lambda z: call(z, ids, where=where)[0].sum())(spoiled)
  assert np.isfinite(gradient).all() and not np.any(gradient[~where])
  with pytest.raises(ValueError, match="where must"):
    call(logits, ids, where=where[:3])


@pytest.mark.parametrize("kind", STATEFUL)
def test_states_of_numpy_arrays_and_bare_tables(kind):
  logits, labels, ids = jnp.ones((2, 4)), jnp.array([0, 1]), jnp.array([3, 0])
  expected = STATEFUL[kind](logits, labels, ids, STATES[kind]())
  actual = STATEFUL[kind](logits, labels, ids, jax.tree.map(np.asarray, STATES[kind]()))
  jax.tree.map(np.testing.assert_array_equal, actual, expected)
  with pytest.raises(ValueError, match="state must be (ELR|ALDR|PSKD)State as its init function returns it"):
    STATEFUL[kind](logits, labels, ids, jnp.zeros((6, 4)))


def test_the_initial_temperature_comes_with_the_state():
  logits, labels, ids = jnp.array([[3.0, 0.0, -1.0]]), jnp.array([1]), jnp.array([0])
  state = losses.aldr_kl_init(2, temperature=5.0)
  expected = losses.aldr_kl_loss(logits, labels, ids, state=state, initial_temperature=5.0)
  jax.tree.map(np.testing.assert_array_equal, losses.aldr_kl_loss(logits, labels, ids, state=state), expected)
  bare = losses.ALDRState(state.temperature)
  with pytest.raises(ValueError, match="initial_temperature must be given"):
    losses.aldr_kl_loss(logits, labels, ids, state=bare)
  assert losses.aldr_kl_loss(logits, labels, ids, state=bare, initial_temperature=5.0)[0] == expected[0]


def test_top_k_targets_keep_the_largest_and_are_exact_when_they_are_all():
  rng = np.random.default_rng(1)
  batches = [(rng.normal(size=(3, 6)) * 3, rng.integers(0, 6, 3), rng.permutation(5)[:3]) for _ in range(4)]
  states = {k: losses.elr_init(5, 6, top_k=k) for k in (None, 6, 2)}
  for z, y, ids in batches:
    values = {}
    for k in states:
      values[k], states[k] = losses.elr_loss(jnp.asarray(z, jnp.float32), y, ids, state=states[k])
    np.testing.assert_allclose(values[6], values[None], rtol=1e-5)
  full = np.asarray(states[None].targets)
  dense = np.zeros_like(full)
  np.put_along_axis(dense, np.asarray(states[6].classes), np.asarray(states[6].targets), axis=1)
  np.testing.assert_allclose(dense, full, rtol=1e-5, atol=1e-7)
  assert states[2].targets.shape == (5, 2) and (states[2].targets.sum(1) <= full.sum(1) + 1e-6).all()
  labels = full.argmax(1)
  for k in (None, 6):
    assert not losses.noisy_label_candidates(states[k], jnp.asarray(labels))[full.sum(1) > 0].any()
  with pytest.raises(ValueError, match="top_k must lie in"):
    losses.elr_init(5, 6, top_k=7)
