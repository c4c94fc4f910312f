"""What a linear layer calls of the int8 kernels: plain functions in eager mode, operators that torch.compile keeps
whole in compiled code. `kernels.products` and `kernels.int8_matmul` say what they do and which arguments they refuse.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ds_quant.kernels.int8 import matmul as int8_matmul
from ds_quant.kernels.int8 import products
from ds_quant.kernels.spans import span


def _operator(function: Callable[..., Any]) -> Any:
    """Registers torch.ops.ds_quant.<name>, which a graph holds as one node; it never alters its arguments."""
    return torch.library.custom_op(f"ds_quant::{function.__name__}", function, mutates_args=())


def quantize_rows(
    x: Tensor, bits: int, column_scale: Tensor | None = None, key: Tensor | None = None, full_range: bool = False
) -> tuple[Tensor, Tensor]:
    """`products.quantize_rows`."""
    if torch.compiler.is_compiling():
        return _quantize_rows_op(x, bits, column_scale, key, full_range)
    with span("quantize_rows"):
        return products.quantize_rows(x, bits, column_scale=column_scale, key=key, full_range=full_range)


def quantize_columns(
    x: Tensor, bits: int, row_scale: Tensor | None = None, key: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`products.quantize_columns`."""
    if torch.compiler.is_compiling():
        return _quantize_columns_op(x, bits, row_scale, key)
    with span("quantize_columns"):
        return products.quantize_columns(x, bits, row_scale=row_scale, key=key)


def quantize_both(
    g: Tensor,
    bits: int,
    column_scale: Tensor | None,
    row_scale: Tensor | None,
    row_key: Tensor | None,
    column_key: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`products.quantize_both`; both keys or none."""
    if torch.compiler.is_compiling():
        return _quantize_both_op(g, bits, column_scale, row_scale, row_key, column_key)
    keys = None if row_key is None or column_key is None else (row_key, column_key)
    with span("quantize_both"):
        return products.quantize_both(g, bits, column_scale=column_scale, row_scale=row_scale, keys=keys)


def quantize_tensor(x: Tensor, bits: int, key: Tensor | None = None, full_range: bool = False) -> tuple[Tensor, Tensor]:
    """`products.quantize_tensor`."""
    if torch.compiler.is_compiling():
        return _quantize_tensor_op(x, bits, key, full_range)
    with span("quantize_tensor"):
        return products.quantize_tensor(x, bits, key=key, full_range=full_range)


def dequantize(codes: Tensor, row_scale: Tensor | None, column_scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """`products.dequantize`."""
    if torch.compiler.is_compiling():
        return _dequantize_op(codes, row_scale, column_scale, dtype)
    with span("dequantize"):
        return products.dequantize(codes, row_scale=row_scale, column_scale=column_scale, dtype=dtype)


def scaled_matmul(
    a: Tensor,
    b: Tensor,
    row_scale: Tensor | None,
    column_scale: Tensor | None,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """`int8_matmul.scaled_matmul`."""
    if torch.compiler.is_compiling():
        return _scaled_matmul_op(a, b, row_scale, column_scale, bias, dtype)
    return int8_matmul.scaled_matmul(a, b, row_scale=row_scale, column_scale=column_scale, bias=bias, dtype=dtype)


# Operators run outside of compilation, so each comes back to its function above.

_quantize_rows_op = _operator(quantize_rows)
_quantize_columns_op = _operator(quantize_columns)
_quantize_both_op = _operator(quantize_both)
_quantize_tensor_op = _operator(quantize_tensor)
_dequantize_op = _operator(dequantize)
_scaled_matmul_op = _operator(scaled_matmul)


def _codes(x: Tensor) -> Tensor:
    return x.new_empty(x.shape, dtype=torch.int8)


def _scale(x: Tensor, count: Any) -> Tensor:
    return x.new_empty((count,), dtype=torch.float32)


@_quantize_rows_op.register_fake
def _(
    x: Tensor, bits: int, column_scale: Any = None, key: Any = None, full_range: Any = False
) -> tuple[Tensor, Tensor]:
    return _codes(x), _scale(x, x.shape[0])


@_quantize_columns_op.register_fake
def _(x: Tensor, bits: int, row_scale: Any = None, key: Any = None) -> tuple[Tensor, Tensor]:
    return _codes(x), _scale(x, x.shape[1])


@_quantize_both_op.register_fake
def _(
    g: Tensor, bits: int, column_scale: Any, row_scale: Any, row_key: Any, column_key: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _codes(g), _scale(g, g.shape[0]), _codes(g), _scale(g, g.shape[1])


@_quantize_tensor_op.register_fake
def _(x: Tensor, bits: int, key: Any = None, full_range: Any = False) -> tuple[Tensor, Tensor]:
    return _codes(x), _scale(x, 1)


@_dequantize_op.register_fake
def _(codes: Tensor, row_scale: Any, column_scale: Any, dtype: torch.dtype) -> Tensor:
    return codes.new_empty(codes.shape, dtype=dtype)


@_scaled_matmul_op.register_fake
def _(a: Tensor, b: Tensor, row_scale: Any, column_scale: Any, bias: Any, dtype: torch.dtype) -> Tensor:
    return a.new_empty((a.shape[0], b.shape[1]), dtype=dtype)
