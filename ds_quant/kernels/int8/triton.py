"""Products of int8 matrices, with scales and bias, in one Triton kernel. Nobody has run it on a GPU yet.

    int_mm          y[m, n] = sum_k a[m, k] * b[k, n]                                               int32
    scaled_matmul   ((y[m, n] * row_scale[m]) * column_scale[n]) + bias[n], rounded once to `dtype`

The sums are exact while they stay within int32: up to K = 131072 with codes from -127 to 127, and -128 in one of the
operands, which is not checked. A caller splits longer contractions. The rest is fp32 in the order of
`numerics.products.epilogue`, with no product fused into a sum (`enable_fp_fusion=False`): results are meant to be the
definition's, bit for bit. The tests show so in Triton's interpreter, and that what is compiled for sm_80 and sm_90 uses
the integer tensor cores and spills nothing, with Triton 3.7 and 3.8.

A program computes one tile of the result. Neighbouring programs share rows and columns of tiles, to find their
operands in the L2 cache.

An operand is read in place where 16 bytes can be loaded at a time: one of its strides is 1, the other one, K, the
address, and M or N if it is contiguous along that, are multiples of 16. Any other is first copied, contiguous along k
with rows of zeros up to the next multiple of 16: a byte read and one written for each element. Tensor cores take bytes
that are neighbours along k, hence what is read in place has two prices, which nobody has measured:

    contiguous along k        copied asynchronously into shared memory, and read from there by ldmatrix or wgmma itself
    contiguous along m or n   sm_80: copied asynchronously, 4 bytes at a time, and read from there byte by byte
                              sm_90: loaded into registers and written to shared memory byte by byte, before wgmma can
                              begin; no loads of later steps are under way meanwhile if both operands are so

Layers pass padded codes (`numerics.products`), which are of the first kind in all three products.

What is passed is not checked here. Importing this module needs triton.
"""

# What a Triton function is passed has no type that mypy knows.
# mypy: disallow-incomplete-defs=False

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from packaging.version import Version
from torch import Tensor

from ds_quant.kernels.int8 import ops, triton_quantize
from ds_quant.kernels.launching import LARGEST_STRIDE, Launch, ceil_div, flat, is_one, run
from ds_quant.numerics.products import ALIGNMENT


class Tile(NamedTuple):
    """The part of the result that a program computes, and how."""

    m: int
    n: int
    k: int
    """Elements of the contracted dimension that one step multiplies."""
    num_warps: int
    num_stages: int
    """Steps whose operands have room in shared memory at a time."""


# Each element of `a` is read once for every n columns, of `b` for every m rows: the larger, the less traffic. All take
# at most 96 KiB of shared memory, which sm_86 and sm_89 have as well.
TILES = (Tile(128, 256, 64, 8, 4), Tile(128, 128, 128, 8, 3), Tile(64, 128, 128, 4, 3), Tile(64, 64, 128, 4, 4))
ROCM_TILES = (TILES[0]._replace(num_stages=3), *TILES[1:])
"""A program has 64 KiB of LDS there, and operands of one step fewer than there are stages lie in it."""
AMPERE_TILES = (Tile(128, 128, 64, 8, 4), *TILES[2:])
"""For Triton from 3.8 on, which reads operands of sm_8x's tensor cores into registers one step ahead: that takes nearly
twice as many, and the largest tile would spill up to 3 KB a thread.
"""
BLACKWELL_TILES = (Tile(256, 128, 64, 8, 4), *TILES[1:])
"""For Triton from 3.8 on, which uses the tensor memory of sm_100 and sm_103 for int8. Where a program takes its sums
out of it, a thread spills 2 registers, once; with the first of TILES 16.
"""
_IS_NEW = Version(triton.__version__).release >= (3, 8)
ENOUGH_PROGRAMS = 128
"""About as many as an A100 (108) and an H100 (132) have multiprocessors."""
BAND = tl.constexpr(8)
"""Rows of tiles that are computed together, column by column."""


ops.quantize_operand.by("triton")(triton_quantize.quantize_operand)
ops.quantize_gradient.by("triton")(triton_quantize.quantize_gradient)


def int_mm(a: Tensor, b: Tensor) -> Tensor:
    """The product of a [M, K] and b [K, N], int8 of any strides: int32 [M, N], contiguous."""
    return _run(a, b, torch.int32)


