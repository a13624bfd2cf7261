"""The table of public ingredients: tests/test_conformance.py runs all of its tests over every row.

A new ingredient joins by one line, with an adapter for its kind. Hyperparameters that may be traced are given as ranges
`(low, high)`, along which a trial axis is laid; whatever is not a tuple is static. In `ROWS`:

    loss(symmetric.brier_loss),                                     # loss(logits, labels)
    loss(comp_sum.comp_sum_loss, tau=(0.5, 2.5)),
    loss(label_dro.ldr_kl_loss, temperature=(0.5, 2.0), normalize="l1_mean"),
    scores(stablemax),                                 # function(logits) -> one value per class
    penalty(group_sparsity.wgsef, GROUPS, k=(1, 3)),             # penalty(values, groups)

in `TRANSFORMS`, with the place in the chain:

    transform(penalize, lambda base, weight: optax.chain(penalize(ridge, weight), base), weight=(0, 1)),

An ingredient that fits no adapter is a `row` with its own arguments. A public name that cannot be a row (it reads
values, or only builds a state) goes into `EXEMPT` with the reason.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxreg.layers import weight_compander
from jaxreg.losses import (
  active_passive,
  adversarial,
  aggregate,
  binary_margin,
  calibrated_ensemble,
  chunked,
  comp_sum,
  distillation,
  early_learning,
  h_consistency,
  hinge,
  label_dro,
  progressive_guidance,
  scaled_residual,
  score_matching,
  spherical,
  symmetric,
)
from jaxreg.losses.stablemax import (
  log_stablemax,
  stablemax,
  stablemax_cross_entropy,
  stablemax_cross_entropy_with_soft_labels,
)
from jaxreg.metrics import (
  classification,
  conv_spectrum,
  gaussian_probe,
  grokking,
  inductive_bias,
  lazy_rich,
  pareto,
  sample_complexity,
  weights,
)
from jaxreg.pruning import dynamic_pruning
from jaxreg.quantization import bounds, elastic_quantizer, fake_quant, integer, search, straight_through
from jaxreg.regularizers import group_sparsity, groups, orthogonal_conv, unsquared_norm, weight_distribution
from jaxreg.solvers import (
  adaptive_sampling,
  follow_the_regularized_leader,
  linear_q_estimation,
  poisson,
  projections,
  sparse_transport,
)
from jaxreg.transforms import half_space_projection, orthogonal, orthogonalize_gradients, penalize, proximal
from jaxreg.transforms.weight_compander import compand_weights

TRIALS = 8
EXAMPLES, CLASSES, TABLE = 16, 5, 24
EXTREME = 1e4

# Public names, or whole modules, of the rooms that are not rows, and why.
EXEMPT = {
  "losses.binary_margin.MARGIN_LOSSES": "functions by name, each of them a row",
  "losses.chunked.OutputLayer": "argument of the chunked losses, tested with them",
  "losses.early_learning.ELRState": "state, carried by elr_loss",
  "losses.early_learning.elr_init": "builds the state that elr_loss's row starts from",
  "losses.example_table": "the table that elr_loss and aldr_kl_loss carry through every test",
  "losses.label_dro.ALDRState": "state, carried by aldr_kl_loss",
  "losses.label_dro.NORMALIZATIONS": "names, each of them in a row of ldr_kl_loss",
  "losses.label_dro.aldr_kl_init": "builds the state that aldr_kl_loss's row starts from",
  "losses.spherical.SphericalStatistics": "what the rows of functions of statistics build",
  "losses.spherical.spherical_statistics": "three sums; the tests of the losses compare it with the dense forms",
  "losses.softmax_family": "what the softmax losses share and carry through every test",
  "metrics.classification.MemorizationFractions": "result of memorization_fractions",
  "metrics.conv_spectrum.OrthogonalityError": "result of orthogonality_error",
  "metrics.conv_spectrum.orthogonality_spectral_constant": "of Python integers",
  "metrics.inductive_bias.ScaledChi2": "result of fit_scaled_chi2",
  "metrics.inductive_bias.bootstrap_inductive_bias": "fits",
  "metrics.inductive_bias.encoded_inductive_bias": "fits",
  "metrics.inductive_bias.fit_scaled_chi2": "an iterative fit with a flat optimum: mapping moves it more than rounding",
  "metrics.inductive_bias.required_inductive_bias": "fits",
  "metrics.inductive_bias.sample_network_errors": "maps a function of the caller",
  "metrics.lazy_rich.GrokkingGap": "result of grokking_gap",
  "quantization.bounds.BOUND_RULES": "functions by name",
  "quantization.bounds.BoundState": "state, carried by activation_bound_update",
  "quantization.bounds.activation_bound_init": "builds a state from a Python integer",
  "quantization.bounds.mean_of_max_bound": "carried by freeze_bounds",
  "quantization.bounds.mean_plus_deviation_bound": "a formula of a state, compared with NumPy's in its tests",
  "quantization.bounds.scaled_mean_magnitude_bound": "a formula of a state, compared with NumPy's in its tests",
  "quantization.bounds.scaled_root_mean_square_bound": "a formula of a state, compared with NumPy's in its tests",
  "metrics.gaussian_probe": "rows follow",
  "metrics.linear_probe": "rows follow",
  "metrics.network_cost": "exact, of Python integers",
  "metrics.noncentral_chi2": "rows follow",
  "metrics.weights.he_deviation": "of Python integers",
  "solvers.factored_output": "rows follow",
  "quantization.elastic_quantizer.ELASTIC_BITS": "numbers",
  "quantization.elastic.ElasticConfig": "what the layers are told",
  "quantization.elastic.ElasticConv": "a module around lsq_quantize",
  "quantization.elastic.ElasticDense": "a module around lsq_quantize",
  "quantization.elastic_config.ElasticLayer": "result of elastic_layers",
  "quantization.elastic_quantizer.ElasticQuantizer": "a module around lsq_quantize",
  "quantization.elastic_quantizer.LsqTable": "result of lsq_calibrate",
  "quantization.elastic.calibrate_elastic": "of a module",
  "quantization.elastic_config.config_variables": "renames",
  "quantization.elastic_config.elastic_layers": "of a module's shapes",
  "quantization.elastic_quantizer.lsq_calibrate": "a search whose ties rounding decides; has its golden test",
  "quantization.elastic.recalibrate_batch_norm": "of a module",
  "quantization.elastic_config.sample_config": "of a key and integers",
  "quantization.elastic_config.sample_forms": "of a key and integers",
  "quantization.elastic_config.uniform_config": "of integers",
  "quantization.fake_quant.Quantized": "result of quantize_weight and quantize_activation",
  "quantization.fake_quant.quantize_activation": "carried by fake_quant_activation",
  "quantization.fake_quant.quantize_weight": "carried by fake_quant_weight",
  "quantization.integer.IntegerConv": "a module around integer_conv",
  "quantization.integer.IntegerDense": "a module around integer_dense",
  "quantization.integer.aqt_dot_general": "a module of AQT",
  "quantization.integer.integer_dot": "carried by integer_dense",
  "quantization.layers": "modules, tested with their networks",
  "quantization.search.AccuracyPredictor": "a module",
  "quantization.search.encode_config": "of integers",
  "quantization.search.evolve_bits": "maps a function of the caller",
  "regularizers.groups.group_ids": "reads shapes only and returns NumPy ids; group_norms carries it",
  "regularizers.groups.resolve_groups": "reads shapes only; group_norms carries it",
  "regularizers.orthogonal_conv.orthogonal_conv_exists": "of Python integers",
  "regularizers.orthogonal_conv.orthogonal_conv_offset": "of Python integers",
  "regularizers.orthogonal_conv.orthogonal_conv_taps": "of Python integers",
  "metrics.weights.WeightMoments": "result of weight_moments",
  "metrics.weights.WeightStats": "result of weight_stats",
  "solvers.adaptive_sampling.Derivatives": "result of tanh_network_derivatives",
  "solvers.adaptive_sampling.OptimalAdversary": "result of optimal_adversary_1d",
  "solvers.adaptive_sampling.aas_pinn_loss": "takes functions of the caller",
  "solvers.adaptive_sampling.laplacian": "takes a function of the caller",
  "solvers.adaptive_sampling.log_density_and_score": "takes a function of the caller",
  "solvers.adaptive_sampling.normalize_squared_residuals": "divides by a mean, which extreme densities make extreme",
  "solvers.adaptive_sampling.optimal_adversary_1d": "a closed form for tests, in the golden test",
  "solvers.adaptive_sampling.sample_in_box": "takes a function of the caller",
  "solvers.adaptive_sampling.tanh_network_derivatives": "takes a network's parameters; has its own test",
  "solvers.adversarial_mdp": "simulations, and sums over a few layers that the golden file carries",
  "solvers.conjugate_directions": "iterates functions of the caller",
  "solvers.lanczos": "vectors up to sign, of an iteration on a function of the caller",
  "solvers.linear_q_estimation.dilated_bonus": "a sum over layers, in the golden test",
  "solvers.linear_q_estimation.linear_q_estimate": "magnitude_reduced_q_estimate carries it",
  "solvers.linear_q_estimation.matrix_geometric_resampling": "an estimate whose variance no rounding error survives",
  "solvers.linear_q_estimation.quadratic_bonus": "a quadratic form, in the golden test",
  "solvers.linear_q_estimation.ridge_inverse_covariance": "an inverse, of extreme features an extreme one",
  "solvers.peak_equations": "functions of functions of the caller",
  "solvers.self_tuning": "a training loop, and transformations that the golden file carries",
  "solvers.solver_cost": "whole solves and what they return",
  "solvers.sparse_transport.SparseTransportResult": "result of solve_sparse_transport",
  "solvers.sparse_transport.solve_sparse_transport": "an iterative maximisation, compared with exact optima",
  "solvers.sparse_transport.solve_sparse_transport_dual": "an iterative maximisation, compared with exact optima",
  "solvers.taylor_regularization": "takes a function of the caller",
  "transforms.penalize.PenalizeState": "state, carried by penalize",
  "transforms.proximal.ProximalState": "state, carried by proximal",
  "transforms.weight_compander.CompandWeightsState": "state, carried by compand_weights",
}


class Row(NamedTuple):
  """One ingredient: how it is called and with what, and which of the general promises it makes."""

  name: str  # dotted, below jaxreg
  label: str  # the name with its static options, for the test's id
  call: Callable  # call(*arguments, **traced hyperparameters), and axis_name=... when there is a state
  arguments: Callable  # rng -> arguments in float64; the gradient is the first one's; NamedTuples are states
  hyperparameters: dict[str, tuple]  # ranges of those that may be traced
  extreme: Callable  # arguments -> arguments with extreme values
  bad: tuple  # (argument named by the message, arguments -> bad arguments)
  examples: str  # "any": values per example for any leading shape; "batch": for one axis; "reduced"; "none"
  differentiable: bool  # whether the gradient is that of `call`, or of `surrogate` if there is one
  wide: bool  # whether results are float32 (or not floating) rather than in the dtype of the arguments
  surrogate: Callable | None  # surrogate(x, results, *other arguments, **hyperparameters): what is differentiated
  function: Any  # the public object itself


def row(
  function,
  arguments,
  *,
  call=None,
  extreme=None,
  bad=(),
  examples="none",
  differentiable=True,
  wide=False,
  surrogate=None,
  options=None,
):
  """A row with arguments of its own; the other adapters all end here."""
  options = options or {}
  ranges = {name: value for name, value in options.items() if isinstance(value, tuple)}
  static = {name: value for name, value in options.items() if not isinstance(value, tuple)}
  name = f"{function.__module__.removeprefix('jaxreg.')}.{function.__name__}"
  label = name.split(".", 1)[1] + "".join(f"-{value}" for value in static.values())
  call = functools.partial(call or function, **static)
  extreme = extreme or (lambda values, *rest: (jax.tree.map(_extremes, values), *rest))
  return Row(
    name, label, call, arguments, ranges, extreme, bad, examples, differentiable, wide, surrogate, function
  )  # fmt: skip


def loss(function, **options):
  """`function(logits, labels, **options)`, a value per example."""
  return row(
    function, _classification, extreme=_extreme_logits, bad=_BAD_LABELS, examples="any", options=options
  )  # fmt: skip


def scores(function, **options):
  """`function(logits, **options)`, a value per class."""
  return row(
    function, lambda rng: (_logits(rng),), extreme=_extreme_logits, bad=_BAD_LOGITS, examples="any", options=options
  )  # fmt: skip


def stateful_loss(function, init, surrogate, **options):
  """`function(logits, labels, ids, state=state, **options)`, values per example and the new state."""

  def call(logits, labels, ids, state, **hyperparameters):
    return function(logits, labels, ids, state=state, **hyperparameters)

  def arguments(rng):
    return *_classification(rng), _ids(rng), init(rng)

  bad = (
    *_BAD_LABELS,
    ("ids", lambda z, y, ids, s: (z, y, ids[1:], s)),
    ("ids", lambda z, y, ids, s: (z, y, ids * 1.0, s)),
  )
  return row(
    function,
    arguments,
    call=call,
    extreme=_extreme_logits,
    bad=bad,
    examples="any",
    surrogate=surrogate,
    options=options,
  )


def penalty(function, groups, *, bad=None, **options):
  """`function(values, groups, **options)` of the kernel and bias of a layer."""
  keywords = {name: options.pop(name) for name in tuple(options) if name in ("differentiable", "wide")}
  call = lambda values, **hyperparameters: function(values, groups, **hyperparameters)
  return row(function, _layer, call=call, bad=_BAD_VALUES if bad is None else bad, options=options, **keywords)


def metric(function, *, arguments=None, call=None, bad=None, **options):
  """`function(logits, labels, **options)`, a mean over the examples, of which no gradient is promised."""
  return row(
    function,
    arguments or _classification,
    call=call,
    extreme=_extreme_logits,
    bad=_BAD_LABELS if bad is None else bad,
    examples="reduced",
    differentiable=False,
    wide=True,
    options=options,
  )


class Transform(NamedTuple):
  """A transformation: `build(base, **hyperparameters)` puts it where it belongs beside the optimizer `base`."""

  name: str
  build: Callable
  hyperparameters: dict[str, tuple]
  function: Any


def transform(function, build, **ranges):
  """A row of `TRANSFORMS`."""
  name = f"{function.__module__.removeprefix('jaxreg.')}.{function.__name__}"
  return Transform(name, build, ranges, function)


def trial(ranges: dict[str, tuple], index: int) -> dict:
  """The hyperparameters of one of the trials, evenly spread over the ranges; of integers for ranges of integers."""
  share = index / (TRIALS - 1)
  values = {name: low + share * (high - low) for name, (low, high) in ranges.items()}
  integer = {name for name, (low, _) in ranges.items() if isinstance(low, int)}
  return {name: np.int32(round(v)) if name in integer else np.float64(v) for name, v in values.items()}


def _logits(rng):
  return 2 * rng.normal(size=(EXAMPLES, CLASSES))


def _classification(rng):
  return _logits(rng), rng.integers(0, CLASSES, EXAMPLES).astype(np.int32)


def _probabilities(rng):
  return rng.dirichlet(np.ones(CLASSES), EXAMPLES)


def _ids(rng):
  return rng.permutation(TABLE)[:EXAMPLES].astype(np.int32)


def _layer(rng):
  return ({"kernel": rng.normal(size=(3, 4)), "bias": rng.normal(size=4)},)


def _kernel_task(rng):
  factor = rng.normal(size=(6, 6))
  return factor @ factor.T + np.eye(6), rng.normal(size=6)


def _extremes(leaf):
  """Large, small and zero entries; the first group of every kind is zero."""
  extreme = EXTREME * np.resize([1.0, -1.0, 0.0, 1e-4, -1.0], np.shape(leaf))
  return extreme * (np.arange(extreme.shape[-1]) > 0) if extreme.ndim else extreme


def _extreme_logits(logits, *rest):
  """All equal, one class far above, far below, ties, and mixtures; the labels are among all of them."""
  patterns = [
    [0.0] * 5,
    [1.0] * 5,
    [-1.0] * 5,
    [1, -1, -1, -1, -1],
    [-1, 1, 1, 1, 1],
    [1, 1, 0, 0, -1],
    [1e-4, -1, 0, 1, 1],
  ]
  shifted = [np.roll(pattern, shift) for shift in range(3) for pattern in patterns]
  return EXTREME * np.resize(shifted, np.shape(logits)), *rest


_BAD_LOGITS = (("logits|differences", lambda z: (np.ones(z.shape, np.int32),)),)
_BAD_LABELS = (
  ("labels", lambda z, y, *rest: (z, y[1:], *rest)),
  ("labels", lambda z, y, *rest: (z, y[:1], *rest)),
  ("labels", lambda z, y, *rest: (z, y[:, None], *rest)),
  ("labels", lambda z, y, *rest: (z, y[0], *rest)),
  ("labels", lambda z, y, *rest: (z, y.astype(np.float32), *rest)),
  ("logits", lambda z, y, *rest: (z.astype(np.int32), y, *rest)),
)
_BAD_SAME_SHAPE = (
  ("shapes", lambda x, y, *rest: (x, y[1:], *rest)),
  ("shapes", lambda x, y, *rest: (x, y[:1], *rest)),
)
_BAD_VALUES = (
  ("values", lambda values: (jax.tree.map(lambda leaf: np.ones(leaf.shape, np.int32), values),)),
  ("groups", lambda values: (jax.tree.map(lambda leaf: leaf[None], values),)),
  ("groups", lambda values: (jax.tree.map(lambda leaf: leaf[..., 1:], values),)),
)
_BAD_KERNEL = (
  ("kernel", lambda kernel, targets: (kernel[1:], targets)),
  ("kernel", lambda kernel, targets: (kernel.astype(np.int32), targets)),
  ("targets", lambda kernel, targets: (kernel, targets[1:])),
)
GROUPS = groups.group_ids({"kernel": np.zeros((3, 4)), "bias": np.zeros(4)}, kind="neuron")


def _straight_through(x, results, **_):
  """The value, moving as the argument does from where it was, which the call returns beside it."""
  return results[0] + x - results[1]


def _clipped_straight_through(x, results, bound, *, bits, signed):
  value, start = results
  inside = (start <= bound) & (start >= (-bound if signed else 0))
  return value + jnp.where(inside, x - start, 0)


def _lsq_surrogate(x, results, scale, *, bits):
  """The identity on the grid and constant beyond, about the point of the row's second result."""
  value, point = results
  half = 2.0 ** (bits - 1)
  ratio = point / (scale + 1e-6)
  return value + jnp.where((ratio >= -half) & (ratio <= half - 1), x - point, 0)


