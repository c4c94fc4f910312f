"""Exact products of int8 matrices, and what a linear layer makes of them.

`torch._int_mm` multiplies: oneDNN on a CPU, cuBLASLt on CUDA. Operands are taken as they lie, transposed views too.
"""

import functools
import threading

import torch
import torch.nn.functional as F
from torch import Tensor

from ds_quant.kernels import products as kernels
from ds_quant.kernels.choice import chosen
from ds_quant.kernels.integer_units import integer_units
from ds_quant.kernels.spans import span
from ds_quant.numerics import products as reference

MAX_CONTRACTION = 131_072
"""Products of codes overflow int32 from 132,105 terms on where one operand has -128: 132,105 * 128 * 127 > 2^31."""

_FP32_CONTRACTION = 1024
"""So many products of codes sum up exactly in fp32, in any order: 1024 * 128 * 127 < 2^24."""
_CUDA_MULTIPLE = 16
"""torch._int_mm on CUDA wants more than 16 rows, and multiples of 8 in the other sizes; 16 keeps rows aligned."""
_SCRATCH_BYTES = 128 * 2**20
"""Of int32 products at a time, on a CPU; more where `_LEAST_ROWS` take more."""
_LEAST_ROWS = 128

_kept = threading.local()


def int_mm(a: Tensor, b: Tensor) -> Tensor:
    """a [M, K] times b [K, N], int8, exact: int32 [M, N], or int64 where K is above MAX_CONTRACTION.

    One operand may have the code -128, as activations in the full range do; two would overflow at MAX_CONTRACTION.
    Strides and sizes are arbitrary.
    """
    if a.shape[1] <= MAX_CONTRACTION:
        return _products(a, b)
    parts = zip(a.split(MAX_CONTRACTION, dim=1), b.split(MAX_CONTRACTION, dim=0), strict=True)
    total = torch.zeros((a.shape[0], b.shape[1]), dtype=torch.int64, device=a.device)
    for left, right in parts:
        total += _products(left, right)
    return total


def scaled_matmul(
    a: Tensor,
    b: Tensor,
    *,
    row_scale: Tensor | None = None,
    column_scale: Tensor | None = None,
    bias: Tensor | None = None,
    dtype: torch.dtype,
) -> Tensor:
    """`numerics.products.epilogue` of the products of a [M, K] and b [K, N], int8: [M, N] in `dtype`.

    row_scale and column_scale: fp32 [M] and [N], or of one element. bias: [N].
    """
    finish = functools.partial(kernels.epilogue, row_scale=row_scale, column_scale=column_scale, bias=bias, dtype=dtype)
    if a.shape[1] > MAX_CONTRACTION:
        finish = functools.partial(reference.epilogue, **finish.keywords)
    elif chosen() == "triton" and a.device.type == "cuda":
        from ds_quant.kernels import triton_int8

        return triton_int8.scaled_matmul(a, b, **finish.keywords)
    elif a.device.type == "cpu" and _int_mm_serves(a.device) and a.numel() and b.numel():
        return _in_parts(a, b, row_scale, finish)
    products = int_mm(a, b)
    with span("epilogue"):
        return finish(products)


def _in_parts(a: Tensor, b: Tensor, row_scale: Tensor | None, finish: functools.partial[Tensor]) -> Tensor:
    """Rows at a time, as many as the scratch memory takes: fresh memory for large products costs more than filling it.

    Fewer rows would have b packed more often than it pays.
    """
    b = _flat(b)
    result = torch.empty((a.shape[0], b.shape[1]), dtype=finish.keywords["dtype"])
    num_rows = max(_LEAST_ROWS, _SCRATCH_BYTES // 4 // b.shape[1])
    for begin in range(0, a.shape[0], num_rows):
        end = min(begin + num_rows, a.shape[0])
        products = torch._int_mm(_flat(a[begin:end]), b, out=_scratch(end - begin, b.shape[1]))
        scale = row_scale if row_scale is None or row_scale.numel() == 1 else row_scale[begin:end]
        with span("epilogue"):
            finish(products, row_scale=scale, out=result[begin:end])
    return result


def _flat(x: Tensor) -> Tensor:
    """`x`, with the strides of a contiguous matrix where it is a single row or column.

    By other ones, which mean nothing there, torch 2.13 on CPUs takes it for transposed, and multiplies nothing: it
    returns memory as it found it. A transposed column has such strides: codes.t() of one output feature or one token.
    """
    return x.flatten().contiguous().view(x.shape) if 1 in x.shape else x


def _scratch(rows: int, columns: int) -> Tensor:
    """int32 [rows, columns] of memory that is used again and again by this thread."""
    numel = rows * columns
    buffer = getattr(_kept, "scratch", None)
    if buffer is None or buffer.numel() < numel:
        _kept.scratch = None  # never two
        with torch.inference_mode(False):  # or only inference could write to it later
            buffer = _kept.scratch = torch.empty(numel, dtype=torch.int32)
    return buffer[:numel].view(rows, columns)


def _int_mm_serves(device: torch.device) -> bool:
    return chosen() != "reference" and integer_units(device).is_exact


def _products(a: Tensor, b: Tensor) -> Tensor:
    if not (a.numel() and b.numel()):
        return torch.zeros((a.shape[0], b.shape[1]), dtype=torch.int32, device=a.device)
    if a.device.type == "meta" or _int_mm_serves(a.device):
        return _padded_int_mm(a, b) if a.device.type == "cuda" else torch._int_mm(_flat(a), _flat(b))
    return fp32_products(a, b)


def _padded_int_mm(a: Tensor, b: Tensor) -> Tensor:
    """torch._int_mm of sizes that are none of CUDA's, filled up with zeros."""
    (m, k), n = a.shape, b.shape[1]
    rows = max(0, _CUDA_MULTIPLE + 1 - m)
    inner, columns = -k % _CUDA_MULTIPLE, -n % _CUDA_MULTIPLE
    if rows or inner:
        a = F.pad(a, (0, inner, 0, rows))
    if columns or inner:
        b = F.pad(b, (0, columns, 0, inner))
    return torch._int_mm(a, b)[:m, :n]


def fp32_products(a: Tensor, b: Tensor) -> Tensor:
    """int32 [M, N] by fp32 products of at most `_FP32_CONTRACTION` terms: exact, whatever the units make of fp32.

    Codes have 7 bits or are -128, which bf16 and TF32 hold as well.
    """
    total = torch.zeros((a.shape[0], b.shape[1]), dtype=torch.int32, device=a.device)
    parts = zip(a.split(_FP32_CONTRACTION, dim=1), b.split(_FP32_CONTRACTION, dim=0), strict=True)
    with torch.autocast(a.device.type, enabled=False):
        for left, right in parts:
            total += torch.mm(left.float(), right.float()).to(torch.int32)
    return total
