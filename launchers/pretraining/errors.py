"""The one exception of the launcher that a user is meant to read."""

from __future__ import annotations


class LaunchError(Exception):
    """A mistake in what was asked for; the message says where, what was got and how to mend it."""
