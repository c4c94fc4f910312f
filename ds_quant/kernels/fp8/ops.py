"""What a linear layer calls of fp8 products. Checked here: ValueError. Autograd sees nothing."""

import torch
from torch import Tensor

from ds_quant.base.errors import argument_error
from ds_quant.kernels.fp8 import reference
from ds_quant.kernels.fp8.family import FAMILY
from ds_quant.kernels.registry import operation

__all__ = ["DTYPES", "FAMILY", "fp8_matmul"]

DTYPES = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
"""By their names in `numerics.minifloat`."""


def _check_matrix(where: str, x: Tensor) -> None:
    if x.dim() != 2 or x.dtype not in DTYPES.values():
        allowed = "float8_e4m3fn or float8_e5m2 of two dimensions"
        raise argument_error(where, f"{x.dtype} of shape {tuple(x.shape)}", allowed, "view codes as such")


def _check_vector(where: str, x: Tensor | None, count: int, *, one: bool) -> None:
    if x is not None and x.shape != (count,) and not (one and x.numel() == 1):
        allowed = f"shape ({count},)" + (", or one element" if one else "")
        raise argument_error(where, f"shape {tuple(x.shape)}", allowed, "flatten it")


@operation(
    FAMILY,
    reference=reference.fp8_matmul,
    shapes=lambda a, b, row_scale, column_scale, bias, dtype: a.new_empty((a.shape[0], b.shape[0]), dtype=dtype),
    profiled=True,
)
def fp8_matmul(
    a: Tensor,
    b: Tensor,
    row_scale: Tensor | None,
    column_scale: Tensor | None,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """[M, N] in `dtype`, contiguous, of a [M, K] and b [N, K], each in one of `DTYPES`, as `reference` defines it.

    Strides and sizes are arbitrary. row_scale: fp32, [M] or of one element; column_scale likewise of [N]. bias: [N].
    What a device multiplies itself differs from the definition by how it sums: see `kernels.fp8_units`.
    """
    _check_matrix("fp8_matmul(a)", a)
    _check_matrix("fp8_matmul(b)", b)
    if a.shape[1] != b.shape[1]:
        got = f"{tuple(a.shape)} and {tuple(b.shape)}"
        raise argument_error("fp8_matmul", got, "as many columns in both", "turn one of them")
    _check_vector("fp8_matmul(row_scale)", row_scale, a.shape[0], one=True)
    _check_vector("fp8_matmul(column_scale)", column_scale, b.shape[0], one=True)
    _check_vector("fp8_matmul(bias)", bias, b.shape[0], one=False)
    scales = {"row_scale": row_scale, "column_scale": column_scale}
    return fp8_matmul.on(a.device)(a, b, **scales, bias=bias, dtype=dtype)
