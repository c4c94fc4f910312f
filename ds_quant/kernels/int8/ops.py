"""What a linear layer calls of the int8 kernels, and what these compute: `numerics.products`, bit for bit.

What is asked for is checked here: ValueError. Autograd sees nothing.

Matrices are read in place if consecutive elements of a row are neighbours in memory, at any distance from row to row;
any other, a transposed one say, is copied first, in its own dtype. Quantize the other dimension of what is transposed
instead: rows of w.t() are columns of w. The result does not depend on strides, nor on the number of threads.
"""

import torch
from torch import Tensor

from ds_quant.base.errors import argument_error
from ds_quant.kernels.int8 import matmul
from ds_quant.kernels.int8.checks import FLOATS, check_key_or_none, check_operand, check_scale, described
from ds_quant.kernels.int8.family import FAMILY
from ds_quant.kernels.int8.matmul import int_mm
from ds_quant.kernels.int8.padded_ops import padded_matmul, pads, quantize_gradient, quantize_operand
from ds_quant.kernels.registry import operation
from ds_quant.numerics import products as reference
from ds_quant.numerics.integer import DTYPES

__all__ = [
    "FAMILY",
    "dequantize",
    "epilogue",
    "int_mm",
    "padded_matmul",
    "pads",
    "quantize_both",
    "quantize_columns",
    "quantize_gradient",
    "quantize_operand",
    "quantize_rows",
    "quantize_tensor",
    "scaled_matmul",
]
_PRODUCTS = (torch.int32, torch.float32)


def _codes(x: Tensor) -> Tensor:
    return x.new_empty(x.shape, dtype=torch.int8)


def _scale(x: Tensor, count: int) -> Tensor:
    return x.new_empty((count,), dtype=torch.float32)


