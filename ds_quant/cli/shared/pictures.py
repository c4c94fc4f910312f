"""Pictures with matplotlib, where it is installed."""

from __future__ import annotations

import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ds_quant.base.whole_folder import write_whole

MISSING = "no picture: matplotlib is missing (pip install 'ds_quant[plot]')"


def new_figure(*, width: float, height: float) -> Any:
    """A matplotlib Figure of that size in inches; None without matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return None
    # Not pyplot: it would look for a window system and keep global state.
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Any, axes: Iterable[Any], path: Path) -> None:
    """Write it as a PNG, with a faint grid on the axes."""
    for axis in axes:
        axis.grid(alpha=0.3)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=130)
    write_whole(path, picture.getvalue())


def draw_stacks(path: Path, title: str, xlabel: str, bars: list[str], parts: dict[str, list[float]], rest: str) -> None:
    """One horizontal bar for each of `bars`: the parts' values one after the other, the part `rest` in gray."""
    figure = new_figure(width=9.5, height=1.4 + 0.42 * len(bars))
    if figure is None:
        print(MISSING)
        return
    axis = figure.subplots()
    left = [0.0] * len(bars)
    for name, values in parts.items():
        axis.barh(bars, values, left=left, label=name, color="lightgray" if name == rest else None)
        left = [a + b for a, b in zip(left, values, strict=True)]
    axis.margins(y=0.01)
    axis.invert_yaxis()
    axis.set(xlabel=xlabel, title=title)
    axis.set_axisbelow(True)
    figure.legend(loc="outside right center", fontsize=8)
    save_figure(figure, [axis], path)
    print(f"written: {path}")
