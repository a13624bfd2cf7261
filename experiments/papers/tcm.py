"""Threshold-consistent margins: one threshold of the distance serves unseen classes more evenly."""

import dataclasses
import pathlib

import jax
import numpy as np
from scipy import stats

from experiments.harness import plots
from experiments.harness.claims import Claim
from experiments.harness.trials import Cell, Trials
from experiments.problems import retrieval
from experiments.problems.retrieval import Embedded, Images, Problem
from jaxreg import losses
from jaxreg.training import Task

CARD = "43-tcm"
# Base losses: multi-similarity (beta, gamma, margin), of which one carries a strong absolute threshold, and SupCon.
WEAK = {"beta": 2.0, "gamma": 40.0, "margin": 0.5}
STRONG = {"beta": 18.0, "gamma": 75.0, "margin": 0.77}
TCM = {"positive_margin": 0.9, "negative_margin": 0.5, "tcm_weight": 1.0}  # the defaults
BASE_MARGINS = (0.5, 0.6, 0.7, 0.8)  # settings of the base loss that are tried on validation classes
NEGATIVE_MARGINS = (0.5, 0.6, 0.7, 0.8)  # settings of TCM, equally many
ARMS = ("base", "base, tuned", "TCM, tuned", "TCM, default", "TCM, default, weight 3", "strong", "strong, TCM")


@dataclasses.dataclass(frozen=True)
class Config:
  """The comparison.

  Attributes:
    problem: data, model and optimizer; or images.
    validation_classes: how many of the training classes choose margins.
    tuning_seeds: how many of the seeds choose margins.
    temperature: of SupCon.
    data_dir: TFDS's folder, for images.
  """

  problem: Problem | Images = Problem()
  validation_classes: int = 40
  tuning_seeds: int = 2
  temperature: float = 0.1
  data_dir: str | None = None


PRESETS = {
  "smoke": Config(
    problem=Problem(
      train_classes=24, test_classes=10, all_classes=40, classes_per_batch=8, batches=6, hidden=(16,), embedding=8
    ),
    validation_classes=8,
    tuning_seeds=1,
  ),
  "cpu": Config(),
  "paper": Config(problem=Images()),
}


def multi_similarity(key, batch: Embedded, hparams, axis_name):
  """The base loss and TCM."""
  del key
  base = {name: hparams[name] for name in WEAK}
  values = losses.multi_similarity_loss(batch.embeddings, batch.labels, **base, axis_name=axis_name)
  return values + _tcm(batch, hparams, axis_name)


def supcon(key, batch: Embedded, hparams, axis_name):
  """SupCon and TCM."""
  del key
  options = dict(temperature=hparams["temperature"], axis_name=axis_name)
  return losses.supcon_loss(batch.embeddings, batch.labels, **options) + _tcm(batch, hparams, axis_name)


def _tcm(batch, hparams, axis_name):
  return hparams["tcm_weight"] * losses.tcm_loss(
    batch.embeddings,
    batch.labels,
    positive_margin=hparams["positive_margin"],
    negative_margin=hparams["negative_margin"],
    axis_name=axis_name,
  )


def task(config: Config, problem=None, loss: str = "multi_similarity") -> Task:
  """Training with a base loss and TCM; hyperparameters are those of both."""
  problem = problem or config.problem
  function, own = {
    "multi_similarity": (multi_similarity, WEAK),
    "supcon": (supcon, {"temperature": config.temperature}),
  }[loss]
  if isinstance(problem, Images):
    return retrieval.image_task(problem, loss, function, own | TCM, data_dir=config.data_dir)
  return retrieval.task(problem, loss, function, own | TCM)


def cell(config: Config) -> Cell:
  """The base loss with TCM; negative margins vary."""
  steps = config.problem.steps if isinstance(config.problem, Images) else config.problem.batches
  return Cell(task(config), steps, _points(dict(TCM, negative_margin=m) for m in NEGATIVE_MARGINS))


def _points(settings) -> dict[str, list[float]]:
  settings = list(settings)
  return {name: [setting[name] for setting in settings] for name in settings[0]}


