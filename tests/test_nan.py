"""NaN comes out as NaN, never as a number that looks good; under a mask it reaches neither value nor gradient.

`test_conformance` tests the first for all rows of the table; here stand the cases with results of their own.
"""

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxreg import kernels, metrics, pruning, regularizers, solvers
from jaxreg.metrics.norms import safe_norm, safe_sqrt, scaled

NAN = jnp.nan
MATRIX = jnp.eye(4).at[1, 2].set(NAN)
GROUPS = np.array([0, 0, 1, 1])
ALL_NAN = {
  "defect norm": lambda: regularizers.orthogonal_conv_defect_norm(jnp.full((3, 3, 2, 2), NAN)),
  "isometry bounds": lambda: metrics.isometry_bounds(jnp.array([NAN]), spectral_constant=4.0),
  "kernel alignment": lambda: metrics.kernel_alignment(MATRIX, jnp.ones(4)),
  "kernel alignment, targets": lambda: metrics.kernel_alignment(jnp.eye(4), jnp.array([1.0, NAN, 1.0, 1.0])),
  "weight moments": lambda: metrics.weight_moments(MATRIX),
  "weight stats": lambda: metrics.weight_stats({"kernel": MATRIX}),
  "kurtosis": lambda: regularizers.kurtosis_penalty(MATRIX),
  "skewness": lambda: regularizers.skewness_penalty(MATRIX),
  "target weight": lambda: kernels.optimal_target_weight(MATRIX, jnp.zeros((4, 4)), jnp.ones((4, 4))),
  "unsquared norm": lambda: regularizers.unsquared_norm_penalty({"w": MATRIX}),
  "group lasso": lambda: regularizers.group_lasso(MATRIX[1], GROUPS),
  "envelope": lambda: regularizers.wgsef(MATRIX[1], GROUPS, k=1),
  "conjugate": lambda: regularizers.wgsef_conjugate(MATRIX[1], GROUPS, k=1),
  "relative motion": lambda: metrics.relative_motion({"w": MATRIX}, {"w": jnp.eye(4)}),
  "cosine": lambda: metrics.nlm_alignment({"w": MATRIX}, {"w": jnp.eye(4)}),
  "tensor norm": lambda: metrics.tensor_norms({"w": MATRIX}),
  "collapse": lambda: metrics.softmax_collapse_fraction(MATRIX),
  "zero losses": lambda: metrics.zero_loss_fraction(jnp.array([0.0, NAN])),
  "fixed point": lambda: kernels.aggregate_fixed_point(jnp.float32(NAN), 2, jnp.float32(0)),
  "risk": lambda: kernels.aggregate_risk(0.2, 2, jnp.float32(NAN)),
  "hilbert vote": lambda: kernels.hilbert_vote(jnp.array([[0.9, NAN]]), jnp.array([1.0, -1.0]), exponent=2.0),
  "nearest neighbour": lambda: kernels.nearest_neighbor_vote(jnp.array([[0.9, NAN]]), jnp.array([1.0, -1.0])),
  "singular vote": lambda: kernels.singular_vote(
    jnp.array([[0.9, NAN]]), jnp.array([1.0, -1.0]), kernels.optimal_dual(2)
  ),
  "conjugate directions": lambda: (
    solvers.solve_conjugate_directions(lambda v: 2 * v, jnp.array([1.0, NAN]), lambda r: r, steps=2).x
  ),
  "gradient flow's ridge": lambda: kernels.gradient_flow_coefficients(
    kernels.kernel_eigensystem(jnp.eye(2)), jnp.ones(2), time=1.0, ridge=jnp.float32(NAN)
  ),
  "gradient flow's time": lambda: kernels.gradient_flow_coefficients(
    kernels.kernel_eigensystem(jnp.eye(2)), jnp.ones(2), time=jnp.float32(NAN)
  ),
  "variance of a rectifier": lambda: kernels.relu_dual().covariance(0.5, jnp.float32(NAN), 1.0),
  "slope of a rectifier": lambda: kernels.relu_dual().derivative(0.5, jnp.float32(NAN), 1.0),
  "Sinkhorn's mass": lambda: solvers.sinkhorn_potentials(
    jnp.eye(2), jnp.array([NAN, 0.5]), jnp.full(2, 0.5), epsilon=0.1, steps=2
  )[1],
}


