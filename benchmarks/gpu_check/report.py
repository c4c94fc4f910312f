"""The acceptance as a page: verdicts, steps, and the tables of what was measured."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.gpu_check.promises import AT_LEAST, Verdict
from benchmarks.gpu_check.running import DONE
from ds_quant.base.whole_folder import write_whole
from ds_quant.cli.shared.tables import escaped, markdown_table


def page(where: Mapping[str, Any], verdicts: list[Verdict], results: Mapping[int, Mapping[str, Any]]) -> str:
    """Markdown."""
    dry_run = bool(where["dry_run"])
    lines = ["# Acceptance on a GPU" + (", dry run on a CPU: no figure means anything" if dry_run else ""), ""]
    lines += markdown_table(["", ""], [[str(key), str(value)] for key, value in where.items()])
    lines += ["", "## Promises", ""]
    lines += markdown_table(["step", "promise", "promised", "measured", "verdict"], map(_promise_row, verdicts))
    lines += ["", "## Steps", ""]
    lines += markdown_table(
        ["step", "what", "seconds, of", "state"],
        [
            [str(number), result["title"], f"{result['seconds']:.0f}, {result['seconds_allowed']:.0f}", result["state"]]
            for number, result in sorted(results.items())
        ],
    )
    for number, result in sorted(results.items()):
        lines += ["", f"## {number}. {escaped(result['title'])}"]
        for name, rows in result["tables"].items():
            columns = list(dict.fromkeys(column for row in rows for column in row))
            lines += ["", f"### {escaped(name)}", ""]
            lines += markdown_table(columns, [[shown(row.get(column)) for column in columns] for row in rows])
        if result["state"] != DONE:
            lines += ["", "```text", result["output_tail"].replace("```", "'''"), "```"]
    return "\n".join(lines) + "\n"


def _promise_row(verdict: Verdict) -> list[str]:
    promise = verdict.promise
    measured = shown(verdict.measured) if verdict.measured is not None else ""
    outcome = f"{verdict.outcome}: {verdict.why}" if verdict.why else verdict.outcome
    sign = "≥" if promise.kind == AT_LEAST else "≤"
    return [str(promise.step), promise.text, f"{sign} {promise.goal:g}", measured, outcome]


def shown(value: Any) -> str:
    """A cell."""
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def write(folder: Path, text: str) -> Path:
    """report.md in the folder."""
    path = folder / "report.md"
    write_whole(path, text)
    return path