@ops.scaled_matmul.by("triton")
def scaled_matmul(
    a: Tensor,
    b: Tensor,
    *,
    row_scale: Tensor | None = None,
    column_scale: Tensor | None = None,
    bias: Tensor | None = None,
    dtype: torch.dtype,
) -> Tensor:
    """((a b * row_scale) * column_scale) + bias, [M, N] in `dtype` (fp32, bf16 or fp16), contiguous.

    a: int8 [M, K]. b: int8 [K, N]. row_scale, column_scale: fp32 of M and N elements, or of one, or None. bias: fp32,
    bf16 or fp16 [N], or None. Strides are free, and so are sizes: with K = 0 the sums are 0.
    """
    return _run(a, b, dtype, row_scale, column_scale, bias)


@ops.padded_matmul.by("triton")
def padded_matmul(
    a: Tensor,
    b: Tensor,
    num_rows: int,
    num_columns: int,
    *,
    row_scale: Tensor | None = None,
    column_scale: Tensor | None = None,
    bias: Tensor | None = None,
    dtype: torch.dtype,
) -> Tensor:
    """`numerics.products.padded_matmul`."""
    return _run(a[:num_rows], b[:num_columns].t(), dtype, row_scale, column_scale, bias)


def _run(a: Tensor, b: Tensor, dtype: torch.dtype, *vectors: Tensor | None) -> Tensor:
    result = torch.empty(a.shape[0], b.shape[1], dtype=dtype, device=a.device)
    if result.numel():
        run(launch(a, b, result, *vectors), a.device)
    return result


def launch(
    a: Tensor,
    b: Tensor,
    result: Tensor,
    row_scale: Tensor | None = None,
    column_scale: Tensor | None = None,
    bias: Tensor | None = None,
) -> Launch:
    """The launch that fills `result` [M, N], contiguous, which has elements."""
    a, b = _readable(a), _readable(b.t())
    (num_rows, length), num_columns = a.shape, b.shape[0]
    tile = choose_tile(num_rows, num_columns, tiles_of(a.device))
    constants = (
        *(is_one(row_scale), is_one(column_scale)),
        *(tile.m, tile.n, tile.k),
        *(num_rows % tile.m == 0, num_columns % tile.n == 0, length % tile.k == 0),
    )
    arguments = (
        *(a, b, result, flat(row_scale), flat(column_scale), flat(bias)),
        *(num_rows, num_columns, length, *a.stride(), *b.stride()),
    )
    options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages, "enable_fp_fusion": False}
    num_programs = ceil_div(num_rows, tile.m) * ceil_div(num_columns, tile.n)
    return Launch(kernel, (num_programs,), (*arguments, *constants), options)


def choose_tile(num_rows: int, num_columns: int, tiles: Sequence[Tile] = TILES) -> Tile:
    """The first that gives enough programs and is less than twice as high and as wide as the result; else the last."""
    for tile in tiles:
        num_programs = ceil_div(num_rows, tile.m) * ceil_div(num_columns, tile.n)
        if num_programs >= ENOUGH_PROGRAMS and tile.m < 2 * num_rows and tile.n < 2 * num_columns:
            return tile
    return tiles[-1]


def tiles_of(device: torch.device) -> tuple[Tile, ...]:
    """Those that are compiled without spills for a device, the largest first."""
    if torch.version.hip:
        return ROCM_TILES
    return _tiles_of_gpu(device) if device.type == "cuda" else TILES


@functools.cache
def _tiles_of_gpu(device: torch.device) -> tuple[Tile, ...]:
    return tiles_for(torch.cuda.get_device_capability(device)[0])


def tiles_for(major: int) -> tuple[Tile, ...]:
    """The same for NVIDIA's GPUs of compute capability `major`.x, by the Triton that is installed."""
    return {8: AMPERE_TILES, 10: BLACKWELL_TILES}.get(major, TILES) if _IS_NEW else TILES


def _readable(operand: Tensor) -> Tensor:
    """The operand [M or N, K] where it can be read in place, else a copy; see the module docstring."""
    num_rows, length = operand.shape
    row_stride, stride = operand.stride()
    along_k = stride == 1 and row_stride % ALIGNMENT == 0
    along_rows = row_stride == 1 and stride % ALIGNMENT == 0 and num_rows % ALIGNMENT == 0
    is_aligned = operand.data_ptr() % ALIGNMENT == 0 and length % ALIGNMENT == 0
    if is_aligned and (along_k or along_rows) and max(row_stride, stride) <= LARGEST_STRIDE:
        return operand
    copy = operand.new_empty(num_rows, ceil_div(length, ALIGNMENT) * ALIGNMENT)
    copy[:, :length] = operand
    copy[:, length:] = 0
    return copy


