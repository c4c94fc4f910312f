"""`diagnose sharpness`: m-sharpness, how far the loss rises one small step up the gradient."""

from __future__ import annotations

import argparse

from ds_quant.cli.diagnosing import common
from ds_quant.diagnostics.measurement import Measurement
from ds_quant.diagnostics.sharpness import RHO, sharpness

HELP = "how much the loss rises in the gradient's direction"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's flags."""
    parser.description = "loss(w + rho g/|g|) - loss(w), the mean over batches of --batch_size sequences."
    common.add_checkpoints(parser, "several are set side by side")
    parser.add_argument("--rho", type=float, default=RHO, help="length of the step (default: %(default)s)")
    common.add_model(parser)
    common.add_text(parser)
    common.add_output(parser)


def run(options: argparse.Namespace) -> None:
    """Measure and write. Raises ConfigError, CommandError."""
    common.run(options, "sharpness", measure)


def measure(options: argparse.Namespace) -> list[Measurement]:
    """The sharpness at the weights of each checkpoint, one measurement each."""
    return [
        subject.named(sharpness(subject.loaded.model, subject.batches, rho=options.rho, step=subject.loaded.step))
        for subject in common.subjects(options)
    ]
