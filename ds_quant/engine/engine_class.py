"""Classes of live objects of DeepSpeed's, extended."""

from typing import Any

MixedIn: Any = object
"""Base of classes for `mix_in`. At run time the class of the object comes next: they use all that it has, and call its
methods by super(), of which type checkers know nothing."""


def mix_in(engine: Any, mixin: type) -> None:
    """Have `engine` use the methods of `mixin` before those of its own class."""
    base = type(engine)
    engine.__class__ = type(base.__name__, (mixin, base), {"__module__": base.__module__})
