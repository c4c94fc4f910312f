"""Products and their epilogue on a CPU, some rows at a time: in memory that is used again and that caches hold.

Fresh memory for large products costs more than filling it; with few rows the other operand is packed too often.
"""

import functools
import threading

import torch
from torch import Tensor

from ds_quant.kernels.int8.aten import flat
from ds_quant.kernels.int8.matmul import LEAST_ROWS, fp32_parts, scale_of_rows
from ds_quant.kernels.integer_units import integer_units

_SCRATCH_BYTES = 128 * 2**20
"""Of int32 products at a time; more where `LEAST_ROWS` take more."""
_FP32_SCRATCH_BYTES = 8 * 2**20
"""Of fp32 products at a time: they stay in the last cache until the epilogue reads them; more where `LEAST_ROWS` take
more. Fewer rows at a time have the other operand packed more often: with 1 MiB a layer took a tenth longer."""

_kept = threading.local()


def multiply(a: Tensor, b: Tensor, row_scale: Tensor | None, finish: functools.partial[Tensor]) -> Tensor:
    """What `finish`, an epilogue with all but row_scale, makes of the products of int8 a [M, K] and b [K, N].

    By torch._int_mm, or in fp32 where that is wrong or slow: the same bits.
    """
    return (_by_int_mm if integer_units(a.device).serve else _in_fp32)(a, b, row_scale, finish)


def _by_int_mm(a: Tensor, b: Tensor, row_scale: Tensor | None, finish: functools.partial[Tensor]) -> Tensor:
    b = flat(b)
    result = torch.empty((a.shape[0], b.shape[1]), dtype=finish.keywords["dtype"])
    num_rows = max(LEAST_ROWS, _SCRATCH_BYTES // 4 // b.shape[1])
    for begin in range(0, a.shape[0], num_rows):
        end = min(begin + num_rows, a.shape[0])
        products = torch._int_mm(flat(a[begin:end]), b, out=_scratch(end - begin, b.shape[1]))
        finish(products, row_scale=scale_of_rows(row_scale, begin, end), out=result[begin:end])
    return result


def _in_fp32(a: Tensor, b: Tensor, row_scale: Tensor | None, finish: functools.partial[Tensor]) -> Tensor:
    """The last part of a long contraction is added where the epilogue reads it."""
    result = torch.empty((a.shape[0], b.shape[1]), dtype=finish.keywords["dtype"])
    num_rows = max(LEAST_ROWS, _FP32_SCRATCH_BYTES // 4 // b.shape[1])
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        *first, (last, second) = fp32_parts(a, b)
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
            finish(products, others=others, row_scale=scale_of_rows(row_scale, begin, end), out=result[begin:end])
    return result


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
