"""The one exception of the evaluation that a user is meant to read."""

from __future__ import annotations


class EvaluateError(ValueError):
    """An evaluation that cannot run as asked; the message says where, what was got and how to mend it."""
