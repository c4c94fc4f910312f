"""The option --links: loopback, or a link of a rate between network namespaces."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager

from benchmarks import slow_link
from benchmarks.slow_link import Link
from ds_quant.cli.shared.errors import CommandError

LOOPBACK = "loopback"
_DEFAULT = f"{LOOPBACK},1gbit,100mbit"


def add_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--links",
        help=f"{LOOPBACK}, or rates of links between network namespaces, such as 1gbit: these need root, ip and tc "
        f"(default: those of {_DEFAULT} that can be set up)",
    )


def choose(asked: str | None) -> list[str]:
    """The links to measure over; says in one line what is left out of the default and why."""
    names = [name.strip() for name in (asked or _DEFAULT).split(",")]
    rates = [name for name in names if name != LOOPBACK]
    for rate in rates:
        slow_link.bits_per_second(rate)
    why = slow_link.unavailable() if rates else None
    if why is None:
        return names
    if asked is not None:
        raise CommandError(f"--links: got {asked!r}; allowed here: {LOOPBACK}, since {why}")
    print(f"left out: {', '.join(rates)}: {why}")
    return [name for name in names if name == LOOPBACK]


@contextmanager
def open_link(name: str, ranks: int) -> Iterator[Link | None]:
    """The link of that name while it is needed; None for loopback."""
    if name == LOOPBACK:
        yield None
        return
    with slow_link.slow_link(name, ranks) as link:
        yield link