def _elr_surrogate(logits, results, labels, ids, state, *, momentum, weight):
  """The targets, which were just updated with these logits, are constants."""
  cross_entropy = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
  targets = results[1].targets[ids]
  return cross_entropy + weight * jnp.log1p(-jnp.sum(jax.nn.softmax(logits) * targets, axis=-1))


def _elr_plus_surrogate(
  logits, results, soft_labels, teacher_logits, ids, state, *, coefficient, momentum, weight, ramp
):
  targets = results[1].targets[ids]
  targets = coefficient * targets + (1 - coefficient) * targets[jnp.arange(ids.size) ^ 1]
  cross_entropy = -jnp.sum(soft_labels * jax.nn.log_softmax(logits), axis=-1)
  return cross_entropy + ramp * weight * jnp.log1p(-jnp.sum(jax.nn.softmax(logits) * targets, axis=-1))


def _elr_plus(logits, soft_labels, teacher_logits, ids, state, **hyperparameters):
  # Partners are neighbours, so that they stay together when the batch is split over devices.
  return early_learning.elr_plus_loss(
    logits, soft_labels, teacher_logits, ids, state=state, permutation=jnp.arange(ids.size) ^ 1, **hyperparameters
  )


def _aldr_surrogate(logits, results, labels, ids, state, *, initial_temperature, alpha, margin):
  """The temperatures, which were just updated with these logits, are constants."""
  temperature = results[1].temperature[ids][:, None]
  scaled = logits / jnp.mean(jnp.abs(logits), axis=-1, keepdims=True)
  label = jax.nn.one_hot(labels, CLASSES, dtype=logits.dtype)
  differences = scaled - jnp.sum(scaled * label, axis=-1, keepdims=True) + margin * (1 - label)
  value = jnp.sum(temperature, -1) * jnp.log(jnp.mean(jnp.exp(differences / temperature), axis=-1))
  return value - alpha * np.log(CLASSES) / (2 * initial_temperature) * (temperature[:, 0] - initial_temperature) ** 2


