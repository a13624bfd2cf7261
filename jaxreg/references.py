"""The references of the ingredients that a program uses, as BibTeX."""

import functools
import inspect
import types

__all__ = ["citation"]


def citation(*objects) -> str:
  """BibTeX of the papers behind some ingredients, each once, with jaxreg itself first.

  A transformation is known by the function that made it, also inside `optax.chain`, `optax.masked` and the like; a
  partial or jitted function by what it wraps; a module or a room by everything in it.

  >>> from jaxreg.losses.comp_sum import comp_sum_loss
  >>> from jaxreg.transforms.orthogonal_gradient import orthogonal
  >>> import optax
  >>> text = citation(comp_sum_loss, orthogonal(optax.sgd(0.1)))
  >>> [line for line in text.splitlines() if line.startswith("@")]
  ['@software{jaxreg,', '@inproceedings{mao2023crossentropy,', '@inproceedings{prieto2025grokking,']

  Args:
    *objects: functions, classes, modules and transformations of jaxreg.

  Returns:
    The entries, separated by empty lines, in the order of the arguments.

  Raises:
    ValueError: for an object that is not jaxreg's.

  Reference: none.
  """
  keys = ["jaxreg"]
  for thing in objects:
    names = _names(thing)
    if not names:
      raise ValueError(f"objects must be functions, classes, modules or transformations of jaxreg, got {thing!r}.")
    for name in names:
      keys.extend(_keys(name))
  return "\n\n".join(_bibtex(key) for key in dict.fromkeys(keys))


def _names(thing, above=()) -> list[str]:
  """Dotted names of the ingredients in an object: its own, or those that it is made of."""
  if any(thing is one for one in above):  # functions may close over each other
    return []
  if isinstance(thing, types.ModuleType):
    return [thing.__name__] if f"{thing.__name__}.".startswith("jaxreg.") else []
  if inspect.isfunction(thing) or inspect.isclass(thing):
    own = [f"{thing.__module__}.{thing.__qualname__.split('.')[0]}"] if _is_ours(thing) else []
  else:
    own = _names(type(thing)) if _is_ours(type(thing)) else []
  return own + [name for part in _parts(thing) for name in _names(part, (*above, thing))]


def _parts(thing) -> list:
  """What an object wraps, holds or closes over: the members of `optax.chain`, the penalty of `penalize`."""
  if isinstance(thing, (tuple, list)):
    return list(thing)
  if isinstance(thing, dict):
    return list(thing.values())
  if isinstance(thing, functools.partial):
    return [thing.func]
  if inspect.isfunction(thing):
    return [_content(cell) for cell in thing.__closure__ or ()]
  return [thing.__wrapped__] if hasattr(thing, "__wrapped__") else []


def _is_ours(thing) -> bool:
  return str(getattr(thing, "__module__", "")).startswith("jaxreg.")


def _content(cell):
  try:
    return cell.cell_contents
  except ValueError:  # not filled yet
    return None


def _keys(name: str) -> tuple[str, ...]:
  """The references of a function, or else of its module; of a module or room, of everything in it."""
  inside = [key for entry, keys in REFERENCES.items() if f"{entry}.".startswith(f"{name}.") for key in keys]
  if inside or name in REFERENCES:
    return tuple(inside)
  return REFERENCES.get(name.rpartition(".")[0], ())


def _bibtex(key: str) -> str:
  kind, fields = _ENTRIES[key]
  lines = [f"  {field} = {{{value}}}," for field, value in fields.items()]
  return "\n".join([f"@{kind}{{{key},", *lines, "}"])


