"""The library of C++ kernels as this process has it: instruction sets, and the numbers that dtypes have there."""

import ctypes
import functools
from typing import NamedTuple

import torch

from ds_quant.kernels.build import load

ISAS = ("plain", "avx2", "avx512")
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


class Library(NamedTuple):
    handle: ctypes.CDLL
    widest: int
    parallel: int | None
    """Address of the GOMP_parallel that torch calls itself; None: one thread."""


@functools.cache
def library() -> Library:
    """The C++ kernels of this process. Raises RuntimeError where there are none."""
    handle, reason = load()
    if handle is None:
        raise RuntimeError(
            f"ds_quant.kernels.native: got no library ({reason}); allowed: one; fix: call the operations, "
            "which fall back to the reference"
        )
    # Looked up among the libraries that torch depends on: a second OpenMP runtime would spin beside the first.
    parallel = getattr(ctypes.CDLL(torch._C.__file__), "GOMP_parallel", None)
    address = None if parallel is None else ctypes.cast(parallel, ctypes.c_void_p).value
    return Library(handle, handle.ds_quant_widest_isa(), address)


def isa() -> str:
    """The instruction set in use: "avx512", "avx2" or "plain"."""
    return ISAS[library().widest]


def isa_number(where: str, name: str | None) -> int:
    """What the C++ functions are told; None is the widest. Raises ValueError for one that this machine lacks."""
    widest = library().widest
    if name is None:
        return widest
    if name not in ISAS[: widest + 1]:
        raise ValueError(f"{where}(isa): got {name!r}; allowed: {', '.join(ISAS[: widest + 1])}; leave it out")
    return ISAS.index(name)
