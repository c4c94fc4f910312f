"""Exact products of int8 matrices: the operation `int_mm`, its definition, and products of some rows at a time."""

from collections.abc import Callable

import torch
from torch import Tensor

from ds_quant.kernels.int8.family import FAMILY
from ds_quant.kernels.registry import operation

MAX_CONTRACTION = 131_072
"""Products of codes overflow int32 from 132,105 terms on where one operand has -128: 132,105 * 128 * 127 > 2^31."""

_FP32_CONTRACTION = 1024
"""So many products of codes sum up exactly in fp32, in any order: 1024 * 128 * 127 < 2^24."""
LEAST_ROWS = 128
"""At a time, where the scratch memory would take fewer: with so few the other operand is packed too often."""
_DEVICE_SCRATCH_BYTES = 256 * 2**20
"""Of products at a time, on a device; more where `LEAST_ROWS` take more."""


def fp32_products(a: Tensor, b: Tensor) -> Tensor:
    """int32 [M, N] by fp32 products of at most `_FP32_CONTRACTION` terms: exact, whatever the units make of fp32.

    Codes have 7 bits or are -128, which bf16 and TF32 hold as well.
    """
    total = torch.zeros((a.shape[0], b.shape[1]), dtype=torch.int32, device=a.device)
    with torch.autocast(a.device.type, enabled=False):
        for left, right in fp32_parts(a, b):
            total += torch.mm(left, right).to(torch.int32)
    return total


def fp32_parts(a: Tensor, b: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Operands of the products of at most `_FP32_CONTRACTION` terms that sum up to a times b."""
    lefts, rights = a.float().split(_FP32_CONTRACTION, dim=1), b.float().split(_FP32_CONTRACTION, dim=0)
    return list(zip(lefts, rights, strict=True))


@operation(FAMILY, reference=fp32_products)
def int_mm(a: Tensor, b: Tensor) -> Tensor:
    """a [M, K] times b [K, N], int8, exact: int32 [M, N], or int64 where K is above MAX_CONTRACTION.

    One operand may have the code -128, as activations in the full range do; two would overflow at MAX_CONTRACTION.
    Strides and sizes are arbitrary. Backends get no K above MAX_CONTRACTION.
    """
    multiply = int_mm.on(a.device)
    if a.shape[1] <= MAX_CONTRACTION:
        return multiply(a, b)
    parts = zip(a.split(MAX_CONTRACTION, dim=1), b.split(MAX_CONTRACTION, dim=0), strict=True)
    total = torch.zeros((a.shape[0], b.shape[1]), dtype=torch.int64, device=a.device)
    for left, right in parts:
        total += multiply(left, right)
    return total


def rows_at_a_time(num_columns: int, num_bytes: int = 4) -> int:
    """Of products of so many columns, `num_bytes` each: as many as the scratch memory of a device takes."""
    return max(LEAST_ROWS, _DEVICE_SCRATCH_BYTES // num_bytes // max(num_columns, 1))


def multiply_by_rows(a: Tensor, b: Tensor, row_scale: Tensor | None, finish: Callable[..., Tensor]) -> Tensor:
    """What `finish`, an epilogue with all but row_scale, makes of the products of a [M, K] and b [K, N] by `int_mm`, of
    as many rows at a time as the scratch memory of a device takes."""
    # With K above MAX_CONTRACTION int64 sums lie beside the int32 products.
    step = rows_at_a_time(b.shape[1], num_bytes=4 if a.shape[1] <= MAX_CONTRACTION else 4 + 8)
    parts = [
        finish(int_mm(a[begin : begin + step], b), row_scale=scale_of_rows(row_scale, begin, begin + step))
        for begin in range(0, max(a.shape[0], 1), step)
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def scale_of_rows(scale: Tensor | None, begin: int, end: int) -> Tensor | None:
    """What rows begin to end have of a scale of the rows, or of all."""
    return scale if scale is None or scale.numel() == 1 else scale[begin:end]
