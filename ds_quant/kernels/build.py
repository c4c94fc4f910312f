"""Builds the C++ kernels on first use, with the compiler of the machine, and keeps the library in a cache.

The cache is the folder `kernels` in $DS_QUANT_CACHE, or else in ds_quant in $XDG_CACHE_HOME or ~/.cache. A library's
name holds a hash of all that it was made from, and its last bytes are a hash of the file: what a full disk or a crash
left of one is rebuilt. Ranks that build at the same time each build their own, and the last one wins: there is no
lock that a killed process could leave behind.

A library is code that runs as this user, and its hash can be made by anybody. So the cache is used only where this
user (and root) alone can put a file into it; where others can, each process builds for itself and says so.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import stat
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

from ds_quant.base.log import warn
from ds_quant.base.whole_folder import whole_file

FOLDER = Path(__file__).parent / "csrc"
DRIVERS = ("adamw.cpp", "elementwise.cpp", "wire.cpp", "products.cpp", "masters.cpp", "formats.cpp", "rotation.cpp")
STAGES = (
    *("stages.cpp", "elementwise_stages.cpp", "wire_stages.cpp", "products_stages.cpp", "masters_stages.cpp"),
    *("formats_stages.cpp", "wire_formats_stages.cpp", "rotation_stages.cpp"),
)
"""Compiled once for each instruction set."""
HEADERS = tuple(sorted(path.name for path in FOLDER.glob("*.h")))
SOURCES = (*DRIVERS, *STAGES, *HEADERS)
FLAGS = ("-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-fno-math-errno", "-w")
"""No contraction to fused multiply-add and nothing of -ffast-math: results are the reference's, bit for bit."""
ISA_FLAGS = {
    "plain": (),
    "avx2": ("-mavx2",),
    "avx512": ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"),
}
COMPILERS = ("c++", "g++", "clang++")
DIGEST_BYTES = 32
TIMEOUT_SECONDS = 300


class BuildError(Exception):
    """Why there is no library: no compiler, or what the compiler said."""


class _Unsafe(Exception):
    """Why a folder is not used: others could put a library there."""


class Loaded(NamedTuple):
    library: ctypes.CDLL | None
    reason: str
    """Why `library` is None; else empty."""


@functools.cache
def load() -> Loaded:
    """The library, from the cache or built now (some seconds, once for each version of sources and compiler)."""
    try:
        compiler = find_compiler()
        name = f"{cache_key(compiler)}.so"
        try:
            return Loaded(_load_cached(cache_folder() / name, compiler), "")
        except (OSError, _Unsafe) as error:
            # Else the folder cannot be written to, or libraries cannot be loaded from it (mounted noexec).
            if isinstance(error, _Unsafe):
                warn(
                    f"the cache of C++ kernels in {cache_folder()} is not used, since others can put libraries there: "
                    f"{error}. Each process builds its own, which takes some seconds; fix the permissions, or set "
                    "DS_QUANT_CACHE to a folder of your own"
                )
            with tempfile.TemporaryDirectory(prefix="ds_quant_kernels_") as folder:
                return Loaded(_load_cached(Path(folder) / name, compiler), "")
    except (BuildError, OSError, subprocess.SubprocessError) as error:
        return Loaded(None, str(error))


def is_usable(instead: str) -> bool:
    """Whether there is a library; where there is none, a warning that says what happens `instead`, and the fix."""
    reason = load().reason
    if reason:
        warn(
            f"the C++ kernels could not be built; {instead}; install g++ or clang++, or set CXX to a C++17 compiler. "
            f"The reason: {reason}"
        )
    return not reason


def cache_folder() -> Path:
    chosen = os.environ.get("DS_QUANT_CACHE")
    root = Path(chosen) if chosen else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ds_quant"
    return root / "kernels"


def find_compiler() -> list[str]:
    """The command of the C++ compiler, $CXX if that is set. Raises BuildError where there is none."""
    chosen = shlex.split(os.environ.get("CXX", ""))
    for name in (chosen[0],) if chosen else COMPILERS:
        path = shutil.which(name)
        if path:
            return [path, *chosen[1:]]
    raise BuildError(f"CXX={chosen[0]!r} is no program" if chosen else f"none of {', '.join(COMPILERS)} is installed")


