"""`report`: judges the committed tables again and rebuilds ledger, figures and README table, without training."""

import json
import pathlib
import re

from experiments.harness import records, registry

LEDGER = registry.ROOT / "LEDGER.md"
README = registry.ROOT.parent / "README.md"


def report() -> list[str]:
  """Rewrites records and figures that have a table, the ledger, and the table between the README's markers.

  Returns:
    What went wrong, one sentence each; those records stand in the ledger as they were recorded.
  """
  problems = []
  for path in sorted(records.RESULTS.glob("*/*/trials.npz")):
    try:
      judge_again(path.parent)
    except Exception as error:  # one record must not keep the others from the ledger
      problems.append(f"{path.parent.parent.name} {path.parent.name}: {type(error).__name__}: {error}")
  LEDGER.write_text(_ledger(problems), encoding="utf-8")
  if README.exists():
    text = README.read_text(encoding="utf-8")
    table = "<!-- methods -->\n" + "\n".join(_methods()) + "\n<!-- /methods -->"
    README.write_text(re.sub(r"<!-- methods -->.*<!-- /methods -->", lambda _: table, text, flags=re.S), "utf-8")
  return problems


def judge_again(folder: pathlib.Path) -> dict:
  """Judges a folder's table by the recipe as it is now; rewrites record and figure.

  Raises:
    ValueError: when the preset has another configuration now, or a condition changed and `amended` does not say why.
  """
  from experiments.harness import identity, verification
  from experiments.harness.trials import Trials

  old = json.loads((folder / "record.json").read_text(encoding="utf-8"))
  recipe = registry.recipe(old["recipe"])
  config = registry.preset(recipe, old["preset"])
  for field, before, after in identity.same_config(old, config)[:1]:
    raise ValueError(f"recorded with {field} = {before}, which is {after} now; verify it again.")
  trials = Trials.load(folder / "trials.npz")
  if trials.seeds.tolist() != old["seeds"]:
    raise ValueError(
      f"record.json has the seeds {old['seeds']}, but trials.npz {trials.seeds.tolist()}; verify it again."
    )
  new = {**old, **verification.judged(recipe, config, trials)}
  _check_amendments(old["claims"], new["claims"])
  records.write(folder / "record.json", new)
  recipe.figure(config, verification.summary(recipe, config, trials), folder / "figure.png")
  return new


def _check_amendments(old: list[dict], new: list[dict]) -> None:
  before = {claim["name"]: claim for claim in old}
  for claim in new:
    was = before.get(claim["name"], claim)
    for field in ("condition", "scale"):
      if was.get(field) != claim.get(field) and claim.get("amended", "") == was.get("amended", ""):
        raise ValueError(
          f"the {field} of claim {claim['name']} was {was.get(field)} and is {claim.get(field)} now, after the result"
          " was seen; `amended` has to say so."
        )


def _methods() -> list[str]:
  rows = ["| method | recipe | claims | paper scale |", "| --- | --- | --- | --- |"]
  for entry in _by_card():
    found = {preset: records.read(entry.name, preset) for preset in records.presets(entry.name)}
    claims = records.outcome(found.pop("cpu", None))
    claims += "".join(f"; {preset}: {records.outcome(record)}" for preset, record in found.items())
    scale = "`paper` preset" if "paper" in entry.presets else "not runnable"
    where = f"[`{entry.name}`](experiments/papers/{entry.name}.py)"
    rows.append(_row(entry.card, f"{where}: {entry.title}", claims, scale))
  return rows


def _ledger(problems: list[str]) -> str:
  from experiments.harness.claims import RULES

  head = f"Made by `python -m experiments report` from what `results/` holds; do not edit.\n\n{RULES} A claim that was"
  head += (
    " changed after a result had been seen says so (*Amended*). A record without a table of trials (`trials.npz`) is"
    " shown as it was judged when it was made.\n"
  )
  parts = ["# Ledger\n", head, *(f"Shown as recorded: {problem}\n" for problem in problems)]
  for entry in _by_card():
    parts.append(f"## {entry.card}: {entry.title}\n")
    parts += _sections(entry) or ["Not verified yet.\n"]
    if "paper" not in entry.presets:
      parts.append("Paper scale: not runnable (no `paper` preset).\n")
  studies = [entry for entry in registry.entries().values() if not entry.card and records.presets(entry.name)]
  for entry in studies:
    parts += [f"## Study: {entry.title}\n", *_sections(entry)]
  return "\n".join([*parts, *_benchmarks()])


