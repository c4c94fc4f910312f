"""Code maps of Adam's moments: which values 8 or 4 bits stand for, in units of a block's scale.

A map is a set of values in [-1, 1] (signed, for exp_avg) or [0, 1] (unsigned, for exp_avg_sq):

    float           8 bits: those of an fp32 number cut down to exponent and three bits of mantissa, eight values to
                    each factor of two, so that a code is a shift away from its value. With ONE = 0x3F800000, the
                    bits of 1.0:
                    unsigned    code c, 0 to 255, is the number with the bits ONE - (255 - c) * 2^20, from 1.125 * 2^-32
                    signed      bit 7 is the sign; the lower seven bits c stand for 0 where c is 0, else for the bits
                                ONE - (127 - c) * 2^20, from 1.25 * 2^-16
    power, linear   value(c) = sign(c) * ((|c| + offset) / levels)^exponent          value(0) = 0 where signed
                                  codes         levels  offset  exponent of power    (of linear: 1)
                    signed, 8     -127 to 127   127     0       4
                    unsigned, 8   0 to 255      255     0       8
                    signed, 4     -7 to 7       7       0       2
                    unsigned, 4   0 to 15       18      3       8                    (linear: levels 16, offset 1)
    log             unsigned, 4 bits: sixteen values between the smallest and the largest of a block, which has two
                    scales (`log_codes`). `decode` and `encode` here have those of the widest block.
    dynamic         code c is value number c, from 0, of bitsandbytes' dynamic map (arXiv 1511.04561, 2110.02861):
                    decades that end at 10^-6 to 10^0 (4 bits: 10^-2 to 10^0), each cut into equal parts, twice as
                    many as the decade below, of which the middles are taken; and 0 and 1. Unsigned 4-bit codes leave
                    0 out (as in arXiv 2309.01507) and are 0 to 14; code 15 is another 1.

Unsigned float and 4-bit maps have no zero: a second moment that falls to zero beside a first moment that does not makes
an update of m / eps. Exponents, offsets and mantissas are measured on trajectories (docs/moments.md).

All arithmetic is fp32, each operation rounded to nearest, which fixes every bit:

    value(c):  power, linear: t = (|c| + offset) * fl(1 / levels), squared log2(exponent) times; the top is exactly 1
    encode(x): with |x| for x, at most 1, and the sign put back at the end, in signed float, power and linear maps:
               low is the last code with value(low) <= x, but at least the lowest and at most the last but one;
               high = low + 1; gap = value(high) - value(low); rest = x - value(low)
        nearest     high where rest > value(high) - x, else low: ties go to low
        stochastic  high where u * gap < rest, else low, with u from [0, 1): unbiased in *value*, and a value that a
                    code stands for never moves

Float codes are rounded by integer sums on the bits of x above the lowest value: half a code's bits less one, or u times
a code's bits, are added, and what is below the code is cut off. Rounded stochastically they go up where
u >= 1 - rest / gap. Between 0 and the lowest value of the signed map the rules above hold.

Roots only guess low; comparisons with value() correct them. A kernel may use approximate roots and get the same codes.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ds_quant.base.code_maps import MAP_BITS
from ds_quant.numerics import log_codes
from ds_quant.numerics.integer import goes_up

MAPS = ("float", "power", "linear", "dynamic")
"""The maps that this module defines: one scale to a block."""
BITS = (8, 4)

CLOSED_FORMS = {
    ("power", 8, True): (127, 0, 4),
    ("power", 8, False): (255, 0, 8),
    ("power", 4, True): (7, 0, 2),
    ("power", 4, False): (18, 3, 8),
    ("linear", 8, True): (127, 0, 1),
    ("linear", 8, False): (255, 0, 1),
    ("linear", 4, True): (7, 0, 1),
    ("linear", 4, False): (16, 1, 1),
}
"""(levels, offset, exponent) of (map, bits, signed)."""


def _dynamic_values(bits: int, signed: bool) -> tuple[float, ...]:
    """Values of the dynamic map in increasing order; fp32 rounds them once."""
    decades = 7 if bits == 8 else 3
    values = [1.0] if bits == 4 and not signed else [0.0, 1.0]
    for decade in range(decades):
        parts = 2**decade if signed else 2 ** (decade + 1)
        for part in range(parts):
            middle = 10.0 ** (decade - decades + 1) * (0.1 + 0.9 * (part + 0.5) / parts)
            values += [-middle, middle] if signed else [middle]
    return tuple(sorted(values))


DYNAMIC_VALUES = {(bits, signed): _dynamic_values(bits, signed) for bits in BITS for signed in (True, False)}
"""Values of the dynamic maps by (bits, signed). Not a cached function: those make torch.compile warn."""


FLOAT_MANTISSA = 3
"""Bits of mantissa in a float code."""

FLOAT_SHIFT = 23 - FLOAT_MANTISSA

ONE = 0x3F800000
"""The bits of 1.0."""

LOWEST_FLOAT = {True: 1.25 * 2.0**-16, False: 1.125 * 2.0**-32}
"""The lowest value above zero, by signed."""


class CodeMap(NamedTuple):
    """A map, as `code_map` makes it; other exponents (1, 2, 4, 8) and offsets serve experiments."""

    name: str
    bits: int
    signed: bool
    levels: int = 0
    """Divisor of power and linear codes; the largest magnitude of float codes; 0 for dynamic."""
    offset: int = 0
    exponent: int = 1

    @property
    def dtype(self) -> torch.dtype:
        """Of the codes before packing: int8 for signed power and linear maps, else uint8."""
        return KINDS[self.name].dtype(self)

    @property
    def stored_dtype(self) -> torch.dtype:
        """Of the codes in memory: those of fewer than 8 bits are packed into uint8."""
        return self.dtype if self.bits == 8 else torch.uint8

    @property
    def scales(self) -> int:
        """fp32 scales to a block."""
        return KINDS[self.name].scales

    @property
    def lowest(self) -> int:
        return -self.levels if self.dtype == torch.int8 else 0

    @property
    def highest(self) -> int:
        return KINDS[self.name].highest(self)


class MapKind(NamedTuple):
    """What the maps of one name have in common. `docs/extending.md` adds one."""

    bits: tuple[int, ...]
    """Bits of a code that there are maps for, from 2 to 8."""
    make: Callable[[int, bool], CodeMap]
    """The map with these bits, signed or not."""
    highest: Callable[[CodeMap], int]
    """The highest code; the lowest is -levels where codes are int8, else 0."""
    decode: Callable[[Tensor, CodeMap], Tensor]
    """fp32 values of integer codes, in units of the scale."""
    encode: Callable[[Tensor, CodeMap, Tensor | None], Tensor]
    """Codes of fp32 values; to nearest without draws. What was decoded must get its code back, whatever the draws."""
    dtype: Callable[[CodeMap], torch.dtype] = lambda code_map: torch.uint8
    """Of the codes before packing: int8 where they are negative, else uint8."""
    scales: int = 1
    """To a block. `blockwise` codes blocks with two as `log_codes` has it."""


def register_map(name: str, kind: MapKind) -> None:
    """Have a kind of map under a name, in JSONs too. Raises ValueError for a name that is taken, and two scales."""
    if name in KINDS:
        raise ValueError(f"register_map(name): got {name!r}; allowed: a name other than {', '.join(KINDS)}; choose one")
    if kind.scales != 1:
        raise ValueError(
            f"register_map(kind): got {kind.scales} scales to a block; allowed: 1 (only {log_codes.NAME} has two); "
            "leave them out"
        )
    KINDS[name], MAP_BITS[name] = kind, kind.bits


def code_map(name: str, bits: int, *, signed: bool) -> CodeMap:
    """The map of this name with its measured exponent and offset. Raises ValueError for arguments out of range."""
    if name not in KINDS:
        raise ValueError(f"code_map(name): got {name!r}; allowed: {', '.join(KINDS)}; set one of them")
    allowed = KINDS[name].bits
    if isinstance(bits, bool) or bits not in allowed:
        raise ValueError(
            f"code_map(bits): got {bits!r} with map {name}; allowed: {', '.join(map(str, allowed))}; set one of them"
        )
    return KINDS[name].make(bits, signed)


def code_values(code_map: CodeMap, device: torch.device | str | None = None) -> Tensor:
    """fp32 values of all codes, from the lowest code to the highest; increasing but for signed float codes."""
    return decode(torch.arange(code_map.lowest, code_map.highest + 1, device=device), code_map)


def decode(codes: Tensor, code_map: CodeMap) -> Tensor:
    """fp32 values of integer codes (any integer dtype and shape), in units of the scale."""
    return KINDS[code_map.name].decode(codes, code_map)


def encode(x: Tensor, code_map: CodeMap, draws: Tensor | None = None) -> Tensor:
    """Codes of fp32 values in units of the scale, to nearest or, with `draws` from [0, 1), stochastically.

    Float codes take draws that are multiples of 2^-16 (`uniform16`); lower bits of others are dropped.

    What lies outside the map is brought to its end. NaN is not allowed.
    """
    return KINDS[code_map.name].encode(x, code_map, draws)


def _decode_float(codes: Tensor, code_map: CodeMap) -> Tensor:
    codes = codes.to(torch.int32)
    magnitude = codes & code_map.levels
    value = (ONE - ((code_map.levels - magnitude) << FLOAT_SHIFT)).view(torch.float32)
    if code_map.signed:
        value = torch.where(magnitude > 0, value, 0.0)
        value = torch.where(codes > code_map.levels, -value, value)
    return value


def _encode_float(x: Tensor, code_map: CodeMap, draws: Tensor | None) -> Tensor:
    lowest = LOWEST_FLOAT[code_map.signed]
    magnitude = (x.abs() if code_map.signed else x).clamp(0.0, 1.0)
    if draws is None:
        carry: Tensor | int = (1 << (FLOAT_SHIFT - 1)) - 1
    else:
        carry = (draws * 65536).to(torch.int32) << (FLOAT_SHIFT - 16)
    bits = magnitude.clamp(min=lowest).view(torch.int32)
    codes = ((bits + carry) >> FLOAT_SHIFT) - (ONE >> FLOAT_SHIFT) + code_map.levels
    if code_map.signed:
        goes_up = magnitude > lowest * 0.5 if draws is None else draws * lowest < magnitude
        codes = torch.where(magnitude < lowest, goes_up.to(torch.int32), codes)
        codes = codes | (torch.signbit(x).to(torch.int32) << 7)
    return codes.to(torch.uint8)


def _decode_power(codes: Tensor, code_map: CodeMap) -> Tensor:
    count = codes.to(torch.float32)
    return _signed_like(count, _magnitude(count.abs(), code_map)) if code_map.signed else _magnitude(count, code_map)


def _encode_power(x: Tensor, code_map: CodeMap, draws: Tensor | None) -> Tensor:
    magnitude = x.abs() if code_map.signed else x.clamp(min=0.0)
    low = _power_code_below(magnitude, code_map)
    codes = low + goes_up(magnitude, _magnitude(low, code_map), _magnitude(low + 1, code_map), draws)
    return (_signed_like(x, codes) if code_map.signed else codes).to(code_map.dtype)


def _magnitude(count: Tensor, code_map: CodeMap) -> Tensor:
    """((count + offset) / levels)^exponent of fp32 counts."""
    value = (count + code_map.offset) * (1.0 / code_map.levels)
    for _ in range(code_map.exponent.bit_length() - 1):
        # Not value * value: Inductor evaluates both operands, which is exponential in the exponent.
        value = value.square()
    return value


def _signed_like(x: Tensor, magnitude: Tensor) -> Tensor:
    """`magnitude` with the sign of `x`, which is +0 where `x` is a zero: `magnitude` is a zero too."""
    return torch.where(x < 0, -magnitude, magnitude)


def _power_code_below(magnitude: Tensor, code_map: CodeMap) -> Tensor:
    root = magnitude
    for _ in range(code_map.exponent.bit_length() - 1):
        root = root.sqrt()
    highest = float(code_map.levels - code_map.offset - 1)
    guess = (torch.floor(root * code_map.levels) - code_map.offset).clamp(0.0, highest)
    guess = guess - (_magnitude(guess, code_map) > magnitude).float()
    guess = guess + (_magnitude(guess + 1, code_map) <= magnitude).float()
    return guess.clamp(0.0, highest)


def _decode_dynamic(codes: Tensor, code_map: CodeMap) -> Tensor:
    values = DYNAMIC_VALUES[code_map.bits, code_map.signed]
    values += values[-1:] * (2**code_map.bits - len(values))
    return torch.tensor(values, dtype=torch.float32, device=codes.device)[codes.to(torch.int64)]


def _encode_dynamic(x: Tensor, code_map: CodeMap, draws: Tensor | None) -> Tensor:
    values = DYNAMIC_VALUES[code_map.bits, code_map.signed]
    return encode_by_table(x, torch.tensor(values, dtype=torch.float32, device=x.device), draws).to(code_map.dtype)


def encode_by_table(x: Tensor, table: Tensor, draws: Tensor | None) -> Tensor:
    """Indices, int64, into a table of increasing fp32 values, two or more, by the rules of the module docstring."""
    low = (torch.searchsorted(table, x.contiguous(), right=True) - 1).clamp(0, len(table) - 2)
    return low + goes_up(x, table[low], table[low + 1], draws)


def _make_log(bits: int, signed: bool) -> CodeMap:
    if signed:
        raise ValueError('code_map(signed): got True with map log; allowed: False; take "power" for signed states')
    return CodeMap(log_codes.NAME, bits, False)


def _widest(device: torch.device) -> log_codes.Spacing:
    high = torch.ones((), device=device)
    return log_codes.spacing(high, high * log_codes.LEAST)


def _decode_log(codes: Tensor, code_map: CodeMap) -> Tensor:
    return _widest(codes.device).value(codes.to(torch.float32))


def _encode_log(x: Tensor, code_map: CodeMap, draws: Tensor | None) -> Tensor:
    return log_codes.encode(x, _widest(x.device), draws)


def _closed_form(name: str) -> MapKind:
    return MapKind(
        bits=MAP_BITS[name],
        make=lambda bits, signed: CodeMap(name, bits, signed, *CLOSED_FORMS[name, bits, signed]),
        highest=lambda code_map: code_map.levels - code_map.offset,
        decode=_decode_power,
        encode=_encode_power,
        dtype=lambda code_map: torch.int8 if code_map.signed else torch.uint8,
    )


KINDS = {
    "float": MapKind(
        bits=MAP_BITS["float"],
        make=lambda bits, signed: CodeMap("float", bits, signed, 2 ** (bits - signed) - 1),
        highest=lambda code_map: 255,
        decode=_decode_float,
        encode=_encode_float,
    ),
    "power": _closed_form("power"),
    "linear": _closed_form("linear"),
    "dynamic": MapKind(
        bits=MAP_BITS["dynamic"],
        make=lambda bits, signed: CodeMap("dynamic", bits, signed),
        highest=lambda code_map: len(DYNAMIC_VALUES[code_map.bits, code_map.signed]) - 1,
        decode=_decode_dynamic,
        encode=_encode_dynamic,
    ),
    log_codes.NAME: MapKind(
        bits=MAP_BITS[log_codes.NAME],
        make=_make_log,
        highest=lambda code_map: log_codes.HIGHEST,
        decode=_decode_log,
        encode=_encode_log,
        scales=log_codes.SCALES,
    ),
}
"""By name. `register_map` adds others."""
