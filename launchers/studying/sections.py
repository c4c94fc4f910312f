"""Sections of the JSON, as the rows of the study share them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

Values = dict[str, Any]


@dataclass(frozen=True)
class Repair:
    """One attempt at a row that fails, at the same number of bits."""

    component: str
    of: str
    """The row that it repairs; empty for a combination that the paper did not run."""
    what: str
    section: Values
    families: tuple[str, ...] = ()
    """Those whose models have what it acts on; empty: all."""
    ranks: int = 1
    """As of a `rows.Row`."""


LAST_BLOCK = "@LAST@"
"""The number of a model's last block, where `filled_in` puts it."""
_FOUR_FIFTHS = "@FOUR_FIFTHS@"
BOTH = ("weight", "input")
"""The products of the backward pass."""
FOUR_SIX: Values = {"format": "nvfp4", "scale_rule": "four_six"}
MXFP4: Values = {"format": "mxfp4", "scale_rule": "up"}
LOG: Values = {"bits": 4, "map": "log"}
"""Of second moments."""


def filled_in(config: str, *, layers: int, steps: int) -> str:
    """A row's JSON with what depends on the run: the number of the last block, and of the step after four fifths."""
    return config.replace(LAST_BLOCK, str(layers - 1)).replace(f'"{_FOUR_FIFTHS}"', str(steps * 4 // 5))


def linear(*, backward: str = "original", exclude: list[str] | None = None, **operands: Values) -> Values:
    """As the paper's rows, all layers and original operands in the backward pass, unless it says otherwise."""
    more: Values = {"backend": "simulated", "backward_operands": backward, "exclude": exclude or []}
    return {"linear": {**operands, **more}}


def gradient(bits: int, granularity: str, *used_for: str, rounding: str = "stochastic") -> Values:
    """Values of `gradient`; used_for: "weight" for dW, "input" for dX."""
    return {"bits": bits, "granularity": granularity, "rounding": rounding, "used_for": list(used_for)}


def block(bits: int, size: int, **more: Any) -> Values:
    """Values of an operand in blocks of `size`."""
    return {"bits": bits, "granularity": "block", "block_size": size, **more}


def rotated(section: Values, size: int, *used_for: str, **more: Any) -> Values:
    """The section with these products rotated by Hadamard matrices of `size`; without names, all of them."""
    rotation: Values = {"block_size": size, **({"used_for": list(used_for)} if used_for else {}), **more}
    return {"linear": {**section["linear"], "rotation": rotation}}


def full_at_end(of: Values) -> Values:
    """The section with the forward pass in full precision in the last fifth of the steps."""
    return {"linear": {**of["linear"], "forward_full_precision_from": _FOUR_FIFTHS}}
