"""The one exception of the benchmarks that a user is meant to read."""

from __future__ import annotations


class BenchmarkError(ValueError):
    """A benchmark that cannot run as asked."""
