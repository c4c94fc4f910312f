"""Run other people's scripts with and without ds_quant, and write what came of it into a table.

    python tests/clients/table.py [--only NAME ...] [--output docs/clients.md]

Rows of clients that were not run stay as they are in the file. Packages: pip install '.[clients]'.
"""

import argparse
import datetime
import importlib.metadata
import importlib.util
import os
import platform
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "clients")]

import assets  # noqa: E402
from clients import CLIENTS  # noqa: E402
from running import run_and_check  # noqa: E402

HEAD = [
    ("client", "script", "model", "config, ZeRO stage", "ranks", "last loss, full precision", "under ds_quant"),
    ("what is quantized, and what else was done", "seconds", "date"),
]
BEGIN, END = "<!-- table: begin -->", "<!-- table: end -->"


def row(client, folder):
    """The cells of one client's line."""
    made = assets.make(folder / "assets")
    place = folder / client.name
    place.mkdir()
    facts, quantized, plain = run_and_check(client, made, place)
    version = f"{client.package} {importlib.metadata.version(client.package)}"
    return [
        client.name,
        f"`{client.script}`, {version}",
        client.model,
        f"`{client.recipe}.json`, {client.stage}",
        f"{client.ranks}, {client.launcher}",
        f"{plain.losses[0]:.3f} -> {plain.losses[-1]:.4f}",
        f"{quantized.losses[0]:.3f} -> {quantized.losses[-1]:.4f}",
        "; ".join(facts),
        f"{plain.seconds:.0f}, {quantized.seconds:.0f}",
        datetime.date.today().isoformat(),
    ]


def rewrite(path, rows, machine):
    """Put the rows into the file's table, in the order of CLIENTS."""
    text = path.read_text() if path.exists() else f"# Clients\n\n{BEGIN}\n{END}\n"
    before, _, rest = text.partition(BEGIN)
    old, _, after = rest.partition(END)
    cells = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in old.splitlines() if line.startswith("| ")
    ]
    merged = {line[0]: line for line in cells[1:]} | rows
    names = [client.name for client in CLIENTS if client.name in merged]
    head = [name for part in HEAD for name in part]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    lines += [f"| {' | '.join(merged[name])} |" for name in names]
    path.write_text(before + "\n".join([BEGIN, "", *lines, "", machine, "", END]) + after)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=[client.name for client in CLIENTS], metavar="NAME")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "clients.md")
    arguments = parser.parse_args()
    versions = [f"{name} {importlib.metadata.version(name)}" for name in ("torch", "deepspeed", "accelerate")]
    machine = (
        f"Python {platform.python_version()}, {', '.join(versions)}; {os.cpu_count()} cores, {platform.machine()}."
    )
    failed = []
    with tempfile.TemporaryDirectory() as folder:
        for client in CLIENTS:
            if arguments.only and client.name not in arguments.only:
                continue
            if importlib.util.find_spec(client.package) is None:
                print(f"{client.name}: left out, {client.package} is not installed", flush=True)
                continue
            try:
                cells = row(client, Path(folder))
            except AssertionError as error:
                failed.append(client.name)
                print(f"{client.name}: FAILED\n{error}", flush=True)
                continue
            print(" | ".join(cells), flush=True)
            rewrite(arguments.output, {client.name: cells}, machine)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
