"""Runs a part of the benchmarks as one process a rank, over loopback or over a link."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from benchmarks.slow_link import Link
from ds_quant.cli.shared import ranks as processes
from ds_quant.cli.shared.errors import CommandError

ROOT = Path(__file__).resolve().parents[1]


def run_ranks(
    command: list[str], *, ranks: int, link: Link | None, environment: Mapping[str, str], timeout: float
) -> None:
    """Run `command` in Python on every rank, with this package and those of launchers/ at hand.

    CommandError with the last lines of the first rank that fails, or where they take more than `timeout` seconds.
    """
    found = os.pathsep.join(filter(None, [str(ROOT / "launchers"), str(ROOT), os.environ.get("PYTHONPATH")]))
    try:
        processes.run_ranks(
            command, ranks=ranks, link=link, environment={"PYTHONPATH": found, **environment}, timeout=timeout
        )
    except processes.RanksError as error:
        raise CommandError(str(error)) from error
