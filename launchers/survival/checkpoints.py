"""Chooses the checkpoint to resume from and checks that it is intact, before minutes of loading."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from ds_quant.base.trainer_checkpoints import defect, listed, newest_whole
from survival.errors import LaunchError

_FRESH = ("", "false", "none")
_NEWEST = ("last", "true")


def choose(
    argument: str | None, output_dir: Path, *, contents: bool, say: Callable[[str], None] = print
) -> Path | None:
    """The checkpoint to resume from; None for a fresh start.

    Args:
        argument: the value of --resume_from_checkpoint. `last`: the newest intact checkpoint. `auto`: the same, or a
            fresh start if there is none. Otherwise a folder.
        output_dir: where `last` and `auto` look.
        contents: whether to read and compare every byte instead of only file sizes.
        say: called with a message for each checkpoint that is skipped.

    Raises LaunchError if there is no checkpoint to resume from.
    """
    word = (argument or "").lower()
    if word in _FRESH:
        return None
    if word in _NEWEST or word == "auto":
        found = newest_whole(output_dir, contents=contents, say=say)
        if found is not None or word == "auto":
            return found
        seen = listed(output_dir)
        why = f"{seen[-1]}: {defect(seen[-1], ours=True)}" if seen else "there is none"
        raise LaunchError(
            f"--resume_from_checkpoint {argument}: {output_dir} holds no whole checkpoint ({why}). "
            "Check --output_dir, name the checkpoint's folder, or start afresh without this flag."
        )
    chosen = Path(str(argument))
    problem = defect(chosen, contents=contents)
    if problem is not None:
        other = newest_whole(chosen.parent, contents=contents, say=lambda _: None)
        fix = f"The newest whole one is {other}." if other else "Start afresh, without --resume_from_checkpoint."
        raise LaunchError(f"Cannot resume from {argument}: {problem}. {fix}")
    return chosen


def refuse_mixing(output_dir: Path, *, resume: bool, overwrite: bool) -> None:
    """Raise LaunchError if a fresh start would mix with the checkpoints of an earlier run."""
    old = listed(output_dir)
    if old and not resume and not overwrite:
        raise LaunchError(
            f"{output_dir} holds checkpoints of an earlier run (the last: {old[-1].name}). "
            "Go on with --resume_from_checkpoint last, start over with --overwrite_output_dir, or give another "
            "--output_dir."
        )


def clear(output_dir: Path) -> None:
    """Remove the files of an earlier run, and nothing else. Call it in one process only."""
    for folder in [*listed(output_dir), output_dir / "model"]:
        shutil.rmtree(folder, ignore_errors=True)
    for name in ("metrics.csv", "summary.json", "curves.png"):
        (output_dir / name).unlink(missing_ok=True)