def _ridge(params):
  return sum((jnp.sum(jnp.square(leaf.astype(jnp.float32))) for leaf in jax.tree.leaves(params)), jnp.zeros(())) / 2


def _soft_threshold(params, step):
  return jax.tree.map(lambda x: jnp.sign(x) * jnp.maximum(jnp.abs(x) - step * 0.1, 0), params)


def _tensors_as_groups(params):
  structure = jax.tree.structure(params)
  return structure.unflatten(
    np.full((1,) * jnp.ndim(leaf), index, np.int32) for index, leaf in enumerate(jax.tree.leaves(params))
  )


def _binary(rng):
  return 2 * rng.normal(size=EXAMPLES), rng.integers(0, 2, EXAMPLES).astype(np.int32)


def binary_loss(function, **options):
  """`function(logits, labels, **options)` with one logit per example."""
  return row(function, _binary, bad=_BAD_LABELS, examples="any", options=options)


def _ensloss(logits, labels, noise, **hyperparameters):
  """The values, and the derivatives, which are constants in the gradient."""
  values = calibrated_ensemble.ensloss(logits, labels, noise=noise, **hyperparameters)
  margins = (2 * labels - 1) * logits
  return values, calibrated_ensemble.ensloss_derivatives(margins, noise=noise, **hyperparameters)


def elementwise(function, name, *, extreme, **options):
  """`function(values, **options)` of values in (0, 1), with the argument's name and the ends of its domain."""
  return row(
    function,
    lambda rng: (rng.uniform(0.1, 0.9, EXAMPLES),),
    extreme=lambda values: (np.resize(extreme, values.shape),),
    bad=((name, lambda values: (np.ones(values.shape, np.int32),)),),
    examples="any",
    options=options,
  )


def attacked_loss(function, **options):
  """`function(logits, adversarial_logits, labels, **options)`, as a loss with an attack that turns logits around."""
  call = lambda logits, labels, **keywords: function(logits, -0.5 * logits, labels, **keywords)
  return row(
    function, _classification, call=call, extreme=_extreme_logits, bad=_BAD_LABELS, examples="any", options=options
  )


def taught_loss(function, **options):
  """`function(logits, teacher_logits, labels, **options)` with a teacher that prefers the later classes."""

  def call(logits, labels, *, axis=-1, **keywords):
    teacher = jax.lax.broadcasted_iota(logits.dtype, logits.shape, axis % logits.ndim)
    return function(logits, teacher, labels, axis=axis, **keywords)

  return row(
    function, _classification, call=call, extreme=_extreme_logits, bad=_BAD_LABELS, examples="any", options=options
  )


def statistics_loss(function, **options):
  """`function(statistics, **options)` of the label's logit, the logits' sum and their square sum."""

  def arguments(rng):
    logits, labels = _classification(rng)
    return logits[np.arange(EXAMPLES), labels], logits.sum(-1), np.square(logits).sum(-1)

  def extreme(target, *rest):
    logits, labels = _extreme_logits(np.zeros((EXAMPLES, CLASSES)), np.arange(EXAMPLES) % CLASSES)
    return logits[np.arange(EXAMPLES), labels], logits.sum(-1), np.square(logits).sum(-1)

  call = lambda *statistics, **options: function(spherical.SphericalStatistics(*statistics), **options)
  bad = (
    ("shapes", lambda target, total, squares: (target, total[:1], squares)),
    ("target", lambda target, total, squares: (target.astype(np.int32), total, squares)),
  )
  return row(function, arguments, call=call, extreme=extreme, bad=bad, examples="any", options=options)


def _features(rng):
  """Few enough digits that sums, and so the order of the classes, are the same in every precision."""
  labels = np.resize(np.arange(3, dtype=np.int32), EXAMPLES)
  return np.round(4 * rng.normal(size=(EXAMPLES, 2)) + 8 * np.eye(3, 2)[labels]), labels


def _sample_curve(*arrays):
  def fit(features, labels, where):
    return gaussian_probe.stats_to_linear(gaussian_probe.gaussian_stats(features, labels, num_classes=3, where=where))

  options = dict(sizes=np.array([6, 12]), heads={"bayes": fit}, num_classes=3, repeats=2)
  return sample_complexity.probe_sample_curve(jax.random.key(0), *arrays, **options)


