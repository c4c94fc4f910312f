"""SIGUSR1 and SIGTERM: a cluster's warning that the end is near, taken as a request to stop at the next step."""

from __future__ import annotations

import signal
from types import FrameType

SIGNALS = (signal.SIGUSR1, signal.SIGTERM)


class StopAtOnce(BaseException):
    """A signal came outside of training steps: nothing to save. Not an Exception, since libraries swallow those."""


class StopRequest:
    """Remembers the first signal; installed in the main thread."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self.training = False
        """Whether steps are being taken, so that there will be a next one to stop at."""

    def install(self) -> None:
        """Take the signals from now on."""
        for number in SIGNALS:
            signal.signal(number, self._receive)

    def end(self) -> None:
        """Ignore the signals: the process is about to exit, and its status is settled."""
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        # Only noted while training: a handler runs between any two lines, where no collective can be begun.
        if self.signal is None:
            self.signal = signal.Signals(number)
        if not self.training:
            raise StopAtOnce(f"asked to stop by {self.signal.name} while no steps were taken")