# Modules first, then those of their functions that have references of their own; () where there is nothing to cite.
REFERENCES = {
  "jaxreg.adversarial.attacks.fgsm": ("goodfellow2015explaining",),
  "jaxreg.adversarial.attacks.pgd": ("madry2018towards",),
  "jaxreg.data.aggregation": ("javanmard2024learning",),
  "jaxreg.data.aggregation.gaussian_private_bag_means": ("dwork2014algorithmic",),
  "jaxreg.data.aggregation.laplace_private_bag_means": ("javanmard2024learning", "dwork2014algorithmic"),
  "jaxreg.data.algorithmic": ("prieto2025grokking",),
  "jaxreg.data.gaussian_mixture": ("zheng2023revisiting",),
  "jaxreg.data.gaussian_mixture.gaussian_mixture": (),
  "jaxreg.data.gaussian_mixture.gaussian_mixture_bayes_error": ("anderson2003introduction",),
  "jaxreg.data.mixing": ("zhang2018mixup", "berthelot2019mixmatch"),
  "jaxreg.data.noise": (),
  "jaxreg.data.noise.instance_dependent_noise": ("xia2020partdependent",),
  "jaxreg.losses.adversarial": ("mao2023crossentropy",),
  "jaxreg.losses.adversarial.trades_loss": ("zhang2019theoretically",),
  "jaxreg.kernels.convolutional": ("novak2019bayesian",),
  "jaxreg.kernels.convolutional.convolution": ("arora2019exact",),
  "jaxreg.kernels.convolutional.image_patches": ("arora2019exact",),
  "jaxreg.kernels.deep_limits": ("radhakrishnan2023wide",),
  "jaxreg.kernels.deep_votes": ("radhakrishnan2023wide",),
  "jaxreg.kernels.deep_votes.hilbert_vote": ("devroye1998hilbert",),
  "jaxreg.kernels.deep_limits.koenigs": ("radhakrishnan2023wide", "koenigs1884recherches"),
  "jaxreg.kernels.deep_limits.singularity_exponent": ("radhakrishnan2023wide", "devroye1998hilbert"),
  "jaxreg.kernels.dirichlet_classes": ("radhakrishnan2023wide",),
  "jaxreg.kernels.dual_activations": ("cho2009kernel",),
  "jaxreg.kernels.dual_activations.DualActivation": (),
  "jaxreg.kernels.dual_activations.cosine_dual": ("rahimi2007random",),
  "jaxreg.kernels.dual_activations.sine_dual": ("rahimi2007random",),
  "jaxreg.kernels.dual_activations.erf_dual": ("williams1996computing",),
  "jaxreg.kernels.dual_activations.gaussian_dual": ("williams1996computing",),
  "jaxreg.kernels.dual_activations.exponential_dual": ("daniely2016toward",),
  "jaxreg.kernels.dual_activations.hermite_dual": ("daniely2016toward",),
  "jaxreg.kernels.dual_activations.numerical_dual": ("daniely2016toward",),
  "jaxreg.kernels.dual_activations.normalize_dual": ("daniely2016toward",),
  "jaxreg.kernels.dual_activations.gelu_dual": ("tsuchida2021avoiding",),
  "jaxreg.kernels.dual_activations.hermite_activation": ("radhakrishnan2023wide",),
  "jaxreg.kernels.dual_activations.monomial_dual": ("isserlis1918formula",),
  "jaxreg.kernels.empirical": ("novak2022fast",),
  "jaxreg.kernels.gradient_flow": ("lee2019wide",),
  "jaxreg.kernels.gradient_flow.Eigensystem": (),
  "jaxreg.kernels.gradient_flow.class_targets": ("lee2018deep",),
  "jaxreg.kernels.gradient_flow.kernel_classify": ("radhakrishnan2023wide",),
  "jaxreg.kernels.gradient_flow.kernel_eigensystem": (),
  "jaxreg.kernels.gradient_flow.kernel_regression": ("radhakrishnan2023wide",),
  "jaxreg.kernels.gram": ("novak2020neural",),
  "jaxreg.kernels.infinite_width": ("jacot2018neural",),
  "jaxreg.kernels.infinite_width.KernelState": (),
  "jaxreg.kernels.infinite_width.activate": ("lee2019wide",),
  "jaxreg.kernels.infinite_width.add_states": (),
  "jaxreg.kernels.infinite_width.dense_standard": ("sohldickstein2020infinite",),
  "jaxreg.kernels.infinite_width.fully_connected_standard": ("sohldickstein2020infinite",),
  "jaxreg.kernels.infinite_width.input_state": ("lee2018deep",),
  "jaxreg.kernels.infinite_width.layer_norm": ("novak2020neural",),
  "jaxreg.kernels.infinite_width.residual": ("yang2017mean",),
  "jaxreg.kernels.bagged_regression": ("javanmard2024learning",),
  "jaxreg.kernels.committee": ("kumar2024grokking",),
  "jaxreg.kernels.hypothesis_space": ("boopathy2024exact",),
  "jaxreg.kernels.hypothesis_space.exact_inductive_bias": ("ruben1962probability",),
  "jaxreg.kernels.hypothesis_space.saddlepoint_inductive_bias": ("lugannani1980saddle",),
  "jaxreg.kernels.lazy_rich_dmft": ("kumar2024grokking",),
  "jaxreg.kernels.lazy_training": ("kumar2024grokking",),
  "jaxreg.kernels.lazy_training.lazy_output": ("kumar2024grokking", "chizat2019lazy"),
  "jaxreg.denoising.posterior_mean": ("han2024neural",),
  "jaxreg.kernels.rbf": (),
  "jaxreg.kernels.score_ntk": ("han2024neural",),
  "jaxreg.kernels.score_ntk.early_stopping_step": ("han2024neural", "raskutti2014early"),
  "jaxreg.kernels.score_ntk.score_output_kernel": ("cho2009kernel",),
  "jaxreg.kernels.self_distillation": ("borup2021teacher",),
  "jaxreg.layers.best_response": ("mackay2019selftuning",),
  "jaxreg.layers.per_example_noise.per_example_color_jitter": ("krizhevsky2012imagenet",),
  "jaxreg.layers.per_example_noise.per_example_cutout": ("devries2017improved",),
  "jaxreg.layers.per_example_noise.per_example_dropout": ("srivastava2014dropout",),
  "jaxreg.layers.per_example_noise.per_example_scale_noise": ("mackay2019selftuning",),
  "jaxreg.layers.expert_router": ("liu2023sparsity",),
  "jaxreg.layers.factored_output": ("vincent2015efficient", "debrebisson2016zloss"),
  "jaxreg.solvers.factored_output": ("vincent2015efficient", "debrebisson2016zloss"),
  "jaxreg.pruning.dynamic_pruning": ("elkerdawy2022fire",),
  "jaxreg.pruning.gathered": ("elkerdawy2022fire",),
  "jaxreg.pruning.gathered.gathered_sizes": (),
  "jaxreg.layers.loop_conv": (),
  "jaxreg.layers.max_min": ("anil2019sorting",),
  "jaxreg.pruning.pruned_flops": ("elkerdawy2022fire",),
  "jaxreg.layers.weight_compander": ("cakaj2023weight",),
  "jaxreg.layers.weight_compander.Curve": (),
  "jaxreg.metrics.weights.he_deviation": ("he2015delving",),
  "jaxreg.layers.weight_compander.is_kernel": (),
  "jaxreg.losses.aggregate": ("javanmard2024learning",),
  "jaxreg.losses.calibrated_ensemble": ("dai2025ensloss",),
  "jaxreg.losses.binary_margin.binary_exponential_loss": ("bartlett2006convexity",),
  "jaxreg.losses.binary_margin.binary_focal_loss": ("lin2017focal",),
  "jaxreg.losses.binary_margin.binary_hinge_loss": ("bartlett2006convexity",),
  "jaxreg.losses.binary_margin.binary_logistic_loss": ("bartlett2006convexity",),
  "jaxreg.losses.binary_margin.binary_squared_hinge_loss": ("bartlett2006convexity",),
  "jaxreg.losses.calibrated_ensemble.is_calibrated_derivative": ("bartlett2006convexity", "dai2025ensloss"),
  "jaxreg.losses.chunked.OutputLayer": (),
  "jaxreg.losses.chunked.chunked_comp_sum_loss": ("mao2023crossentropy",),
  "jaxreg.losses.chunked.chunked_ldr_kl_loss": ("zhu2023label",),
  "jaxreg.losses.chunked.chunked_stablemax_cross_entropy": ("prieto2025grokking",),
  "jaxreg.losses.comp_sum": ("mao2023crossentropy",),
  "jaxreg.losses.comp_sum.generalized_cross_entropy_loss": ("zhang2018generalized", "mao2023crossentropy"),
  "jaxreg.losses.distillation.self_distillation_squared_loss": ("borup2021teacher",),
  "jaxreg.losses.early_learning": ("liu2020early",),
  "jaxreg.losses.example_table": (),
  "jaxreg.losses.h_consistency": ("mao2023crossentropy",),
  "jaxreg.losses.label_dro": ("zhu2023label",),
  "jaxreg.losses.progressive_guidance": ("xu2023eqnet",),
  "jaxreg.losses.active_passive.asymmetric_generalized_cross_entropy_loss": ("zhou2021asymmetric",),
  "jaxreg.losses.active_passive.asymmetric_unhinged_loss": ("zhou2021asymmetric",),
  "jaxreg.losses.symmetric.brier_loss": ("ghosh2017robust",),
  "jaxreg.losses.hinge.crammer_singer_loss": ("crammer2001algorithmic",),
  "jaxreg.losses.symmetric.jensen_shannon_loss": ("englesson2021generalized",),
  "jaxreg.losses.symmetric.mean_absolute_error_loss": ("ghosh2017robust",),
  "jaxreg.losses.active_passive.nce_agce_loss": ("zhou2021asymmetric", "ma2020normalized"),
  "jaxreg.losses.active_passive.nce_aul_loss": ("zhou2021asymmetric", "ma2020normalized"),
  "jaxreg.losses.active_passive.nce_rce_loss": ("ma2020normalized", "wang2019symmetric"),
  "jaxreg.losses.active_passive.normalized_cross_entropy_loss": ("ma2020normalized",),
  "jaxreg.losses.symmetric.reverse_cross_entropy_loss": ("wang2019symmetric",),
  "jaxreg.losses.symmetric.robust_log_loss": ("patel2021memorization",),
  "jaxreg.losses.symmetric.symmetric_cross_entropy_loss": ("wang2019symmetric",),
  "jaxreg.losses.comp_sum.truncated_generalized_cross_entropy_loss": ("zhang2018generalized",),
  "jaxreg.losses.hinge.weston_watkins_loss": ("weston1999support",),
  "jaxreg.losses.scaled_residual": ("kaneda2023deep",),
  "jaxreg.losses.score_matching": ("han2024neural",),
  "jaxreg.losses.softmax_family": (),
  "jaxreg.losses.spherical.SphericalStatistics": ("vincent2015efficient",),
  "jaxreg.losses.spherical.log_partition_penalty": ("zoph2022stmoe",),
  "jaxreg.losses.spherical.one_hot_squared_error_from_statistics": ("vincent2015efficient",),
  "jaxreg.losses.spherical.one_hot_squared_error_loss": ("vincent2015efficient",),
  "jaxreg.losses.spherical.spherical_softmax_from_statistics": ("debrebisson2016exploration",),
  "jaxreg.losses.spherical.spherical_softmax_loss": ("debrebisson2016exploration",),
  "jaxreg.losses.spherical.spherical_statistics": ("vincent2015efficient",),
  "jaxreg.losses.spherical.taylor_softmax_from_statistics": ("debrebisson2016exploration",),
  "jaxreg.losses.spherical.taylor_softmax_loss": ("debrebisson2016exploration",),
  "jaxreg.losses.spherical.z_loss": ("debrebisson2016zloss",),
  "jaxreg.losses.spherical.z_loss_from_statistics": ("debrebisson2016zloss", "vincent2015efficient"),
  "jaxreg.losses.stablemax": ("prieto2025grokking",),
  "jaxreg.metrics.noncentral_chi2": ("johnson1995continuous",),
  "jaxreg.metrics.noncentral_chi2.log_gammainc": ("abramowitz1964handbook",),
  "jaxreg.metrics.conv_spectrum": ("achour2022existence",),
  "jaxreg.metrics.conv_spectrum.certified_radius": ("tsuzuku2018lipschitz",),
  "jaxreg.metrics.conv_spectrum.conv_singular_values": ("sedghi2019singular", "achour2022existence"),
  "jaxreg.metrics.inductive_bias": ("boopathy2024exact",),
  "jaxreg.metrics.inductive_bias.bootstrap_inductive_bias": ("efron1993introduction",),
  "jaxreg.metrics.inductive_bias.sankaran_inductive_bias": ("sankaran1963approximations", "boopathy2024exact"),
  "jaxreg.metrics.lazy_rich": ("kumar2024grokking",),
  "jaxreg.metrics.lazy_rich.relative_motion": ("kumar2024grokking", "chizat2019lazy"),
  "jaxreg.metrics.classification.area_under_roc": ("hanley1982meaning",),
  "jaxreg.metrics.classification.balanced_top_k_accuracy": ("brodersen2010balanced",),
  "jaxreg.metrics.classification.MemorizationFractions": ("liu2020early",),
  "jaxreg.metrics.classification.memorization_fractions": ("liu2020early",),
  "jaxreg.metrics.classification.top_k_accuracy": ("lapin2015topk",),
  "jaxreg.metrics.grokking": ("prieto2025grokking",),
  "jaxreg.metrics.sample_complexity": ("zheng2023revisiting",),
  "jaxreg.metrics.weights.WeightMoments": ("xu2023eqnet",),
  "jaxreg.metrics.weights.WeightStats": ("cakaj2023weight",),
  "jaxreg.metrics.weights.weight_moments": ("xu2023eqnet",),
  "jaxreg.metrics.weights.weight_stats": ("cakaj2023weight",),
  "jaxreg.models.direction_unet": ("kaneda2023deep",),
  "jaxreg.models.krnet": ("tang2023das",),
  "jaxreg.models.krnet.ActNorm": ("kingma2018glow", "tang2023das"),
  "jaxreg.models.krnet.AffineCoupling": ("tang2020deep",),
  "jaxreg.models.krnet.PiecewiseQuadraticCDF": ("wan2021augmented",),
  "jaxreg.layers.naive_bayes_head": ("zheng2023revisiting",),
  "jaxreg.metrics.gaussian_probe": ("zheng2023revisiting",),
  "jaxreg.metrics.linear_probe": ("zheng2023revisiting",),
  "jaxreg.metrics.gaussian_probe.empty_stats": (),
  "jaxreg.metrics.linear_probe.logistic_probe": ("liu1989limited", "zheng2023revisiting"),
  "jaxreg.metrics.gaussian_probe.merge_stats": ("chan1983algorithms", "zheng2023revisiting"),
  "jaxreg.metrics.linear_probe.minmax_scale": (),
  "jaxreg.metrics.linear_probe.probe_logits": (),
  "jaxreg.models.mlp": (),
  "jaxreg.models.posterior_mean_mlp": ("han2024neural",),
  "jaxreg.models.resnet.ResNet": ("he2016deep",),
  "jaxreg.models.resnet.WideResNet": ("zagoruyko2016wide",),
  "jaxreg.quantization.bounds": ("abdolrashidi2021pareto",),
  "jaxreg.quantization.bounds.per_tensor_bounds": ("krishnamoorthi2018quantizing",),
  "jaxreg.metrics.network_cost": ("abdolrashidi2021pareto",),
  "jaxreg.quantization.fake_quant": ("abdolrashidi2021pareto",),
  "jaxreg.quantization.integer": ("jacob2018quantization", "abdolrashidi2021pareto"),
  "jaxreg.quantization.integer.aqt_dot_general": ("lew2022aqt",),
  "jaxreg.quantization.integer.integer_dot": ("jacob2018quantization", "lew2022aqt"),
  "jaxreg.quantization.layers": ("abdolrashidi2021pareto",),
  "jaxreg.models.quant_resnet.quant_resnet": ("abdolrashidi2021pareto", "he2016deep"),
  "jaxreg.metrics.pareto": ("abdolrashidi2021pareto",),
  "jaxreg.quantization.straight_through": ("abdolrashidi2021pareto",),
  "jaxreg.quantization.straight_through.straight_through_value": ("bengio2013estimating",),
  "jaxreg.quantization.elastic": ("xu2023eqnet",),
  "jaxreg.quantization.elastic_config": ("xu2023eqnet",),
  "jaxreg.quantization.elastic_quantizer": ("xu2023eqnet",),
  "jaxreg.quantization.elastic_config.config_variables": (),
  "jaxreg.quantization.elastic_config.ElasticLayer": (),
  "jaxreg.quantization.elastic_config.elastic_layers": (),
  "jaxreg.quantization.elastic_quantizer.lsq_quantize": ("xu2023eqnet", "esser2020learned"),
  "jaxreg.quantization.search": ("xu2023eqnet",),
  "jaxreg.pruning.compaction": ("refael2022learning",),
  "jaxreg.regularizers.group_sparsity": ("refael2022learning",),
  "jaxreg.regularizers.groups": ("refael2022learning",),
  "jaxreg.regularizers.groups.group_ids": ("wen2016learning",),
  "jaxreg.regularizers.group_sparsity.group_lasso": ("yuan2006model",),
  "jaxreg.regularizers.group_sparsity.prox_group_lasso": ("yuan2006model", "parikh2014proximal"),
  "jaxreg.regularizers.groups.resolve_groups": (),
  "jaxreg.regularizers.groups.scale_groups": (),
  "jaxreg.regularizers.groups.sum_groups": (),
  "jaxreg.regularizers.group_sparsity.wgsef": ("refael2022learning", "beck2022sparse"),
  "jaxreg.regularizers.orthogonal_conv": ("achour2022existence", "wang2020orthogonal"),
  "jaxreg.regularizers.orthogonal_conv.orthogonal_conv_defect_norm": ("wang2020orthogonal",),
  "jaxreg.regularizers.orthogonal_conv.orthogonal_dense_penalty": ("wang2020orthogonal",),
  "jaxreg.regularizers.unsquared_norm": ("borup2021teacher",),
  "jaxreg.regularizers.weight_distribution": ("xu2023eqnet",),
  "jaxreg.solvers.conjugate_directions": ("kaneda2023deep",),
  "jaxreg.solvers.lanczos": ("lanczos1950iteration",),
  "jaxreg.solvers.lanczos.ritz_right_hand_sides": ("kaneda2023deep",),
  "jaxreg.solvers.poisson": (),
  "jaxreg.solvers.adversarial_mdp": ("dai2023refined",),
  "jaxreg.solvers.adversarial_mdp.LinearMDP": ("jin2020provably",),
  "jaxreg.solvers.adversarial_mdp.best_policy_in_hindsight": (),
  "jaxreg.solvers.adversarial_mdp.exact_visits": (),
  "jaxreg.solvers.adversarial_mdp.linear_mdp": ("jin2020provably",),
  "jaxreg.solvers.adversarial_mdp.occupancy": (),
  "jaxreg.solvers.adversarial_mdp.policy_values": (),
  "jaxreg.solvers.adversarial_mdp.simulated_visits": (),
  "jaxreg.solvers.follow_the_regularized_leader": ("dai2023refined",),
  "jaxreg.solvers.linear_q_estimation": ("dai2023refined",),
  "jaxreg.solvers.linear_q_estimation.dilated_bonus": ("luo2021policy", "dai2023refined"),
  "jaxreg.solvers.linear_q_estimation.matrix_geometric_resampling": ("neu2020efficient",),
  "jaxreg.solvers.linear_q_estimation.quadratic_bonus": ("luo2021policy", "dai2023refined"),
  "jaxreg.solvers.projections": ("kyrillidis2013sparse",),
  "jaxreg.solvers.adaptive_sampling": ("tang2024adversarial",),
  "jaxreg.solvers.adaptive_sampling.das_cross_entropy_loss": ("tang2023das",),
  "jaxreg.solvers.adaptive_sampling.laplacian": (),
  "jaxreg.solvers.adaptive_sampling.log_density_and_score": (),
  "jaxreg.solvers.adaptive_sampling.normalize_squared_residuals": (),
  "jaxreg.solvers.adaptive_sampling.sample_in_box": ("tang2023das",),
  "jaxreg.solvers.adaptive_sampling.tanh_network_derivatives": ("li2024forward",),
  "jaxreg.solvers.peak_equations": ("tang2023das",),
  "jaxreg.solvers.peak_equations.cubic_peak_equation": ("tang2024adversarial",),
  "jaxreg.solvers.self_tuning": ("mackay2019selftuning",),
  "jaxreg.solvers.solver_cost": ("pal2021opening",),
  "jaxreg.solvers.sparse_transport": ("liu2023sparsity",),
  "jaxreg.solvers.taylor_regularization": ("kelly2020learning",),
  "jaxreg.transforms.orthogonal_gradient": ("prieto2025grokking",),
  "jaxreg.transforms.penalize": ("loshchilov2019decoupled",),
  "jaxreg.transforms.proximal": ("parikh2014proximal",),
  "jaxreg.transforms.proximal.half_space_projection": ("dai2023adaptive",),
  "jaxreg.transforms.weight_compander": ("cakaj2023weight",),
}

