"""`diagnose oscillation`: weights that swing between two codes, over the checkpoints of a run."""

from __future__ import annotations

import argparse

from ds_quant.cli.diagnosing import common
from ds_quant.cli.shared.errors import CommandError
from ds_quant.diagnostics.measurement import Measurement
from ds_quant.diagnostics.oscillation import SAMPLE, OscillationRecorder
from ds_quant.diagnostics.recorder import weight_matrix
from ds_quant.linear.convert import linear_modules

HELP = "weights that swing between two codes, over checkpoints"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's flags."""
    parser.description = (
        "Codes of a sample of each layer's weights, compared from checkpoint to checkpoint: how many changed, how many "
        'went back, and how near weights lie to decision thresholds. Training with "diagnostics" looks more often.'
    )
    common.add_checkpoints(parser, "two or more of one run, oldest first; reversals take three")
    parser.add_argument("--weights", type=int, default=SAMPLE, help="weights a layer (default: %(default)s)")
    common.add_seed(parser, "the sample")
    common.add_model(parser)
    common.add_output(parser)


def run(options: argparse.Namespace) -> None:
    """Measure and write. Raises ConfigError, CommandError."""
    common.run(options, "oscillation", measure)


def measure(options: argparse.Namespace) -> list[Measurement]:
    """One measurement a checkpoint, each compared with those before it."""
    common.check_positive(options, "weights")
    if len(options.checkpoints) < 2:
        raise CommandError(
            f"oscillation: got one checkpoint, {options.checkpoints[0]}; allowed: two or more of one run, oldest "
            'first; name earlier ones too (training keeps --save_total_limit of them), or train with "diagnostics"'
        )
    recorder = OscillationRecorder(options.seed, options.weights)
    found: list[Measurement] = []
    step = -1
    for checkpoint, loaded in zip(options.checkpoints, common.load_all(options), strict=True):
        if loaded.step is not None and loaded.step <= step:
            raise CommandError(
                f"{checkpoint}: got step {loaded.step} after step {step}; allowed: checkpoints of one run, oldest "
                "first; change their order"
            )
        step = step if loaded.step is None else loaded.step
        recorder.reset()
        layers = linear_modules(loaded.model)
        for name, module in layers.items():
            recorder.prepare(name, module)
            recorder.look(name, weight_matrix(module))
        measured = recorder.result(loaded.step)
        if found and [row["layer"] for row in measured.rows] != [row["layer"] for row in found[0].rows]:
            allowed = f"the layers of {options.checkpoints[0]}"
            raise CommandError(f"{checkpoint}: got a model with other layers; allowed: {allowed}; leave it out")
        measured.settings.update(common.model_settings(loaded, options))
        found.append(measured)
    return found
