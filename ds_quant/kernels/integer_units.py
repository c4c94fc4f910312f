"""Whether a device multiplies int8 by integer dot products, found out once in a process.

`torch._int_mm` is put to the test before it is relied on: on x86 processors without VNNI oneDNN adds pairs of products
in 16 bits, which saturate without a word. Where it fails, `int8_matmul` takes exact products in fp32 in its place.
"""

import functools
import platform
from pathlib import Path
from typing import NamedTuple

import torch

from ds_quant.log import warn

_CPU_FLAGS = {
    "avx512_vnni": "AVX-512 VNNI",
    "avx_vnni": "AVX-VNNI",
    "amx_int8": "AMX",
    "asimddp": "NEON dot products",
    "i8mm": "NEON int8 matrix products",
}
_OLDEST_CUDA = (7, 5)
"""First compute capability with integer tensor cores."""


class IntegerUnits(NamedTuple):
    """What a device has for products of int8."""

    is_exact: bool
    """torch._int_mm passed its test."""
    names: str
    """Of the units; empty where none were found."""

    @property
    def is_fast(self) -> bool:
        """Whether int8 products may be expected to be faster than those of bf16."""
        return self.is_exact and bool(self.names)

    def line(self) -> str:
        """What to expect, in a line."""
        if not self.is_exact:
            return (
                "torch._int_mm gives wrong sums here (a processor without integer dot products): int8 products run in "
                "fp32, exact but slower than bf16; use backend simulated on it, or another machine for speed"
            )
        if not self.names:
            return "no integer dot products were found: int8 products are right but may well be slower than bf16"
        return f"int8 products run on {self.names}"


@functools.cache
def integer_units(device: torch.device) -> IntegerUnits:
    """Those of a device; warns where a user should not expect speed."""
    found = IntegerUnits(is_int_mm_exact(device), unit_names(device))
    if not found.is_fast:
        warn(f"{device}: {found.line()}")
    return found


def unit_names(device: torch.device) -> str:
    """Names of the integer units of a device, as far as it tells."""
    if device.type == "cuda":
        if torch.version.hip:
            return "AMD matrix cores"
        return "tensor cores" if torch.cuda.get_device_capability(device) >= _OLDEST_CUDA else ""
    return ", ".join(name for flag, name in _CPU_FLAGS.items() if flag in _cpu_flags()) if device.type == "cpu" else ""


def is_int_mm_exact(device: torch.device) -> bool:
    """Whether torch._int_mm agrees with int64 on the patterns that saturate 16-bit sums, and on random ones."""
    generator = torch.Generator().manual_seed(0)
    signs = torch.tensor([1, -1], dtype=torch.int8).repeat(256)
    extreme, lowest = torch.full_like(signs, 127), torch.full_like(signs, -128)
    patterns = torch.stack(
        (extreme, -extreme, extreme * signs, -extreme * signs, lowest, torch.where(signs > 0, extreme, lowest))
    )
    drawn = torch.randint(-128, 128, (84, len(signs)), dtype=torch.int8, generator=generator)
    a, b = torch.cat((patterns, drawn[:26])), torch.cat((patterns, drawn[26:]))
    want = a.long() @ b.long().t()
    try:
        # Both layouts of the second operand: they take different ways.
        got = [torch._int_mm(a.to(device), second.to(device)) for second in (b.t(), b.t().contiguous())]
    except (RuntimeError, NotImplementedError):
        return False
    return all(torch.equal(products.cpu().long(), want) for products in got)


@functools.cache
def _cpu_flags() -> frozenset[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        # macOS has the dot products on every machine that torch still supports; elsewhere nothing is known.
        return frozenset({"asimddp"}) if platform.machine() == "arm64" else frozenset()
    return frozenset(
        word for line in lines if line.lower().startswith(("flags", "features")) for word in line.split(":")[-1].split()
    )
