"""Fused AdamW on the CPU: hands the works of a step to the C++ kernel, which has the reference's result bit for bit."""

import ctypes
import functools
import struct
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ds_quant.kernels import native
from ds_quant.kernels.adamw import ops
from ds_quant.kernels.adamw.work import AdamWWork, MastersWork
from ds_quant.kernels.moment_formats import FORMAT_SIZE, TILE, has_map, in_memory, pack_format
from ds_quant.numerics.codes import CodeMap

_ENTRY = struct.Struct("@7Q3qQ6d6I2i")
"""The structure Entry of adamw.h."""
_NO_KEY = (0, 0)


@ops.adamw_.by("cpu")
def adamw_(works: Sequence[AdamWWork], *, isa: str | None = None) -> None:
    """Do the works in place, with torch.get_num_threads() threads; the result does not depend on their number.

    Nothing is allocated beside some bytes a tensor, and four bytes a block where blocks exceed 4096 elements. Works
    with a map that the kernel does not have (`register_map`) go on to the next backend, which is said once, and so do
    those with two scales to a block where blocks exceed 4096 elements. `isa` asks for a narrower instruction set.
    Raises ValueError, before anything is changed, for keys and maps that there are not.
    """
    others = _run("adamw_", works, isa)
    if others:
        rest = [works[number] for number in others]
        ops.adamw_.after("cpu", rest[0].param.device)(rest)


@ops.adamw_masters_.by("cpu")
def adamw_masters_(works: Sequence[MastersWork], *, isa: str | None = None) -> None:
    """The same of masters: a block of them is expanded, stepped and rounded while it is in the first cache."""
    others = _run("adamw_masters_", [work.step for work in works], isa, works)
    if others:
        rest = [works[number] for number in others]
        ops.adamw_masters_.after("cpu", rest[0].step.param.device)(rest)


def _run(
    where: str, works: Sequence[AdamWWork], isa: str | None, masters: Sequence[MastersWork] | None = None
) -> list[int]:
    """Do the works, of which `masters` are more if given. Returns the numbers of those that are left to others."""
    formats: dict[tuple, tuple[int, bool]] = {}
    pack = _ENTRY.pack
    rows, others = [], []
    low_bits, param_key = 0, None
    try:
        for number, work in enumerate(works):
            param, grad, exp_avg, exp_avg_sq, scalars, key, sq_key, stream = work
            numel = param.numel()
            first_map, codes, scale, block_size = in_memory(exp_avg)
            second_map, sq_codes, sq_scale, sq_block_size = in_memory(exp_avg_sq)
            kind = (param.dtype, grad.dtype, first_map, second_map)
            found = formats.get(kind)
            if found is None:
                if not (has_map("AdamW", first_map) and has_map("AdamW", second_map)):
                    others.append(number)
                    continue
                has_two_scales = second_map is not None and second_map.scales > 1
                found = formats[kind] = (len(formats), has_two_scales)
            if found[1] and not _in_one_pass(block_size, sq_block_size):
                others.append(number)
                continue
            if masters is not None:
                _, lacking, param_key = masters[number]
                low_bits = 0 if lacking is None else lacking.data_ptr()
            rows.append(
                pack(
                    *(param.data_ptr(), grad.data_ptr(), codes, sq_codes, scale, sq_scale, low_bits),
                    *(numel, block_size, sq_block_size, 2 * stream),
                    *scalars,
                    *(key or _NO_KEY),
                    *(sq_key or _NO_KEY),
                    *(param_key or _NO_KEY),
                    found[0],
                    (key is not None) | (sq_key is not None) << 1 | (param_key is not None) << 2,
                )
            )
    except struct.error as error:
        raise ValueError(
            f"{where}(works[{number}]): got keys {key}, {sq_key}, {param_key} and stream {stream} ({error}); allowed: "
            "keys of two words below 2^32, a stream below 2^63; make them with fold_key()"
        ) from None
    chosen = native.isa_number(where, isa)
    packed = b"".join(_format(*kind) for kind in formats)
    if _function()(b"".join(rows), len(rows), packed, isa=chosen):
        raise MemoryError(f"{where}: no memory for the maxima of the blocks")
    return others


def _in_one_pass(*block_sizes: int) -> bool:
    """Whether the kernel reads the moments once; largest values of blocks are all that it keeps between two passes."""
    return max(block_sizes) <= TILE and max(block_sizes) % min(block_sizes) == 0


@functools.lru_cache(maxsize=256)
def _format(param: torch.dtype, grad: torch.dtype, exp_avg: CodeMap | None, exp_avg_sq: CodeMap | None) -> bytes:
    dtypes = struct.pack("@2i", native.DTYPES[param], native.DTYPES[grad])
    if exp_avg and not exp_avg.signed:
        raise ValueError(f"adamw_(exp_avg): got {exp_avg}; allowed: signed maps; make it with signed=True")
    return dtypes + pack_format(exp_avg, "adamw_(exp_avg)") + pack_format(exp_avg_sq, "adamw_(exp_avg_sq)")


@functools.cache
def _function() -> Callable[..., Any]:
    sizes = {"ds_quant_entry_size": _ENTRY.size, "ds_quant_format_size": 8 + 2 * FORMAT_SIZE}
    own = ctypes.c_char_p, ctypes.c_int64, ctypes.c_char_p
    return native.function("ds_quant_adamw", *own, sizes=sizes, result=ctypes.c_int)
