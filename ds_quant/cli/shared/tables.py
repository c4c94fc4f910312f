"""Rows of figures: a table for the eye, a CSV or Markdown to keep, and where they were measured."""

from __future__ import annotations

import csv
import datetime
import os
from collections.abc import Iterable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ds_quant.base.commit import commit
from ds_quant.cli.shared import processors
from ds_quant.cli.shared.errors import CommandError

if TYPE_CHECKING:
    import torch

PACKAGES = ("ds_quant", "torch", "deepspeed", "bitsandbytes", "torchao")


def environment(device: torch.device) -> dict[str, Any]:
    """Date, commit, processor, threads and versions: columns of every CSV row."""
    import torch

    found: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "commit": commit() or "unknown",
        "processor": processors.name(device),
        "cpu_instructions": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = ""
    return found


def write_csv(path: Path, rows: list[dict[str, Any]], where: dict[str, Any]) -> None:
    """All rows, each with the columns of `where`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=[*rows[0], *where])
        writer.writeheader()
        writer.writerows([{**row, **where} for row in rows])


def need_rich() -> None:
    """Raise CommandError without the package that draws tables: better before minutes of work."""
    try:
        import rich  # noqa: F401
    except ImportError as error:
        raise CommandError(
            f"tables: got no package rich ({error}); allowed: rich 14 or newer; pip install 'ds_quant[launch]'"
        ) from error


def print_table(title: str, columns: list[str], rows: list[list[str]]) -> None:
    """Print rows of text; the first column is a name, the others are figures."""
    need_rich()
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number == 0 else "right", no_wrap=number == 0)
    for row in rows:
        table.add_row(*row)
    Console(width=max(130, Console().width)).print(table)


def markdown_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """The lines of a Markdown table."""
    lines = [columns, ["---"] * len(columns), *rows]
    return ["| " + " | ".join(map(escaped, cells)) + " |" for cells in lines]


def escaped(text: str) -> str:
    """As Markdown shows it unchanged in a table."""
    for mark in ("\\", "|", "<", "*", "`"):
        text = text.replace(mark, f"\\{mark}")
    return text
