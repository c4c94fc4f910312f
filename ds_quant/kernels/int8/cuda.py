"""Padded codes and their products on CUDA devices: Triton's kernels, and `torch._int_mm` for shapes that it wins.

Nobody has run it on a GPU yet. `measured` keeps which is the quicker one for a shape; both have the same bits. While a
CUDA graph is being captured nothing can be measured: shapes that are new then go to Triton.
"""

import functools
from typing import Any

import torch
from torch import Tensor

from ds_quant.kernels.int8 import aten, compiled, measured, ops, triton, triton_quantize
from ds_quant.kernels.integer_units import integer_units

TRITON, INT_MM = "triton", "int_mm"

ops.quantize_operand.by("cuda")(triton_quantize.quantize_operand)
ops.quantize_gradient.by("cuda")(triton_quantize.quantize_gradient)


@ops.padded_matmul.by("cuda")
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
    options: dict[str, Any] = {"row_scale": row_scale, "column_scale": column_scale, "bias": bias, "dtype": dtype}
    ways = {
        TRITON: functools.partial(triton.padded_matmul, a, b, num_rows, num_columns, **options),
        INT_MM: functools.partial(by_int_mm, a, b, num_rows, num_columns, **options),
    }
    if a.numel() == 0 or b.numel() == 0 or not integer_units(a.device).serve:
        return ways[TRITON]()
    sizes = (measured.bucket(size) for size in (num_rows, num_columns, a.shape[1]))
    shape = " ".join((*(str(size) for size in sizes), str(dtype), *(["bias"] if bias is not None else [])))
    return ways[_quickest(shape, ways, a.device)]()


def by_int_mm(a: Tensor, b: Tensor, num_rows: int, num_columns: int, **options: Any) -> Tensor:
    """cuBLASLt's int32 products and an epilogue that reads them again; at most 256 MiB of them at a time."""
    finish = functools.partial(compiled.epilogue, **options)
    return aten.int_mm_of_padded(a, b, num_rows, num_columns, finish)


def _quickest(shape: str, ways: dict[str, Any], device: torch.device) -> str:
    table = _table(device)
    if torch.cuda.is_current_stream_capturing():
        return table.known(shape) or TRITON
    with torch.cuda.device(device):
        return table.quickest(shape, ways)


@functools.cache
def _table(device: torch.device) -> measured.Measured:
    return measured.Measured(measured.path_for(device), measured.device_milliseconds)
