"""The committee machine: statistics, risk, kernel, lazy limit, and the golden vectors of its card."""

import functools
import importlib
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxreg.kernels import gradient_flow
from jaxreg.kernels.lazy_rich_dmft import committee_dmft
from jaxreg.kernels.lazy_training import eigenvector_labels, lazy_learning_rate, lazy_output
from jaxreg.metrics import lazy_rich
from tests.conformance import row

# The room exports a function of the module's name, which hides it from an import statement.
theory = importlib.import_module("jaxreg.kernels.committee_machine")
pytestmark = pytest.mark.usefixtures("x64")
NEURONS, FEATURES, EXAMPLES = 5, 3, 7


@pytest.fixture(scope="module")
def problem():
  rng = np.random.default_rng(0)
  draw = lambda *shape: jnp.asarray(rng.normal(size=shape))
  with jax.enable_x64(True):
    return {
      "weights": draw(NEURONS, FEATURES),
      "initial_weights": draw(NEURONS, FEATURES),
      "teacher": draw(FEATURES),
      "inputs": draw(EXAMPLES, FEATURES) / FEATURES**0.5,
      "targets": draw(EXAMPLES),
    }


def quadrature(features: int, nodes: int = 6):
  """Points and weights of the standard Gaussian in `features` dimensions, divided by the root of their number."""
  points, weights = np.polynomial.hermite_e.hermegauss(nodes)
  grid = np.array(list(itertools.product(points, repeat=features))) / features**0.5
  products = np.array(list(itertools.product(weights / weights.sum(), repeat=features))).prod(1)
  return jnp.asarray(grid), jnp.asarray(products)


def train(weights, inputs, targets, *, rate, steps, **options):
  """Full-batch gradient descent with step `rate N / a^2`; weights and losses before every step, and the final ones."""
  loss = lambda w: jnp.sum((theory.committee(w, inputs, **options) - targets) ** 2) / 2
  step = lazy_learning_rate(rate, output_scale=options["output_scale"]) * weights.shape[0]

  def advance(w, _):
    value, gradient = jax.value_and_grad(loss)(w)
    return w - step * gradient, (w - step * gradient, value)

  return jax.lax.scan(advance, weights, None, length=steps)[1]


@pytest.mark.parametrize("centred", [False, True])
def test_statistics_are_sufficient(problem, centred):
  initial = problem["initial_weights"] if centred else None
  mean, moment = theory.committee_statistics(problem["weights"], initial_weights=initial)
  x = problem["inputs"]
  outputs = theory.committee(problem["weights"], x, output_scale=1.7, curvature=0.3, initial_weights=initial)
  expected = 1.7 * x @ mean + 1.7 * 0.3 / 2 * jnp.einsum("ni,ij,nj->n", x, moment, x)
  np.testing.assert_allclose(outputs, expected, atol=1e-12)


@pytest.mark.parametrize("centred", [False, True])
def test_risk_terms_sum_to_quadrature(problem, centred):
  initial = problem["initial_weights"] if centred else None
  options = {"output_scale": 1.3, "curvature": 0.7}
  points, weights = quadrature(FEATURES)
  error = theory.committee(problem["weights"], points, initial_weights=initial, **options)
  error = error - (points @ problem["teacher"]) ** 2 / 2
  statistics = theory.committee_statistics(problem["weights"], initial_weights=initial)
  terms = theory.committee_risk(statistics, problem["teacher"], **options)
  np.testing.assert_allclose(sum(terms), weights @ error**2, rtol=1e-10)


def test_alignment_is_that_of_the_population(problem):
  points, weights = quadrature(FEATURES)
  statistics = theory.committee_statistics(problem["weights"])
  weighted = weights * (points @ problem["teacher"]) ** 2 / 2
  expected = weighted @ theory.committee_ntk(points, points, statistics, curvature=0.7) @ weighted
  np.testing.assert_allclose(
    theory.committee_alignment(statistics, problem["teacher"], curvature=0.7), expected, rtol=1e-10
  )


def test_kernel_is_the_tangent_kernel(problem):
  output = functools.partial(theory.committee, output_scale=1.7, curvature=0.3)
  jacobian = jax.jacrev(output)(problem["weights"], problem["inputs"]).reshape(EXAMPLES, -1)
  statistics = theory.committee_statistics(problem["weights"])
  kernel = theory.committee_ntk(problem["inputs"], problem["inputs"], statistics, curvature=0.3)
  np.testing.assert_allclose(kernel, NEURONS / 1.7**2 * jacobian @ jacobian.T, atol=1e-10)
  wide = theory.CommitteeStatistics(jnp.zeros(FEATURES), jnp.eye(FEATURES))
  np.testing.assert_allclose(
    theory.committee_ntk(problem["inputs"], problem["inputs"], wide, curvature=0.3),
    theory.committee_initial_ntk(problem["inputs"], problem["inputs"], curvature=0.3),
    atol=1e-12,
  )


