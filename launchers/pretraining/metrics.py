"""metrics.csv: one line per logged step, written while training goes on and continued by a resumed run."""

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
    """Writes metrics.csv on rank 0. A step's line is written when the step is over, its evaluation included.

    `may_write` is asked each time: another job may have taken the folder over.
    """

    def __init__(self, path: Path, tokens_per_step: int, may_write: Callable[[], bool] = lambda: True) -> None:
        self._path = path
        self._tokens_per_step = tokens_per_step
        self._may_write = may_write
        self._row: Row | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the file with what the checkpoint remembers: lines after it are of steps that will be taken again."""
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
        """Take up what was logged for this step."""
        entry = {**(logs or {}), "step": state.global_step}
        if not state.is_world_process_zero or not _NAMES.keys() & entry.keys():
            return
        self._row = {**(self._row or {}), **_row(entry, self._tokens_per_step)}

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Write the line of the step before, which is complete now."""
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
    """The lines of metrics.csv that the Trainer's own history amounts to."""
    rows: dict[int, Row] = {}
    for entry in log_history:
        if _NAMES.keys() & entry.keys():
            rows.setdefault(entry["step"], {}).update(_row(entry, tokens_per_step))
    return [rows[step] for step in sorted(rows)]


def to_csv(rows: Iterable[Row], *, header: bool) -> str:
    """Rows as CSV; a figure that was not taken at that step is empty."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, restval="", lineterminator="\n")
    if header:
        writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _row(entry: dict[str, Any], tokens_per_step: int) -> Row:
    row: Row = {"step": entry["step"], "tokens": entry["step"] * tokens_per_step}
    # repr of a float reads back as the same number, which is what lets two runs be compared exactly.
    row.update({ours: repr(float(entry[theirs])) for theirs, ours in _NAMES.items() if theirs in entry})
    return row