def cells(config: Config, seeds) -> dict[str, Cell]:
  """Margins on validation classes; then the arms on the test classes."""
  if isinstance(config.problem, Images):
    raise ValueError("the claims of tcm are about synthetic classes; train its preset `paper` with `run`.")
  steps = config.problem.batches
  tuning = task(config, config.problem.validation(config.validation_classes))
  plain = dict(TCM, tcm_weight=0.0)
  settings = [
    *({**WEAK, **plain, "margin": margin} for margin in BASE_MARGINS),
    *({**WEAK, **TCM, "negative_margin": margin} for margin in NEGATIVE_MARGINS),
  ]

  def arms(trials: Trials):
    base_margin, negative_margin = chosen(trials)
    tuned = dict(TCM, negative_margin=negative_margin)
    return _points(
      {
        "base": {**WEAK, **plain},
        "base, tuned": {**WEAK, **plain, "margin": base_margin},
        "TCM, tuned": {**WEAK, **tuned},
        "TCM, default": {**WEAK, **TCM},
        "TCM, default, weight 3": {**WEAK, **TCM, "tcm_weight": 3.0},
        "strong": {**STRONG, **plain},
        "strong, TCM": {**STRONG, **tuned},
      }[name]
      for name in ARMS
    )

  def supcon_arms(trials: Trials):
    return _points([plain, dict(TCM, negative_margin=chosen(trials)[1])])

  return {
    "tuning": Cell(tuning, steps, _points(settings), seeds=list(seeds)[: config.tuning_seeds]),
    "multi_similarity": Cell(task(config), steps, arms),
    "supcon": Cell(task(config, loss="supcon"), steps, supcon_arms),
  }


def chosen(trials: Trials) -> tuple[float, float]:
  """The base loss's margin and TCM's negative one with the least mean OPIS on validation classes."""
  scores = trials["tuning"].last("opis").mean(axis=1)
  count = len(BASE_MARGINS)
  return BASE_MARGINS[int(scores[:count].argmin())], NEGATIVE_MARGINS[int(scores[count:].argmin())]


METRICS = {"opis": "OPIS", "epsilon_opis": "epsilon-OPIS", "recall_at_1": "recall at 1", "map_at_r": "MAP@R"}


def summary(config: Config, trials: Trials) -> dict[str, np.ndarray]:
  """Of each arm OPIS, epsilon-OPIS, recall at 1 and MAP@R of the test classes `[seeds]`; the margins chosen."""
  found = {}
  for metric in METRICS:
    values = trials["multi_similarity"].last(metric)
    found |= {f"{name} {metric}": values[index] for index, name in enumerate(ARMS)}
    found |= dict(zip((f"SupCon {metric}", f"SupCon, TCM {metric}"), trials["supcon"].last(metric)))
  seeds = len(trials.seeds)
  base, negative = chosen(trials)
  arms = (*ARMS, "SupCon", "SupCon, TCM")
  plain = [name for name in arms if "TCM" not in name]
  ranked = lambda metric: np.array([found[f"{name} {metric}"] for name in plain]).T
  correlation = [
    stats.spearmanr(recall, score).statistic for recall, score in zip(ranked("recall_at_1"), ranked("opis"))
  ]
  return found | {
    "chosen base margin": np.full(seeds, base),
    "chosen negative margin": np.full(seeds, negative),
    "rank correlation": np.nan_to_num(np.array(correlation)),
  }


def _ratio(m, arm: str, against: str) -> np.ndarray:
  return m[f"{arm} opis"] / m[f"{against} opis"]


def claims(config: Config) -> tuple[Claim, ...]:
  """That OPIS falls at no loss of recall; where it does not; whether the base loss's own margin does as well."""
  problem = config.problem
  data = f"{problem.test_classes} unseen classes of the synthetic set, thresholds at false accept rates 1 to 10 %"
  base = "multi-similarity loss (2, 40, 0.5)"
  left_out = f"{config.validation_classes} training classes left out"
  tuned = f"negative margin of {len(NEGATIVE_MARGINS)} chosen by OPIS on {left_out}"
  return (
    Claim(
      "opis_falls",
      "TCM with a tuned negative margin makes one threshold serve unseen classes more evenly",
      f"OPIS with TCM over OPIS of the {base} alone, {data}; {tuned}",
      lambda m: _ratio(m, "TCM, tuned", "base"),
      at_most=0.85,
      scale="log",
    ),
    Claim(
      "recall_stays",
      "TCM with a tuned negative margin costs at most half a point of recall on unseen classes",
      f"recall at 1 with TCM minus that of the {base} alone, {data}; {tuned}",
      lambda m: m["TCM, tuned recall_at_1"] - m["base recall_at_1"],
      at_least=-0.005,
    ),
    Claim(
      "tuned_base",
      "TCM makes thresholds more consistent than tuning the base loss's own margin does",
      f"OPIS with TCM over OPIS of the {base.replace('0.5', 'm')}, m of {len(BASE_MARGINS)} chosen likewise, {data};"
      f" {tuned}",
      lambda m: _ratio(m, "TCM, tuned", "base, tuned"),
      at_most=1.0,
      scale="log",
    ),
    Claim(
      "default_margin",
      "TCM's default margins do not lower OPIS with this base loss",
      f"OPIS with TCM at 0.9 and 0.5 over OPIS of the {base} alone, {data}",
      lambda m: _ratio(m, "TCM, default", "base"),
      at_least=0.95,
      scale="log",
    ),
    Claim(
      "strong_base",
      "TCM raises OPIS of a base loss that already carries a strong absolute threshold",
      f"OPIS with TCM over OPIS of the multi-similarity loss (18, 75, 0.77) alone, {data}; {tuned} for the base loss"
      " (2, 40, 0.5)",
      lambda m: _ratio(m, "strong, TCM", "strong"),
      at_least=1.0,
      scale="log",
    ),
  )


