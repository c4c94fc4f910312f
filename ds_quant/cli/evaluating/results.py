"""What an evaluation found: rows, means over seeds, gaps to a baseline; as JSON, as Markdown, on the terminal."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ds_quant.cli.evaluating.perplexity import Perplexity
from ds_quant.cli.evaluating.tasks import Figures
from ds_quant.cli.shared.spreads import Gap, Spread
from ds_quant.cli.shared.tables import markdown_table, print_table

FORMAT = 1
SHOWN_METRICS = ("acc_norm", "acc", "exact_match")
"""Of a task with several, the first that it has is in the tables, and its perplexity; all are in the JSON."""

COLUMNS_SHOWN = 4
"""At a time on the terminal: the paper's texts and tasks have nineteen."""


@dataclass
class Row:
    """One model with one choice of quantizers."""

    name: str
    config: str
    seed: int | None
    """Config and seed as the run's folder names them, CONFIG/seed-N or CONFIG-sN."""
    quantizers: str
    """`trained`, `off`, or the JSON's name."""
    about: dict[str, Any]
    """Folder, step, files with hashes, the quantizers in full: an exact record of what was measured."""
    perplexity: dict[str, Perplexity] = field(default_factory=dict)
    tasks: dict[str, Figures] = field(default_factory=dict)

    def spreads(self) -> dict[str, Spread]:
        """What the tables show, by column; with a deviation where a task was run with several seeds."""
        found: dict[str, Spread] = {}
        for name, measured in self.perplexity.items():
            found[f"{name}: perplexity"] = Spread(measured.perplexity, None)
            found[loss_column(name)] = Spread(measured.loss, None)
        for task, metrics in self.tasks.items():
            shown = [metric for metric in SHOWN_METRICS if metric in metrics][:1]
            shown += ["perplexity"] if "perplexity" in metrics else []
            for metric in shown or list(metrics)[:1]:
                found[f"{task}: {metric}"] = Spread(metrics[metric]["mean"], metrics[metric]["deviation"])
        return found

    def to_json(self) -> dict[str, Any]:
        """Everything, as JSON: a figure that is not finite is null."""
        return {
            "name": self.name,
            "config": self.config,
            "seed": self.seed,
            "quantizers": self.quantizers,
            **self.about,
            "perplexity": {name: dataclasses.asdict(measured) for name, measured in self.perplexity.items()},
            "tasks": self.tasks,
        }


@dataclass(frozen=True)
class Mean:
    """Rows of the same config and quantizers that differ in their seeds."""

    config: str
    quantizers: str
    seeds: list[int]
    figures: dict[str, Spread]
    gaps: dict[str, Gap]
    """By column of a loss: the mean difference to the baseline's with the same seed, nats a token."""

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def loss_column(name: str) -> str:
    return f"{name}: loss"


def means(rows: Sequence[Row], baseline: str | None) -> list[Mean]:
    """The groups of two rows or more, and with a baseline every group; in the rows' order."""
    groups: dict[tuple[str, str], dict[int | None, Row]] = {}
    for row in rows:
        groups.setdefault((row.config, row.quantizers), {}).setdefault(row.seed, row)
    base = {row.seed: row for row in rows if is_baseline(row, baseline)}
    found = []
    for (config, quantizers), members in groups.items():
        if len(members) < 2 and baseline is None:
            continue
        own = list(members.values())
        columns = {column: [row.spreads()[column].mean for row in own] for column in own[0].spreads()}
        gaps = {}
        for name in own[0].perplexity:
            pairs = [
                members[seed].perplexity[name].loss - base[seed].perplexity[name].loss
                for seed in members
                if seed in base and members[seed] is not base[seed]
            ]
            if gap := Gap.of(pairs):
                gaps[loss_column(name)] = gap
        seeds = sorted(seed for seed in members if seed is not None)
        found.append(Mean(config, quantizers, seeds, {key: Spread.of(values) for key, values in columns.items()}, gaps))
    return found


