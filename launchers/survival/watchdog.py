"""Ends a process that makes no progress. DeepSpeed's own groups wait half an hour, whatever time-out was set."""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from survival.errors import end_process

_SPARE_SECONDS = 5.0
"""The time-outs of collectives come first, because their messages say what was waited for."""


class Watchdog(TrainerCallback):
    """Checks from a thread that steps, evaluations and checkpoints make progress.

    Args:
        timeout_seconds: how long each step, evaluated batch or save may take.
        give_up: called in the thread before the process ends; the process ends in any case.
    """

    def __init__(self, timeout_seconds: float, give_up: Callable[[float], None]) -> None:
        self._timeout = timeout_seconds
        self._give_up = give_up
        self._last = time.monotonic()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start watching."""
        self._beat()
        self._thread.start()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Stop watching."""
        self._ended.set()

    def on_substep_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Record that the run has made progress."""
        self._beat()

    on_step_end = on_prediction_step = on_evaluate = on_save = on_substep_end

    def _beat(self) -> None:
        self._last = time.monotonic()

    def _watch(self) -> None:
        pause = min(1.0, self._timeout / 4)
        while not self._ended.wait(pause):
            idle = time.monotonic() - self._last
            if idle > self._timeout + _SPARE_SECONDS:
                end_process(functools.partial(self._give_up, idle))
