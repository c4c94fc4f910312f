"""The ways in which a run can end before its last step, each with its exit status."""

from __future__ import annotations

import os
from collections.abc import Callable

from ds_quant.cli.shared.errors import CommandError

LaunchError = CommandError
"""A user's mistake in arguments or settings; the commands of ds_quant raise the same class."""


def mistake(where: str, got: object, allowed: str, fix: str) -> LaunchError:
    """A LaunchError in the words of all errors of this project."""
    return LaunchError(f"{where}: got {got}; allowed: {allowed}; fix: {fix}")


class RunEnded(Exception):
    """The run ended before its last step. `retry`: whether a restart would get further."""

    state = "failed"
    retry = False
    exit_status = 4


class Diverged(RunEnded):
    """The loss is NaN or infinite, or has risen for good. A restart would diverge again."""

    state = "diverged"
    exit_status = 3


class Failed(RunEnded):
    """Something needs a person to fix it, such as a full disk."""


class Interrupted(RunEnded):
    """Something from outside broke the run, such as the loss of a rank."""

    retry = True


class Fenced(RunEnded):
    """Another job has taken over the output folder; this one must not write there any more."""


class Stopped(RunEnded):
    """A signal asked the run to stop, and all ranks have written a checkpoint together."""

    state = "stopped"
    retry = True
    exit_status = 75  # EX_TEMPFAIL of sysexits.h: try again


def end_process(report: Callable[[], None]) -> None:
    """Report, and end this process as interrupted, whatever the report meets. For threads beside one that is stuck."""
    try:
        report()
    finally:
        # The main thread waits inside a library, where an exception cannot reach it.
        os._exit(Interrupted.exit_status)
