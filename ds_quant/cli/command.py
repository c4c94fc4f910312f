"""`ds_quant COMMAND`: one door to all that the package does outside of training."""

import argparse
import importlib
import sys

from ds_quant.base.errors import closest

COMMANDS = {
    "report": ("report", "what is installed here, and what a config will do"),
    "plan": ("plan", "memory and traffic of a job that has not run, and the least hardware it fits on"),
    "export": ("export", "a checkpoint in a format that servers load"),
    "evaluate": ("evaluate", "perplexity and few-shot tasks of checkpoints, with their quantizers, without, or others"),
    "diagnose": ("diagnose", "what quantizing does inside a model, and what a training step takes of memory"),
    "schema": ("schema", "the JSON schema of the ds_quant section"),
}
"""Module in this room, and a line of help, by name. A module is imported when its command runs: some load torch."""

_EPILOG = (
    "`ds_quant COMMAND --help` lists what a command takes. Training scripts are run by `python -m ds_quant SCRIPT`."
)


def main(arguments: list[str] | None = None) -> int:
    """Run one command with the arguments after its name; returns its exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(
        prog="ds_quant", description="Quantized pre-training in the DeepSpeed engine.", epilog=_EPILOG
    )
    parsers = parser.add_subparsers(metavar="COMMAND")
    for name, (_, text) in COMMANDS.items():
        parsers.add_parser(name, help=text, add_help=False)
    name = arguments[0] if arguments else "--help"
    if name in COMMANDS:
        module = importlib.import_module(f"ds_quant.cli.{COMMANDS[name][0]}")
        status: int = module.main(arguments[1:], prog=f"ds_quant {name}")
        return status
    if name.startswith("-"):
        parser.parse_args(arguments[:1] or ["--help"])
        parser.error(f"got {name}; allowed: a command and its arguments; fix: put the command first")
    near = closest(name, COMMANDS)
    fix = f'did you mean "{near}"?' if near else "see ds_quant --help"
    if name.endswith(".py"):
        fix = f"run a script by python -m ds_quant {name}"
    print(f"ds_quant: got {name!r}; allowed: {', '.join(COMMANDS)}; fix: {fix}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
