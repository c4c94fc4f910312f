"""The names and bits of the maps of optimizer states, for the JSON. Their definitions are in `numerics.codes`.

They are kept here so that a config can be checked without importing torch.
"""

MAP_BITS: dict[str, tuple[int, ...]] = {
    "float": (8,),
    "power": (8, 4),
    "linear": (8, 4),
    "dynamic": (8, 4),
    "log": (4,),
}
"""Bits of a code that there are maps for, by the name of the map. `numerics.codes.register_map` adds to it."""


UNSIGNED_MAPS = ("log",)
"""Maps of second moments alone."""


def map_bits() -> tuple[int, ...]:
    """Bits that there is a map for, from few to many."""
    return tuple(sorted({bits for allowed in MAP_BITS.values() for bits in allowed}))
