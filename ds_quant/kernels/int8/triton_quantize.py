"""Padded codes of a layer's operands in Triton. Nobody has run it on a GPU yet.

`numerics.products.quantize_operand` and `quantize_gradient`, meant to be theirs bit for bit; the tests show so in
Triton's interpreter.

    group_kernel    rows, or columns: a program finds the scales of some, and reads them again for their codes
    scan_kernel     maxima of rows, of columns, or of all, and sums of columns: a program has some rows, whole
    tile_kernel     codes by the scales that these maxima give: a program has some columns of some rows

An operand with a scale for each row or column is one launch of the first. A gradient, and one scale for all, is one of
the second and one of the third: each reads its operand once.

Columns have no maxima across programs but *parts*, [programs of the scan, columns], of which each program of the third
kernel takes the maximum: nothing has to be set to zero first, and sums have one order.

The subkey of a rounding is derived in the kernel, from a key on the device: no launch, and a CUDA graph that is
replayed with another key draws other bits. Elements are numbered in 32 bits where there are no more than 2^32.

What is passed is not checked here. Importing this module needs triton.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ds_quant.kernels.int8.quantize_kernels import group_kernel, scan_kernel, tile_kernel
from ds_quant.kernels.launching import LARGEST_STRIDE, Launch, ceil_div, flat, is_one, run
from ds_quant.numerics import products as reference
from ds_quant.numerics.products import ALIGNMENT
from ds_quant.numerics.random import MASK


class Tile(NamedTuple):
    """The part of an operand that a program has at a time."""

    rows: int
    columns: int
    num_warps: int = 4


ROWS = (Tile(32, 128), Tile(16, 256))
"""Tiles of the group kernel with scales of rows.

Turned codes of 32 rows are whole sectors of memory; 16 give more programs.
"""
COLUMNS = (Tile(64, 64), Tile(128, 32), Tile(256, 16))
"""Tiles of the group kernel with scales of columns."""
SCAN = (Tile(64, 128, 8), Tile(32, 256, 8), Tile(16, 256))
ENOUGH_PROGRAMS = 128
"""About as many as an A100 (108) and an H100 (132) have multiprocessors."""
WHOLE = Tile(64, 64, 8)
"""The tile of the tile kernel."""
MANY_PROGRAMS = 1024
"""The most programs of the tile kernel: more would only read the parts of columns again."""


def quantize_operand(
    x: Tensor,
    levels: float,
    *,
    granularity: str,
    factor: Tensor | None = None,
    key: Tensor | None = None,
    stream: int = 0,
    ways: str = "both",
) -> tuple[Tensor, Tensor, Tensor]:
    """`numerics.products.quantize_operand`."""
    if not _fits(x):
        options: dict[str, Any] = {"granularity": granularity, "factor": factor, "key": key, "stream": stream}
        return reference.quantize_operand(x, levels, **options, ways=ways)
    x = _readable(x)
    num_scales = {"row": x.shape[0], "column": x.shape[1], "tensor": 1}[granularity]
    codes, turned = _codes(x, ways != "turned"), _codes(x.t(), ways != "codes")
    scale = torch.empty(num_scales, dtype=torch.float32, device=x.device)
    rounding = _rounding(x, levels, key)
    if granularity == "tensor":
        parts = torch.empty(ceil_div(x.shape[0], _scan_tile(x).rows), dtype=torch.float32, device=x.device)
        run(scan(x, rounding, one_parts=parts), x.device)
        run(tiles(x, rounding, codes, turned, scale, one_parts=parts, streams=(stream, stream)), x.device)
    else:
        run(groups(x, rounding, granularity, flat(factor), codes, turned, scale, stream), x.device)
    none = torch.empty(0, dtype=torch.int8, device=x.device)
    return none if codes is None else codes, none if turned is None else turned, scale


def quantize_gradient(
    g: Tensor,
    levels: float,
    *,
    column_scale: Tensor | None = None,
    row_scale: Tensor | None = None,
    key: Tensor | None = None,
    row_stream: int = 0,
    column_stream: int = 0,
    sums: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`numerics.products.quantize_gradient`; sums are fp32's, rounded once."""
    if not _fits(g):
        options: dict[str, Any] = {"column_scale": column_scale, "row_scale": row_scale, "key": key, "sums": sums}
        return reference.quantize_gradient(g, levels, **options, row_stream=row_stream, column_stream=column_stream)
    g = _readable(g)
    rounding = _rounding(g, levels, key)
    codes, turned = _codes(g, True), _codes(g.t(), True)
    num_rows, num_columns = g.shape
    fp32: dict[str, Any] = {"dtype": torch.float32, "device": g.device}
    scales = torch.empty(num_rows, **fp32), torch.empty(num_columns, **fp32)
    total = torch.empty(num_columns if sums else 0, dtype=g.dtype, device=g.device)
    num_parts = ceil_div(num_rows, _scan_tile(g).rows)
    parts = torch.empty(num_parts, num_columns, **fp32)
    sum_parts = torch.empty(num_parts, num_columns, **fp32) if sums else None
    factors = flat(column_scale), flat(row_scale)
    run(scan(g, rounding, *factors, row_scales=scales[0], column_parts=parts, sum_parts=sum_parts), g.device)
    by = {"column_parts": parts, "sum_parts": sum_parts, "sums": total if sums else None}
    streams = row_stream, column_stream
    run(tiles(g, rounding, codes, turned, scales[1], *factors, row_scales=scales[0], streams=streams, **by), g.device)
    return codes, scales[0], turned, scales[1], total  # type: ignore[return-value]


