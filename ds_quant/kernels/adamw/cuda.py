"""The fused AdamW step on NVIDIA's GPUs by Triton: small parameters together in one launch, others in one each.

Formats that the kernel does not take go on to `compiled`, whose kernels, by the code that is generated for them, move
three to seven times the bytes (`launchers/benchmark.py generated`). Nobody has run either on a GPU yet.
"""

from collections.abc import Sequence

import torch

from ds_quant.kernels.adamw import compiled, ops, triton_batches
from ds_quant.kernels.adamw.work import AdamWWork


@ops.adamw_.by("cuda")
@torch.no_grad()
def adamw_(works: Sequence[AdamWWork]) -> None:
    """Do the works in place. Tensors are written behind autograd's back: their versions stay."""
    compiled.adamw_([work for work, _ in triton_batches.step(works)])