def _by_card() -> list[registry.Entry]:
  return sorted((entry for entry in registry.entries().values() if entry.card), key=lambda entry: entry.card)


def _sections(entry: registry.Entry) -> list[str]:
  presets = records.presets(entry.name)
  parts = []
  for preset in presets:
    parts += [f"### Preset {preset}\n"] if len(presets) > 1 else []
    parts += _section(entry.name, preset, records.read(entry.name, preset))
  return parts


def _section(name: str, preset: str, record: dict) -> list[str]:
  lines = [
    _row("claim", "condition", "measured (mean, 95 % interval)", "per seed", "verdict"),
    "| --- | --- | --- | --- | --- |",
    *map(_claim, record["claims"]),
  ]
  lines += [f"\n{_made(name, record)}\n"]
  if record.get("deviations"):
    lines += ["Deviations from paper and official code:\n"]
    lines += [f"{number}. {_line(text)}" for number, text in enumerate(record["deviations"], 1)] + [""]
  lines += [f"{_line(note)}\n" for note in record.get("notes", [])]
  if "table" in record:
    lines += [*_table(record["table"]), ""]
  for title, rows in record.get("tables", {}).items():
    lines += [f"{title}:\n", *_table(rows), ""]
  if (records.RESULTS / name / preset / "figure.png").exists():
    lines.append(f"![{name}](results/{name}/{preset}/figure.png)\n")
  return lines


def _claim(claim: dict) -> str:
  low, high = claim["interval"]
  scale = ", logarithmic scale" if claim.get("scale") == "log" else ""
  amended = f" *Amended: {claim['amended']}*" if claim.get("amended") else ""
  return _row(
    f"{claim['sentence']} ({claim['measured']}){amended}",
    claim["condition"] + scale,
    f"{_number(claim['mean'])} [{_number(low)}, {_number(high)}]",
    ", ".join(map(_number, claim["values"])),
    f"**{claim['verdict']}**",
  )


def _made(name: str, record: dict) -> str:
  versions = ", ".join(f"{package} {version}" for package, version in record["versions"].items())
  engines = sorted(set(record.get("engines", {}).values()))
  parts = [f"seeds {record['seeds']}"]
  if record["wall_seconds"] is not None:
    resumed = " after the last interruption" if record.get("resumed") else ""
    parts += [f"{record['wall_seconds']:.0f} s{resumed} on {record['device']}, {record['machine']}"]
  if engines:
    parts += [f"engine {' and '.join(engines)}"]
  words = f"`python -m experiments verify {name} --preset {record['preset']}`, {', '.join(parts)}; {versions}"
  if record.get("commit"):
    words += f"; commit {record['commit'][:12]}" + (" with changes that were not committed" if record["dirty"] else "")
  return f"{words}; {record['date']}."


def _benchmarks() -> list[str]:
  lines = []
  for path in sorted((records.RESULTS / "benchmarks").glob("*.json")):
    record = json.loads(path.read_text(encoding="utf-8"))
    lines += [f"### {record['title']}\n", *_table(record["rows"])]
    lines += [f"\n{note}" for note in record.get("notes", [])]
    lines.append(f"\n{record['device']}, {record['machine']}; jax {record['versions']['jax']}; {record['date']}.\n")
  return ["## Benchmarks\n", *lines] if lines else []


def _table(rows: list[dict]) -> list[str]:
  names = list(dict.fromkeys(name for row in rows for name in row))
  rule = f"| {' | '.join('---' for _ in names)} |"
  return [_row(*names), rule, *(_row(*[_number(row.get(name, "")) for name in names]) for row in rows)]


def _row(*cells) -> str:
  return f"| {' | '.join(_line(str(cell)).replace('|', chr(92) + '|') for cell in cells)} |"


def _line(text: str) -> str:
  return " ".join(text.split())


def _number(value) -> str:
  """A float in three digits; anything else as it is."""
  if value is None:
    return "not a number"
  return f"{value:.3g}" if isinstance(value, float) else str(value)
