"""The norm of each step's gradient before clipping, as the engine knows it anyway, between two looks."""

from collections import deque
from dataclasses import replace
from typing import Any

from ds_quant.diagnostics.gradient_norms import WINDOW, norm_history
from ds_quant.diagnostics.measurement import Measurement


class StepNorms:
    """Norms of the steps since the last look, and of those before that spikes are told by.

    state: as `state` gave it.
    """

    def __init__(self, state: dict[str, list[tuple[int, float]]] | None = None):
        state = state or {"before": [], "since": []}
        self._before: deque[tuple[int, float]] = deque(state["before"], maxlen=WINDOW)
        self._since: list[tuple[int, Any]] = list(state["since"])

    def add(self, step: int, norm: Any) -> None:
        """The norm of a step, a number or a tensor of one; None, where DeepSpeed computes none, is passed over."""
        if norm is not None:
            self._since.append((step, norm))  # read when there is a look: an accelerator would have to be waited for

    def state(self) -> dict[str, list[tuple[int, float]]]:
        """The norms as a checkpoint stores them: (step, norm) before and since the last look."""
        return {"before": list(self._before), "since": [(step, float(norm)) for step, norm in self._since]}

    def take(self) -> Measurement | None:
        """Of the steps since the last look; None where there are no norms."""
        if not self._since:
            return None
        since = [(step, float(norm)) for step, norm in self._since]
        steps, norms = zip(*self._before, *since, strict=True)
        found = norm_history(steps, norms)
        self._before.extend(since)
        self._since.clear()
        rows = found.rows[-len(since) :]
        spikes = [row["step"] for row in rows if row["spike"]]
        scalars = {"largest_norm": max(norm for _, norm in since), "spikes": float(len(spikes))}
        return replace(found, rows=rows, scalars=scalars, settings={**found.settings, "spikes_at": spikes})
