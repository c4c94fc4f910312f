"""Which commit of a checkout this package is."""

import subprocess
from pathlib import Path


def commit() -> str | None:
    """The commit of the checkout that this file belongs to, `-dirty` with changes; None outside of one."""
    try:
        # An environment may lie within a checkout of something else, which then does not know this file.
        _git("ls-files", "--error-unmatch", Path(__file__).name)
        return _git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*") or None
    except (OSError, subprocess.SubprocessError):
        return None


def _git(*words: str) -> str:
    done = subprocess.run(
        ["git", *words], cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10, check=True
    )
    return done.stdout.strip()
