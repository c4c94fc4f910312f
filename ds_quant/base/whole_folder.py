"""Atomic writing of folders and files: written beside their place and renamed into it."""

import contextlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ds_quant.base.errors import fail


def check_new(out: Path) -> Path:
    """The whole path of a folder to make. Raises ConfigError unless it is new or empty, in a folder that exists."""
    out = out.resolve()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise fail(str(out), "something that is there", "a new or an empty folder", "name another, or remove it")
    if not out.parent.is_dir():
        raise fail(str(out.parent), "no such folder", "a folder to write in", "make it, or correct the path")
    return out


@contextlib.contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """A folder to write into that becomes `out` at the end, or is removed on an error."""
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    temporary.mkdir()
    try:
        yield temporary
        sync_tree(temporary)
        os.rename(temporary, out)  # onto an empty folder, or none
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    sync(out.parent)


def replace_folder(written: Path, folder: Path) -> None:
    """Rename a finished folder to `folder`, in place of what was there. Raises OSError.

    What is in it is on the disk before, so that a power cut leaves no half of it under the name.
    """
    sync_tree(written)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(written, folder)
    sync(folder.parent)


@contextlib.contextmanager
def whole_file(path: Path, *, durable: bool = True) -> Iterator[Path]:
    """A file to write that replaces `path` at the end, or vanishes: a reader finds the old one or the new one.

    durable: the new one is on the disk by then, so that this holds after a power cut, too. A cache that can tell and
        replace damaged files does without, since flushing takes time. Raises OSError.
    """
    # Ranks on other nodes may have the same process number, and threads have.
    beside = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    try:
        yield beside
        if durable:
            sync(beside)
        os.replace(beside, path)
    except BaseException:
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)
        raise
    if durable:
        sync(path.parent)


def write_whole(path: Path, content: str | bytes, *, durable: bool = True) -> None:
    """Replace a file as `whole_file` does; text is written in UTF-8. Raises OSError."""
    with whole_file(path, durable=durable) as beside:
        beside.write_bytes(content.encode() if isinstance(content, str) else content)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """`write_whole` of a JSON file."""
    write_whole(path, json.dumps(content, indent=1) + "\n")


def sync(path: Path) -> None:
    """Flush a file, or a folder's entries, to disk: only then does a rename survive a power cut."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    except OSError:
        if not path.is_dir():  # some network file systems have no such call for folders
            raise
    finally:
        os.close(opened)


def sync_tree(folder: Path) -> None:
    """`sync` of a folder and all that is in it. Raises OSError."""
    for parent, _, files in os.walk(folder):
        for name in files:
            sync(Path(parent, name))
        sync(Path(parent))