def bag_loss(function, **options):
  """`function(predictions, targets, **options)`, a value per bag."""
  bags = lambda rng: (_logits(rng), rng.normal(size=EXAMPLES))
  return row(function, bags, extreme=_extreme_logits, bad=_BAD_BAGS, examples="any", options=options)


def bag_cross_entropy(function, **options):
  """`function(logits, targets, **options)` with the logits of two examples a bag."""
  bags = lambda rng: (2 * rng.normal(size=(EXAMPLES, 2, CLASSES)), _probabilities(rng))
  extreme = lambda z, t: (_extreme_logits(z.reshape(-1, CLASSES))[0].reshape(z.shape), t)
  return row(function, bags, extreme=extreme, bad=_BAD_BAGS, examples="any", options=options)


_BAD_BAGS = (
  ("targets", lambda x, y: (x, y[1:])),
  ("targets", lambda x, y: (x, y[:1])),
  ("targets", lambda x, y: (x, y.astype(np.int32))),
  ("predictions|logits", lambda x, y: (x.astype(np.int32), y)),
)


def conv(function, **options):
  """`function(kernel, **options)` of a convolution's kernel."""
  keywords = {name: options.pop(name) for name in tuple(options) if name in ("differentiable", "wide")}
  kernel = lambda rng: (rng.normal(size=(3, 3, 2, 4)),)
  return row(function, kernel, bad=_BAD_CONV, options=options, **keywords)


_BAD_CONV = (
  ("kernel", lambda kernel: (kernel.astype(np.int32),)),
  ("kernel", lambda kernel: (kernel[:2],)),
  ("kernel", lambda kernel: (kernel[:2, :2],)),
  ("kernel", lambda kernel: (kernel[0, 0],)),
)


_BAD_WEIGHTS = (("weights", lambda values: (jax.tree.map(lambda leaf: np.ones(leaf.shape, np.int32), values),)),)


def _coarsest(logits, labels, *, axis=-1, **keywords):
  """The loss of the coarsest form, which teaches none, with two finer ones that prefer the later classes."""
  finer = jax.lax.broadcasted_iota(logits.dtype, logits.shape, axis % logits.ndim)
  return progressive_guidance.progressive_guidance_loss(-finer, finer, logits, labels, axis=axis, **keywords)


def mask(function, **options):
  """`function(feature_maps, **options)`, zeros and ones of each filter, of which there is no gradient."""
  maps = lambda rng: (rng.normal(size=(EXAMPLES, 3, CLASSES)),)
  bad = (
    ("feature_maps", lambda maps: (maps.astype(np.int32),)),
    ("feature_maps", lambda maps: (maps[0, 0],)),
  )
  return row(function, maps, bad=bad, examples="batch", differentiable=False, options=options)


_BAD_MASKS = (
  ("logits", lambda z, g: (z.astype(np.int32), g)),
  ("targets", lambda z, g: (z, g[:1])),
  ("targets", lambda z, g: (z, g[:, 0])),
)


_BAD_DENSITIES = (
  ("shapes", lambda log_density, *rest: (log_density[1:], *rest)),
  ("log_density", lambda log_density, *rest: (log_density.astype(np.int32), *rest)),
)


def _transport(rng):
  """Potentials, costs and marginals of problems of four rows and three columns."""
  alpha, beta = (rng.normal(size=(EXAMPLES, size)) for size in (4, 3))
  marginals = [rng.dirichlet(np.full(size, 3.0), EXAMPLES) for size in (4, 3)]
  return alpha, beta, rng.uniform(size=(EXAMPLES, 4, 3)), *marginals


def transport(function, chosen):
  """`function(*arguments, k, regularization)`, a result per problem, with the chosen ones of `_transport`."""

  def arguments(rng):
    problem = _transport(rng)
    return tuple(problem[index] for index in chosen)

  bad = (
    ("row_potential", lambda alpha, *rest: (alpha[:, 1:], *rest)),
    ("row_potential", lambda alpha, *rest: (alpha[:1], *rest)),
    ("row_potential", lambda alpha, *rest: (alpha.astype(np.int32), *rest)),
    ("column_marginal", lambda *rest: (*rest[:-1], rest[-1][:, 1:])),
  )
  options = dict(k=2, regularization=(0.2, 2.0))
  return row(function, arguments, bad=bad, examples="any", options=options)


def _sparse(function, named, **options):
  """`function(values, k, **options)` along the last axis."""
  bad = ((named, lambda x: (x.astype(np.int32),)),)
  options = dict(k=2, **options)
  return row(function, lambda rng: (_logits(rng),), extreme=_extreme_logits, bad=bad, examples="any", options=options)


def _q_estimation(rng):
  """Features, an inverse covariance, one played and some visited features."""
  features = rng.normal(size=(EXAMPLES, 3)) / 2
  factor = rng.normal(size=(3, 3))
  return (
    features,
    factor @ factor.T,
    features[0],
    np.float64(0.7),
    rng.normal(size=(6, 3)) / 2,
    rng.dirichlet(np.ones(6)),
  )


