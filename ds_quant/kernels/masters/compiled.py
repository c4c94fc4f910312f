"""Masters on CUDA devices: the definition under torch.compile, one kernel each. No GPU has run it yet."""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ds_quant.kernels.compiling import compile_whole
from ds_quant.kernels.masters import ops
from ds_quant.kernels.transfers import sent
from ds_quant.numerics import master


@ops.join.by("compiled")
@torch.no_grad()
def join(weight: Tensor, low_bits: Tensor | None, values: Tensor) -> None:
    """`numerics.master.join_master`."""
    if low_bits is None:
        values.copy_(weight)
    else:
        values.copy_(_compiled(master.join_master)(weight, low_bits))


@ops.split.by("compiled")
@torch.no_grad()
def split(values: Tensor, weight: Tensor, low_bits: Tensor | None, *, key: tuple[int, int] | None = None) -> None:
    """`numerics.master.split_master`, or `round_weight` without `low_bits`."""
    # As a tensor: compiled code would be made anew for each pair of ints.
    words: Any = None if key is None else sent(np.array(key, dtype=np.int64), values.device)
    if low_bits is None:
        weight.copy_(_compiled(master.round_weight)(values, words))
    else:
        for old, new in zip((weight, low_bits), _compiled(master.split_master)(values, words), strict=True):
            old.copy_(new)


@functools.cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return compile_whole(function, recompile_limit=8)
