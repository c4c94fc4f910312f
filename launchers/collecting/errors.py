"""The one exception of the collector that a user is meant to read."""

from __future__ import annotations


class CollectError(ValueError):
    """Arguments that nothing can be collected with; the message says where, what was got and how to mend it."""
