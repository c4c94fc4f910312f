"""Linear (affine) quantization: scales by granularity, codes, and back.

A tensor is seen as a matrix [rows, features]: the last dimension holds the features, all leading ones the rows;
0-D and 1-D tensors are one row. The elements that share a scale are a *group*:

    granularity   group                                        shape of scale (and of zero_point)
    tensor        all elements                                 ()
    row           the features of one row                      [*leading, 1]             () for a 0-D tensor
    column        one feature over all rows                    [features]                () for a 0-D tensor
    block         block_size consecutive features of one row   [*leading, num_blocks]    (1,) for a 0-D tensor

num_blocks is ceil(features / block_size): the last block of a row may be shorter.

With b bits, in fp32 whatever the dtype of x, `/` rounded to nearest and round() half to even:

    symmetric     n = 2^(b-1) - 1    scale = max|x| / n           code = clamp(round(x / scale), -n, n)
      full range  n = (2^b - 1) / 2  scale = max|x| / n           code = clamp(round(x / scale), -n - 1/2, n - 1/2)
    asymmetric    n = 2^b - 1        scale = (max x - min x) / n  code = clamp(round(x / scale) + zero_point, 0, n)
                                     zero_point = round(-min x / scale), not clamped: a range need not contain 0
    value         (code - zero_point) * scale

The full range has all 2^b codes, at 8 bits -128 to 127 with a scale of max|x| / 127.5. It is how compressed-tensors
0.20 quantizes activations (`calculate_qparams` and `fake_quantize`, symmetric int), value for value in fp32, save where
its scale is denormal (max|x| below 2^-119 at 8 bits): theirs is then rounded down, and may clip. A group's largest
magnitude lies on a tie: it comes back as n - 1/2 scales if positive, and as n - 1/2 or n + 1/2, as the division was
rounded, if negative.

At the edges:
- A group of zeros has scale 0 (and zero_point 0), and comes back as zeros. A scale of 0 also folds well: it adds
  nothing to the range of what it is multiplied into.
- Asymmetric groups of one value c != 0 take scale |c| and come back exactly.
- No absolute floor. A denormal scale with scale * n < range grows by 2^-149, so that the range fits and the error
  stays half a scale. Where the processor flushes denormals, such groups come back as zeros.
- max x - min x may pass the largest fp32 number; the scale is then taken from halves and doubled.
- A group with an Inf or a NaN has scale NaN and codes 0 (asymmetric: zero_point 0): the whole group comes back as
  NaN, in every product too, and no other group is touched.
- Where the range is below 2^-22 of the offset (asymmetric), x / scale no longer holds single steps in fp32: the
  error is then bounded by a scale plus a few ulp of max|x|.

After arXiv 2407.11722, with these differences: the paper has absolute floors under its scales (1e-5, 1e-9, 1e-8),
leaves one level of 2^b unused in asymmetric codes, and computes in the input's dtype.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ds_quant.numerics.minifloat import MINIFLOATS, decode
from ds_quant.numerics.random import check_key, uniform

GRANULARITIES = ("tensor", "row", "column", "block")
ROUNDINGS = ("nearest", "stochastic")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

SMALLEST_NORMAL = 2.0**-126
SMALLEST_DENORMAL = 2.0**-149


class Quantized(NamedTuple):
    """A quantized tensor. The module docstring has the shapes of `scale` and `zero_point`."""

    codes: Tensor
    """int8 (symmetric) or uint8 (asymmetric, floating point), of the shape of x."""
    scale: Tensor
    """fp32, not negative; NaN for a group with an Inf or a NaN."""
    zero_point: Tensor | None
    """fp32 holding integers, of the shape of `scale`; None when symmetric."""
    granularity: str
    block_size: int
    elements: str = "integer"
    """Or the name of a format in `minifloat`, whose codes these are."""


def quantize(
    x: Tensor,
    bits: int,
    *,
    granularity: str = "tensor",
    block_size: int = 128,
    symmetric: bool = True,
    rounding: str = "nearest",
    key: Tensor | None = None,
    full_range: bool = False,
) -> Quantized:
    """Codes and scales of `x` (fp32, bf16 or fp16, any shape and strides), as the module docstring defines them.

    `block_size` counts for granularity "block" only. rounding "stochastic" needs a `key` (see `fold_key`): with
    v = x / scale, round(v) becomes floor(v) + (u < v - floor(v)), where u is `uniform(key, x.shape)`, by row-major
    index. A v that is an integer never moves. It is unbiased up to 2^-24 of a scale, save where the clamp cuts
    (asymmetric: within half a scale of a group's minimum and maximum, as the zero point is rounded; full range: within
    half a scale of the largest positive value).

    Gradients do not flow. The bits are the same under torch.compile(fullgraph=True), which is not called again for
    new values of `key`. Note that Inductor may pass a bf16 `x` that it computed itself without rounding it
    to bf16 first (torch._inductor.config.emulate_precision_casts).

    Raises ValueError for arguments out of range, for a key without stochastic rounding or the reverse, and for the
    full range of asymmetric codes, which have no other.
    """
    check_arguments(x, bits, granularity, block_size, rounding, key)
    if full_range and not symmetric:
        raise ValueError(
            "quantize(full_range): got True; allowed: with symmetric codes, as asymmetric ones use all levels anyway; "
            "leave it out"
        )
    if symmetric:
        levels = symmetric_levels(bits, full_range=full_range)
        return quantize_symmetric(x, levels, granularity=granularity, block_size=block_size, key=key)
    x = x.detach().float()
    levels = (1 << bits) - 1
    low = reduce_groups(x, torch.amin, granularity, block_size)
    high = reduce_groups(x, torch.amax, granularity, block_size)
    scale = _asymmetric_scale(low, high, levels)
    # Subtracted from zero rather than negated: no -0.0.
    zero_point = 0.0 - torch.round(in_steps(low, scale))
    steps = round_steps(in_steps(x, expand_groups(scale, x, granularity, block_size)), key)
    codes = (steps + expand_groups(zero_point, x, granularity, block_size)).clamp(0, levels)
    return Quantized(codes.to(torch.uint8), scale, zero_point, granularity, block_size)


def quantize_symmetric(
    x: Tensor, levels: float, *, granularity: str = "tensor", block_size: int = 128, key: Tensor | None = None
) -> Quantized:
    """The symmetric case of `quantize`, by its `symmetric_levels`; what is passed is not checked."""
    x = x.detach().float()
    scale = symmetric_scale(reduce_groups(x.abs(), torch.amax, granularity, block_size), levels)
    steps = round_steps(in_steps(x, expand_groups(scale, x, granularity, block_size)), key)
    lowest, highest = code_range(levels)
    return Quantized(steps.clamp(lowest, highest).to(torch.int8), scale, None, granularity, block_size)


def symmetric_levels(bits: int, *, full_range: bool = False) -> float:
    """n of the module docstring, the scales that the largest magnitude of a group takes: 127 or 127.5 at 8 bits.

    No two grids have the same one, so that the kernels take it in place of bits and range.
    """
    return ((1 << bits) - 1) / 2 if full_range else (1 << (bits - 1)) - 1


def code_range(levels: float) -> tuple[int, int]:
    """The lowest and the highest code of symmetric levels."""
    return math.floor(-levels), math.floor(levels)


def symmetric_codes(x: Tensor, scale: Tensor, bits: int) -> Tensor:
    """int8 codes of x, rounded to nearest, at scales that broadcast against it: what `quantize` makes of them.

    For a part of a group, whose scale is that of the whole group.
    """
    levels = symmetric_levels(bits)
    return torch.round(in_steps(x.detach().float(), scale)).clamp(-levels, levels).to(torch.int8)


def integer_values(q: Quantized) -> Tensor:
    """The values in units of their scale, fp32 of the shape of x: codes, minus the zero point where there is one, or
    what they stand for in floating point."""
    if q.elements != "integer":
        return decode(q.codes, MINIFLOATS[q.elements])
    values = q.codes.float()
    if q.zero_point is None:
        return values
    return values - expand_groups(q.zero_point, q.codes, q.granularity, q.block_size)


def expand_scale(q: Quantized) -> Tensor:
    """The scale in a shape that broadcasts against the codes."""
    return expand_groups(q.scale, q.codes, q.granularity, q.block_size)


def dequantize(q: Quantized, dtype: torch.dtype = torch.float32) -> Tensor:
    """integer_values * scale in fp32, rounded once to `dtype`; of the shape of the codes.

    Where rounding to a code carried a value past the largest number of `dtype` by at most a scale, it comes back to
    that number, so that finite input never becomes Inf. Larger values overflow to Inf, as in any cast.
    """
    steps, scale = integer_values(q), expand_scale(q)
    values = steps * scale
    limit = torch.finfo(dtype).max
    # One step (and the few ulp of a far offset) nearer to zero, in halves because a whole one may overflow.
    nearer = (steps.abs() * (1 - 2.0**-20) - 1) * (scale * 0.5)
    if q.elements != "integer":
        nearer = steps.abs() * (1 - 2.0 ** -MINIFLOATS[q.elements].mantissa_bits) * (scale * 0.5)
    return torch.where(nearer <= limit * 0.5, values.clamp(-limit, limit), values).to(dtype)


def fake_quantize(
    x: Tensor,
    bits: int,
    *,
    granularity: str = "tensor",
    block_size: int = 128,
    symmetric: bool = True,
    rounding: str = "nearest",
    key: Tensor | None = None,
    full_range: bool = False,
) -> Tensor:
    """dequantize(quantize(x, ...), x.dtype): what is left of `x`, in its own shape and dtype. No gradient flows."""
    q = quantize(
        x,
        bits,
        granularity=granularity,
        block_size=block_size,
        symmetric=symmetric,
        rounding=rounding,
        key=key,
        full_range=full_range,
    )
    return dequantize(q, x.dtype)


def divide(a: Tensor, b: Tensor | float) -> Tensor:
    """a / b rounded to nearest, in eager mode and compiled, on every device.

    Not written `/`: for CUDA, Inductor lowers that to an approximate division, and a constant divisor to a product
    with its reciprocal (as eager mode does). It lowers addcdiv to a division rounded to nearest.
    """
    divisor = b if isinstance(b, Tensor) else torch.full_like(a, b)
    return torch.addcdiv(a.new_zeros(()), a, divisor)


def nearest_sqrt(x: Tensor) -> Tensor:
    """The square root of fp32 numbers, rounded to nearest."""
    # torch's fp32 root on a CPU is an ulp off now and then; the fp64 root, rounded, is the nearest fp32 number.
    return x.double().sqrt().float() if x.device.type == "cpu" else x.sqrt()


def goes_up(x: Tensor, low: Tensor, high: Tensor, draws: Tensor | None) -> Tensor:
    """Whether `x` is rounded to `high` rather than `low`, two neighbouring values."""
    rest = x - low
    return rest > high - x if draws is None else draws * (high - low) < rest


def divide_to_fit(extent: Tensor, levels: float) -> Tensor:
    """extent / levels; where that is denormal, at least so large that `levels` scales cover the extent."""
    scale = divide(extent, levels)
    short = (scale < SMALLEST_NORMAL) & (scale * levels < extent)
    return torch.where(short, scale + SMALLEST_DENORMAL, scale)


def symmetric_scale(absmax: Tensor, levels: float) -> Tensor:
    """The scale of symmetric groups by their largest magnitudes, fp32; NaN where that is not finite."""
    return torch.where(absmax.isfinite(), divide_to_fit(absmax, levels), torch.nan)


def _asymmetric_scale(low: Tensor, high: Tensor, levels: int) -> Tensor:
    extent = high - low
    doubled_halves = divide(high * 0.5 - low * 0.5, levels) * 2.0
    scale = torch.where(extent.isinf(), doubled_halves, divide_to_fit(extent, levels))
    scale = torch.where(extent > 0, scale, high.abs())
    return torch.where(low.isfinite() & high.isfinite(), scale, torch.nan)


def in_steps(x: Tensor, scale: Tensor) -> Tensor:
    """x / scale, and 0 where the scale is 0 or NaN: casting a NaN or an Inf to an integer is undefined."""
    return torch.where(scale > 0, divide(x, scale), 0.0)


def round_steps(steps: Tensor, key: Tensor | None) -> Tensor:
    """To nearest without a key."""
    if key is None:
        return torch.round(steps)
    floor = torch.floor(steps)
    return floor + (uniform(key, steps.shape, steps.device) < steps - floor)


def reduce_groups(x: Tensor, extremum: Callable[..., Tensor], granularity: str, block_size: int) -> Tensor:
    """torch.amin or torch.amax of each group, in the shape of the scale; 0 for a group without elements."""
    if granularity == "block":
        return reduce_blocks(x.reshape(1) if x.dim() == 0 else x, extremum, block_size)
    if granularity == "tensor":
        return extremum(x) if x.numel() else x.new_zeros(())
    if granularity == "row":
        if x.dim() == 0:
            return x
        return extremum(x, dim=-1, keepdim=True) if x.shape[-1] else x.new_zeros((*x.shape[:-1], 1))
    if x.dim() < 2:
        return x
    return extremum(x, dim=tuple(range(x.dim() - 1))) if x.numel() else x.new_zeros(x.shape[-1:])


def reduce_blocks(x: Tensor, extremum: Callable[..., Tensor], block_size: int) -> Tensor:
    """torch.amin or torch.amax of each block of the last dimension, [..., num_blocks]; the last may be shorter."""
    num_full = x.shape[-1] // block_size
    covered = num_full * block_size
    parts = []
    if num_full:
        parts.append(extremum(x[..., :covered].unflatten(-1, (num_full, block_size)), dim=-1))
    if covered < x.shape[-1]:
        parts.append(extremum(x[..., covered:], dim=-1, keepdim=True))
    return torch.cat(parts, dim=-1) if parts else x.new_zeros((*x.shape[:-1], 0))


def expand_groups(per_group: Tensor, x: Tensor, granularity: str, block_size: int) -> Tensor:
    """A scale or zero point in a shape that broadcasts against `x`."""
    if granularity != "block":
        return per_group
    if x.dim() == 0:
        return per_group[0]
    num_features = x.shape[-1]
    if num_features % block_size == 0:
        return per_group.unsqueeze(-1).expand(*per_group.shape, block_size).flatten(-2)
    # A gather, because Inductor (torch 2.13, CPU, try_loop_split) leaves out the tail of a loop whose index it sees
    # divided by what does not divide the length of the loop. The shift keeps it from turning this into that division.
    block = torch.arange(num_features, device=x.device) >> (block_size.bit_length() - 1)
    return per_group[..., block]


def check_arguments(x: Tensor, bits: int, granularity: str, block_size: int, rounding: str, key: Tensor | None) -> None:
    if x.dtype not in DTYPES:
        raise ValueError(
            f"quantize(x): got {x.dtype}; allowed: float32, bfloat16, float16; cast it first, for scales and codes "
            "are computed in fp32"
        )
    if isinstance(bits, bool) or not isinstance(bits, int) or not 2 <= bits <= 8:
        raise ValueError(f"quantize(bits): got {bits!r}; allowed: integers 2 to 8; set bits to one of them")
    if granularity not in GRANULARITIES:
        raise ValueError(
            f"quantize(granularity): got {granularity!r}; allowed: {', '.join(GRANULARITIES)}; set one of them"
        )
    if granularity == "block" and (block_size not in range(16, 4097) or block_size & (block_size - 1)):
        raise ValueError(
            f"quantize(block_size): got {block_size!r}; allowed: powers of two from 16 to 4096; set one of them"
        )
    check_rounding("quantize", rounding, key)


def check_rounding(where: str, rounding: str, key: Tensor | None) -> None:
    """Raise ValueError unless `rounding` is known and there is a `key` for "stochastic", and none for "nearest"."""
    if rounding not in ROUNDINGS:
        raise ValueError(f"{where}(rounding): got {rounding!r}; allowed: {', '.join(ROUNDINGS)}; set one of them")
    if rounding == "nearest" and key is not None:
        raise ValueError(
            f"{where}(key): got a key; allowed: none with rounding 'nearest', which draws no bits; leave it out or set "
            "rounding to 'stochastic'"
        )
    if rounding == "stochastic":
        if key is None:
            raise ValueError(
                f"{where}(key): got None; allowed: a key with rounding 'stochastic'; make it with fold_key()"
            )
        check_key(f"{where}(key)", key)
