"""Which processor computes: figures to the last digit are alike on the same kind alone."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

WITH = " with "
VNNI = "AVX512 VNNI"


def name(device: torch.device) -> str:
    """Of the GPU or the CPU, as its maker has it."""
    if device.type == "cuda":
        import torch

        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def kind(device: torch.device) -> str:
    """The name with the instructions, or the CUDA, that torch computes products with: "AMD EPYC with AVX2"."""
    import torch

    from ds_quant.kernels.integer_units import cpu_flags

    if device.type == "cuda":
        return f"{name(device)}{WITH}CUDA {torch.version.cuda}"
    # As torch itself chooses among its kernels, also where ATEN_CPU_CAPABILITY tells it to.
    instructions = torch.backends.cpu.get_cpu_capability()
    if instructions == "AVX512" and "avx512_vnni" in cpu_flags():
        instructions = VNNI
    return f"{name(device)}{WITH}{instructions}"
