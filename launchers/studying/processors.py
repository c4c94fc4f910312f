"""On which kind of processor a figure was made: to the last digit, runs end alike on the same kind alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

_WITH = " with "
_FIRST = "AVX512 VNNI"
"""Of the lines of the CSV that tell a processor and not its instructions: all of them were made with these."""


def named(device: str, processor: str) -> str:
    """What the column `processor` has: its name, and the instructions or the CUDA that products are computed with."""
    import torch

    if device == "cuda":
        return f"{processor}{_WITH}CUDA {torch.version.cuda}"
    # As torch itself chooses among its kernels, also where ATEN_CPU_CAPABILITY tells it to.
    instructions = torch.backends.cpu.get_cpu_capability()
    if instructions == "AVX512" and _has_vnni():
        instructions = _FIRST
    return f"{processor}{_WITH}{instructions}"


def kind(processor: str) -> str:
    """The kind that the column `processor` means."""
    return processor if _WITH in processor else f"{processor}{_WITH}{_FIRST}"


def where(device: str) -> dict[str, Any]:
    """What `results.of_run` says of the machine."""
    import torch

    from ds_quant.cli.shared.tables import environment

    found = environment(torch.device(device))
    return {**found, "processor": named(device, found["processor"])}


def _has_vnni() -> bool:
    try:
        return "avx512_vnni" in Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return False
