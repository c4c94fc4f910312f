"""Exact products of int8 matrices.

`torch._int_mm` multiplies: oneDNN on a CPU, cuBLASLt on CUDA. Where it is wrong or slow (`integer_units`) the codes are
multiplied as fp32, in sums that are short enough to be exact. Operands are taken as they lie, transposed views too; but
on CUDA those that are not contiguous along the contracted dimension are copied, as cuBLASLt promises no other layout.
"""

import functools
import threading
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ds_quant.kernels.choice import chosen
from ds_quant.kernels.integer_units import integer_units

MAX_CONTRACTION = 131_072
"""Products of codes overflow int32 from 132,105 terms on where one operand has -128: 132,105 * 128 * 127 > 2^31."""

_FP32_CONTRACTION = 1024
"""So many products of codes sum up exactly in fp32, in any order: 1024 * 128 * 127 < 2^24."""
_CUDA_MULTIPLE = 16
"""torch._int_mm on CUDA needs more than 16 rows, and multiples of 8 in the other sizes; 16 keeps rows aligned."""
_SCRATCH_BYTES = 128 * 2**20
"""Of int32 products at a time, on a CPU; more where `_LEAST_ROWS` take more."""
_LEAST_ROWS = 128
_FP32_SCRATCH_BYTES = 8 * 2**20
"""Of fp32 products at a time: they stay in the last cache until the epilogue reads them; more where `_LEAST_ROWS` take
more. Fewer rows at a time have the other operand packed more often: with 1 MiB a layer took a tenth longer."""

_DEVICE_SCRATCH_BYTES = 256 * 2**20
"""Of products at a time, on a device; more where `_LEAST_ROWS` take more."""

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


def multiply_in_parts(a: Tensor, b: Tensor, row_scale: Tensor | None, finish: functools.partial[Tensor]) -> Tensor:
    """What `finish`, an epilogue with all but row_scale, makes of the products on a CPU, without holding them all."""
    return (_in_parts if _int_mm_serves(a.device) else _in_fp32_parts)(a, b, row_scale, finish)


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
        finish(products, row_scale=_of_rows(row_scale, begin, end), out=result[begin:end])
    return result


