"""What layers in floating point have in kernels: their quantizers and the end of their products, compiled for CUDA.

Elsewhere, inside of torch.compile, and where DS_QUANT_KERNELS=reference, they are operations one after the other, which
give the same bits. Nobody has run it on a GPU yet; on the CPU the tests hold what is compiled to the definitions.

Each kind of call (format, rounding, dtypes) compiles at its first one, for some seconds, and not again for new shapes,
keys or streams. Matrices with less than two rows or columns are not compiled: 0 and 1 are constants to torch.compile.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ds_quant.kernels.choice import REFERENCE, chosen
from ds_quant.kernels.compiling import compile_whole
from ds_quant.numerics import rotation
from ds_quant.numerics.format import Format, Integers, quantize_to
from ds_quant.numerics.integer import Quantized
from ds_quant.numerics.minifloat import Minifloat
from ds_quant.numerics.random import derive_key

_BF16_CAPABILITY = (8, 0)


@torch.compiler.assume_constant_result
def multiplies_narrow(device: torch.device) -> bool:
    """Whether torch.mm of a device gives fp32 of operands in 16 bits: NVIDIA's from compute capability 8.0 on."""
    if device.type != "cuda" or torch.version.hip or "dtype" not in torch.ops.aten.mm.overloads():
        return False
    return torch.cuda.get_device_capability(device) >= _BF16_CAPABILITY


def quantize(
    x: Tensor, factor: Tensor | None, to: Format[Integers | Minifloat], rounding: str, key: Tensor | None, stream: int
) -> Quantized:
    """`quantize_to` of x, in fp32 times `factor` where there is one, by the subkey number `stream` of the key.

    factor: fp32 that broadcasts against x, or None. key: counts with rounding "stochastic" only. Of one on the CPU the
    subkey is made there, and sent to the device without waiting.
    """
    subkey = None
    if key is not None and rounding == "stochastic":
        subkey = derive_key(key, stream)
        if subkey.device != x.device:
            subkey = subkey.to(x.device, non_blocking=True)
    if not _compiles(x):
        return _quantize(x, factor, to, rounding, subkey)
    x, factor = x.detach().contiguous(), None if factor is None else factor.detach().contiguous()
    return Quantized(*_compiled(_quantize_as, (to, rounding))(x, factor, subkey))


@torch.library.custom_op("ds_quant::rotate_rows", mutates_args=())
def rotate_rows(x: Tensor, block_size: int) -> Tensor:
    """`numerics.rotation.rotate_rows` of x [rows, features], fp32, bf16 or fp16, in fp32.

    An operator of its own in graphs: fused, each element would be computed from all of its block again and again.
    """
    return rotation.rotate_rows(x.detach().float(), block_size).contiguous()


@rotate_rows.register_fake
def _(x: Tensor, block_size: int) -> Tensor:
    return x.new_empty(x.shape, dtype=torch.float32)


def finish(
    products: Tensor, row_scale: Tensor | None, column_scale: Tensor | None, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """((products * row_scale) * column_scale) + bias in fp32, rounded once to `dtype`.

    products: fp32 [M, N], which may be overwritten. Scales: fp32 [M, 1] and [N, 1], or of one element. bias: [N].
    """
    if not _compiles(products):
        return _finish(products, row_scale, column_scale, bias, dtype, in_place=True)
    return _compiled(_finish_to, dtype)(products, row_scale, column_scale, None if bias is None else bias.detach())


def _compiles(x: Tensor) -> bool:
    if x.device.type != "cuda" or torch.compiler.is_compiling() or x.dim() != 2 or min(x.shape) < 2:
        return False
    return chosen() != REFERENCE


def _quantize(
    x: Tensor, factor: Tensor | None, to: Format[Integers | Minifloat], rounding: str, subkey: Tensor | None
) -> Quantized:
    return quantize_to(x if factor is None else x.float() * factor, to, rounding=rounding, key=subkey)


def _quantize_as(
    how: tuple[Format[Integers | Minifloat], str], x: Tensor, factor: Tensor | None, subkey: Tensor | None
) -> tuple[Any, ...]:
    return tuple(_quantize(x, factor, *how, subkey))


def _finish(
    products: Tensor,
    row_scale: Tensor | None,
    column_scale: Tensor | None,
    bias: Tensor | None,
    dtype: torch.dtype,
    in_place: bool = False,
) -> Tensor:
    multiply, add = (Tensor.mul_, Tensor.add_) if in_place else (Tensor.mul, Tensor.add)
    y = products
    if row_scale is not None:
        y = multiply(y, row_scale)
    if column_scale is not None:
        y = multiply(y, column_scale.t())
    if bias is not None:
        y = add(y, bias.float())
    return y.to(dtype)


def _finish_to(
    dtype: torch.dtype, products: Tensor, row_scale: Tensor | None, column_scale: Tensor | None, bias: Tensor | None
) -> Tensor:
    return _finish(products, row_scale, column_scale, bias, dtype)


@functools.cache
def _compiled(function: Callable, value: Any, backend: str | Callable = "inductor") -> Callable[..., Any]:
    # Called once, while compiling: what it returns is constant, whereas integers of a closure may become symbols.
    @torch.compiler.assume_constant_result
    def constant() -> Any:
        return value

    def call(*arguments: Any) -> Any:
        return function(constant(), *arguments)

    options = {"emulate_precision_casts": True} if backend == "inductor" else None
    return compile_whole(call, 256, backend, options)
