"""The references of the ingredients that a program uses, as BibTeX."""

import functools
import importlib.resources
import inspect
import re
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
  return "\n\n".join(_entries()[key] for key in dict.fromkeys(keys))


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


@functools.cache
def _entries() -> dict[str, str]:
  """The entries of `references.bib` by their keys; an empty line stands between two of them."""
  text = importlib.resources.files("jaxreg").joinpath("references.bib").read_text(encoding="utf-8")
  return {re.match(r"@\w+{(\w+),", entry)[1]: entry for entry in text.strip().split("\n\n")}


# Modules first, then those of their functions that have references of their own; () where there is nothing to cite.
REFERENCES = {
  "jaxreg.adversarial.attacks.fgsm": ("goodfellow2015explaining",),
  "jaxreg.adversarial.attacks.pgd": ("madry2018towards",),
  "jaxreg.adversarial.attacks.pgd_survival": ("zhang2021geometry",),
  "jaxreg.adversarial.barrier": ("sow2024doubly",),
  "jaxreg.adversarial.barrier.fast_bat_loss": ("zhang2022revisiting",),
  "jaxreg.adversarial.boundary": ("tanay2016boundary", "tanay2018angle"),
  "jaxreg.adversarial.crafted_domain": ("shin2024unknown",),
  "jaxreg.adversarial.crafted_domain.craft_style": ("zhong2022adversarial", "shin2024unknown"),
  "jaxreg.adversarial.linear_path": ("tanay2018angle", "ferris2002interior"),
  "jaxreg.adversarial.objectives.dlr_objective": ("croce2020reliable",),
  "jaxreg.adversarial.objectives.margin_objective": ("carlini2017towards",),
  "jaxreg.adversarial.reweighting": ("sow2024doubly",),
  "jaxreg.adversarial.reweighting.gairat_weights": ("zhang2021geometry",),
  "jaxreg.adversarial.reweighting.mail_weights": ("wang2021probabilistic",),
  "jaxreg.adversarial.strong_attacks": ("croce2020reliable",),
  "jaxreg.adversarial.strong_attacks.random_search_attack": ("andriushchenko2020square",),
  "jaxreg.adversarial.wasserstein": ("saberi2024outofdomain", "sinha2018certifying"),
  "jaxreg.data.aggregation": ("javanmard2024learning",),
  "jaxreg.data.aggregation.gaussian_private_bag_means": ("dwork2014algorithmic",),
  "jaxreg.data.aggregation.laplace_private_bag_means": ("javanmard2024learning", "dwork2014algorithmic"),
  "jaxreg.data.algorithmic": ("prieto2025grokking",),
  "jaxreg.data.environments.colored_digits": ("arjovsky2019invariant",),
  "jaxreg.data.environments.imbalanced_environments": ("hemati2023understanding",),
  "jaxreg.data.environments.rotate_images": ("ghifary2015domain",),
  "jaxreg.data.environments.rotated_environments": ("ghifary2015domain",),
  "jaxreg.data.gaussian_mixtures": ("zheng2023revisiting",),
  "jaxreg.data.gaussian_mixtures.gaussian_mixture": (),
  "jaxreg.data.gaussian_mixtures.gaussian_mixture_bayes_error": ("anderson2003introduction",),
  "jaxreg.data.mixing": ("zhang2018mixup", "berthelot2019mixmatch"),
  "jaxreg.data.noise": (),
  "jaxreg.data.noise.instance_dependent_noise": ("xia2020partdependent",),
  "jaxreg.denoising.posterior_mean": ("han2024neural",),
  "jaxreg.kernels.bagged_regression": ("javanmard2024learning",),
  "jaxreg.kernels.bandwidths.median_bandwidth": ("garreau2017large",),
  "jaxreg.kernels.bandwidths.silverman_bandwidth": ("silverman1986density",),
  "jaxreg.kernels.bandwidths.ten_median_square_bandwidth": ("yu2024cauchy",),
  "jaxreg.kernels.committee_machine": ("kumar2024grokking",),
  "jaxreg.kernels.convolutional": ("novak2019bayesian",),
  "jaxreg.kernels.convolutional.convolution": ("arora2019exact",),
  "jaxreg.kernels.convolutional.image_patches": ("arora2019exact",),
  "jaxreg.kernels.deep_limits": ("radhakrishnan2023wide",),
  "jaxreg.kernels.deep_limits.koenigs": ("radhakrishnan2023wide", "koenigs1884recherches"),
  "jaxreg.kernels.deep_limits.singularity_exponent": ("radhakrishnan2023wide", "devroye1998hilbert"),
  "jaxreg.kernels.deep_limits.sphere_complement": (),
  "jaxreg.kernels.deep_votes": ("radhakrishnan2023wide",),
  "jaxreg.kernels.deep_votes.hilbert_vote": ("devroye1998hilbert",),
  "jaxreg.kernels.dirichlet_classes": ("radhakrishnan2023wide",),
  "jaxreg.kernels.dual_activations": ("cho2009kernel",),
  "jaxreg.kernels.dual_activations.DualActivation": (),
  "jaxreg.kernels.dual_activations.cosine_dual": ("rahimi2007random",),
  "jaxreg.kernels.dual_activations.erf_dual": ("williams1996computing",),
  "jaxreg.kernels.dual_activations.exponential_dual": ("daniely2016toward",),
  "jaxreg.kernels.dual_activations.gaussian_dual": ("williams1996computing",),
  "jaxreg.kernels.dual_activations.gelu_dual": ("tsuchida2021avoiding",),
  "jaxreg.kernels.dual_activations.hermite_activation": ("radhakrishnan2023wide",),
  "jaxreg.kernels.dual_activations.hermite_dual": ("daniely2016toward",),
  "jaxreg.kernels.dual_activations.monomial_dual": ("isserlis1918formula",),
  "jaxreg.kernels.dual_activations.normalize_dual": ("daniely2016toward",),
  "jaxreg.kernels.dual_activations.numerical_dual": ("daniely2016toward",),
  "jaxreg.kernels.dual_activations.sine_dual": ("rahimi2007random",),
  "jaxreg.kernels.empirical": ("novak2022fast",),
  "jaxreg.kernels.gradient_flow": ("lee2019wide",),
  "jaxreg.kernels.gradient_flow.Eigensystem": (),
  "jaxreg.kernels.gradient_flow.class_targets": ("lee2018deep",),
  "jaxreg.kernels.gradient_flow.kernel_classify": ("radhakrishnan2023wide",),
  "jaxreg.kernels.gradient_flow.kernel_eigensystem": (),
  "jaxreg.kernels.gradient_flow.kernel_regression": ("radhakrishnan2023wide",),
  "jaxreg.kernels.gram": ("novak2020neural",),
  "jaxreg.kernels.hypothesis_space": ("boopathy2024exact",),
  "jaxreg.kernels.hypothesis_space.inverted_inductive_bias": ("rice1980distribution",),
  "jaxreg.kernels.hypothesis_space.saddlepoint_inductive_bias": ("lugannani1980saddle",),
  "jaxreg.kernels.infinite_width": ("jacot2018neural",),
  "jaxreg.kernels.infinite_width.KernelState": (),
  "jaxreg.kernels.infinite_width.activate": ("lee2019wide",),
  "jaxreg.kernels.infinite_width.add_states": (),
  "jaxreg.kernels.infinite_width.dense_standard": ("sohldickstein2020infinite",),
  "jaxreg.kernels.infinite_width.fully_connected_standard": ("sohldickstein2020infinite",),
  "jaxreg.kernels.infinite_width.input_state": ("lee2018deep",),
  "jaxreg.kernels.infinite_width.layer_norm": ("novak2020neural",),
  "jaxreg.kernels.infinite_width.residual": ("yang2017mean",),
  "jaxreg.kernels.lazy_rich_dmft": ("kumar2024grokking",),
  "jaxreg.kernels.lazy_training": ("kumar2024grokking",),
  "jaxreg.kernels.lazy_training.lazy_output": ("kumar2024grokking", "chizat2019lazy"),
  "jaxreg.kernels.linearization": ("lee2019wide",),
  "jaxreg.kernels.linearization.taylor_expand": ("novak2020neural",),
  "jaxreg.kernels.prediction": ("lee2019wide",),
  "jaxreg.kernels.prediction.Prediction": (),
  "jaxreg.kernels.prediction.largest_learning_rate": ("lee2019wide", "polyak1964some"),
  "jaxreg.kernels.prediction.nngp_posterior": ("lee2018deep",),
  "jaxreg.kernels.rbf": (),
  "jaxreg.kernels.score_kernels": ("han2024neural",),
  "jaxreg.kernels.score_kernels.early_stopping_step": ("han2024neural", "raskutti2014early"),
  "jaxreg.kernels.score_kernels.score_output_kernel": ("cho2009kernel",),
  "jaxreg.kernels.self_distillation": ("borup2021teacher",),
  "jaxreg.kernels.spectral_contrastive": ("xue2024investigating",),
  "jaxreg.kernels.wide_networks": ("novak2019bayesian",),
  "jaxreg.kernels.wide_networks.WideLayer": (),
  "jaxreg.kernels.wide_networks.monte_carlo_kernels": ("novak2019bayesian", "novak2020neural"),
  "jaxreg.kernels.wide_networks.network_kernel": ("novak2020neural",),
  "jaxreg.kernels.wide_networks.parallel": (),
  "jaxreg.kernels.wide_networks.serial": (),
  "jaxreg.kernels.wide_networks.wide_activation": ("lee2019wide",),
  "jaxreg.kernels.wide_networks.wide_convolution": ("arora2019exact",),
  "jaxreg.kernels.wide_networks.wide_dense": ("jacot2018neural",),
  "jaxreg.kernels.wide_networks.wide_identity": (),
  "jaxreg.layers.best_response": ("mackay2019selftuning",),
  "jaxreg.layers.cosine_head": ("gu2023class",),
  "jaxreg.layers.cosine_head.MultiHeadProjector": ("fini2021unified", "gu2023class"),
  "jaxreg.layers.cosine_head.normalize_prototypes": ("fini2021unified",),
  "jaxreg.layers.domain_heads": ("zhang2023domain",),
  "jaxreg.layers.dual_head": ("yang2025dualhead",),
  "jaxreg.layers.expert_router": ("liu2023sparsity",),
  "jaxreg.layers.factored_output": ("vincent2015efficient", "debrebisson2016zloss"),
  "jaxreg.layers.loop_conv": (),
  "jaxreg.layers.max_min_activation": ("anil2019sorting",),
  "jaxreg.layers.naive_bayes_head": ("zheng2023revisiting",),
  "jaxreg.layers.nested_dropout": ("chen2022compressing", "rippel2014learning"),
  "jaxreg.layers.nested_dropout.keep_leading_channels": ("rippel2014learning",),
  "jaxreg.layers.noise_mask": ("yavuz2024policy",),
  "jaxreg.layers.per_example_noise.per_example_color_jitter": ("krizhevsky2012imagenet",),
  "jaxreg.layers.per_example_noise.per_example_cutout": ("devries2017improved",),
  "jaxreg.layers.per_example_noise.per_example_dropout": ("srivastava2014dropout",),
  "jaxreg.layers.per_example_noise.per_example_scale_noise": ("mackay2019selftuning",),
  "jaxreg.layers.projection_head": ("xue2024investigating",),
  "jaxreg.layers.projection_head.MLPProjectionHead": ("chen2020simple", "xue2024investigating"),
  "jaxreg.layers.weight_compander": ("cakaj2023weight",),
  "jaxreg.layers.weight_compander.Curve": (),
  "jaxreg.losses.active_passive.asymmetric_generalized_cross_entropy_loss": ("zhou2021asymmetric",),
  "jaxreg.losses.active_passive.asymmetric_unhinged_loss": ("zhou2021asymmetric",),
  "jaxreg.losses.active_passive.nce_agce_loss": ("zhou2021asymmetric", "ma2020normalized"),
  "jaxreg.losses.active_passive.nce_aul_loss": ("zhou2021asymmetric", "ma2020normalized"),
  "jaxreg.losses.active_passive.nce_rce_loss": ("ma2020normalized", "wang2019symmetric"),
  "jaxreg.losses.active_passive.normalized_cross_entropy_loss": ("ma2020normalized",),
  "jaxreg.losses.adversarial": ("mao2023crossentropy",),
  "jaxreg.losses.adversarial.trades_loss": ("zhang2019theoretically",),
  "jaxreg.losses.aggregate": ("javanmard2024learning",),
  "jaxreg.losses.binary_margin.binary_exponential_loss": ("bartlett2006convexity",),
  "jaxreg.losses.binary_margin.binary_focal_loss": ("lin2017focal",),
  "jaxreg.losses.binary_margin.binary_hinge_loss": ("bartlett2006convexity",),
  "jaxreg.losses.binary_margin.binary_logistic_loss": ("bartlett2006convexity",),
  "jaxreg.losses.binary_margin.binary_squared_hinge_loss": ("bartlett2006convexity",),
  "jaxreg.losses.calibrated_ensemble": ("dai2025ensloss",),
  "jaxreg.losses.calibrated_ensemble.is_calibrated_derivative": ("bartlett2006convexity", "dai2025ensloss"),
  "jaxreg.losses.cauchy_schwarz": ("yu2024cauchy",),
  "jaxreg.losses.cauchy_schwarz.squared_mmd": ("gretton2012kernel",),
  "jaxreg.losses.chunked.OutputLayer": (),
  "jaxreg.losses.chunked.chunked_comp_sum_loss": ("mao2023crossentropy",),
  "jaxreg.losses.chunked.chunked_ldr_kl_loss": ("zhu2023label",),
  "jaxreg.losses.chunked.chunked_stablemax_cross_entropy": ("prieto2025grokking",),
  "jaxreg.losses.class_relations": ("gu2023class",),
  "jaxreg.losses.comp_sum": ("mao2023crossentropy",),
  "jaxreg.losses.comp_sum.generalized_cross_entropy_loss": ("zhang2018generalized", "mao2023crossentropy"),
  "jaxreg.losses.comp_sum.truncated_generalized_cross_entropy_loss": ("zhang2018generalized",),
  "jaxreg.losses.distillation.binary_kl_loss": ("yang2025dualhead",),
  "jaxreg.losses.distillation.binary_kl_norm_loss": ("yang2025dualhead",),
  "jaxreg.losses.distillation.self_distillation_squared_loss": ("borup2021teacher",),
  "jaxreg.losses.distillation.softmax_kd_loss": ("hinton2015distilling",),
  "jaxreg.losses.domain_heads": ("zhang2023domain",),
  "jaxreg.losses.domain_heads.domain_mean": (),
  "jaxreg.losses.early_learning": ("liu2020early",),
  "jaxreg.losses.example_table": (),
  "jaxreg.losses.feature_bank": ("zhang2023domain",),
  "jaxreg.losses.h_consistency": ("mao2023crossentropy",),
  "jaxreg.losses.hinge.crammer_singer_loss": ("crammer2001algorithmic",),
  "jaxreg.losses.hinge.weston_watkins_loss": ("weston1999support",),
  "jaxreg.losses.label_dro": ("zhu2023label",),
  "jaxreg.losses.labelled_logits": (),
  "jaxreg.losses.refined_targets": ("kim2021self",),
  "jaxreg.losses.metric_learning": ("venkataramanan2022takes",),
  "jaxreg.losses.metric_learning.binomial_deviance_form": ("yi2014deep", "venkataramanan2022takes"),
  "jaxreg.losses.metric_learning.contrastive_form": ("hadsell2006dimensionality", "venkataramanan2022takes"),
  "jaxreg.losses.metric_learning.contrastive_loss": ("hadsell2006dimensionality", "venkataramanan2022takes"),
  "jaxreg.losses.metric_learning.lifted_structure_form": ("ohsong2016deep", "venkataramanan2022takes"),
  "jaxreg.losses.metric_learning.multi_similarity_form": ("wang2019multisimilarity",),
  "jaxreg.losses.metric_learning.multi_similarity_loss": ("wang2019multisimilarity",),
  "jaxreg.losses.metric_learning.nca_form": ("goldberger2004neighbourhood", "venkataramanan2022takes"),
  "jaxreg.losses.metric_learning.normalized_embeddings": (),
  "jaxreg.losses.metric_learning.proxy_anchor_form": ("kim2020proxy",),
  "jaxreg.losses.metric_learning.supcon_form": ("khosla2020supervised",),
  "jaxreg.losses.metric_learning.supcon_loss": ("khosla2020supervised",),
  "jaxreg.losses.metric_mixup": ("venkataramanan2022takes",),
  "jaxreg.losses.soft_labels": (),
  "jaxreg.losses.nested_dropout": ("chen2022compressing",),
  "jaxreg.losses.noise_mask": ("yavuz2024policy",),
  "jaxreg.losses.noise_mask.noise_mask_loss": ("yavuz2024policy", "williams1992simple"),
  "jaxreg.losses.progressive_guidance": ("xu2023eqnet",),
  "jaxreg.losses.small_loss": ("han2018coteaching",),
  "jaxreg.losses.scaled_residual": ("kaneda2023deep",),
  "jaxreg.losses.score_matching": ("han2024neural",),
  "jaxreg.losses.softmax_family": (),
  "jaxreg.losses.spectral_contrastive.spectral_contrastive_loss": ("haochen2021provable",),
  "jaxreg.losses.spectral_contrastive.spectral_population_loss": ("xue2024investigating",),
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
  "jaxreg.losses.swapped_prediction": ("caron2020unsupervised", "fini2021unified"),
  "jaxreg.losses.symmetric.brier_loss": ("ghosh2017robust",),
  "jaxreg.losses.symmetric.jensen_shannon_loss": ("englesson2021generalized",),
  "jaxreg.losses.symmetric.mean_absolute_error_loss": ("ghosh2017robust",),
  "jaxreg.losses.symmetric.reverse_cross_entropy_loss": ("wang2019symmetric",),
  "jaxreg.losses.symmetric.robust_log_loss": ("patel2021memorization",),
  "jaxreg.losses.symmetric.symmetric_cross_entropy_loss": ("wang2019symmetric",),
  "jaxreg.metrics.calibration.area_under_risk_coverage": ("geifman2019bias",),
  "jaxreg.metrics.calibration.brier_score": ("brier1950verification",),
  "jaxreg.metrics.calibration.excess_area_under_risk_coverage": ("geifman2019bias",),
  "jaxreg.metrics.calibration.expected_calibration_error": ("guo2017calibration",),
  "jaxreg.metrics.calibration.negative_log_likelihood": (),
  "jaxreg.losses.threshold_consistency": ("zhang2024threshold",),
  "jaxreg.metrics.classification.MemorizationFractions": ("liu2020early",),
  "jaxreg.metrics.classification.area_under_roc": ("hanley1982meaning",),
  "jaxreg.metrics.classification.balanced_top_k_accuracy": ("brodersen2010balanced",),
  "jaxreg.metrics.classification.memorization_fractions": ("liu2020early",),
  "jaxreg.metrics.classification.top_k_accuracy": ("lapin2015topk",),
  "jaxreg.metrics.classification.worst_classes_accuracy": ("sow2024doubly",),
  "jaxreg.metrics.classification.worst_group_accuracy": ("sagawa2020distributionally",),
  "jaxreg.metrics.clustering.SplitAccuracy": ("gu2023class",),
  "jaxreg.metrics.clustering.adjusted_rand_index": ("hubert1985comparing",),
  "jaxreg.metrics.clustering.cluster_accuracy": ("kuhn1955hungarian",),
  "jaxreg.metrics.clustering.normalized_mutual_information": ("vinh2010information",),
  "jaxreg.metrics.clustering.split_cluster_accuracy": ("gu2023class",),
  "jaxreg.metrics.conv_spectrum": ("achour2022existence",),
  "jaxreg.metrics.conv_spectrum.certified_radius": ("tsuzuku2018lipschitz",),
  "jaxreg.metrics.conv_spectrum.conv_singular_values": ("sedghi2019singular", "achour2022existence"),
  "jaxreg.metrics.gaussian_probe": ("zheng2023revisiting",),
  "jaxreg.metrics.gaussian_probe.empty_stats": (),
  "jaxreg.metrics.gaussian_probe.merge_stats": ("chan1983algorithms", "zheng2023revisiting"),
  "jaxreg.metrics.grokking": ("prieto2025grokking",),
  "jaxreg.metrics.inductive_bias": ("boopathy2024exact",),
  "jaxreg.metrics.inductive_bias.bootstrap_inductive_bias": ("efron1993introduction",),
  "jaxreg.metrics.inductive_bias.sankaran_inductive_bias": ("sankaran1963approximations", "boopathy2024exact"),
  "jaxreg.metrics.information_plane": ("yu2024cauchy",),
  "jaxreg.metrics.lazy_rich": ("kumar2024grokking",),
  "jaxreg.metrics.lazy_rich.relative_motion": ("kumar2024grokking", "chizat2019lazy"),
  "jaxreg.metrics.linear_probe": ("zheng2023revisiting",),
  "jaxreg.metrics.linear_probe.logistic_probe": ("nocedal2006numerical", "zheng2023revisiting"),
  "jaxreg.metrics.linear_probe.linear_probe_accuracy": ("xue2024investigating",),
  "jaxreg.metrics.linear_probe.minmax_scale": (),
  "jaxreg.metrics.linear_probe.probe_logits": (),
  "jaxreg.metrics.nested_cutoff": ("chen2022compressing",),
  "jaxreg.metrics.network_cost": ("abdolrashidi2021pareto",),
  "jaxreg.metrics.noncentral_chi2": ("johnson1995continuous", "abramowitz1964handbook"),
  "jaxreg.metrics.noncentral_chi2.log_gammainc": ("abramowitz1964handbook",),
  "jaxreg.metrics.pareto": ("abdolrashidi2021pareto",),
  "jaxreg.metrics.representation": ("roy2007effective",),
  "jaxreg.metrics.retrieval": ("zhang2024threshold",),
  "jaxreg.metrics.retrieval.mean_average_precision_at_r": ("musgrave2020metric",),
  "jaxreg.metrics.retrieval.r_precision": ("musgrave2020metric",),
  "jaxreg.metrics.retrieval.recall_at_k": ("jegou2011product",),
  "jaxreg.metrics.retrieval.utilization": ("venkataramanan2022takes",),
  "jaxreg.metrics.sample_complexity": ("zheng2023revisiting",),
  "jaxreg.metrics.weights.WeightMoments": ("xu2023eqnet",),
  "jaxreg.metrics.weights.WeightStats": ("cakaj2023weight",),
  "jaxreg.metrics.weights.he_deviation": ("he2015delving",),
  "jaxreg.metrics.weights.flax_kernel": (),
  "jaxreg.metrics.weights.input_axes": (),
  "jaxreg.metrics.weights.is_kernel": (),
  "jaxreg.metrics.weights.parameter_name": (),
  "jaxreg.metrics.weights.weight_moments": ("xu2023eqnet",),
  "jaxreg.metrics.weights.weight_stats": ("cakaj2023weight",),
  "jaxreg.models.direction_unet": ("kaneda2023deep",),
  "jaxreg.models.krnet": ("tang2023das",),
  "jaxreg.models.krnet.ActNorm": ("kingma2018glow", "tang2023das"),
  "jaxreg.models.krnet.AffineCoupling": ("tang2020deep",),
  "jaxreg.models.krnet.PiecewiseQuadraticCDF": ("wan2021augmented",),
  "jaxreg.models.mlp": (),
  "jaxreg.models.posterior_mean_mlp": ("han2024neural",),
  "jaxreg.models.quantized_resnet.quant_resnet": ("abdolrashidi2021pareto", "he2016deep"),
  "jaxreg.models.resnet.PreActivationResNet": ("he2016identity",),
  "jaxreg.models.resnet.ResNet": ("he2016deep",),
  "jaxreg.models.resnet.WideResNet": ("zagoruyko2016wide",),
  "jaxreg.models.shufflenet": ("ma2018shufflenet",),
  "jaxreg.pruning.compaction": ("refael2022learning",),
  "jaxreg.pruning.dynamic_pruning": ("elkerdawy2022fire",),
  "jaxreg.pruning.gathered": ("elkerdawy2022fire",),
  "jaxreg.pruning.gathered.gathered_sizes": (),
  "jaxreg.pruning.pruned_flops": ("elkerdawy2022fire",),
  "jaxreg.quantization.bounds": ("abdolrashidi2021pareto",),
  "jaxreg.quantization.bounds.per_tensor_bounds": ("krishnamoorthi2018quantizing",),
  "jaxreg.quantization.elastic": ("xu2023eqnet",),
  "jaxreg.quantization.elastic_config": ("xu2023eqnet",),
  "jaxreg.quantization.elastic_config.ElasticLayer": (),
  "jaxreg.quantization.elastic_config.config_variables": (),
  "jaxreg.quantization.elastic_config.elastic_layers": (),
  "jaxreg.quantization.elastic_quantizer": ("xu2023eqnet",),
  "jaxreg.quantization.elastic_quantizer.lsq_quantize": ("xu2023eqnet", "esser2020learned"),
  "jaxreg.quantization.fake_quant": ("abdolrashidi2021pareto",),
  "jaxreg.quantization.integer": ("jacob2018quantization", "abdolrashidi2021pareto"),
  "jaxreg.quantization.integer.aqt_dot_general": ("lew2022aqt",),
  "jaxreg.quantization.integer.integer_dot": ("jacob2018quantization", "lew2022aqt"),
  "jaxreg.quantization.layers": ("abdolrashidi2021pareto",),
  "jaxreg.quantization.post_training": (),
  "jaxreg.quantization.post_training.calibrate": ("krishnamoorthi2018quantizing",),
  "jaxreg.quantization.post_training.integer_variables": ("jacob2018quantization",),
  "jaxreg.quantization.qwix_provider": (),
  "jaxreg.quantization.search": ("xu2023eqnet",),
  "jaxreg.quantization.straight_through": ("abdolrashidi2021pareto",),
  "jaxreg.quantization.straight_through.straight_through_value": ("bengio2013estimating",),
  "jaxreg.regularizers.environment_penalties.coral_penalty": ("sun2016deep", "gulrajani2021search"),
  "jaxreg.regularizers.environment_penalties.environment_risks": (),
  "jaxreg.regularizers.environment_penalties.iga_penalty": ("koyama2020invariance",),
  "jaxreg.regularizers.environment_penalties.irm_penalty": ("arjovsky2019invariant",),
  "jaxreg.regularizers.environment_penalties.mmd_penalty": ("li2018domain", "gulrajani2021search"),
  "jaxreg.regularizers.environment_penalties.vrex_penalty": ("krueger2021out",),
  "jaxreg.regularizers.domain_inconsistency": ("shin2024unknown",),
  "jaxreg.regularizers.group_sparsity": ("refael2022learning",),
  "jaxreg.regularizers.group_sparsity.group_lasso": ("yuan2006model",),
  "jaxreg.regularizers.group_sparsity.prox_group_lasso": ("yuan2006model", "parikh2014proximal"),
  "jaxreg.regularizers.group_sparsity.wgsef": ("refael2022learning", "beck2022sparse"),
  "jaxreg.regularizers.groups": ("refael2022learning",),
  "jaxreg.regularizers.groups.group_ids": ("wen2016learning",),
  "jaxreg.regularizers.groups.resolve_groups": (),
  "jaxreg.regularizers.groups.scale_groups": (),
  "jaxreg.regularizers.groups.sum_groups": (),
  "jaxreg.regularizers.head_alignment": ("hemati2023understanding",),
  "jaxreg.regularizers.head_alignment.FishrState": ("rame2022fishr",),
  "jaxreg.regularizers.head_alignment.fishr_init": ("rame2022fishr",),
  "jaxreg.regularizers.head_alignment.fishr_penalty": ("rame2022fishr",),
  "jaxreg.regularizers.head_alignment.rademacher_probes": ("hutchinson1989stochastic",),
  "jaxreg.regularizers.linear_head": ("hemati2023understanding",),
  "jaxreg.regularizers.linear_head.head_gradient_square_norms": ("shin2024unknown",),
  "jaxreg.regularizers.linear_head.head_gradient_variance": ("rame2022fishr",),
  "jaxreg.regularizers.orthogonal_conv": ("achour2022existence", "wang2020orthogonal"),
  "jaxreg.regularizers.orthogonal_conv.orthogonal_conv_defect_norm": ("wang2020orthogonal",),
  "jaxreg.regularizers.orthogonal_conv.orthogonal_dense_penalty": ("wang2020orthogonal",),
  "jaxreg.regularizers.unsquared_norm": ("borup2021teacher",),
  "jaxreg.regularizers.weight_distribution": ("xu2023eqnet",),
  "jaxreg.solvers.adaptive_sampling": ("tang2024adversarial",),
  "jaxreg.solvers.adaptive_sampling.das_cross_entropy_loss": ("tang2023das",),
  "jaxreg.solvers.adaptive_sampling.laplacian": (),
  "jaxreg.solvers.adaptive_sampling.log_density_and_score": (),
  "jaxreg.solvers.adaptive_sampling.normalize_squared_residuals": (),
  "jaxreg.solvers.adaptive_sampling.sample_in_box": ("tang2023das",),
  "jaxreg.solvers.adaptive_sampling.tanh_network_derivatives": ("li2024forward",),
  "jaxreg.solvers.adversarial_mdp": ("dai2023refined",),
  "jaxreg.solvers.adversarial_mdp.LinearMDP": ("jin2020provably",),
  "jaxreg.solvers.adversarial_mdp.best_policy_in_hindsight": (),
  "jaxreg.solvers.adversarial_mdp.exact_visits": (),
  "jaxreg.solvers.adversarial_mdp.linear_mdp": ("jin2020provably",),
  "jaxreg.solvers.adversarial_mdp.occupancy": (),
  "jaxreg.solvers.adversarial_mdp.policy_values": (),
  "jaxreg.solvers.adversarial_mdp.simulated_visits": (),
  "jaxreg.solvers.balanced_assignment": ("caron2020unsupervised", "cuturi2013sinkhorn"),
  "jaxreg.solvers.conjugate_directions": ("kaneda2023deep",),
  "jaxreg.solvers.factored_output": ("vincent2015efficient", "debrebisson2016zloss"),
  "jaxreg.solvers.follow_the_regularized_leader": ("dai2023refined",),
  "jaxreg.solvers.lanczos": ("lanczos1950iteration",),
  "jaxreg.solvers.lanczos.ritz_right_hand_sides": ("kaneda2023deep",),
  "jaxreg.solvers.linear_q_estimation": ("dai2023refined",),
  "jaxreg.solvers.linear_q_estimation.dilated_bonus": ("luo2021policy", "dai2023refined"),
  "jaxreg.solvers.linear_q_estimation.matrix_geometric_resampling": ("neu2020efficient",),
  "jaxreg.solvers.linear_q_estimation.quadratic_bonus": ("luo2021policy", "dai2023refined"),
  "jaxreg.solvers.peak_equations": ("tang2023das",),
  "jaxreg.solvers.peak_equations.cubic_peak_equation": ("tang2024adversarial",),
  "jaxreg.solvers.poisson": (),
  "jaxreg.solvers.projections": ("kyrillidis2013sparse",),
  "jaxreg.solvers.self_tuning": ("mackay2019selftuning",),
  "jaxreg.solvers.solver_cost": ("pal2021opening",),
  "jaxreg.solvers.sinkhorn": ("cuturi2013sinkhorn",),
  "jaxreg.solvers.sparse_transport": ("liu2023sparsity",),
  "jaxreg.solvers.taylor_regularization": ("kelly2020learning",),
  "jaxreg.transforms.aligned_gradients": ("yang2025dualhead",),
  "jaxreg.transforms.gradient_matching": ("shi2022gradient",),
  "jaxreg.transforms.orthogonal_gradient": ("prieto2025grokking",),
  "jaxreg.transforms.penalties": ("loshchilov2019decoupled",),
  "jaxreg.transforms.proximal_steps": ("parikh2014proximal",),
  "jaxreg.transforms.proximal_steps.half_space_projection": ("dai2023adaptive",),
  "jaxreg.transforms.state_reset": ("arjovsky2019invariant",),
  "jaxreg.transforms.sharpness.gam": ("zhang2023gradient",),
  "jaxreg.transforms.sharpness.sagm": ("wang2023sharpness",),
  "jaxreg.transforms.sharpness.sam": ("foret2021sharpness",),
  "jaxreg.transforms.sharpness.udim_value_and_grad": ("shin2024unknown",),
  "jaxreg.transforms.weight_compander": ("cakaj2023weight",),
}
