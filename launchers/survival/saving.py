"""Writes checkpoints completely or not at all: to a temporary folder, hashed, renamed, read back, then pruned."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ds_quant.base import manifest, trainer_checkpoints
from ds_quant.base.whole_folder import sync
from survival import disk
from survival.control import Control
from survival.errors import Failed, RunEnded
from survival.lease import Lease


class CheckpointSaver:
    """Writes the checkpoints of one run. Every rank has a saver, and all call `save` together."""

    def __init__(self, lease: Lease, control: Control, about: dict[str, Any], limit: int | None) -> None:
        self._lease = lease
        self._control = control
        self._about = about
        self._limit = limit

    def save(self, step: int, write: Callable[[Path], None], keep: str | None = None) -> Path:
        """Publish what `write` leaves in its folder as `checkpoint-<step>`, and prune older checkpoints.

        Args:
            step: the last optimizer step.
            write: called on all ranks with a folder's path; creates it and fills it.
            keep: the name of a checkpoint that is never pruned, such as the best one.

        Raises:
            Failed: the disk is full; raised on that rank, while the others raise Interrupted. The unfinished
                checkpoint is removed, and all older ones are kept.
            Fenced: another job owns the output folder.
        """
        control, output_dir = self._control, self._lease.output_dir
        part = self._lease.writing / f"checkpoint-{step}"
        final = output_dir / part.name
        control.on_all(self._lease.check)
        if control.rank == 0:
            shutil.rmtree(part, ignore_errors=True)
        control.agree()
        # Not `on_all`: DeepSpeed's own barriers are inside, where the others would wait for a rank that failed. The
        # failed rank leaves instead, which breaks its connections.
        self._guarded(part, lambda: write(part))
        control.agree()
        entries = control.on_all(lambda: self._guarded(part, lambda: self._digest(part)))
        everyone = [entry for own in control.gather(entries) for entry in own]
        control.from_first(lambda: self._guarded(part, lambda: self._publish(part, final, everyone, step)))
        # Each file is read by a different rank from the one that hashed it, often on another node.
        mine = manifest.share(sorted(entry.path for entry in everyone), control.rank + 1, control.world_size)
        problem = manifest.defect_of_contents(final, [entry for entry in everyone if entry.path in set(mine)])
        problems = [found for found in control.gather(problem) if found is not None]
        if problems:
            raise Failed(
                f"step {step}: {final} was written, and reads back wrong: {problems[0]}. Older checkpoints were kept. "
                "Check the file system, then start again."
            )
        control.from_first(lambda: self._prune(final, keep))
        return final

    def _digest(self, part: Path) -> list[manifest.FileEntry]:
        own = manifest.share(manifest.list_files(part), self._control.rank, self._control.world_size)
        return manifest.digest(part, own)

    def _publish(self, part: Path, final: Path, entries: list[manifest.FileEntry], step: int) -> None:
        manifest.write(part, entries, {"step": step, **self._about})
        self._lease.check()
        replaced = self._lease.writing / f"replaced-{step}"
        if final.exists():
            # Left by an earlier run and broken or out of date; otherwise this run would have started after it.
            os.replace(final, replaced)
        os.replace(part, final)
        shutil.rmtree(replaced, ignore_errors=True)
        sync(final.parent)

    def _prune(self, newest: Path, keep: str | None) -> None:
        if self._limit is None or self._limit <= 0:
            return
        older = [
            path
            for path in trainer_checkpoints.listed(newest.parent)
            if trainer_checkpoints.step_of(path) < trainer_checkpoints.step_of(newest)
        ]
        spare = len(older) + 1 - self._limit
        for path in [path for path in older if path.name != keep][: max(spare, 0)]:
            self._lease.check()
            # Renamed first, because an interrupted prune must not leave half a checkpoint.
            gone = self._lease.writing / f"pruned-{path.name}"
            gone.parent.mkdir(exist_ok=True)
            os.replace(path, gone)
            shutil.rmtree(gone, ignore_errors=True)

    def _guarded(self, part: Path, act: Callable[[], Any]) -> Any:
        """Run `act`. If writing fails, remove the unfinished files and report the cause."""
        try:
            return act()
        except RunEnded:
            raise
        except (OSError, RuntimeError) as error:
            self._lease.check()  # after a take-over the new owner removed these files: report that instead
            why = disk.problem(error, self._lease.output_dir)
            # Removing the files makes room, among other things for the error message.
            shutil.rmtree(part, ignore_errors=True)
            if why is None:
                raise
            raise Failed(
                f"rank {self._control.rank}, step {self._control.step}: the checkpoint could not be written: {why}. "
                f"Older checkpoints were kept. Make room on the disk of {self._lease.output_dir}, then start again."
            ) from error