ROWS = [
  row(
    scaled_residual.scaled_residual_loss,
    lambda rng: (_logits(rng), _logits(rng)),
    call=lambda q, b: scaled_residual.scaled_residual_loss(q, b, matvec=lambda v: v * jnp.arange(1, CLASSES + 1.0)),
    extreme=lambda q, b: (_extreme_logits(q)[0], b),
    bad=(*_BAD_SAME_SHAPE, ("predictions", lambda q, b: (q.astype(np.int32), b))),
    examples="batch",
  ),
  row(
    poisson.poisson_matvec,
    lambda rng: (_logits(rng),),
    bad=(("values", lambda v: (v.astype(np.int32),)),),
  ),
  *(
    row(
      function,
      lambda rng: (_logits(rng),),
      extreme=_extreme_logits,
      bad=(("cumulative_losses", lambda x: (x.astype(np.int32),)),),
      examples="any",
      options={"learning_rate": (0.1, 1.0)},
    )
    for function in (follow_the_regularized_leader.ftrl_entropy, follow_the_regularized_leader.ftrl_log_barrier)
  ),
  row(
    linear_q_estimation.magnitude_reduced_q_estimate,
    _q_estimation,
    extreme=lambda features, *rest: (_extremes(features), *rest),
    bad=(
      ("played_features", lambda f, s, p, *rest: (f, s, p[1:], *rest)),
      ("inverse_covariance", lambda f, s, *rest: (f, s[1:], *rest)),
      ("weights", lambda *arguments: (*arguments[:-1], arguments[-1][1:])),
    ),
    options={"high": (1.0, 3.0)},
  ),
  _sparse(projections.sparse_simplex_projection, "values", scale=(0.5, 2.0)),
  _sparse(sparse_transport.sparse_max, "scores", regularization=(0.2, 2.0)),
  _sparse(sparse_transport.sparse_conjugate, "scores", regularization=(0.2, 2.0)),
  transport(sparse_transport.sparse_transport_semidual, (0, 2, 3, 4)),
  transport(sparse_transport.sparse_transport_dual, (0, 1, 2, 3, 4)),
  transport(sparse_transport.sparse_transport_plan, (0, 2, 4)),
  bag_loss(aggregate.bag_squared_loss),
  bag_loss(aggregate.instance_squared_loss),
  bag_loss(aggregate.interpolated_bag_squared_loss, rho=(0.0, 2.0)),
  bag_cross_entropy(aggregate.bag_cross_entropy_loss),
  bag_cross_entropy(aggregate.instance_cross_entropy_loss),
  bag_cross_entropy(aggregate.interpolated_bag_cross_entropy_loss, rho=(0.0, 1.0)),
  row(
    aggregate.within_bag_spread,
    lambda rng: (_logits(rng),),
    extreme=_extreme_logits,
    bad=(("predictions", lambda x: (x.astype(np.int32),)),),
    examples="any",
  ),
  binary_loss(binary_margin.binary_exponential_loss),
  binary_loss(binary_margin.binary_focal_loss, gamma=(0.0, 3.0)),
  binary_loss(binary_margin.binary_hinge_loss),
  binary_loss(binary_margin.binary_logistic_loss),
  binary_loss(binary_margin.binary_squared_hinge_loss),
  row(
    calibrated_ensemble.ensloss,
    lambda rng: (*_binary(rng), rng.normal(size=EXAMPLES)),
    call=_ensloss,
    bad=_BAD_LABELS,
    surrogate=lambda z, results, labels, noise, **_: (2 * labels - 1) * z * results[1],
    options=dict(box_cox=(-1.0, 1.0), clamp=(0.5, 2.0), tail_power=(0.0, 2.0), offset=(1e-6, 0.1)),
  ),
  row(
    calibrated_ensemble.ensloss_derivatives,
    lambda rng: (_binary(rng)[0], rng.normal(size=EXAMPLES)),
    call=lambda margins, noise, **options: calibrated_ensemble.ensloss_derivatives(margins, noise=noise, **options),
    bad=(
      ("noise", lambda m, noise: (m, noise[:1])),
      ("margins", lambda m, noise: (m[:, None], noise)),
      ("margins", lambda m, noise: (m.astype(np.int32), noise)),
    ),
    differentiable=False,
    options=dict(box_cox=(-1.0, 1.0), clamp=(0.5, 2.0), tail_power=(0.0, 2.0), offset=(1e-6, 0.1)),
  ),
  row(
    calibrated_ensemble.inverse_box_cox,
    lambda rng: (rng.normal(size=EXAMPLES),),
    bad=(("values", lambda values: (values.astype(np.int32),)),),
    options=dict(box_cox=(0.0, 1.0)),
  ),
  row(
    calibrated_ensemble.is_calibrated_derivative,
    lambda rng: (_binary(rng)[0], -np.abs(rng.normal(size=EXAMPLES))),
    bad=(*_BAD_SAME_SHAPE, ("margins", lambda m, d: (m.astype(np.int32), d))),
    differentiable=False,
    wide=True,
  ),
  row(
    calibrated_ensemble.random_margin_loss_mixture,
    lambda rng: (*_binary(rng), rng.integers(0, 2**32, 2, np.uint32)),
    bad=_BAD_LABELS,
  ),
  row(
    score_matching.posterior_mean_squared_loss,
    lambda rng: (_logits(rng), _logits(rng)),
    extreme=lambda predictions, clean: (_extreme_logits(predictions)[0], -_extreme_logits(clean)[0]),
    bad=(*_BAD_SAME_SHAPE, ("predictions", lambda f, clean: (f.astype(np.int32), clean))),
    examples="any",
  ),
  row(
    score_matching.denoising_score_matching_loss,
    lambda rng: (_logits(rng), _logits(rng), _logits(rng)),
    extreme=lambda *arrays: tuple(_extreme_logits(array)[0] for array in arrays),
    bad=(
      ("shapes", lambda s, x, clean: (s, x[1:], clean)),
      ("shapes", lambda s, x, clean: (s, x, clean[:1])),
      ("scores", lambda s, x, clean: (s.astype(np.int32), x, clean)),
    ),
    examples="any",
    options=dict(signal=(0.2, 0.9), variance=(0.1, 0.9), weight=(0.5, 2.0)),
  ),
  row(
    score_matching.score_regression_weight,
    lambda rng: (rng.uniform(0.1, 0.9, EXAMPLES), rng.uniform(0.1, 0.9, EXAMPLES)),
    extreme=lambda signal, variance: (np.resize([1e-4, 1.0], signal.shape), np.resize([1.0, 0.0], variance.shape)),
    bad=(*_BAD_SAME_SHAPE, ("signal", lambda signal, variance: (signal.astype(np.int32), variance))),
    examples="any",
  ),
  taught_loss(distillation.self_distillation_squared_loss, target_weight=(0.0, 1.0)),
  loss(chunked.chunked_comp_sum_loss, chunk_size=2, tau=(0.5, 2.5)),
  loss(chunked.chunked_ldr_kl_loss, chunk_size=3, temperature=(0.3, 3.0), margin=(0.0, 0.5)),
  loss(chunked.chunked_stablemax_cross_entropy, chunk_size=2),
  loss(comp_sum.comp_sum_loss, tau=(0.5, 2.5)),
  loss(comp_sum.generalized_cross_entropy_loss, q=(0.0, 1.0)),
  row(
    comp_sum.comp_sum_loss_with_soft_labels,
    lambda rng: (_logits(rng), _probabilities(rng)),
    extreme=_extreme_logits,
    bad=_BAD_SAME_SHAPE,
    examples="any",
    options=dict(tau=(0.5, 2.5)),
  ),
  elementwise(comp_sum.comp_sum_outer, "values", extreme=(0.0, 1e4), tau=(0.5, 2.5)),
  loss(adversarial.adversarial_margin_comp_sum_loss, tau=(0.5, 2.5), rho=(0.5, 3.0)),
  elementwise(adversarial.rho_margin, "margins", extreme=(-1e4, 0.0, 1e4), rho=(0.5, 3.0)),
  attacked_loss(adversarial.margin_shift_norm, epsilon=(1e-12, 1e-3)),
  attacked_loss(
    adversarial.smooth_adversarial_comp_sum_loss,
    tau=(0.5, 2.5),
    rho=(0.5, 3.0),
    nu=(0.0, 2.0),
    epsilon=(1e-12, 1e-3),
  ),
  attacked_loss(adversarial.trades_loss, weight=(0.0, 6.0)),
  elementwise(
    h_consistency.h_consistency_transform, "error_regret", extreme=(0.0, 1.0), tau=(0.0, 3.0), classes=(2, 9)
  ),
  elementwise(h_consistency.h_consistency_gamma, "loss_regret", extreme=(0.0, 1e4), tau=(0.0, 3.0), classes=(2, 9)),
  elementwise(
    h_consistency.h_consistency_gamma_bound, "loss_regret", extreme=(0.0, 1e4), tau=(0.0, 3.0), classes=(2, 9)
  ),
  elementwise(
    h_consistency.deterministic_bounded_risk, "score_bound", extreme=(0.0, 1e4), tau=(0.0, 3.0), classes=(2, 9)
  ),
  row(
    h_consistency.bayes_conditional_risk,
    lambda rng: ((_probabilities(rng) + 1 / CLASSES) / 2,),  # away from zero, where the derivative is infinite
    extreme=lambda p: (np.resize(np.eye(CLASSES), p.shape),),
    bad=(("probabilities", lambda p: (np.ones(p.shape, np.int32),)),),
    examples="any",
    options=dict(tau=(0.0, 3.0)),
  ),
  row(
    h_consistency.minimizability_gap,
    lambda rng: (np.float64(rng.uniform(1, 2)), rng.uniform(0, 1, EXAMPLES)),
    bad=(
      ("best_risk", lambda risk, conditional: (np.int32(1), conditional)),
      ("best_conditional_risks", lambda risk, conditional: (risk, conditional.astype(np.int32))),
    ),
  ),
  row(
    early_learning.elr_regularizer,
    lambda rng: (_probabilities(rng), 0.9 * _probabilities(rng)),
    extreme=lambda p, t: (np.resize(np.eye(CLASSES), p.shape), np.resize(np.eye(CLASSES)[[0, 2, 3]], t.shape)),
    bad=_BAD_SAME_SHAPE,
    examples="any",
  ),
  stateful_loss(
    early_learning.elr_loss,
    lambda rng: early_learning.ELRState(0.5 * rng.dirichlet(np.ones(CLASSES), TABLE)),
    _elr_surrogate,
    momentum=(0.0, 0.9),
    weight=(0.0, 5.0),
  ),
  row(
    early_learning.elr_plus_loss,
    lambda rng: (
      _logits(rng),
      _probabilities(rng),
      _logits(rng),
      _ids(rng),
      early_learning.ELRState(0.5 * rng.dirichlet(np.ones(CLASSES), TABLE)),
    ),
    call=_elr_plus,
    extreme=lambda z, y, teacher, *rest: (*_extreme_logits(z, y), *_extreme_logits(teacher), *rest),
    bad=(
      ("shapes", lambda z, y, teacher, ids, s: (z, y[:1], teacher, ids, s)),
      ("shapes", lambda z, y, teacher, ids, s: (z, y, teacher[:1], ids, s)),
      ("ids", lambda z, y, teacher, ids, s: (z, y, teacher, ids[1:], s)),
      ("ids", lambda z, y, teacher, ids, s: (z, y, teacher, ids * 1.0, s)),
      ("logits", lambda z, *rest: (z.astype(np.int32), *rest)),
    ),
    examples="batch",
    surrogate=_elr_plus_surrogate,
    options=dict(coefficient=(0.5, 1.0), momentum=(0.0, 0.9), weight=(0.0, 5.0), ramp=(0.0, 1.0)),
  ),
  row(
    early_learning.noisy_label_candidates,
    lambda rng: (_probabilities(rng), _classification(rng)[1]),
    call=lambda targets, labels: early_learning.noisy_label_candidates(early_learning.ELRState(targets), labels),
    bad=_BAD_LABELS[:5],
    examples="any",
    differentiable=False,
    wide=True,
  ),
  row(
    early_learning.sigmoid_rampup,
    lambda rng: (np.float64(rng.uniform(1, 4)),),
    call=lambda step, length: early_learning.sigmoid_rampup(step, length=length),
    wide=True,
    options=dict(length=(5.0, 10.0)),
  ),
  stateful_loss(
    label_dro.aldr_kl_loss,
    lambda rng: label_dro.ALDRState(rng.uniform(0.5, 1.0, TABLE)),
    _aldr_surrogate,
    initial_temperature=(1.0, 5.0),
    alpha=(1.5, 3.0),
    margin=(0.0, 0.5),
  ),
  loss(label_dro.ldr_kl_loss, temperature=(0.0, 3.0), margin=(0.0, 0.5)),
  loss(label_dro.ldr_kl_loss, normalize="l1_mean", temperature=(0.3, 3.0), margin=(0.0, 0.5)),
  loss(label_dro.ldr_kl_loss, normalize="softplus_mean", temperature=(0.3, 3.0), margin=(0.0, 0.5)),
  loss(label_dro.ldr_weights, temperature=(0.3, 3.0), margin=(0.0, 0.5)),
  scores(label_dro.normalize_scores, normalize="l1_mean"),
  scores(label_dro.normalize_scores, normalize="softplus_mean"),
  scores(label_dro.aldr_fixed_point, initial_temperature=(0.5, 5.0), alpha=(1.5, 3.0), iterations=20),
  loss(active_passive.asymmetric_generalized_cross_entropy_loss, offset=(0.0, 3.0), q=(0.5, 2.0)),
  loss(active_passive.asymmetric_unhinged_loss, offset=(1.1, 3.0), q=(0.5, 2.0)),
  loss(symmetric.brier_loss),
  loss(hinge.crammer_singer_loss, margin=(0.0, 1.0)),
  loss(symmetric.jensen_shannon_loss, label_weight=(0.1, 0.9)),
  loss(symmetric.mean_absolute_error_loss),
  loss(
    active_passive.nce_agce_loss, active_weight=(0.0, 2.0), passive_weight=(0.0, 2.0), offset=(0.5, 3.0), q=(0.5, 2.0)
  ),
  loss(
    active_passive.nce_aul_loss, active_weight=(0.0, 2.0), passive_weight=(0.0, 2.0), offset=(1.1, 3.0), q=(0.5, 2.0)
  ),
  loss(active_passive.nce_rce_loss, active_weight=(0.0, 2.0), passive_weight=(0.0, 2.0), log_zero=(-9.0, -4.0)),
  loss(active_passive.normalized_cross_entropy_loss),
  loss(symmetric.reverse_cross_entropy_loss, log_zero=(-9.0, -4.0)),
  loss(symmetric.robust_log_loss, alpha=(0.01, 1.0)),
  loss(symmetric.symmetric_cross_entropy_loss, balance=(0.0, 1.0), log_zero=(-9.0, -4.0)),
  loss(comp_sum.truncated_generalized_cross_entropy_loss, q=(0.0, 1.0), threshold=(0.0, 0.5)),
  loss(hinge.weston_watkins_loss, margin=(0.0, 1.0)),
  row(
    spherical.log_partition_penalty,
    lambda rng: (_logits(rng),),
    extreme=_extreme_logits,
    bad=_BAD_LOGITS,
    examples="any",
  ),
  loss(spherical.one_hot_squared_error_loss),
  loss(spherical.spherical_softmax_loss, epsilon=(0.1, 1.0)),
  loss(spherical.taylor_softmax_loss),
  loss(spherical.z_loss, sharpness=(0.5, 3.0), location=(-1.0, 3.0), epsilon=(0.0, 0.1)),
  statistics_loss(spherical.one_hot_squared_error_from_statistics),
  statistics_loss(spherical.spherical_softmax_from_statistics, classes=CLASSES, epsilon=(0.1, 1.0)),
  statistics_loss(spherical.taylor_softmax_from_statistics, classes=CLASSES),
  statistics_loss(
    spherical.z_loss_from_statistics, classes=CLASSES, sharpness=(0.5, 3.0), location=(-1.0, 3.0), epsilon=(0.0, 0.1)
  ),
  scores(stablemax),
  scores(log_stablemax),
  loss(stablemax_cross_entropy),
  row(
    stablemax_cross_entropy_with_soft_labels,
    lambda rng: (_logits(rng), _probabilities(rng)),
    extreme=_extreme_logits,
    bad=(
      *_BAD_SAME_SHAPE,
      ("logits", lambda z, y: (z.astype(np.int32), y)),
      ("labels", lambda z, y: (z, y.astype(np.int32))),
    ),
    examples="any",
  ),
  penalty(group_sparsity.wgsef, GROUPS, k=(1, 4)),
  penalty(group_sparsity.wgsef_minimizer, GROUPS, k=(1, 4), differentiable=False, wide=True),
  penalty(group_sparsity.wgsef_conjugate, GROUPS, k=(1, 4)),
  penalty(group_sparsity.prox_wgsef, GROUPS, k=(1, 4), lam=(0.0, 2.0)),
  penalty(group_sparsity.group_lasso, GROUPS),
  penalty(group_sparsity.prox_group_lasso, GROUPS, lam=(0.0, 2.0)),
  penalty(groups.sum_groups, GROUPS, num_groups=4, wide=True),
  row(
    groups.scale_groups,
    lambda rng: (*_layer(rng), rng.uniform(size=4)),
    call=lambda values, factors: groups.scale_groups(values, GROUPS, factors),
    bad=(("groups", lambda values, factors: (jax.tree.map(lambda leaf: leaf[None], values), factors)),),
  ),
  row(groups.group_norms, _layer, wide=True, options=dict(kind="neuron")),
  row(
    groups.freeze_support,
    _layer,
    call=lambda params: groups.freeze_support(params, {"kernel": "neuron", "bias": None}),
    differentiable=False,
    wide=True,
  ),
  metric(classification.top_k_accuracy, k=(1, CLASSES)),
  metric(classification.balanced_top_k_accuracy, k=(1, CLASSES)),
  metric(
    classification.area_under_roc,
    # Any of the examples' scores will do, and both classes occur.
    arguments=lambda rng: (_logits(rng)[:, 0], np.resize(np.array([1, 0, 0], np.int32), EXAMPLES)),
    bad=(("scores", lambda s, p: (s.astype(np.int32), p)), ("positives", lambda s, p: (s, p[1:]))),
  ),
  metric(
    classification.memorization_fractions,
    arguments=lambda rng: (*_classification(rng), np.resize(np.arange(CLASSES, dtype=np.int32), EXAMPLES)),
  ),
  metric(grokking.softmax_collapse_fraction, arguments=lambda rng: (_logits(rng),), bad=_BAD_LOGITS, dtype=jnp.float32),
  metric(
    grokking.zero_loss_fraction,
    arguments=lambda rng: (np.maximum(_logits(rng)[:, 0], 0),),
    bad=(("losses", lambda losses: (losses.astype(np.int32),)),),
  ),
  row(
    sample_complexity.min_samples_to,
    lambda rng: (np.sort(rng.uniform(0, 0.5, (EXAMPLES, 6)))[:, ::-1], np.arange(4, 10, dtype=np.int32)),
    extreme=lambda errors, sizes: (np.minimum(np.abs(EXTREME * errors), EXTREME * (sizes < 9)), sizes),
    bad=(
      ("errors", lambda errors, sizes: (errors.astype(np.int32), sizes)),
      ("sizes", lambda errors, sizes: (errors, sizes[1:])),
      ("sizes", lambda errors, sizes: (errors, sizes[:1])),
    ),
    differentiable=False,
    wide=True,
    options=dict(target=(0.6, 0.7)),
  ),
  row(
    sample_complexity.probe_sample_curve,
    lambda rng: (*_features(rng), *_features(rng)),
    call=_sample_curve,
    bad=(
      ("features", lambda x, y, *tests: (x.astype(np.int32), y, *tests)),
      ("labels", lambda x, y, *tests: (x, y[:1], *tests)),
      ("test_features", lambda x, y, tests, labels: (x, y, tests[:, :1], labels)),
      ("test_labels", lambda x, y, tests, labels: (x, y, tests, labels * 1.0)),
    ),
    differentiable=False,
    wide=True,
  ),
  row(
    unsquared_norm.unsquared_norm_penalty,
    _layer,
    bad=(("params", lambda values: (jax.tree.map(lambda leaf: np.ones(leaf.shape, np.int32), values),)),),
    wide=True,
  ),
  mask(dynamic_pruning.mass_mask, mass=(0.2, 0.9)),
  mask(dynamic_pruning.uniform_mask, prune_ratio=(0.1, 0.7)),
  row(
    dynamic_pruning.mask_prediction_loss,
    lambda rng: (_logits(rng), rng.integers(0, 2, (EXAMPLES, CLASSES)).astype(np.float64)),
    extreme=_extreme_logits,
    bad=_BAD_MASKS,
    examples="batch",
  ),
  row(
    dynamic_pruning.mask_accuracy,
    lambda rng: (_logits(rng), rng.integers(0, 2, (EXAMPLES, CLASSES)).astype(np.float64)),
    extreme=_extreme_logits,
    bad=_BAD_MASKS,
    examples="batch",
    differentiable=False,
    wide=True,
  ),
  conv(orthogonal_conv.orthogonal_conv_penalty, stride=1),
  conv(orthogonal_conv.orthogonal_conv_penalty, stride=2),
  conv(orthogonal_conv.orthogonal_conv_defect_norm, stride=1),
  conv(conv_spectrum.conv_singular_values, stride=2, size=3, differentiable=False, wide=True),
  row(
    orthogonal_conv.orthogonal_dense_penalty,
    lambda rng: (rng.normal(size=(3, 4)),),
    bad=(("weights", lambda w: (w.astype(np.int32),)), ("weights", lambda w: (w[0],))),
  ),
  row(
    orthogonal_conv.orthogonal_penalty,
    lambda rng: ({"conv": {"kernel": rng.normal(size=(3, 2, 4))}, **_layer(rng)[0]},),
    call=lambda params, weight: orthogonal_conv.orthogonal_penalty(
      params, {"conv/kernel": 1, "kernel": None}, layer_weights={"conv/kernel": weight}
    ),
    bad=(
      ("strides", lambda params: ({"conv": params["conv"]},)),
      ("kernel", lambda params: ({**params, "conv": {"kernel": np.zeros((2, 2, 4))}},)),
    ),
    wide=True,
    options=dict(weight=(0.0, 2.0)),
  ),
  row(
    conv_spectrum.orthogonality_error,
    lambda rng: (rng.uniform(0.5, 2, (3, 4)),),
    bad=(("singular_values", lambda values: (values.astype(np.int32),)),),
    wide=True,
  ),
  row(
    conv_spectrum.isometry_bounds,
    lambda rng: (rng.uniform(0.02, 0.05, EXAMPLES),),
    extreme=lambda values: (EXTREME * np.resize([1.0, -1.0, 0.0], values.shape),),
    bad=(("penalty", lambda values: (values.astype(np.int32),)),),
    wide=True,
    options=dict(spectral_constant=(1.0, 9.0)),
  ),
  row(
    conv_spectrum.certified_radius,
    lambda rng: (_logits(rng),),
    extreme=_extreme_logits,
    bad=(("logits", lambda z: (z.astype(np.int32),)), ("logits", lambda z: (z[:, :1],))),
    examples="any",
    options=dict(lipschitz_constant=(0.5, 2.0)),
  ),
  row(
    grokking.nlm_alignment,
    lambda rng: (*_layer(rng), *_layer(rng)),
    bad=(("shapes", lambda grads, params: (grads, jax.tree.map(lambda leaf: leaf[..., 1:], params))),),
    differentiable=False,
    wide=True,
  ),
  row(grokking.nlm_direction, _layer, options=dict(last_layer="kernel"), bad=()),
  row(grokking.tensor_norms, _layer, bad=_BAD_VALUES[:0], differentiable=False, wide=True),
  *(
    row(
      function,
      lambda rng: (0.1 + rng.gamma(2.0, size=5),),
      call=lambda target, function=function, **law: function(
        target, inductive_bias.ScaledChi2(law["df"], law["nc"], law["scale"], 0.0)
      ),
      extreme=lambda target: (EXTREME ** np.linspace(-1, 1, 5),),
      wide=True,
      options=dict(df=(3.0, 9.0), nc=(0.5, 5.0), scale=(0.5, 2.0)),
    )
    for function in (inductive_bias.scaled_chi2_inductive_bias, inductive_bias.sankaran_inductive_bias)
  ),
  row(lazy_rich.kernel_alignment, _kernel_task, bad=_BAD_KERNEL, wide=True),
  row(
    lazy_rich.kernel_difficulty,
    _kernel_task,
    extreme=lambda kernel, targets: (EXTREME * kernel, EXTREME * targets),  # still positive definite
    bad=_BAD_KERNEL,
    wide=True,
    options=dict(ridge=(0.0, 1.0)),
  ),
  row(
    lazy_rich.relative_motion,
    lambda rng: (*_layer(rng), *_layer(rng)),
    bad=(("shapes", lambda params, start: (params, jax.tree.map(lambda leaf: leaf[..., 1:], start))),),
    wide=True,
  ),
  row(
    lazy_rich.grokking_gap,
    lambda rng: (np.arange(3), np.array([[1.0, 0.01, 0.0]]), np.array([[1.0, 1.2, 0.01]])),
    extreme=lambda steps, train, test: (steps, EXTREME * train, EXTREME * test),
    bad=(
      ("steps", lambda steps, train, test: (steps[1:], train, test)),
      ("shapes", lambda steps, train, test: (steps, train, test[:, 1:])),
      ("train_losses", lambda steps, train, test: (steps, train.astype(np.int32), test)),
    ),
    differentiable=False,
    wide=True,
    options=dict(train_fraction=(0.05, 0.2), test_fraction=(0.2, 0.5)),
  ),
  taught_loss(progressive_guidance.guided_cross_entropy_loss, guidance=(0.0, 1.0)),
  row(
    progressive_guidance.progressive_guidance_loss,
    _classification,
    call=_coarsest,
    extreme=_extreme_logits,
    bad=_BAD_LABELS,
    examples="any",
    options=dict(guidance=(0.0, 1.0)),
  ),
  row(weight_distribution.kurtosis_penalty, _layer, bad=_BAD_WEIGHTS, wide=True, options=dict(target=(1.2, 3.0))),
  row(weight_distribution.skewness_penalty, _layer, bad=_BAD_WEIGHTS, wide=True),
  row(
    weight_distribution.weight_distribution_penalty,
    _layer,
    bad=_BAD_WEIGHTS,
    wide=True,
    options=dict(kurtosis_weight=(0.0, 1.0), skewness_weight=(0.0, 1.0), target=(1.2, 3.0)),
  ),
  row(
    elastic_quantizer.lsq_quantize,
    lambda rng: (rng.normal(size=EXAMPLES), np.array(0.3)),
    call=lambda x, scale, bits: (elastic_quantizer.lsq_quantize(x, scale, bits=bits), x),
    bad=(
      ("values", lambda x, scale: (x.astype(np.int32), scale)),
      ("scale", lambda x, scale: (x, np.ones(3))),
      ("scale", lambda x, scale: (x, scale.astype(np.int32))),
    ),
    surrogate=_lsq_surrogate,
    options=dict(bits=(2, 8)),
  ),
  row(
    search.average_bits,
    lambda rng: (rng.integers(2, 9, 6).astype(np.int32), rng.integers(1, 100, 6).astype(np.int32)),
    bad=(("bits", lambda bits, sizes: (bits[1:], sizes)), ("bits", lambda bits, sizes: (bits[:2], sizes[:2]))),
    differentiable=False,
    wide=True,
  ),
  row(
    weight_compander.compand,
    lambda rng: (_logits(rng),),
    extreme=_extreme_logits,
    bad=(("values", lambda values: (values.astype(np.int32),)),),
    examples="any",
    options=dict(amplitude=(0.5, 2.0), width=(0.5, 2.0)),
  ),
  row(
    weight_compander.uncompand,
    lambda rng: (np.tanh(_logits(rng)) / 2,),
    extreme=_extreme_logits,
    bad=(("weights", lambda weights: (weights.astype(np.int32),)),),
    examples="any",
    options=dict(amplitude=(0.5, 2.0), width=(0.5, 2.0)),
  ),
  row(
    weights.weight_moments,
    lambda rng: (rng.gamma(2.0, size=(3, 4)),),
    bad=(("weights", lambda weights: (weights.astype(np.int32),)), ("weights", lambda weights: (weights[:1, :1],))),
    wide=True,
  ),
  row(
    weights.weight_stats,
    _layer,
    bad=(
      ("weights", lambda values: (jax.tree.map(lambda leaf: leaf.astype(np.int32), values),)),
      ("params", lambda values: ({"bias": values["bias"]},)),
    ),
    differentiable=False,
    wide=True,
    options=dict(threshold=(0.0, 0.5)),
  ),
  row(
    adaptive_sampling.aas_sampler_loss,
    lambda rng: (rng.normal(size=EXAMPLES), rng.normal(size=(EXAMPLES, 2)), *rng.uniform(size=(2, EXAMPLES))),
    bad=(*_BAD_DENSITIES, ("score", lambda log_density, score, *rest: (log_density, score[:1], *rest))),
    examples="any",
    options=dict(smoothness=(0.0, 0.5), baseline=(0.0, 1.0)),
  ),
  row(
    adaptive_sampling.das_cross_entropy_loss,
    lambda rng: (rng.normal(size=EXAMPLES), *rng.uniform(size=(2, EXAMPLES))),
    bad=_BAD_DENSITIES,
    examples="any",
  ),
]

