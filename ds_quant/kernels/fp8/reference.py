"""Products of float8 matrices by their definition: what `simulated` layers compute."""

import torch
from torch import Tensor

from ds_quant.kernels.simulated import ops as simulated


def fp8_matmul(
    a: Tensor,
    b: Tensor,
    *,
    row_scale: Tensor | None = None,
    column_scale: Tensor | None = None,
    bias: Tensor | None = None,
    dtype: torch.dtype,
) -> Tensor:
    """[M, N] in `dtype`, of float8 a [M, K] and b [N, K]:

        result[m, n] = ((sum_k a[m, k] * b[n, k]) * row_scale[m]) * column_scale[n] + bias[n]

    in fp32, rounded once to `dtype`. Products of two elements are exact in fp32; the sum has any order.
    """
    if simulated.multiplies_narrow(a.device):
        sums = torch.mm(a.bfloat16(), b.bfloat16().t(), out_dtype=torch.float32)
    else:
        sums = torch.mm(a.float(), b.float().t())
    return finish(sums, row_scale, column_scale, bias, dtype)


def finish(
    sums: Tensor, row_scale: Tensor | None, column_scale: Tensor | None, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """The rest of the definition, of the sums over k [M, N], fp32, which may be overwritten."""
    by_row, by_column = (None if scale is None else scale.reshape(-1, 1) for scale in (row_scale, column_scale))
    return simulated.finish(sums, by_row, by_column, None if bias is None else bias.detach(), dtype)
