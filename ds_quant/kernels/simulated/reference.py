"""The definitions, operations one after the other."""

import torch
from torch import Tensor

from ds_quant.numerics import rotation
from ds_quant.numerics.format import Format, Integers, quantize_to
from ds_quant.numerics.integer import Quantized, dequantize
from ds_quant.numerics.minifloat import Minifloat


def quantize(
    x: Tensor, factor: Tensor | None, to: Format[Integers | Minifloat], rounding: str, subkey: Tensor | None
) -> Quantized:
    """`quantize_to` of x, in fp32 times `factor` where there is one."""
    return quantize_to(x if factor is None else x.float() * factor, to, rounding=rounding, key=subkey)


__all__ = ["dequantize", "finish", "quantize", "rotate_rows"]


def rotate_rows(x: Tensor, block_size: int, key: Tensor | None = None) -> Tensor:
    """`numerics.rotation.rotate_rows` of x in fp32, contiguous."""
    return rotation.rotate_rows(x.detach().float(), block_size, key).contiguous()


def finish(
    products: Tensor,
    row_scale: Tensor | None,
    column_scale: Tensor | None,
    bias: Tensor | None,
    dtype: torch.dtype,
    in_place: bool = True,
) -> Tensor:
    """((products * row_scale) * column_scale) + bias, rounded to `dtype`."""
    multiply, add = (Tensor.mul_, Tensor.add_) if in_place else (Tensor.mul, Tensor.add)
    y = products
    if row_scale is not None:
        y = multiply(y, row_scale)
    if column_scale is not None:
        y = multiply(y, column_scale.t())
    if bias is not None:
        y = add(y, bias.float())
    return y.to(dtype)
