"""The fused AdamW step by Triton, for the formats that its kernel takes; others go on to the next backend.

Nobody has run it on a GPU yet.
"""

import functools
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch

from ds_quant.base.log import warn
from ds_quant.kernels.adamw import ops, triton_kernel
from ds_quant.kernels.adamw.work import AdamWWork, check_work
from ds_quant.kernels.choice import VARIABLE


@ops.adamw_.by("triton")
@torch.no_grad()
def adamw_(works: Sequence[AdamWWork]) -> None:
    """Do the works in place. Tensors are written behind autograd's back: their versions stay.

    Raises ValueError, before anything is changed, where a tensor is not as `AdamWWork` and `QuantizedBlocks` have it.
    """
    for number, work in enumerate(works):
        check_work(number, work)
    others = []
    for work in works:
        reason = triton_kernel.unsupported(work)
        if reason:
            _warn_once(f"{VARIABLE}=triton: a parameter takes another kernel, because {reason}")
            others.append(work)
        elif work.param.numel():
            with _current(work.param.device):
                triton_kernel.adamw_(work)
    if others:
        ops.adamw_.after("triton", others[0].param.device)(others)


def _current(device: torch.device) -> AbstractContextManager:
    """Triton launches on the current device."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


@functools.cache
def _warn_once(text: str) -> None:
    warn(text)
