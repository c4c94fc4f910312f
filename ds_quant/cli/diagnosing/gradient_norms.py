"""`diagnose gradient-norms`: norms of gradients before clipping and their spikes, and what is near zero."""

from __future__ import annotations

import argparse
from pathlib import Path

from ds_quant.cli.diagnosing import common
from ds_quant.cli.shared.errors import CommandError
from ds_quant.cli.shared.opened_model import resolve
from ds_quant.cli.shared.run_folder import read_metrics
from ds_quant.diagnostics.gradient_norms import FACTOR, WINDOW, GradientNormRecorder, norm_history
from ds_quant.diagnostics.hooks import attach
from ds_quant.diagnostics.measurement import Measurement

HELP = "norms and spikes of gradients, and how much of them is near zero"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's flags."""
    parser.description = (
        "The norm of each parameter's gradient and the share of each layer's output gradient that is near zero; and, "
        "where the run's metrics.csv lies beside the checkpoint, the norms that it logged, with their spikes."
    )
    common.add_checkpoints(parser, "several are set side by side")
    add = parser.add_argument
    add(
        "--factor", type=float, default=FACTOR, help="a spike is so many times the median before (default: %(default)s)"
    )
    add("--window", type=int, default=WINDOW, help="norms that the median is taken of (default: %(default)s)")
    common.add_model(parser)
    common.add_text(parser)
    common.add_output(parser)


def run(options: argparse.Namespace) -> None:
    """Measure and write. Raises ConfigError, CommandError."""
    common.run(options, "gradient_norms", measure)


def measure(options: argparse.Namespace) -> list[Measurement]:
    """One measurement a checkpoint, and one more for each run whose norms are found."""
    common.check_positive(options, "window")
    if not options.factor > 1:
        raise CommandError(f"--factor: got {options.factor}; allowed: above 1; the default is {FACTOR:g}")
    found, histories = [], {}
    for checkpoint in options.checkpoints:
        folder = resolve(Path(checkpoint)).parent
        histories[folder] = _history(folder, options)
    for subject in common.subjects(options, with_backward=True):
        recorder = GradientNormRecorder()
        with attach(subject.loaded.model, [recorder]):
            common.run_through(subject.loaded.model, subject.batches, backward=True)
        found.append(subject.named(recorder.result(subject.loaded.step)))
    return found + [history for history in histories.values() if history is not None]


def _history(folder: Path, options: argparse.Namespace) -> Measurement | None:
    """The norms in a run's metrics.csv, if it has any."""
    path = folder / "metrics.csv"
    if not path.is_file():
        print(f"{folder} has no metrics.csv: no norms of the run, and no spikes")
        return None
    try:
        rows = [row for row in read_metrics(path) if row["grad_norm"] is not None]
        steps = [int(row["step"] or 0) for row in rows]
        norms = [float(row["grad_norm"] or 0) for row in rows]
    except (OSError, ValueError, KeyError, TypeError) as error:
        allowed = "the metrics.csv of a pre-training run"
        raise CommandError(f"{path}: got {type(error).__name__}: {error}; allowed: {allowed}; remove it") from error
    if not norms:
        print(f"{path} has no gradient norms")
        return None
    history = norm_history(steps, norms, options.factor, options.window)
    history.settings.update(name=folder.name, file=str(path))
    return history
