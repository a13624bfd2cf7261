"""Fifteen methods of domain generalization on equal terms, under three rules of selection.

Every method gets the same network, the same images at the same initial parameters and as many settings, on coloured,
rotated and corrupted digits. Settings are chosen by validation images of the source domains, by leaving out one source
domain after another, or by validation images of the target; no rule sees a test image. Differences to ERM are paired by
seed.
"""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks.timing import interleaved
from experiments.harness import plots
from experiments.harness.claims import Claim, interval
from experiments.harness.selection import leave_one_domain_out, oracle, rule_of, training_domain_validation
from experiments.harness.trials import Cell
from experiments.problems.domain_methods import DERIVATIVES, PROBLEMS, SOURCES, DomainProblem, domain_task
from jaxreg.training import grid

# Each method's own hyperparameter, of which every value meets every learning rate.
DECAYS = ("weight_decay", (0.0, 1e-4, 1e-3, 1e-2))
WEIGHTS = ("weight", (1.0, 1e2, 1e4, 1e6))
DISTANCES = ("weight", (0.1, 1.0, 10.0, 100.0))
RADII = ("rho", (0.02, 0.05, 0.1, 0.2))
OWN = {
  "ERM": DECAYS,
  "IRM": WEIGHTS,
  "V-REx": WEIGHTS,
  "CORAL": DISTANCES,
  "MMD": DISTANCES,
  "IGA": WEIGHTS,
  "Fish": ("meta_rate", (0.1, 0.25, 0.5, 1.0)),
  "Fishr": WEIGHTS,
  "HGP": WEIGHTS,
  "Hutchinson": WEIGHTS,
  "SAM": RADII,
  "SAGM": RADII,
  "GAM": RADII,
  "UDIM": ("weight", (1.0, 3.0, 10.0, 30.0)),
  "DRM": DECAYS,
}
RULES = {"training": "training-domain validation", "left out": "leave-one-domain-out", "oracle": "oracle"}


@dataclasses.dataclass(frozen=True)
class Config:
  """The study.

  Attributes:
    problem: what `run` and `sweep` train, and the sizes of all problems.
    problems: names of the problems.
    methods: what is compared, ERM among it.
    learning_rates: of Adam.
    evaluations: of which the rule of training domains chooses one.
    repeats: timed steps of every method.
  """

  problem: DomainProblem = DomainProblem()
  problems: tuple[str, ...] = tuple(PROBLEMS)
  methods: tuple[str, ...] = tuple(OWN)
  learning_rates: tuple[float, ...] = (1e-3, 3e-3)
  evaluations: int = 3
  repeats: int = 20

  def __post_init__(self):
    if self.problem.steps % self.evaluations:
      raise ValueError(f"evaluations must divide the {self.problem.steps} steps, got {self.evaluations}.")

  def of(self, **changes) -> "Config":
    """With another problem, method or domain left out."""
    return dataclasses.replace(self, problem=dataclasses.replace(self.problem, **changes))


PRESETS = {
  "smoke": Config(
    problem=DomainProblem(train=16, valid=20, test=40, features=8, batch_size=8, steps=6, test_batch=20),
    problems=("colored",),
    methods=("ERM", "Fish", "DRM"),
    learning_rates=(1e-3,),
    repeats=1,
  ),
  "cpu": Config(),
}


