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


def a_peak(case: str, ranks: int, **changes: int) -> Measured:
    parts = dict.fromkeys(("parameters", "tokens", "peak", *memory.ROLES, "sent"), 10000000)
    told = dict.fromkeys(("processor", "torch", "deepspeed", "commit", "date"), "x")
    values: dict[str, Any] = {**parts, **told, **changes}
    return Measured(size="5m", family="llama", case=case, ranks=ranks, **values)
