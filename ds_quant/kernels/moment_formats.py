"""Code maps of optimizer states as the C++ kernels take them: the structure MomentFormat of csrc/adamw.h."""

import functools
import struct

import torch
from torch import Tensor

from ds_quant.base.log import warn
from ds_quant.numerics import log_codes
from ds_quant.numerics.codes import MAPS, CodeMap, code_values, decode, encode
from ds_quant.numerics.stored_states import State

MAX_LEVELS = 512
"""The rough roots of the kernels are exact enough up to here."""

TILE = 4096
"""Elements that the kernels have in the first cache at once: longer blocks go in two passes, where they go at all."""

_FORMAT = struct.Struct("@6i256fi50f" + 2 * "2i32i")
FORMAT_SIZE = _FORMAT.size
_TABLE, _POWER, _FLOAT, _LOG = range(4)


@functools.cache
def has_map(optimizer: str, code_map: CodeMap | None) -> bool:
    """Whether the kernels have this map; where they have not (`register_map`), that is said once."""
    if code_map is None or code_map.name in (*MAPS, log_codes.NAME):
        return True
    warn(
        f"{optimizer}: moments with the map {code_map.name} are stepped without the C++ kernel, which does not have it"
    )
    return False


def in_memory(moment: State) -> tuple[CodeMap | None, int, int, int]:
    """(code map or None for fp32, address of the codes or the fp32 moment, address of the scales, block size)."""
    if isinstance(moment, Tensor):
        return None, moment.data_ptr(), 0, 1
    codes, scale, _, block_size, code_map = moment
    return code_map, codes.data_ptr(), scale.data_ptr(), block_size


@functools.lru_cache(maxsize=256)
def pack_format(code_map: CodeMap | None, where: str) -> bytes:
    """A MomentFormat: bits, is_signed, map, levels, exponent, count, values[256] and what searches 4 bits.

    None is fp32. Raises ValueError, at `where`, for maps that the kernels do not have.
    """
    pack, rest = _FORMAT.pack, (0, *[0.0] * 50, *[0] * 68)
    if code_map is None:
        return pack(32, 0, _TABLE, 0, 1, 0, *[0.0] * 256, *rest)
    name, bits, signed, levels, offset, exponent = code_map
    if name == log_codes.NAME:
        return pack(bits, signed, _LOG, 0, 1, 0, *[0.0] * 256, *rest)
    is_int8 = code_map.dtype == torch.int8
    known = bits in (8, 4) and exponent in (1, 2, 4, 8) and 0 <= levels <= MAX_LEVELS and offset >= 0
    if not known or not 1 <= code_map.highest <= 2 ** (bits - is_int8) - 1 or (bits == 8 and is_int8 and offset):
        raise ValueError(
            f"{where}: got {code_map}; allowed: 8 or 4 bits, exponents 1, 2, 4, 8, at most {MAX_LEVELS} "
            "levels, codes that fit the bits, no offset in signed 8-bit maps; set DS_QUANT_KERNELS=reference for others"
        )
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
