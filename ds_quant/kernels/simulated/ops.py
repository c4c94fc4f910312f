"""What layers in floating point call: their quantizers, the end of their products, and two operators for graphs.

On CUDA quantizers and ends are compiled (`compiled`), on the CPU they are C++ where it has the format (`cpu`).
Elsewhere, inside of torch.compile, and where DS_QUANT_KERNELS=reference, they are operations one after the other, which
give the same bits.
"""

import functools

import torch
from torch import Tensor

from ds_quant.kernels import operators
from ds_quant.kernels.registry import Family, operation
from ds_quant.kernels.simulated import reference
from ds_quant.numerics.format import Format, Integers
from ds_quant.numerics.integer import Quantized
from ds_quant.numerics.minifloat import Minifloat
from ds_quant.numerics.random import derive_key

FAMILY = Family(
    package=__name__.rpartition(".")[0],
    title="layers in floating point",
    caller="a layer in floating point",
    without_cpp="layers in floating point on the CPU quantize by operations one after the other, several times as slow",
)
_BF16_CAPABILITY = (8, 0)


@torch.compiler.assume_constant_result
def multiplies_narrow(device: torch.device) -> bool:
    """Whether torch.mm of a device gives fp32 of operands in 16 bits: NVIDIA's from compute capability 8.0 on."""
    if device.type != "cuda" or torch.version.hip or "dtype" not in torch.ops.aten.mm.overloads():
        return False
    return torch.cuda.get_device_capability(device) >= _BF16_CAPABILITY


def subkey_of(key: Tensor, stream: int, device: torch.device) -> Tensor:
    """Subkey number `stream` of a key, on a device: made where the key is, and sent without waiting."""
    subkey = derive_key(key, stream)
    return subkey if subkey.device == device else subkey.to(device, non_blocking=True)


@operation(FAMILY, reference=reference.quantize, backends_only=True)
def quantize(
    x: Tensor, factor: Tensor | None, to: Format[Integers | Minifloat], rounding: str, key: Tensor | None, stream: int
) -> Quantized:
    """`quantize_to` of x, in fp32 times `factor` where there is one, by the subkey number `stream` of the key.

    factor: fp32 that broadcasts against x, or None. key: counts with rounding "stochastic" only. Of one on the CPU the
    subkey is made there, and sent to the device without waiting.
    """
    subkey = subkey_of(key, stream, x.device) if key is not None and rounding == "stochastic" else None
    if torch.compiler.is_compiling():
        return reference.quantize(x, factor, to, rounding, subkey)
    return quantize.on(x.device)(x, factor, to, rounding, subkey)


@operation(FAMILY, reference=reference.dequantize, backends_only=True)
def dequantize(q: Quantized, dtype: torch.dtype) -> Tensor:
    """`numerics.integer.dequantize`."""
    if torch.compiler.is_compiling():
        return reference.dequantize(q, dtype)
    return dequantize.on(q.codes.device)(q, dtype)


@operation(FAMILY, reference=reference.finish, backends_only=True)
def finish(
    products: Tensor, row_scale: Tensor | None, column_scale: Tensor | None, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """((products * row_scale) * column_scale) + bias in fp32, rounded once to `dtype`.

    products: fp32 [M, N], which may be overwritten. Scales: fp32 [M, 1] and [N, 1], or of one element. bias: [N].
    """
    if torch.compiler.is_compiling():
        return reference.finish(products, row_scale, column_scale, bias, dtype)
    return finish.on(products.device)(products, row_scale, column_scale, bias, dtype)


def _in_fp32(x: Tensor, block_size: int, key: Tensor | None = None) -> Tensor:
    return x.new_empty(x.shape, dtype=torch.float32)


@operation(FAMILY, reference=reference.rotate_rows, shapes=_in_fp32, backends_only=True)
def rotate_rows(x: Tensor, block_size: int, key: Tensor | None = None) -> Tensor:
    """`numerics.rotation.rotate_rows` of x [rows, features], fp32, bf16 or fp16, in fp32.

    An operator of its own in graphs: fused, each element would be computed from all of its block again and again.
    """
    return rotate_rows.on(x.device)(x, block_size, key)


@functools.partial(operators.define, fake=lambda x: x.new_empty(x.shape[1:], dtype=torch.float32))
def token_mean(x: Tensor) -> Tensor:
    """fp32 [features]: the mean of x [tokens, features], fp32, bf16 or fp16; zeros of no tokens.

    An operator of its own in graphs, whose sums would have another order.
    """
    return x.detach().float().sum(0) / max(x.shape[0], 1)
