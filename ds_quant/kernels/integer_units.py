"""Whether a device multiplies int8 well by integer dot products, found out once in a process.

`torch._int_mm` is put to the test before it is relied on: on x86 processors without VNNI oneDNN may add pairs of
products in 16 bits, which saturate without a word, or multiply by a plain loop, which is right and some fifty times
slower than fp32. Where it is wrong or the slower one, `int8_matmul` takes exact products in fp32 in its place.
"""

import functools
import math
import platform
import time
from pathlib import Path
from typing import NamedTuple

import torch

from ds_quant.base.log import warn

_CPU_FLAGS = {
    "avx512_vnni": "AVX-512 VNNI",
    "avx_vnni": "AVX-VNNI",
    "amx_int8": "AMX",
    "asimddp": "NEON dot products",
    "i8mm": "NEON int8 matrix products",
}
_OLDEST_CUDA = (7, 5)
"""First compute capability with integer tensor cores."""
_LAYOUTS = ("TN", "NN", "TT", "NT")
"""As cuBLAS has them: TN is a [M, K] and the transposed view of [N, K], both contiguous along what is contracted."""
_MULTIPLIED_ON_CUDA = ("TN",)
_EXACT, _WRONG = "is exact", "gives wrong sums here (a processor without integer dot products)"
_PROBE_SIZES = (128, 384)
"""Of square matrices: the larger ones where the smaller leave a doubt, which calls that are slow never do."""
_PROBE_ROUNDS = 4
"""The first one pays for what is set up."""
_CLEAR = 4.0
"""Times as fast: what a call costs beside its products, at the smaller size, is less."""


class IntegerUnits(NamedTuple):
    """What a device has for products of int8."""

    is_exact: bool
    """torch._int_mm passed its test."""
    names: str
    """Of the units; empty where none were found."""
    speed: float | None = None
    """How many times as fast torch._int_mm is as exact products of the codes in fp32; None: not measured."""
    flaws: str = ""
    """What torch._int_mm gets wrong, by layout: "NN raises RuntimeError"."""
    is_needed: bool = True
    """Whether products that torch._int_mm gets wrong would run in fp32: on GPUs Triton's kernels may take them."""

    @property
    def serve(self) -> bool:
        """Whether int8 products are left to torch._int_mm; exact products in fp32 take its place otherwise."""
        return self.is_exact and (self.speed is None or self.speed >= 1)

    @property
    def is_fast(self) -> bool:
        """Whether int8 products may be expected to be faster than those of floats."""
        return (self.serve or not self.is_needed) and (bool(self.names) or self.speed is not None)

    def line(self) -> str:
        """Which products were chosen, and what to expect, in a line."""
        if not self.is_exact and not self.is_needed:
            return f"int8 products run on Triton's kernels alone, as of torch._int_mm {self.flaws}"
        if not self.is_exact:
            return (
                f"int8 products run in fp32, exact: torch._int_mm {self.flaws or _WRONG}; expect about the speed of "
                "fp32 layers"
            )
        if not self.serve:
            assert self.speed is not None
            return (
                f"int8 products run in fp32, exact: torch._int_mm took {1 / self.speed:.3g} times as long here; expect "
                "about the speed of fp32 layers"
            )
        where = self.names or "torch._int_mm"
        if self.speed is None:
            slow = "" if self.names else " without integer dot products: right, but may well be slower than bf16"
            return f"int8 products run on {where}{slow}" + (self.flaws and f" (of torch._int_mm {self.flaws})")
        return f"int8 products run on {where}, {self.speed:.3g} times as fast here as exact products in fp32"


@functools.cache
def integer_units(device: torch.device) -> IntegerUnits:
    """Those of a device; warns where a user should not expect speed.

    Both ways are exact: ranks that choose differently have the same bits.
    """
    states = int_mm_states(device)
    is_exact = is_int_mm_exact(device)
    wrong = [layout for layout, state in states.items() if state == _WRONG]
    flaws = [f"{layout} {state}" for layout, state in states.items() if state not in (_EXACT, _WRONG)]
    if wrong:
        flaws.insert(0, _WRONG if len(wrong) == len(_LAYOUTS) else f"{', '.join(wrong)} {_WRONG}")
    speed = int_mm_speed() if is_exact and device.type == "cpu" else None
    found = IntegerUnits(is_exact, unit_names(device), speed, ", ".join(flaws), is_needed=not _has_kernels(device))
    if not found.is_fast:
        warn(f"{device}: {found.line()}")
    return found


