"""LDR-KL and ALDR-KL: the card's exact tests, golden vectors, extremes."""

import functools

import hypothesis
import hypothesis.extra.numpy as arrays
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import optax
import pytest

from jaxreg.losses import chunked, label_dro
from tests.conformance import CLASSES, TABLE, loss_row, scores_row, stateful_loss_row

pytestmark = pytest.mark.usefixtures("x64")
fixed_point = jax.jit(label_dro.aldr_fixed_point)  # the number of iterations is traced
NORMALIZE = {"none": None, "softplus_then_divide_by_class_mean": "softplus_mean"}


@pytest.fixture
def batch():
  rng = np.random.default_rng(0)
  return jnp.asarray(rng.normal(size=(7, 5)) * 3), jnp.asarray(rng.integers(0, 5, 7))


def loss(*arguments, **options):
  return label_dro.ldr_kl_loss(*arguments, **options)


@functools.partial(jax.jit, static_argnames="normalize")
def mean_and_gradient(logits, labels, *, normalize, **options):
  return jax.value_and_grad(lambda z: loss(z, labels, normalize=normalize, **options).mean())(logits)


@pytest.mark.golden
def test_golden_ldr(golden):
  for case, arrays_, meta in golden("24-ldr").cases():
    logits, labels = jnp.asarray(arrays_["logits"]), jnp.asarray(arrays_["labels"])
    if meta["kind"] == "ldr_kl":
      options = {"temperature": meta["lam"], "margin": meta["margin"], "normalize": NORMALIZE[meta["normalize"]]}
      value, gradient = mean_and_gradient(logits, labels, **options)
      np.testing.assert_allclose(value, arrays_["out_loss"], rtol=1e-10, atol=1e-10, err_msg=case)
      np.testing.assert_allclose(gradient, arrays_["grad_logits"], rtol=1e-10, atol=1e-10, err_msg=case)
      continue
    state = label_dro.aldr_kl_init(meta["num_examples"], temperature=meta["lam0"], dtype=jnp.float64)
    for step in range(meta["steps"]):

      def mean(z, step=step, state=state, m=meta, a=arrays_):
        values, new = label_dro.aldr_kl_loss(
          z,
          jnp.asarray(a["labels"][step]),
          jnp.asarray(a["index"][step]),
          state=state,
          initial_temperature=m["lam0"],
          alpha=m["alpha"],
          margin=m["margin"],
          normalize="softplus_mean" if m["softplus"] else "l1_mean",
          floor=m["prob_floor"],
        )
        return values.mean(), new

      (value, state), gradient = jax.jit(jax.value_and_grad(mean, has_aux=True))(logits[step])
      np.testing.assert_allclose(value, arrays_["out_loss"][step], rtol=1e-10, atol=1e-10, err_msg=case)
      np.testing.assert_allclose(gradient, arrays_["grad_logits"][step], rtol=1e-10, atol=1e-10, err_msg=case)
    np.testing.assert_allclose(state.temperature, arrays_["out_lambda_table"], rtol=1e-10, atol=1e-10, err_msg=case)


def test_is_tempered_cross_entropy(batch):
  logits, labels = batch
  cross_entropy = lambda z: optax.softmax_cross_entropy_with_integer_labels(z, labels)
  np.testing.assert_allclose(loss(logits, labels), cross_entropy(logits) - np.log(5), atol=1e-12)
  for t in (0.3, 4.0):
    expected = t * cross_entropy(logits / t) - t * np.log(5)
    np.testing.assert_allclose(loss(logits, labels, temperature=t), expected, atol=1e-12)


def _differences(logits, labels, margin):
  d = logits - jnp.take_along_axis(logits, labels[:, None], 1) + margin
  return d.at[jnp.arange(len(labels)), labels].set(0.0)


def test_limits(batch):
  logits, labels = batch
  d = _differences(logits, labels, 0.1)
  gap = d.max(1) - loss(logits, labels, temperature=1e-3, margin=0.1)
  assert (gap >= -1e-14).all() and (gap <= 1e-3 * np.log(5) + 1e-14).all()
  np.testing.assert_allclose(loss(logits, labels, temperature=0.0, margin=0.1), d.max(1), atol=1e-12)
  np.testing.assert_allclose(loss(logits, labels, temperature=1e6, margin=0.1), d.mean(1), atol=1e-5)
  np.testing.assert_allclose(loss(logits, labels, temperature=jnp.inf, margin=0.1), d.mean(1), atol=1e-12)
  for t in (0.0, np.inf):
    assert jnp.isfinite(jax.grad(lambda z, t=t: loss(z, labels, temperature=t).sum())(logits)).all()


