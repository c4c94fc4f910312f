"""Blockwise quantization of flat tensors with the code maps of `codes`: how Adam's moments are stored.

Each run of `block_size` consecutive elements is a block, the last one may be shorter. In fp32:

    scale = max|x| of the block         code = encode(x * (1 / scale))         value = decode(code) * scale

With the map `log` a block has a second scale, its smallest value, and codes lie between the two (`log_codes`).
The reciprocal is rounded to nearest, once a block, and so is the product. What was dequantized and is quantized again
to nearest gets its codes and scales back. At the edges:
- A block of zeros has scale 0 and the codes of 0, and comes back as exact zeros under every map. Codes of zero bytes
  with scale 0 (a fresh state) come back as zeros too, negative ones under the signed dynamic map.
- In other blocks, maps without zero (unsigned, 4 bits) bring zeros back as their lowest value.
- A block with an Inf or a NaN has scale NaN and the codes of 0: all of it comes back as NaN, and no other block does.
- A block whose largest value is denormal, below 2^-126, counts as zeros: its reciprocal would overflow. A denormal
  product is rounded as usual. Values never exceed the scale, so nothing overflows.
- Negative elements under an unsigned map come back as its lowest value.

8-bit codes are one to an element: int8 for signed power and linear maps, uint8 for all others. Codes of fewer bits are
uint8, packed block by block (`packing`).
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ds_quant.numerics import log_codes
from ds_quant.numerics.codes import CodeMap, code_map, code_values, decode, encode
from ds_quant.numerics.integer import (
    DTYPES,
    SMALLEST_NORMAL,
    check_rounding,
    divide,
    expand_groups,
    reduce_blocks,
)
from ds_quant.numerics.packing import code_bytes, pack, unpack
from ds_quant.numerics.random import uniform16

BITSANDBYTES_BLOCK_SIZE = 256


class QuantizedBlocks(NamedTuple):
    """A flat tensor in blocks. The module docstring has the layout of `codes`."""

    codes: Tensor
    """8 bits: int8 (signed power and linear maps) or uint8, of shape [numel]. Fewer: packed uint8."""
    scale: Tensor
    """fp32 of shape [num_blocks], not negative; NaN for a block with an Inf or a NaN. Map `log`: [2 * num_blocks], the
    largest and the smallest value of each block."""
    numel: int
    block_size: int
    code_map: CodeMap

    def block_range(self, first: int, last: int) -> "QuantizedBlocks":
        """Blocks `first` to `last` - 1, sharing storage."""
        size = self.block_size
        width, scales = code_bytes(size, size, self.code_map.bits), self.code_map.scales
        numel = min(last * size, self.numel) - min(first * size, self.numel)
        codes, scale = self.codes[first * width : last * width], self.scale[first * scales : last * scales]
        return self._replace(codes=codes, scale=scale, numel=numel)


def quantize_blockwise(
    x: Tensor,
    code_map: CodeMap,
    *,
    block_size: int,
    rounding: str = "nearest",
    key: Tensor | None = None,
    offset: int | Tensor = 0,
) -> QuantizedBlocks:
    """Codes and scales of the 1-D tensor `x` (fp32, bf16 or fp16, any length), as the module docstring defines them.

    rounding "stochastic" needs a `key` (see `fold_key`); element i draws number `offset` + i of it (`uniform16`), so
    that a partition that starts at element `offset`, a multiple of block_size, gets the bits that it would get within
    the whole. A value that a code stands for moves at most once in 2^16 times, which is what the reciprocal costs.

    Gradients do not flow. The bits are the same under torch.compile(fullgraph=True), which is not called again for new
    values of `key`; a new `offset` may compile once more, unless it is an int64 tensor [].

    Raises ValueError for arguments out of range. block_size is a power of two, or any divisor of the length (for the
    granularities "tensor" and "channel": see `group_size`).
    """
    _check_arguments(x, block_size, rounding, key)
    x = x.detach().float()
    absmax = reduce_blocks(x.abs(), torch.amax, block_size)
    scale = torch.where(absmax >= SMALLEST_NORMAL, absmax, 0.0)
    scale = torch.where(absmax.isfinite(), scale, torch.nan)
    inverse = torch.where(scale > 0, divide(torch.ones_like(scale), scale), 0.0)
    per_element = expand_groups(inverse, x, "block", block_size)
    # An Inf times 0 is a NaN, which is not for encode.
    steps = torch.where(per_element > 0, x * per_element, 0.0)
    draws = None if key is None else uniform16(key, x.shape, x.device, offset=offset)
    if code_map.scales == 1:
        codes = encode(steps, code_map, draws)
    else:
        low = log_codes.low_end(reduce_blocks(x, torch.amin, block_size), scale)
        spacing = log_codes.spacing(scale, low)
        codes = log_codes.encode(steps, spacing.mapped(lambda one: expand_groups(one, x, "block", block_size)), draws)
        scale = torch.stack((scale, low), dim=-1).reshape(-1)
    if code_map.bits < 8:
        codes = pack(codes, block_size, code_map.bits)
    return QuantizedBlocks(codes, scale, x.numel(), block_size, code_map)


def dequantize_blockwise(q: QuantizedBlocks) -> Tensor:
    """decode(code) * scale, fp32 of shape [numel]."""
    codes = q.codes
    if q.code_map.bits < 8:
        is_signed = q.code_map.dtype == torch.int8
        codes = unpack(codes, q.numel, q.block_size, signed=is_signed, bits=q.code_map.bits)
    if q.code_map.scales > 1:
        high, low = q.scale.reshape(-1, q.code_map.scales).unbind(-1)
        by_block = (high, low, *log_codes.spacing(high, low))
        high, low, *spacing = (expand_groups(one, codes, "block", q.block_size) for one in by_block)
        return log_codes.decode(codes, high, low, log_codes.Spacing(*spacing))
    values = decode(codes, q.code_map)
    return values * expand_groups(q.scale, values, "block", q.block_size)


def group_size(shape: Sequence[int], granularity: str, block_size: int) -> int:
    """The block size, on the flattened tensor, that gives `granularity` "block", "tensor" or "channel".

    "channel" is the paper's: a scale for each index of the first dimension, the output features of a linear layer.
    0-D and 1-D tensors have one channel.
    """
    numel = math.prod(shape)
    if granularity == "block":
        return block_size
    if granularity == "tensor":
        return max(1, numel)
    if granularity == "channel":
        return max(1, numel // max(1, shape[0])) if len(shape) > 1 else max(1, numel)
    raise ValueError(f"group_size(granularity): got {granularity!r}; allowed: block, tensor, channel; set one of them")


def to_bitsandbytes(exp_avg: QuantizedBlocks, exp_avg_sq: QuantizedBlocks, shape: Sequence[int]) -> dict[str, Tensor]:
    """The tensors of a bitsandbytes.optim.AdamW8bit state of a parameter of `shape`, without `step`. Codes are shared.

    Raises ValueError unless both moments have the 8-bit dynamic map and blocks of 256.
    """
    state = {}
    for number, moment in ((1, exp_avg), (2, exp_avg_sq)):
        expected = code_map("dynamic", 8, signed=number == 1)
        if moment.code_map != expected or moment.block_size != BITSANDBYTES_BLOCK_SIZE:
            name = "exp_avg" if number == 1 else "exp_avg_sq"
            raise ValueError(
                f"to_bitsandbytes({name}): got {moment.code_map} in blocks of {moment.block_size}; allowed: {expected} "
                f"in blocks of {BITSANDBYTES_BLOCK_SIZE}; dequantize it and quantize it so"
            )
        state[f"state{number}"] = moment.codes.reshape(tuple(shape))
        state[f"absmax{number}"] = moment.scale
        state[f"qmap{number}"] = code_values(expected, moment.codes.device)
    return state


def from_bitsandbytes(state: Mapping[str, Any]) -> tuple[QuantizedBlocks, QuantizedBlocks]:
    """(exp_avg, exp_avg_sq) of a bitsandbytes.optim.AdamW8bit state. Codes and scales are shared.

    Raises ValueError where the state is not 8-bit in blocks of 256 with the dynamic map. bitsandbytes keeps parameters
    below its min_8bit_size (4096 elements) in 32 bits: such a state holds plain fp32 moments.
    """
    moments = []
    for number in (1, 2):
        codes = state[f"state{number}"]
        if codes.dtype != torch.uint8:
            raise ValueError(
                f"from_bitsandbytes(state{number}): got {codes.dtype}; allowed: torch.uint8; a 32-bit state needs no "
                "conversion, take its tensors as they are"
            )
        expected = code_map("dynamic", 8, signed=number == 1)
        qmap, values = state[f"qmap{number}"], code_values(expected, codes.device)
        if qmap.shape != values.shape or not torch.allclose(qmap.to(values), values, rtol=1e-5, atol=0):
            raise ValueError(
                f"from_bitsandbytes(qmap{number}): got another map than the dynamic one; allowed: that of "
                "create_dynamic_map(); dequantize the state with bitsandbytes instead"
            )
        scale = state[f"absmax{number}"]
        num_blocks = -(-codes.numel() // BITSANDBYTES_BLOCK_SIZE)
        if scale.shape != (num_blocks,):
            raise ValueError(
                f"from_bitsandbytes(absmax{number}): got shape {tuple(scale.shape)}; allowed: ({num_blocks},) for "
                f"{codes.numel()} codes; use a state of blockwise AdamW8bit in blocks of {BITSANDBYTES_BLOCK_SIZE}"
            )
        moments.append(
            QuantizedBlocks(codes.reshape(-1), scale.float(), codes.numel(), BITSANDBYTES_BLOCK_SIZE, expected)
        )
    return moments[0], moments[1]


def _check_arguments(x: Tensor, block_size: int, rounding: str, key: Tensor | None) -> None:
    where = "quantize_blockwise"
    if x.dtype not in DTYPES:
        raise ValueError(f"{where}(x): got {x.dtype}; allowed: float32, bfloat16, float16; cast it first")
    if x.dim() != 1:
        raise ValueError(f"{where}(x): got {x.dim()} dimensions; allowed: 1; pass x.reshape(-1)")
    whole = isinstance(block_size, int) and not isinstance(block_size, bool) and block_size >= 1
    if not whole or (block_size & (block_size - 1) and x.numel() % block_size):
        raise ValueError(
            f"{where}(block_size): got {block_size!r} for {x.numel()} elements; allowed: powers of two, and divisors "
            "of the number of elements; set one of them"
        )
    check_rounding(where, rounding, key)
