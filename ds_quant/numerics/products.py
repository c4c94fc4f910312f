"""Operands and results of int8 matrix products: the definition that the fused kernels repeat bit for bit.

As `numerics.integer` does it (symmetric, n = 2^(bits-1) - 1, or with `full_range` (2^bits - 1) / 2), in fp32:

    quantize_rows      y[m, k] = x[m, k] * column_scale[k]    scale[m] = max_k |y[m, k]| / n    codes = round(y / scale)
    quantize_columns   y[m, n] = x[m, n] * row_scale[m]       scale[n] = max_m |y[m, n]| / n    codes = round(y / scale)
    quantize_tensor    y = x                                  scale    = max   |y|       / n    codes = round(y / scale)
    dequantize         x[m, k] = codes[m, k] * scale[m], or * scale[k], rounded to `dtype` as by `integer.dequantize`
    epilogue           result[m, n] = ((products[m, n] * row_scale[m]) * column_scale[n]) + bias[n], rounded to `dtype`

The factors column_scale and row_scale of the quantizers fold the scale of a product's other operand into this one (see
`plan`); None leaves their product out, as it does in the epilogue. Each is fp32, one number a column or row, or one
number for all. round() is to nearest, ties to even, or stochastic where a `key` is given: with u = uniform(key), the
element at row m and column k takes number m * x.shape[1] + k. A group of zeros has scale 0, one with an Inf or a NaN
has scale NaN; the codes of both are 0.

Codes are int8 and contiguous in the order of x, also those of columns: torch._int_mm takes their transposed view.
"""

import torch
from torch import Tensor

from ds_quant.numerics.integer import Quantized, quantize
from ds_quant.numerics.integer import dequantize as dequantize_any


def quantize_rows(
    x: Tensor, bits: int, *, column_scale: Tensor | None = None, key: Tensor | None = None, full_range: bool = False
) -> tuple[Tensor, Tensor]:
    """Codes int8 [M, K] and scale fp32 [M] of x [M, K], fp32, bf16 or fp16."""
    return _quantize(x, bits, "row", column_scale, key, full_range)


def quantize_columns(
    x: Tensor, bits: int, *, row_scale: Tensor | None = None, key: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Codes int8 [M, N] and scale fp32 [N] of x [M, N], fp32, bf16 or fp16."""
    return _quantize(x, bits, "column", None if row_scale is None else row_scale.reshape(-1, 1), key)


def quantize_both(
    g: Tensor,
    bits: int,
    *,
    column_scale: Tensor | None = None,
    row_scale: Tensor | None = None,
    row_key: Tensor | None = None,
    column_key: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`quantize_rows` with `row_key`, then `quantize_columns` with `column_key`, of one gradient [M, N]."""
    rows = quantize_rows(g, bits, column_scale=column_scale, key=row_key)
    return *rows, *quantize_columns(g, bits, row_scale=row_scale, key=column_key)


def quantize_tensor(
    x: Tensor, bits: int, *, key: Tensor | None = None, full_range: bool = False
) -> tuple[Tensor, Tensor]:
    """Codes int8 [M, K] and scale fp32 [1] of x [M, K], fp32, bf16 or fp16."""
    return _quantize(x, bits, "tensor", None, key, full_range)


def dequantize(
    codes: Tensor, *, row_scale: Tensor | None = None, column_scale: Tensor | None = None, dtype: torch.dtype
) -> Tensor:
    """[M, K] in `dtype` from int8 codes [M, K] and one of the scales, fp32: [M], [K], or of one element."""
    scale, granularity = (row_scale, "row") if row_scale is not None else (column_scale, "column")
    assert scale is not None
    if scale.numel() == 1:
        scale, granularity = scale.reshape(()), "tensor"
    elif granularity == "row":
        scale = scale.reshape(-1, 1)
    return dequantize_any(Quantized(codes.detach(), scale.detach(), None, granularity, 0), dtype)


def epilogue(
    products: Tensor,
    *,
    others: Tensor | None = None,
    row_scale: Tensor | None = None,
    column_scale: Tensor | None = None,
    bias: Tensor | None = None,
    dtype: torch.dtype,
    out: Tensor | None = None,
) -> Tensor:
    """What a layer makes of int32 products [M, N]: scaled, with bias (fp32, bf16 or fp16, [N]), rounded once.

    The products may be fp32, whole numbers up to 2^24. `others`, int32 [M, N], are added to them exactly. Written
    to `out`, contiguous and of `dtype`, where it is given.
    """
    integers = products.to(torch.int32) if products.is_floating_point() else products
    y = (integers if others is None else integers + others).float()
    if row_scale is not None:
        y = y * row_scale.detach().reshape(-1, 1)
    if column_scale is not None:
        y = y * column_scale.detach().reshape(1, -1)
    if bias is not None:
        y = y + bias.detach().float()
    return y.to(dtype) if out is None else out.copy_(y)


def _quantize(
    x: Tensor, bits: int, granularity: str, factor: Tensor | None, key: Tensor | None, full_range: bool = False
) -> tuple[Tensor, Tensor]:
    y = x.detach().float()
    if factor is not None:
        y = y * factor.detach()
    rounding = "nearest" if key is None else "stochastic"
    q = quantize(y, bits, granularity=granularity, rounding=rounding, key=key, full_range=full_range)
    return q.codes.contiguous(), q.scale.reshape(-1)