@pytest.mark.parametrize("case", ALL_NAN)
def test_every_result_is_nan(case):
  for leaf in jax.tree.leaves(jax.jit(ALL_NAN[case])()):
    assert np.isnan(leaf).all()


def test_group_norms_are_nan_where_the_group_has_one():
  norms = metrics_of_groups(jnp.array([[3.0, NAN], [4.0, 1.0]]))
  np.testing.assert_array_equal(norms, [5, NAN])


def metrics_of_groups(kernel):
  return regularizers.group_norms(kernel, kind="neuron")


def test_proximal_steps_of_a_group_with_nan():
  values, groups = jnp.array([1.0, NAN, 3.0, 4.0]), jnp.array([0, 0, 1, 1])
  np.testing.assert_array_equal(
    regularizers.prox_group_lasso(values, groups, lam=2.5), jnp.array([NAN, NAN, 1.5, 2.0])
  )  # fmt: skip
  assert np.isnan(regularizers.prox_wgsef(values, groups, k=1, lam=0.1)).all()


def test_classes_and_times_of_nan_are_no_classes_and_never():
  scores = jnp.array([[0.0, 1.0], [NAN, 0.0]])
  assert kernels.kernel_classify(scores, jnp.eye(2)).tolist() == [1, -1]
  assert kernels.kernel_classify(scores, jnp.ones(2)).tolist() == [1, 0]
  fractions = metrics.memorization_fractions(scores, jnp.array([0, 0]), jnp.array([1, 1]))
  assert [float(x) for x in fractions] == [0.5, 0, 0.5]
  assert int(kernels.early_stopping_step(jnp.array([NAN, 0.1]), noise=1.0, learning_rate=0.1, longest=99)) == 0
  gap = metrics.grokking_gap(jnp.arange(3), jnp.array([1.0, NAN, NAN]), jnp.array([1.0, NAN, NAN]))
  assert [float(x) for x in gap[:2]] == [np.inf, np.inf] and np.isnan(gap.gap)


def test_fronts_of_nan():
  costs, values = jnp.array([1.0, NAN, 3.0]), jnp.array([0.5, 0.9, NAN])
  assert metrics.pareto_front(costs, values).tolist() == [True, False, False]
  budgets = jnp.array([2.0, 4.0])
  assert np.isnan(metrics.best_within_cost(costs, values, budgets)).all()
  np.testing.assert_array_equal(metrics.best_within_cost(jnp.array([1.0, 3.0]), values[::2], budgets), [0.5, NAN])


def test_masks_of_nan_activations_are_nan():
  maps = jnp.array([[5.0, 1.0, 3.0, 1.0], [5.0, NAN, 3.0, 1.0]])
  for mask in (pruning.mass_mask(maps, mass=0.8), pruning.uniform_mask(maps, prune_ratio=0.5)):
    assert mask[0].tolist() == [1, 0, 1, 0] and np.isnan(mask[1]).all()
  accuracy = pruning.mask_accuracy([maps], [jnp.ones((2, 4))])
  np.testing.assert_array_equal(accuracy, [1, NAN])


def test_the_cost_of_a_solve_that_diverges_is_nan():
  field = lambda t, y, args: jnp.where(t > 0.5, jnp.nan, -y)
  _, cost = solvers.solve_with_cost(
    diffrax.ODETerm(field), diffrax.Tsit5(), 0.0, 1.0, 0.25, jnp.ones(2), rtol=1e-3, atol=1e-6
  )
  assert np.isnan(cost.error_sum) and np.isnan(cost.stiffness_sum)


