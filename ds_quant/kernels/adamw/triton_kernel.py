"""One AdamW step of one tensor in one pass over memory: Triton. Nobody has run it on a GPU yet.

The arithmetic is that of `numerics.adam`, `numerics.codes` and `numerics.random`, operation by operation. Divisions and
the denominator's root are rounded to nearest, and products are not fused into sums (`enable_fp_fusion=False`), so that
codes, scales and parameters are meant to be those of the definition, bit for bit; the tests show so in Triton's
interpreter. On a GPU only closeness is promised until a test has run there. Roots that guess a code are approximate.

A *unit* is the smaller one of the two moments' blocks. A program takes `units` of them, enough for whole blocks of the
larger kind, as two tiles of [units, unit / 2]: the halves of each unit, whose 4-bit codes share bytes, so that packing
moves nothing between threads. What is left after the last whole block of the larger kind is one more launch of one
program: the halves of a unit then have lengths that are not known at compile time, which costs wide loads.

A parameter costs a launch, or two if it has such a tail; `triton_batches` steps many small ones in one.

Which formats it takes: see `unsupported`. Importing this module needs triton.
"""

# What a Triton function is passed has no type that mypy knows.
# mypy: disallow-incomplete-defs=False

import functools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ds_quant.kernels.adamw.work import AdamWWork
from ds_quant.kernels.launching import Launch, run
from ds_quant.kernels.triton_random import mix
from ds_quant.numerics import log_codes
from ds_quant.numerics.adam import Moment
from ds_quant.numerics.codes import LOWEST_FLOAT, CodeMap, code_map
from ds_quant.numerics.random import derive_words

SMALLEST_BLOCK, LARGEST_BLOCK = 32, 4096
TILE = 1024
"""Elements of a program, where its blocks are not larger."""
ELEMENTS_PER_WARP = 256
"""4 of each half to a thread: 16 bytes of fp32, 4 bytes of codes."""
UNIT_IN_32_BITS = 256
MOST_THREADS = 1024
"""Of a program, on every GPU; a warp of AMD's has 64."""


class Format(NamedTuple):
    """How the kernel sees one moment; known when it is compiled."""

    bits: int
    signed: bool = True
    levels: int = 1
    offset: int = 0
    squarings: int = 0
    ratio: int = 1
    """Units in a block."""
    stochastic: bool = False
    is_float: bool = False
    lowest: float = 0.0
    """The lowest value above zero of a float map."""
    is_log: bool = False
    """Whether a block has two scales (`numerics.log_codes`)."""


def unsupported(work: AdamWWork) -> str | None:
    """Why the kernel cannot do this work; None where it can."""
    unit, _ = block_sizes(work)
    for name, moment in (("exp_avg", work.exp_avg), ("exp_avg_sq", work.exp_avg_sq)):
        if isinstance(moment, Tensor):
            continue
        reason = _unsupported(moment.code_map, moment.block_size, unit)
        if reason:
            return f"{name} has {reason}"
    return None


@functools.lru_cache(256)
def _unsupported(kind: CodeMap, size: int, unit: int) -> str | None:
    if kind.name == "dynamic":
        return "the dynamic map"
    if size & (size - 1) or not SMALLEST_BLOCK <= size <= LARGEST_BLOCK:
        return f"blocks of {size}, not a power of two from {SMALLEST_BLOCK} to {LARGEST_BLOCK}"
    if not _is_known(kind):
        return f"a map of its own, {kind}"
    if kind.bits == 4 and size > unit:
        return "4 bits and larger blocks than the other moment"
    return None


def adamw_(work: AdamWWork) -> None:
    """One step of one parameter, in place. Raises ValueError for a format that the kernel cannot do."""
    for launch in launches(work):
        run(launch, work.param.device)


