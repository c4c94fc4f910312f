"""What a fused step is asked to do: one entry for each parameter."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ds_quant.numerics.adam import AdamWScalars, Moment
from ds_quant.numerics.integer import DTYPES
from ds_quant.numerics.packing import code_bytes

MOST_DRAWN = 1 << 32
"""Masters that one key rounds."""


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


class MastersWork(NamedTuple):
    """One AdamW step of masters of 24 or 16 bits (`numerics.master`). `low_bits` are written in place, too."""

    step: AdamWWork
    """Its `param` are the weights, bf16."""
    low_bits: Tensor | None
    """int8, of as many elements as the weights; None: the weights are masters of 16 bits."""
    key: tuple[int, int] | None
    """Of stochastic rounding, with no subkey to derive: element i draws number i, below 2^32. None: nearest."""


def check_masters(number: int, work: MastersWork) -> None:
    """Raises ValueError where weights or low bits of work `number` are not as `MastersWork` has them."""
    weight, low_bits = work.step.param, work.low_bits
    for name, tensor, dtype in (("step.param", weight, torch.bfloat16), ("low_bits", low_bits, torch.int8)):
        if tensor is None or (
            tensor.dtype == dtype
            and tensor.numel() == weight.numel()
            and tensor.device == weight.device
            and tensor.is_contiguous()
        ):
            continue
        layout = "contiguous" if tensor.is_contiguous() else "not contiguous"
        raise ValueError(
            f"adamw_masters_(works[{number}].{name}): got {tensor.numel()} elements, {tensor.dtype}, {tensor.device}, "
            f"{layout}; allowed: {weight.numel()} elements, {dtype}, {weight.device}, contiguous; make it so"
        )
    if work.key is not None and weight.numel() > MOST_DRAWN:
        raise ValueError(
            f"adamw_masters_(works[{number}]): got {weight.numel()} elements that are rounded stochastically; allowed: "
            f"{MOST_DRAWN}; step them in parts, with a key for each"
        )


def check_work(number: int, work: AdamWWork) -> None:
    """Raises ValueError where a tensor of work `number` is not as `AdamWWork` and `QuantizedBlocks` have it."""
    numel = work.param.numel()

    def check(name: str, tensor: Tensor, count: int, dtypes: Sequence[torch.dtype]) -> None:
        same = tensor.numel() == count and tensor.dtype in dtypes and tensor.device == work.param.device
        if not same or not tensor.is_contiguous():
            layout = "contiguous" if tensor.is_contiguous() else "not contiguous"
            raise ValueError(
                f"adamw_(works[{number}].{name}): got {tensor.numel()} elements, {tensor.dtype}, {tensor.device}, "
                f"{layout}; allowed: {count} elements, {' or '.join(map(str, dtypes))}, {work.param.device}, "
                "contiguous; make it so"
            )

    check("param", work.param, numel, DTYPES)
    check("grad", work.grad, numel, DTYPES)
    for name, moment in (("exp_avg", work.exp_avg), ("exp_avg_sq", work.exp_avg_sq)):
        if isinstance(moment, Tensor):
            check(name, moment, numel, (torch.float32,))
            continue
        size = moment.block_size
        if moment.numel != numel or size < 1 or (size & (size - 1) and numel % size):
            raise ValueError(
                f"adamw_(works[{number}].{name}): got {moment.numel} elements in blocks of {size}; allowed: {numel} "
                "elements, in blocks of a power of two or a divisor of that; quantize it so"
            )
        num_bytes = code_bytes(numel, size, moment.code_map.bits)
        check(f"{name}.codes", moment.codes, num_bytes, (moment.code_map.stored_dtype,))
        check(f"{name}.scale", moment.scale, -(-numel // size), (torch.float32,))
