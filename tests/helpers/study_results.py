"""Results of the study as its tests make them up."""

from __future__ import annotations

import dataclasses
from typing import Any

from studying import memory, plan, rows
from studying.memory import Measured
from studying.plan import Key
from studying.results import Result

ROWS = rows.all_rows()


def a_result(row: str, seed: int, loss: float, **changes: Any) -> Result:
    result = Result(
        key=Key("0.7m", "llama", 1.0, changes.pop("rate", 0.002), row, seed),
        fingerprint=plan.fingerprint(ROWS[row]),
        text="a text",
        parameters=664192,
        steps=162,
        tokens=663552,
        state="done",
        loss=loss,
        lowest=loss,
        other_loss=loss + 0.1,
        dtype="float32",
        processor="a processor",
        torch="2.13.0",
        deepspeed="0.19.8",
        commit="abc",
        date="2026-11-29",
    )
    return dataclasses.replace(result, **changes)


def tuning(**changes: Any) -> list[Result]:
    """Baselines of four learning rates: 0.004 is the best."""
    losses = {0.001: 5.3, 0.002: 5.2, 0.004: 5.1, 0.008: 5.4}
    return [a_result("baseline", 0, loss, rate=rate, **changes) for rate, loss in losses.items()]


def a_peak(case: str, ranks: int, **changes: int) -> Measured:
    parts = dict.fromkeys(("parameters", "tokens", "peak", *memory.ROLES, "sent"), 10000000)
    told = dict.fromkeys(("processor", "torch", "deepspeed", "commit", "date"), "x")
    values: dict[str, Any] = {**parts, **told, **changes}
    return Measured(size="5m", family="llama", case=case, ranks=ranks, **values)