def cache_key(compiler: list[str]) -> str:
    """Hash of the sources, the compiler, the flags and the platform."""
    version = subprocess.run([*compiler, "--version"], capture_output=True, timeout=TIMEOUT_SECONDS).stdout
    digest = hashlib.sha256()
    described = (compiler, os.path.realpath(compiler[0]), FLAGS, _isa_flags(), platform.machine(), platform.libc_ver())
    for part in (repr(described).encode(), version, *((FOLDER / name).read_bytes() for name in SOURCES)):
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()[:32]


def _isa_flags() -> dict[str, tuple[str, ...]]:
    on_x86 = platform.machine() in ("x86_64", "AMD64")
    return ISA_FLAGS if on_x86 else {"plain": ()}


def _load_cached(path: Path, compiler: list[str]) -> ctypes.CDLL:
    """Raises OSError where the folder is of no use, _Unsafe where others can write to it, BuildError where the compiler
    fails.
    """
    _make_private(path.parent)
    if not why_unsafe(path) and _is_whole(path):
        try:
            return ctypes.CDLL(str(path))
        except OSError:
            pass  # built for another libc, for example: rebuilt once
    _build(path, compiler)
    return ctypes.CDLL(str(path))


def _make_private(folder: Path) -> None:
    """Make the folder, for this user alone. Raises _Unsafe where somebody else could put files into it."""
    folder = folder.absolute()
    missing = [parent for parent in (folder, *folder.parents) if not os.path.lexists(parent)]
    for parent in reversed(missing):
        parent.mkdir(mode=0o700, exist_ok=True)
    for place in (folder, folder.resolve()):
        if reason := why_unsafe(place):
            raise _Unsafe(reason)
        for parent in place.parents:
            if reason := why_unsafe(parent, is_ancestor=True):
                raise _Unsafe(reason)


def why_unsafe(path: Path, *, is_ancestor: bool = False) -> str:
    """Why somebody besides this user and root can change what is at `path`; empty where nobody can or nothing is there.

    An ancestor may let others write where it is sticky, as /tmp is: they cannot replace what is ours in there.
    """
    try:
        found = [path.lstat(), path.stat()]
    except FileNotFoundError:
        return ""
    for status in found:
        if status.st_uid not in (os.geteuid(), 0):
            return f"{path} belongs to the user with number {status.st_uid}"
    mode = found[1].st_mode
    if mode & (stat.S_IWGRP | stat.S_IWOTH) and not (is_ancestor and mode & stat.S_ISVTX):
        return f"{path} can be written to by others (mode {stat.S_IMODE(mode):o})"
    return ""


def _is_whole(path: Path) -> bool:
    """Whether the file ends in its own hash. Loading a file that was cut off can kill the process."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return False
    return hashlib.sha256(content[:-DIGEST_BYTES]).digest() == content[-DIGEST_BYTES:]


def _build(path: Path, compiler: list[str]) -> None:
    """Compile into a file of this process's own beside `path`, then put it there in one step."""
    isa_flags = _isa_flags()
    common = [*compiler, *FLAGS, *(["-DDS_QUANT_X86"] if len(isa_flags) > 1 else [])]
    # Not durable: a file that a power cut has damaged lacks its hash, and is built again.
    with whole_file(path, durable=False) as unfinished:
        with tempfile.TemporaryDirectory(prefix="ds_quant_build_") as folder:
            commands = [[*common, "-c", str(FOLDER / name)] for name in DRIVERS]
            for isa, flags in isa_flags.items():
                commands += [[*common, *flags, f"-DDS_QUANT_ISA={isa}", "-c", str(FOLDER / name)] for name in STAGES]
            objects = [f"{folder}/{number}.o" for number in range(len(commands))]
            _run([[*command, "-o", into] for command, into in zip(commands, objects, strict=True)])
            _run([[*compiler, "-shared", *objects, "-o", str(unfinished)]])
        content = unfinished.read_bytes()
        # Loaders ignore what follows the last section.
        unfinished.write_bytes(content + hashlib.sha256(content).digest())
        unfinished.chmod(0o700)  # the linker creates the file with the permissions of the umask


def _run(commands: list[list[str]]) -> None:
    """Run commands side by side. Raises BuildError with what the first that fails said."""
    running = [subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) for command in commands]
    try:
        for command, process in zip(commands, running, strict=True):
            errors = process.communicate(timeout=TIMEOUT_SECONDS)[1].decode(errors="replace").strip()
            if process.returncode:
                raise BuildError(f"{shlex.join(command)} failed with {process.returncode}:\n{errors}")
    finally:
        for process in running:
            if process.poll() is None:
                process.kill()
                process.communicate()
