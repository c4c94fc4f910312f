"""Notices that the process of another rank has ended, whatever this rank waits in.

Broken connections end a collective, but not always: with torch 2.13, gloo overlooked the loss of a peer in one of fifty
kills, and the survivor waited in a send until the time-out of its group, which is half an hour in DeepSpeed's groups.
Therefore each rank also holds a TCP connection to rank 0. The system closes it when the process ends, however that
happens, and rank 0 tells the others. A rank that is stopped or busy keeps its connection and counts as alive.
"""

from __future__ import annotations

import contextlib
import functools
import hmac
import os
import secrets
import selectors
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from ds_quant.cli.shared.terminal import complain
from survival.control import Control
from survival.errors import end_process

GRACE_SECONDS = 30.0
"""Time for this rank's own error, which says more: it comes at once as a rule, and then takes a roll call."""
_CONNECT_SECONDS = 10.0
_LONGEST_LINE = 200


@dataclass(eq=False)
class _Line:
    """A connection to another rank."""

    socket: socket.socket
    rank: int | None
    """None as long as a connection to rank 0 has not said whose it is."""
    received: bytes = b""


class Lifeline:
    """A connection of each rank to rank 0, watched by a thread.

    Args:
        control: all ranks; a single one has nothing to watch.
        gone: called in the thread with the number of a rank that has ended, `GRACE_SECONDS` after it has. The process
            ends after that in any case.
    """

    def __init__(self, control: Control, gone: Callable[[int], None]) -> None:
        self._control = control
        self._gone = gone
        self._token = b""
        self._selector = selectors.DefaultSelector()
        self._server: socket.socket | None = None
        self._lost: int | None = None
        self._deadline = 0.0
        self._closing = threading.Event()
        self._wake: socket.socket | None = None
        self._thread = threading.Thread(target=self._watch, name="lifeline", daemon=True)

    def connect(self) -> None:
        """Begin. All ranks must call it. A rank that cannot reach rank 0 says so and is not watched."""
        if self._control.world_size == 1:
            return
        port, self._token = self._control.from_first(self._open)
        if self._server is not None:
            self._selector.register(self._server, selectors.EVENT_READ)
        elif not self._reach(os.environ["MASTER_ADDR"], port):
            return
        self._wake, woken = socket.socketpair()
        self._selector.register(woken, selectors.EVENT_READ)
        self._thread.start()

    def close(self) -> None:
        """End. Call it when no other rank waits for this one any more."""
        self._closing.set()
        if self._wake is not None:
            self._wake.close()
            self._thread.join()

    def _open(self) -> tuple[int, bytes]:
        """Rank 0's port, and what shows that a connection to it is of this run."""
        try:
            self._server = socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True, backlog=4096)
        except (OSError, ValueError):  # no IPv6 here
            self._server = socket.create_server(("", 0), backlog=4096)
        return self._server.getsockname()[1], secrets.token_hex(16).encode()

    def _reach(self, host: str, port: int) -> bool:
        rank = self._control.rank
        try:
            connection = socket.create_connection((host, port), timeout=_CONNECT_SECONDS)
            connection.sendall(b"%s %d\n" % (self._token, rank))
        except OSError as error:
            complain(
                f"rank {rank}: cannot reach rank 0 at {host}, port {port} ({error}). If a rank dies, only broken "
                "collectives and time-outs tell.",
                everywhere=True,
            )
            return False
        self._add(connection, 0)
        return True

    def _add(self, connection: socket.socket, rank: int | None) -> None:
        connection.setblocking(False)
        _detect_dead_nodes(connection)
        self._selector.register(connection, selectors.EVENT_READ, _Line(connection, rank))

    def _watch(self) -> None:
        while not self._closing.is_set():
            left = None if self._lost is None else max(0.0, self._deadline - time.monotonic())
            for key, _ in self._selector.select(left):
                if key.fileobj is self._server:
                    self._accept()
                elif key.data is not None:
                    self._receive(key.data)
            if self._lost is not None and time.monotonic() >= self._deadline and not self._closing.is_set():
                end_process(functools.partial(self._gone, self._lost))
        self._tell(b"goodbye")
        for key in list(self._selector.get_map().values()):
            key.fileobj.close()  # type: ignore[union-attr]
        self._selector.close()

    def _accept(self) -> None:
        assert self._server is not None
        try:
            self._add(self._server.accept()[0], None)
        except OSError:  # too many open files, perhaps: it is asked for again at once
            time.sleep(0.1)

    def _receive(self, line: _Line) -> None:
        try:
            data = line.socket.recv(4096)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        *whole, line.received = (line.received + data).split(b"\n")
        stranger = len(line.received) > _LONGEST_LINE
        for words in whole:
            stranger |= not self._understand(line, words.split())
        if not data or stranger:
            self._selector.unregister(line.socket)
            line.socket.close()
            if line.rank is not None:
                self._lose(line.rank)

    def _understand(self, line: _Line, words: list[bytes]) -> bool:
        """Act on a message. False: it is none of this run."""
        match words:
            case [token, rank] if line.rank is None and hmac.compare_digest(token, self._token):
                line.rank = int(rank)
                if self._lost is not None:
                    self._send(line, b"lost %d" % self._lost)
            case [b"goodbye"] if line.rank is not None:
                line.rank = None
            case [b"lost", rank] if line.rank == 0:
                self._lose(int(rank))
            case _:
                return False
        return True

    def _lose(self, rank: int) -> None:
        if self._lost is not None:
            return  # the first one is the cause
        self._lost = rank
        self._deadline = time.monotonic() + GRACE_SECONDS
        if self._control.rank == 0:
            self._tell(b"lost %d" % rank)

    def _tell(self, words: bytes) -> None:
        for key in list(self._selector.get_map().values()):
            if isinstance(key.data, _Line):
                self._send(key.data, words)

    @staticmethod
    def _send(line: _Line, words: bytes) -> None:
        # A few bytes always fit; a connection that is broken by now is noticed when it is read.
        with contextlib.suppress(OSError):
            line.socket.sendall(words + b"\n")


def _detect_dead_nodes(connection: socket.socket) -> None:
    """Let the system ask now and then whether the other node still answers: 90 s, where it can be set."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 30), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", 6)):
        if hasattr(socket, name):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
