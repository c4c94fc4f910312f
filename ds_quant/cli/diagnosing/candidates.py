"""The formats that `diagnose formats` compares: those that linear layers take, or those that messages might.

Products: integers of 8 and 4 bits and the formats whose groups are free take a scale a row, and one for every 32 (8 and
6 bits) or 16 (4 bits) elements. Wire: formats of 8 and 4 bits whose groups are free take blocks as messages have them,
up to the bits that formats with blocks of their own take; some are rotated, as `communication.gradient.rotation` does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

from torch import Tensor

from ds_quant.base.number_formats import FORMATS, FOUR_SIX, SCALE_RULES
from ds_quant.numerics.format import Format, Group, Integers, named_format
from ds_quant.numerics.minifloat import Minifloat


class Candidate(NamedTuple):
    """One way to write numbers."""

    name: str
    group: str
    """What shares a scale, in words, and how else it differs."""
    format: Format[Integers | Minifloat]
    rotation: int = 0
    """Consecutive elements that a Hadamard matrix mixes first; 0: none."""

    def scale_bits(self, x: Tensor) -> float:
        """Bits of all scales of a matrix together."""
        (rows, features), fmt = x.shape, self.format
        count = rows * -(-features // fmt.group.block_size) if fmt.group.granularity == "block" else rows
        if fmt.scale.kind == "float":
            return 32.0 * count
        return 8.0 * count / fmt.group.block_rows + (32 if fmt.scale.kind == "e4m3" else 0)


def of_products() -> Iterator[Candidate]:
    """For operands of linear layers."""
    for bits in (8, 4):
        size = 32 if bits == 8 else 16
        yield Candidate(f"int{bits}", "row", Format(Integers(bits), Group("row")))
        yield Candidate(f"int{bits}", f"block of {size}", Format(Integers(bits), Group("block", size)))
    for name, named in FORMATS.items():
        if named.block_size:
            yield from _blocks(name, tiles=True)
        else:
            size = 16 if named.bits == 4 else 32
            yield Candidate(name, "row", named_format(name, "row"))
            yield Candidate(name, f"block of {size}", named_format(name, "block", size))


def on_wire() -> Iterator[Candidate]:
    """For gradients in messages."""
    for bits, sizes in ((8, (256, 128)), (4, (128, 64, 32))):
        for size in sizes:
            yield Candidate(f"int{bits}", f"block of {size}", Format(Integers(bits), Group("block", size)))
        for name, named in FORMATS.items():
            if named.bits == bits and not named.block_size:
                for size in sizes[:2]:
                    yield Candidate(name, f"block of {size}", named_format(name, "block", size))
            elif named.bits == bits:
                yield from _blocks(name, tiles=False)
    for size in (128, 64):
        yield Candidate("int4", f"block of {size}, rotated", Format(Integers(4), Group("block", size)), size)
        yield Candidate("fp4_e2m1", f"block of {size}, rotated", named_format("fp4_e2m1", "block", size), size)
    yield Candidate("mxfp4", "block of 32 (floor), rotated", named_format("mxfp4"), 32)
    for name in ("nvfp4", "nvint4"):
        yield Candidate(name, "block of 16, rotated", named_format(name), 16)


USES: dict[str, Callable[[], Iterator[Candidate]]] = {"products": of_products, "wire": on_wire}
"""By what `--used_for` calls them."""


def _blocks(name: str, *, tiles: bool) -> Iterator[Candidate]:
    """A format with blocks of its own, in each of its ways."""
    size = FORMATS[name].block_size
    if FORMATS[name].scale == "e8m0":
        for rule in SCALE_RULES:
            yield Candidate(name, f"block of {size} ({rule})", named_format(name, scale_rule=rule))
        return
    for rule, words in (("floor", ""), (FOUR_SIX, " (4/6)")):
        if rule == FOUR_SIX and name != "nvfp4":
            continue
        yield Candidate(name, f"block of {size}{words}", named_format(name, scale_rule=rule))
        if tiles:
            yield Candidate(name, f"tile of 16 x 16{words}", named_format(name, block_rows=16, scale_rule=rule))
