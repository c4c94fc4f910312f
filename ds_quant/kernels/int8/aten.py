"""Products of int8 matrices by `torch._int_mm`: oneDNN on CPUs, cuBLASLt on CUDA.

Where it is wrong or slow (`integer_units`) products are left to the definition, in fp32. Operands are taken as they
lie, transposed views too; but on CUDA those that are not contiguous along the contracted dimension are copied, as
cuBLASLt promises no other layout.
"""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from ds_quant.kernels.int8 import matmul, ops
from ds_quant.kernels.integer_units import integer_units

_CUDA_MULTIPLE = 16
"""torch._int_mm on CUDA needs more than 16 rows, and multiples of 8 in the other sizes; 16 keeps rows aligned."""


@ops.int_mm.by("aten")
def int_mm(a: Tensor, b: Tensor) -> Tensor:
    """`matmul.fp32_products`."""
    if not (a.numel() and b.numel() and integer_units(a.device).serve):
        return ops.int_mm.after("aten", a.device)(a, b)
    return padded_int_mm(a, b) if a.device.type == "cuda" else torch._int_mm(flat(a), flat(b))


def flat(x: Tensor) -> Tensor:
    """`x`, with the strides of a contiguous matrix where it is a single row or column.

    By other ones, which mean nothing there, torch 2.13 on CPUs takes it for transposed, and multiplies nothing: it
    returns memory as it found it. A transposed column has such strides: codes.t() of one output feature or one token.
    """
    return x.flatten().contiguous().view(x.shape) if 1 in x.shape else x


def padded_int_mm(a: Tensor, b: Tensor) -> Tensor:
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
    step = max(matmul.LEAST_ROWS, matmul.rows_at_a_time(b.shape[0]) // _CUDA_MULTIPLE * _CUDA_MULTIPLE)
    parts = []
    for begin in range(0, num_rows, step):
        end = min(begin + step, num_rows)
        # The last part is of more than 16 rows as well: it begins with some of the part before.
        first = min(begin, a.shape[0] - 2 * _CUDA_MULTIPLE)
        products = torch._int_mm(a[first : first + step], b.t())[begin - first : end - first, :num_columns]
        parts.append(finish(products, row_scale=matmul.scale_of_rows(row_scale, begin, end)))
    return parts[0] if len(parts) == 1 else torch.cat(parts)