_NEURIPS = "Advances in Neural Information Processing Systems"
_ICML = "International Conference on Machine Learning"
_ICLR = "International Conference on Learning Representations"


def _paper(author, title, venue, year, **more):
  return "inproceedings", {"author": author, "title": title, "booktitle": venue, "year": year, **more}


def _article(author, title, journal, year, **more):
  return "article", {"author": author, "title": title, "journal": journal, "year": year, **more}


_ENTRIES = {
  "jaxreg": (
    "software",
    {"title": "jaxreg: published methods of loss design and regularization for {JAX}", "year": 2026},
  ),
  "anderson2003introduction": (
    "book",
    {
      "author": "Anderson, Theodore W.",
      "title": "An Introduction to Multivariate Statistical Analysis",
      "publisher": "Wiley",
      "edition": "3rd",
      "year": 2003,
    },
  ),
  "achour2022existence": _article(
    "Achour, El Mehdi and Malgouyres, Fran{\\c{c}}ois and Mamalet, Franck",
    "Existence, Stability and Scalability of Orthogonal Convolutional Neural Networks",
    "Journal of Machine Learning Research",
    2022,
    volume=23,
  ),
  "anil2019sorting": _paper(
    "Anil, Cem and Lucas, James and Grosse, Roger", "Sorting out {Lipschitz} Function Approximation", _ICML, 2019
  ),
  "elkerdawy2022fire": _paper(
    "Elkerdawy, Sara and Elhoushi, Mostafa and Zhang, Hong and Ray, Nilanjan",
    "Fire Together Wire Together: A Dynamic Pruning Approach with Self-Supervised Mask Prediction",
    "IEEE/CVF Conference on Computer Vision and Pattern Recognition",
    2022,
  ),
  "sedghi2019singular": _paper(
    "Sedghi, Hanie and Gupta, Vineet and Long, Philip M.", "The Singular Values of Convolutional Layers", _ICLR, 2019
  ),
  "tsuzuku2018lipschitz": _paper(
    "Tsuzuku, Yusuke and Sato, Issei and Sugiyama, Masashi",
    "{Lipschitz}-Margin Training: Scalable Certification of Perturbation Invariance for Deep Neural Networks",
    _NEURIPS,
    2018,
  ),
  "wang2020orthogonal": _paper(
    "Wang, Jiayun and Chen, Yubei and Chakraborty, Rudrasis and Yu, Stella X.",
    "Orthogonal Convolutional Neural Networks",
    "IEEE/CVF Conference on Computer Vision and Pattern Recognition",
    2020,
  ),
  "abdolrashidi2021pareto": _paper(
    "Abdolrashidi, AmirAli and Wang, Lisa and Agrawal, Shivani and Malmaud, Jonathan and Rybakov, Oleg and "
    "Leichner, Chas and Lew, Lukasz",
    "{Pareto}-Optimal Quantized {ResNet} Is Mostly 4-bit",
    "IEEE/CVF Conference on Computer Vision and Pattern Recognition Workshops",
    2021,
  ),
  "bengio2013estimating": _article(
    "Bengio, Yoshua and L{\\'e}onard, Nicholas and Courville, Aaron",
    "Estimating or Propagating Gradients Through Stochastic Neurons for Conditional Computation",
    "arXiv:1308.3432",
    2013,
  ),
  "jacob2018quantization": _paper(
    "Jacob, Benoit and Kligys, Skirmantas and Chen, Bo and Zhu, Menglong and Tang, Matthew and Howard, Andrew and "
    "Adam, Hartwig and Kalenichenko, Dmitry",
    "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference",
    "IEEE/CVF Conference on Computer Vision and Pattern Recognition",
    2018,
  ),
  "jin2020provably": _paper(
    "Jin, Chi and Yang, Zhuoran and Wang, Zhaoran and Jordan, Michael I.",
    "Provably Efficient Reinforcement Learning with Linear Function Approximation",
    "Conference on Learning Theory",
    2020,
    volume=125,
  ),
  "kelly2020learning": _paper(
    "Kelly, Jacob and Bettencourt, Jesse and Johnson, Matthew James and Duvenaud, David",
    "Learning Differential Equations that are Easy to Solve",
    _NEURIPS,
    2020,
    volume=33,
  ),
  "kingma2018glow": _paper(
    "Kingma, Diederik P. and Dhariwal, Prafulla",
    "Glow: Generative Flow with Invertible 1x1 Convolutions",
    _NEURIPS,
    2018,
  ),
  "tang2020deep": _article(
    "Tang, Kejun and Wan, Xiaoliang and Liao, Qifeng",
    "Deep Density Estimation via Invertible Block-Triangular Mapping",
    "Theoretical and Applied Mechanics Letters",
    2020,
  ),
  "li2024forward": _article(
    "Li, Ruichen and Ye, Haotian and Jiang, Du and Wen, Xuelan and Wang, Chuwei and Li, Zhe and Li, Xiang and He, Di"
    " and Chen, Ji and Ren, Weiluo and Wang, Liwei",
    "A Computational Framework for Neural Network-Based Variational {Monte Carlo} with Forward {Laplacian}",
    "Nature Machine Intelligence",
    2024,
  ),
  "tang2023das": _article(
    "Tang, Kejun and Wan, Xiaoliang and Yang, Chao",
    "{DAS-PINNs}: A Deep Adaptive Sampling Method for Solving High-Dimensional Partial Differential Equations",
    "Journal of Computational Physics",
    2023,
  ),
  "tang2024adversarial": _paper(
    "Tang, Kejun and Zhai, Jiayu and Wan, Xiaoliang and Yang, Chao",
    "Adversarial Adaptive Sampling: Unify {PINN} and Optimal Transport for the Approximation of {PDEs}",
    _ICLR,
    2024,
  ),
  "wan2021augmented": _article(
    "Wan, Xiaoliang and Tang, Kejun",
    "Augmented {KRnet} for Density Estimation and Approximation",
    "arXiv:2105.12866",
    2021,
  ),
  "devries2017improved": _article(
    "DeVries, Terrance and Taylor, Graham W.",
    "Improved Regularization of Convolutional Neural Networks with Cutout",
    "arXiv:1708.04552",
    2017,
  ),
  "krizhevsky2012imagenet": _paper(
    "Krizhevsky, Alex and Sutskever, Ilya and Hinton, Geoffrey E.",
    "{ImageNet} Classification with Deep Convolutional Neural Networks",
    _NEURIPS,
    2012,
  ),
  "mackay2019selftuning": _paper(
    "MacKay, Matthew and Vicol, Paul and Lorraine, Jonathan and Duvenaud, David and Grosse, Roger",
    "Self-Tuning Networks: Bilevel Optimization of Hyperparameters using Structured Best-Response Functions",
    _ICLR,
    2019,
  ),
  "srivastava2014dropout": _article(
    "Srivastava, Nitish and Hinton, Geoffrey and Krizhevsky, Alex and Sutskever, Ilya and Salakhutdinov, Ruslan",
    "Dropout: A Simple Way to Prevent Neural Networks from Overfitting",
    "Journal of Machine Learning Research",
    2014,
  ),
  "krishnamoorthi2018quantizing": _article(
    "Krishnamoorthi, Raghuraman",
    "Quantizing deep convolutional networks for efficient inference: A whitepaper",
    "arXiv:1806.08342",
    2018,
  ),
  "lew2022aqt": (
    "software",
    {
      "author": "Lew, Lukasz and Feinberg, Vlad and Agrawal, Shivani and Lee, Jihwan and Malmaud, Jonathan and "
      "Wang, Lisa and Dormiani, Pouya and Pope, Reiner",
      "title": "{AQT}: Accurate Quantized Training",
      "url": "https://github.com/google/aqt",
      "year": 2022,
    },
  ),
  "bartlett2006convexity": _article(
    "Bartlett, Peter L. and Jordan, Michael I. and McAuliffe, Jon D.",
    "Convexity, Classification, and Risk Bounds",
    "Journal of the American Statistical Association",
    2006,
    volume=101,
  ),
  "beck2022sparse": _article(
    "Beck, Amir and Refael, Yehonathan",
    "Sparse Regularization via Bidualization",
    "Journal of Global Optimization",
    2022,
  ),
  "berthelot2019mixmatch": _paper(
    "Berthelot, David and Carlini, Nicholas and Goodfellow, Ian and Papernot, Nicolas and Oliver, Avital"
    " and Raffel, Colin",
    "{MixMatch}: A Holistic Approach to Semi-Supervised Learning",
    _NEURIPS,
    2019,
  ),
  "brodersen2010balanced": _paper(
    "Brodersen, Kay Henning and Ong, Cheng Soon and Stephan, Klaas Enno and Buhmann, Joachim M.",
    "The Balanced Accuracy and Its Posterior Distribution",
    "International Conference on Pattern Recognition",
    2010,
  ),
  "cakaj2023weight": _paper(
    "Cakaj, Rinor and Mehnert, Jens and Yang, Bin",
    "Weight Compander: A Simple Weight Reparameterization for Regularization",
    "International Joint Conference on Neural Networks",
    2023,
  ),
  "chan1983algorithms": _article(
    "Chan, Tony F. and Golub, Gene H. and LeVeque, Randall J.",
    "Algorithms for Computing the Sample Variance: Analysis and Recommendations",
    "The American Statistician",
    1983,
    volume=37,
  ),
  "abramowitz1964handbook": (
    "book",
    {
      "author": "Abramowitz, Milton and Stegun, Irene A.",
      "title": "Handbook of Mathematical Functions",
      "publisher": "National Bureau of Standards",
      "year": 1964,
    },
  ),
  "boopathy2024exact": _paper(
    "Boopathy, Akhilan and Yue, William and Hwang, Jaedong and Iyer, Abhiram and Fiete, Ila",
    "Towards Exact Computation of Inductive Bias",
    "International Joint Conference on Artificial Intelligence",
    2024,
  ),
  "efron1993introduction": (
    "book",
    {
      "author": "Efron, Bradley and Tibshirani, Robert J.",
      "title": "An Introduction to the Bootstrap",
      "publisher": "Chapman and Hall",
      "year": 1993,
    },
  ),
  "johnson1995continuous": (
    "book",
    {
      "author": "Johnson, Norman L. and Kotz, Samuel and Balakrishnan, N.",
      "title": "Continuous Univariate Distributions, Volume 2",
      "publisher": "Wiley",
      "edition": "2nd",
      "year": 1995,
    },
  ),
  "lugannani1980saddle": _article(
    "Lugannani, Robert and Rice, Stephen",
    "Saddle Point Approximation for the Distribution of the Sum of Independent Random Variables",
    "Advances in Applied Probability",
    1980,
    volume=12,
  ),
  "ruben1962probability": _article(
    "Ruben, Harold",
    "Probability Content of Regions Under Spherical Normal Distributions, {IV}: The Distribution of Homogeneous and"
    " Non-Homogeneous Quadratic Functions of Normal Variables",
    "Annals of Mathematical Statistics",
    1962,
    volume=33,
  ),
  "sankaran1963approximations": _article(
    "Sankaran, Munuswamy",
    "Approximations to the Non-Central Chi-Square Distribution",
    "Biometrika",
    1963,
    volume=50,
  ),
  "chizat2019lazy": _paper(
    "Chizat, L{\\'e}na{\\\"i}c and Oyallon, Edouard and Bach, Francis",
    "On Lazy Training in Differentiable Programming",
    _NEURIPS,
    2019,
  ),
  "crammer2001algorithmic": _article(
    "Crammer, Koby and Singer, Yoram",
    "On the Algorithmic Implementation of Multiclass Kernel-based Vector Machines",
    "Journal of Machine Learning Research",
    2001,
    volume=2,
  ),
  "dai2023refined": _paper(
    "Dai, Yan and Luo, Haipeng and Wei, Chen-Yu and Zimmert, Julian",
    "Refined Regret for Adversarial {MDPs} with Linear Function Approximation",
    _ICML,
    2023,
    volume=202,
  ),
  "dai2023adaptive": _article(
    "Dai, Yutong and Chen, Tianyi and Wang, Guanyi and Robinson, Daniel P.",
    "An Adaptive Half-Space Projection Method for Stochastic Optimization Problems with Group Sparse Regularization",
    "Transactions on Machine Learning Research",
    2023,
  ),
  "dai2025ensloss": _paper(
    "Dai, Ben",
    "{EnsLoss}: Stochastic Calibrated Loss Ensembles for Preventing Overfitting in Classification",
    _ICML,
    2025,
    volume=267,
  ),
  "debrebisson2016exploration": _paper(
    "de Br{\\'e}bisson, Alexandre and Vincent, Pascal",
    "An Exploration of Softmax Alternatives Belonging to the Spherical Loss Family",
    _ICLR,
    2016,
  ),
  "debrebisson2016zloss": _article(
    "de Br{\\'e}bisson, Alexandre and Vincent, Pascal",
    "The {Z}-loss: a shift and scale invariant classification loss belonging to the Spherical Family",
    "arXiv:1604.08859",
    2016,
  ),
  "englesson2021generalized": _paper(
    "Englesson, Erik and Azizpour, Hossein",
    "Generalized {Jensen-Shannon} Divergence Loss for Learning with Noisy Labels",
    _NEURIPS,
    2021,
  ),
  "esser2020learned": _paper(
    "Esser, Steven K. and McKinstry, Jeffrey L. and Bablani, Deepika and Appuswamy, Rathinakumar and Modha, Dharmendra "
    "S.",
    "Learned Step Size Quantization",
    _ICLR,
    2020,
  ),
  "ghosh2017robust": _paper(
    "Ghosh, Aritra and Kumar, Himanshu and Sastry, P. S.",
    "Robust Loss Functions under Label Noise for Deep Neural Networks",
    "AAAI Conference on Artificial Intelligence",
    2017,
  ),
  "goodfellow2015explaining": _paper(
    "Goodfellow, Ian J. and Shlens, Jonathon and Szegedy, Christian",
    "Explaining and Harnessing Adversarial Examples",
    _ICLR,
    2015,
  ),
  "hanley1982meaning": _article(
    "Hanley, James A. and McNeil, Barbara J.",
    "The Meaning and Use of the Area under a Receiver Operating Characteristic ({ROC}) Curve",
    "Radiology",
    1982,
    volume=143,
  ),
  "kumar2024grokking": _paper(
    "Kumar, Tanishq and Bordelon, Blake and Gershman, Samuel J. and Pehlevan, Cengiz",
    "Grokking as the Transition from Lazy to Rich Training Dynamics",
    _ICLR,
    2024,
  ),
  "lapin2015topk": _paper(
    "Lapin, Maksim and Hein, Matthias and Schiele, Bernt", "Top-k Multiclass {SVM}", _NEURIPS, 2015
  ),
  "lin2017focal": _paper(
    "Lin, Tsung-Yi and Goyal, Priya and Girshick, Ross and He, Kaiming and Dollar, Piotr",
    "Focal Loss for Dense Object Detection",
    "IEEE International Conference on Computer Vision",
    2017,
  ),
  "liu1989limited": _article(
    "Liu, Dong C. and Nocedal, Jorge",
    "On the Limited Memory {BFGS} Method for Large Scale Optimization",
    "Mathematical Programming",
    1989,
    volume=45,
  ),
  "liu2020early": _paper(
    "Liu, Sheng and Niles-Weed, Jonathan and Razavian, Narges and Fernandez-Granda, Carlos",
    "Early-Learning Regularization Prevents Memorization of Noisy Labels",
    _NEURIPS,
    2020,
  ),
  "loshchilov2019decoupled": _paper(
    "Loshchilov, Ilya and Hutter, Frank", "Decoupled Weight Decay Regularization", _ICLR, 2019
  ),
  "ma2020normalized": _paper(
    "Ma, Xingjun and Huang, Hanxun and Wang, Yisen and Romano, Simone and Erfani, Sarah and Bailey, James",
    "Normalized Loss Functions for Deep Learning with Noisy Labels",
    _ICML,
    2020,
  ),
  "madry2018towards": _paper(
    "Madry, Aleksander and Makelov, Aleksandar and Schmidt, Ludwig and Tsipras, Dimitris and Vladu, Adrian",
    "Towards Deep Learning Models Resistant to Adversarial Attacks",
    _ICLR,
    2018,
  ),
  "mao2023crossentropy": _paper(
    "Mao, Anqi and Mohri, Mehryar and Zhong, Yutao",
    "Cross-Entropy Loss Functions: Theoretical Analysis and Applications",
    _ICML,
    2023,
  ),
  "luo2021policy": _paper(
    "Luo, Haipeng and Wei, Chen-Yu and Lee, Chung-Wei",
    "Policy Optimization in Adversarial {MDPs}: Improved Exploration via Dilated Bonuses",
    _NEURIPS,
    2021,
    volume=34,
  ),
  "neu2020efficient": _paper(
    "Neu, Gergely and Olkhovskaya, Julia",
    "Efficient and Robust Algorithms for Adversarial Linear Contextual Bandits",
    "Conference on Learning Theory",
    2020,
    volume=125,
  ),
  "pal2021opening": _paper(
    "Pal, Avik and Ma, Yingbo and Shah, Viral and Rackauckas, Christopher V.",
    "Opening the Blackbox: Accelerating Neural Differential Equations by Regularizing Internal Solver Heuristics",
    _ICML,
    2021,
    volume=139,
  ),
  "parikh2014proximal": _article(
    "Parikh, Neal and Boyd, Stephen", "Proximal Algorithms", "Foundations and Trends in Optimization", 2014, volume=1
  ),
  "patel2021memorization": _paper(
    "Patel, Deep and Sastry, P. S.",
    "Memorization in Deep Neural Networks: Does the Loss Function Matter?",
    "Pacific-Asia Conference on Knowledge Discovery and Data Mining",
    2021,
  ),
  "prieto2025grokking": _paper(
    "Prieto, Lucas and Barsbey, Melih and Mediano, Pedro A. M. and Birdal, Tolga",
    "Grokking at the Edge of Numerical Stability",
    _ICLR,
    2025,
  ),
  "refael2022learning": (
    "misc",
    {
      "author": "Refael, Yehonathan and Arbel, Iftach and Huleihel, Wasim",
      "title": "Learning k-Level Structured Sparse Neural Networks Using Group Envelope Regularization",
      "year": 2022,
      "eprint": "2212.12921",
      "archiveprefix": "arXiv",
    },
  ),
  "vincent2015efficient": _paper(
    "Vincent, Pascal and de Br{\\'e}bisson, Alexandre and Bouthillier, Xavier",
    "Efficient Exact Gradient Update for Training Deep Networks with Very Large Sparse Targets",
    _NEURIPS,
    2015,
  ),
  "wang2019symmetric": _paper(
    "Wang, Yisen and Ma, Xingjun and Chen, Zaiyi and Luo, Yuan and Yi, Jinfeng and Bailey, James",
    "Symmetric Cross Entropy for Robust Learning with Noisy Labels",
    "IEEE/CVF International Conference on Computer Vision",
    2019,
  ),
  "wen2016learning": _paper(
    "Wen, Wei and Wu, Chunpeng and Wang, Yandan and Chen, Yiran and Li, Hai",
    "Learning Structured Sparsity in Deep Neural Networks",
    _NEURIPS,
    2016,
  ),
  "weston1999support": _paper(
    "Weston, Jason and Watkins, Chris",
    "Support Vector Machines for Multi-class Pattern Recognition",
    "European Symposium on Artificial Neural Networks",
    1999,
  ),
  "xia2020partdependent": _paper(
    "Xia, Xiaobo and Liu, Tongliang and Han, Bo and Wang, Nannan and Gong, Mingming and Liu, Haifeng and Niu, Gang"
    " and Tao, Dacheng and Sugiyama, Masashi",
    "Part-dependent Label Noise: Towards Instance-dependent Label Noise",
    _NEURIPS,
    2020,
  ),
  "yuan2006model": _article(
    "Yuan, Ming and Lin, Yi",
    "Model Selection and Estimation in Regression with Grouped Variables",
    "Journal of the Royal Statistical Society: Series B",
    2006,
    volume=68,
  ),
  "zhang2018generalized": _paper(
    "Zhang, Zhilu and Sabuncu, Mert R.",
    "Generalized Cross Entropy Loss for Training Deep Neural Networks with Noisy Labels",
    _NEURIPS,
    2018,
  ),
  "zhang2018mixup": _paper(
    "Zhang, Hongyi and Cisse, Moustapha and Dauphin, Yann N. and Lopez-Paz, David",
    "mixup: Beyond Empirical Risk Minimization",
    _ICLR,
    2018,
  ),
  "zhang2019theoretically": _paper(
    "Zhang, Hongyang and Yu, Yaodong and Jiao, Jiantao and Xing, Eric P. and El Ghaoui, Laurent and Jordan, Michael I.",
    "Theoretically Principled Trade-off between Robustness and Accuracy",
    _ICML,
    2019,
    volume=97,
  ),
  "zoph2022stmoe": _article(
    "Zoph, Barret and Bello, Irwan and Kumar, Sameer and Du, Nan and Huang, Yanping and Dean, Jeff"
    " and Shazeer, Noam and Fedus, William",
    "{ST-MoE}: Designing Stable and Transferable Sparse Expert Models",
    "arXiv:2202.08906",
    2022,
  ),
  "zheng2023revisiting": _paper(
    "Zheng, Chenyu and Wu, Guoqiang and Bao, Fan and Cao, Yue and Li, Chongxuan and Zhu, Jun",
    "Revisiting Discriminative vs. Generative Classifiers: Theory and Implications",
    _ICML,
    2023,
    volume=202,
  ),
  "zhou2021asymmetric": _paper(
    "Zhou, Xiong and Liu, Xianming and Jiang, Junjun and Gao, Xin and Ji, Xiangyang",
    "Asymmetric Loss Functions for Learning with Noisy Labels",
    _ICML,
    2021,
  ),
  "zhu2023label": _paper(
    "Zhu, Dixian and Ying, Yiming and Yang, Tianbao",
    "Label Distributionally Robust Losses for Multi-class Classification: Consistency, Robustness and Adaptivity",
    _ICML,
    2023,
    volume=202,
  ),
  "dwork2014algorithmic": _article(
    "Dwork, Cynthia and Roth, Aaron",
    "The Algorithmic Foundations of Differential Privacy",
    "Foundations and Trends in Theoretical Computer Science",
    2014,
  ),
  "he2015delving": _paper(
    "He, Kaiming and Zhang, Xiangyu and Ren, Shaoqing and Sun, Jian",
    "Delving Deep into Rectifiers: Surpassing Human-Level Performance on {ImageNet} Classification",
    "International Conference on Computer Vision",
    2015,
  ),
  "he2016deep": _paper(
    "He, Kaiming and Zhang, Xiangyu and Ren, Shaoqing and Sun, Jian",
    "Deep Residual Learning for Image Recognition",
    "IEEE Conference on Computer Vision and Pattern Recognition",
    2016,
  ),
  "javanmard2024learning": _paper(
    "Javanmard, Adel and Chen, Lin and Mirrokni, Vahab and Badanidiyuru, Ashwinkumar and Fu, Gang",
    "Learning from Aggregate Responses: Instance Level versus Bag Level Loss Functions",
    _ICLR,
    2024,
  ),
  "borup2021teacher": _paper(
    "Borup, Kenneth and Andersen, Lars N.",
    "Even your Teacher Needs Guidance: Ground-Truth Targets Dampen Regularization Imposed by Self-Distillation",
    _NEURIPS,
    2021,
    volume=34,
  ),
  "cho2009kernel": _paper(
    "Cho, Youngmin and Saul, Lawrence K.", "Kernel Methods for Deep Learning", _NEURIPS, 2009, volume=22
  ),
  "han2024neural": _paper(
    "Han, Yinbin and Razaviyayn, Meisam and Xu, Renyuan",
    "Neural Network-Based Score Estimation in Diffusion Models: Optimization and Generalization",
    _ICLR,
    2024,
  ),
  "raskutti2014early": _article(
    "Raskutti, Garvesh and Wainwright, Martin J. and Yu, Bin",
    "Early Stopping and Non-parametric Regression: An Optimal Data-dependent Stopping Rule",
    "Journal of Machine Learning Research",
    2014,
    volume=15,
  ),
  "zagoruyko2016wide": _paper(
    "Zagoruyko, Sergey and Komodakis, Nikos", "Wide Residual Networks", "British Machine Vision Conference", 2016
  ),
  "arora2019exact": _paper(
    "Arora, Sanjeev and Du, Simon S. and Hu, Wei and Li, Zhiyuan and Salakhutdinov, Ruslan and Wang, Ruosong",
    "On Exact Computation with an Infinitely Wide Neural Net",
    _NEURIPS,
    2019,
  ),
  "daniely2016toward": _paper(
    "Daniely, Amit and Frostig, Roy and Singer, Yoram", "Toward Deeper Understanding of Neural Networks", _NEURIPS, 2016
  ),
  "devroye1998hilbert": _article(
    "Devroye, Luc and Gyorfi, Laszlo and Krzyzak, Adam",
    "The {Hilbert} Kernel Regression Estimate",
    "Journal of Multivariate Analysis",
    1998,
  ),
  "isserlis1918formula": _article(
    "Isserlis, Leon",
    "On a Formula for the Product-Moment Coefficient of any Order of a Normal Frequency Distribution in any "
    "Number of Variables",
    "Biometrika",
    1918,
  ),
  "jacot2018neural": _paper(
    "Jacot, Arthur and Gabriel, Franck and Hongler, Clement",
    "Neural Tangent Kernel: Convergence and Generalization in Neural Networks",
    _NEURIPS,
    2018,
  ),
  "koenigs1884recherches": _article(
    "Koenigs, Gabriel",
    "Recherches sur les integrales de certaines equations fonctionnelles",
    "Annales scientifiques de l'Ecole Normale Superieure",
    1884,
  ),
  "lanczos1950iteration": _article(
    "Lanczos, Cornelius",
    "An Iteration Method for the Solution of the Eigenvalue Problem of Linear Differential and Integral Operators",
    "Journal of Research of the National Bureau of Standards",
    1950,
  ),
  "lee2018deep": _paper(
    "Lee, Jaehoon and Bahri, Yasaman and Novak, Roman and Schoenholz, Samuel S. and Pennington, Jeffrey and "
    "Sohl-Dickstein, Jascha",
    "Deep Neural Networks as {Gaussian} Processes",
    _ICLR,
    2018,
  ),
  "lee2019wide": _paper(
    "Lee, Jaehoon and Xiao, Lechao and Schoenholz, Samuel S. and Bahri, Yasaman and Novak, Roman and "
    "Sohl-Dickstein, Jascha and Pennington, Jeffrey",
    "Wide Neural Networks of Any Depth Evolve as Linear Models Under Gradient Descent",
    _NEURIPS,
    2019,
  ),
  "kaneda2023deep": _paper(
    "Kaneda, Ayano and Akar, Osman and Chen, Jingyu and Kala, Victoria Alicia Trevino and Hyde, David and "
    "Teran, Joseph",
    "A Deep Conjugate Direction Method for Iteratively Solving Linear Systems",
    _ICML,
    2023,
  ),
  "kyrillidis2013sparse": _paper(
    "Kyrillidis, Anastasios and Becker, Stephen and Cevher, Volkan and Koch, Christoph",
    "Sparse Projections onto the Simplex",
    _ICML,
    2013,
  ),
  "liu2023sparsity": _paper(
    "Liu, Tianlin and Puigcerver, Joan and Blondel, Mathieu", "Sparsity-Constrained Optimal Transport", _ICLR, 2023
  ),
  "novak2019bayesian": _paper(
    "Novak, Roman and Xiao, Lechao and Bahri, Yasaman and Lee, Jaehoon and Yang, Greg and Hron, Jiri and "
    "Abolafia, Daniel A. and Pennington, Jeffrey and Sohl-Dickstein, Jascha",
    "Bayesian Deep Convolutional Networks with Many Channels are {Gaussian} Processes",
    _ICLR,
    2019,
  ),
  "novak2020neural": _paper(
    "Novak, Roman and Xiao, Lechao and Hron, Jiri and Lee, Jaehoon and Alemi, Alexander A. and Sohl-Dickstein, "
    "Jascha and Schoenholz, Samuel S.",
    "Neural Tangents: Fast and Easy Infinite Neural Networks in {Python}",
    _ICLR,
    2020,
  ),
  "novak2022fast": _paper(
    "Novak, Roman and Sohl-Dickstein, Jascha and Schoenholz, Samuel S.",
    "Fast Finite Width Neural Tangent Kernel",
    _ICML,
    2022,
  ),
  "radhakrishnan2023wide": _article(
    "Radhakrishnan, Adityanarayanan and Belkin, Mikhail and Uhler, Caroline",
    "Wide and Deep Neural Networks Achieve Optimality for Classification",
    "Proceedings of the National Academy of Sciences",
    2023,
  ),
  "rahimi2007random": _paper(
    "Rahimi, Ali and Recht, Benjamin", "Random Features for Large-Scale Kernel Machines", _NEURIPS, 2007
  ),
  "sohldickstein2020infinite": _article(
    "Sohl-Dickstein, Jascha and Novak, Roman and Schoenholz, Samuel S. and Lee, Jaehoon",
    "On the Infinite Width Limit of Neural Networks with a Standard Parameterization",
    "arXiv:2001.07301",
    2020,
  ),
  "tsuchida2021avoiding": _paper(
    "Tsuchida, Russell and Pearce, Tim and van der Heide, Chris and Roosta, Fred and Gallagher, Marcus",
    "Avoiding Kernel Fixed Points: Computing with {ELU} and {GELU} Infinite Networks",
    "AAAI Conference on Artificial Intelligence",
    2021,
  ),
  "williams1996computing": _paper("Williams, Christopher K. I.", "Computing with Infinite Networks", _NEURIPS, 1996),
  "xu2023eqnet": _paper(
    "Xu, Ke and Han, Lei and Tian, Ye and Yang, Shangshang and Zhang, Xingyi",
    "{EQ-Net}: Elastic Quantization Neural Networks",
    "International Conference on Computer Vision",
    2023,
  ),
  "yang2017mean": _paper(
    "Yang, Greg and Schoenholz, Samuel S.", "Mean Field Residual Networks: On the Edge of Chaos", _NEURIPS, 2017
  ),
}
