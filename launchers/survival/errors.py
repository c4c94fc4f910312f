"""How a run can end before its last step. Each end has an exit status of its own."""

from __future__ import annotations

from ds_quant.cli.shared.errors import CommandError

LaunchError = CommandError
"""A mistake in what was asked for, as the commands of ds_quant end with too."""


class RunEnded(Exception):
    """The run ended before its last step. `retry`: whether starting it again would get further."""

    state = "failed"
    retry = False
    exit_status = 4


class Diverged(RunEnded):
    """The loss is NaN, infinite, or has risen for good; the same would happen again."""

    state = "diverged"
    exit_status = 3


class Failed(RunEnded):
    """Something is in the way that only a person can clear, such as a full disk."""


class Interrupted(RunEnded):
    """Something from outside broke the run, such as the loss of a rank."""

    retry = True


class Fenced(RunEnded):
    """Another job has taken over the output folder: nothing of it may be written any more."""


class Stopped(RunEnded):
    """Asked to stop by a signal; all ranks have written a checkpoint together."""

    state = "stopped"
    retry = True
    exit_status = 75  # EX_TEMPFAIL of sysexits.h: try again
