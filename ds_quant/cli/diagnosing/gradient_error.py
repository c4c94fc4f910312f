"""`diagnose gradient-error`: quantized against exact weight gradients, for any quantizer of gradients."""

from __future__ import annotations

import argparse
from dataclasses import replace

from ds_quant.cli.diagnosing import common
from ds_quant.cli.diagnosing.common import Subject
from ds_quant.config import GradientCommunicationConfig, GradientConfig
from ds_quant.diagnostics.gradient_error import GradientErrorRecorder
from ds_quant.diagnostics.hooks import attach
from ds_quant.diagnostics.measurement import Measurement
from ds_quant.linear.convert import convert

HELP = "quantized against exact weight gradients"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's flags."""
    parser.description = "Cosine, relative L2 and L1 of each layer's weight gradient, quantized against exact."
    common.add_checkpoints(parser, "several are set side by side")
    add = parser.add_argument
    add(
        "--gradient",
        type=common.json_object,
        action="append",
        metavar="JSON",
        help='an object of ds_quant.linear.gradient, such as \'{"bits": 4, "granularity": "token"}\'; may be given '
        "again, and each is measured (default: what the checkpoint was trained with)",
    )
    add(
        "--wire",
        type=common.json_object,
        metavar="JSON",
        help="an object of ds_quant.communication.gradient that the weight gradients go through afterwards",
    )
    common.add_seed(parser, "stochastic rounding")
    common.add_model(parser)
    common.add_text(parser)
    common.add_output(parser)


def run(options: argparse.Namespace) -> None:
    """Measure and write. Raises ConfigError, CommandError."""
    common.run(options, "gradient_error", measure)


def measure(options: argparse.Namespace) -> list[Measurement]:
    """One measurement a checkpoint and quantizer of gradients."""
    asked: list[GradientConfig | None] = [GradientConfig.parse(item) for item in options.gradient or []]
    wire = None if options.wire is None else GradientCommunicationConfig.parse(options.wire)
    found = []
    for subject in common.subjects(options, with_backward=True):
        model, trained = subject.loaded.model, subject.loaded.trained
        if options.quantizers == "trained" and subject.loaded.linear is None and trained is not None:
            convert(model, trained)  # quantizers of gradients alone, which a forward does without
        recorders = [GradientErrorRecorder(gradient, wire, options.seed) for gradient in asked or [None]]
        with attach(model, recorders):
            common.run_through(model, subject.batches, backward=True)
        found += [_labelled(subject, recorder, bool(asked)) for recorder in recorders]
    return found


def _labelled(subject: Subject, recorder: GradientErrorRecorder, several: bool) -> Measurement:
    """With the quantizers of the layers in its settings, by which pictures tell measurements apart."""
    measured = subject.named(recorder.result(subject.loaded.step))
    if not several:
        return measured
    text = f"{measured.settings['quantizers']}, {measured.rows[0]['quantized']}"
    return replace(measured, settings={**measured.settings, "quantizers": text})
