"""Shapes of parameters that may not be here: ZeRO-3 partitions them, and lazy ones have none yet."""

import torch
from torch import nn


def shape_of(parameter: torch.Tensor) -> tuple[int, ...]:
    """The shape of a whole parameter: ZeRO-3 leaves an empty tensor behind and keeps the shape beside it.

    A lazy parameter, which has none yet, is taken for empty.
    """
    if nn.parameter.is_lazy(parameter):
        return ()
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def out_features(module: nn.Module, *, transposed: bool) -> int:
    """Of a linear layer, whose weight is [in, out] if `transposed`."""
    weight = module.weight
    assert isinstance(weight, torch.Tensor)
    return shape_of(weight)[1 if transposed else 0]
