"""The fused AdamW step by Triton, for the formats that its kernel takes; others go on to the next backend.

Nobody has run it on a GPU yet.
"""

import functools
from collections.abc import Sequence

import torch

from ds_quant.base.log import warn
from ds_quant.kernels.adamw import ops, triton_batches
from ds_quant.kernels.adamw.work import AdamWWork
from ds_quant.kernels.choice import VARIABLE


@ops.adamw_.by("triton")
@torch.no_grad()
def adamw_(works: Sequence[AdamWWork]) -> None:
    """Do the works in place. Tensors are written behind autograd's back: their versions stay."""
    others = []
    for work, reason in triton_batches.step(works):
        _warn_once(f"{VARIABLE}=triton: a parameter takes another kernel, because {reason}")
        others.append(work)
    if others:
        ops.adamw_.after("triton", others[0].param.device)(others)


@functools.cache
def _warn_once(text: str) -> None:
    warn(text)
