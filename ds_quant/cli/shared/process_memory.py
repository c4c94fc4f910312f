"""How much additional memory a call needs at its peak."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path

import torch

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def peak_extra_bytes(call: Callable[[], object], device: torch.device) -> int | None:
    """Peak memory during `call` less that before it; None where the system does not tell (no Linux, for a CPU)."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    try:
        _CLEAR.write_text("5")  # reset the peak of the resident set
    except OSError:
        return None
    before = _kilobytes("VmRSS")
    call()
    return max(0, _kilobytes("VmHWM") - before) * 1024


def peak_bytes(call: Callable[[], object], device: torch.device) -> int | None:
    """`peak_extra_bytes` after the process has returned its unused memory to the system."""
    gc.collect()
    # What glibc keeps of freed memory would be used again unseen.
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if device.type == "cpu" else None
    if trim is not None:
        trim(0)
    return peak_extra_bytes(call, device)


def _kilobytes(key: str) -> int:
    for line in _STATUS.read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1])
    raise KeyError(key)
