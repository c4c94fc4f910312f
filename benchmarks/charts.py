"""Pictures of benchmarks: bars of a few contenders side by side, and stacks of what a step's time consists of.

Without matplotlib a line says so, and nothing is drawn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ds_quant.cli.shared.pictures import MISSING, draw_stacks, new_figure, save_figure

__all__ = ["draw_speed_ups", "draw_stacks"]


def draw_speed_ups(path: Path, title: str, rows: Sequence[Mapping[str, Any]], by: str, base: str) -> None:
    """Bars of every contender's speed-up over `base` and its percentiles, a group for each value of the column `by`."""
    groups = list(dict.fromkeys(row[by] for row in rows))
    names = [name for name in dict.fromkeys(row["contender"] for row in rows) if name != base]
    figure = new_figure(width=3.0 + 1.8 * max(3, len(groups)), height=4.6)
    if figure is None:
        print(MISSING)
        return
    axis = figure.subplots()
    width = 0.84 / max(1, len(names))
    for number, name in enumerate(names):
        # A contender that could not run in one group has no bar there.
        own = [row for row in rows if row["contender"] == name]
        places = [groups.index(row[by]) + (number - (len(names) - 1) / 2) * width for row in own]
        middle = [1 / row["ratio_p50"] for row in own]
        below = [1 / row["ratio_p50"] - 1 / row["ratio_p80"] for row in own]
        above = [1 / row["ratio_p20"] - 1 / row["ratio_p50"] for row in own]
        axis.bar(
            places, middle, width, yerr=[below, above], label=name, color=f"C{number}", error_kw={"linewidth": 0.8}
        )
    axis.axhline(1, color="black", linewidth=0.8)
    axis.set_xticks(range(len(groups)), groups)
    axis.set(ylabel=f"times as fast as {base}", title=title)
    axis.set_axisbelow(True)
    figure.legend(loc="outside right center", fontsize=8)
    save_figure(figure, [axis], path)
    print(f"written: {path}")
