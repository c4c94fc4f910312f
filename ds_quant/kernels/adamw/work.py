"""What a fused step is asked to do: one entry for each parameter."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ds_quant.base.errors import argument_error
from ds_quant.numerics.adam import AdamWScalars, Moment
from ds_quant.numerics.codes import CodeMap
from ds_quant.numerics.integer import DTYPES
from ds_quant.numerics.packing import code_bytes

MOST_DRAWN = 1 << 32
"""Masters that one key rounds."""
_FP32, _WEIGHTS, _LOW_BITS = (torch.float32,), (torch.bfloat16,), (torch.int8,)


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


class Fault(NamedTuple):
    """What is wrong with a work. It is found without a word for works that are right: a step has hundreds of them."""

    name: str
    """Of the attribute, such as "exp_avg.codes"."""
    got: str
    allowed: str
    remedy: str

    def error(self, work: str) -> ValueError:
        """What to raise; `work` names the work, such as "adamw_(works[3]"."""
        return argument_error(f"{work}{self.name})", self.got, self.allowed, self.remedy)


def fault_of_work(work: AdamWWork) -> Fault | None:
    """The first tensor that is not as `AdamWWork` has it."""
    param, grad = work.param, work.grad
    numel, device = param.numel(), param.device
    if param.dtype not in DTYPES or not param.is_contiguous():
        return _fault(".param", param, numel, DTYPES, device)
    if not _is_as(grad, numel, DTYPES, device):
        return _fault(".grad", grad, numel, DTYPES, device)
    for name, moment in ((".exp_avg", work.exp_avg), (".exp_avg_sq", work.exp_avg_sq)):
        if isinstance(moment, Tensor):
            if not _is_as(moment, numel, _FP32, device):
                return _fault(name, moment, numel, _FP32, device)
            continue
        codes, scale, count, size, code_map = moment
        if count != numel or size < 1 or (size & (size - 1) and numel % size):
            got = f"{count} elements in blocks of {size}"
            allowed = f"{numel} elements, in blocks of a power of two or a divisor of that"
            return Fault(name, got, allowed, "quantize it so")
        num_bytes, dtypes, num_scales = _stored(numel, size, code_map)
        if not _is_as(codes, num_bytes, dtypes, device):
            return _fault(f"{name}.codes", codes, num_bytes, dtypes, device)
        if not _is_as(scale, num_scales, _FP32, device):
            return _fault(f"{name}.scale", scale, num_scales, _FP32, device)
    return None


def fault_of_masters(work: MastersWork) -> Fault | None:
    """The first thing that is not as `MastersWork` has it."""
    weight, low_bits = work.step.param, work.low_bits
    numel, device = weight.numel(), weight.device
    if not _is_as(weight, numel, _WEIGHTS, device):
        return _fault(".step.param", weight, numel, _WEIGHTS, device)
    if low_bits is not None and not _is_as(low_bits, numel, _LOW_BITS, device):
        return _fault(".low_bits", low_bits, numel, _LOW_BITS, device)
    if work.key is not None and numel > MOST_DRAWN:
        got = f"{numel} elements that are rounded stochastically"
        return Fault("", got, f"{MOST_DRAWN}", "step them in parts, with a key for each")
    fault = fault_of_work(work.step)
    return fault and fault._replace(name=f".step{fault.name}")


@functools.lru_cache(maxsize=4096)
def _stored(numel: int, block_size: int, code_map: CodeMap) -> tuple[int, tuple[torch.dtype], int]:
    """Elements and dtype of a moment's codes, and elements of its scales. Kept, as models have the same sizes often."""
    num_scales = -(-numel // block_size) * code_map.scales
    return code_bytes(numel, block_size, code_map.bits), (code_map.stored_dtype,), num_scales


def _is_as(tensor: Tensor, numel: int, dtypes: Sequence[torch.dtype], device: torch.device) -> bool:
    return tensor.numel() == numel and tensor.dtype in dtypes and tensor.device == device and tensor.is_contiguous()


def _fault(name: str, tensor: Tensor, numel: int, dtypes: Sequence[torch.dtype], device: torch.device) -> Fault:
    layout = "contiguous" if tensor.is_contiguous() else "not contiguous"
    got = f"{tensor.numel()} elements, {tensor.dtype}, {tensor.device}, {layout}"
    return Fault(name, got, f"{numel} elements, {' or '.join(map(str, dtypes))}, {device}, contiguous", "make it so")
