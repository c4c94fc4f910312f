"""Which number formats there are, for the JSON: their definitions are in `numerics.format` and `numerics.minifloat`.

Apart from those, so that a config is checked without importing torch.
"""

from typing import NamedTuple


class NamedFormat(NamedTuple):
    """What the name of a format says of it."""

    bits: int
    """Bits of an element."""
    elements: str
    """Of floating point: its name in `numerics.minifloat`. "integer": evenly spaced, symmetric."""
    scale: str = "float"
    """How a scale is stored: "float" (fp32), "e8m0" (a power of two) or "e4m3" (with one fp32 for the tensor)."""
    block_size: int = 0
    """Consecutive elements that share a scale; 0: any granularity."""


FORMATS = {
    "fp8_e4m3": NamedFormat(8, "e4m3"),
    "fp8_e5m2": NamedFormat(8, "e5m2"),
    "fp6_e2m3": NamedFormat(6, "e2m3"),
    "fp6_e3m2": NamedFormat(6, "e3m2"),
    "fp4_e2m1": NamedFormat(4, "e2m1"),
    "mxfp8": NamedFormat(8, "e4m3", "e8m0", 32),
    "mxfp6": NamedFormat(6, "e2m3", "e8m0", 32),
    "mxfp4": NamedFormat(4, "e2m1", "e8m0", 32),
    "mxint8": NamedFormat(8, "integer", "e8m0", 32),
    "nvfp4": NamedFormat(4, "e2m1", "e4m3", 16),
    "nvint4": NamedFormat(4, "integer", "e4m3", 16),
}

SCALE_RULES = ("floor", "up")
"""How the exponent of an E8M0 scale is found; see `numerics.scales`."""
FOUR_SIX = "four_six"
"""How the scales of nvfp4 are found otherwise; see `numerics.four_six`."""
MS_EDEN = "ms_eden"
"""How gradients are rounded that a random rotation has mixed; see `numerics.eden`."""


WIRE_FORMATS = ("fp4_e2m1", "mxfp4", "nvfp4", "nvint4")
"""Those that gradients cross the wire in: of the others, integers of the same bits lose less (docs/formats.md)."""


def scale_rules(name: str) -> tuple[str, ...]:
    """Rules that a format's scales can have, the default first."""
    if FORMATS[name].scale == "e8m0":
        return SCALE_RULES
    return ("floor", FOUR_SIX) if name == "nvfp4" else ("floor",)


def scale_bits(fmt: NamedFormat) -> int:
    """How many bits one stored scale has."""
    return 32 if fmt.scale == "float" else 8
