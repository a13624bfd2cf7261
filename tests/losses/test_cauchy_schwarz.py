"""Cauchy-Schwarz quantities: golden vectors, closed forms, limits, masks, chunks and devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from jaxreg.losses import cauchy_schwarz as cs
from tests.conformance import EXAMPLES, row

WIDTHS = dict(input_bandwidth=(0.7, 1.5), target_bandwidth=(0.7, 1.5))
MEMORY = (None, 5)


def _regression(rng, outputs=2):
  inputs = rng.normal(size=(EXAMPLES, 3))
  targets = np.sin(inputs[:, :outputs])
  return targets + 0.5 * rng.normal(size=targets.shape), targets, inputs


def _represented(rng):
  predictions, targets, inputs = _regression(rng)
  return predictions, targets, np.tanh(inputs @ rng.normal(size=(3, 4))), inputs


def _joint(rng):
  return _represented(rng)[2:]


_BAD_REGRESSION = (
  ("predictions", lambda p, y, *rest: (p.astype(np.int32), y, *rest)),
  ("targets", lambda p, y, *rest: (p, y[1:], *rest)),
  ("targets", lambda p, y, *rest: (p, y[:, :1], *rest)),
  ("inputs", lambda p, y, *rest: (p, y, *rest[:-1], rest[-1][1:])),
)
_BAD_JOINT = (
  ("representations", lambda t, x: (t[None], x)),
  ("inputs", lambda t, x: (t, x[1:])),
  ("inputs", lambda t, x: (t, x.astype(np.int32))),
)
_BAD_SAMPLES = (("samples", lambda a, b: (a[None], b)), ("others", lambda a, b: (a, b[:, 1:])))

ROWS = [
  *(
    row(
      function,
      lambda rng: (rng.normal(size=(EXAMPLES, 3)), 1 + rng.normal(size=(5, 3))),
      bad=_BAD_SAMPLES,
      options=dict(bandwidth=(0.7, 1.5)),
    )
    for function in (cs.cs_divergence, cs.squared_mmd)
  ),
  *(
    row(
      cs.conditional_cs_divergence,
      _regression,
      bad=_BAD_REGRESSION,
      options=dict(estimator=estimator, chunk_size=chunk_size, **WIDTHS),
    )
    for estimator, chunk_size in zip(cs.ESTIMATORS, MEMORY)
  ),
  *(
    row(
      function,
      _joint,
      bad=_BAD_JOINT,
      options=dict(input_bandwidth=(0.7, 1.5), representation_bandwidth=(0.7, 1.5)),
    )
    for function in (cs.cs_mutual_information, cs.normalized_cs_mutual_information)
  ),
  row(
    cs.cs_information_bottleneck_loss,
    _represented,
    bad=_BAD_REGRESSION,
    options=dict(weight=(0.0, 1.0), representation_bandwidth=(0.7, 1.5), **WIDTHS),
  ),
]
EXEMPT = {"BottleneckTerms": "result of cs_information_bottleneck_loss"}


def _of_case(x, y, yhat, t, sigma):
  """All that the golden file holds of a case, by its names there."""
  found = {}
  for estimator, key in (("paper", "cond_cs_paper"), ("reference_code", "cond_cs_code")):
    options = dict(estimator=estimator, input_bandwidth=sigma, target_bandwidth=sigma)
    loss = jax.value_and_grad(functools.partial(cs.conditional_cs_divergence, **options))
    found[f"out_{key}"], found[f"grad_yhat_{key}"] = loss(yhat, y, x)
  options = dict(input_bandwidth=sigma, representation_bandwidth=sigma)
  of = lambda function: jax.value_and_grad(functools.partial(function, **options))(t, x)
  found["out_qmi_nat"], gradient = of(cs.cs_mutual_information)
  found["out_qmi_code_log2"], found["grad_t_qmi_code_log2"] = found["out_qmi_nat"] / np.log(2), gradient / np.log(2)
  found["out_qmi_norm"], found["grad_t_qmi_norm"] = of(cs.normalized_cs_mutual_information)
  found["out_cs_marginal"] = cs.cs_divergence(y, yhat, bandwidth=sigma)
  found["out_mmd2"] = cs.squared_mmd(y, yhat, bandwidth=sigma)
  # The code called as its script does, with vectors as targets.
  y, yhat = y[:, 0], yhat[:, 0]
  found["out_cond_cs_code_called_1d"] = jnp.sum((y - yhat) ** 2) / sigma**2 / np.log(2)
  vectors, columns = (
    cs.conditional_cs_divergence(*pair, x, estimator="reference_code")
    for pair in ((yhat, y), (yhat[:, None], y[:, None]))
  )
  return found, vectors, columns


@pytest.mark.golden
def test_golden_38_cs_ib(golden, x64):
  for name, case, _ in golden("38-cs_ib").cases():
    arguments = {key: case.pop(key) for key in ("x", "y", "yhat", "t", "sigma")}
    found, vectors, columns = jax.jit(_of_case)(**arguments)
    assert set(found) == set(case)
    for key, expected in case.items():
      np.testing.assert_allclose(found[key], expected, rtol=1e-8, atol=1e-12, err_msg=f"{name} {key}")
    # No estimator becomes squared error when it is given vectors.
    np.testing.assert_allclose(vectors, columns, rtol=1e-12)
    assert abs(vectors / case["out_cond_cs_code_called_1d"] - 1) > 0.1


def test_exact_predictions_diverge_by_nothing(x64):
  _, targets, inputs = _regression(np.random.default_rng(0))
  for width in (0.1, 1.0, 30.0):
    for estimator in cs.ESTIMATORS:
      options = dict(input_bandwidth=width, target_bandwidth=0.7, estimator=estimator)
      assert abs(cs.conditional_cs_divergence(targets, targets, inputs, **options)) < 1e-12


def test_limits_of_the_conditional_divergence(x64):
  predictions, targets, inputs = _regression(np.random.default_rng(1))
  loss = functools.partial(cs.conditional_cs_divergence, predictions, targets, inputs)
  marginal = cs.cs_divergence(targets, predictions, bandwidth=0.7)
  np.testing.assert_allclose(loss(input_bandwidth=1e8, target_bandwidth=0.7), marginal, rtol=1e-8)
  squares = np.sum((predictions - targets) ** 2, axis=1)
  correntropy = -2 * np.log(np.mean(np.exp(-squares / 2 / 0.7**2)))
  np.testing.assert_allclose(loss(input_bandwidth=1e-3, target_bandwidth=0.7), correntropy, rtol=1e-8)
  wide = loss(input_bandwidth=1e-3, target_bandwidth=1e4)
  np.testing.assert_allclose(wide * 1e8, squares.mean(), rtol=1e-6)


def test_mutual_information_is_symmetric_and_keeps_under_motions(x64):
  rng = np.random.default_rng(2)
  for _ in range(3):
    t, x = _joint(rng)
    information = functools.partial(cs.cs_mutual_information, representation_bandwidth=0.8)
    value = information(t, x)
    assert value >= -1e-12
    swapped = cs.cs_mutual_information(x, t, input_bandwidth=0.8)
    order, (turn, _) = rng.permutation(len(x)), np.linalg.qr(rng.normal(size=(4, 4)))
    for other in (swapped, information(t[order], x[order]), information(t @ turn + 3, x - 5)):
      np.testing.assert_allclose(other, value, rtol=1e-9)


def test_mutual_information_of_product_grids_and_constants_is_zero(x64):
  rng = np.random.default_rng(3)
  x, t = rng.normal(size=(4, 2)), rng.normal(size=(5, 3))
  grid_x, grid_t = np.repeat(x, 5, axis=0), np.tile(t, (4, 1))
  assert abs(cs.cs_mutual_information(grid_t, grid_x)) < 1e-12
  for dtype in (np.float32, np.float64):
    inputs = rng.normal(size=(64, 3)).astype(dtype)
    both = jax.jit(jax.value_and_grad(cs.normalized_cs_mutual_information))
    for constants in ((0 * inputs + 7, inputs), (inputs, 0 * inputs)):
      value, gradient = both(*constants)
      assert value == 0 and not np.any(gradient)
    np.testing.assert_allclose(both(inputs, inputs)[0], 1, rtol=1e-5)
    assert abs(cs.cs_mutual_information(0 * inputs, inputs)) < 1e-5


def test_narrow_kernels_of_the_inputs_leave_the_entropy_of_the_representation(x64):
  t, x = _joint(np.random.default_rng(4))
  kernel = np.exp(-np.sum((t[:, None] - t) ** 2, axis=-1) / 2)
  np.testing.assert_allclose(cs.cs_mutual_information(t, x, input_bandwidth=1e-3), -np.log(kernel.mean()), rtol=1e-9)


def _gaussian_divergences(mean, covariance, other):
  """Cauchy-Schwarz and both Kullback-Leibler divergences of N(0, covariance) and N(mean, other)."""
  d, total = len(mean), covariance + other
  logdet = lambda s: np.linalg.slogdet(s)[1]
  cauchy = (
    mean @ np.linalg.solve(total, mean) + logdet(total) - d * np.log(2) - (logdet(covariance) + logdet(other)) / 2
  )
  kl = lambda a, b: (np.trace(np.linalg.solve(b, a)) - d + mean @ np.linalg.solve(b, mean) + logdet(b) - logdet(a)) / 2
  return cauchy, kl(covariance, other), kl(other, covariance)


def test_divergence_of_gaussians(x64):
  rng = np.random.default_rng(5)
  draw = lambda d: (lambda a: a @ a.T + 0.05 * np.eye(d))(rng.normal(size=(d, d)))
  for _ in range(300):
    cauchy, *kl = _gaussian_divergences(3 * rng.normal(size=2), draw(2), draw(2))
    assert cauchy / 2 <= min(kl) + 1e-9 and cauchy <= max(kl) + 1e-9
  # Below one of them it need not be.
  cauchy, kl, _ = _gaussian_divergences(np.array([3.0]), np.array([[0.01]]), np.array([[1.0]]))
  assert cauchy > 1.5 * kl
  mean, first, second = np.array([1.0, 0.5]), draw(2), draw(2)
  samples = rng.multivariate_normal(np.zeros(2), first, 4000), rng.multivariate_normal(mean, second, 4000)
  smoothed = [covariance + 0.5**2 / 2 * np.eye(2) for covariance in (first, second)]
  estimate = jax.jit(functools.partial(cs.cs_divergence, bandwidth=0.5, chunk_size=1000))(*samples)
  np.testing.assert_allclose(estimate, _gaussian_divergences(mean, *smoothed)[0], rtol=0.06)


def test_divergence_is_the_angle_and_the_discrepancy_the_distance(x64):
  rng = np.random.default_rng(6)
  a, b = rng.normal(size=(7, 2)), 1 + rng.normal(size=(9, 2))
  both = np.concatenate([a, b])
  gram = np.exp(-np.sum((both[:, None] - both) ** 2, axis=-1) / 2 / 0.8**2)
  u, v = np.repeat([1 / 7, 0], [7, 9]), np.repeat([0, 1 / 9], [7, 9])
  cosine = u @ gram @ v / np.sqrt(u @ gram @ u * (v @ gram @ v))
  np.testing.assert_allclose(cs.cs_divergence(a, b, bandwidth=0.8), -2 * np.log(cosine), rtol=1e-10)
  np.testing.assert_allclose(cs.squared_mmd(a, b, bandwidth=0.8), (u - v) @ gram @ (u - v), rtol=1e-10)
  for function in (cs.cs_divergence, cs.squared_mmd):
    assert abs(function(a, np.concatenate([a, a]), bandwidth=0.8)) < 1e-12


def test_far_apart_in_float32():
  rng = np.random.default_rng(7)
  inputs = rng.normal(size=(16, 3)).astype(np.float32)
  targets = 60 * rng.normal(size=(16, 1)).astype(np.float32)
  far = jnp.asarray(targets + 60)
  loss = lambda p: cs.cs_information_bottleneck_loss(p, targets, 60 * p, 60 * inputs, weight=0.1)[0]
  for function in (loss, lambda p: cs.cs_divergence(p, targets - 3600, bandwidth=1.0)):
    value, gradient = jax.jit(jax.value_and_grad(function))(far)
    assert np.isfinite(value) and np.isfinite(gradient).all() and np.any(gradient)


CALLS = {
  "divergence": lambda p, y, t, x, where=None, **options: cs.cs_divergence(
    p, y, bandwidth=0.8, where=where, where_others=where, **options
  ),
  "mmd": lambda p, y, t, x, where=None, **options: cs.squared_mmd(
    p, y, bandwidth=0.8, where=where, where_others=where, **options
  ),
  "bottleneck": lambda *arrays, **options: cs.cs_information_bottleneck_loss(
    *arrays, weight=0.3, compression_input_bandwidth=2.0, **options
  )[0],
}
every_call = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)


@every_call
def test_what_does_not_count_is_not_read(call, x64):
  arrays = [10 + array for array in _represented(np.random.default_rng(8))]
  kept = np.arange(EXAMPLES) % 4 > 0
  for dtype, close in ((np.float64, dict(rtol=1e-9, atol=1e-12)), (np.float32, dict(rtol=1e-3, atol=1e-5))):
    spoiled = [np.where(kept[:, None], array, np.nan).astype(dtype) for array in arrays]
    masked = jax.jit(jax.value_and_grad(lambda *arrays, where: call(*arrays, where=where), argnums=(0, 1)))
    value, gradients = masked(*spoiled, where=kept)
    expected, slopes = jax.jit(jax.value_and_grad(call, argnums=(0, 1)))(*(array[kept] for array in arrays))
    np.testing.assert_allclose(value, expected, **close)
    for gradient, slope in zip(gradients, slopes):
      assert not np.any(gradient[~kept])
      np.testing.assert_allclose(gradient[kept], slope, **close)
  value, gradients = masked(*spoiled, where=0 * kept > 0)
  assert value == 0 and not np.any(gradients[0])


@every_call
def test_chunks_and_devices_give_the_same(call, x64):
  arrays = _represented(np.random.default_rng(9))
  kept = np.arange(EXAMPLES) != 3
  both = lambda **options: jax.value_and_grad(lambda *a: call(*a[:-1], where=a[-1], **options), argnums=(0, 1, 2, 3))
  value, gradients = both()(*arrays, kept)
  close = functools.partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-12)
  for chunk_size in (5, 100):
    jax.tree.map(close, jax.jit(both(chunk_size=chunk_size))(*arrays, kept), (value, gradients))
  devices = jax.make_mesh((8,), ("devices",), axis_types=(AxisType.Auto,))
  spec = PartitionSpec("devices")
  split = jax.shard_map(
    both(axis_name="devices"), mesh=devices, in_specs=(spec,) * 5, out_specs=(PartitionSpec(), spec), check_vma=False
  )
  actual = jax.jit(split)(*arrays, kept)
  close(actual[0], value)
  jax.tree.map(lambda sharded, whole: close(sharded / 8, whole), actual[1], gradients)


def test_memory_grows_linearly_with_chunks():
  """What is compiled for a batch four times as large needs four times, not sixteen times the memory."""

  def needed(examples, chunk_size):
    shapes = [jax.ShapeDtypeStruct((examples, d), np.float32) for d in (1, 1, 8, 4)]
    loss = lambda *arrays: cs.cs_information_bottleneck_loss(*arrays, weight=0.1, chunk_size=chunk_size)[0]
    return jax.jit(jax.grad(loss)).lower(*shapes).compile().memory_analysis().temp_size_in_bytes

  assert needed(4096, 16) < 6 * needed(1024, 16)
  assert needed(4096, 16) < needed(4096, None) / 20


def test_wrong_options_are_refused():
  predictions, targets, inputs = _regression(np.random.default_rng(10))
  with pytest.raises(ValueError, match="estimator must be one of"):
    cs.conditional_cs_divergence(predictions, targets, inputs, estimator="code")
  with pytest.raises(ValueError, match="chunk_size must be a positive integer"):
    cs.conditional_cs_divergence(predictions, targets, inputs, chunk_size=0)
  with pytest.raises(ValueError, match="where must be boolean"):
    cs.conditional_cs_divergence(predictions, targets, inputs, where=np.ones(3, bool))
  with pytest.raises(ValueError, match="input_bandwidth must lie in"):
    cs.cs_mutual_information(targets, inputs, input_bandwidth=0.0)
