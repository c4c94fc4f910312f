"""Gradients on the wire on NVIDIA's GPUs: `compiled`, whose sum over ranks one Triton kernel makes.

Nobody has run it on a GPU yet.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ds_quant.kernels.wire import compiled, ops, triton_sums
from ds_quant.numerics.wire import Parts, Residuals, WireFormat

ops.quantize.by("cuda")(compiled.quantize)
ops.dequantize.by("cuda")(compiled.dequantize)


@ops.reduce.by("cuda")
@torch.no_grad()
def reduce(
    tensors: Sequence[Tensor],
    parts: Parts,
    received: Tensor,
    own_rank: int,
    fmt: WireFormat,
    *,
    factor: float = 1.0,
    output: Tensor | None = None,
    message: Tensor | None = None,
    key: tuple[int, int] | None = None,
    residuals: Residuals | None = None,
    errors: np.ndarray | Tensor | None = None,
) -> None:
    """`numerics.wire.reduce`."""
    compiled.reduce(
        *(tensors, parts, received, own_rank, fmt),
        factor=factor,
        output=output,
        message=message,
        key=key,
        residuals=residuals,
        errors=errors,
        add=triton_sums.add_messages,
    )
