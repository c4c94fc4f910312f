"""metrics.csv: one line per logged step, written during training and continued by a resumed run."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ds_quant.base.whole_folder import write_whole

COLUMNS = ("step", "tokens", "train_loss", "eval_loss", "grad_norm", "lr")
_NAMES = {"loss": "train_loss", "eval_loss": "eval_loss", "grad_norm": "grad_norm", "learning_rate": "lr"}

Row = dict[str, Any]


class MetricsCallback(TrainerCallback):
    """Writes metrics.csv on rank 0. A step's line is written when the step and its evaluation are over.

    `may_write` is called each time, because another job may have taken over the folder.
    """

    def __init__(self, path: Path, tokens_per_step: int, may_write: Callable[[], bool] = lambda: True) -> None:
        self._path = path
        self._tokens_per_step = tokens_per_step
        self._may_write = may_write
        self._row: Row | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the file with the history in the checkpoint; later lines are of steps that will be repeated."""
        if state.is_world_process_zero and self._may_write():
            rows = rows_of(state.log_history, self._tokens_per_step)
            write_whole(self._path, to_csv(rows, header=True))

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Collect what was logged for this step."""
        entry = {**(logs or {}), "step": state.global_step}
        if not state.is_world_process_zero or not _NAMES.keys() & entry.keys():
            return
        self._row = {**(self._row or {}), **_row(entry, self._tokens_per_step)}

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Write the line of the previous step, which is now complete."""
        self.flush()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Write the last line."""
        self.flush()

    def flush(self) -> None:
        """Append the pending line."""
        if self._row is not None and self._may_write():
            with self._path.open("a", newline="") as file:
                file.write(to_csv([self._row], header=False))
        self._row = None


def rows_of(log_history: Iterable[dict[str, Any]], tokens_per_step: int) -> list[Row]:
    """The lines of metrics.csv for the Trainer's own history."""
    rows: dict[int, Row] = {}
    for entry in log_history:
        if _NAMES.keys() & entry.keys():
            rows.setdefault(entry["step"], {}).update(_row(entry, tokens_per_step))
    return [rows[step] for step in sorted(rows)]


def to_csv(rows: Iterable[Row], *, header: bool) -> str:
    """Rows as CSV; a figure that was not measured at a step is empty."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, restval="", lineterminator="\n")
    if header:
        writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _row(entry: dict[str, Any], tokens_per_step: int) -> Row:
    row: Row = {"step": entry["step"], "tokens": entry["step"] * tokens_per_step}
    # repr of a float reads back as the same number, so two runs can be compared exactly.
    row.update({ours: repr(float(entry[theirs])) for theirs, ours in _NAMES.items() if theirs in entry})
    return row
