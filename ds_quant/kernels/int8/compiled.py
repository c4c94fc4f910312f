"""Operands and results of int8 products on CUDA devices: `numerics.products` under torch.compile. Not run on a GPU yet.

Layers call it where `cuda` does not serve: older cards, ROCm, DS_QUANT_KERNELS=compiled. Its epilogue ends the
products of `torch._int_mm` in any case.

Results are meant to be the reference's, bit for bit: the tests show so of what is compiled for the CPU. On GPUs
Inductor would fuse a product into the sum that follows, which is the epilogue's bias; `emulate_precision_casts` keeps
it from that (it may say that CUDA_HOME is not set, which concerns functions that are not used here). Divisions are
those of `numerics.integer.divide`, rounded to nearest.

Each function compiles at its first call, up to ten seconds, for each `levels` or result dtype, dtype of the matrix,
rounding, scale (none, one number, many) and bias dtype; once more where its first matrix was square. Nothing
compiles again for new shapes, keys or scales. To keep it so

- matrices with less than two rows or columns go to the reference: 0 and 1 are sizes that torch.compile makes constant;
- matrices that are not contiguous are copied first, in their own dtype;
- scales have no dimension, if they are one number, or one.

What `ops` checks is not checked again here.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ds_quant.kernels.compiling import compiled_with
from ds_quant.kernels.int8 import matmul, ops
from ds_quant.numerics import products as reference


@ops.quantize_rows.by("compiled")
@torch.no_grad()
def quantize_rows(
    x: Tensor, levels: float, *, column_scale: Tensor | None = None, key: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`numerics.products.quantize_rows`."""
    return _call(reference.quantize_rows, x, levels, column_scale=_scale(column_scale), key=_data(key))


@ops.quantize_columns.by("compiled")
@torch.no_grad()
def quantize_columns(
    x: Tensor, levels: float, *, row_scale: Tensor | None = None, key: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`numerics.products.quantize_columns`."""
    return _call(reference.quantize_columns, x, levels, row_scale=_scale(row_scale), key=_data(key))


@ops.quantize_both.by("compiled")
@torch.no_grad()
def quantize_both(
    g: Tensor,
    levels: float,
    *,
    column_scale: Tensor | None = None,
    row_scale: Tensor | None = None,
    row_key: Tensor | None = None,
    column_key: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`numerics.products.quantize_both`."""
    scales = {"column_scale": _scale(column_scale), "row_scale": _scale(row_scale)}
    keys = {"row_key": _data(row_key), "column_key": _data(column_key)}
    return _call(reference.quantize_both, g, levels, **scales, **keys)


@ops.quantize_tensor.by("compiled")
@torch.no_grad()
def quantize_tensor(x: Tensor, levels: float, *, key: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`numerics.products.quantize_tensor`."""
    return _call(reference.quantize_tensor, x, levels, key=_data(key))


@ops.dequantize.by("compiled")
@torch.no_grad()
def dequantize(
    codes: Tensor, *, row_scale: Tensor | None = None, column_scale: Tensor | None = None, dtype: torch.dtype
) -> Tensor:
    """`numerics.products.dequantize`, contiguous."""
    return _call(_dequantize, codes, dtype, row_scale=_scale(row_scale), column_scale=_scale(column_scale))


@ops.epilogue.by("compiled")
@torch.no_grad()
def epilogue(
    products: Tensor,
    *,
    others: Tensor | None = None,
    row_scale: Tensor | None = None,
    column_scale: Tensor | None = None,
    bias: Tensor | None = None,
    dtype: torch.dtype,
    out: Tensor | None = None,
) -> Tensor:
    """`numerics.products.epilogue`, contiguous."""
    tensors = {"row_scale": _scale(row_scale), "column_scale": _scale(column_scale), "bias": _data(bias)}
    tensors["others"] = others
    result = _call(_epilogue, products, dtype, **tensors)
    return result if out is None else out.copy_(result)


@ops.scaled_matmul.by("compiled")
def scaled_matmul(a: Tensor, b: Tensor, *, row_scale: Tensor | None = None, **options: Any) -> Tensor:
    """Products by cuBLASLt and the epilogue above, of some rows at a time: the int32 products of a head of 50k outputs
    would take more memory than all else."""
    return matmul.multiply_by_rows(a, b, row_scale, functools.partial(epilogue, **options))


def _epilogue(products: Tensor, dtype: torch.dtype, **tensors: Tensor | None) -> Tensor:
    return reference.epilogue(products, dtype=dtype, **tensors)


def _dequantize(codes: Tensor, dtype: torch.dtype, **scales: Tensor | None) -> Tensor:
    return reference.dequantize(codes, dtype=dtype, **scales)


def _call(function: Callable, matrix: Tensor, constant: float | torch.dtype, **tensors: Any) -> Any:
    matrix = matrix.contiguous().data
    is_small = min(matrix.shape) < 2
    return function(matrix, constant, **tensors) if is_small else compiled_with(function, constant)(matrix, **tensors)


def _data(tensor: Tensor | None) -> Tensor | None:
    """Not a view or a Parameter, for torch.compile would guard what it is of."""
    return None if tensor is None else tensor.contiguous().data


def _scale(scale: Tensor | None) -> Tensor | None:
    return _data(scale if scale is None else scale.reshape(() if scale.numel() == 1 else (-1,)))
