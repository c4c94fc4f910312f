"""Whether a device multiplies bf16 fast: what decides the dtype of a run that leaves it open.

On a CPU without instructions for bf16 torch multiplies it by plain loops, some sixty times slower than fp32 (AVX2), or
oneDNN converts to fp32 and back (AVX-512 without bf16): never faster than fp32. Nothing is timed here, so that equal
machines have equal answers.
"""

import os
import platform

import torch

from ds_quant.kernels.integer_units import cpu_flags

_X86_FLAGS = frozenset({"avx512_bf16", "amx_bf16"})
_NARROW_ATEN = ("default", "avx2")
_NARROW_ONEDNN = ("SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX512_CORE", "AVX512_CORE_VNNI")
"""Limits that take the instructions away: of ATEN_CPU_CAPABILITY and ONEDNN_MAX_CPU_ISA."""


def multiplies_bf16_fast(device: torch.device) -> bool:
    """Whether products of bf16 are faster than those of fp32: CUDA since Ampere, CPUs with instructions for them."""
    if device.type == "cpu":
        return _cpu_multiplies_bf16_fast()
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    supports = getattr(torch.get_device_module(device), "is_bf16_supported", None)
    return supports is not None and bool(supports())


def _cpu_multiplies_bf16_fast() -> bool:
    # Whatever the processor has, it is oneDNN that uses it.
    if not torch.backends.mkldnn.is_available():
        return False
    if platform.machine().lower() in ("aarch64", "arm64"):
        return "bf16" in cpu_flags()
    if os.environ.get("ATEN_CPU_CAPABILITY", "").lower() in _NARROW_ATEN:
        return False
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA", os.environ.get("DNNL_MAX_CPU_ISA", ""))
    return limit.upper() not in _NARROW_ONEDNN and bool(_X86_FLAGS & cpu_flags())
