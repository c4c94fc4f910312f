"""What a fused step is asked to do: one entry for each parameter."""

from typing import NamedTuple

from torch import Tensor

from ds_quant.numerics.adam import AdamWScalars, Moment


class AdamWWork(NamedTuple):
    """One parameter of one step. `param`, `exp_avg` and `exp_avg_sq` are written in place, `grad` is left alone.

    All tensors are contiguous and on one device; shapes are free, elements are taken in memory order. 32-bit moments
    are fp32 tensors. Blocks of `granularity` "tensor" and "channel" have any length that divides numel.
    """

    param: Tensor
    grad: Tensor
    exp_avg: Moment
    exp_avg_sq: Moment
    scalars: AdamWScalars
    exp_avg_key: tuple[int, int] | None
    """The key of stochastic rounding before its subkey is derived, two words from 0 to 2^32 - 1; None: nearest."""
    exp_avg_sq_key: tuple[int, int] | None
    stream: int
    """Names the parameter: exp_avg draws with derive_key(key, 2 * stream), exp_avg_sq with 2 * stream + 1."""