def _in_fp32_parts(a: Tensor, b: Tensor, row_scale: Tensor | None, finish: functools.partial[Tensor]) -> Tensor:
    """Rows at a time likewise. The last part of a long contraction is added where the epilogue reads it."""
    result = torch.empty((a.shape[0], b.shape[1]), dtype=finish.keywords["dtype"])
    num_rows = max(_LEAST_ROWS, _FP32_SCRATCH_BYTES // 4 // b.shape[1])
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        *first, (last, second) = _fp32_parts(a, b)
        for begin in range(0, a.shape[0], num_rows):
            end = min(begin + num_rows, a.shape[0])
            products = _scratch(end - begin, b.shape[1], torch.float32)
            others = None
            for left, right in first:
                torch.mm(left[begin:end], right, out=products)
                if others is None:
                    others = _scratch(end - begin, b.shape[1]).copy_(products)
                else:
                    others += products.to(torch.int32)
            torch.mm(last[begin:end], second, out=products)
            finish(products, others=others, row_scale=_of_rows(row_scale, begin, end), out=result[begin:end])
    return result


def _of_rows(scale: Tensor | None, begin: int, end: int) -> Tensor | None:
    return scale if scale is None or scale.numel() == 1 else scale[begin:end]


def _flat(x: Tensor) -> Tensor:
    """`x`, with the strides of a contiguous matrix where it is a single row or column.

    By other ones, which mean nothing there, torch 2.13 on CPUs takes it for transposed, and multiplies nothing: it
    returns memory as it found it. A transposed column has such strides: codes.t() of one output feature or one token.
    """
    return x.flatten().contiguous().view(x.shape) if 1 in x.shape else x


def _scratch(rows: int, columns: int, dtype: torch.dtype = torch.int32) -> Tensor:
    """[rows, columns] of memory that is used again and again by this thread."""
    numel = rows * columns
    buffers = vars(_kept).setdefault("scratch", {})
    buffer = buffers.get(dtype)
    if buffer is None or buffer.numel() < numel:
        buffers[dtype] = None  # never two
        with torch.inference_mode(False):  # or only inference could write to it later
            buffer = buffers[dtype] = torch.empty(numel, dtype=dtype)
    return buffer[:numel].view(rows, columns)


def _int_mm_serves(device: torch.device) -> bool:
    return chosen() != "reference" and integer_units(device).serve


def _products(a: Tensor, b: Tensor) -> Tensor:
    if not (a.numel() and b.numel()):
        return torch.zeros((a.shape[0], b.shape[1]), dtype=torch.int32, device=a.device)
    if a.device.type == "meta" or _int_mm_serves(a.device):
        return _padded_int_mm(a, b) if a.device.type == "cuda" else torch._int_mm(_flat(a), _flat(b))
    return fp32_products(a, b)


def _padded_int_mm(a: Tensor, b: Tensor) -> Tensor:
    """torch._int_mm of operands whose sizes CUDA does not take, padded with zeros."""
    (m, k), n = a.shape, b.shape[1]
    rows = max(0, _CUDA_MULTIPLE + 1 - m)
    inner, columns = -k % _CUDA_MULTIPLE, -n % _CUDA_MULTIPLE
    if rows or inner:
        a = F.pad(a, (0, inner, 0, rows))
    if columns or inner:
        b = F.pad(b, (0, columns, 0, inner))
    return torch._int_mm(a.contiguous(), b.t().contiguous().t())[:m, :n]


def int_mm_of_padded(
    a: Tensor, b: Tensor, num_rows: int, num_columns: int, finish: functools.partial[Tensor]
) -> Tensor:
    """What `finish`, an epilogue, makes of the products of padded codes a [M', K'] and b [N', K']; nothing is copied.

    Rows at a time, where the products of all would take more than the scratch memory: a head of 128k outputs, say.
    """
    if a.shape[0] <= _CUDA_MULTIPLE:
        a = F.pad(a, (0, 0, 0, _CUDA_MULTIPLE))
    row_scale = finish.keywords["row_scale"]
    step = max(_LEAST_ROWS, _DEVICE_SCRATCH_BYTES // 4 // b.shape[0] // _CUDA_MULTIPLE * _CUDA_MULTIPLE)
    parts = []
    for begin in range(0, num_rows, step):
        end = min(begin + step, num_rows)
        # The last part is of more than 16 rows as well: it begins with some of the part before.
        first = min(begin, a.shape[0] - 2 * _CUDA_MULTIPLE)
        products = torch._int_mm(a[first : first + step], b.t())[begin - first : end - first, :num_columns]
        parts.append(finish(products, row_scale=_of_rows(row_scale, begin, end)))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def multiply_by_rows(a: Tensor, b: Tensor, row_scale: Tensor | None, finish: Callable[..., Tensor]) -> Tensor:
    """What `finish`, an epilogue with all but row_scale, makes of the products of a [M, K] and b [K, N] by `int_mm`, of
    as many rows at a time as the scratch memory of a device takes."""
    # With K above MAX_CONTRACTION int64 sums lie beside the int32 products.
    num_bytes = 4 if a.shape[1] <= MAX_CONTRACTION else 4 + 8
    step = max(_LEAST_ROWS, _DEVICE_SCRATCH_BYTES // num_bytes // max(b.shape[1], 1))
    parts = [
        finish(int_mm(a[begin : begin + step], b), row_scale=_of_rows(row_scale, begin, begin + step))
        for begin in range(0, max(a.shape[0], 1), step)
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def fp32_products(a: Tensor, b: Tensor) -> Tensor:
    """int32 [M, N] by fp32 products of at most `_FP32_CONTRACTION` terms: exact, whatever the units make of fp32.

    Codes have 7 bits or are -128, which bf16 and TF32 hold as well.
    """
    total = torch.zeros((a.shape[0], b.shape[1]), dtype=torch.int32, device=a.device)
    with torch.autocast(a.device.type, enabled=False):
        for left, right in _fp32_parts(a, b):
            total += torch.mm(left, right).to(torch.int32)
    return total


def _fp32_parts(a: Tensor, b: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Operands of the products of at most `_FP32_CONTRACTION` terms that sum up to a times b."""
    lefts, rights = a.float().split(_FP32_CONTRACTION, dim=1), b.float().split(_FP32_CONTRACTION, dim=0)
    return list(zip(lefts, rights, strict=True))
