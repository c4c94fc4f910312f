"""The JSON's diagnostics in a run of the launcher: their folder lies in the run's, and goes with its lease."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ds_quant.cli.shared.terminal import say


def place(config: dict[str, Any], output_dir: Path) -> Path | None:
    """Have diagnostics of a DeepSpeed JSON, changed in place, write below `output_dir`; where, None without any.

    A path that is absolute in the JSON stays.
    """
    section = config.get("ds_quant") or {}
    diagnostics = section.get("diagnostics")
    if not diagnostics or section.get("enabled") is False:
        return None
    folder = output_dir / diagnostics.get("output_dir", "diagnostics")
    diagnostics["output_dir"] = str(folder)
    return folder


class DiagnosticsCallback(TrainerCallback):
    """Nothing is written once another job has the folder; the report is brought up to date where training ends."""

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
        """Also where the run ends before its last step."""
        diagnostics = self._engine().ds_quant_diagnostics
        diagnostics.finish()
        say(f"Diagnostics took {diagnostics.seconds:.1f} s of this run; they lie in {diagnostics.config.output_dir}.")
