"""The definition as it stands, with many temporaries."""

import torch
from torch import Tensor

from ds_quant.numerics.master import join_master, round_weight, split_master


@torch.no_grad()
def join(weight: Tensor, low_bits: Tensor | None, values: Tensor) -> None:
    values.copy_(weight if low_bits is None else join_master(weight, low_bits))


@torch.no_grad()
def split(values: Tensor, weight: Tensor, low_bits: Tensor | None, *, key: tuple[int, int] | None = None) -> None:
    if low_bits is None:
        weight.copy_(round_weight(values, key))
    else:
        for old, new in zip((weight, low_bits), split_master(values, key), strict=True):
            old.copy_(new)
