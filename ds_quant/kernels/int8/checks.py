"""What the operations of int8 products refuse, with ValueError."""

import torch
from torch import Tensor

from ds_quant.base.errors import argument_error
from ds_quant.numerics.integer import DTYPES, symmetric_levels
from ds_quant.numerics.random import check_key

FLOATS = "float32, bfloat16 or float16"
_LEVELS = tuple(symmetric_levels(bits, full_range=full_range) for bits in range(2, 9) for full_range in (False, True))


def described(value: object) -> str:
    if not isinstance(value, Tensor):
        return f"a {type(value).__name__}"
    return f"{value.dtype} of shape {tuple(value.shape)} on {value.device}"


def check_operand(where: str, x: object, where_levels: str, levels: object) -> None:
    if not isinstance(x, Tensor) or x.dtype not in DTYPES or x.dim() != 2:
        raise argument_error(where, described(x), f"{FLOATS} of two dimensions", "reshape it to [tokens, features]")
    if isinstance(levels, bool) or not isinstance(levels, int | float) or levels not in _LEVELS:
        allowed = f"those of 2 to 8 bits: {', '.join(f'{n:g}' for n in _LEVELS)}"
        raise argument_error(where_levels, repr(levels), allowed, "pass numerics.integer.symmetric_levels(bits)")


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