@pytest.mark.parametrize("temperature", [1e2, 1e4, 1e6, 1e9])
def test_float32_keeps_its_digits_at_large_temperatures(batch, temperature):
  logits, labels = batch
  exact = loss(logits, labels, temperature=temperature, margin=0.1)
  single = loss(logits.astype(jnp.float32), labels, temperature=temperature, margin=0.1)
  # 3e-5 of the range of the logits (about 20): where the direct formula hands over to the cumulants.
  np.testing.assert_allclose(single, exact, atol=6e-4)


def test_falls_with_the_temperature_at_the_rate_of_the_divergence(batch):
  logits, labels = batch
  temperatures = jnp.geomspace(1e-2, 1e3, 40)
  values = jax.vmap(lambda t: loss(logits, labels, temperature=t, margin=0.1))(temperatures)
  assert (jnp.diff(values, axis=0) <= 1e-12).all()
  for t in (0.2, 1.0, 30.0):
    derivative = jax.grad(lambda t: loss(logits, labels, temperature=t, margin=0.1).sum())(t)
    weights = label_dro.ldr_weights(logits, labels, temperature=t, margin=0.1)
    divergence = jnp.sum(weights * jnp.log(5 * weights))
    np.testing.assert_allclose(derivative, -divergence, rtol=1e-9)
    h = 1e-5 * t
    numeric = loss(logits, labels, temperature=t + h, margin=0.1) - loss(logits, labels, temperature=t - h, margin=0.1)
    np.testing.assert_allclose(numeric.sum() / (2 * h), derivative, rtol=1e-6)


def test_gradient_is_weights_less_one_hot(batch):
  logits, labels = batch
  for t in (0.1, 1.0, 10.0):
    gradient = jax.grad(lambda z, t=t: loss(z, labels, temperature=t, margin=0.3).sum())(logits)
    expected = label_dro.ldr_weights(logits, labels, temperature=t, margin=0.3) - jax.nn.one_hot(labels, 5)
    np.testing.assert_allclose(gradient, expected, atol=1e-12)
    np.testing.assert_allclose(gradient.sum(1), 0, atol=1e-12)


def test_symmetric_at_infinite_temperature(batch):
  logits, _ = batch
  every = [loss(logits, jnp.full(7, y), temperature=jnp.inf, margin=0.2) for y in range(5)]
  np.testing.assert_allclose(sum(every), 0.2 * 4, atol=1e-12)


def test_invariances(batch):
  logits, labels = batch
  np.testing.assert_allclose(
    loss(logits + 3.7, labels, temperature=2.0), loss(logits, labels, temperature=2.0), atol=1e-12
  )
  scaled = [loss(s * logits, labels, temperature=2.0, margin=0.1, normalize="l1_mean") for s in (1.0, 17.0)]
  np.testing.assert_allclose(*scaled, atol=1e-12)


def test_weights_maximise_the_variational_objective(batch):
  logits, labels = batch
  t, d = 0.7, _differences(logits, labels, 0.1)
  objective = lambda p: jnp.sum(p * d, -1) - t * jnp.sum(jnp.where(p > 0, p * jnp.log(5 * p), 0), -1)
  value = loss(logits, labels, temperature=t, margin=0.1)
  np.testing.assert_allclose(
    objective(label_dro.ldr_weights(logits, labels, temperature=t, margin=0.1)), value, atol=1e-12
  )
  others = jax.random.dirichlet(jax.random.key(0), jnp.ones(5), (1000, 7))
  assert (jax.vmap(objective)(others) <= value + 1e-12).all()


@pytest.mark.parametrize("normalize", label_dro.NORMALIZATIONS)
@pytest.mark.parametrize("masked", [False, True])
def test_gradient_rule_equals_differentiating_the_formula(batch, normalize, masked):
  logits, labels = batch
  where = None if not masked else jnp.ones(logits.shape, bool).at[:, 3].set(False).at[jnp.arange(7), labels].set(True)

  def plain(z, t, margin):
    mask = jnp.ones_like(z, bool) if where is None else where
    s = jax.nn.softplus(z) if normalize == "softplus_mean" else z
    f = s if normalize is None else s / jnp.mean(jnp.abs(s), 1, keepdims=True, where=mask)
    d = jnp.where(mask, _differences(f, labels, margin), -1e3)
    return jnp.sum(jnp.cos(z[:, 0]) * t * (jax.nn.logsumexp(d / t, axis=1) - jnp.log(mask.sum(1))))

  def ruled(z, t, margin):
    return jnp.sum(jnp.cos(z[:, 0]) * loss(z, labels, temperature=t, margin=margin, normalize=normalize, where=where))

  arguments = logits, jnp.float64(1.3), jnp.float64(0.2)
  np.testing.assert_allclose(ruled(*arguments), plain(*arguments), rtol=1e-12)
  for got, want in zip(jax.grad(ruled, (0, 1, 2))(*arguments), jax.grad(plain, (0, 1, 2))(*arguments)):
    np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-11)
  hessian = jax.hessian(lambda z: ruled(z, 1.3, 0.2))(logits)
  np.testing.assert_allclose(hessian, jax.hessian(lambda z: plain(z, 1.3, 0.2))(logits), rtol=1e-8, atol=1e-9)