DEVIATIONS = (
  "Synthetic classes and a perceptron instead of photographs; the numbers of the paper's tables were not to hand.",
  "Margins, weights and the range of thresholds are those of an independent implementation and a third party's"
  " protocol; there is no official code.",
  "The preset `paper` starts from random parameters, not from ImageNet's, which are not part of TFDS; its batches are"
  " drawn at random from all classes, and images of the measured half do not count.",
)


def notes(config: Config) -> tuple[str, ...]:
  """What the claims on defaults and strong bases are, what is reported without a gate, and what did not reproduce."""
  del config
  return (
    "The claims `default_margin` and `strong_base` are the card's negative results, with conditions of this library's;"
    " `tuned_base` is this library's own. Conditions were set before the run. A pilot with seeds 0 to 3 gave the"
    " number of seeds; it had a narrower hidden layer in the generator of the data than the card, which was mended"
    " before the run, and no pilot followed. Because it chose the largest base margin of its grid, 0.4 to 0.7, the"
    " run's grid is 0.5 to 0.8; the grid of negative margins stayed.",
    "TCM's default margins do lower OPIS here, by less than half as much as the tuned one; the prototype saw no gain.",
    "The undecided ratios spread by a factor of 1.35 to 1.4 between seeds around means within 3 % of 1: hundreds of"
    " seeds or more would be needed, and none are added. What can be said is that tuning the base loss's own margin"
    " on as many settings lowers OPIS as much as TCM does, with recall 1.1 points below TCM's.",
    "Both margins that validation classes chose, 0.8, are the largest of their grids.",
    "Over the four base losses without TCM the more accurate ones are the more consistent ones (rank correlation of"
    " recall at 1 and OPIS -0.45, mean over seeds), not the less consistent as the paper finds among accurate models.",
    "Reported, not gated: SupCon with TCM at the margin chosen for the other base loss; TCM's default margins with"
    " weight 3.",
  )


def table(config: Config, summary: dict[str, np.ndarray]) -> list[dict]:
  """Every arm's numbers, mean ± standard deviation over seeds."""
  del config
  spread = lambda values: values.std(ddof=1) if len(values) > 1 else 0.0
  shown = lambda values, scale: f"{scale * values.mean():.2f} ± {scale * spread(values):.2f}"
  return [
    {
      "arm": name,
      "OPIS × 1000": shown(summary[f"{name} opis"], 1000),
      "epsilon-OPIS × 1000": shown(summary[f"{name} epsilon_opis"], 1000),
      "recall at 1, %": shown(summary[f"{name} recall_at_1"], 100),
      "MAP@R, %": shown(summary[f"{name} map_at_r"], 100),
    }
    for name in (*ARMS, "SupCon", "SupCon, TCM")
  ]


def paper_batch(config: Config) -> dict[str, jax.ShapeDtypeStruct]:
  """One global batch of the stream."""
  return retrieval.image_batch(config.problem)


def reduced(config: Config) -> Config:
  """A small network on small images."""
  return dataclasses.replace(config, problem=retrieval.reduced_images(config.problem))


def paper_sets(config: Config) -> dict[str, dict]:
  """Random pictures of different sizes."""
  return retrieval.image_sets(config.problem)


def figure(config: Config, summary: dict[str, np.ndarray], path: pathlib.Path) -> None:
  """OPIS of every arm, OPIS against recall, and the ratio seed by seed."""
  picture, axes = plots.panels(3, width=5.0, height=4.2)
  arms = (*ARMS, "SupCon", "SupCon, TCM")
  plots.bars(axes[0], {name: 1000 * summary[f"{name} opis"] for name in arms})
  axes[0].set(ylabel="OPIS × 1000", title="unseen classes")
  points = {name: (100 * summary[f"{name} recall_at_1"], 1000 * summary[f"{name} opis"]) for name in arms}
  plots.scatter(axes[1], points)
  axes[1].set(xlabel="recall at 1, %", ylabel="OPIS × 1000", title="accuracy against consistency")
  axes[1].legend(frameon=False, fontsize=7)
  ratios = {"tuned": "TCM, tuned", "default": "TCM, default", "weight 3": "TCM, default, weight 3"}
  ratios = {name: _ratio(summary, arm, "base") for name, arm in ratios.items()}
  ratios |= {
    "strong base": _ratio(summary, "strong, TCM", "strong"),
    "SupCon": _ratio(summary, "SupCon, TCM", "SupCon"),
  }
  plots.bars(axes[2], ratios)
  axes[2].axhline(1, color="k", linewidth=1)
  axes[2].set(ylabel="OPIS with TCM over OPIS without", title="what TCM does to each base loss")
  plots.save(picture, path)