@triton.jit
def _place(program, num_rows, num_columns, HEIGHT: tl.constexpr):
    """Row and column of this program's tile: bands of HEIGHT rows follow each other, each column by column."""
    size = HEIGHT * num_columns
    first_row = program // size * HEIGHT
    height = tl.minimum(num_rows - first_row, HEIGHT)
    number = program % size
    return first_row + number % height, number // height


@triton.jit
def _load(pointers, in_rows, in_k, EVEN_ROWS: tl.constexpr, EVEN_K: tl.constexpr):
    """Codes, 0 where a mask is false. Masks of what is even are left out."""
    if EVEN_ROWS and EVEN_K:
        codes = tl.load(pointers)
    elif EVEN_K:
        codes = tl.load(pointers, mask=in_rows, other=0)
    elif EVEN_ROWS:
        codes = tl.load(pointers, mask=in_k, other=0)
    else:
        codes = tl.load(pointers, mask=in_rows & in_k, other=0)
    return codes


@triton.jit
def _load_vector(vector, index, count, AXIS: tl.constexpr):
    """Broadcasts over dimension AXIS of a tile."""
    return tl.expand_dims(tl.load(vector + index, mask=index < count, other=0.0), AXIS)


@triton.jit
def kernel(
    a, b, result, row_scale, column_scale, bias,
    M, N, K, a_stride_m, a_stride_k, b_stride_n, b_stride_k,
    ONE_ROW_SCALE: tl.constexpr, ONE_COLUMN_SCALE: tl.constexpr,
    TILE_M: tl.constexpr, TILE_N: tl.constexpr, TILE_K: tl.constexpr,
    EVEN_M: tl.constexpr, EVEN_N: tl.constexpr, EVEN_K: tl.constexpr,
):  # fmt: skip
    """EVEN_...: the tile divides the size."""
    tile_m, tile_n = _place(tl.program_id(0), tl.cdiv(M, TILE_M), tl.cdiv(N, TILE_N), BAND)
    first_m, first_n = tile_m * TILE_M, tile_n * TILE_N
    m, n, k = tl.arange(0, TILE_M), tl.arange(0, TILE_N), tl.arange(0, TILE_K)
    in_m, in_n = (m < M - first_m)[:, None], (n < N - first_n)[None, :]
    a += first_m.to(tl.int64) * a_stride_m
    b += first_n.to(tl.int64) * b_stride_n
    a_at = m[:, None] * a_stride_m + k[None, :] * a_stride_k
    b_at = k[:, None] * b_stride_k + n[None, :] * b_stride_n

    sums = tl.zeros([TILE_M, TILE_N], dtype=tl.int32)
    for first_k in range(0, K, TILE_K):
        in_k = k < K - first_k
        a_codes = _load(a + a_at, in_m, in_k[None, :], EVEN_M, EVEN_K)
        b_codes = _load(b + b_at, in_n, in_k[:, None], EVEN_N, EVEN_K)
        sums = tl.dot(a_codes, b_codes, sums, out_dtype=tl.int32)
        a += TILE_K * a_stride_k
        b += TILE_K * b_stride_k

    y = sums
    if result.dtype.element_ty != tl.int32:
        y = sums.to(tl.float32)
        if row_scale is not None:
            y = y * (tl.load(row_scale) if ONE_ROW_SCALE else _load_vector(row_scale + first_m, m, M - first_m, 1))
        if column_scale is not None:
            y = y * (
                tl.load(column_scale) if ONE_COLUMN_SCALE else _load_vector(column_scale + first_n, n, N - first_n, 0)
            )
        if bias is not None:
            y = y + _load_vector(bias + first_n, n, N - first_n, 0).to(tl.float32)
    result += first_m.to(tl.int64) * N + first_n
    at = m[:, None] * N + n[None, :]
    if EVEN_M and EVEN_N:
        tl.store(result + at, y.to(result.dtype.element_ty))
    else:
        tl.store(result + at, y.to(result.dtype.element_ty), mask=in_m & in_n)