def test_eigenvalues_of_the_initial_kernel():
  points, weights = quadrature(FEATURES)
  kernel = theory.committee_initial_ntk(points, points, curvature=0.7)
  apply = lambda function: kernel @ (weights * function)
  linear, quadratic, norm = theory.committee_spectrum(FEATURES, curvature=0.7)
  squares = jnp.sum(points**2, 1)
  cases = (
    (linear, points[:, 0]),
    (quadratic, points[:, 0] * points[:, 1]),
    (quadratic, points[:, 0] ** 2 - squares / FEATURES),
    (norm, squares),
  )
  for value, function in cases:
    np.testing.assert_allclose(apply(function), value * function, atol=1e-8)


@settings(max_examples=20, deadline=None)
@given(sigma=st.floats(0.3, 3.0))
def test_scale_of_weights_is_a_scale_of_outputs(sigma):
  """Outputs and their training are the same when the weights grow by sigma, scale and curvature fall by it."""
  with jax.enable_x64(True):
    rng = np.random.default_rng(1)
    weights, inputs = jnp.asarray(rng.normal(size=(NEURONS, FEATURES))), jnp.asarray(rng.normal(size=(4, FEATURES)))
    targets = jnp.asarray(rng.normal(size=4))
    outputs = []
    for scale in (1.0, sigma):
      options = {"output_scale": 1.5 / scale, "curvature": 0.4 / scale}
      path, _ = _jitted_train(weights * scale, inputs, targets, rate=0.05, steps=5, **options)
      outputs.append([theory.committee(w, inputs, **options) for w in (weights * scale, *path)])
    np.testing.assert_allclose(outputs[0], outputs[1], rtol=1e-8, atol=1e-10)


_jitted_train = jax.jit(train, static_argnames="steps")


def test_lazy_limit_is_kernel_gradient_descent(problem):
  initial, inputs, targets = problem["initial_weights"], problem["inputs"], problem["targets"]
  options = {"output_scale": 1e6, "curvature": 0.5, "initial_weights": initial}
  path, _ = train(initial, inputs, targets, rate=0.05, steps=30, **options)
  kernel = theory.committee_ntk(inputs, inputs, theory.committee_statistics(initial), curvature=0.5)
  eigen = gradient_flow.kernel_eigensystem(kernel)
  for steps in (1, 7, 30):
    linear = kernel @ gradient_flow.gradient_descent_coefficients(eigen, targets, steps=steps, learning_rate=0.05)
    outputs = theory.committee(path[steps - 1], inputs, **options)
    assert np.linalg.norm(outputs - linear) < 1e-4 * np.linalg.norm(linear)


def test_output_scale_leaves_the_start_alone(problem):
  initial, inputs = problem["initial_weights"], problem["inputs"]
  network = functools.partial(theory.committee, curvature=0.5)
  velocities = []
  for scale in (0.1, 1.0, 1e3):
    output = lazy_output(network, initial, output_scale=scale)
    assert (output(initial, inputs) == 0).all()
    assert (theory.committee(initial, inputs, output_scale=scale, initial_weights=initial) == 0).all()
    gradient = jax.grad(lambda w, output=output: jnp.sum((output(w, inputs) - problem["targets"]) ** 2) / 2)(initial)
    direction = -lazy_learning_rate(0.1, output_scale=scale) * gradient
    velocities.append(jax.jvp(lambda w, output=output: output(w, inputs), (initial,), (direction,))[1])
  np.testing.assert_allclose(velocities[1:], velocities[:1] * 2, rtol=1e-12)


def test_eigenvector_labels(problem):
  kernel = theory.committee_initial_ntk(problem["inputs"], problem["inputs"])
  values = np.linalg.eigvalsh(kernel)[::-1]
  for index in (0, 2, EXAMPLES - 1):
    labels = jax.jit(lambda index: eigenvector_labels(kernel, index=index))(index)
    np.testing.assert_allclose(kernel @ labels, values[index] * labels, atol=1e-10)
    np.testing.assert_allclose(jnp.mean(labels**2), 1, rtol=1e-12)


