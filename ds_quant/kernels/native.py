"""The library of C++ kernels as this process has it: its functions, instruction sets, and the numbers of dtypes."""

import ctypes
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

from ds_quant.kernels import build

ISAS = ("plain", "avx2", "avx512")
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


_computes = True


class Library(NamedTuple):
    handle: ctypes.CDLL
    widest: int
    parallel: int | None
    """Address of the GOMP_parallel that torch calls itself; None: one thread."""


@functools.cache
def library() -> Library:
    """The C++ kernels of this process. Raises RuntimeError where there are none."""
    handle, reason = build.load()
    if handle is None:
        raise RuntimeError(
            f"ds_quant.kernels.native: got no library ({reason}); allowed: one; fix: call the operations, "
            "which fall back to the reference"
        )
    # Looked up among the libraries that torch depends on: a second OpenMP runtime would spin beside the first.
    parallel = getattr(ctypes.CDLL(torch._C.__file__), "GOMP_parallel", None)
    address = None if parallel is None else ctypes.cast(parallel, ctypes.c_void_p).value
    return Library(handle, handle.ds_quant_widest_isa(), address)


def function(name: str, *arguments: Any, sizes: Mapping[str, int], result: Any = None) -> Callable[..., Any]:
    """The C++ function `name`: called with its own arguments and `isa`, a number of `isa_number`.

    arguments, result: their types for ctypes. sizes: of structures, by the C++ function that tells each.
    Raises RuntimeError where the library sees a structure otherwise.
    """
    if not _computes:
        return lambda *values, isa: None
    handle, _, parallel = library()
    for size_name, expected in sizes.items():
        size = handle[size_name]
        size.restype = ctypes.c_int64
        if size() != expected:
            raise RuntimeError(f"ds_quant.kernels.native: {size_name} is {size()} in C++, {expected} in Python")
    found = handle[name]
    found.argtypes = [*arguments, ctypes.c_int, ctypes.c_void_p, ctypes.c_int]
    found.restype = result
    return lambda *values, isa: found(*values, isa, parallel, torch.get_num_threads())


def skip_arithmetic() -> None:
    """From here on C++ functions return at once in this process, and none is built. There is no way back.

    For dry runs, whose tensors have no values: the kernels write into memory that their callers have allocated.
    """
    global _computes
    _computes = False


def is_usable(instead: str) -> bool:
    """Whether there are C++ kernels; where there are none, a warning says what happens `instead`."""
    return not _computes or build.is_usable(instead)


def isa() -> str:
    """The instruction set in use: "avx512", "avx2" or "plain"."""
    return ISAS[library().widest]


def isa_number(where: str, name: str | None) -> int:
    """What the C++ functions are told; None is the widest. Raises ValueError for one that this machine lacks."""
    widest = library().widest if _computes else 0
    if name is None:
        return widest
    if name not in ISAS[: widest + 1]:
        raise ValueError(f"{where}(isa): got {name!r}; allowed: {', '.join(ISAS[: widest + 1])}; leave it out")
    return ISAS.index(name)
