"""Operands of products that are rotated along what they contract, block by block, so that outliers spread.

With R orthogonal (`numerics.rotation`, the same for both operands) and Q the quantizers,

    Y = Q(X R) Q(W R)^T        dX = Q(G R) Q(W^T R)^T        dW = Q(G^T R) Q(X^T R)^T

and R cancels but for what Q loses. Both operands of such a product are quantized for it alone, from their values, as
matrices [free, contracted]: scales are one for each row, for blocks of what is contracted, or for all, and so nothing
is folded. For dW codes of X^T R are made in the forward and held in place of those of X.

After arXiv 2310.16795 (QuaRot and others rotate between layers, once and for all, which is not done here); in training
arXiv 2502.20586 and NVIDIA's NVFP4 recipe, arXiv 2509.25149, which rotates dW alone.
"""

from torch import Tensor

from ds_quant.kernels.simulated import ops as kernels
from ds_quant.linear.recipe import Quantizer
from ds_quant.numerics.integer import Quantized


def quantize_rotated(x: Tensor, quantizer: Quantizer, key: Tensor | None, stream: int, block_size: int) -> Quantized:
    """x [free, contracted], rotated and quantized."""
    rotated = kernels.rotate_rows(x.detach(), block_size)
    return kernels.quantize(rotated, None, quantizer.of_rows().format, quantizer.rounding, key, stream)