def test_vmap_over_scales_and_gradient_of_the_risk(problem):
  statistics = theory.committee_statistics(problem["weights"])
  risk = lambda scale: sum(theory.committee_risk(statistics, problem["teacher"], output_scale=scale, curvature=0.5))
  scales = jnp.array([0.5, 1.0, 2.0])
  np.testing.assert_allclose(jax.vmap(risk)(scales), [risk(scale) for scale in scales], rtol=1e-12)
  slope = (risk(1 + 1e-5) - risk(1 - 1e-5)) / 2e-5
  np.testing.assert_allclose(jax.grad(risk)(1.0), slope, rtol=1e-7)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_low_precision(problem, dtype):
  low = jax.tree.map(lambda leaf: leaf.astype(dtype), problem)
  outputs = theory.committee(low["weights"], low["inputs"] * 1e4, output_scale=1e4)
  assert outputs.dtype == dtype and jnp.isfinite(outputs.astype(jnp.float32)).all()
  statistics = theory.committee_statistics(low["weights"])
  assert all(leaf.dtype == jnp.float32 for leaf in statistics)
  assert theory.committee_initial_ntk(low["inputs"], low["inputs"]).dtype == dtype


def test_bad_input(problem):
  weights, inputs = problem["weights"], problem["inputs"]
  statistics = theory.committee_statistics(weights)
  cases = (
    ("weights must be", lambda: theory.committee(weights[0], inputs)),
    ("inputs must have", lambda: theory.committee(weights, inputs[:, :2])),
    ("initial_weights must", lambda: theory.committee(weights, inputs, initial_weights=weights[:2])),
    ("output_scale must", lambda: theory.committee(weights, inputs, output_scale=0.0)),
    ("curvature must", lambda: theory.committee(weights, inputs, curvature=float("nan"))),
    ("inputs2 must have", lambda: theory.committee_ntk(inputs, inputs[:, :2], statistics)),
    ("statistics must have", lambda: theory.committee_risk(statistics, jnp.ones(2))),
    ("teacher must be floating", lambda: theory.committee_risk(statistics, jnp.ones(FEATURES, int))),
    ("features must", lambda: theory.committee_spectrum(0)),
    ("output_scale must", lambda: lazy_output(lambda p, x: x, {}, output_scale=-1.0)),
    ("learning_rate must", lambda: lazy_learning_rate(-1.0, output_scale=1.0)),
    ("kernel must be a square", lambda: eigenvector_labels(inputs, index=0)),
    ("index must", lambda: eigenvector_labels(jnp.eye(2), index=2)),
  )
  for message, call in cases:
    with pytest.raises(ValueError, match=message):
      call()


@pytest.mark.golden
def test_golden_28_grokking_lazy_rich(golden):
  known, checked = {}, set()
  for _, arrays, _ in golden("28-grokking_lazy_rich").cases():
    # A case uses the weights and the data of the cases before it.
    known |= {name: jnp.asarray(value) for name, value in arrays.items()}
    for check in (check_network, check_kernel, check_descent, check_flow):
      if KEY_OF[check] in arrays:
        check(known)
        checked.add(check)
    if "out_train_stderr" in arrays:
      check_dmft(arrays)
      checked.add(check_dmft)
  assert checked


def check_network(g):
  options = {"output_scale": g["alpha"], "curvature": g["eps"]}
  close = functools.partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-11)
  close(theory.committee(g["W"], g["X"], **options), g["out_f"])
  close(theory.committee(g["W"], g["X"], initial_weights=g["W0"], **options), g["out_f_centered"])
  statistics = theory.committee_statistics(g["W"])
  centred = theory.committee_statistics(g["W"], initial_weights=g["W0"])
  close(statistics.mean, g["out_wbar"])
  close(statistics.second_moment, g["out_M"])
  terms = theory.committee_risk(statistics, g["beta"], **options)
  close(terms, g["out_terms"])
  close(sum(terms), g["out_risk"])
  close(sum(theory.committee_risk(centred, g["beta"], **options)), g["out_risk_centered"])
  kernel = theory.committee_ntk(g["X"], g["X"], statistics, curvature=g["eps"])
  unit = g["alpha"] ** 2 / g["W"].shape[0]
  close(kernel, g["out_ntk_normalised"])
  close(unit * kernel, g["out_ntk"])
  close(
    unit * theory.committee_ntk(g["Xt"], g["X"], statistics, curvature=g["eps"]), g["out_ntk_test_train"]
  )  # fmt: skip
  close(lazy_rich.kernel_alignment(kernel, g["y"]), g["out_cka"])
  close(lazy_rich.kernel_difficulty(kernel, g["y"], ridge=1e-3), g["out_difficulty"])


