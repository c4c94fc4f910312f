"""Quantizers and the end of products on CUDA, by torch.compile. Nobody has run it on a GPU yet; on the CPU the tests
hold what is compiled to the definitions.

Each kind of call (format, rounding, dtypes) compiles at its first one, for some seconds, and not again for new shapes,
keys or streams. Matrices with less than two rows or columns are not compiled: 0 and 1 are constants to torch.compile.
"""

from typing import Any

import torch
from torch import Tensor

from ds_quant.kernels.compiling import compiled_with
from ds_quant.kernels.simulated import ops, reference
from ds_quant.numerics.format import Format, Integers
from ds_quant.numerics.integer import Quantized
from ds_quant.numerics.minifloat import Minifloat


@ops.quantize.by("compiled")
def quantize(
    x: Tensor, factor: Tensor | None, to: Format[Integers | Minifloat], rounding: str, subkey: Tensor | None
) -> Quantized:
    if not _is_compiled(x):
        return reference.quantize(x, factor, to, rounding, subkey)
    x, factor = x.detach().contiguous(), None if factor is None else factor.detach().contiguous()
    return Quantized(*compiled_with(_quantize, (to, rounding))(x, factor, subkey))


@ops.finish.by("compiled")
def finish(
    products: Tensor, row_scale: Tensor | None, column_scale: Tensor | None, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    if not _is_compiled(products):
        return reference.finish(products, row_scale, column_scale, bias, dtype)
    bias = None if bias is None else bias.detach()
    result: Tensor = compiled_with(_finish, dtype)(products, row_scale, column_scale, bias)
    return result


def _is_compiled(x: Tensor) -> bool:
    return x.dim() == 2 and min(x.shape) > 1


def _quantize(
    x: Tensor, how: tuple[Format[Integers | Minifloat], str], factor: Tensor | None, subkey: Tensor | None
) -> tuple[Any, ...]:
    return tuple(reference.quantize(x, factor, *how, subkey))


def _finish(
    products: Tensor, dtype: torch.dtype, row_scale: Tensor | None, column_scale: Tensor | None, bias: Tensor | None
) -> Tensor:
    return reference.finish(products, row_scale, column_scale, bias, dtype, in_place=False)
