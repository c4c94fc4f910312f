"""A rank whose process ends takes the others with it, also where they wait in something that does not notice."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import PATIENCE, ROOT
from helpers.launching import Ranks
from survival import status
from survival.lifeline import Lifeline

PROGRAM = ROOT / "tests" / "launchers" / "lifeline_ranks.py"
pytestmark = [pytest.mark.distributed, pytest.mark.timeout(120)]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Ranks]]:
    """Starts ranks that do these things, and waits until all of them are ready."""
    with contextlib.ExitStack() as stack:

        def begin(*doings: str, grace: float = 1.0) -> Ranks:
            (tmp_path / "ranks").mkdir()
            arguments = (PROGRAM, tmp_path / "run", grace, *doings)
            ranks = Ranks(tmp_path / "ranks", *arguments, ranks=len(doings), timeout=100, grace=100)
            stack.enter_context(ranks)
            deadline = time.monotonic() + 60 * PATIENCE
            while not all(f"rank {rank} is ready" in ranks.printed() for rank in range(len(doings))):
                assert ranks.poll() is None, ranks.printed()
                assert time.monotonic() < deadline, ranks.printed()
                time.sleep(0.05)
            return ranks

        yield begin


@pytest.mark.parametrize("killed", [0, 1])
def test_ranks_that_wait_for_a_dead_one_end(start: Callable[..., Ranks], tmp_path: Path, killed: int) -> None:
    ranks = start("sleep", "sleep", "sleep")
    ranks.send_signal(signal.SIGKILL, killed)
    ranks.wait(20)
    told = status.read(tmp_path / "run")
    assert told is not None
    assert (told["state"], told["retry"], told["step"]) == ("failed", True, 7), ranks.printed()
    assert f"step 7: the process of rank {killed} has ended" in told["reason"]
    for rank in {0, 1, 2} - {killed}:
        assert f"rank {rank}, step 7: the process of rank {killed} has ended" in ranks.printed()


def test_the_first_rank_to_end_is_named(start: Callable[..., Ranks], tmp_path: Path) -> None:
    # Rank 1's error ends it; the two that sleep are told of it, and not of each other.
    ranks = start("sleep", "fail", "sleep")
    (tmp_path / "run" / "fail").touch()
    ranks.wait(20)
    told = status.read(tmp_path / "run")
    assert told is not None
    assert told["reason"] == "ValueError: an error of its own", ranks.printed()
    assert told["rank"] == 1
    for rank in (0, 2):
        assert f"rank {rank}, step 7: the process of rank 1 has ended" in ranks.printed()


def test_a_rank_that_is_stopped_is_waited_for(start: Callable[..., Ranks], tmp_path: Path) -> None:
    ranks = start("sleep", "sleep", grace=0.2)
    ranks.send_signal(signal.SIGSTOP, 1)
    time.sleep(2)
    assert ranks.poll() is None, ranks.printed()
    assert (status.read(tmp_path / "run") or {})["state"] == "running"
    ranks.send_signal(signal.SIGCONT, 1)
    time.sleep(1)
    assert ranks.poll() is None, ranks.printed()


def test_a_rank_that_ends_well_ends_no_other(start: Callable[..., Ranks], tmp_path: Path) -> None:
    # Rank 2 lives four seconds longer than rank 0, twenty times the grace.
    ranks = start("end", "end", "end", grace=0.2)
    assert ranks.wait(30) == 0, ranks.printed()
    for rank in range(3):
        assert f"rank {rank} has ended well" in ranks.printed()
    assert (status.read(tmp_path / "run") or {})["state"] == "done"
    assert "has ended, or its node" not in ranks.printed()


class _ThreeRanks:
    """Rank 0's part of a Control of three ranks, the others of which are the test."""

    rank, world_size = 0, 3

    def from_first(self, make: Callable[[], Any]) -> Any:
        self.answer = make()
        return self.answer


def test_strangers_at_the_port_do_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("survival.lifeline.GRACE_SECONDS", 0.0)
    exits: list[int] = []
    monkeypatch.setattr(os, "_exit", exits.append)
    gone: list[int] = []
    control = _ThreeRanks()
    lifeline = Lifeline(control, gone.append)  # type: ignore[arg-type]
    lifeline.connect()
    port, token = control.answer

    def connect(words: bytes) -> socket.socket:
        connection = socket.create_connection(("127.0.0.1", port), timeout=10)
        connection.sendall(words)
        return connection

    def answer(connection: socket.socket) -> bytes:
        try:
            return connection.recv(100)
        except ConnectionResetError:
            return b""

    try:
        with connect(token + b" 1\n") as friend:
            for words in (b"GET / HTTP/1.1\r\n\r\n", b"wrong 2\n", b"x" * 5000, b"lost 1\n", b"\n\xff\n", b"goodbye\n"):
                with connect(words) as stranger:
                    assert not answer(stranger), f"{words!r} is sent away"
            connect(b"").close()
            time.sleep(0.2)
            assert (gone, exits) == ([], [])
            friend.sendall(b"goodbye\n")
        with connect(token + b" 2\n"):
            time.sleep(0.2)
            assert (gone, exits) == ([], []), "one that said goodbye is not missed"
        deadline = time.monotonic() + 30
        while not exits and time.monotonic() < deadline:
            time.sleep(0.02)
        assert gone[0] == 2
        assert exits[0] == 4
    finally:
        lifeline.close()


def test_a_single_rank_has_no_lifeline() -> None:
    control = _ThreeRanks()
    control.world_size = 1
    lifeline = Lifeline(control, lambda rank: None)  # type: ignore[arg-type]
    lifeline.connect()
    lifeline.close()
    assert not hasattr(control, "answer"), "no port was opened"


def test_a_port_that_cannot_be_reached_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    control = _ThreeRanks()
    control.rank = 1
    monkeypatch.setattr(control, "from_first", lambda make: (port, b"token"))
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    lifeline = Lifeline(control, lambda rank: None)  # type: ignore[arg-type]
    lifeline.connect()
    lifeline.close()
    assert f"rank 1: cannot reach rank 0 at 127.0.0.1, port {port}" in "".join(capsys.readouterr())
