"""At every step boundary all ranks agree on whether to continue; if not, they end the run together."""

from __future__ import annotations

import statistics
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from survival import status
from survival.control import Control, Event
from survival.errors import Diverged, Fenced, RunEnded, Stopped
from survival.lease import Lease
from survival.signals import StopRequest

MOST_SKIPPED = 50
"""A run ends after this many steps in a row with gradients of NaN or Inf, which DeepSpeed would skip forever. The
search for a loss scale in fp16 takes at most about twenty."""
RISE_PATIENCE = 5
"""A run counts as diverged after this many logged losses in a row that are too high."""


class Guard(TrainerCallback):
    """Stops on a signal, on a loss that is NaN or has risen for good, and when another job owns the folder.

    Add it after the Trainer's own callbacks, which decide whether a step logs, evaluates or saves.
    """

    def __init__(self, control: Control, lease: Lease, request: StopRequest, max_loss_rise: float | None) -> None:
        self._control = control
        self._lease = lease
        self._request = request
        self._max_loss_rise = max_loss_rise
        self._finite: torch.Tensor | None = None
        self._engine: Any = None
        self._skipped = 0
        self.outcome: RunEnded | None = None
        """Why the run ends before its last step; None as long as it continues."""

    def observe(self, loss: torch.Tensor, engine: Any) -> None:
        """Record a micro-step's loss on its device, without waiting for it."""
        self._engine = engine
        finite = torch.isfinite(loss.detach()).all()
        self._finite = finite if self._finite is None else self._finite & finite

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """From here on a signal can stop the run at the next step."""
        self._control.step = state.global_step
        self._request.training = True
        self._tell(state)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """From here on there is no next step at which a signal could stop the run."""
        self._request.training = self.outcome is not None

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Agree with the other ranks on how to continue."""
        self._control.step = state.global_step
        events = self._noticed(state, control)
        agreed = self._control.agree(events)
        if agreed & Event.STOP and not _looks(control):
            # This step was not due to be saved. A checkpoint for a signal must be as sound as any other.
            agreed |= self._control.agree(self._ruined(state))
        last = state.global_step >= state.max_steps
        if agreed & Event.FENCED:
            self._end(control, Fenced(f"step {state.global_step}: {self._fenced_reason()}"))
            control.should_log = control.should_save = control.should_evaluate = False
        elif agreed & Event.NOT_FINITE:
            self._end(control, Diverged(f"step {state.global_step}: {self._not_finite_reason()}"))
            # The model is ruined, and saving it would displace an earlier, sound checkpoint.
            control.should_log, control.should_save, control.should_evaluate = True, False, False
        elif agreed & Event.RISEN:
            self._end(control, Diverged(f"step {state.global_step}: {self._rise(state)}"))
            control.should_save = control.should_evaluate = False
        elif agreed & Event.STOP and not last:
            asked = f" by {self._request.signal.name}" if self._request.signal is not None else ""
            self._end(control, Stopped(f"asked to stop{asked}; checkpoint-{state.global_step} is whole"))
            control.should_save = True
        if control.should_log or control.should_save:
            self._tell(state)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """A run that ends within an epoch has already logged, saved and evaluated what it should."""
        if self.outcome is not None:
            control.should_log = control.should_save = control.should_evaluate = False

    def _noticed(self, state: TrainerState, control: TrainerControl) -> Event:
        events = Event.NONE
        self._count_skipped()
        if self._request.signal is not None:
            events |= Event.STOP
        if _looks(control):
            events |= self._ruined(state)
        if self._control.rank == 0 and (events or _looks(control)) and self._lease.lost():
            events |= Event.FENCED
        return events

    def _ruined(self, state: TrainerState) -> Event:
        events = Event.NONE
        if not self._all_finite() or self._skipped >= MOST_SKIPPED:
            events |= Event.NOT_FINITE
        if self._rise(state) is not None:
            events |= Event.RISEN
        return events

    def _all_finite(self) -> bool:
        """Whether every loss since the last call was finite."""
        finite = self._finite is None or bool(self._finite)
        self._finite = None
        return finite

    def _count_skipped(self) -> None:
        if self._engine.was_step_applied():
            self._skipped = 0
            return
        self._skipped += 1
        if self._engine.fp16_enabled():
            self._finite = None  # with loss scaling, fp16 overflows now and then; skipping that step is normal

    def _not_finite_reason(self) -> str:
        if self._skipped >= MOST_SKIPPED:
            return f"the gradients were NaN or Inf for {self._skipped} steps in a row, and none of these was taken"
        return "the training loss was NaN or Inf since the last log"

    def _rise(self, state: TrainerState) -> str | None:
        """A message on how far the logged losses have risen; None if they have not, or if this is not checked."""
        if self._max_loss_rise is None:
            return None
        losses = [float(entry["loss"]) for entry in state.log_history if "loss" in entry]
        recent, before = losses[-RISE_PATIENCE:], losses[:-RISE_PATIENCE]
        if len(before) < RISE_PATIENCE:
            return None
        best = min(statistics.median(before[i : i + RISE_PATIENCE]) for i in range(len(before) - RISE_PATIENCE + 1))
        if min(recent) <= best + self._max_loss_rise:
            return None
        return (
            f"the last {RISE_PATIENCE} training losses logged lie at {min(recent):.3f} or above, more than "
            f"{self._max_loss_rise} above {best:.3f}, which it had reached (--max_loss_rise)"
        )

    def _end(self, control: TrainerControl, outcome: RunEnded) -> None:
        self.outcome = outcome
        control.should_training_stop = True

    def _fenced_reason(self) -> str:
        try:
            self._lease.check()
        except Fenced as error:
            return str(error)
        return "another job has taken the output folder over"

    def _tell(self, state: TrainerState) -> None:
        if self._control.rank == 0 and not isinstance(self.outcome, Fenced) and not self._lease.lost():
            try:
                status.write(self._lease.output_dir, status.RUNNING, step=state.global_step)
            except OSError:
                return  # the disk is full: saving will end the run and report it


def _looks(control: TrainerControl) -> bool:
    """Whether to check the losses. That waits for the device, but logging and saving do so anyway."""
    return bool(control.should_log or control.should_save)