def launches(work: AdamWWork) -> list[Launch]:
    """The launches that make the step: one for all whole blocks, one for what is left; none for no elements."""
    reason = unsupported(work)
    if reason:
        raise ValueError(f"triton.adamw_(work): got a format in which {reason}; allowed: others; use another kernel")
    unit, largest = block_sizes(work)
    numel = work.param.numel()
    whole_units, tail = numel // largest * (largest // unit), numel % largest
    first, second = formats(work)
    tensors = storage(work)
    numbers = (
        *numbers_of(work),
        *_words(work.exp_avg_key, 2 * work.stream),
        *_words(work.exp_avg_sq_key, 2 * work.stream + 1),
    )

    def launch(num_programs: int, units: int, first_unit: int, length: int, is_tail: bool) -> Launch:
        constants = (first, second, unit, units, is_tail)
        return Launch(
            kernel, (num_programs,), (*tensors, *numbers, first_unit, length, *constants), options_for(units * unit)
        )

    result = []
    if whole_units:
        units = max(TILE, largest) // unit
        result.append(launch(-(-whole_units // units), units, 0, whole_units, False))
    if tail:
        result.append(launch(1, largest // unit, whole_units, tail, True))
    return result


def _is_known(kind: CodeMap) -> bool:
    """Whether the codes fit their bits, and a guess is off by one at most."""
    if kind.name == log_codes.NAME:
        return kind == code_map(log_codes.NAME, 4, signed=False)
    if kind.name not in ("power", "linear"):
        return kind.name == "float" and kind == code_map("float", 8, signed=kind.signed)
    fits = 0 <= kind.offset < kind.levels <= 512 and kind.highest < 2 ** (kind.bits - kind.signed)
    return fits and kind.exponent in (1, 2, 4, 8)


def block_sizes(work: AdamWWork) -> tuple[int, int]:
    """Elements of a unit, and of the larger kind of block."""
    sizes = [m.block_size for m in (work.exp_avg, work.exp_avg_sq) if not isinstance(m, Tensor)] or [UNIT_IN_32_BITS]
    return min(sizes), max(sizes)


def formats(work: AdamWWork) -> tuple[Format, Format]:
    """Of exp_avg and exp_avg_sq."""
    unit, _ = block_sizes(work)
    return _format(work.exp_avg, unit, work.exp_avg_key), _format(work.exp_avg_sq, unit, work.exp_avg_sq_key)


def numbers_of(work: AdamWWork) -> tuple[float, ...]:
    """The step's scalars as the kernel takes them. All are floats: an int would compile another kernel."""
    beta1, beta2, *others = map(float, work.scalars)
    return beta1, 1 - beta1, beta2, 1 - beta2, *others


def options_for(tile: int) -> dict[str, Any]:
    """How a program for this many elements is compiled and launched."""
    # The largest tile would spill registers at 4 elements to a thread.
    most = MOST_THREADS // (64 if torch.version.hip else 32)
    warps = most if tile == LARGEST_BLOCK else max(tile // ELEMENTS_PER_WARP, 1)
    return {"num_warps": warps, "enable_fp_fusion": False}


def _format(moment: Moment, unit: int, key: tuple[int, int] | None) -> Format:
    if isinstance(moment, Tensor):
        return Format(32)
    kind = moment.code_map
    is_float = kind.name == "float"
    return Format(
        kind.bits,
        kind.signed,
        kind.levels,
        kind.offset,
        squarings=kind.exponent.bit_length() - 1,
        ratio=moment.block_size // unit,
        stochastic=key is not None,
        is_float=is_float,
        lowest=LOWEST_FLOAT[kind.signed] if is_float else 0.0,
        is_log=kind.name == log_codes.NAME,
    )


def storage(work: AdamWWork) -> tuple[Tensor, ...]:
    """param, grad, and the codes and scales of both moments."""
    return work.param.detach(), work.grad, *_storage(work.exp_avg), *_storage(work.exp_avg_sq)


def _storage(moment: Moment) -> tuple[Tensor, Tensor]:
    """Codes and scales; a 32-bit moment stands in for its scale, which is not read."""
    return (moment, moment) if isinstance(moment, Tensor) else (moment.codes, moment.scale)


def signed_words(words: tuple[int, int]) -> tuple[int, int]:
    """Words below 2^32 as int32: Triton would compile once for those below 2^31 and once for the others."""
    first, second = words
    return first - (first >> 31 << 32), second - (second >> 31 << 32)


def _words(key: tuple[int, int] | None, stream: int) -> tuple[int, int]:
    """The subkey as the kernel takes it."""
    if key is None:
        return 0, 0
    return signed_words(derive_words(key, stream))


@triton.jit
def _draws(offset, key):
    """Draws of `uniform16` in units of 2^-16, for elements at these offsets from the start of the program.

    Two elements share a word, but not always a thread: each makes it for itself.
    """
    word = (((offset >> 5) << 4) | (offset & 15)).to(tl.uint32) + key[2]
    bits = mix(mix(word ^ key[0]) + key[1] + key[3] * 0x1E3779B1)
    return ((bits >> (offset & 16).to(tl.uint32)) & 0xFFFF).to(tl.int32)


@triton.jit
def _magnitude(count, FORMAT: tl.constexpr):
    SQUARINGS: tl.constexpr = FORMAT.squarings
    value = (count + FORMAT.offset) * (1.0 / FORMAT.levels)
    for _ in tl.static_range(SQUARINGS):
        value = value * value
    return value


@triton.jit
def _decode(codes, FORMAT: tl.constexpr):
    """Values of int32 codes, in units of the scale."""
    if FORMAT.is_float:
        magnitude = codes & FORMAT.levels
        value = (0x3F800000 - ((FORMAT.levels - magnitude) << 20)).to(tl.float32, bitcast=True)
        if FORMAT.signed:
            value = tl.where(magnitude > 0, value, 0.0)
            value = tl.where(codes > FORMAT.levels, -value, value)
    else:
        count = codes.to(tl.float32)
        value = _magnitude(tl.abs(count), FORMAT)
        if FORMAT.signed:
            value = tl.where(count < 0, -value, value)
    return value


@triton.jit
def _encode(x, scale, offset, key, FORMAT: tl.constexpr):
    """int32 codes of the values `x` [units, width] in blocks with these scales [units]."""
    # Where the scale is 0 or NaN, the codes are those of 0.
    inverse = tl.where(scale > 0, tl.math.div_rn(1.0, tl.where(scale > 0, scale, 1.0)), 0.0)[:, None]
    x = tl.where(inverse > 0, x * inverse, 0.0)
    magnitude = tl.abs(x) if FORMAT.signed else tl.maximum(x, 0.0)
    if FORMAT.is_float:
        codes = _encode_float(x, magnitude, offset, key, FORMAT)
    else:
        codes = _encode_power(x, magnitude, offset, key, FORMAT)
    return codes


@triton.jit
def _goes_up(x, low, high, offset, key, FORMAT: tl.constexpr):
    """Whether `x` is rounded to `high` rather than `low`, two neighbouring values."""
    rest = x - low
    if FORMAT.stochastic:
        up = _draws(offset, key).to(tl.float32) * (1.0 / 65536) * (high - low) < rest
    else:
        up = rest > high - x
    return up


@triton.jit
def _encode_power(x, magnitude, offset, key, FORMAT: tl.constexpr):
    """The roots may be off by some ulp and flush denormals: the guess is then off by one, and corrected."""
    SQUARINGS: tl.constexpr = FORMAT.squarings
    LAST: tl.constexpr = FORMAT.levels - FORMAT.offset - 1.0
    root = magnitude
    for _ in tl.static_range(SQUARINGS):
        root = tl.sqrt(root)
    low = tl.minimum(tl.maximum(tl.floor(root * FORMAT.levels) - FORMAT.offset, 0.0), LAST)
    low = tl.where(_magnitude(low, FORMAT) > magnitude, low - 1.0, low)
    low = tl.where(_magnitude(low + 1.0, FORMAT) <= magnitude, low + 1.0, low)
    low = tl.minimum(tl.maximum(low, 0.0), LAST)
    up = _goes_up(magnitude, _magnitude(low, FORMAT), _magnitude(low + 1.0, FORMAT), offset, key, FORMAT)
    codes = tl.where(up, low + 1.0, low)
    return (tl.where(x < 0, -codes, codes) if FORMAT.signed else codes).to(tl.int32)


@triton.jit
def _encode_float(x, magnitude, offset, key, FORMAT: tl.constexpr):
    magnitude = tl.minimum(magnitude, 1.0)
    bits = tl.maximum(magnitude, FORMAT.lowest).to(tl.int32, bitcast=True)
    if FORMAT.stochastic:
        draws = _draws(offset, key)
        carry = draws << 4
        up = draws.to(tl.float32) * (1.0 / 65536) * FORMAT.lowest < magnitude
    else:
        carry = (1 << 19) - 1
        up = magnitude > FORMAT.lowest * 0.5
    codes = ((bits + carry) >> 20) - (0x3F800000 >> 20) + FORMAT.levels
    if FORMAT.signed:
        codes = tl.where(magnitude < FORMAT.lowest, up.to(tl.int32), codes)
        codes = tl.where(x.to(tl.int32, bitcast=True) < 0, codes | 128, codes)
    return codes


@triton.jit
def _log_spacing(most, least):
    """(quotient, root, gap) of `numerics.log_codes`, of blocks by their scales."""
    inverse = tl.where(most > 0, tl.math.div_rn(1.0, tl.where(most > 0, most, 1.0)), 0.0)
    quotient = tl.where(inverse > 0, least * inverse, 0.0)
    root = quotient
    for _ in tl.static_range(5):
        root = tl.math.sqrt_rn(root)
    return quotient[:, None], root[:, None], ((1.0 - root) * (1.0 / 15))[:, None]


@triton.jit
def _log_value(count, spacing):
    quotient, root, gap = spacing
    value = root + count * gap
    for _ in tl.static_range(5):
        value = value * value
    return tl.where(count <= 0, quotient, tl.where(count >= 15, 1.0, value))


@triton.jit
def _decode_log(codes, most, least, spacing):
    return tl.where(codes == 0, least[:, None], _log_value(codes.to(tl.float32), spacing) * most[:, None])


@triton.jit
def _encode_log(x, most, spacing, offset, key, FORMAT: tl.constexpr):
    """int32 codes of the values `x` [units, width], not negative, in blocks with these largest values [units]."""
    inverse = tl.where(most > 0, tl.math.div_rn(1.0, tl.where(most > 0, most, 1.0)), 0.0)[:, None]
    x = tl.where(inverse > 0, x * inverse, 0.0)
    root = x
    for _ in tl.static_range(5):
        root = tl.sqrt(root)
    # Where there is nothing to code, x is 0 and so is the code.
    guess = tl.minimum(tl.maximum(tl.floor((root - spacing[1]) * tl.math.div_rn(1.0, spacing[2])), 0.0), 14.0)
    guess = tl.where(_log_value(guess, spacing) > x, guess - 1.0, guess)
    guess = tl.where(_log_value(guess + 1.0, spacing) <= x, guess + 1.0, guess)
    guess = tl.minimum(tl.maximum(guess, 0.0), 14.0)
    up = _goes_up(x, _log_value(guess, spacing), _log_value(guess + 1.0, spacing), offset, key, FORMAT)
    return tl.where(up, guess + 1.0, guess).to(tl.int32)


@triton.jit
def _of_blocks(x, UNITS: tl.constexpr, RATIO: tl.constexpr):
    """The largest of the units of each block, for each unit."""
    if RATIO > 1:
        x = tl.max(tl.reshape(x, [UNITS // RATIO, RATIO]), axis=1)
        x = tl.reshape(tl.broadcast_to(x[:, None], [UNITS // RATIO, RATIO]), [UNITS])
    return x


@triton.jit
def _load(codes, scales, unit, at, FORMAT: tl.constexpr):
    """The two halves of a moment, [units, width] each. `at`: see the kernel."""
    low, high, packed, mask_low, mask_high, valid = at
    if FORMAT.bits == 4:
        both = tl.load(codes + packed, mask=mask_low, other=0).to(tl.int32)
        x_low, x_high = both & 15, both >> 4
        if FORMAT.signed:
            x_low, x_high = (x_low ^ 8) - 8, (x_high ^ 8) - 8
    else:
        x_low = tl.load(codes + low, mask=mask_low, other=0)
        x_high = tl.load(codes + high, mask=mask_high, other=0)
    if FORMAT.is_log:
        block = 2 * (unit // FORMAT.ratio)
        most = tl.load(scales + block, mask=valid, other=0.0)
        least = tl.load(scales + block + 1, mask=valid, other=0.0)
        spacing = _log_spacing(most, least)
        x_low = _decode_log(x_low, most, least, spacing)
        x_high = _decode_log(x_high, most, least, spacing)
    elif FORMAT.bits != 32:
        scale = tl.load(scales + unit // FORMAT.ratio, mask=valid, other=0.0)[:, None]
        x_low = _decode(x_low.to(tl.int32), FORMAT) * scale
        x_high = _decode(x_high.to(tl.int32), FORMAT) * scale
    return x_low, x_high


@triton.jit
def _absmax(x):
    """Of each row; Inf where there is a NaN, which a maximum may leave out."""
    magnitude = tl.abs(x)
    return tl.max(tl.where(magnitude < float("inf"), magnitude, float("inf")), axis=1)


@triton.jit
def _store(codes, scales, x_low, x_high, unit, at, key, UNITS: tl.constexpr, FORMAT: tl.constexpr):
    """Quantize and store the two halves of a moment; they are 0 where there is no element."""
    low, high, packed, mask_low, mask_high, valid = at
    if FORMAT.bits == 32:
        tl.store(codes + low, x_low, mask=mask_low)
        tl.store(codes + high, x_high, mask=mask_high)
    else:
        RATIO: tl.constexpr = FORMAT.ratio
        absmax = _of_blocks(tl.maximum(_absmax(x_low), _absmax(x_high)), UNITS, RATIO)
        scale = tl.where(absmax >= 1.1754943508222875e-38, absmax, 0.0)  # 2^-126, the smallest normal number
        scale = tl.where(absmax < float("inf"), scale, float("nan"))
        is_first = valid & (unit % RATIO == 0)
        if FORMAT.is_log:
            most_negative = tl.maximum(
                tl.max(tl.where(mask_low, -x_low, float("-inf")), axis=1),
                tl.max(tl.where(mask_high, -x_high, float("-inf")), axis=1),
            )
            least = -_of_blocks(most_negative, UNITS, RATIO)
            least = tl.maximum(tl.minimum(least, scale * 0.5), scale * 9.313225746154785e-10)  # 2^-30
            least = tl.where(scale > 0, least, scale)
            spacing = _log_spacing(scale, least)
            tl.store(scales + 2 * (unit // RATIO), scale, mask=is_first)
            tl.store(scales + 2 * (unit // RATIO) + 1, least, mask=is_first)
            codes_low = _encode_log(x_low, scale, spacing, low, key, FORMAT)
            codes_high = _encode_log(x_high, scale, spacing, high, key, FORMAT)
        else:
            tl.store(scales + unit // RATIO, scale, mask=is_first)
            codes_low = _encode(x_low, scale, low, key, FORMAT)
            codes_high = _encode(x_high, scale, high, key, FORMAT)
        if FORMAT.bits == 4:
            both = (codes_low & 15) | ((codes_high & 15) << 4)
            tl.store(codes + packed, both.to(tl.uint8), mask=mask_low)
        else:
            tl.store(codes + low, codes_low.to(codes.dtype.element_ty), mask=mask_low)
            tl.store(codes + high, codes_high.to(codes.dtype.element_ty), mask=mask_high)


@triton.jit
def _update(param, grad, at, mask, first, second, scalars):
    """Stores the parameter. The new moments, 0 where there is no element."""
    beta1, one_minus_beta1, beta2, one_minus_beta2, eps, decay, step_size, correction = scalars
    gradient = tl.load(grad + at, mask=mask, other=0.0).to(tl.float32)
    # Finite moments of finite gradients, as numerics.adam has it; the product is a NaN where there is an Inf or a NaN.
    limited = tl.minimum(tl.maximum(gradient, -9223372036854775808.0), 9223372036854775808.0)  # 2^63
    gradient = limited + gradient * 0.0
    first = first * beta1 + gradient * one_minus_beta1
    second = second * beta2 + (gradient * gradient) * one_minus_beta2
    denominator = tl.math.sqrt_rn(second) * correction + eps
    value = tl.load(param + at, mask=mask, other=0.0).to(tl.float32)
    value = value * decay - tl.math.div_rn(first, denominator) * step_size
    tl.store(param + at, value.to(param.dtype.element_ty), mask=mask)
    return tl.where(mask, first, 0.0), tl.where(mask, second, 0.0)


@triton.jit(
    do_not_specialize=["first_unit", "length", *(f"{name}_{i}" for name in ("first_key", "second_key") for i in (0, 1))]
)
def kernel(
    param, grad, exp_avg, exp_avg_scale, exp_avg_sq, exp_avg_sq_scale,
    beta1, one_minus_beta1, beta2, one_minus_beta2, eps, decay, step_size, correction,
    first_key_0, first_key_1, second_key_0, second_key_1,
    first_unit, length,
    FIRST: tl.constexpr, SECOND: tl.constexpr, UNIT: tl.constexpr, UNITS: tl.constexpr, IS_TAIL: tl.constexpr,
):  # fmt: skip
    """From unit `first_unit` on. `length` counts units, or, for the tail, elements."""
    start_unit = first_unit.to(tl.int64) + tl.program_id(0) * UNITS
    scalars = (beta1, one_minus_beta1, beta2, one_minus_beta2, eps, decay, step_size, correction)
    first_key = (first_key_0.to(tl.uint32, bitcast=True), first_key_1.to(tl.uint32, bitcast=True))
    second_key = (second_key_0.to(tl.uint32, bitcast=True), second_key_1.to(tl.uint32, bitcast=True))
    step_tile(
        param, grad, exp_avg, exp_avg_scale, exp_avg_sq, exp_avg_sq_scale, scalars, first_key, second_key,
        start_unit, length, FIRST, SECOND, UNIT, UNITS, IS_TAIL,
    )  # fmt: skip


@triton.jit
def step_tile(
    param, grad, exp_avg, exp_avg_scale, exp_avg_sq, exp_avg_sq_scale, scalars, first_key, second_key,
    start_unit, length,
    FIRST: tl.constexpr, SECOND: tl.constexpr, UNIT: tl.constexpr, UNITS: tl.constexpr, IS_TAIL: tl.constexpr,
):  # fmt: skip
    """The step of UNITS units from `start_unit` on, int64.

    `length`: where the whole units end, or, for the tail, how many elements there are from `start_unit` on.
    """
    WIDTH: tl.constexpr = UNIT // 2
    start = start_unit * UNIT
    param += start
    grad += start
    exp_avg += start // 2 if FIRST.bits == 4 else start
    exp_avg_sq += start // 2 if SECOND.bits == 4 else start
    if FIRST.bits != 32:
        exp_avg_scale += start_unit // FIRST.ratio
    if SECOND.bits != 32:
        exp_avg_sq_scale += start_unit // SECOND.ratio * (2 if SECOND.is_log else 1)

    # From here on, 32-bit offsets from `start`: of the two halves, of the bytes that their 4-bit codes share.
    unit = tl.arange(0, UNITS)
    column = tl.arange(0, WIDTH)[None, :]
    packed = unit[:, None] * WIDTH + column
    low = unit[:, None] * UNIT + column
    if IS_TAIL:
        numel = tl.minimum(tl.maximum(length - unit * UNIT, 0), UNIT)
        half = ((numel + 1) // 2)[:, None]
        high = low + half
        mask_low = column < half
        mask_high = column < numel[:, None] - half
        valid = numel > 0
    else:
        high = low + WIDTH
        valid = start_unit + unit < length
        mask_low = valid[:, None] & (column < WIDTH)
        mask_high = mask_low
    at = (low, high, packed, mask_low, mask_high, valid)

    first_low, first_high = _load(exp_avg, exp_avg_scale, unit, at, FIRST)
    second_low, second_high = _load(exp_avg_sq, exp_avg_sq_scale, unit, at, SECOND)
    first_low, second_low = _update(param, grad, low, mask_low, first_low, second_low, scalars)
    first_high, second_high = _update(param, grad, high, mask_high, first_high, second_high, scalars)

    # Of the word that the first two elements draw. `start` is a multiple of the tile: all draws share the high half.
    low_word, high_word = (start >> 1).to(tl.uint32), (start >> 33).to(tl.uint32)
    key = (first_key[0], first_key[1], low_word, high_word)
    _store(exp_avg, exp_avg_scale, first_low, first_high, unit, at, key, UNITS, FIRST)
    key = (second_key[0], second_key[1], low_word, high_word)
    _store(exp_avg_sq, exp_avg_sq_scale, second_low, second_high, unit, at, key, UNITS, SECOND)
