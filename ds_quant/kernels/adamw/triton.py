"""The fused AdamW step by Triton, for the formats that its kernel takes; others go on to the next backend.

Nobody has run it on a GPU yet.
"""

import functools
from collections.abc import Sequence

import torch

from ds_quant.base.log import warn
from ds_quant.kernels.adamw import ops, triton_batches, triton_kernel
from ds_quant.kernels.adamw.work import AdamWWork
from ds_quant.kernels.choice import VARIABLE


@ops.adamw_.by("triton")
@torch.no_grad()
def adamw_(works: Sequence[AdamWWork]) -> None:
    """Do the works in place. Tensors are written behind autograd's back: their versions stay."""
    small, others = [], []
    for work in works:
        reason = triton_kernel.unsupported(work)
        if reason:
            _warn_once(f"{VARIABLE}=triton: a parameter takes another kernel, because {reason}")
            others.append(work)
        elif triton_batches.is_small(work):
            small.append(work)
        elif work.param.numel():
            triton_kernel.adamw_(work)
    triton_batches.adamw_(small)
    if others:
        ops.adamw_.after("triton", others[0].param.device)(others)


@functools.cache
def _warn_once(text: str) -> None:
    warn(text)
