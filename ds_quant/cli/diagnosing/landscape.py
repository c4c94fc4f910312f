"""`diagnose landscape`: the loss along one or two random filter-normalized directions."""

from __future__ import annotations

import argparse

from ds_quant.cli.diagnosing import common
from ds_quant.diagnostics.landscape import landscape
from ds_quant.diagnostics.measurement import Measurement

HELP = "the loss along one or two random directions"

_POINTS = {1: 21, 2: 11}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's flags."""
    parser.description = "The loss around the weights; the direction of a seed has the same shape in every checkpoint."
    common.add_checkpoints(parser, "several are drawn into one picture")
    add = parser.add_argument
    add("--dimensions", type=int, choices=(1, 2), default=1, help="a line or a plane (default: %(default)s)")
    add("--points", type=int, help="points a direction, an odd number (default: 21 on a line, 11 on a plane)")
    add("--span", type=float, default=1.0, help="how far; 1 is as long as the weights (default: %(default)s)")
    common.add_seed(parser, "the directions")
    common.add_model(parser)
    common.add_text(parser)
    common.add_output(parser)


def run(options: argparse.Namespace) -> None:
    """Measure and write. Raises ConfigError, CommandError."""
    common.run(options, "landscape", measure)


def measure(options: argparse.Namespace) -> list[Measurement]:
    """The loss around the weights of each checkpoint, one measurement each."""
    return [
        subject.named(
            landscape(
                subject.loaded.model,
                subject.batches,
                dimensions=options.dimensions,
                points=_POINTS[options.dimensions] if options.points is None else options.points,
                span=options.span,
                seed=options.seed,
                step=subject.loaded.step,
            )
        )
        for subject in common.subjects(options)
    ]
