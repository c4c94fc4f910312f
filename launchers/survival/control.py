"""Joint decisions of all ranks, over a separate gloo group so that no decision waits for the accelerator.

If ranks lose each other, the time-out of this group ends the run, with the rank and the step in the message.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from survival.errors import Interrupted, LaunchError, RunEnded

T = TypeVar("T")
_ROLL_CALL_SECONDS = 10.0


class Event(enum.IntFlag):
    """Something that one rank has noticed and all must act on."""

    NONE = 0
    STOP = 1
    """A signal asks the run to write a checkpoint and end."""
    NOT_FINITE = 2
    """A training loss was NaN or Inf."""
    RISEN = 4
    """The training loss has risen and stayed high."""
    FENCED = 8
    """Another job owns the output folder."""


class Control:
    """All ranks of the run. All of them create it together, after the process group."""

    def __init__(self, timeout_seconds: float) -> None:
        self.timeout_seconds = timeout_seconds
        self._turn = 0
        self.step = 0
        """The step named in messages; the guard updates it."""
        timeout = timedelta(seconds=timeout_seconds)
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self._group = dist.new_group(backend="gloo", timeout=timeout)
        # After a failure the first group is in an unknown state, so the roll call uses another one.
        self._roll_call = dist.new_group(backend="gloo", timeout=timedelta(seconds=_ROLL_CALL_SECONDS))

    def agree(self, events: Event = Event.NONE) -> Event:
        """The union of the events of all ranks. Every rank must call it, and none continues before the others have."""
        flags = torch.tensor(int(events), dtype=torch.int32)
        self._together(lambda: dist.all_reduce(flags, op=dist.ReduceOp.BOR, group=self._group))
        return Event(int(flags))

    def gather(self, value: T) -> list[T]:
        """The values of all ranks, on all ranks."""
        values: list[Any] = [None] * self.world_size
        self._together(lambda: dist.all_gather_object(values, value, group=self._group))
        return values

    def from_first(self, make: Callable[[], T]) -> T:
        """Run `make` on rank 0 and return its result on all ranks; if it raises, every rank raises.

        The other ranks wait however long rank 0 takes. LaunchError and RunEnded are raised on all ranks. Any other
        error is raised as it is on rank 0 and as Interrupted on the others.
        """
        answer: list[Any] = [None, None]
        error: Exception | None = None
        if self.rank == 0:
            try:
                answer[1] = make()
            except Exception as raised:  # of any kind: the others must learn of it
                error = raised
                answer[0] = (
                    raised if isinstance(raised, (LaunchError, RunEnded)) else Interrupted(f"rank 0: {raised!r}")
                )
        self._wait_for_first()
        self._together(lambda: dist.broadcast_object_list(answer, src=0, group=self._group))
        if error is not None:
            raise error
        if answer[0] is not None:
            raise answer[0]
        result: T = answer[1]
        return result

    def on_all(self, act: Callable[[], T]) -> T:
        """Run `act` on every rank. If it fails on one, that rank raises its error and the others Interrupted."""
        problem: str | None = None
        error: Exception | None = None
        result: T | None = None
        try:
            result = act()
        except Exception as raised:  # of any kind: the others must learn of it
            error, problem = raised, f"rank {self.rank}, step {self.step}: {raised}"
        problems = [found for found in self.gather(problem) if found is not None]
        if error is not None:
            raise error
        if problems:
            raise Interrupted(problems[0])
        return result  # type: ignore[return-value]

    def stuck(self, seconds: float) -> Interrupted:
        """The error of a run that makes no progress, with what is known about the remaining ranks."""
        left = self._who_is_left()
        return Interrupted(
            f"rank {self.rank}, step {self.step}: no progress for {seconds:.0f} s (--ddp_timeout). {left}"
        )

    def gone(self, rank: int) -> Interrupted:
        """The error of a run that still waits for a rank whose process has ended."""
        return Interrupted(
            f"rank {self.rank}, step {self.step}: the process of rank {rank} has ended, or its node does not answer, "
            "and this rank would wait for it"
        )

    def lost(self, error: BaseException) -> Interrupted:
        """The error of a run whose ranks have lost contact, with what is known about the remaining ranks."""
        said = (str(error).strip().splitlines() or [type(error).__name__])[0]
        return Interrupted(
            f"rank {self.rank}, step {self.step}: the connection to the other ranks broke, or one of them did not "
            f"answer for {self.timeout_seconds:.0f} s ({said}). {self._who_is_left()}"
        )

    def _who_is_left(self) -> str:
        try:
            dist.monitored_barrier(
                self._roll_call, timeout=timedelta(seconds=_ROLL_CALL_SECONDS), wait_all_ranks=self.rank == 0
            )
        except RuntimeError as error:
            return (str(error).strip().splitlines() or [""])[0]
        return "All ranks answer to a roll call."

    def _together(self, act: Callable[[], object]) -> None:
        try:
            act()
        except RuntimeError as error:
            raise self.lost(error) from error

    def _wait_for_first(self) -> None:
        """Wait for rank 0, whose work may take longer than the time-out."""
        # A barrier would time out. Instead rank 0 sets a key in the store when it is done, and the others poll it.
        store = dist.distributed_c10d._get_default_store()
        self._turn += 1
        key = f"ds_quant/control/{self._turn}"
        if self.rank == 0:
            store.set(key, "done")
            return
        while True:
            try:
                store.wait([key], timedelta(seconds=self.timeout_seconds))
                return
            except dist.DistStoreError as error:
                if "timeout" not in str(error).lower() and "timed out" not in str(error).lower():
                    raise self.lost(error) from error