def check_kernel(g):
  close = functools.partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-11)
  kernel = theory.committee_initial_ntk(g["X"], g["X"], curvature=g["eps"])
  close(kernel, g["out_K0"])
  coefficients = gradient_flow.kernel_regression(kernel, g["y"], ridge=g["ridge"])
  close(theory.committee_initial_ntk(g["Xt"], g["X"], curvature=g["eps"]) @ coefficients, g["out_krr_pred"])
  close(theory.committee_spectrum(g["X"].shape[1], curvature=g["eps"]), g["out_mercer"])
  statistics = theory.committee_statistics(g["W"])
  close(theory.committee_alignment(statistics, g["beta"], curvature=g["eps"]), g["out_align_numerator"])


def check_descent(g):
  options = {"output_scale": g["alpha"], "curvature": g["eps"], "initial_weights": g["W0"]}
  steps = g["out_loss"].shape[0]
  weights, losses = train(g["W0"], g["X"], g["y"], rate=g["eta0"], steps=steps, **options)
  np.testing.assert_allclose(weights, g["out_W"], rtol=1e-9, atol=1e-11)
  np.testing.assert_allclose(losses, g["out_loss"], rtol=1e-9)


def check_flow(g):
  kernel = functools.partial(
    theory.committee_ntk, statistics=theory.committee_statistics(g["W0"]), curvature=g["eps"]
  )  # fmt: skip
  eigen = gradient_flow.kernel_eigensystem(kernel(g["X"], g["X"]))
  for index, time in enumerate(g["times"]):
    coefficients = gradient_flow.gradient_flow_coefficients(eigen, g["y"], time=time)
    np.testing.assert_allclose(kernel(g["X"], g["X"]) @ coefficients, g["out_train_f"][index], rtol=1e-7, atol=1e-9)
    np.testing.assert_allclose(kernel(g["Xt"], g["X"]) @ coefficients, g["out_test_f"][index], rtol=1e-7, atol=1e-9)


def check_dmft(arrays):
  kappa, neurons, scale, curvature, rate, steps = arrays["params"].tolist()
  with jax.enable_x64(False):  # the averages are Monte Carlo
    solution = committee_dmft(
      jax.random.key(0),
      kappa=kappa,
      neurons=int(neurons),
      steps=int(steps),
      output_scale=scale,
      curvature=curvature,
      learning_rate=rate,
    )
  for name in ("train", "test"):
    expected, error = arrays[f"out_{name}"], arrays[f"out_{name}_stderr"]
    assert (np.abs(getattr(solution, f"{name}_loss") - expected) <= 4 * error + 0.01 * expected).all()


KEY_OF = {check_network: "out_f", check_kernel: "out_K0", check_descent: "out_W", check_flow: "times"}


def _network(rng):
  return rng.normal(size=(4, 3)), rng.normal(size=3)


def _through_statistics(function):
  """`function(statistics, teacher)` as a function of the network's weights."""

  def call(weights, teacher, **options):
    return function(theory.committee_statistics(weights), teacher, **options)

  return call


ROWS = [
  row(
    theory.committee,
    lambda rng: (rng.normal(size=(4, 3)), rng.normal(size=(5, 3))),
    options=dict(output_scale=(0.5, 2.0), curvature=(0.5, 2.0)),
  ),
  row(
    theory.committee_alignment,
    _network,
    call=_through_statistics(theory.committee_alignment),
    wide=True,
    options=dict(curvature=(0.5, 2.0)),
  ),
  row(
    theory.committee_risk,
    _network,
    call=_through_statistics(theory.committee_risk),
    wide=True,
    options=dict(output_scale=(0.5, 2.0), curvature=(0.5, 2.0)),
  ),
  row(
    theory.committee_initial_ntk,
    lambda rng: (rng.normal(size=(4, 3)), rng.normal(size=(5, 3))),
    options=dict(curvature=(0.5, 2.0)),
  ),
  row(
    theory.committee_ntk,
    lambda rng: (rng.normal(size=(4, 3)), rng.normal(size=(5, 3)), rng.normal(size=(6, 3))),
    call=lambda x, y, weights, **options: theory.committee_ntk(x, y, theory.committee_statistics(weights), **options),
    options=dict(curvature=(0.5, 2.0)),
  ),
  row(theory.committee_statistics, lambda rng: (rng.normal(size=(4, 3)),), wide=True),
]


EXEMPT = {
  "CommitteeRisk": "result of committee_risk",
  "CommitteeSpectrum": "result of committee_spectrum",
  "CommitteeStatistics": "result of committee_statistics",
  "committee_spectrum": "three formulas of integers and one number",
}
