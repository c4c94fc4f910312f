"""What a fused step is asked to do: one entry for each parameter."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ds_quant.base.errors import argument_error
from ds_quant.numerics.adam import AdamWScalars, Moment
from ds_quant.numerics.integer import DTYPES
from ds_quant.numerics.packing import code_bytes

MOST_DRAWN = 1 << 32
"""Masters that one key rounds."""
_FP32 = (torch.float32,)


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


def check_work(where: str, work: AdamWWork) -> None:
    """Raises ValueError if a tensor of what `where` names, "adamw_(works[3]", is not as `AdamWWork` has it."""
    param = work.param
    numel, device = param.numel(), param.device
    _check(where, "param", param, numel, DTYPES, device)
    _check(where, "grad", work.grad, numel, DTYPES, device)
    for name, moment in (("exp_avg", work.exp_avg), ("exp_avg_sq", work.exp_avg_sq)):
        if isinstance(moment, Tensor):
            _check(where, name, moment, numel, _FP32, device)
            continue
        codes, scale, count, size, code_map = moment
        if count != numel or size < 1 or (size & (size - 1) and numel % size):
            got = f"{count} elements in blocks of {size}"
            allowed = f"{numel} elements, in blocks of a power of two or a divisor of that"
            raise argument_error(f"{where}.{name})", got, allowed, "quantize it so")
        num_bytes = code_bytes(numel, size, code_map.bits)
        _check(where, f"{name}.codes", codes, num_bytes, (code_map.stored_dtype,), device)
        _check(where, f"{name}.scale", scale, -(-numel // size) * code_map.scales, _FP32, device)


def check_masters(where: str, work: MastersWork) -> None:
    """Raises ValueError likewise where one is not as `MastersWork` has it."""
    weight = work.step.param
    numel = weight.numel()
    _check(where, "step.param", weight, numel, (torch.bfloat16,), weight.device)
    if work.low_bits is not None:
        _check(where, "low_bits", work.low_bits, numel, (torch.int8,), weight.device)
    if work.key is not None and numel > MOST_DRAWN:
        got = f"{numel} elements that are rounded stochastically"
        raise argument_error(f"{where})", got, f"{MOST_DRAWN}", "step them in parts, with a key for each")
    check_work(f"{where}.step", work.step)


def _check(
    where: str, name: str, tensor: Tensor, numel: int, dtypes: Sequence[torch.dtype], device: torch.device
) -> None:
    if tensor.numel() == numel and tensor.dtype in dtypes and tensor.device == device and tensor.is_contiguous():
        return
    layout = "contiguous" if tensor.is_contiguous() else "not contiguous"
    got = f"{tensor.numel()} elements, {tensor.dtype}, {tensor.device}, {layout}"
    allowed = f"{numel} elements, {' or '.join(map(str, dtypes))}, {device}, contiguous"
    raise argument_error(f"{where}.{name})", got, allowed, "make it so")
