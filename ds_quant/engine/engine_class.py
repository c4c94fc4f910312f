"""The class of a live engine, extended."""

from typing import Any


def mix_in(engine: Any, mixin: type) -> None:
    """Have `engine` use the methods of `mixin` before those of its own class."""
    base = type(engine)
    engine.__class__ = type(base.__name__, (mixin, base), {"__module__": base.__module__})
