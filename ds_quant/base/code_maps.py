"""Which maps of an optimizer's states there are, for the JSON: their definitions are in `numerics.codes`.

Apart from those, so that a config is checked without importing torch.
"""

MAP_BITS: dict[str, tuple[int, ...]] = {"float": (8,), "power": (8, 4), "linear": (8, 4), "dynamic": (8, 4)}
"""Bits of a code that there are maps for, by the name of the map. `numerics.codes.register_map` adds to it."""


def map_bits() -> tuple[int, ...]:
    """Bits that there is a map for, from few to many."""
    return tuple(sorted({bits for allowed in MAP_BITS.values() for bits in allowed}))
