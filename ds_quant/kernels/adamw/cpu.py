"""Fused AdamW on the CPU: hands the works of a step to the C++ kernel, which has the reference's result bit for bit."""

import ctypes
import functools
import struct
from collections.abc import Sequence

import torch
from torch import Tensor

from ds_quant.base.log import warn
from ds_quant.kernels import native
from ds_quant.kernels.adamw import ops
from ds_quant.kernels.adamw.work import AdamWWork, MastersWork
from ds_quant.numerics.adam import Moment
from ds_quant.numerics.codes import MAPS, CodeMap, code_values, decode, encode

MAX_LEVELS = 512
"""The rough roots of the kernel are exact enough up to here."""

# The structures Entry, and MomentFormat twice after two dtypes in Format, of adamw.h.
_ENTRY = struct.Struct("@7Q3qQ6d6I2i")
_MOMENT_FORMAT = struct.Struct("@6i256fi50f" + 2 * "2i32i")
_TABLE, _POWER, _FLOAT = range(3)
_NO_KEY = (0, 0)


@ops.adamw_.by("cpu")
def adamw_(works: Sequence[AdamWWork], *, isa: str | None = None) -> None:
    """Do the works in place, with torch.get_num_threads() threads; the result does not depend on their number.

    Nothing is allocated beside some bytes a tensor, and four bytes a block where blocks exceed 4096 elements. Works
    with a map that the kernel does not have (`register_map`) go on to the next backend, which is said once. `isa` asks
    for a narrower instruction set. Raises ValueError, before anything is changed, for keys and maps that there are not.
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
    handle = _library()
    formats: dict[tuple, int] = {}
    pack = _ENTRY.pack
    rows, others = [], []
    low_bits, param_key = 0, None
    try:
        for number, work in enumerate(works):
            param, grad, exp_avg, exp_avg_sq, scalars, key, sq_key, stream = work
            numel = param.numel()
            first_map, codes, scale, block_size = _moment(exp_avg)
            second_map, sq_codes, sq_scale, sq_block_size = _moment(exp_avg_sq)
            kind = (param.dtype, grad.dtype, first_map, second_map)
            if kind not in formats and not (_has_map(first_map) and _has_map(second_map)):
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
                    formats.setdefault(kind, len(formats)),
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
    parallel, threads = native.library().parallel, torch.get_num_threads()
    if handle.ds_quant_adamw(b"".join(rows), len(rows), packed, chosen, parallel, threads):
        raise MemoryError(f"{where}: no memory for the maxima of the blocks")
    return others


@functools.cache
def _has_map(code_map: CodeMap | None) -> bool:
    if code_map is None or code_map.name in MAPS:
        return True
    warn(f"AdamW: moments with the map {code_map.name} are stepped without the C++ kernel, which does not have it")
    return False


def _moment(moment: Moment) -> tuple[CodeMap | None, int, int, int]:
    """(code map or None for fp32, address of the codes or the fp32 moment, address of the scales, block size)."""
    if isinstance(moment, Tensor):
        return None, moment.data_ptr(), 0, 1
    codes, scale, _, block_size, code_map = moment
    return code_map, codes.data_ptr(), scale.data_ptr(), block_size


@functools.lru_cache(maxsize=256)
def _format(param: torch.dtype, grad: torch.dtype, exp_avg: CodeMap | None, exp_avg_sq: CodeMap | None) -> bytes:
    dtypes = struct.pack("@2i", native.DTYPES[param], native.DTYPES[grad])
    return dtypes + _moment_format(exp_avg, "exp_avg") + _moment_format(exp_avg_sq, "exp_avg_sq")


def _moment_format(code_map: CodeMap | None, where: str) -> bytes:
    """MomentFormat of adamw.h: bits, is_signed, map, levels, exponent, count, values[256] and what searches 4 bits."""
    pack, rest = _MOMENT_FORMAT.pack, (0, *[0.0] * 50, *[0] * 68)
    if code_map is None:
        return pack(32, 0, _TABLE, 0, 1, 0, *[0.0] * 256, *rest)
    name, bits, signed, levels, offset, exponent = code_map
    is_int8 = code_map.dtype == torch.int8
    known = bits in (8, 4) and exponent in (1, 2, 4, 8) and 0 <= levels <= MAX_LEVELS and offset >= 0
    if not known or not 1 <= code_map.highest <= 2 ** (bits - is_int8) - 1 or (bits == 8 and is_int8 and offset):
        raise ValueError(
            f"adamw_({where}): got {code_map}; allowed: 8 or 4 bits, exponents 1, 2, 4, 8, at most {MAX_LEVELS} "
            "levels, codes that fit the bits, no offset in signed 8-bit maps; set DS_QUANT_KERNELS=reference for others"
        )
    if where == "exp_avg" and not signed:
        raise ValueError(f"adamw_(exp_avg): got {code_map}; allowed: signed maps; make it with signed=True")
    if bits == 4:
        halves = torch.arange(16)
        values = decode((halves ^ 8) - 8 if is_int8 else halves, code_map).tolist()
        return pack(4, signed, _TABLE, 0, 1, 0, *values, *[0.0] * 240, is_int8, *_search_tables(code_map))
    if name == "float":
        return pack(8, signed, _FLOAT, levels, 1, 0, *[0.0] * 256, *rest)
    if levels and not offset:
        return pack(8, signed, _POWER, levels, exponent, 0, *[0.0] * 256, *rest)
    values = code_values(code_map).tolist()
    return pack(8, signed, _TABLE, 0, 1, len(values), *values, *[values[-1]] * (256 - len(values)), *rest)


def _search_tables(code_map: CodeMap) -> list[float]:
    """bounds, gaps, thresholds, bound_cells and threshold_cells of a MomentFormat."""
    values = decode(torch.arange(code_map.highest + 1), code_map)
    bounds, gaps, thresholds = (torch.full((size,), torch.inf) for size in (17, 16, 17))
    bounds[: len(values) - 1] = values[:-1]
    gaps[: len(values) - 1] = (values[1:] - values[:-1]) * 2.0**-16
    # The least x that `encode` gives each code, found by halving intervals of integers that are ordered as fp32 is.
    codes = torch.arange(1, code_map.highest + 1)
    below, reached = torch.full_like(codes, -0x3F800001), torch.full_like(codes, 0x3F800000)
    if code_map.levels:
        below.fill_(-1)
    while (reached - below > 1).any():
        middle = (below + reached).div(2, rounding_mode="floor")
        size = middle.abs().to(torch.int32).view(torch.float32)
        is_reached = encode(torch.where(middle < 0, -size, size), code_map) >= codes
        below, reached = torch.where(is_reached, below, middle), torch.where(is_reached, middle, reached)
    size = reached.abs().to(torch.int32).view(torch.float32)
    thresholds[1 : len(values)] = torch.where(reached < 0, -size, size)
    return [*torch.cat((bounds, gaps, thresholds)).tolist(), *_cells(bounds), *_cells(thresholds)]


def _cells(bounds: Tensor) -> list[int]:
    """Cells of adamw.h: shift, first, codes."""
    for shift in (22, 21):
        first = (0x3F800000 >> shift) - 31
        starts = ((torch.arange(32) + first) << shift).to(torch.int32).view(torch.float32)
        starts[0] = 0.0
        ends = torch.cat((starts[1:], torch.tensor([torch.inf])))
        is_within = (bounds[1:] > starts[:, None]) & (bounds[1:] < ends[:, None])
        codes = (bounds[1:] <= starts[:, None]).sum(dim=1)
        # The first code is looked up by what is empty too: see Small32.
        if (bounds >= 0).all() and (is_within.sum(dim=1) <= 1).all() and codes[0] == 0:
            return [shift, first, *codes.tolist()]
    return [0] * 34


@functools.cache
def _library() -> ctypes.CDLL:
    handle = native.library().handle
    handle.ds_quant_adamw.argtypes = [
        *(ctypes.c_char_p, ctypes.c_int64, ctypes.c_char_p),
        *(ctypes.c_int, ctypes.c_void_p, ctypes.c_int),
    ]
    sizes = []
    for function in (handle.ds_quant_entry_size, handle.ds_quant_format_size):
        function.restype = ctypes.c_int64
        sizes.append(function())
    assert sizes == [_ENTRY.size, 8 + 2 * _MOMENT_FORMAT.size]
    return handle
