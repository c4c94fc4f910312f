"""What a step has measured, on disk after every entry: a step that is killed leaves what it had."""

from __future__ import annotations

import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_check import promises
from ds_quant.base.whole_folder import write_json

Row = dict[str, Any]


class Record:
    """What a step writes down, and where it runs.

    measure(key, value)    a figure that a promise is judged by
    not_measured(key, why) in its place, where the device or the packages do not allow for it
    row(table, ...)        a line of a table, for people
    with part(what): ...   a part of the step, whose failure keeps no later one from running
    """

    def __init__(self, path: Path, *, seconds: float, dry_run: bool) -> None:
        self.end = time.monotonic() + seconds
        """When the step is killed, as time.monotonic() tells it."""
        self.dry_run = dry_run
        """On the CPU, with small sizes, by the same code."""
        self.device = torch.device("cpu" if dry_run else "cuda")
        self._path = path
        self._failed: list[str] = []
        self.content: dict[str, Any] = {"measures": {}, "not_measured": {}, "tables": {}}

    def measure(self, key: str, value: float) -> None:
        self.content["measures"][key] = float(value)
        self._write()

    def not_measured(self, key: str, why: str) -> None:
        self.content["not_measured"][key] = why
        self._write()

    def row(self, table: str, **columns: Any) -> None:
        self.content["tables"].setdefault(table, []).append(columns)
        print(table, columns, flush=True)
        self._write()

    @contextmanager
    def part(self, what: str) -> Iterator[None]:
        """Go on after an exception, print it, and fail at the end."""
        try:
            yield
        except Exception as error:
            print(f"failed: {what}", file=sys.stderr)
            traceback.print_exc()
            self._failed.append(f"{what}: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}")

    def check_complete(self, number: int) -> None:
        """Raise RuntimeError where a part failed, or a promise of the step was neither measured nor said why not."""
        if self._failed:
            raise RuntimeError("; ".join(self._failed))
        known = self.content["measures"].keys() | self.content["not_measured"].keys()
        missing = [promise.measure for promise in promises.of_step(number) if promise.measure not in known]
        if missing:
            raise RuntimeError(f"step {number} ended without a word on {', '.join(missing)}")

    def pick(self, full: Any, small: Any) -> Any:
        """`small` in a dry run, else `full`."""
        return small if self.dry_run else full

    def _write(self) -> None:
        write_json(self._path, self.content)
