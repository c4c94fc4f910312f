"""Doing the runs: two processes of one thread at a time, each run resumable."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from collecting import runs

from ds_quant.cli.shared.errors import CommandError
from studying import plan, results
from studying.plan import Key, Settings
from studying.results import Result
from studying.rows import Row

_LOOK_EVERY = 0.2


@dataclass
class Training:
    """One call: what it does with the runs that were asked for."""

    settings: Settings
    rows: Mapping[str, Row]
    csv: Path
    where: Mapping[str, Any]
    """What `results.of_run` says of the machine."""
    at_once: int = 2
    """Processes; a run of more ranks than that is alone."""
    say: Callable[[str], None] = print
    stopped: bool = field(default=False, init=False)
    """Whether a signal came; nothing is started after it."""

    def missing(self, keys: Sequence[Key]) -> list[Key]:
        """Those whose figures are not in the CSV, or belong to other settings of the row."""
        known = results.read(self.csv)
        return [key for key in keys if key not in known or not self._is_of_these(known[key])]

    def waiting(self, keys: Sequence[Key]) -> list[Key]:
        """The missing ones that have not ended; figures of the others go into the CSV."""
        return [key for key in self.missing(keys) if not self._keep(key, told=False)]

    def _is_of_these(self, result: Result) -> bool:
        row, settings = self.rows[result.key.row], self.settings
        told = (result.fingerprint, result.text, result.dtype)
        return told == (plan.fingerprint(row), settings.text, settings.dtype)

    def run(self, keys: Sequence[Key]) -> list[Key]:
        """Do what is missing; returns what could not be done. Started again, it goes on where it was stopped.

        Raises:
            CommandError: another process does runs in the same folder.
        """
        failed: list[Key] = []
        with alone(self.settings.runs), self._stopping():
            waiting = self.waiting(keys)
            going: dict[Key, subprocess.Popen[bytes]] = {}
            total = len(waiting)
            try:
                while (waiting and not self.stopped) or going:
                    while waiting and self._fits(waiting[0], going) and not self.stopped:
                        key = waiting.pop(0)
                        self.say(f"{total - len(waiting)} of {total}: {plan.shown(key)}")
                        going[key] = self._start(key)
                    time.sleep(_LOOK_EVERY)
                    if self.stopped:
                        _stop(going.values())
                    for key, process in list(going.items()):
                        if process.poll() is None:
                            continue
                        del going[key]
                        if not self._keep(key):
                            failed.append(key)
                            what = "stopped" if self.stopped else f"failed ({process.returncode})"
                            self.say(f"{what}: {self._log(key)}")
            finally:
                # Nobody would know of them.
                _stop(going.values())
            return failed + (waiting if self.stopped else [])

    def _fits(self, key: Key, going: Collection[Key]) -> bool:
        taken = sum(self.rows[other.row].ranks for other in going)
        return not going or taken + self.rows[key.row].ranks <= self.at_once

    def _start(self, key: Key) -> subprocess.Popen[bytes]:
        settings = self.settings
        command = plan.command(key, self.rows[key.row], settings)
        log = self._log(key)
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as file:
            # A session of its own: an interrupt of the terminal comes to this process alone, which passes it on.
            return subprocess.Popen(
                command,
                stdout=file,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env={**os.environ, **plan.environment(settings.device)},
                start_new_session=True,
            )

    def _log(self, key: Key) -> Path:
        out = plan.folder(key, self.rows[key.row], self.settings)
        return out.parent / f"{out.name}.log"

    def _keep(self, key: Key, *, told: bool = True) -> bool:
        """Write the figures of a run that has ended into the CSV; False if it has not."""
        found = results.of_run(key, self.rows[key.row], self.settings, self.where)
        if found is None:
            return False
        planned = plan.steps(key, self.settings)
        if found.steps != planned and found.state == runs.DONE:
            out = plan.folder(key, self.rows[key.row], self.settings)
            raise CommandError(f"run: got {out} of {found.steps} steps; allowed: {planned}, as planned; remove it")
        results.keep(self.csv, found)
        if told:
            self.say(f"{found.state}: {plan.shown(key)}: {found.loss:.4f} nats a token")
        return True

    @contextmanager
    def _stopping(self) -> Iterator[None]:
        def stop(number: int, frame: FrameType | None) -> None:
            self.stopped = True

        before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _stop(processes: Collection[subprocess.Popen[bytes]]) -> None:
    """Each writes a checkpoint before it ends; a second signal would cut that short."""
    for process in processes:
        process.terminate()
    for process in processes:
        process.wait()


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Two calls at once would both start what is missing.

    Raises:
        CommandError: another call has it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise CommandError(
                f"--runs: got {folder}, in which another study is running; allowed: one at a time; wait for it, or "
                "give another folder"
            ) from error
        yield