ROWS += [
  row(
    straight_through.straight_through_floor,
    lambda rng: (rng.normal(size=EXAMPLES),),
    bad=(("values", lambda x: (x.astype(np.int32),)),),
    call=lambda x: (straight_through.straight_through_floor(x), x),
    surrogate=_straight_through,
  ),
  row(
    straight_through.straight_through_round,
    lambda rng: (rng.normal(size=EXAMPLES),),
    bad=(("values", lambda x: (x.astype(np.int32),)),),
    call=lambda x: (straight_through.straight_through_round(x), x),
    surrogate=_straight_through,
  ),
  row(
    straight_through.straight_through_value,
    lambda rng: (rng.normal(size=EXAMPLES), rng.normal(size=EXAMPLES)),
    call=lambda x, replaced: (straight_through.straight_through_value(x, replaced), x),
    bad=(*_BAD_SAME_SHAPE, ("values", lambda x, y: (x.astype(np.int32), y))),
    surrogate=lambda x, results, replaced: _straight_through(x, results),
  ),
  row(
    fake_quant.fake_quant_weight,
    lambda rng: (rng.normal(size=(6, 3)),),
    call=lambda x, bits: (fake_quant.fake_quant_weight(x, bits=bits), x),
    bad=(("weights", lambda x: (x.astype(np.int32),)),),
    surrogate=_straight_through,
    options=dict(bits=(2, 8)),
  ),
  *(
    row(
      fake_quant.fake_quant_activation,
      lambda rng: (rng.normal(size=EXAMPLES), rng.uniform(0.5, 1, EXAMPLES)),
      call=lambda x, bound, bits, signed: (
        fake_quant.fake_quant_activation(x, bits=bits, bound=bound, signed=signed),
        x,
      ),
      extreme=lambda x, bound: (_extremes(x), np.resize([0.0, 1e4, -1.0], bound.shape)),
      bad=(("inputs", lambda x, b: (x.astype(np.int32), b)), ("bound", lambda x, b: (x, b[1:]))),
      surrogate=functools.partial(_clipped_straight_through, signed=signed),
      options=dict(bits=(2, 8), signed=signed),
    )
    for signed in (False, True)
  ),
  row(
    bounds.activation_bound_update,
    lambda rng: (_logits(rng), bounds.BoundState(*rng.uniform(size=(6, CLASSES)))),
    call=lambda x, state, rate: bounds.activation_bound_update(x, state=state, rate=rate),
    bad=(
      ("inputs", lambda x, state: (x[:, 1:], state)),
      ("inputs", lambda x, state: (x.astype(np.int32), state)),
    ),
    differentiable=False,
    wide=True,
    options=dict(rate=(0.0, 1.0)),
  ),
  *(
    row(
      function,
      lambda rng: (bounds.BoundState(*rng.uniform(size=(6, CLASSES))),),
      bad=(("BoundState", lambda state: (tuple(state),)),),
      differentiable=False,
      wide=True,
    )
    for function in (bounds.freeze_bounds, bounds.per_tensor_bounds)
  ),
  row(
    integer.integer_dense,
    lambda rng: (rng.normal(size=(EXAMPLES, 6)),),
    call=lambda x, **bits: integer.integer_dense(x, jnp.cos(jnp.arange(18.0)).reshape(6, 3), **bits),
    bad=(("inputs", lambda x: (x.astype(np.int32),)), ("kernel", lambda x: (x[:, 1:],))),
    examples="any",
    differentiable=False,
    options=dict(bound=1.5, signed=False, weight_bits=(2, 8), act_bits=(2, 8)),
  ),
  row(
    integer.integer_conv,
    lambda rng: (rng.normal(size=(2, 4, 3, 2)),),
    call=lambda x, **bits: integer.integer_conv(x, jnp.cos(jnp.arange(24.0)).reshape(2, 2, 2, 3), **bits),
    bad=(("inputs", lambda x: (x.astype(np.int32),)), ("kernel", lambda x: (x[..., 1:],))),
    differentiable=False,
    options=dict(bound=1.5, signed=True, weight_bits=(2, 8), act_bits=(2, 8)),
  ),
  row(
    pareto.pareto_front,
    lambda rng: (rng.normal(size=(3, 4)), rng.normal(size=(3, 4))),
    bad=(*_BAD_SAME_SHAPE, ("costs", lambda c, v: (c.astype(np.int32), v))),
    differentiable=False,
    wide=True,
  ),
  row(
    pareto.best_within_cost,
    lambda rng: (rng.uniform(size=(3, 4)), rng.normal(size=(3, 4)), rng.uniform(1, 2, (3, 5))),
    extreme=lambda c, v, b: (_extremes(c), _extremes(v), EXTREME * b),
    bad=(
      ("shapes", lambda c, v, b: (c[1:], v, b)),
      ("costs", lambda c, v, b: (c.astype(np.int32), v, b)),
      ("budgets", lambda c, v, b: (c, v, b.astype(np.int32))),
    ),
    differentiable=False,
  ),
]

TRANSFORMS = [
  transform(
    orthogonalize_gradients,
    lambda base, eps: optax.chain(orthogonalize_gradients(eps=eps), base),
    eps=(1e-30, 1e-3),
  ),
  transform(
    orthogonal,
    lambda base, eps: orthogonal(base, renormalize=False, eps=eps),
    eps=(1e-30, 1e-3),
  ),
  transform(
    penalize,
    lambda base, weight: optax.chain(penalize(_ridge, weight), base),
    weight=(0.0, 1.0),
  ),
  transform(
    proximal,
    lambda base, rate: optax.chain(base, proximal(_soft_threshold, rate)),
    rate=(0.0, 1.0),
  ),
  transform(
    half_space_projection,
    lambda base, epsilon: optax.chain(base, half_space_projection(_tensors_as_groups, epsilon=epsilon)),
    epsilon=(0.0, 0.5),
  ),
  transform(
    compand_weights,
    lambda base, deviations=1.5, slope=1.0: compand_weights(base, deviations=deviations, slope=slope),
    deviations=(1.0, 3.0),
    slope=(1.0, 2.0),
  ),
]

OPTIMIZERS = {"sgd": optax.sgd, "adam": optax.adam, "adamw": optax.adamw, "lion": optax.lion}