@operation(
    FAMILY,
    reference=reference.quantize_rows,
    shapes=lambda x, levels, column_scale=None, key=None: (_codes(x), _scale(x, x.shape[0])),
    profiled=True,
)
def quantize_rows(
    x: Tensor, levels: float, column_scale: Tensor | None = None, key: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Codes int8 [M, K] and scale fp32 [M] of x [M, K], as `numerics.products.quantize_rows` gives them.

    x: fp32, bf16 or fp16. levels: `symmetric_levels` of 2 to 8 bits. column_scale: fp32 [K] or of one element. key: as
    `fold_key` gives it, None for nearest rounding. Raises ValueError for what is not so.
    """
    check_operand("quantize_rows(x)", x, "quantize_rows(levels)", levels)
    check_scale("quantize_rows(column_scale)", column_scale, x, 1)
    check_key_or_none("quantize_rows(key)", key)
    return quantize_rows.on(x.device)(x, levels, column_scale=column_scale, key=key)


@operation(
    FAMILY,
    reference=reference.quantize_columns,
    shapes=lambda x, levels, row_scale=None, key=None: (_codes(x), _scale(x, x.shape[1])),
    profiled=True,
)
def quantize_columns(
    x: Tensor, levels: float, row_scale: Tensor | None = None, key: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Codes int8 [M, N], contiguous, and scale fp32 [N] of x [M, N], as `numerics.products.quantize_columns` has it.

    row_scale: fp32 [M] or of one element; else as `quantize_rows`. Raises ValueError for what is not so.
    """
    check_operand("quantize_columns(x)", x, "quantize_columns(levels)", levels)
    check_scale("quantize_columns(row_scale)", row_scale, x, 0)
    check_key_or_none("quantize_columns(key)", key)
    return quantize_columns.on(x.device)(x, levels, row_scale=row_scale, key=key)


@operation(
    FAMILY,
    reference=reference.quantize_both,
    shapes=lambda g, levels, column_scale=None, row_scale=None, row_key=None, column_key=None: (
        *(_codes(g), _scale(g, g.shape[0])),
        *(_codes(g), _scale(g, g.shape[1])),
    ),
    profiled=True,
)
def quantize_both(
    g: Tensor,
    levels: float,
    column_scale: Tensor | None = None,
    row_scale: Tensor | None = None,
    row_key: Tensor | None = None,
    column_key: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Codes and scale of rows, then of columns, as the two functions above give them; `g` is read twice, not thrice.

    row_key: of the rows' rounding. column_key: of the columns'. Else as those. Raises ValueError for what is not so.
    """
    check_operand("quantize_both(g)", g, "quantize_both(levels)", levels)
    check_scale("quantize_both(column_scale)", column_scale, g, 1)
    check_scale("quantize_both(row_scale)", row_scale, g, 0)
    check_key_or_none("quantize_both(row_key)", row_key)
    check_key_or_none("quantize_both(column_key)", column_key)
    return quantize_both.on(g.device)(
        g, levels, column_scale=column_scale, row_scale=row_scale, row_key=row_key, column_key=column_key
    )


@operation(
    FAMILY,
    reference=reference.quantize_tensor,
    shapes=lambda x, levels, key=None: (_codes(x), _scale(x, 1)),
    profiled=True,
)
def quantize_tensor(x: Tensor, levels: float, key: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Codes int8 [M, K] and one scale, fp32 [1], as `numerics.products.quantize_tensor` gives them.

    Else as `quantize_rows`. Raises ValueError for what is not so.
    """
    check_operand("quantize_tensor(x)", x, "quantize_tensor(levels)", levels)
    check_key_or_none("quantize_tensor(key)", key)
    return quantize_tensor.on(x.device)(x, levels, key=key)


@operation(
    FAMILY,
    reference=reference.dequantize,
    shapes=lambda codes, row_scale, column_scale, dtype: codes.new_empty(codes.shape, dtype=dtype),
    profiled=True,
)
def dequantize(codes: Tensor, row_scale: Tensor | None, column_scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """[M, K] in `dtype` from codes int8 [M, K], as `numerics.products.dequantize` gives it.

    One of row_scale, fp32 [M] or of one element, and column_scale, [K] or of one. Raises ValueError for what is not so.
    """
    if not isinstance(codes, Tensor) or codes.dtype != torch.int8 or codes.dim() != 2:
        raise argument_error(
            "dequantize(codes)", described(codes), "int8 of two dimensions", "pass what quantize_rows gives"
        )
    if (row_scale is None) == (column_scale is None):
        got = "none" if row_scale is None else "both"
        raise argument_error(
            "dequantize(row_scale, column_scale)", got, "one of the two", "pass the scale of the codes"
        )
    check_scale("dequantize(row_scale)", row_scale, codes, 0)
    check_scale("dequantize(column_scale)", column_scale, codes, 1)
    if dtype not in DTYPES:
        raise argument_error("dequantize(dtype)", dtype, FLOATS, "set it to one of them")
    return dequantize.on(codes.device)(codes, row_scale=row_scale, column_scale=column_scale, dtype=dtype)


@operation(FAMILY, reference=reference.epilogue, profiled=True)
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
    """((products * row_scale) * column_scale) + bias in fp32, rounded once to `dtype`: [M, N], or `out` of that kind.

    products: int32 [M, N], or fp32 of whole numbers up to 2^24. others: int32 [M, N], contiguous, added to the products
    first, exactly. row_scale, column_scale: fp32 [M] and [N], or of one element. bias: fp32, bf16 or fp16, [N].
    dtype: fp32, bf16 or fp16. Raises ValueError for what is not so.
    """
    if not isinstance(products, Tensor) or products.dtype not in _PRODUCTS or products.dim() != 2:
        allowed = "int32 or float32 of two dimensions"
        raise argument_error("epilogue(products)", described(products), allowed, "pass what _int_mm gives")
    if others is not None and not (
        others.dtype == torch.int32
        and others.shape == products.shape
        and others.device == products.device
        and others.is_contiguous()
    ):
        allowed = f"int32 of shape {tuple(products.shape)} on {products.device}, contiguous"
        raise argument_error("epilogue(others)", described(others), allowed, "pass such a tensor, or none")
    check_scale("epilogue(row_scale)", row_scale, products, 0)
    check_scale("epilogue(column_scale)", column_scale, products, 1)
    num_columns = products.shape[1]
    if bias is not None and not (
        isinstance(bias, Tensor)
        and bias.dtype in DTYPES
        and bias.shape == (num_columns,)
        and bias.device == products.device
    ):
        allowed = f"{FLOATS} of shape ({num_columns},) on {products.device}"
        raise argument_error("epilogue(bias)", described(bias), allowed, "make it so")
    if dtype not in DTYPES:
        raise argument_error("epilogue(dtype)", dtype, FLOATS, "set it to one of them")
    if out is not None and not (
        out.dtype == dtype and out.shape == products.shape and out.device == products.device and out.is_contiguous()
    ):
        allowed = f"{dtype} of shape {tuple(products.shape)} on {products.device}, contiguous"
        raise argument_error("epilogue(out)", described(out), allowed, "pass such a tensor, or none to have one made")
    options = {"others": others, "row_scale": row_scale, "column_scale": column_scale, "bias": bias}
    return epilogue.on(products.device)(products, **options, dtype=dtype, out=out)


def _multiply(
    a: Tensor,
    b: Tensor,
    row_scale: Tensor | None,
    column_scale: Tensor | None,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """The reference of `scaled_matmul`, for all sizes: the products as a whole, and then the epilogue."""
    products = int_mm(a, b)
    finish = epilogue if products.dtype == torch.int32 else reference.epilogue
    return finish(products, row_scale=row_scale, column_scale=column_scale, bias=bias, dtype=dtype)


@operation(
    FAMILY,
    reference=_multiply,
    shapes=lambda a, b, row_scale, column_scale, bias, dtype: a.new_empty((a.shape[0], b.shape[1]), dtype=dtype),
)
def scaled_matmul(
    a: Tensor,
    b: Tensor,
    row_scale: Tensor | None,
    column_scale: Tensor | None,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """`epilogue` of the exact products of a [M, K] and b [K, N], int8 of any strides: [M, N] in `dtype`.

    row_scale and column_scale: fp32 [M] and [N], or of one element. bias: [N]. Backends get no K above
    `matmul.MAX_CONTRACTION`, the longest sum that fits int32.
    """
    serving = _multiply if a.shape[1] > matmul.MAX_CONTRACTION else scaled_matmul.on(a.device)
    return serving(a, b, row_scale=row_scale, column_scale=column_scale, bias=bias, dtype=dtype)
