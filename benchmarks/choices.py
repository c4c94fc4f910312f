"""Arguments that the benchmarks of linears and of steps share, and what may be given for them."""

from __future__ import annotations

import argparse
import importlib.util
import os
from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

import torch

from ds_quant.cli.shared.errors import CommandError


class Choosable(Protocol):
    """A contender: its name, and the package that it needs."""

    @property
    def name(self) -> str: ...
    @property
    def needs(self) -> str | None: ...


C = TypeVar("C", bound=Choosable)


def add_common(parser: argparse.ArgumentParser, *, rounds: int, warm_up: int, output: str, iterations: int = 1) -> None:
    parser.add_argument(
        "--only", help="names that contain one of these, split by commas; what others are compared with runs too"
    )
    parser.add_argument("--rounds", type=int, default=rounds, help="measured rounds (default: %(default)s)")
    parser.add_argument("--warm-up", type=int, default=warm_up, help="rounds before them (default: %(default)s)")
    add_iterations(parser, iterations)
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="default: all cores, %(default)s")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    parser.add_argument("--output", default=output, help="the CSV; a picture lies beside it (default: %(default)s)")


def add_iterations(parser: argparse.ArgumentParser, iterations: int) -> None:
    parser.add_argument(
        "--iterations", type=int, default=iterations, help="calls in a round, on cuda only (default: %(default)s)"
    )


def check_common(options: argparse.Namespace) -> torch.device:
    """The device; CommandError where a shared argument is out of range."""
    if options.rounds < 2:
        raise CommandError(f"--rounds: got {options.rounds}; allowed: 2 or more, for a spread; give more")
    at_least("--warm-up", options.warm_up, 0)
    at_least("--iterations", options.iterations, 1)
    at_least("--threads", options.threads, 1)
    try:
        # Only a tensor shows whether the device is there.
        return torch.empty(0, device=options.device).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise CommandError(
            f"--device: got {options.device!r} ({reason}); allowed: cpu, or cuda where torch sees one; correct it"
        ) from error


def at_least(option: str, value: int, least: int) -> None:
    if value < least:
        raise CommandError(f"{option}: got {value}; allowed: {least} or more; give more")


def choose(contenders: Sequence[C], only: str | None, base: str) -> list[C]:
    """Those whose names contain a part of `only`, and `base`; without those whose package is missing."""
    wanted = [part.strip().lower() for part in only.split(",")] if only else [""]
    for part in wanted:
        if not any(part in contender.name.lower() for contender in contenders):
            names = "; ".join(contender.name for contender in contenders)
            raise CommandError(f"--only: got {part!r}; allowed: parts of {names}; correct it")
    chosen = []
    for contender in contenders:
        if contender.name != base and not any(part in contender.name.lower() for part in wanted):
            continue
        if contender.needs and importlib.util.find_spec(contender.needs) is None:
            fix = "pip install 'ds_quant[bench]'"
            print(f"left out: {contender.name}, since {contender.needs} is not installed ({fix})")
            continue
        chosen.append(contender)
    return chosen


def attempt(name: str, base: str, call: Callable[[], object]) -> bool:
    """Whether `call` went well. A line says if not, since no contender may keep others from running; but the base may.

    Raises:
        CommandError: the base failed.
    """
    try:
        call()
    except Exception as error:
        reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        if name == base:
            allowed = "a baseline that runs; fix that error"
            raise CommandError(f"{base}: got {reason}; allowed: {allowed}") from error
        print(f"left out: {name}: {reason}")
        return False
    return True
