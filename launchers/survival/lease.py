"""Lets one job at a time write into an output folder; after a take-over the previous job must not write.

A node that a cluster has given up may keep writing while its job runs again elsewhere. Therefore each job that claims
the folder creates the next of the files `.lease-1`, `.lease-2`, ... Creating a file that must not exist yet succeeds
for only one process, on a network file system too. The highest number owns the folder. A job that finds a higher number
than its own is fenced off and writes nothing more. Living owners change their file every few seconds.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from survival.errors import Fenced, LaunchError, mistake

BEAT_SECONDS = 5.0
"""A living owner changes its file this often."""
PATIENCE_SECONDS = 45.0
"""An owner is dead if its file has not changed for this long: several beats, and what network file systems cache."""
_NAME = re.compile(r"\.lease-([0-9]+)")
_WRITING = re.compile(r"\.writing-([0-9]+)")


class Lease:
    """The right to write into `output_dir`, as generation `generation`."""

    def __init__(self, output_dir: Path, generation: int) -> None:
        self.output_dir = output_dir
        self.generation = generation
        self._path = output_dir / f".lease-{generation}"
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    @classmethod
    def acquire(
        cls, output_dir: Path, *, patience: float = PATIENCE_SECONDS, say: Callable[[str], None] = print
    ) -> Lease:
        """Claim the folder. If its owner may still live, wait to find out. Call it in one process per job.

        Raises LaunchError if a living job owns the folder or it cannot be written to.
        """
        while True:
            generation = newest(output_dir)
            if generation is not None:
                _wait_for_the_dead(output_dir, generation, patience, say)
            lease = cls(output_dir, (generation or 0) + 1)
            try:
                # By itself: a file in its place is a FileExistsError, too, and would be asked about for ever.
                output_dir.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise not_writable(output_dir, error) from error
            try:
                with lease._path.open("x") as file:
                    file.write(json.dumps(lease._owner()))
            except FileExistsError:
                continue  # another job was faster: check that one
            except OSError as error:
                raise not_writable(output_dir, error) from error
            lease._clear_away_older()
            return lease

    @property
    def writing(self) -> Path:
        """The folder where this generation prepares files before it renames them into place."""
        return self.output_dir / f".writing-{self.generation}"

    def lost(self) -> bool:
        """Whether another job has taken over the folder."""
        try:
            # Listings of network file systems may be stale. Opening asks the server; the next owner removes this file.
            self._path.open().close()
        except FileNotFoundError:
            return True
        except OSError:
            return False  # unknown: the next write will fail by itself
        return newest(self.output_dir) != self.generation

    def check(self) -> None:
        """Raise Fenced if another job has taken over the folder. Call it before writing anything."""
        if self.lost():
            found = newest(self.output_dir)
            who = _describe(_read(self.output_dir / f".lease-{found}")) if found else "someone who removed the lease"
            raise Fenced(f"{self.output_dir} was taken over by {who}: this job writes nothing more")

    def keep_alive(self) -> None:
        """Update the file from a thread until `release`."""
        self._thread = threading.Thread(target=self._beat, name="lease", daemon=True)
        self._thread.start()

    def release(self) -> None:
        """Release the folder, so that the next job need not wait to see whether this one lives."""
        self._ended.set()
        if self._thread is not None:
            self._thread.join()
        shutil.rmtree(self.writing, ignore_errors=True)
        if not self.lost():
            self._clear_away_older()  # again: one that was fenced off while it saved may have gone on for a moment
            self._write({**self._owner(), "released": True})

    def _beat(self) -> None:
        while not self._ended.wait(BEAT_SECONDS):
            if self.lost():
                return
            self._write(self._owner())

    def _write(self, content: dict[str, Any]) -> None:
        # In place: a rename could bring back the file of a generation that was cleared away.
        try:
            with self._path.open("r+") as file:
                file.write(json.dumps(content))
                file.truncate()
        except OSError:
            return  # another job owns it now, or the disk is full, which saving will report

    def _owner(self) -> dict[str, Any]:
        return {
            "host": socket.gethostname(),
            "boot": _boot_id(),
            "pid": os.getpid(),
            "job_id": os.environ.get("SLURM_JOB_ID"),
            "restart_count": _restart_count(),
            "beat": uuid.uuid4().hex,
        }

    def _clear_away_older(self) -> None:
        # Also removes what an earlier owner was preparing, so that it cannot rename it into place if it still lives.
        for path in self.output_dir.iterdir():
            match = _NAME.fullmatch(path.name) or _WRITING.fullmatch(path.name)
            if match and int(match[1]) < self.generation:
                if path.is_dir():
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    path.unlink(missing_ok=True)


def not_writable(output_dir: Path, error: OSError) -> LaunchError:
    """The error for an output folder that cannot be written to."""
    got = f"{output_dir}, which cannot be written to ({error.strerror or error})"
    return mistake("--output_dir", got, "a folder to write in", "give another one")


def newest(output_dir: Path) -> int | None:
    """The generation that owns the folder; None if it never had an owner."""
    try:
        names = os.listdir(output_dir)
    except OSError:
        return None
    return max((int(match[1]) for name in names if (match := _NAME.fullmatch(name))), default=None)


def _wait_for_the_dead(output_dir: Path, generation: int, patience: float, say: Callable[[str], None]) -> None:
    """Return when the owner is gone; raise LaunchError as soon as it shows a sign of life."""
    path = output_dir / f".lease-{generation}"
    first = _read(path)
    if _is_gone(first):
        return
    say(f"{output_dir} belongs to {_describe(first)}; waiting up to {patience:.0f} s to see whether it lives.")
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        time.sleep(min(1.0, patience / 10))
        now = _read(path)
        if _is_gone(now):
            return
        if now != first:
            raise mistake(
                "--output_dir",
                f"{output_dir}, but {_describe(now)} is writing there, and two jobs in one folder would mix their "
                "checkpoints",
                "a folder for this job alone",
                "stop it (scancel), wait for its end, or give another --output_dir",
            )


def _is_gone(owner: dict[str, Any] | None) -> bool:
    """Whether the owner has ended or is this job before its restart, as far as can be known here."""
    if owner is None or owner.get("released"):
        return True
    job, mine = owner.get("job_id"), os.environ.get("SLURM_JOB_ID")
    if job is not None and job == mine and _restart_count() > int(owner.get("restart_count") or 0):
        return True
    if owner.get("boot") != _boot_id() or owner.get("host") != socket.gethostname():
        return False
    return not _lives(owner.get("pid"))


def _lives(pid: object) -> bool:
    if not isinstance(pid, int) or pid == os.getpid():
        return False
    try:
        # A zombie is dead; its parent has just not collected it yet.
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def _read(path: Path) -> dict[str, Any] | None:
    """The owner; None if there is no such file. A half-written file reads as an unknown owner."""
    try:
        text = path.read_text()
    except OSError:
        return None
    try:
        found = json.loads(text)
    except ValueError:
        return {"text": text}
    return found if isinstance(found, dict) else {"text": text}


def _describe(owner: dict[str, Any] | None) -> str:
    if owner is None:
        return "a job of which nothing is known"
    job = f"job {owner['job_id']}, " if owner.get("job_id") else ""
    return f"another job ({job}process {owner.get('pid', 'unknown')} on {owner.get('host', 'an unknown host')})"


def _restart_count() -> int:
    return int(os.environ.get("SLURM_RESTART_COUNT") or 0)


def _boot_id() -> str | None:
    # Process ids are only comparable within the same boot and container.
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}:{os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return None
