"""`diagnose moments`: histograms of Adam's moments in a checkpoint, and what becomes zero under any format."""

from __future__ import annotations

import argparse

from ds_quant.base import trainer_checkpoints
from ds_quant.cli.diagnosing import common
from ds_quant.cli.diagnosing.stored_moments import checkpoint_of, stored_moments
from ds_quant.config import MomentConfig
from ds_quant.diagnostics.measurement import Measurement
from ds_quant.diagnostics.moments import MomentRecorder
from ds_quant.optim.group_options import MOMENTS

HELP = "histograms of Adam's moments, and what becomes zero in few bits"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's flags."""
    parser.description = (
        "Reads the optimizer states of DeepSpeed's checkpoints, of any stage and number of ranks, as whole parameters, "
        "and quantizes them. What a run kept in few bits is taken as the values that the codes stand for."
    )
    common.add_checkpoints(parser, "several are set side by side")
    add = parser.add_argument
    add("--moment", choices=MOMENTS, default="exp_avg_sq", help="which of the two (default: %(default)s)")
    add(
        "--format",
        type=common.json_object,
        action="append",
        metavar="JSON",
        help='an object of ds_quant.optimizer.exp_avg(_sq), such as \'{"bits": 8, "map": "linear"}\'; may be given '
        "again, and all are compared (default: this package's own, bitsandbytes' map, and the paper's rows)",
    )
    common.add_seed(parser, "stochastic rounding")
    common.add_output(parser)


def run(options: argparse.Namespace) -> None:
    """Measure and write. Raises ConfigError, CommandError."""
    common.run(options, "moments", measure)


def measure(options: argparse.Namespace) -> list[Measurement]:
    """The histograms of one moment in each checkpoint, one measurement each."""
    formats = None if options.format is None else [MomentConfig.parse(item) for item in options.format]
    found = []
    for folder in [checkpoint_of(checkpoint) for checkpoint in options.checkpoints]:
        recorder = MomentRecorder(options.moment, formats, options.seed)
        for name, moment in stored_moments(folder, options.moment):
            recorder.observe(name, moment)
        measured = recorder.result(trainer_checkpoints.step_of(folder))
        measured.settings["name"] = f"{folder.parent.name}/{folder.name}"
        found.append(measured)
    return found
