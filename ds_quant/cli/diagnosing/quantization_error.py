"""`diagnose quantization-error`: what quantizing loses of weights and activations, layer by layer."""

from __future__ import annotations

import argparse

from ds_quant.cli.diagnosing import common
from ds_quant.diagnostics.hooks import attach
from ds_quant.diagnostics.measurement import Measurement
from ds_quant.diagnostics.quantization_error import QuantizationErrorRecorder

HELP = "what quantizing loses of weights and activations"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's flags."""
    parser.description = (
        "Relative L2 error, signal to noise, largest error, share that becomes zero, of every layer's weight and input."
    )
    common.add_checkpoints(parser, "several are set side by side")
    common.add_model(parser)
    common.add_text(parser)
    common.add_output(parser)


def run(options: argparse.Namespace) -> None:
    """Measure and write. Raises ConfigError, CommandError."""
    common.run(options, "quantization_error", measure)


def measure(options: argparse.Namespace) -> list[Measurement]:
    """The errors of weights and activations in each checkpoint, one measurement each."""
    found = []
    for subject in common.subjects(options):
        recorder = QuantizationErrorRecorder()
        with attach(subject.loaded.model, [recorder]):
            common.run_through(subject.loaded.model, subject.batches, backward=False)
        found.append(subject.named(recorder.result(subject.loaded.step)))
    return found
