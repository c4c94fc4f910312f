"""The fused AdamW step on NVIDIA's GPUs: small parameters together in one launch by Triton, the others by `compiled`.

Nobody has run it on a GPU yet.
"""

from collections.abc import Sequence

import torch

from ds_quant.kernels.adamw import compiled, ops, triton_batches
from ds_quant.kernels.adamw.work import AdamWWork


@ops.adamw_.by("cuda")
@torch.no_grad()
def adamw_(works: Sequence[AdamWWork]) -> None:
    """Do the works in place. Tensors are written behind autograd's back: their versions stay."""
    small = [triton_batches.is_small(work) for work in works]
    triton_batches.adamw_([work for work, is_small in zip(works, small, strict=True) if is_small])
    compiled.adamw_([work for work, is_small in zip(works, small, strict=True) if not is_small])
