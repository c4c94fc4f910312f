"""Claims the output folder, and reports any end of the run in status.json and the exit status."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch.distributed as dist

from ds_quant import ConfigError
from ds_quant.cli.shared.terminal import complain
from survival import disk, status
from survival.control import Control
from survival.errors import Diverged, Failed, Fenced, Interrupted, LaunchError, RunEnded, Stopped, mistake
from survival.lease import Lease, not_writable
from survival.lifeline import Lifeline
from survival.signals import StopAtOnce

_SEEN_SECONDS = 90.0
_CONNECTION = (
    *("connection closed by peer", "connection reset by peer", "broken pipe", "connection refused"),
    *("timed out waiting", "gloo/transport", "nccl", "socket timeout"),
)


def take_folder(output_dir: Path, control: Control) -> Lease:
    """Claim the folder for this job, on all ranks. Raises LaunchError if another job writes there."""
    taken: list[Lease] = []

    def acquire() -> int:
        taken.append(Lease.acquire(output_dir))
        try:
            status.write(output_dir, status.RUNNING)
        except OSError as error:
            taken[0].release()
            raise not_writable(output_dir, error) from error
        taken[0].keep_alive()
        return taken[0].generation

    generation = control.from_first(acquire)
    lease = taken[0] if taken else Lease(output_dir, generation)
    control.on_all(lambda: _see(lease))
    return lease


def _see(lease: Lease) -> None:
    """Wait until this rank sees what rank 0 wrote; a separate folder would lose its part of every checkpoint."""
    deadline = time.monotonic() + _SEEN_SECONDS
    while lease.lost():
        if time.monotonic() > deadline:
            raise mistake(
                "--output_dir",
                f"{lease.output_dir}, which rank 0 took, and {socket.gethostname()} does not see that",
                "the same folder on all nodes",
                "give a folder on a file system that all nodes share",
            )
        time.sleep(0.5)


@contextmanager
def ending(lease: Lease, control: Control) -> Iterator[None]:
    """Write the final state to status.json, release the folder, and then let any error propagate.

    Errors of broken connections are raised as Interrupted, those of a full disk as Failed. If the process of another
    rank ends and this one does not notice, it ends as well.
    """
    lifeline = Lifeline(control, lambda rank: give_up(lease, control, control.gone(rank)))
    try:
        lifeline.connect()
        yield
        control.agree()
        lifeline.close()
        _write(lease, control, status.DONE)
    except StopAtOnce as stop:
        _write(lease, control, status.STOPPED, str(stop), retry=True)
        raise
    except KeyboardInterrupt:
        _write(lease, control, status.FAILED, "interrupted from the keyboard", retry=True)
        raise
    except Fenced:
        lifeline.close()
        raise
    except (LaunchError, ConfigError) as error:
        _write(lease, control, status.FAILED, str(error))
        raise
    except RunEnded as end:
        if isinstance(end, (Stopped, Diverged)):
            lifeline.close()  # all ranks end the same way, each in its time
        _write(lease, control, end.state, str(end), retry=end.retry)
        raise
    except Exception as error:
        known = _translated(error, lease, control)
        if known is None:
            _write(lease, control, status.FAILED, f"{type(error).__name__}: {error}", retry=True)
            raise
        _write(lease, control, known.state, str(known), retry=known.retry)
        raise known from error
    finally:
        if control.rank == 0:
            lease.release()


def give_up(lease: Lease, control: Control, stuck: Interrupted) -> None:
    """Report a run that can make no progress. Threads call this, which then end the process."""
    complain(str(stuck), everywhere=True)
    _write(lease, control, stuck.state, str(stuck), retry=stuck.retry)
    if control.rank == 0:
        lease.release()


def _translated(error: Exception, lease: Lease, control: Control) -> RunEnded | None:
    """The RunEnded that corresponds to a library's error; None if there is none."""
    why = disk.problem(error, lease.output_dir)
    if why is not None:
        return Failed(
            f"rank {control.rank}, step {control.step}: {why}. Make room on the disk of {lease.output_dir}, then "
            "start again."
        )
    text = str(error).lower()
    if isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and any(word in text for word in _CONNECTION)
    ):
        return control.lost(error)
    return None


def _write(lease: Lease, control: Control, state: str, reason: str = "", *, retry: bool = False) -> None:
    """Write the state, unless another rank, which caused this end, has already written its own."""
    if lease.lost():
        return
    if control.rank != 0 and state in (status.DONE, status.STOPPED, status.DIVERGED):
        return  # all ranks end the same way, and rank 0 reports it
    before = status.read(lease.output_dir) or {}
    if before.get("state", status.RUNNING) != status.RUNNING and (retry or not before.get("retry")):
        return
    try:
        status.write(lease.output_dir, state, reason=reason, step=control.step, retry=retry, rank=control.rank)
    except OSError as error:
        complain(f"status.json could not be written: {error}", everywhere=True)