def is_baseline(row: Row, baseline: str | None) -> bool:
    """Whether gaps are taken to this row: the named model or config, without quantizers."""
    return baseline in (row.name, row.config) and row.about["linear"] is None and not row.about["exported"]


@dataclass(frozen=True)
class Table:
    """Text in cells; the first `num_keys` columns tell which row it is."""

    title: str
    num_keys: int
    columns: list[str]
    cells: list[list[str]]


def tables(rows: Sequence[Row], averaged: Sequence[Mean]) -> list[Table]:
    """The rows, and where there are any the means."""
    columns = list(dict.fromkeys(column for row in rows for column in row.spreads()))
    cells = [
        [row.name, row.quantizers, *(_cell(row.spreads().get(column), column) for column in columns)] for row in rows
    ]
    found = [Table("Evaluation", 2, ["model", "quantizers", *columns], cells)]
    if averaged:
        gaps = list(dict.fromkeys(column for mean in averaged for column in mean.gaps))
        head = ["config", "quantizers", "seeds", *columns, *(f"{column}, gap" for column in gaps)]
        found.append(Table("Means over seeds", 3, head, [_mean_cells(mean, columns, gaps) for mean in averaged]))
    return found


def show(rows: Sequence[Row], averaged: Sequence[Mean]) -> None:
    """The tables on the terminal, a few columns at a time."""
    from rich.markup import escape

    for table in tables(rows, averaged):
        keys = table.num_keys
        for begin in range(keys, len(table.columns), COLUMNS_SHOWN):
            end = begin + COLUMNS_SHOWN
            # A name with brackets is no markup.
            cells = [[escape(cell) for cell in line[:keys] + line[begin:end]] for line in table.cells]
            print_table(table.title, table.columns[:keys] + table.columns[begin:end], cells)


def to_json(rows: Sequence[Row], averaged: Sequence[Mean], settings: dict[str, Any]) -> dict[str, Any]:
    """The whole record; NaN and infinity are null, which JSON does not have."""
    content = {
        "format": FORMAT,
        **settings,
        "rows": [row.to_json() for row in rows],
        "means": [mean.to_json() for mean in averaged],
    }
    found: dict[str, Any] = _finite(content)
    return found


def to_markdown(rows: Sequence[Row], averaged: Sequence[Mean], settings: dict[str, Any], notes: Iterable[str]) -> str:
    """A page with the tables, and what is needed to repeat them."""
    parts = ["# Evaluation", "", f"`{settings['command']}`", ""]
    versions = ", ".join(f"{name} {number}" for name, number in settings["versions"].items())
    parts += [f"{settings['date']}; commit {settings['commit']}; {versions}.", ""]
    parts.append(
        "Losses in nats a token; ± is the standard deviation over seeds: of a task's examples in the first table, of "
        "the trainings in the means. A gap is the mean difference to the baseline with the same seed, with half its "
        "95% confidence interval (Student's t over the pairs).\n"
    )
    for table in tables(rows, averaged):
        parts += [f"## {table.title}", "", *markdown_table(table.columns, table.cells), ""]
    parts += [f"- {note}" for note in notes]
    return "\n".join(parts).rstrip() + "\n"


def _mean_cells(mean: Mean, columns: list[str], gaps: list[str]) -> list[str]:
    cells = [mean.config, mean.quantizers, ", ".join(map(str, mean.seeds)) or "unknown"]
    cells += [_cell(mean.figures.get(column), column) for column in columns]
    for column in gaps:
        gap = mean.gaps.get(column)
        width = "" if gap is None or gap.half_width is None else f" ± {gap.half_width:.5f}"
        cells.append("" if gap is None else f"{gap.mean:+.5f}{width}")
    return cells


def _cell(spread: Spread | None, column: str) -> str:
    if spread is None or spread.mean is None:
        return ""
    digits = 2 if column.endswith("perplexity") else 5 if column.endswith("loss") else 4
    deviation = "" if spread.deviation is None else f" ± {spread.deviation:.{digits}f}"
    return f"{spread.mean:.{digits}f}{deviation}"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
