"""The definition of the fused step as it stands, for machines and devices without a kernel: slow, many temporaries."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ds_quant.kernels.adamw.work import AdamWWork, MastersWork
from ds_quant.kernels.masters import reference as masters
from ds_quant.numerics.adam import Moment, adamw_step
from ds_quant.numerics.random import derive_key
from ds_quant.numerics.stored_states import overwrite


@torch.no_grad()
def adamw_(works: Sequence[AdamWWork]) -> None:
    """Do the works in place, one after the other. Raises ValueError as `quantize_blockwise` does."""
    for work in works:
        results = adamw_step(
            work.param.reshape(-1),
            work.grad.reshape(-1),
            _flat(work.exp_avg),
            _flat(work.exp_avg_sq),
            work.scalars,
            _subkey(work.exp_avg_key, 2 * work.stream, work.param.device),
            _subkey(work.exp_avg_sq_key, 2 * work.stream + 1, work.param.device),
        )
        for old, new in zip((work.param, work.exp_avg, work.exp_avg_sq), results, strict=True):
            overwrite(old, new)


@torch.no_grad()
def adamw_masters_(works: Sequence[MastersWork]) -> None:
    """To fp32, the step there, and back, one work after the other."""
    for step, low_bits, key in works:
        weight = step.param.view(-1)
        low = None if low_bits is None else low_bits.view(-1)
        values = torch.empty(weight.shape, dtype=torch.float32, device=weight.device)
        masters.join(weight, low, values)
        adamw_([step._replace(param=values)])
        masters.split(values, weight, low, key=key)


def _subkey(key: tuple[int, int] | None, stream: int, device: torch.device) -> Tensor | None:
    return None if key is None else derive_key(torch.tensor(key, dtype=torch.int64, device=device), stream)


def _flat(moment: Moment) -> Moment:
    if isinstance(moment, Tensor):
        return moment.reshape(-1)
    return moment._replace(codes=moment.codes.reshape(-1), scale=moment.scale.reshape(-1))
