"""Which products of float8 matrices a device multiplies itself, found out once in a process.

`torch._scaled_mm` is put to the test before it is relied on: other GPUs than NVIDIA's from compute capability 8.9 on
raise, AMD's older ones have other 8-bit numbers, and no cuBLASLt multiplies e5m2 by e5m2. The numbers of the test are
whole and small, so that their sums are exact in 10 bits.

What passes still sums in a way of its own. CPUs sum in fp32. Tensor cores of Hopper keep about 14 bits of a sum of the
128 products before it is added to others in fp32 (arXiv 2412.19437, 3.3.2), unlike `simulated`.
"""

import functools
from typing import NamedTuple

import torch

PAIRS = (
    (torch.float8_e4m3fn, torch.float8_e4m3fn),
    (torch.float8_e5m2, torch.float8_e4m3fn),
    (torch.float8_e4m3fn, torch.float8_e5m2),
)
"""The dtypes of the operands of a layer's products: Y, then dX, and dW of either layout."""
_EXACT, _WRONG = "is exact", "gives wrong results"


class Fp8Units(NamedTuple):
    """What a device has for products of float8: for each of `PAIRS` "is exact", or what torch._scaled_mm does."""

    device: str
    """Its type."""
    sums: tuple[str, ...]
    """As fp32 sums without scales."""
    scaled: tuple[str, ...]
    """In bf16, with scales for rows and columns and a bias."""

    def multiplies(self, a: torch.dtype, b: torch.dtype) -> bool:
        """Whether products [M, K] by [N, K] of these dtypes are left to torch._scaled_mm."""
        return (a, b) in PAIRS and self.sums[PAIRS.index((a, b))] == _EXACT

    def scales(self, a: torch.dtype, b: torch.dtype) -> bool:
        """Whether it applies scales and bias as well."""
        return (a, b) in PAIRS and self.scaled[PAIRS.index((a, b))] == _EXACT

    def line(self) -> str:
        """What multiplies, and what does not and why, in a line."""
        failed: dict[str, list[str]] = {}
        for (a, b), state in zip(PAIRS, self.sums, strict=True):
            if state != _EXACT:
                failed.setdefault(state, []).append(f"{_name(a)} x {_name(b)}")
        reasons = ", ".join(f"torch._scaled_mm of {', '.join(pairs)} {state}" for state, pairs in failed.items())
        if all(state != _EXACT for state in self.sums):
            return f"fp8 products run as simulated ones: {reasons}"
        where = "torch._scaled_mm, about as fast as fp32" if self.device == "cpu" else "tensor cores"
        return f"fp8 products run on {where}" + (reasons and f"; others as simulated ones ({reasons})")


@functools.cache
def fp8_units(device: torch.device) -> Fp8Units:
    """Those of a device."""
    return Fp8Units(
        device.type,
        tuple(_state(device, pair, scaled=False) for pair in PAIRS),
        tuple(_state(device, pair, scaled=True) for pair in PAIRS),
    )


def _state(device: torch.device, pair: tuple[torch.dtype, torch.dtype], *, scaled: bool) -> str:
    generator = torch.Generator().manual_seed(0)
    # Of 16 products of at most 9: all results are at most 4 * 144 / 4, and whole multiples of 1/4 below 2^8 of them.
    a, b = (torch.randint(-3, 4, (32, 16), generator=generator).float() for _ in range(2))
    by_row, by_column = (2.0 ** torch.randint(-1, 1, (32,), generator=generator) for _ in range(2))
    bias = torch.randint(-3, 4, (32,), generator=generator).bfloat16()
    want = a @ b.t()
    try:
        left, right = a.to(pair[0]).to(device), b.to(pair[1]).to(device)
        if scaled:
            want = (want * by_row[:, None] * by_column + bias.float()).bfloat16().float()
            scales = by_row[:, None].to(device), by_column[None].to(device)
            got = torch._scaled_mm(left, right.t(), *scales, bias=bias.to(device), out_dtype=torch.bfloat16)
        else:
            one = torch.ones((), device=device)
            got = torch._scaled_mm(left, right.t(), one, one, out_dtype=torch.float32)
        return _EXACT if torch.equal(got.float().cpu(), want) else _WRONG
    except (RuntimeError, NotImplementedError, ValueError) as error:
        return f"raises {type(error).__name__}: {(str(error).splitlines() or [''])[0][:100]}"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.float8_")
