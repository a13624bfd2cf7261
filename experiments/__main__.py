"""The command line: `python -m experiments COMMAND …`. Heavy imports wait until a command needs them."""

import sys

COMMANDS = {
  "list": "show the recipes, their presets and what was verified",
  "demo": "the noisy-label ablation on bundled images: table, figure and record in a few minutes",
  "run": "train one recipe:            run NAME [PRESET] [--help]",
  "sweep": "train a grid × seeds:        sweep NAME [PRESET] [--help]",
  "verify": "check recipes' claims:       verify [NAME …] [--help]",
  "report": "rebuild the ledger and the README's table from the records",
  "bench": "time against other ways:     bench [NAME …] [--help]",
}


def usage() -> str:
  """The help text."""
  lines = [f"  {name:8} {text}" for name, text in COMMANDS.items()]
  return "usage: python -m experiments COMMAND …\n\ncommands:\n" + "\n".join(lines)


def main(arguments: list[str]) -> int:
  """Runs one command; returns the exit code."""
  if not arguments or arguments[0] in ("-h", "--help"):
    print(usage())
    return 0 if arguments else 2
  from experiments.harness import registry

  command, rest = arguments[0], arguments[1:]
  try:
    if command not in COMMANDS:
      raise registry.UnknownName("command", command, list(COMMANDS))
    if command == "list":
      from experiments.harness import listing

      return listing.show(rest)
    from experiments.harness import commands

    return getattr(commands, command)(rest)
  except (ValueError, FileNotFoundError) as error:
    print(f"error: {error}", file=sys.stderr)
    return 2
  except (RuntimeError, FloatingPointError, OSError) as error:
    print(f"error: {type(error).__name__}: {error}", file=sys.stderr)
    return 1
  except KeyboardInterrupt:
    print("interrupted", file=sys.stderr)
    return 130


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
