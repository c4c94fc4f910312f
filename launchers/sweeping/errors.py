"""The one exception of the sweep that a user is meant to read."""

from __future__ import annotations


class SweepError(ValueError):
    """A sweep that cannot be planned or submitted; the message says where, what was got and how to mend it."""
