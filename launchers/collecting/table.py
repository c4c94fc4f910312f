"""Formats runs and configs as CSV, as a Markdown page, and as a table for the terminal."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence

from collecting.configs import Config
from collecting.runs import Run
from ds_quant.cli.shared.tables import escaped, markdown_table

RUN_COLUMNS = (
    "config",
    "seed",
    "state",
    "reason",
    "steps",
    "final_eval_loss",
    "best_eval_loss",
    "tokens_per_second",
    "wire_bytes_per_step",
    "seconds",
    "peak_memory_bytes",
    "num_unreadable_rows",
    "folder",
)
CONFIG_COLUMNS = (
    "config",
    "runs",
    "final",
    "sd",
    "best",
    "sd",
    "gap",
    "95% interval",
    "pairs",
    "tokens/s",
)
_UNITS = (
    "Final and best (lowest) validation loss in nats a token: mean and standard deviation (sd) over the runs that are "
    "done. The gap is the mean difference of the final loss to {baseline} with the same seed, with its 95% "
    "confidence interval (Student's t over the pairs)."
)
_RUN_UNITS = (
    "Of a run that is not done, the final loss is the last one that it measured. Wire bytes are those that rank 0 sent "
    "a step; an empty cell is a figure that the run did not leave."
)


def to_csv(runs: Iterable[Run]) -> str:
    """One line per run. Unknown figures are empty; losses are in nats per token, times in seconds."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(RUN_COLUMNS)
    writer.writerows([getattr(run, column) for column in RUN_COLUMNS] for run in runs)
    return text.getvalue()


def config_rows(configs: Iterable[Config]) -> list[list[str]]:
    """The cells below CONFIG_COLUMNS."""
    rows = []
    for config in configs:
        gap = config.gap
        interval = ""
        if gap is not None and gap.half_width is not None:
            interval = gap.interval()
        rows.append(
            [
                config.name,
                ", ".join(f"{count} {state}" for state, count in config.states.items()),
                _loss(config.final.mean),
                _loss(config.final.deviation),
                _loss(config.best.mean),
                _loss(config.best.deviation),
                "" if gap is None else f"{gap.mean:+.4f}",
                interval,
                "" if gap is None else str(gap.num_pairs),
                _count(config.tokens_per_second),
            ]
        )
    return rows


def to_markdown(runs: Sequence[Run], configs: Sequence[Config], problems: Sequence[str], baseline: str) -> str:
    """The page with configs, runs and problems."""
    parts = ["# Collected runs", "", _UNITS.format(baseline=escaped(baseline)), ""]
    parts += [*markdown_table(CONFIG_COLUMNS, config_rows(configs)), "", "## Runs", "", _RUN_UNITS, ""]
    columns = ("config", "seed", "state", "steps", "final loss", "best loss", "tokens/s", "wire bytes/step")
    parts += markdown_table((*columns, "seconds", "peak bytes", "folder", "reason"), [_run_row(run) for run in runs])
    parts += ["", "## Problems", ""]
    parts += [f"- {escaped(problem)}" for problem in problems] or ["None."]
    return "\n".join(parts) + "\n"


def _run_row(run: Run) -> list[str]:
    return [
        run.config,
        "unknown" if run.seed is None else str(run.seed),
        run.state,
        _count(run.steps),
        _loss(run.final_eval_loss),
        _loss(run.best_eval_loss),
        _count(run.tokens_per_second),
        _count(run.wire_bytes_per_step),
        "" if run.seconds is None else f"{run.seconds:.1f}",
        _count(run.peak_memory_bytes),
        run.folder,
        run.reason,
    ]


def _loss(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _count(value: float | None) -> str:
    return "" if value is None else f"{value:,.0f}"
