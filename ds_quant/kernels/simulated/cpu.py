"""Quantizers, dequantized operands, rotations and the end of products on the CPU in C++, bit for bit.

Symmetric integers with fp32 scales go to the kernels of `int8`: blocks that cut rows evenly are rows of their own.
Floating point and scales in 8 bits go to `cpu_formats`. What is left to the definitions: asymmetric codes, blocks of
integers with a shorter one at the end of a row, and what is no matrix.
"""

import torch
from torch import Tensor

from ds_quant.kernels import native
from ds_quant.kernels.int8 import cpu as int8
from ds_quant.kernels.simulated import cpu_formats, cpu_rotation, ops, reference
from ds_quant.numerics.format import Format, Integers, ScaleCodec
from ds_quant.numerics.integer import Quantized, check_arguments
from ds_quant.numerics.minifloat import Minifloat


@ops.quantize.by("cpu")
def quantize(
    x: Tensor, factor: Tensor | None, to: Format[Integers | Minifloat], rounding: str, subkey: Tensor | None
) -> Quantized:
    elements, group, scale = to
    if not _is_matrix(x):
        return reference.quantize(x, factor, to, rounding, subkey)
    if not isinstance(elements, Integers) or scale != ScaleCodec():
        check_arguments(x, elements.bits, group.granularity, group.block_size, rounding, subkey)
        return cpu_formats.quantize(x if factor is None else x.float() * factor, to, subkey)
    if not elements.symmetric:
        return reference.quantize(x, factor, to, rounding, subkey)
    levels, size = elements.levels, group.block_size
    num_rows, num_columns = x.shape
    if group.granularity == "row" and _is_one_each(factor, (num_columns,), (1, num_columns)):
        codes, found = int8.quantize_rows(x, levels, column_scale=_flat(factor), key=subkey)
        return Quantized(codes, found.view(-1, 1), None, "row", size)
    if group.granularity == "column" and _is_one_each(factor, (num_rows, 1)):
        codes, found = int8.quantize_columns(x, levels, row_scale=_flat(factor), key=subkey)
        return Quantized(codes, found, None, "column", size)
    if group.granularity == "tensor" and factor is None:
        codes, found = int8.quantize_tensor(x, levels, key=subkey)
        return Quantized(codes, found.view(()), None, "tensor", size)
    if group.granularity == "block" and factor is None and group.block_rows == 1 and num_columns % size == 0:
        codes, found = int8.quantize_rows(x.reshape(-1, size), levels, key=subkey)
        return Quantized(codes.view(x.shape), found.view(num_rows, -1), None, "block", size)
    return reference.quantize(x, factor, to, rounding, subkey)


@ops.dequantize.by("cpu")
def dequantize(q: Quantized, dtype: torch.dtype) -> Tensor:
    codes, scale, zero_point, granularity, size, elements = q
    if zero_point is not None or codes.dim() != 2 or not codes.numel() or dtype not in native.DTYPES:
        return reference.dequantize(q, dtype)
    if elements != "integer" or (granularity == "block" and codes.shape[1] % size):
        return cpu_formats.dequantize(q, dtype)
    if granularity == "block":
        return int8.dequantize(codes.reshape(-1, size), row_scale=_flat(scale), dtype=dtype).view(codes.shape)
    if granularity == "column":
        return int8.dequantize(codes, column_scale=scale, dtype=dtype)
    return int8.dequantize(codes, row_scale=_flat(scale), dtype=dtype)


@ops.rotate_rows.by("cpu")
def rotate_rows(x: Tensor, block_size: int, key: Tensor | None = None) -> Tensor:
    return cpu_rotation.rotate_rows(x, block_size, key)


@ops.finish.by("cpu")
def finish(
    products: Tensor, row_scale: Tensor | None, column_scale: Tensor | None, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    if row_scale is None and column_scale is None and bias is None:
        return products.to(dtype)
    return int8.epilogue(
        products,
        row_scale=_flat(row_scale),
        column_scale=_flat(column_scale),
        bias=bias,
        dtype=dtype,
        out=products if dtype == products.dtype and products.is_contiguous() else None,
    )


def _is_matrix(x: Tensor) -> bool:
    return x.dim() == 2 and x.numel() > 0 and x.dtype in native.DTYPES


def _is_one_each(factor: Tensor | None, *shapes: tuple[int, ...]) -> bool:
    return factor is None or factor.numel() == 1 or tuple(factor.shape) in shapes


def _flat(scale: Tensor | None) -> Tensor | None:
    return None if scale is None else scale.reshape(-1)
