"""Finds the lock that a killed build leaves in torch's extensions folder, for which DeepSpeed waits without a word."""

import os
import time
from collections.abc import Callable, Collection
from pathlib import Path

from torch.utils import cpp_extension

from ds_quant.config import ConfigError

FILES_ARE_LOCKS = hasattr(cpp_extension, "FileBaton")
"""Whether builders wait until the file is gone. From torch 2.14 on it stays, and its lock ends with its process."""
STALE_SECONDS = 60.0
"""A build whose folder has not changed for this long, and whose lock no process holds, is taken for dead."""


def _locks() -> list[Path]:
    # TORCH_EXTENSIONS_DIR holds the extensions themselves, the default root a folder for each Python and CUDA version.
    chosen = os.environ.get("TORCH_EXTENSIONS_DIR")
    root, pattern = (Path(chosen), "*/lock") if chosen else (Path(cpp_extension.get_default_build_root()), "*/*/lock")
    return sorted(root.glob(pattern)) if root.is_dir() else []


def _is_held(lock: Path) -> bool:
    """Whether a process on this host has the lock file open: a builder keeps it open until it is done."""
    try:
        target = lock.stat()
    except FileNotFoundError:
        return False
    for descriptor in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            status = descriptor.stat()
        except OSError:
            continue
        if (status.st_dev, status.st_ino) == (target.st_dev, target.st_ino):
            return True
    return False


def _idle_seconds(folder: Path) -> float:
    newest = 0.0
    for entry in (folder, *folder.iterdir()):
        try:
            newest = max(newest, entry.stat().st_mtime)
        except FileNotFoundError:
            continue
    return time.time() - newest


def check_extension_locks(op_names: Collection[str], say: Callable[[str], None] = lambda text: None) -> None:
    """Refuse to go on where a build of one of `op_names` was killed and left its lock.

    A lock that a process on this host holds is a build in progress and is left alone. One that nobody here holds may
    belong to another host on a shared folder: it is refused only once its folder has not changed for STALE_SECONDS.

    Raises:
        ConfigError: names the lock and the command that removes it.
    """
    for lock in _locks() if FILES_ARE_LOCKS else ():
        if lock.parent.name not in op_names:
            continue
        told = False
        while lock.exists() and not _is_held(lock):
            idle = _idle_seconds(lock.parent)
            if idle >= STALE_SECONDS:
                raise ConfigError(
                    f"{lock}: got a lock that no process holds, left by a build of {lock.parent.name!r} that was "
                    f"killed (nothing changed there for {idle:.0f} s); allowed: no lock, or one of a build that is "
                    f"running; fix: rm {lock} (DeepSpeed would wait for it for ever)"
                )
            if not told:
                say(f"waiting for {lock}, which another host may hold; at most {STALE_SECONDS - idle:.0f} s")
                told = True
            time.sleep(min(1.0, STALE_SECONDS - idle))
