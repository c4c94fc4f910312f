"""Treats SIGUSR1 and SIGTERM, a cluster's warnings of the end, as requests to stop at the next step."""

from __future__ import annotations

import signal
from types import FrameType

SIGNALS = (signal.SIGUSR1, signal.SIGTERM)


class StopAtOnce(BaseException):
    """A signal came outside of training steps, so there is nothing to save.

    It is not an Exception, because libraries swallow those.
    """


class StopRequest:
    """Remembers the first signal; installed in the main thread."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self.training = False
        """Whether training steps are running, so that there will be a next one to stop at."""

    def install(self) -> None:
        """Handle the signals from now on."""
        for number in SIGNALS:
            signal.signal(number, self._receive)

    def end(self) -> None:
        """Ignore the signals: the process is about to exit, and its status is decided."""
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        # During training only recorded: a handler can run between any two lines, where no collective may start.
        if self.signal is None:
            self.signal = signal.Signals(number)
        if not self.training:
            raise StopAtOnce(f"asked to stop by {self.signal.name} while no steps were taken")
