"""Products of float8 matrices by `torch._scaled_mm`: cuBLASLt and CUTLASS on CUDA, oneDNN on CPUs.

CUDA takes operands that are contiguous along what is contracted, of multiples of 16 in K and N: others are copied, and
padded with zeros. What `fp8_units` found that a device cannot do is left to the definition.

    two scales, result in bf16        `_scaled_mm` applies them: one for a matrix each, or one for a row and column each
    else, and on CPUs                 `_scaled_mm` gives fp32 sums; scales and bias are applied as by the definition

Nobody has run it on a GPU yet. The tests take both ways on the CPU.
"""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from ds_quant.kernels.fp8 import ops, reference
from ds_quant.kernels.fp8_units import fp8_units

_MULTIPLE = 16
"""Bytes to which rows must be aligned."""


@ops.fp8_matmul.by("aten")
@torch.no_grad()
def fp8_matmul(
    a: Tensor,
    b: Tensor,
    *,
    row_scale: Tensor | None = None,
    column_scale: Tensor | None = None,
    bias: Tensor | None = None,
    dtype: torch.dtype,
) -> Tensor:
    """`reference.fp8_matmul`."""
    units = fp8_units(a.device)
    if not (units.multiplies(a.dtype, b.dtype) and a.numel() and b.numel()):
        other = ops.fp8_matmul.after("aten", a.device)
        return other(a, b, row_scale=row_scale, column_scale=column_scale, bias=bias, dtype=dtype)
    num_columns = b.shape[0]
    if wants_aligned(a.device):
        a, b = aligned(a), aligned(b, rows=True)
        if units.scales(a.dtype, b.dtype) and dtype == torch.bfloat16 and (bias is None or bias.dtype == dtype):
            return scaled(a, b, row_scale, column_scale, bias)[:, :num_columns].contiguous()
    one = _one(a.device)
    sums = torch._scaled_mm(a, b.t(), one, one, out_dtype=torch.float32)[:, :num_columns]
    return reference.finish(sums, row_scale, column_scale, bias, dtype).contiguous()


def wants_aligned(device: torch.device) -> bool:
    return device.type == "cuda"


def aligned(x: Tensor, *, rows: bool = False) -> Tensor:
    """float8 x [M, K], contiguous and with zeros up to a multiple of 16 columns, and rows where asked."""
    missing = [-x.shape[1] % _MULTIPLE, -x.shape[0] % _MULTIPLE if rows else 0]
    if not any(missing):
        return x.contiguous()
    return F.pad(x.view(torch.uint8), (0, missing[0], 0, missing[1])).view(x.dtype)


def scaled(a: Tensor, b: Tensor, row_scale: Tensor | None, column_scale: Tensor | None, bias: Tensor | None) -> Tensor:
    """bf16 [M, N'] of `aligned` a and b, whose scales and bias may be for the first of its N' rows only."""
    if all(scale is None or scale.numel() == 1 for scale in (row_scale, column_scale)):
        by_row, by_column = (
            _one(a.device) if scale is None else scale.reshape(()) for scale in (row_scale, column_scale)
        )
    else:
        by_row, by_column = _of_rows(row_scale, a)[:, None], _of_rows(column_scale, b)[None]
    bias = None if bias is None else _of_rows(bias, b)
    return torch._scaled_mm(a, b.t(), by_row, by_column, bias=bias, out_dtype=torch.bfloat16)


def _of_rows(vector: Tensor | None, matrix: Tensor) -> Tensor:
    """One number for each row, contiguous; zeros for those that were padded."""
    count = matrix.shape[0]
    if vector is None:
        return torch.ones(count, device=matrix.device)
    if vector.numel() == 1:
        return vector.reshape(1).expand(count).contiguous()
    missing = count - vector.numel()
    return (F.pad(vector, (0, missing)) if missing else vector).contiguous()


@functools.cache
def _one(device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.ones((), device=device)
