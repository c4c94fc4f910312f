"""Operands of products that are rotated along what they contract, block by block, so that outliers spread.

With R orthogonal (`numerics.rotation`, the same for both operands) and Q the quantizers,

    Y = Q(X R) Q(W R)^T        dX = Q(G R) Q(W^T R)^T        dW = Q(G^T R) Q(X^T R)^T

and R cancels but for what Q loses. Both operands of such a product are quantized for it alone, from their values, as
matrices [free, contracted]: scales are one for each row, for blocks of what is contracted, or for all, and so nothing
is folded. For dW codes of X^T R are made in the forward and held in place of those of X. Where one of the two is not
quantized, it is rotated in fp32 and rounded to its dtype.

Signs of R are the same for all products, steps and ranks; or they are drawn for each product and call, from the layer's
own key, so that what Q loses is other in every step. Gradients rounded by MS-EDEN (`numerics.eden`) need these.

After arXiv 2310.16795 (QuaRot and others rotate between layers, once and for all, which is not done here); in training
arXiv 2502.20586 and NVIDIA's NVFP4 recipe, arXiv 2509.25149, which rotates dW alone.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ds_quant.base.number_formats import MS_EDEN
from ds_quant.kernels.simulated import ops as kernels
from ds_quant.linear.recipe import Plan, Quantizer
from ds_quant.numerics import eden
from ds_quant.numerics.format import largest_value
from ds_quant.numerics.integer import Quantized

_SIGNS = 0x7369676E << 32
"""Sets the streams of signs apart from those of quantizers."""
_NUMBER = {"Y": 0, "dX": 1, "dW": 2}


class Rotation(NamedTuple):
    """The rotation of both operands of a product."""

    block_size: int
    key: Tensor | None
    """Of its signs; None: the ones that are the same for all."""

    def of_rows(self, x: Tensor) -> Tensor:
        """x [free, contracted] rotated, fp32."""
        return kernels.rotate_rows(x.detach(), self.block_size, self.key)


def rotation_of(plan: Plan, product: str, key: Tensor | None, device: torch.device) -> Rotation | None:
    """Of "Y", "dX" or "dW"; None where that is not rotated. key: of the call, and the same for both operands."""
    if product not in plan.rotated:
        return None
    if not plan.signs_drawn:
        return Rotation(plan.rotation_block, None)
    assert key is not None
    return Rotation(plan.rotation_block, kernels.subkey_of(key, _SIGNS | (plan.stream + _NUMBER[product]), device))


def rotate_operand(
    x: Tensor, quantizer: Quantizer | None, key: Tensor | None, stream: int, rotation: Rotation
) -> Tensor | Quantized:
    """x [free, contracted], rotated: Quantized, or a Tensor in x's dtype where there is no quantizer."""
    if quantizer is None:
        return rotation.of_rows(x).to(x.dtype)
    return quantize_rotated(x, quantizer, key, stream, rotation)


def quantize_rotated(x: Tensor, quantizer: Quantizer, key: Tensor | None, stream: int, rotation: Rotation) -> Quantized:
    """x [free, contracted], rotated and quantized."""
    rotated, to = rotation.of_rows(x), quantizer.of_rows().format
    if quantizer.rounding != MS_EDEN:
        return kernels.quantize(rotated, None, to, quantizer.rounding, key, stream)
    assert key is not None
    largest = largest_value(to.elements) if to.scale.kind == "e4m3" else None
    nearest = kernels.quantize(rotated, None, to, "nearest", None, stream)
    return eden.corrected(nearest, rotated, largest, kernels.subkey_of(key, stream, x.device))
