"""Parts of torch and triton that no release promises, and what is said where one is gone."""

from __future__ import annotations

import importlib
import operator
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch

from ds_quant.cli.shared.errors import CommandError

TESTED = "2.13"
"""The torch whose internals were used."""


def require(what: str, names: Mapping[str, Sequence[str]]) -> None:
    """Raises CommandError, with the versions, unless all modules of `names` have what they are to have.

    what: is asked for. Names may have dots: ``"GraphLowering.count_bytes"``.
    """
    missing = [f"{module}.{name}" for module in names for name in names[module] if not _has(module, name)]
    if missing:
        raise CommandError(f"{what}: {_versions()} without {', '.join(missing)}; {_allowed()}")


@contextmanager
def blamed(what: str) -> Iterator[None]:
    """On a torch that was not tested, whatever goes wrong within it is told as a CommandError, with the versions."""
    try:
        yield
    except Exception as error:
        if isinstance(error, CommandError) or is_tested():
            raise
        reason = " ".join(str(error).split())[:300]
        raise CommandError(
            f"{what}: {_versions()}, where it failed: {type(error).__name__}: {reason}; {_allowed()}"
        ) from error


def is_tested() -> bool:
    return torch.__version__.split(".")[:2] == TESTED.split(".")


def _has(module: str, name: str) -> bool:
    try:
        operator.attrgetter(name)(importlib.import_module(module))
    except (ImportError, AttributeError):
        return False
    return True


def _versions() -> str:
    try:
        triton = f" and triton {importlib.import_module('triton').__version__}"
    except ImportError:
        triton = ""
    return f"got torch {torch.__version__}{triton}"


def _allowed() -> str:
    return f"allowed: what torch {TESTED} has; run it there, or mend benchmarks/generated_code.py"