def test_fixed_point(batch):
  logits, labels = batch
  for start, alpha, margin in ((10.0, 2.0, 0.0), (0.5, 1.2, 0.1), (1.0, 5.0, 0.0)):
    d = _differences(logits, labels, margin)
    options = {"initial_temperature": start, "alpha": alpha}
    iterates = jnp.stack([fixed_point(d, iterations=n, **options) for n in range(30)])
    assert (jnp.diff(iterates, axis=0) <= 1e-14).all()
    t = label_dro.aldr_fixed_point(d, **options)
    np.testing.assert_allclose(t, fixed_point(d, iterations=201, **options), atol=1e-10)
    assert (t >= start * (1 - 1 / alpha) - 1e-12).all() and (t <= start).all()
  np.testing.assert_allclose(label_dro.aldr_fixed_point(jnp.ones((2, 4)), initial_temperature=3.0), 3.0, atol=1e-14)


def test_aldr_table(batch):
  logits, labels = batch
  state, ids = label_dro.aldr_kl_init(20, temperature=3.0, dtype=jnp.float64), jnp.arange(7) * 2
  options = {"initial_temperature": 3.0, "alpha": 2.0, "floor": 0.0}
  values, new = label_dro.aldr_kl_loss(logits, labels, ids, state=state, **options)
  assert (new.temperature >= 1.5).all() and (new.temperature <= 3.0).all()
  np.testing.assert_array_equal(new.temperature[1::2], 3.0)
  flat = label_dro.aldr_kl_loss(jnp.ones_like(logits), labels, ids, state=state, **options)[1]
  np.testing.assert_allclose(flat.temperature, 3.0, atol=1e-14)
  # No gradient through the table, and none from the quadratic term: the gradient is LDR-KL's at the new temperature.
  gradient = jax.grad(lambda z: label_dro.aldr_kl_loss(z, labels, ids, state=state, **options)[0].sum())(logits)
  fixed = jax.grad(lambda z: loss(z, labels, temperature=new.temperature[ids], margin=0.1, normalize="l1_mean").sum())
  np.testing.assert_allclose(gradient, fixed(logits), atol=1e-14)


@hypothesis.given(
  arrays.arrays(np.float32, (3, 4), elements=st.floats(-1e4, 1e4, width=32)),
  st.sampled_from([0.0, 1e-20, 0.02, 1.0, 1e3, 1e20, float("inf")]),
  st.sampled_from(label_dro.NORMALIZATIONS),
  st.sampled_from([jnp.float32, jnp.bfloat16]),
)
@hypothesis.example(np.full((3, 4), 2.0**-126, np.float32), 0.0, "l1_mean", jnp.float32)
@hypothesis.example(np.full((3, 4), 2.0**-62, np.float32), 0.0, "l1_mean", jnp.float32)
@hypothesis.settings(max_examples=40, deadline=None)
def test_finite_at_extremes(logits, temperature, normalize, dtype):
  labels = jnp.array([0, 3, 1])
  value, gradient = mean_and_gradient(
    jnp.asarray(logits, dtype), labels, temperature=temperature, margin=0.1, normalize=normalize
  )
  assert value.dtype == gradient.dtype == dtype
  assert jnp.isfinite(value) and jnp.isfinite(gradient).all()


@pytest.mark.parametrize("options, message", [
  ({"temperature": -1.0}, "temperature must lie in"),
  ({"margin": -0.1}, "margin must lie in"),
  ({"normalize": "max"}, "normalize must be one of"),
])  # fmt: skip
def test_bad_hyperparameters(batch, options, message):
  with pytest.raises(ValueError, match=message):
    loss(*batch, **options)


