"""The ways in which a run can end before its last step, each with its exit status."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

from ds_quant.cli.shared import terminal
from ds_quant.cli.shared.errors import CommandError
from survival.signals import StopAtOnce

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


def refuse(reason: str, *, patience: float = 30.0) -> None:
    """Print an error that every rank should meet, once in the whole job.

    A launcher ends the other ranks as soon as one has ended. A slower rank 0 would then be gone before it has printed
    anything, so the others wait for the launcher's signal. If none comes within `patience` seconds, rank 0 has not met
    this error, or is on another node, and the first rank of this node prints it. The others wait for that one, too.
    """
    if terminal.rank() != 0:
        try:
            time.sleep(patience if os.environ.get("LOCAL_RANK") == "0" else 2 * patience)
        except StopAtOnce:
            return
        reason = f"rank {terminal.rank()}: {reason}"
    terminal.complain(reason, everywhere=True)
