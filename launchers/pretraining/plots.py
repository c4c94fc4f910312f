"""Plots of loss curves."""

from __future__ import annotations

from pathlib import Path

from ds_quant.cli.shared.pictures import new_figure, save_figure

__all__ = ["Rows", "draw_comparison", "draw_curves", "new_figure", "save_figure", "series"]

Rows = list[dict[str, float | None]]


def series(rows: Rows, column: str) -> tuple[list[float], list[float]]:
    """Steps and values of `column` where it was measured."""
    points = [(row["step"], row[column]) for row in rows if row[column] is not None]
    return [float(step or 0) for step, _ in points], [float(value or 0) for _, value in points]


def draw_curves(rows: Rows, path: Path, title: str) -> bool:
    """Training and validation loss, gradient norm and learning rate of one run. False without matplotlib."""
    figure = new_figure(width=9.0, height=3.6)
    if figure is None:
        return False
    left, right = figure.subplots(1, 2)
    left.plot(*series(rows, "train_loss"), color="tab:blue", alpha=0.5, label="training")
    left.plot(*series(rows, "eval_loss"), color="tab:blue", marker="o", markersize=3, label="validation")
    left.set(xlabel="step", ylabel="loss (nats per token)", title=title)
    left.legend()
    right.plot(*series(rows, "grad_norm"), color="tab:green")
    right.set(xlabel="step", title="gradient norm and learning rate")
    right.set_ylabel("gradient norm", color="tab:green")
    twin = right.twinx()
    twin.plot(*series(rows, "lr"), color="tab:red")
    twin.set_ylabel("learning rate", color="tab:red")
    save_figure(figure, [left, right], path)
    return True


def draw_comparison(runs: dict[str, Rows], gap: tuple[list[float], list[float]], path: Path) -> bool:
    """Validation curves of two runs above the gap between them. False without matplotlib."""
    figure = new_figure(width=7.0, height=6.0)
    if figure is None:
        return False
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    for (name, rows), style in zip(runs.items(), ("-", "--"), strict=True):
        above.plot(*series(rows, "eval_loss"), style, marker="o", markersize=3, label=name)
    above.set(ylabel="validation loss (nats per token)")
    above.legend()
    below.axhline(0, color="black", linewidth=0.8)
    below.plot(*gap, color="tab:purple", marker="o", markersize=3)
    below.set(xlabel="step", ylabel="gap (nats)")
    names = list(runs)
    below.set_title(f"{names[1]} minus {names[0]}", fontsize=9)
    save_figure(figure, [above, below], path)
    return True
