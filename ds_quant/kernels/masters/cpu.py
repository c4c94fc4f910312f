"""Masters on the CPU: hands the tensors to C++, which has the reference's bits.

What `ops` checks is not checked again here. With `isa` a narrower instruction set can be asked for. Nothing is
allocated; the result does not depend on the number of threads.
"""

import ctypes
import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor

from ds_quant.kernels import native
from ds_quant.kernels.masters import ops


class _Call(ctypes.Structure):
    """MastersCall of masters.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("values", "weight", "low_bits")),
        ("numel", ctypes.c_int64),
        ("key", ctypes.c_uint32 * 2),
        ("stochastic", ctypes.c_int32),
    )


_JOIN, _SPLIT = range(2)


@ops.join.by("cpu")
def join(weight: Tensor, low_bits: Tensor | None, values: Tensor, *, isa: str | None = None) -> None:
    """`numerics.master.join_master`."""
    _run(_JOIN, values, weight, low_bits, None, isa)


@ops.split.by("cpu")
def split(
    values: Tensor,
    weight: Tensor,
    low_bits: Tensor | None,
    *,
    key: tuple[int, int] | None = None,
    isa: str | None = None,
) -> None:
    """`numerics.master.split_master`, or `round_weight` without `low_bits`."""
    _run(_SPLIT, values, weight, low_bits, key, isa)


def _run(
    operation: int,
    values: Tensor,
    weight: Tensor,
    low_bits: Tensor | None,
    key: tuple[int, int] | None,
    isa: str | None,
) -> None:
    chosen = native.isa_number("masters", isa)
    call = _Call(values=values.data_ptr(), weight=weight.data_ptr(), numel=values.numel())
    if low_bits is not None:
        call.low_bits = low_bits.data_ptr()
    if key is not None:
        call.stochastic, call.key = 1, key
    _function()(call, operation, isa=chosen)


@functools.cache
def _function() -> Callable[..., Any]:
    sizes = {"ds_quant_masters_call_size": ctypes.sizeof(_Call)}
    return native.function("ds_quant_masters", ctypes.POINTER(_Call), ctypes.c_int, sizes=sizes)
