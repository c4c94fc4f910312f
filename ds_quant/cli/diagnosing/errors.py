"""The one exception of the diagnostics' commands that a user is meant to read."""

from __future__ import annotations


class DiagnoseError(ValueError):
    """A diagnostic that cannot be made as asked."""
