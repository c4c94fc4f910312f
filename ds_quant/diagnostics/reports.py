"""The report of a running job, kept up to date at a small share of its time."""

import os
import time
from pathlib import Path

from ds_quant.base.errors import fail
from ds_quant.base.log import warn
from ds_quant.diagnostics import folder, html

SHARE = 0.01
"""Of a run's time that goes into reports while it lasts. What the first costs is guessed."""
_GUESSED_SECONDS = 5.0


class Reports:
    """Writes `report.html` of one folder, in the process that writes its looks.

    A report reads all looks and draws all plots, so that it takes seconds: while the run lasts it is written when
    `SHARE` of the time since the last one covers that, and at the end in any case.
    """

    def __init__(self, path: Path):
        self._path = path
        self._pid = os.getpid()
        self._is_old = False
        self._ended, self._cost = time.monotonic(), _GUESSED_SECONDS

    def look_written(self) -> None:
        """Note that a look was written, and write the report if that is worth its time now."""
        self._is_old = True
        if (time.monotonic() - self._ended) * SHARE >= self._cost:
            self.finish()

    def finish(self) -> None:
        """Write the report if there are looks that it does not have."""
        if not self._is_old or os.getpid() != self._pid:  # a forked worker is not the run
            return
        self._is_old = False
        begin = time.monotonic()
        try:
            html.write_report([self._path], self._path / folder.REPORT)
        except Exception as error:  # whatever it is, the looks are there, and the run goes on
            fix = f"ds_quant diagnose report {self._path}"
            warn(f"diagnostics: the report could not be written: {error}; the looks are there: {fix}")
        self._ended = time.monotonic()
        self._cost = self._ended - begin


def check_packages(where: str) -> None:
    """Raise ConfigError where a report cannot be drawn here."""
    if missing := html.missing_packages():
        fix = f"pip install 'ds_quant[plot]', or \"report\": false, and make it elsewhere with {html.COMMAND}"
        raise fail(f"{where}.report", f"true without {' and '.join(missing)}", "true where they are installed", fix)
