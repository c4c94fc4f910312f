"""`diagnose all`: every diagnostic that a checkpoint allows, with its own defaults, and the report of them."""

from __future__ import annotations

import argparse
import importlib
import sys
from typing import Any

from ds_quant.base.errors import ConfigError
from ds_quant.cli.diagnosing import common, report
from ds_quant.cli.shared.errors import CommandError
from ds_quant.diagnostics import html

HELP = "every diagnostic that a checkpoint allows, and the report"

NAMES = (
    "outliers",
    "quantization_error",
    "gradient_error",
    "gradient_norms",
    "moments",
    "oscillation",
    "sharpness",
    "landscape",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's flags: those that the diagnostics share."""
    parser.description = (
        "Runs the commands one after the other, each with the defaults of its own flags. What a checkpoint has no "
        "component for is left out, with the reason. The report is report.html in the folder of --output."
    )
    common.add_checkpoints(parser, "several of one run, oldest first, show what persists and what oscillates")
    common.add_model(parser)
    common.add_text(parser)
    common.add_output(parser)


def run(options: argparse.Namespace) -> None:
    """Measure all that can be, and write the report.

    Raises:
        ConfigError, CommandError: a checkpoint or the text cannot be read, or nothing could be measured.
    """
    if missing := html.missing_packages():
        fix = "pip install 'ds_quant[plot]', or run the commands one by one with --no_pictures"
        raise CommandError(f"report: got no {' and no '.join(missing)}; allowed: both installed; {fix}")
    output = common.output_folder(options)
    # What is wrong with the checkpoints or the text would be the reason of every diagnostic.
    for _ in common.subjects(options, with_backward=True):
        pass
    left_out: dict[str, str] = {}
    for name in NAMES:
        print(f"---- {name}", flush=True)
        try:
            module: Any = importlib.import_module(f"ds_quant.cli.diagnosing.{name}")
            module.run(_options(module, options))
        except (CommandError, ConfigError) as error:
            left_out[name] = str(error)
            print(f"left out: {error}", file=sys.stderr)
    if len(left_out) == len(NAMES):
        raise CommandError(
            f"{options.checkpoints[0]}: got nothing that could be measured; allowed: checkpoints with what a "
            f"diagnostic needs; fix: see the reasons above, the first of which is: {left_out[NAMES[0]]}"
        )
    report.run(argparse.Namespace(folders=[output], output=None, title=None))


def _options(module: Any, options: argparse.Namespace) -> argparse.Namespace:
    """What the command takes, with its own defaults, and the values of the flags that it shares with this one."""
    parser = argparse.ArgumentParser(add_help=False)
    module.add_arguments(parser)
    own = parser.parse_args(list(options.checkpoints))
    for name in vars(own).keys() & vars(options).keys():
        setattr(own, name, getattr(options, name))
    return own
