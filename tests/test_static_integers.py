"""Static whole numbers may be Python's or NumPy's; booleans, fractions and what is not static are refused."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxreg import adversarial, kernels, metrics, models, pruning, quantization, regularizers, solvers
from jaxreg.metrics.sizes import is_integer, static_integer

X, IMAGES, KEY = jnp.arange(12.0).reshape(4, 3) / 12, jnp.ones((2, 4, 4, 2)), jax.random.key(0)
LABELS, GROUPS, POSITIVE = jnp.array([0, 1, 0, 1]), np.array([0, 0, 1]), jnp.array([0.5, 0.7, 0.9])
LAW = kernels.ErrorLaw(POSITIVE, jnp.ones((3, 2)))
MDP = solvers.LinearMDP(jnp.ones((1, 1, 2, 3)), jnp.ones((1, 1, 2, 1)), jnp.ones(1))
POLICY = jnp.array([[[0.25, 0.75]]])
COST, MASS, COLUMNS = jnp.eye(3, 4), jnp.full(3, 1 / 3), jnp.full(4, 0.25)
relu, optimal = kernels.relu_dual(), kernels.optimal_dual(2)
CASES = {
  "pgd": lambda n: adversarial.pgd(lambda x: jnp.sum(x**2, -1), X, KEY, radius=0.1, step_size=0.1, steps=n),
  "gairat_weights": lambda n: adversarial.gairat_weights(LABELS, steps=n),
  "log_barrier_attack": lambda n: adversarial.log_barrier_attack(
    lambda x: jnp.sum(x**2, -1), X, radius=0.1, barrier=0.1, steps=n, optimizer=optax.sgd(0.1)
  ),
  "worst_classes_accuracy": lambda n: metrics.worst_classes_accuracy(LABELS, LABELS, num_classes=n),
  "average_pool": lambda n: kernels.average_pool(kernels.image_state(IMAGES), size=n),
  "class_targets": lambda n: kernels.class_targets(LABELS, num_classes=n),
  "committee_dmft": lambda n: kernels.committee_dmft(KEY, kappa=2.0, neurons=n, steps=n, samples=32 * n, replicates=n),
  "committee_spectrum": lambda n: kernels.committee_spectrum(n),
  "convolution": lambda n: kernels.convolution(kernels.pixel_state(IMAGES), size=n + 1, stride=n),
  "deep_nngp": lambda n: kernels.deep_nngp(POSITIVE, depth=n, dual=optimal),
  "deep_ntk": lambda n: kernels.deep_ntk(POSITIVE, depth=n, dual=optimal),
  "dirichlet_sphere": lambda n: kernels.dirichlet_sphere(KEY, n, concentrations=[[1.0, 2.0], [2.0, 1.0]]),
  "early_stopping_step": lambda n: kernels.early_stopping_step(POSITIVE, noise=1.0, learning_rate=0.1, longest=n),
  "eigenvector_labels": lambda n: kernels.eigenvector_labels(jnp.eye(3), index=n),
  "inverted_inductive_bias": lambda n: kernels.inverted_inductive_bias(LAW, 0.1, points=8 * n),
  "fully_connected": lambda n: kernels.fully_connected(X, depth=n, dual=relu),
  "fully_connected_standard": lambda n: kernels.fully_connected_standard(X, widths=(n, n), dual=relu),
  "image_patches": lambda n: kernels.image_patches(IMAGES, size=n + 1, stride=n),
  "koenigs": lambda n: kernels.koenigs(POSITIVE, optimal, iterations=n),
  "log_deep_kernels": lambda n: kernels.log_deep_kernels(-POSITIVE, depth=n, coefficients=[0.0, 1.0, 1.0]),
  "monomial_dual": lambda n: kernels.monomial_dual(degree=n).covariance(POSITIVE),
  "numerical_dual": lambda n: kernels.numerical_dual(jnp.tanh, points=4 * n, terms=n).covariance(POSITIVE),
  "optimal_bag_size": lambda n: kernels.optimal_bag_size(0.3, rho=1.0, clip=2.0, epsilon=1.0, largest=n),
  "optimal_dual": lambda n: kernels.optimal_dual(n).covariance(POSITIVE),
  "saddlepoint_inductive_bias": lambda n: kernels.saddlepoint_inductive_bias(LAW, 0.1, iterations=n),
  "sample_hypothesis_errors": lambda n: kernels.sample_hypothesis_errors(KEY, LAW, samples=n),
  "self_distilled_regression": lambda n: kernels.self_distilled_regression(
    jnp.eye(4), X, ridge=0.5, target_weight=0.5, rounds=n
  ),
  "singular_vote": lambda n: kernels.singular_vote(POSITIVE[None], POSITIVE, optimal, iterations=n),
  "tiled_gram": lambda n: kernels.tiled_gram(lambda x, y: x @ (x if y is None else y).T, X, tile=n),
  "taylor_expand": lambda n: kernels.taylor_expand(lambda w: w**3, X, degree=n)(2 * X),
  "wide_average_pool": lambda n: kernels.wide_average_pool(size=n).apply((), IMAGES),
  "wide_convolution": lambda n: kernels.wide_convolution(n, size=n, stride=n).init(KEY, IMAGES.shape)[0],
  "wide_dense": lambda n: kernels.wide_dense(n).init(KEY, X.shape)[0],
  "empirical_ntk": lambda n: kernels.empirical_ntk(lambda w, x: x @ w, jnp.ones(3), X, tile=n),
  "bootstrap_inductive_bias": lambda n: metrics.bootstrap_inductive_bias(KEY, POSITIVE, 0.5, resamples=n, steps=n),
  "conv_singular_values": lambda n: metrics.conv_singular_values(jnp.ones((3, 3, 2, 2)), size=n, stride=n),
  "empty_stats": lambda n: metrics.empty_stats(n, n),
  "fit_scaled_chi2": lambda n: metrics.fit_scaled_chi2(POSITIVE, steps=n),
  "gaussian_stats": lambda n: metrics.gaussian_stats(X, LABELS, num_classes=n),
  "logistic_probe": lambda n: metrics.logistic_probe(X, LABELS, num_classes=n, max_iterations=n),
  "orthogonality_spectral_constant": lambda n: metrics.orthogonality_spectral_constant(
    outputs=n, inputs=n, kernel_size=n + 1, stride=n, dimensions=n
  ),
  "probe_sample_curve": lambda n: metrics.probe_sample_curve(
    KEY,
    X,
    LABELS,
    X,
    LABELS,
    sizes=[2, 3],
    heads={"zero": lambda *_: metrics.LinearProbe(X[:2], X[:2, 0])},
    num_classes=n,
    repeats=n,
  ),
  "sample_network_errors": lambda n: metrics.sample_network_errors(KEY, jax.random.uniform, samples=n),
  "top_k_accuracy": lambda n: metrics.top_k_accuracy(X, LABELS, k=n),
  "weight_moments": lambda n: metrics.weight_moments(X, ddof=n),
  "quant_resnet": lambda n: jnp.zeros(
    models.quant_resnet(9 * n, quantization.Precision(4, 4, 8, 8), classes=n).classes
  ),
  "gathered_conv": lambda n: pruning.gathered_conv(
    IMAGES[0], jnp.ones((3, 3, 2, 2)), output_mask=jnp.ones(2), input_mask=jnp.ones(2), strides=n
  ),
  "mass_mask": lambda n: pruning.mass_mask(X, mass=0.5, min_keep=n),
  "activation_bound_init": lambda n: quantization.activation_bound_init(n),
  "fake_quant_weight": lambda n: quantization.fake_quant_weight(X, bits=n),
  "group_norms": lambda n: regularizers.group_norms(IMAGES, kind="neuron", output_axis=n),
  "orthogonal_conv_penalty": lambda n: regularizers.orthogonal_conv_penalty(jnp.ones((3, 3, 2, 2)), stride=n),
  "orthogonal_conv_exists": lambda n: float(
    regularizers.orthogonal_conv_exists(outputs=n, inputs=n, kernel_size=n + 1, stride=n, dimensions=n)
  ),
  "fishr_init": lambda n: regularizers.fishr_init({"kernel": X}, environments=n),
  "rademacher_probes": lambda n: regularizers.rademacher_probes(KEY, {"kernel": X}, samples=n, environments=n),
  "prox_wgsef": lambda n: regularizers.prox_wgsef(POSITIVE, GROUPS, k=n, lam=0.1, num_groups=n),
  "sum_groups": lambda n: regularizers.sum_groups(POSITIVE, GROUPS, num_groups=n),
  "lanczos_decomposition": lambda n: solvers.lanczos_decomposition(lambda v: 2 * v, POSITIVE, steps=n),
  "ritz_right_hand_sides": lambda n: solvers.ritz_right_hand_sides(KEY, POSITIVE, jnp.eye(3), count=n, extra=n),
  "sample_in_box": lambda n: solvers.sample_in_box(
    KEY, lambda key, count: jax.random.normal(key, (count, 2)), n, low=-1.0, high=1.0
  ),
  "simulated_visits": lambda n: solvers.simulated_visits(MDP, POLICY, KEY, trajectories=n),
  "sinkhorn_plan": lambda n: solvers.sinkhorn_plan(COST, MASS, COLUMNS, epsilon=0.1, steps=n),
  "solution_derivative": lambda n: solvers.solution_derivative(lambda t, y, args: -y, 0.0, POSITIVE, order=n),
  "solve_conjugate_directions": lambda n: solvers.solve_conjugate_directions(
    lambda v: 2 * v, POSITIVE, lambda r: r, steps=n, orthogonalize=n
  ),
  "solve_sparse_transport": lambda n: solvers.solve_sparse_transport(COST, MASS, COLUMNS, k=n, steps=2 * n).value,
  "repair_sparse_transport": lambda n: (
    solvers.repair_sparse_transport(COST, MASS, COLUMNS, jnp.zeros(3), k=n, extra=n // 2, steps=2 * n).value
  ),
  "sparse_simplex_projection": lambda n: solvers.sparse_simplex_projection(POSITIVE, k=n),
}


@pytest.mark.parametrize("case", CASES)
def test_numpy_integers_do_as_well(case):
  forms = [
    jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), trace(case, kind(2))) for kind in (int, np.int32, np.int64)
  ]
  assert forms[0] == forms[1] == forms[2]


def trace(case, number):
  return jax.eval_shape(lambda: CASES[case](number))


def test_static_integers():
  for value in (3, np.int64(3), np.uint8(3), np.array(3), jnp.int32(3)):
    assert type(static_integer("size", value, low=1)) is int and static_integer("size", value, low=1) == 3
  for value in (True, np.True_, 3.0, np.float32(3), "3", None, (3,), 0, -1):
    with pytest.raises(ValueError, match="size must be a positive integer, got"):
      static_integer("size", value, low=1)
  with pytest.raises(ValueError, match="size must be an integer in .2, 4., got 5"):
    static_integer("size", 5, low=2, high=4)
  with pytest.raises(ValueError, match="steps must be a non-negative integer"):
    jax.jit(lambda steps: static_integer("steps", steps, low=0))(3)
  assert jax.jit(lambda n: jnp.asarray(is_integer(n)))(3).item() is False
