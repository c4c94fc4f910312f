"""The operations of layers on GPUs: padded codes, each contiguous along what its products contract.

What they compute is `numerics.products`, bit for bit but for sums. `ops` has the same for CPUs, in one orientation, and
hands these on.
"""

import functools

import torch
from torch import Tensor

from ds_quant.base.errors import argument_error
from ds_quant.kernels.int8 import matmul
from ds_quant.kernels.int8.checks import check_key_or_none, check_operand, check_scale, described
from ds_quant.kernels.int8.family import FAMILY
from ds_quant.kernels.registry import operation
from ds_quant.numerics import products as reference
from ds_quant.numerics.products import ALIGNMENT, WAYS


def _padded_codes(x: Tensor, is_asked: bool) -> Tensor:
    shape = [(size + ALIGNMENT - 1) // ALIGNMENT * ALIGNMENT for size in x.shape]
    return x.new_empty(shape if is_asked else (0,), dtype=torch.int8)


def _scale(x: Tensor, count: int) -> Tensor:
    return x.new_empty((count,), dtype=torch.float32)


def pads(device: torch.device) -> bool:
    """Whether a layer is to multiply padded codes on a device, by the three operations below, and not those above."""
    if device.type == "cpu" and not padded_matmul.implementations:
        return False  # asked six times a layer, and what serves takes longer to find
    return padded_matmul.on(device) is not padded_matmul.reference


@operation(
    FAMILY,
    reference=reference.quantize_operand,
    shapes=lambda x, levels, granularity, factor=None, key=None, stream=0, ways="both": (
        _padded_codes(x, ways != "turned"),
        _padded_codes(x.t(), ways != "codes"),
        _scale(x, {"row": x.shape[0], "column": x.shape[1], "tensor": 1}[granularity]),
    ),
    profiled=True,
    backends_only=True,
)
def quantize_operand(
    x: Tensor,
    levels: float,
    granularity: str,
    factor: Tensor | None = None,
    key: Tensor | None = None,
    stream: int = 0,
    ways: str = "both",
) -> tuple[Tensor, Tensor, Tensor]:
    """Padded codes, turned ones and scale of x [M, K], as `numerics.products.quantize_operand` gives them.

    factor: column_scale of "row", row_scale of "column". key: the rounding's is `derive_key(key, stream)`. ways:
    "codes", "turned" or "both". Else as `quantize_rows`. Raises ValueError for what is not so.
    """
    check_operand("quantize_operand(x)", x, "quantize_operand(levels)", levels)
    if granularity not in ("row", "column", "tensor"):
        raise argument_error(
            "quantize_operand(granularity)", granularity, "row, column or tensor", "set it to one of them"
        )
    if ways not in WAYS:
        raise argument_error("quantize_operand(ways)", ways, ", ".join(WAYS), "set it to one of them")
    if granularity == "tensor" and factor is not None:
        raise argument_error(
            "quantize_operand(factor)", described(factor), "none with one scale for all", "leave it out"
        )
    check_scale("quantize_operand(factor)", factor, x, 1 if granularity == "row" else 0)
    check_key_or_none("quantize_operand(key)", key)
    options = {"factor": factor, "key": key, "stream": stream, "ways": ways}
    return quantize_operand.on(x.device)(x, levels, granularity=granularity, **options)


@operation(
    FAMILY,
    reference=reference.quantize_gradient,
    shapes=lambda g, levels, column_scale, row_scale, key, row_stream, column_stream, sums: (
        *(_padded_codes(g, True), _scale(g, g.shape[0])),
        *(_padded_codes(g.t(), True), _scale(g, g.shape[1])),
        g.new_empty((g.shape[1] if sums else 0,)),
    ),
    profiled=True,
    backends_only=True,
)
def quantize_gradient(
    g: Tensor,
    levels: float,
    column_scale: Tensor | None,
    row_scale: Tensor | None,
    key: Tensor | None,
    row_stream: int,
    column_stream: int,
    sums: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Padded codes and scale of rows, turned codes and scale of columns, and sums over rows, of one gradient [M, N].

    As `numerics.products.quantize_gradient` gives them; arguments as those of `quantize_both` and `quantize_operand`.
    Raises ValueError for what is not so.
    """
    check_operand("quantize_gradient(g)", g, "quantize_gradient(levels)", levels)
    check_scale("quantize_gradient(column_scale)", column_scale, g, 1)
    check_scale("quantize_gradient(row_scale)", row_scale, g, 0)
    check_key_or_none("quantize_gradient(key)", key)
    options = {"column_scale": column_scale, "row_scale": row_scale, "key": key, "sums": sums}
    return quantize_gradient.on(g.device)(g, levels, **options, row_stream=row_stream, column_stream=column_stream)


@operation(
    FAMILY,
    reference=reference.padded_matmul,
    shapes=lambda a, b, num_rows, num_columns, row_scale, column_scale, bias, dtype: a.new_empty(
        (num_rows, num_columns), dtype=dtype
    ),
    profiled=True,
    backends_only=True,
)
def padded_matmul(
    a: Tensor,
    b: Tensor,
    num_rows: int,
    num_columns: int,
    row_scale: Tensor | None,
    column_scale: Tensor | None,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """`epilogue` of the exact products of padded codes a [M', K'] and b [N', K']: [num_rows, num_columns] in `dtype`.

    row_scale and column_scale: fp32, one number each row or column, or of one element. bias: [num_columns]. Backends
    get no K' above `matmul.MAX_CONTRACTION`.
    """
    scales = {"row_scale": row_scale, "column_scale": column_scale}
    if a.shape[1] > matmul.MAX_CONTRACTION:
        finish = functools.partial(reference.epilogue, column_scale=column_scale, bias=bias, dtype=dtype)
        return matmul.multiply_by_rows(a[:num_rows], b[:num_columns].t(), row_scale, finish)
    return padded_matmul.on(a.device)(a, b, num_rows, num_columns, **scales, bias=bias, dtype=dtype)
