"""A link of a chosen rate between network namespaces of this machine, for one rank in each.

    python benchmarks/slow_link.py --clean

removes what killed runs have left. `slow_link(rate, ranks)` takes its link down by itself, also on exceptions, SIGINT,
SIGTERM and SIGHUP. Everything lies within the namespaces: the machine's own network sees nothing of it.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

if not __package__:
    # Run as a script, Python looks for modules next to this file; the package lies one folder up.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from ds_quant.cli.shared.errors import CommandError
from ds_quant.cli.shared.signals import hold_signals, raise_on_signals

INTERFACE = "wire"
"""What the interface is called in every rank's namespace."""
_PREFIX = "ds-quant"
_HUB = "hub"
_COMMAND_SECONDS = 30
_BURST_SECONDS, _LEAST_BURST = 1e-3, 128 * 1024
"""What the link lets through at once after a pause: little beside what is measured. With 64 KiB, the kernel cuts TCP's
large packets up, which cost a fifth of the rate at 1gbit."""


@dataclass(frozen=True)
class Link:
    """A link that stands: a namespace and an address for each rank."""

    rate: str
    bits_per_second: float
    namespaces: tuple[str, ...]
    addresses: tuple[str, ...]

    def within(self, rank: int, command: list[str]) -> list[str]:
        """The command that runs `command` in the namespace of `rank`."""
        return ["ip", "netns", "exec", self.namespaces[rank], *command]

    def environment(self) -> dict[str, str]:
        """What gloo and torch have to know to use the link."""
        return {"GLOO_SOCKET_IFNAME": INTERFACE, "MASTER_ADDR": self.addresses[0]}


def bits_per_second(rate: str) -> float:
    """1e9 of "1gbit"; CommandError for what is no rate."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([kmg])bit", rate)
    if not match or not float(match[1]):
        raise CommandError(f"link: got {rate!r}; allowed: loopback, or a rate such as 1gbit, 100mbit; write it so")
    return float(match[1]) * {"k": 1e3, "m": 1e6, "g": 1e9}[match[2]]


def unavailable() -> str | None:
    """Why this user cannot set up a link here, with the fix; None where it can be done."""
    missing = [name for name in ("ip", "tc") if shutil.which(name) is None]
    if missing:
        return f"{' and '.join(missing)} not found: apt-get install -y --no-install-recommends iproute2"
    if os.geteuid() != 0:
        return "network namespaces need root: run it as root"
    try:
        # In a container root may not be allowed to: only doing it tells.
        with slow_link("1gbit", 2):
            return None
    except CommandError as error:
        return str(error)


@contextmanager
def slow_link(rate: str, ranks: int) -> Iterator[Link]:
    """Set up a link for `ranks` processes, each sending and receiving at `rate`, and take it down afterwards."""
    speed = bits_per_second(rate)
    owner = _owner(os.getpid(), _started(os.getpid()))
    link = Link(
        rate,
        speed,
        tuple(f"{owner}-{rank}" for rank in range(ranks)),
        tuple(f"10.0.{rank // 250}.{rank % 250 + 1}" for rank in range(ranks)),
    )
    with raise_on_signals():
        try:
            _set_up(link, f"{owner}-{_HUB}")
            yield link
        finally:
            with hold_signals():
                _remove([name for name in _namespaces() if name.startswith(f"{owner}-")])


def clean() -> list[str]:
    """Remove the namespaces of processes that are gone, and what still runs in them; returns their names."""
    left = []
    for name in _namespaces():
        match = re.fullmatch(rf"{_PREFIX}-(\d+)-(\d+)-\w+", name)
        if match and _started(int(match[1])) != match[2]:
            left.append(name)
    _remove(left)
    return left


def _owner(pid: int, started: str | None) -> str:
    # A process number comes back one day, together with its start it does not.
    return f"{_PREFIX}-{pid}-{started}"


def _started(pid: int) -> str | None:
    """When a process was started, in the kernel's ticks; None where there is none."""
    try:
        # The name of the program, in parentheses, may hold spaces.
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return None


def _set_up(link: Link, hub: str) -> None:
    for name in link.namespaces:
        _run("ip", "netns", "add", name)
    if len(link.namespaces) == 2:
        first, second = link.namespaces
        _run(*f"ip link add {INTERFACE} netns {first} type veth peer name {INTERFACE} netns {second}".split())
    else:
        _run("ip", "netns", "add", hub)
        _run(*f"ip -n {hub} link add bridge type bridge".split())
        _run(*f"ip -n {hub} link set bridge up".split())
        for rank, name in enumerate(link.namespaces):
            _run(*f"ip link add {INTERFACE} netns {name} type veth peer name port{rank} netns {hub}".split())
            _run(*f"ip -n {hub} link set port{rank} master bridge up".split())
            _slow_down(hub, f"port{rank}", link)
    for name, address in zip(link.namespaces, link.addresses, strict=True):
        _run(*f"ip -n {name} addr add {address}/16 dev {INTERFACE}".split())
        _run(*f"ip -n {name} link set {INTERFACE} up".split())
        _run(*f"ip -n {name} link set lo up".split())
        _slow_down(name, INTERFACE, link)


def _slow_down(namespace: str, interface: str, link: Link) -> None:
    burst = max(_LEAST_BURST, round(link.bits_per_second / 8 * _BURST_SECONDS))
    _run(*f"tc -n {namespace} qdisc add dev {interface} root tbf rate {link.rate} burst {burst}b latency 50ms".split())


def _namespaces() -> list[str]:
    return [line.split()[0] for line in _run("ip", "netns", "list").splitlines() if line.strip()]


def _remove(names: list[str]) -> None:
    for name in names:
        # A namespace lives as long as anything in it.
        for _ in range(100):
            running = _run("ip", "netns", "pids", name).split()
            for pid in running:
                try:
                    os.kill(int(pid), signal.SIGKILL)
                except ProcessLookupError:
                    continue
            if not running:
                break
            time.sleep(0.02)
        _run("ip", "netns", "delete", name)


def _run(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_COMMAND_SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise CommandError(f"{' '.join(command)}: {error}; needs iproute2 and root") from error
    if done.returncode:
        raise CommandError(f"{' '.join(command)}: got {done.stderr.strip()!r}; needs root and the kernel's sch_tbf")
    return done.stdout


def main(argv: list[str] | None = None) -> int:
    """Clean up; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clean", action="store_true", required=True, help="remove what killed runs have left")
    parser.parse_args(argv)
    try:
        left = clean()
    except CommandError as error:
        print(f"slow_link.py: {error}", file=sys.stderr)
        return 2
    print("\n".join(f"removed: {name}" for name in left) or "nothing was left")
    return 0


if __name__ == "__main__":
    sys.exit(main())
