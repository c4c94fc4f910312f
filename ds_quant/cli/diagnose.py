"""Look inside a quantized run: the paper's analyses (arXiv 2407.11722) on checkpoints, and reports of them.

    ds_quant diagnose outliers CHECKPOINT [CHECKPOINT ...]
    ds_quant diagnose all CHECKPOINT --output DIR
    ds_quant diagnose report FOLDER [FOLDER ...]

`ds_quant diagnose COMMAND --help` lists what a command takes. Inside training the same is done every so many steps by
"diagnostics" in the JSON's "ds_quant". Exit code: 0; 2 where something cannot be measured as asked; 1 where
`memory --table` finds a prediction that is off.
"""

from __future__ import annotations

import argparse
import importlib
import sys

COMMANDS = {
    "sharpness": "how much the loss rises in the gradient's direction",
    "landscape": "the loss along one or two random directions",
    "outliers": "input channels that are far larger than the others",
    "gradient-error": "quantized against exact weight gradients",
    "gradient-norms": "norms and spikes of gradients, and how much of them is near zero",
    "moments": "histograms of Adam's moments, and what becomes zero in few bits",
    "quantization-error": "what quantizing loses of weights and activations",
    "formats": "what each number format loses of the same numbers",
    "oscillation": "weights that swing between two codes, over checkpoints",
    "memory": "the peak of a real training step, split by what holds it",
    "all": "every diagnostic that a checkpoint allows, and the report",
    "report": "one HTML report of the measurements in folders",
}
"""By name. A command's module, diagnosing/NAME.py, is imported when it is used: most of them load torch."""


def main(argv: list[str] | None = None, *, prog: str = "ds_quant diagnose") -> int:
    """Run one command; returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(
        prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    wanted = next((argument for argument in argv if not argument.startswith("-")), None)
    for name, text in COMMANDS.items():
        command = parsers.add_parser(name, help=text)
        if name == wanted:
            module = importlib.import_module(f"ds_quant.cli.diagnosing.{name.replace('-', '_')}")
            module.add_arguments(command)
    options = parser.parse_args(argv)

    from ds_quant.base.errors import ConfigError
    from ds_quant.cli.shared.errors import CommandError

    try:
        status: int | None = module.run(options)
    except (CommandError, ConfigError) as error:
        print(f"{prog} {options.command}: {error}", file=sys.stderr)
        return 2
    return status or 0


if __name__ == "__main__":
    sys.exit(main())