class Rounding(NamedTuple):
    """How steps become codes."""

    levels: float
    key: Tensor | None


def groups(
    x: Tensor,
    rounding: Rounding,
    granularity: str,
    factor: Tensor | None,
    codes: Tensor | None,
    turned: Tensor | None,
    scale: Tensor,
    stream: int,
) -> Launch:
    """The launch that fills codes, turned codes and scales of rows or columns."""
    by_columns = granularity == "column"
    extent = _padded(x.shape[1] if by_columns else x.shape[0])
    choice = COLUMNS if by_columns else ROWS
    tile = next((t for t in choice if ceil_div(extent, t[by_columns]) >= ENOUGH_PROGRAMS), choice[-1])
    tensors = (x, factor, rounding.key, codes, turned, scale)
    numbers = (*x.shape, *x.stride(), *_words(stream))
    constants = (rounding.levels, by_columns, is_one(factor), _is_narrow(x), tile.rows, tile.columns)
    return Launch(group_kernel, (ceil_div(extent, tile[by_columns]),), (*tensors, *numbers, *constants), _options(tile))


def scan(
    x: Tensor,
    rounding: Rounding,
    column_factor: Tensor | None = None,
    row_factor: Tensor | None = None,
    *,
    row_scales: Tensor | None = None,
    column_parts: Tensor | None = None,
    one_parts: Tensor | None = None,
    sum_parts: Tensor | None = None,
) -> Launch:
    """The launch that fills the scales of rows, and the parts that are asked for."""
    tile = _scan_tile(x)
    tensors = (x, column_factor, row_factor, row_scales, column_parts, one_parts, sum_parts)
    constants = (rounding.levels, is_one(column_factor), is_one(row_factor), tile.rows, tile.columns)
    grid = (ceil_div(x.shape[0], tile.rows),)
    return Launch(scan_kernel, grid, (*tensors, *x.shape, *x.stride(), *constants), _options(tile))


def tiles(
    x: Tensor,
    rounding: Rounding,
    codes: Tensor | None,
    turned: Tensor | None,
    scale: Tensor,
    column_factor: Tensor | None = None,
    row_factor: Tensor | None = None,
    *,
    row_scales: Tensor | None = None,
    column_parts: Tensor | None = None,
    one_parts: Tensor | None = None,
    sum_parts: Tensor | None = None,
    sums: Tensor | None = None,
    streams: tuple[int, int],
) -> Launch:
    """The launch that fills codes, and the scales of columns or the one scale, from what the scan found."""
    tile = WHOLE
    num_rows, num_columns = (_padded(size) for size in x.shape)
    across = ceil_div(num_columns, tile.columns)
    down = min(ceil_div(num_rows, tile.rows), max(MANY_PROGRAMS // across, 1))
    num_tiles = ceil_div(ceil_div(num_rows, tile.rows), down)
    parts = one_parts if column_parts is None else column_parts
    assert parts is not None
    tensors = (x, column_factor, row_factor, rounding.key, codes, turned, row_scales, scale, parts, sum_parts, sums)
    numbers = (parts.shape[0], num_tiles, *x.shape, *x.stride(), *_words(streams[0]), *_words(streams[1]))
    flags = (column_parts is None, is_one(column_factor), is_one(row_factor), _is_narrow(x))
    constants = (rounding.levels, *flags, tile.rows, tile.columns)
    grid = (across, ceil_div(num_rows, num_tiles * tile.rows))
    return Launch(tile_kernel, grid, (*tensors, *numbers, *constants), _options(tile))


def _options(tile: Tile) -> dict[str, Any]:
    return {"num_warps": tile.num_warps, "enable_fp_fusion": False}


def _scan_tile(x: Tensor) -> Tile:
    return next((t for t in SCAN if ceil_div(x.shape[0], t.rows) >= ENOUGH_PROGRAMS), SCAN[-1])


def _fits(x: Tensor) -> bool:
    """Whether there is something to do, and offsets within a tile fit 32 bits."""
    return bool(x.numel()) and max(x.shape) <= LARGEST_STRIDE


def _readable(x: Tensor) -> Tensor:
    x = x.detach()
    return x if max(x.stride()) <= LARGEST_STRIDE else x.contiguous()


def _codes(x: Tensor, is_asked: bool) -> Tensor | None:
    shape = [_padded(size) for size in x.shape]
    return torch.empty(shape, dtype=torch.int8, device=x.device) if is_asked else None


def _padded(size: int) -> int:
    return ceil_div(size, ALIGNMENT) * ALIGNMENT


def _rounding(x: Tensor, levels: float, key: Tensor | None) -> Rounding:
    key = None if key is None else key.to(x.device, non_blocking=True)
    return Rounding(float(levels), flat(key))


def _is_narrow(x: Tensor) -> bool:
    return math.prod(x.shape) <= 2**32


def _words(stream: int) -> tuple[int, int]:
    """As int32: Triton would compile once for words below 2^31 and once for the others."""
    low, high = stream & MASK, stream >> 32
    return low - (low >> 31 << 32), high - (high >> 31 << 32)
