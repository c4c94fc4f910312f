"""`diagnose outliers`: input channels that are far larger than the others, and whether they stay so."""

from __future__ import annotations

import argparse
from dataclasses import replace

from ds_quant.cli.diagnosing import common
from ds_quant.cli.shared.errors import CommandError
from ds_quant.diagnostics.hooks import attach
from ds_quant.diagnostics.measurement import Measurement
from ds_quant.diagnostics.outliers import NUM_STD, OutlierRecorder, persistence

HELP = "input channels that are far larger than the others"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's flags."""
    parser.description = "Mean |x| of each input channel of each linear layer; an outlier lies above mean + 6 std."
    common.add_checkpoints(parser, "of several of one run, oldest first, the persistence of the outliers too")
    parser.add_argument("--num_std", type=float, default=NUM_STD, help="deviations that count (default: %(default)s)")
    parser.add_argument("--persistence", action="store_true", help="insist on persistence: two checkpoints or more")
    common.add_model(parser)
    common.add_text(parser)
    common.add_output(parser)


def run(options: argparse.Namespace) -> None:
    """Measure and write. Raises ConfigError, CommandError."""
    common.run(options, "outliers", measure)


def measure(options: argparse.Namespace) -> list[Measurement]:
    """One measurement a checkpoint; the last has the persistence over all of them."""
    if options.persistence and len(options.checkpoints) < 2:
        raise CommandError(
            f"--persistence: got one checkpoint, {options.checkpoints[0]}; allowed: two or more of one run; name "
            "earlier ones too (training keeps --save_total_limit of them)"
        )
    if not options.num_std > 0:
        raise CommandError(f"--num_std: got {options.num_std}; allowed: a positive number; the paper's is {NUM_STD:g}")
    found = []
    for subject in common.subjects(options):
        recorder = OutlierRecorder(options.num_std)
        with attach(subject.loaded.model, [recorder]):
            common.run_through(subject.loaded.model, subject.batches, backward=False)
        found.append(subject.named(recorder.result(subject.loaded.step)))
    if len(found) > 1:
        stay = persistence(found)
        before = sum(item["before"] for item in stay)
        scalars = {"always_outliers": float(sum(len(item["always"]) for item in stay))}
        if before:
            scalars["kept_share"] = sum(item["kept"] for item in stay) / before
        last = found[-1]
        settings = {**last.settings, "persistence": stay}
        found[-1] = replace(last, scalars={**last.scalars, **scalars}, settings=settings)
    return found
