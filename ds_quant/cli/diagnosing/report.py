"""`diagnose report`: one HTML file of what was measured, in a run or by commands."""

from __future__ import annotations

import argparse
from pathlib import Path

from ds_quant.cli.shared.errors import CommandError

HELP = "one HTML report of the measurements in folders"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        'Reads the JSON files that training with "diagnostics" or the other commands wrote, and makes one HTML file of '
        "plots, sentences and tables that works offline. Needs matplotlib and jinja2 (pip install 'ds_quant[plot]')."
    )
    parser.add_argument(
        "folders", metavar="FOLDER", type=Path, nargs="+", help="runs, folders of measurements, or JSON files"
    )
    parser.add_argument("--output", type=Path, help="the HTML file (default: report.html beside the measurements)")
    parser.add_argument("--title", help="its heading (default: names the folders)")


def run(options: argparse.Namespace) -> None:
    """Write the report.

    Raises:
        ConfigError, CommandError: nothing to report, a broken file, a missing package, no place to write.
    """
    from ds_quant.diagnostics import folder, html

    folders = [_of_run(path) for path in options.folders]
    first = folders[0]
    output: Path = options.output or (first if first.is_dir() else first.parent) / folder.REPORT
    if output.is_dir() or not output.parent.is_dir():
        allowed = "a file in a folder that is there"
        raise CommandError(f"--output: got {output}; allowed: {allowed}; correct it, or make the folder")
    try:
        found = html.write_report(folders, output, options.title)
    except OSError as error:
        reason = error.strerror or error
        raise CommandError(f"--output: got {output} ({reason}); allowed: a file that can be written") from error
    kinds = len({one.kind for one in found})
    print(f"written: {output}, {len(found)} measurements of {kinds} kinds, {output.stat().st_size / 1e6:.1f} MB")


def _of_run(path: Path) -> Path:
    """Where a run of pre-training has its diagnostics; other folders as they are."""
    return path / "diagnostics" if (path / "diagnostics").is_dir() else path
