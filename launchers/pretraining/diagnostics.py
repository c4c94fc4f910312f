"""Runs the JSON's diagnostics in the launcher: in a folder below the run's, under its lease."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ds_quant.cli.shared.terminal import say


def place(config: dict[str, Any], output_dir: Path) -> Path | None:
    """Make the diagnostics of a DeepSpeed JSON write below `output_dir`; changes the JSON in place.

    Returns their folder; None if there are none. An absolute path in the JSON is kept.
    """
    section = config.get("ds_quant") or {}
    diagnostics = section.get("diagnostics")
    if not diagnostics or section.get("enabled") is False:
        return None
    folder = output_dir / diagnostics.get("output_dir", "diagnostics")
    diagnostics["output_dir"] = str(folder)
    return folder


class DiagnosticsCallback(TrainerCallback):
    """Stops writing once another job has the folder, and updates the report when training ends."""

    def __init__(self, engine: Callable[[], Any], may_write: Callable[[], bool]) -> None:
        self._engine = engine
        self._may_write = may_write

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The engine exists from here on."""
        self._engine().ds_quant_diagnostics.may_write = self._may_write

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Also runs if the run ends before its last step."""
        diagnostics = self._engine().ds_quant_diagnostics
        diagnostics.finish()
        say(f"Diagnostics took {diagnostics.seconds:.1f} s of this run; they lie in {diagnostics.config.output_dir}.")
