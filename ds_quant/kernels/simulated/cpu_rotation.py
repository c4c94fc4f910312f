"""Rotated rows on the CPU in C++: one pass over memory, where the definition takes several for each factor of 2."""

import ctypes
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ds_quant.kernels import native
from ds_quant.kernels.simulated import reference
from ds_quant.numerics import rotation

_LARGEST_BLOCK = 4096
"""MAX_BLOCK of wire.h."""


class _RotateCall(ctypes.Structure):
    """RotateCall of rotation.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "flips", "result")),
        *((name, ctypes.c_int64) for name in ("num_rows", "features", "block_size")),
    )


def rotate_rows(x: Tensor, block_size: int, key: Tensor | None = None, *, isa: str | None = None) -> Tensor:
    """`numerics.rotation.rotate_rows` of x [rows, features], fp32, bf16 or fp16, in fp32, bit for bit.

    With torch.get_num_threads() threads. Blocks above 4096 are left to the definition. `isa` asks for a narrower
    instruction set.
    """
    if block_size > _LARGEST_BLOCK:
        return reference.rotate_rows(x, block_size, key)
    num_rows, features = x.shape
    rows = x.detach().float().contiguous()
    signs = rotation.row_signs(features, block_size, key, x.device)
    flips, result = signs.view(torch.int32) & torch.iinfo(torch.int32).min, torch.empty_like(rows)
    call = _RotateCall(rows.data_ptr(), flips.data_ptr(), result.data_ptr(), num_rows, features, block_size)
    _function()(call, isa=native.isa_number("rotate_rows", isa))
    return result


@functools.cache
def _function() -> Callable[..., Any]:
    sizes = {"ds_quant_rotate_call_size": ctypes.sizeof(_RotateCall)}
    return native.function("ds_quant_rotate_rows", ctypes.POINTER(_RotateCall), sizes=sizes)