def _aldr_surrogate(logits, results, labels, ids, state, *, initial_temperature, alpha, margin):
  """The temperatures, which were just updated with these logits, are constants."""
  temperature = results[1].temperature[ids][:, None]
  scaled = logits / jnp.mean(jnp.abs(logits), axis=-1, keepdims=True)
  label = jax.nn.one_hot(labels, CLASSES, dtype=logits.dtype)
  differences = scaled - jnp.sum(scaled * label, axis=-1, keepdims=True) + margin * (1 - label)
  value = jnp.sum(temperature, -1) * jnp.log(jnp.mean(jnp.exp(differences / temperature), axis=-1))
  return value - alpha * np.log(CLASSES) / (2 * initial_temperature) * (temperature[:, 0] - initial_temperature) ** 2


@pytest.mark.parametrize("shift", [0.0, -30.0, -44.0, -60.0, -200.0])
@pytest.mark.parametrize("chunk_size", [None, 3])
def test_softplus_normalisation_far_below_zero(shift, chunk_size):
  rng = np.random.default_rng(0)
  logits, labels = rng.normal(size=(4, 7)) + shift, jnp.array([0, 3, 6, 2])
  options = dict(normalize="softplus_mean", temperature=0.7, margin=0.1)
  loss = label_dro.ldr_kl_loss
  if chunk_size:
    loss = functools.partial(chunked.chunked_ldr_kl_loss, chunk_size=chunk_size)
  with mpmath.workdps(50):
    expected = []
    for row, label in zip(logits, labels):
      scores = [mpmath.log1p(mpmath.exp(mpmath.mpf(z))) for z in row]
      mean = sum(scores) / 7
      d = [(s - scores[label]) / mean + (0.1 if k != label else 0) for k, s in enumerate(scores)]
      expected.append(float(0.7 * mpmath.log(sum(mpmath.exp(x / 0.7) for x in d) / 7)))
  np.testing.assert_allclose(loss(jnp.asarray(logits, jnp.float32), labels, **options), expected, rtol=1e-4)
  np.testing.assert_allclose(loss(jnp.asarray(logits), labels, **options), expected, rtol=1e-11)


@pytest.mark.parametrize("scale", [1e-18, 1e-20, 1e-30, 0.0])
def test_chunked_scores_next_to_zero_are_not_divided(scale):
  rng = np.random.default_rng(0)
  logits, labels = jnp.asarray(rng.normal(size=(4, 7)) * scale, jnp.float32), jnp.array([0, 3, 6, 2])
  options = dict(normalize="l1_mean", temperature=0.7, margin=0.1)
  whole = jax.value_and_grad(lambda z: label_dro.ldr_kl_loss(z, labels, **options).sum())(logits)
  parts = jax.value_and_grad(lambda z: chunked.chunked_ldr_kl_loss(z, labels, chunk_size=3, **options).sum())(logits)
  for a, b in zip(parts, whole):
    assert np.isfinite(a).all()
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6 * np.abs(b).max())


def test_one_class():
  state = label_dro.aldr_kl_init(2, temperature=3.0)
  values, state = label_dro.aldr_kl_loss(jnp.ones((2, 1)), jnp.zeros(2, int), jnp.arange(2), state=state)
  assert values.tolist() == [0.0, 0.0] and state.temperature.tolist() == [3.0, 3.0]


ROWS = [
  stateful_loss_row(
    label_dro.aldr_kl_loss,
    lambda rng: label_dro.ALDRState(rng.uniform(0.5, 1.0, TABLE)),
    _aldr_surrogate,
    initial_temperature=(1.0, 5.0),
    alpha=(1.5, 3.0),
    margin=(0.0, 0.5),
  ),
  loss_row(label_dro.ldr_kl_loss, temperature=(0.0, 3.0), margin=(0.0, 0.5)),
  loss_row(label_dro.ldr_kl_loss, normalize="l1_mean", temperature=(0.3, 3.0), margin=(0.0, 0.5)),
  loss_row(label_dro.ldr_kl_loss, normalize="softplus_mean", temperature=(0.3, 3.0), margin=(0.0, 0.5)),
  loss_row(label_dro.ldr_weights, temperature=(0.3, 3.0), margin=(0.0, 0.5)),
  scores_row(label_dro.normalize_scores, normalize="l1_mean"),
  scores_row(label_dro.normalize_scores, normalize="softplus_mean"),
  scores_row(label_dro.aldr_fixed_point, initial_temperature=(0.5, 5.0), alpha=(1.5, 3.0), iterations=20),
]


EXEMPT = {
  "ALDRState": "state, carried by aldr_kl_loss",
  "NORMALIZATIONS": "names, each of them in a row of ldr_kl_loss",
  "aldr_kl_init": "builds the state that aldr_kl_loss's row starts from",
}
