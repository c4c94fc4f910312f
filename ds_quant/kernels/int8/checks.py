"""What the operations of int8 products refuse, with ValueError."""

import torch
from torch import Tensor

from ds_quant.base.errors import argument_error
from ds_quant.numerics.integer import DTYPES
from ds_quant.numerics.random import check_key

FLOATS = "float32, bfloat16 or float16"


def described(value: object) -> str:
    if not isinstance(value, Tensor):
        return f"a {type(value).__name__}"
    return f"{value.dtype} of shape {tuple(value.shape)} on {value.device}"


def check_operand(where: str, x: object, where_bits: str, bits: object) -> None:
    if not isinstance(x, Tensor) or x.dtype not in DTYPES or x.dim() != 2:
        raise argument_error(where, described(x), f"{FLOATS} of two dimensions", "reshape it to [tokens, features]")
    if isinstance(bits, bool) or not isinstance(bits, int) or not 2 <= bits <= 8:
        raise argument_error(where_bits, repr(bits), "integers 2 to 8", "set bits to one of them")


def check_scale(where: str, scale: object, matrix: Tensor, dim: int) -> None:
    if scale is None:
        return
    count = matrix.shape[dim]
    is_fp32 = isinstance(scale, Tensor) and scale.dtype == torch.float32 and scale.device == matrix.device
    if not is_fp32 or (scale.shape != (count,) and scale.numel() != 1):  # type: ignore[attr-defined]
        allowed = f"float32 of shape ({count},), or of one element, on {matrix.device}"
        raise argument_error(where, described(scale), allowed, "flatten the scale, one number a row or column")


def check_key_or_none(where: str, key: Tensor | None) -> None:
    if key is not None:
        check_key(where, key)
