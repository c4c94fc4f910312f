"""A weight as the compressed-tensors format stores it: `serving_format` has the table.

Codes and scales are those of training's quantizer. Every weight is decoded again by the package before it is written,
and has to be the one that training multiplied by: bit for bit in fp32 for integers and fp8, and after rounding to bf16
for MX, where that changes nothing, and NVFP4, which the package decodes in bf16.
"""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ds_quant.base.errors import fail
from ds_quant.base.number_formats import FOUR_SIX
from ds_quant.export.serving_format import FP8, PLAIN, ServingFormat, version
from ds_quant.linear.recipe import STREAM_WEIGHT
from ds_quant.numerics.integer import Quantized, dequantize, integer_values

_LARGEST_BLOCKS = {"floor": (448.0,), FOUR_SIX: (256.0, 384.0, 352.0, 320.0, 288.0)}
"""What the largest scale of a block of NVFP4 may be in E4M3, by `scale_rule`."""
_NEIGHBOURS = 8
"""How many numbers on either side of the reciprocal of an NVFP4 scale are tried."""


def encode(name: str, weight: Tensor, form: ServingFormat) -> dict[str, Tensor]:
    """What is stored for the weight [out, in] of the module `name`, by full key.

    Raises:
        ConfigError: a weight with an Inf or a NaN, with blocks that do not divide its rows, or that compressed-tensors
            would decode to other values.
    """
    quantizer = form.quantizer
    if not weight.isfinite().all():
        raise fail(f"{name}.weight", "an Inf or a NaN", "finite weights", "export a checkpoint from before it diverged")
    granularity, block_size, _ = quantizer.format.group
    if granularity == "block" and weight.shape[1] % block_size:
        got = f"rows of {weight.shape[1]} in blocks of {block_size}"
        raise fail(f"{name}.weight", got, "rows that whole blocks fill, as the format has no shorter one", PLAIN)
    q = quantizer(weight, None, STREAM_WEIGHT)
    values = dequantize(q)
    for stored in _ways(q, form, weight.shape):
        decoded = _compressor(form.name).decompress(stored, form.scheme)["weight"]
        if torch.equal(decoded, values.to(decoded.dtype)):
            return {f"{name}.{key}": tensor for key, tensor in stored.items()}
    got = f"other values after decoding with compressed-tensors {version()}"
    raise fail(f"{name}.weight", got, "training's own", "use the version that constraints.txt names, or --format bf16")


def _ways(q: Quantized, form: ServingFormat, shape: torch.Size) -> Iterator[dict[str, Tensor]]:
    """The tensors to store, without the module's name: more than one way only for NVFP4."""
    # [out, 1] or, in blocks, [out, in / block_size].
    scale = (q.scale.expand(shape[0], 1) if q.scale.dim() == 0 else q.scale).contiguous()
    codes = q.codes.contiguous()
    if form.name == "int-quantized":
        yield {"weight_scale": scale, "weight": codes}
    elif form.name == "pack-quantized":
        from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

        packed = pack_to_int32(codes, form.quantizer.bits)
        yield {"weight_scale": scale, "weight_packed": packed, "weight_shape": torch.tensor(shape)}
    elif form.name == FP8:
        yield {"weight_scale": scale, "weight": codes.view(torch.float8_e4m3fn)}
    elif form.name == "mxfp8-quantized":
        yield {"weight_scale": _exponents(scale), "weight": codes.view(torch.float8_e4m3fn)}
    elif form.name == "mxfp6-pack-quantized":
        from compressed_tensors.compressors.mxfp6.helpers import pack_fp6_to_uint8

        yield {"weight_scale": _exponents(scale), "weight_packed": pack_fp6_to_uint8(integer_values(q))}
    elif form.name == "mxfp4-pack-quantized":
        yield {"weight_scale": _exponents(scale), "weight_packed": _pairs(codes)}
    else:
        for blocks, tensor in _two_levels(scale, _LARGEST_BLOCKS[form.quantizer.scale_rule]):
            yield {"weight_scale": blocks, "weight_packed": _pairs(codes), "weight_global_scale": tensor}


def _exponents(scale: Tensor) -> Tensor:
    """E8M0, uint8, of powers of two: 2^-127 to 2^127."""
    return (torch.frexp(scale).exponent + 126).to(torch.uint8)


def _pairs(codes: Tensor) -> Tensor:
    """Two codes of 4 bits in a byte, the first one in its low half."""
    return codes[:, 0::2] | (codes[:, 1::2] << 4)


def _two_levels(scale: Tensor, largest_blocks: Sequence[float]) -> Iterator[tuple[Tensor, Tensor]]:
    """Scales of blocks in E4M3 and the number they are divided by, which gives `scale` again or nearly so.

    Training multiplies by the scale of the tensor, servers divide by its reciprocal, which is rounded: the numbers next
    to it are tried, too, as one of them may give each scale of a block the same bits.
    """
    largest = scale.max()
    for block, distance in itertools.product(largest_blocks, sorted(range(-_NEIGHBOURS, _NEIGHBOURS + 1), key=abs)):
        middle = (block / largest if largest > 0 else torch.ones_like(largest)).reshape(1)
        tensor = (middle.view(torch.int32) + distance).view(torch.float32)
        yield (scale * tensor).to(torch.float8_e4m3fn), tensor


def _compressor(name: str) -> Any:
    from compressed_tensors.compressors import BaseCompressor

    return BaseCompressor.get_value_from_registry(name)
