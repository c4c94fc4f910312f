"""The picture of `diagnose memory`: one bar for each case, stacked by what holds the memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ds_quant.cli.shared.pictures import draw_stacks
from ds_quant.planning.ledger import ROLES

PARTS = (*ROLES, "in_kernels")
"""Columns of a measured row whose bytes add up to its peak."""


def draw(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Bars in megabytes. Without matplotlib a line says so."""
    varying = [name for name in ("model", "config", "stage", "ranks") if len({row[name] for row in rows}) > 1]
    names = [", ".join(_label(name, row[name]) for name in varying or ["config"]) for row in rows]
    parts = {part.replace("_", " "): [row[part] / 1e6 for row in rows] for part in PARTS}
    draw_stacks(path, "peak of a training step", "megabytes", names, parts, rest="temporaries")


def _label(name: str, value: Any) -> str:
    return {"stage": f"stage {value}", "ranks": f"{value} ranks"}.get(name, str(value))
