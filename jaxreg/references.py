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
  "jaxreg.data.algorithmic": ("prieto2025grokking",),
  "jaxreg.data.mixing": ("zhang2018mixup", "berthelot2019mixmatch"),
  "jaxreg.data.noise": (),
  "jaxreg.data.noise.instance_dependent_noise": ("xia2020partdependent",),
  "jaxreg.losses.comp_sum": ("mao2023crossentropy",),
  "jaxreg.losses.comp_sum.generalized_cross_entropy_loss": ("zhang2018generalized", "mao2023crossentropy"),
  "jaxreg.losses.early_learning": ("liu2020early",),
  "jaxreg.losses.example_table": (),
  "jaxreg.losses.label_dro": ("zhu2023label",),
  "jaxreg.losses.robust.asymmetric_generalized_cross_entropy_loss": ("zhou2021asymmetric",),
  "jaxreg.losses.robust.asymmetric_unhinged_loss": ("zhou2021asymmetric",),
  "jaxreg.losses.robust.brier_loss": ("ghosh2017robust",),
  "jaxreg.losses.robust.crammer_singer_loss": ("crammer2001algorithmic",),
  "jaxreg.losses.robust.jensen_shannon_loss": ("englesson2021generalized",),
  "jaxreg.losses.robust.mean_absolute_error_loss": ("ghosh2017robust",),
  "jaxreg.losses.robust.nce_agce_loss": ("zhou2021asymmetric", "ma2020normalized"),
  "jaxreg.losses.robust.nce_aul_loss": ("zhou2021asymmetric", "ma2020normalized"),
  "jaxreg.losses.robust.nce_rce_loss": ("ma2020normalized", "wang2019symmetric"),
  "jaxreg.losses.robust.normalized_cross_entropy_loss": ("ma2020normalized",),
  "jaxreg.losses.robust.reverse_cross_entropy_loss": ("wang2019symmetric",),
  "jaxreg.losses.robust.robust_log_loss": ("patel2021memorization",),
  "jaxreg.losses.robust.symmetric_cross_entropy_loss": ("wang2019symmetric",),
  "jaxreg.losses.robust.truncated_generalized_cross_entropy_loss": ("zhang2018generalized",),
  "jaxreg.losses.robust.weston_watkins_loss": ("weston1999support",),
  "jaxreg.losses.softmax_family": (),
  "jaxreg.losses.stablemax": ("prieto2025grokking",),
  "jaxreg.metrics.classification.area_under_roc": ("hanley1982meaning",),
  "jaxreg.metrics.classification.balanced_top_k_accuracy": ("brodersen2010balanced",),
  "jaxreg.metrics.classification.MemorizationFractions": ("liu2020early",),
  "jaxreg.metrics.classification.memorization_fractions": ("liu2020early",),
  "jaxreg.metrics.classification.top_k_accuracy": ("lapin2015topk",),
  "jaxreg.metrics.grokking": ("prieto2025grokking",),
  "jaxreg.models.mlp": (),
  "jaxreg.regularizers.group_sparsity": ("refael2022learning",),
  "jaxreg.regularizers.group_sparsity.group_ids": ("wen2016learning",),
  "jaxreg.regularizers.group_sparsity.group_lasso": ("yuan2006model",),
  "jaxreg.regularizers.group_sparsity.prox_group_lasso": ("yuan2006model", "parikh2014proximal"),
  "jaxreg.regularizers.group_sparsity.resolve_groups": (),
  "jaxreg.regularizers.group_sparsity.scale_groups": (),
  "jaxreg.regularizers.group_sparsity.sum_groups": (),
  "jaxreg.regularizers.group_sparsity.wgsef": ("refael2022learning", "beck2022sparse"),
  "jaxreg.transforms.orthogonal_gradient": ("prieto2025grokking",),
  "jaxreg.transforms.penalize": ("loshchilov2019decoupled",),
  "jaxreg.transforms.proximal": ("parikh2014proximal",),
  "jaxreg.transforms.proximal.half_space_projection": ("dai2023adaptive",),
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
  "crammer2001algorithmic": _article(
    "Crammer, Koby and Singer, Yoram",
    "On the Algorithmic Implementation of Multiclass Kernel-based Vector Machines",
    "Journal of Machine Learning Research",
    2001,
    volume=2,
  ),
  "dai2023adaptive": _article(
    "Dai, Yutong and Chen, Tianyi and Wang, Guanyi and Robinson, Daniel P.",
    "An Adaptive Half-Space Projection Method for Stochastic Optimization Problems with Group Sparse Regularization",
    "Transactions on Machine Learning Research",
    2023,
  ),
  "englesson2021generalized": _paper(
    "Englesson, Erik and Azizpour, Hossein",
    "Generalized {Jensen-Shannon} Divergence Loss for Learning with Noisy Labels",
    _NEURIPS,
    2021,
  ),
  "ghosh2017robust": _paper(
    "Ghosh, Aritra and Kumar, Himanshu and Sastry, P. S.",
    "Robust Loss Functions under Label Noise for Deep Neural Networks",
    "AAAI Conference on Artificial Intelligence",
    2017,
  ),
  "hanley1982meaning": _article(
    "Hanley, James A. and McNeil, Barbara J.",
    "The Meaning and Use of the Area under a Receiver Operating Characteristic ({ROC}) Curve",
    "Radiology",
    1982,
    volume=143,
  ),
  "lapin2015topk": _paper(
    "Lapin, Maksim and Hein, Matthias and Schiele, Bernt", "Top-k Multiclass {SVM}", _NEURIPS, 2015
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
  "mao2023crossentropy": _paper(
    "Mao, Anqi and Mohri, Mehryar and Zhong, Yutao",
    "Cross-Entropy Loss Functions: Theoretical Analysis and Applications",
    _ICML,
    2023,
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
}