FEATURES = jnp.array([[0.0, 1.0], [2.0, 0.5], [1.0, 3.0], [0.5, 0.25]])
LABELS, WHERE = jnp.array([0, 0, 1, 0]), jnp.array([True, True, True, False])
MASKED = {
  "gaussian_stats": lambda x: metrics.gaussian_stats(x, LABELS, num_classes=2, where=WHERE),
  "minmax_scaling": lambda x: metrics.minmax_scaling(x, where=WHERE),
  "ftrl_entropy": lambda x: solvers.ftrl_entropy(x, learning_rate=0.5, axis=0, where=WHERE[:, None]),
  "ftrl_log_barrier": lambda x: solvers.ftrl_log_barrier(x, learning_rate=0.5, axis=0, where=WHERE[:, None]),
  "poisson_matvec": lambda x: solvers.poisson_matvec(x, mask=jnp.broadcast_to(WHERE[:, None], x.shape)),
  "gathered_conv, channels": lambda x: pruning.gathered_conv(
    x.T[None], jnp.ones((1, 1, 4, 2)), output_mask=jnp.ones(2), input_mask=WHERE, fractions=(0.5, 1.0)
  ),
  "gathered_conv, kernel": lambda x: pruning.gathered_conv(
    jnp.ones((1, 2, 2)), x.T[None, None], output_mask=WHERE, input_mask=jnp.ones(2), fractions=(0.5, 1.0)
  ),
  "gathered_conv, kernel's inputs": lambda x: pruning.gathered_conv(
    jnp.ones((1, 2, 4)), x[None, None], output_mask=jnp.ones(2), input_mask=WHERE, fractions=(0.5, 1.0)
  ),
}


@pytest.mark.parametrize("spoil", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("case", MASKED)
def test_nothing_comes_through_a_mask(case, spoil):
  total = lambda x: sum(jnp.sum(jnp.sin(leaf)) for leaf in jax.tree.leaves(MASKED[case](x)))
  program = jax.jit(jax.value_and_grad(lambda x: total(x)))
  value, gradient = program(FEATURES)
  with jax.debug_nans(False):
    spoiled, slope = program(FEATURES.at[3].set(spoil))
  np.testing.assert_allclose(spoiled, value, rtol=1e-6)
  np.testing.assert_allclose(slope, gradient, rtol=1e-6, atol=1e-7)


def test_masked_actions_do_not_reach_the_gradient_in_the_learning_rate():
  losses, where = jnp.array([1.0, 2.0, NAN]), jnp.array([True, True, False])
  for leader in (solvers.ftrl_entropy, solvers.ftrl_log_barrier):
    first = lambda rate, losses, where: leader(losses, learning_rate=rate, where=where)[0]
    slope = jax.grad(first)(0.5, losses, where)
    np.testing.assert_allclose(slope, jax.grad(first)(0.5, losses[:2], where[:2]), rtol=1e-6)


def test_masked_examples_of_a_logistic_probe_may_be_nan():
  fit = lambda x: metrics.logistic_probe(x, LABELS, num_classes=2, where=WHERE)
  for a, b in zip(fit(FEATURES.at[3].set(NAN)), fit(FEATURES)):
    np.testing.assert_allclose(a, b, rtol=1e-6)


def test_masked_predictions_may_be_nan():
  logits, labels = jnp.eye(3).at[2].set(NAN), jnp.array([0, 0, 2])
  where = jnp.array([True, True, False])
  assert float(metrics.top_k_accuracy(logits, labels, where=where)) == 0.5
  assert float(metrics.balanced_top_k_accuracy(logits, labels, where=where)) == 0.5
  scores = jnp.array([0.9, 0.1, 0.5, NAN])
  assert float(metrics.area_under_roc(scores, jnp.array([1, 0, 0, 1]), where=jnp.arange(4) < 3)) == 1


def test_safe_square_roots_and_norms():
  np.testing.assert_array_equal(safe_sqrt(jnp.array([4.0, 0.0, -1e-7, NAN])), [2, 0, 0, NAN])
  np.testing.assert_array_equal(jax.vmap(jax.grad(safe_sqrt))(jnp.array([4.0, 0.0, -1e-7])), [0.25, 0, 0])
  for size in (1e-30, 1.0, 1e30):
    value, gradient = jax.value_and_grad(safe_norm)(size * jnp.array([3.0, -4.0]))
    np.testing.assert_allclose(value, 5 * size, rtol=1e-6)
    np.testing.assert_allclose(gradient, [0.6, -0.8], rtol=1e-6)
  assert jax.grad(safe_norm)(jnp.zeros(2)).tolist() == [0, 0]
  assert scaled(jnp.array([2.0, -4.0], jnp.bfloat16))[0].tolist() == [0.5, -1]
