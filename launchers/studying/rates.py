"""Rows at half and twice the tuned learning rate, beside what they cost at the tuned one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from collecting.runs import DONE

from ds_quant.cli.shared.spreads import Gap
from ds_quant.cli.shared.tables import markdown_table
from studying import verdicts
from studying.results import Result
from studying.rows import BASELINE
from studying.verdicts import Judged


def table(judged: Mapping[float, Sequence[Judged]], baseline: Sequence[Result], tuned: float) -> list[str]:
    """A line for each row that ran at another rate; nothing without such rows.

    judged: the rows at each rate, each against the baseline at that rate. baseline: all of its runs; their line has
    how far each rate ends above `tuned`, over the seeds that both have.
    """
    rates = sorted(judged)
    at = {rate: {entry.row.name: entry for entry in judged[rate] if entry.seeds} for rate in rates}
    others = [rate for rate in rates if rate != tuned]
    shown = [entry.row for entry in judged[tuned] if any(entry.row.name in at[rate] for rate in others)]
    shown = [row for row in shown if row.name != BASELINE]
    if not shown:
        return []
    header = ["row", *(f"{rate:g}, tuned" if rate == tuned else f"{rate:g}" for rate in rates), "the paper"]
    first = ["baseline, above its loss at the tuned rate", *(_above(baseline, rate, tuned) for rate in rates), ""]
    lines = [[row.name, *(_cell(at[rate].get(row.name)) for rate in rates), row.outcome] for row in shown]
    title = "**At other learning rates**: gaps to the baseline at the same rate, 95% intervals, verdicts"
    return [title, "", *markdown_table(header, [first, *lines]), ""]


def _above(baseline: Sequence[Result], rate: float, tuned: float) -> str:
    if rate == tuned:
        return ""
    losses = {(run.key.rate, run.key.seed): run.loss for run in baseline if run.state == DONE}
    seeds = [seed for at, seed in losses if at == rate and (tuned, seed) in losses]
    gap = Gap.of([losses[rate, seed] - losses[tuned, seed] for seed in seeds])
    return "" if gap is None else verdicts.figures(gap)


def _cell(entry: Judged | None) -> str:
    if entry is None:
        return ""
    if entry.gap is None or entry.num_diverged:
        return f"{entry.num_diverged} of {entry.seeds} diverged"
    return f"{verdicts.figures(entry.gap)}, {entry.verdict}"
