"""Operands and results of int8 matrix products: the definition that the fused kernels repeat bit for bit.

As `numerics.integer` does it (symmetric, n = `symmetric_levels` of bits and range), in fp32:

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

On GPUs all three products of a layer are of two matrices that are contiguous along the contracted dimension. There the
codes of an operand [M, K] are made *padded*, in the ways that its products need:

    codes    [M', K']    codes[m, k] = the code of x[m, k]    M', K': M and K up to the next multiples of ALIGNMENT;
    turned   [K', M']    turned[k, m] = the same              what lies beyond M and K is 0

    quantize_operand    one operand, with a scale for each row, each column or all
    quantize_gradient   quantize_both with the rows' codes as they are and the columns' turned, and the sum over rows
    padded_matmul       epilogue of products[m, n] = sum_k a[m, k] * b[n, k], exact
"""

import torch
from torch import Tensor

from ds_quant.numerics.integer import Quantized, quantize_symmetric
from ds_quant.numerics.integer import dequantize as dequantize_any
from ds_quant.numerics.random import derive_key

ALIGNMENT = 16
"""Bytes of the widest load, to which rows of padded codes are aligned."""
WAYS = ("codes", "turned", "both")


def quantize_rows(
    x: Tensor, levels: float, *, column_scale: Tensor | None = None, key: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Codes int8 [M, K] and scale fp32 [M] of x [M, K], fp32, bf16 or fp16."""
    return _quantize(x, levels, "row", column_scale, key)


def quantize_columns(
    x: Tensor, levels: float, *, row_scale: Tensor | None = None, key: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Codes int8 [M, N] and scale fp32 [N] of x [M, N], fp32, bf16 or fp16."""
    return _quantize(x, levels, "column", None if row_scale is None else row_scale.reshape(-1, 1), key)


def quantize_both(
    g: Tensor,
    levels: float,
    *,
    column_scale: Tensor | None = None,
    row_scale: Tensor | None = None,
    row_key: Tensor | None = None,
    column_key: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`quantize_rows` with `row_key`, then `quantize_columns` with `column_key`, of one gradient [M, N]."""
    rows = quantize_rows(g, levels, column_scale=column_scale, key=row_key)
    return *rows, *quantize_columns(g, levels, row_scale=row_scale, key=column_key)


def quantize_tensor(x: Tensor, levels: float, *, key: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Codes int8 [M, K] and scale fp32 [1] of x [M, K], fp32, bf16 or fp16."""
    return _quantize(x, levels, "tensor", None, key)


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
    """Padded codes, turned codes and scale of x [M, K] by "row", "column" or "tensor"; [0] for a way not asked for.

    factor: column_scale of rows, row_scale of columns. key: rounds by the subkey number `stream` of it.
    """
    if granularity == "column" and factor is not None:
        factor = factor.reshape(-1, 1)
    subkey = None if key is None else derive_key(key, stream)
    codes, scale = _quantize(x, levels, granularity, factor, subkey)
    none = codes.new_empty(0)
    return (
        none if ways == "turned" else padded(codes),
        none if ways == "codes" else padded(codes.t()),
        scale,
    )


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
    """Of one gradient [M, N]: padded codes and scale of rows, turned codes and scale of columns, and its sum over rows.

    The sum is that of g itself, in its dtype; [0] where `sums` does not ask for it. Kernels add in an order of their
    own, in fp32.
    """
    codes, _, scale = quantize_operand(
        g, levels, granularity="row", factor=column_scale, key=key, stream=row_stream, ways="codes"
    )
    _, turned, more = quantize_operand(
        g, levels, granularity="column", factor=row_scale, key=key, stream=column_stream, ways="turned"
    )
    return codes, scale, turned, more, g.detach().sum(0) if sums else g.new_empty(0)


def padded(codes: Tensor) -> Tensor:
    """Codes [M, K] in memory of [M', K'], contiguous, with zeros beyond them."""
    missing = [-size % ALIGNMENT for size in codes.shape]
    return torch.nn.functional.pad(codes, (0, missing[1], 0, missing[0])).contiguous()


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
    """`epilogue` of the products of num_rows rows of a [M', K'] and num_columns rows of b [N', K']."""
    products = a[:num_rows].long() @ b[:num_columns].long().t()
    return epilogue(products, row_scale=row_scale, column_scale=column_scale, bias=bias, dtype=dtype)


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
    x: Tensor, levels: float, granularity: str, factor: Tensor | None, key: Tensor | None
) -> tuple[Tensor, Tensor]:
    y = x.detach().float()
    if factor is not None:
        y = y * factor.detach()
    q = quantize_symmetric(y, levels, granularity=granularity, key=key)
    return q.codes.contiguous(), q.scale.reshape(-1)