def cell(config: Config) -> Cell:
  """A method on a problem at all its settings."""
  problem = config.problem
  name, values = OWN[problem.method]
  left_out = {"left_out": range(SOURCES)} if problem.leave_out else {}
  points = grid(**{"learning_rate": config.learning_rates, name: values}, **left_out)
  evaluations = 1 if problem.leave_out else config.evaluations
  return Cell(domain_task(problem), problem.updates, points, eval_every=problem.updates // evaluations, engine="map")


def cells(config: Config, seeds) -> dict[str, Cell]:
  """Every method on every problem, with all source domains and with one left out."""
  del seeds
  return {
    f"{problem} {method}{' left out' if leave_out else ''}": cell(
      config.of(name=problem, method=method, leave_out=leave_out)
    )
    for problem, method, leave_out in itertools.product(config.problems, config.methods, (False, True))
  }


def measure(config: Config, seeds, trained) -> dict[str, np.ndarray]:
  """Seconds of every method's step on the first problem, `[seeds]`; of Fish those of a round."""
  del trained
  steps = {}
  for method in config.methods:
    one = domain_task(config.of(name=config.problems[0], method=method).problem)
    hparams = {name: jnp.float32(value) for name, value in one.hparams.items()}
    state = jax.jit(one.init)(jax.random.key(0), hparams)
    batch = {"row": one.data["row"][: config.problem.batch_size]}
    steps[method] = functools.partial(jax.jit(one.step), state, batch, hparams)
  timed = [interleaved(steps, repeats=config.repeats) for _ in seeds]
  factor = lambda method: SOURCES if method == "Fish" else 1
  return {f"seconds {name}": np.array([factor(name) * each[name] for each in timed]) for name in steps}


def summary(config: Config, trials) -> dict[str, np.ndarray]:
  """`RULE PROBLEM METHOD`: target accuracies `[seeds]` at what the rule chose."""
  found = dict(trials.measured)
  chosen = {rule: [] for rule in RULES}
  for problem, method in itertools.product(config.problems, config.methods):
    whole, without = trials[f"{problem} {method}"], trials[f"{problem} {method} left out"]
    finite = np.where(np.isfinite(whole.metrics["loss"]), 1.0, np.nan)
    valid = np.stack([whole.metrics[f"valid {index}"] for index in range(SOURCES)], axis=-1)
    ended = np.isfinite(without.metrics["loss"][..., -1])
    held_out = np.where(ended, without.metrics["left out"][..., -1], np.nan)
    selections = {
      "training": training_domain_validation(valid * finite[..., None]),
      "left out": leave_one_domain_out(_by_domain(config, without, held_out), len(whole.steps)),
      "oracle": oracle(whole.metrics["target valid"] * finite),
    }
    for rule, selection in selections.items():
      chosen[rule].append(selection)
      found[f"{rule} {problem} {method}"] = selection.of(whole.metrics["target"])
      found[f"{rule} {problem} {method} setting"] = np.full(len(whole.seeds), selection.setting)
  for selections in chosen.values():
    rule_of(selections)
  return found


def _by_domain(config: Config, trials, values) -> np.ndarray:
  """`[points, seeds]` of a method's settings × domains left out as `[settings, domains, seeds]`."""
  settings = len(config.learning_rates) * len(OWN["ERM"][1])
  domains = trials.hparams["left_out"].reshape(settings, SOURCES)
  assert (domains == np.arange(SOURCES)).all()
  return values.reshape(settings, SOURCES, -1)


def _gain(summary, rule: str, problem: str, method: str):
  return summary[f"{rule} {problem} {method}"] - summary[f"{rule} {problem} ERM"]


def _mean_gain(config: Config, summary, rule: str, method: str):
  """Over the problems, `[seeds]`."""
  return np.mean([_gain(summary, rule, problem, method) for problem in config.problems], axis=0)


def _ranks(config: Config, summary, rule: str) -> np.ndarray:
  """`[methods, seeds]`, means over the problems; 1 is best, and equal ones share."""
  found = []
  for problem in config.problems:
    values = np.stack([summary[f"{rule} {problem} {method}"] for method in config.methods])
    above = (values[None] > values[:, None]).sum(1)
    equal = (values[None] == values[:, None]).sum(1)
    found.append(above + (equal + 1) / 2)
  return np.mean(found, axis=0)


def tables(config: Config, summary) -> dict[str, list[dict]]:
  """A table for each rule: accuracies, differences to ERM and ranks with intervals over seeds, best rank first."""
  found = {}
  for rule, title in RULES.items():
    ranks, rows = _ranks(config, summary, rule), []
    for index, method in enumerate(config.methods):
      row = {"method": method}
      for problem in config.problems:
        own = summary[f"{rule} {problem} {method}"]
        row[problem] = f"{own.mean():.3f} ({_gain(summary, rule, problem, method).mean():+.3f})"
      row["mean difference"] = _with_interval(_mean_gain(config, summary, rule, method), "+.3f")
      row["rank"] = _with_interval(ranks[index], ".1f")
      row["step"] = float(np.median(summary[f"seconds {method}"] / summary["seconds ERM"]))
      rows.append(row)
    order = np.argsort(ranks.mean(1), kind="stable")
    found[f"Target accuracy (minus ERM's), chosen by {title}"] = [rows[index] for index in order]
  return found


def _with_interval(values, form: str) -> str:
  low, high = interval(values)
  return f"{values.mean():{form}} [{low:{form}}, {high:{form}}]"


def claims(config: Config) -> tuple[Claim, ...]:
  """What tuning, the rule of selection and the alignment of derivatives are worth."""
  settings = len(config.learning_rates) * len(OWN["ERM"][1])
  problem, over = config.problem, f"mean over {len(config.problems)} problems"
  protocol = (
    f"MNIST subset at 14 × 14, {SOURCES} source domains of {problem.train} images, MLP {problem.features}, each"
    f" method's best of {settings} settings"
  )
  others = [method for method in config.methods if method != "ERM"]
  aligning = [method for method in others if method in DERIVATIVES]

  def best(summary, rule, problems, methods):
    """The largest gain over ERM, of the method that is best in hindsight."""
    of = lambda method: np.mean([_gain(summary, rule, problem, method) for problem in problems], axis=0)
    return max(map(of, methods), key=np.mean)

  mean = lambda summary, rule: np.mean(
    [summary[f"{rule} {problem} {method}"] for problem in config.problems for method in others], axis=0
  )
  return (
    Claim(
      "no_better_than_erm",
      "Chosen by validation images of the source domains, no method is better than ERM by more than 0.02, averaged over"
      " coloured, rotated and corrupted digits",
      f"target accuracy, {over}, the best of {len(others)} methods in hindsight minus ERM; {protocol}",
      lambda s: best(s, "training", config.problems, others),
      at_most=0.02,
    ),
    Claim(
      "color_by_oracle",
      "Chosen by labelled images of the target, methods that align risks or derivatives of environments are better than"
      " ERM on coloured digits",
      f"target accuracy, the best of {', '.join(aligning)} in hindsight minus ERM; {protocol}",
      lambda s: best(s, "oracle", ["colored"], aligning),
      at_least=0.1,
    ),
    Claim(
      "color_by_training",
      "Chosen by validation images of the source domains, the same methods keep less than half of that gain on coloured"
      " digits",
      f"the gain so chosen minus half of the one chosen by labelled images of the target; {protocol}",
      lambda s: best(s, "training", ["colored"], aligning) - best(s, "oracle", ["colored"], aligning) / 2,
      at_most=0.0,
    ),
    Claim(
      "leaving_out",
      "Leaving out one source domain after another chooses settings as good as validation images of all of them do",
      f"target accuracy, {over} and {len(others)} methods, leave-one-domain-out minus training-domain validation;"
      f" {protocol}",
      lambda s: mean(s, "left out") - mean(s, "training"),
      at_least=-0.01,
    ),
    Claim(
      "oracle_is_worth_more",
      "Choosing the setting by labelled images of the target instead of the sources' is worth more to the average"
      " method than the best method is worth over ERM",
      f"target accuracy, {over}: the mean of {len(others)} methods chosen by {problem.valid} target images minus those"
      " chosen by the sources' images, minus the gain over ERM of the best method in hindsight, chosen by the sources'"
      f" images; {protocol}",
      lambda s: mean(s, "oracle") - mean(s, "training") - best(s, "training", config.problems, others),
      at_least=0.0,
    ),
  )


DEVIATIONS = (
  "Small networks and digits in place of residual networks and photographs. Weights of penalties, warm-up and the reset"
  " of Adam are the same for all penalties; the papers' differ.",
  "Fish takes as many steps for every source domain as others take for all, so that all methods see as many images.",
)
NOTES = (
  "Reported, not gated: all tables. A rank is a mean over problems, and its interval one over seeds; which problems are"
  " in the study decides more than seeds do.",
)


def figure(config: Config, summary, path) -> None:
  """Differences to ERM by problem, and mean ranks, under each rule."""
  picture, axes = plots.panels(len(RULES), width=5, height=5)
  for axis, (rule, title) in zip(axes, RULES.items()):
    ranks = _ranks(config, summary, rule).mean(1)
    order = np.argsort(ranks, kind="stable")
    names = [f"{config.methods[index]} ({ranks[index]:.1f})" for index in order]
    for color, problem in enumerate(config.problems):
      values = np.stack([_gain(summary, rule, problem, config.methods[index]) for index in order])
      low, high = np.array([interval(each) for each in values]).T
      at = np.arange(len(order)) + 0.2 * (color - 1)
      mean = values.mean(1)
      axis.errorbar(mean, at, xerr=[mean - low, high - mean], fmt="o", markersize=4, color=f"C{color}", label=problem)
    axis.axvline(0, color="black", linewidth=0.8)
    axis.set_yticks(range(len(order)), names)
    axis.invert_yaxis()
    axis.set(title=title, xlabel="target accuracy minus ERM's (95 % interval)")
  axes[0].legend(frameon=False)
  axes[0].set_ylabel("method (mean rank)")
  plots.save(picture, path)
