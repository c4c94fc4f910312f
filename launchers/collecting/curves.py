"""Plots the validation curves of all runs in one figure."""

from __future__ import annotations

import colorsys
import math
from collections.abc import Sequence
from pathlib import Path

from pretraining import plots

from collecting.runs import Run

# A run starts near the logarithm of its vocabulary size, at about ten nats. One that explodes would hide the others.
_HIGHEST = 20.0


def draw(runs: Sequence[Run], path: Path) -> bool:
    """One colour per config, one thin line per seed, up to 20 nats per token. False without matplotlib."""
    configs = list(dict.fromkeys(run.config for run in runs if run.evaluations))
    # The legend has one line per config.
    figure = plots.new_figure(width=9.0, height=max(5.0, 0.5 + 0.18 * len(configs)))
    if figure is None:
        return False
    axis = figure.subplots()
    for place, config in enumerate(configs):
        # matplotlib has ten default colours.
        colour = f"C{place}" if len(configs) <= 10 else colorsys.hsv_to_rgb(place / len(configs), 0.9, 0.8)
        label: str | None = _label(config)
        for run in runs:
            if run.config != config or not run.evaluations:
                continue
            steps = sorted(run.evaluations)
            # NaN breaks the line.
            losses = [loss if abs(loss := run.evaluations[step]) <= _HIGHEST else math.nan for step in steps]
            axis.plot(steps, losses, color=colour, linewidth=0.8, marker="o", markersize=1.5, label=label)
            label = None
    axis.set(xlabel="step", ylabel="validation loss (nats per token)", title="A line a run, a colour a config")
    if configs:
        figure.legend(loc="outside right upper", fontsize=8)
    plots.save_figure(figure, [axis], path)
    return True


def _label(config: str) -> str:
    # A dollar sign starts a formula, and a leading underscore hides a line from the legend.
    return (" " if config.startswith("_") else "") + config.replace("$", r"\$")
