"""The command line: `python -m experiments COMMAND …`. Heavy imports wait until a command needs them."""

import sys

COMMANDS = {
  "list": "show the recipes, their presets and what was verified",
  "demo": "the noisy-label ablation on bundled images, in a few minutes",
  "run": "train one recipe:            run NAME [PRESET] [--help]",
  "sweep": "train a grid × seeds:        sweep NAME [PRESET] [--help]",
  "verify": "check recipes' claims:       verify [NAME …] [--help]",
  "report": "judge the committed tables again; rebuild figures, ledger, README",
  "bench": "time against other ways:     bench [NAME …] [--help]",
}
WITHOUT_ARGUMENTS = ("list", "report")


def usage() -> str:
  """The help text."""
  lines = [f"  {name:8} {text}" for name, text in COMMANDS.items()]
  return (
    "usage: python -m experiments COMMAND …\n\ncommands:\n"
    + "\n".join(lines)
    + "\n\nNAME is one that `list` shows, or the module path of a recipe of your own."
    "\nCompiled programs are kept in $JAX_COMPILATION_CACHE_DIR or ~/.cache/jaxreg/xla."
  )


def main(arguments: list[str]) -> int:
  """Runs one command; returns the exit code."""
  if not arguments or arguments[0] in ("-h", "--help"):
    print(usage())
    return 0 if arguments else 2
  try:
    return _run(arguments[0], arguments[1:])
  except (ValueError, FileNotFoundError) as error:
    print(f"error: {error}", file=sys.stderr)
    return 2
  except (RuntimeError, FloatingPointError, OSError) as error:
    print(f"error: {type(error).__name__}: {error}", file=sys.stderr)
    return 1
  except KeyboardInterrupt:
    print("interrupted; run again to resume", file=sys.stderr)
    return 130


def _run(command: str, rest: list[str]) -> int:
  from experiments.harness import registry

  if command not in COMMANDS:
    raise registry.UnknownName("command", command, list(COMMANDS))
  if command in WITHOUT_ARGUMENTS and rest:
    if set(rest) & {"-h", "--help"}:
      print(f"usage: python -m experiments {command}\n\n{COMMANDS[command]}")
      return 0
    raise ValueError(f"{command} takes no arguments, got {' '.join(rest)}.")
  if command == "list":
    from experiments.harness import listing

    return listing.show()
  from experiments.harness import commands, trials

  try:
    return getattr(commands, command)(rest)
  except trials.Interrupted as error:
    print(f"{error}; run again to resume", file=sys.stderr)
    return 128 + error.signal  # what a shell says of a process that a signal ended


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
