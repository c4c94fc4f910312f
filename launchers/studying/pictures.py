"""Gaps of all rows as one picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ds_quant.cli.shared.pictures import new_figure, save_figure
from studying import protocol, verdicts
from studying.rows import BASELINE
from studying.verdicts import Judged

_COLOURS = {
    verdicts.EQUAL: "tab:green",
    verdicts.BETTER: "tab:blue",
    verdicts.DEGRADED: "tab:orange",
    verdicts.UNDECIDED: "gray",
}


def draw(judged: Sequence[Judged], title: str, path: Path) -> bool:
    """A line a row: mean gap and interval, coloured by verdict; diverged rows in words. False without matplotlib."""
    shown = [entry for entry in judged if entry.seeds and entry.row.name != BASELINE]
    figure = new_figure(width=9.0, height=1.2 + 0.22 * len(shown))
    if figure is None:
        return False
    axis = figure.subplots()
    named: set[str] = set()
    for place, entry in enumerate(shown):
        gap = entry.gap
        if entry.num_diverged or gap is None:
            axis.text(0, place, "  diverged", va="center", color="tab:red", fontsize=8)
            continue
        width = None if gap.half_width is None else [gap.half_width]
        verdict = entry.verdict
        # A label that begins with an underscore is no line of the legend.
        label = f"_{verdict}" if verdict in named else verdict
        named.add(verdict)
        colour = _COLOURS[verdict]
        axis.errorbar([gap.mean], [place], xerr=width, fmt="o", markersize=4, capsize=2, color=colour, label=label)
    axis.axvspan(-protocol.EQUAL_WITHIN, protocol.EQUAL_WITHIN, color="tab:green", alpha=0.15)
    axis.axvline(0, color="black", linewidth=0.8)
    # Gaps go from thousandths to several nats: straight where rows are equal, logarithmic beyond.
    axis.set_xscale("symlog", linthresh=protocol.EQUAL_WITHIN)
    axis.set_yticks(range(len(shown)), [entry.row.name for entry in shown], fontsize=8)
    axis.set_ylim(len(shown) - 0.5, -0.5)
    if named:
        axis.legend(loc="lower right", fontsize=8)
    axis.set(xlabel="validation loss less the baseline's, nats a token", title=title)
    save_figure(figure, [axis], path)
    return True
