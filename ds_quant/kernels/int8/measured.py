"""Which of several ways is the quickest for a shape on a device: measured at its first use, and kept on disk.

The ways have the same bits, so that ranks may choose differently. The file lies in the cache of the C++ kernels
(`kernels.build`), one for each kind of device and version of driver, torch and triton. Processes that write at once
replace each other's file whole: an entry that is lost is measured again. What cannot be read counts as absent.
"""

import hashlib
import json
import math
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from ds_quant.base.log import warn
from ds_quant.base.whole_folder import write_whole
from ds_quant.kernels.build import cache_folder

_ROUNDS = 5
_DIGITS = 3
"""Binary ones of a size that count: sizes share an entry with those up to a quarter larger."""

Milliseconds = dict[str, float]
Timer = Callable[[Mapping[str, Callable[[], Any]]], Milliseconds]


class Measured:
    """Times of the ways by shape, in memory and in a file."""

    def __init__(self, path: Path | None, timer: Timer) -> None:
        """`path`: None keeps them in memory only."""
        self._path, self._timer = path, timer
        self._known = {} if path is None else read(path)
        self._said = False

    def quickest(self, shape: str, ways: Mapping[str, Callable[[], Any]]) -> str:
        """The name of the way that takes least time; measured where the shape is new. One that fails, for want of
        memory say, has infinite time in this process, and is tried again in the next.

        Raises RuntimeError, from the failure, where all fail.
        """
        times = self._known.get(shape)
        if times is None or set(times) != set(ways):
            times = self._known[shape] = self._timer(ways)
            self._write()
        return min(times, key=times.__getitem__)

    def known(self, shape: str) -> str | None:
        """The same without measuring; None where the shape is new."""
        times = self._known.get(shape)
        return None if times is None else min(times, key=times.__getitem__)

    def _write(self) -> None:
        if self._path is None:
            return
        try:
            whole = {shape: times for shape, times in self._known.items() if _is_sound(times)}
            write(self._path, {**read(self._path), **whole})
        except OSError as error:
            if not self._said:
                self._said = True
                warn(
                    f"times of int8 products cannot be kept in {self._path.parent} ({error}): each run measures them "
                    "again, which takes milliseconds for each shape; set DS_QUANT_CACHE to a folder of your own"
                )


def bucket(size: int) -> int:
    """`size` rounded up to `_DIGITS` binary digits."""
    step = 1 << max(size.bit_length() - _DIGITS, 0)
    return -(-size // step) * step


def read(path: Path) -> dict[str, Milliseconds]:
    """What is whole of a file; nothing of one that is missing or damaged."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    if not isinstance(found, dict):
        return {}
    return {
        shape: {name: float(time) for name, time in times.items()} for shape, times in found.items() if _is_sound(times)
    }


def _is_sound(times: Any) -> bool:
    if not isinstance(times, dict) or not times:
        return False
    return all(isinstance(time, int | float) and 0 < time < math.inf for time in times.values())


def write(path: Path, known: Mapping[str, Milliseconds]) -> None:
    """Replace the file in one step. Raises OSError where the folder cannot be written to."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    # Not durable: a file that a power cut has damaged is measured again.
    write_whole(path, json.dumps(known, indent=1, sort_keys=True), durable=False)


def _driver_version() -> int:
    """Of CUDA, as the driver has it; a build of torch for CPUs has no such function."""
    version: int = torch._C._cuda_getDriverVersion()  # type: ignore[attr-defined]
    return version


def path_for(device: torch.device) -> Path:
    """The file of a CUDA device's kind."""
    import triton

    code = Path(__file__).with_name("triton.py").read_bytes()
    what = (
        *(torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)),
        *(_driver_version(), torch.__version__, triton.__version__, hashlib.sha256(code).hexdigest()),
    )
    return cache_folder() / f"int8-products-{hashlib.sha256(repr(what).encode()).hexdigest()[:32]}.json"


def device_milliseconds(ways: Mapping[str, Callable[[], Any]]) -> Milliseconds:
    """The median time of each way on the current CUDA device, by events; the ways take turns. Infinite if it fails.

    Waits for the device. Raises RuntimeError where all fail.
    """
    times: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {}
    failure: Exception | None = None
    for name, way in ways.items():
        try:
            way()  # compiles, and finds its algorithm
            times[name] = []
        except Exception as error:  # whatever Triton or cuBLASLt make of a shape
            failure = error
            warn(f"int8 products: {name} is not taken for a shape, because it fails: {error}")
    if not times:
        raise RuntimeError(
            f"int8 products: got an error from each of {', '.join(ways)}, the last {failure}; allowed: one that works "
            "on this device; fix: set DS_QUANT_KERNELS=reference, and report this"
        ) from failure
    for _ in range(_ROUNDS):
        for name, pairs in times.items():
            pairs.append((torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)))
            pairs[-1][0].record()
            ways[name]()
            pairs[-1][1].record()
    torch.cuda.synchronize()
    # Events tell half a microsecond; a time of zero would read as damage.
    medians = {
        name: max(statistics.median(begin.elapsed_time(end) for begin, end in pairs), 1e-4)
        for name, pairs in times.items()
    }
    return {name: medians.get(name, math.inf) for name in ways}