def _int_mm(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch._int_mm(a, b)


def _fp32_mm(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.mm(a.float(), b.float())


def int_mm_speed() -> float:
    """How many times as fast as exact products in fp32, conversion of the codes included, torch._int_mm is on the CPU.

    Both take turns, and the best of several counts. It takes milliseconds.
    """
    ratio = 1.0
    for size in _PROBE_SIZES:
        codes = torch.randint(-127, 128, (size, size), dtype=torch.int8, generator=torch.Generator().manual_seed(0))
        best = [math.inf, math.inf]
        for _ in range(_PROBE_ROUNDS):
            for number, multiply in enumerate((_int_mm, _fp32_mm)):
                begin = time.perf_counter()
                multiply(codes, codes.t())
                best[number] = min(best[number], time.perf_counter() - begin)
        ratio = best[1] / best[0]
        if not 1 / _CLEAR < ratio < _CLEAR:
            break
    return ratio


def unit_names(device: torch.device) -> str:
    """Names of the integer units of a device, as far as it tells."""
    if device.type == "cuda":
        if torch.version.hip:
            return "AMD matrix cores"
        return "tensor cores" if torch.cuda.get_device_capability(device) >= _OLDEST_CUDA else ""
    return ", ".join(name for flag, name in _CPU_FLAGS.items() if flag in cpu_flags()) if device.type == "cpu" else ""


def is_int_mm_exact(device: torch.device) -> bool:
    """Whether torch._int_mm is exact in all layouts in which it is called."""
    states = int_mm_states(device)
    return all(states[layout] == _EXACT for layout in (_MULTIPLIED_ON_CUDA if device.type == "cuda" else _LAYOUTS))


@functools.cache
def int_mm_states(device: torch.device) -> dict[str, str]:
    """For each layout of operands, whether torch._int_mm agrees with int64: "is exact", or what it does instead.

    On the patterns that saturate 16-bit sums, and on random ones. Each layout takes another way.
    """
    generator = torch.Generator().manual_seed(0)
    signs = torch.tensor([1, -1], dtype=torch.int8).repeat(256)
    extreme, lowest = torch.full_like(signs, 127), torch.full_like(signs, -128)
    patterns = torch.stack(
        (extreme, -extreme, extreme * signs, -extreme * signs, lowest, torch.where(signs > 0, extreme, lowest))
    )
    drawn = torch.randint(-128, 128, (84, len(signs)), dtype=torch.int8, generator=generator)
    a, b = torch.cat((patterns, drawn[:26])), torch.cat((patterns, drawn[26:]))
    want = a.long() @ b.long().t()
    a, b = a.to(device), b.to(device)
    # cuBLAS, by columns, sees the second operand first.
    firsts, seconds = {"T": b.t(), "N": b.t().contiguous()}, {"N": a, "T": a.t().contiguous().t()}
    return {layout: _state(seconds[layout[1]], firsts[layout[0]], want) for layout in _LAYOUTS}


def _has_kernels(device: torch.device) -> bool:
    from ds_quant.kernels.int8 import padded_ops  # which imports this

    return device.type == "cuda" and padded_ops.pads(device)


def _state(left: torch.Tensor, right: torch.Tensor, want: torch.Tensor) -> str:
    try:
        got = torch._int_mm(left, right)
    except (RuntimeError, NotImplementedError) as error:
        return f"raises {type(error).__name__}"
    return _EXACT if torch.equal(got.cpu().long(), want) else _WRONG


@functools.cache
def cpu_flags() -> frozenset[str]:
    """What the processor says of itself, in the words of /proc/cpuinfo; empty where nothing is known."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        # macOS has the dot products on every machine that torch still supports; elsewhere nothing is known.
        return frozenset({"asimddp"}) if platform.machine() == "arm64" else frozenset()
    return frozenset(
        word for line in lines if line.lower().startswith(("flags", "features")) for word in line.split(":")[-1].split()
    )
