"""The `linear` sections that the benchmarks measure, in one place."""

from __future__ import annotations

from typing import Any

BACKENDS = ("int8", "simulated")

Section = dict[str, Any]


def w8a8(backend: str) -> Section:
    """Weights and activations in 8 bits: the backward products are floating-point ones."""
    return {
        "weight": {"bits": 8, "granularity": "channel"},
        "activation": {"bits": 8, "granularity": "token"},
        "backend": backend,
    }


def w8a8g8(backend: str, *, rounding: str = "nearest") -> Section:
    """All three products in 8 bits. `rounding` is that of the gradient."""
    return {**w8a8(backend), "gradient": {"bits": 8, "granularity": "outer", "rounding": rounding}}


def w8a8g8_fp8(gradient: str, granularity: str | None = None) -> Section:
    """All three products in fp8, `gradient` e4m3 or e5m2; by default a scale each for channels, tokens and rows."""
    scales = {} if granularity is None else {"granularity": granularity}
    e4m3 = {"format": "fp8_e4m3", **scales}
    return {"weight": e4m3, "activation": e4m3, "gradient": {"format": f"fp8_{gradient}", **scales}, "backend": "fp8"}


def named_format(name: str, *, rounding: str = "nearest") -> Section:
    """All operands of all three products in one of the formats with blocks. `rounding` is that of the gradient."""
    gradient = {"format": name, "rounding": rounding, "used_for": ["weight", "input"]}
    return {"weight": {"format": name}, "activation": {"format": name}, "gradient": gradient, "backend": "simulated"}
