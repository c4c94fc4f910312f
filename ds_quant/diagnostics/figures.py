"""A picture of each kind of diagnostic, and one sentence on what it shows, with the numbers that are in it.

matplotlib is optional; `check_matplotlib` says so before anything is measured.
"""

import io
import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from ds_quant.base.errors import fail
from ds_quant.diagnostics import sentences
from ds_quant.diagnostics.measurement import Measurement

MOST_LAYERS = 60
"""Layers that a bar chart has names for; more are drawn as a line over their number."""

COLORS = ("#3b6fb6", "#c8553d", "#4c956c", "#8e6c8a", "#d9a441", "#5b8e9e")

Looks = Sequence[Measurement]


def check_matplotlib() -> None:
    """Raise ConfigError where there is no matplotlib."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise fail(
            "diagnostics: pictures", "no matplotlib", "matplotlib 3.10 or newer", "pip install 'ds_quant[plot]'"
        ) from error


def draw(kind: str, measurements: Looks) -> list[tuple[Any, str]]:
    """Matplotlib Figures of measurements of one kind, oldest first, each with what it shows here in a sentence or two.

    Raises:
        ConfigError: `measurements` has other kinds too, or matplotlib is missing.
    """
    check_matplotlib()
    return [(_DRAW[kind](looks), sentences.SENTENCES[kind](looks)) for looks in _groups(kind, measurements)]


def explain(kind: str, measurements: Looks) -> list[str]:
    """The sentences of `draw`, which take no matplotlib. Raises ConfigError where `measurements` has other kinds."""
    return [sentences.SENTENCES[kind](looks) for looks in _groups(kind, measurements)]


def png(figure: Any) -> bytes:
    """A Figure as the contents of a PNG file."""
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=110)
    return picture.getvalue()


def _groups(kind: str, measurements: Looks) -> list[list[Measurement]]:
    if others := sorted({found.kind for found in measurements} - {kind}):
        raise fail(f"diagnostics: pictures of {kind}", others, "measurements of one kind", "draw each kind by itself")
    groups: dict[Any, list[Measurement]] = {}
    for found in measurements:
        groups.setdefault(_group(found), []).append(found)
    return list(groups.values())


def is_history(found: Measurement) -> bool:
    """Whether these are norms a step rather than a parameter."""
    return bool(found.rows) and "spike" in found.rows[0]


def _group(found: Measurement) -> Any:
    """What goes into one picture: looks at one run, whose steps or layers can be laid side by side."""
    settings = found.settings
    run = (str(settings.get("name", "")).partition("/")[0], settings.get("quantizers"))
    if found.kind == "landscape":
        return settings["dimensions"] if settings["dimensions"] == 1 else (found.step, run, settings.get("name"))
    if found.kind == "sharpness":
        return None
    return run, is_history(found), settings.get("moment")


# ---- parts


def _new(columns: int = 1, *, height: float = 3.4, width: float = 9.0) -> tuple[Any, list[Any]]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # Not pyplot: it would look for a window system and keep global state.
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, list(figure.subplots(1, columns, squeeze=False)[0])


def _height(count: int) -> float:
    return 3.4 if count > MOST_LAYERS else max(2.6, 0.8 + 0.2 * count)


def _short(names: Sequence[str]) -> list[str]:
    """Names without the part that nearly all of them begin with (an output embedding stands apart)."""
    for _ in range(3):
        heads = Counter(name.partition(".")[0] for name in names if "." in name)
        head, count = heads.most_common(1)[0] if heads else ("", 0)
        if head.isdigit() or count < 0.8 * len(names):
            break
        names = [name.removeprefix(f"{head}.") for name in names]
    return list(names)


def _bars(
    axis: Any,
    names: Sequence[str],
    series: dict[str, list[float]],
    label: str,
    *,
    log: bool = False,
    named: bool = True,
) -> None:
    """Values by layer, the first layer on top; more than `MOST_LAYERS` as lines over the layers' number.

    named: False where the picture beside it has the names of the same layers.
    """
    if len(names) > MOST_LAYERS:
        for (name, values), color in zip(series.items(), COLORS, strict=False):
            axis.plot(range(len(names)), values, ".-", color=color, label=name, linewidth=0.8)
        axis.set(xlabel="layer", ylabel=label)
        if log:
            axis.set_yscale("log")
    else:
        thickness = 0.8 / len(series)
        for number, ((name, values), color) in enumerate(zip(series.items(), COLORS, strict=False)):
            places = [row - 0.4 + (number + 0.5) * thickness for row in range(len(names))]
            shown = [value if math.isfinite(value) else 0.0 for value in values]
            axis.barh(places, shown, height=thickness, color=color, label=name)
        axis.set_yticks(range(len(names)), _short(names) if named else [""] * len(names), fontsize=7)
        axis.set_ylim(len(names) - 0.5, -0.5)
        axis.set_xlabel(label)
        if log:
            axis.set_xscale("log")
            # Within a decade its numbers are long, and many.
            axis.tick_params(axis="x", which="both", labelsize=7, labelrotation=45)
        else:
            axis.xaxis.get_major_locator().set_params(nbins=5)
    if len(series) > 1:
        axis.legend(fontsize=7, loc="lower right", bbox_to_anchor=(1, 1), ncols=len(series), frameon=False)
    axis.grid(alpha=0.25)


def _over_steps(axis: Any, looks: Looks, names: dict[str, str], label: str) -> None:
    """Scalars over the steps of the looks; `names` are those of the scalars, with what the legend calls them."""
    for (name, shown), color in zip(names.items(), COLORS, strict=False):
        points = [(found, found.scalars[name]) for found in looks if name in found.scalars]
        places = [number if found.step is None else found.step for number, (found, _) in enumerate(points)]
        axis.plot(places, [value for _, value in points], "o-", markersize=3, color=color, label=shown)
    axis.set(xlabel="step", ylabel=label)
    axis.xaxis.get_major_locator().set_params(integer=True)
    if len(names) > 1:
        axis.legend(fontsize=7)
    axis.grid(alpha=0.25)


def _column(rows: Sequence[Any], name: str) -> list[float]:
    return [math.nan if row.get(name) is None else float(row[name]) for row in rows]


def _names(rows: Sequence[Any], key: str = "layer") -> list[str]:
    return [str(row[key]) for row in rows]


def _title(axis: Any, found: Measurement, text: str) -> None:
    axis.set_title(text if found.step is None else f"{text}, step {found.step}", fontsize=9, loc="left", pad=18)


# ---- one for each kind


def _outliers(looks: Looks) -> Any:
    last = looks[-1]
    figure, axes = _new(2 if len(looks) > 1 else 1, height=_height(len(last.rows)))
    rows = last.rows
    ratio = _column(rows, "largest_over_mean")
    mean = _column(rows, "mean")
    threshold = [t / m if m else math.nan for t, m in zip(_column(rows, "threshold"), mean, strict=True)]
    series = {"largest channel": ratio, "threshold (mean + 6 std)": threshold}
    _bars(axes[0], _names(rows), series, "mean |x| of the channel / mean of the layer")
    _title(axes[0], last, "Largest input channel")
    if len(looks) > 1:
        _over_steps(axes[1], looks, {"outlier_channels": "channels"}, "outlier channels, all layers")
    return figure


def _sharpness(looks: Looks) -> Any:
    if len(looks) == 1:
        figure, (axis,) = _new(height=2.8)
        values = _column(looks[0].rows, "sharpness")
        axis.bar(range(len(values)), values, color=COLORS[0])
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.axhline(looks[0].scalars["sharpness"], color=COLORS[1], label="mean")
        axis.set(xlabel="batch", ylabel="loss rise (nats)")
        axis.legend(fontsize=7)
        axis.grid(alpha=0.25)
        _title(axis, looks[0], "Loss rise one step up the gradient")
        return figure
    figure, (axis,) = _new(height=2.8)
    errors = [found.scalars.get("standard_error", 0.0) for found in looks]
    labels = [sentences.label_of(found, number) for number, found in enumerate(looks)]
    values = [found.scalars["sharpness"] for found in looks]
    axis.errorbar(range(len(looks)), values, yerr=errors, fmt="o-", color=COLORS[0], capsize=3)
    axis.set_xticks(range(len(looks)), labels, fontsize=7)
    axis.set_ylabel("sharpness (nats)")
    axis.grid(alpha=0.25)
    return figure


def _landscape(looks: Looks) -> Any:
    figure, (axis,) = _new(height=3.8, width=6.5)
    if looks[0].settings["dimensions"] == 1:
        for number, (found, color) in enumerate(zip(looks, COLORS * len(looks), strict=False)):
            xs, losses = _column(found.rows, "x"), _column(found.rows, "loss")
            axis.plot(xs, losses, "o-", markersize=3, color=color, label=sentences.label_of(found, number))
        axis.set(xlabel="along a random direction (1: as long as the weights)", ylabel="loss (nats per token)")
        axis.legend(fontsize=7)
        axis.grid(alpha=0.25)
        return figure
    found = looks[-1]
    offsets = sorted(set(_column(found.rows, "x")))
    losses_at = {(row["x"], row["y"]): row["loss"] for row in found.rows}
    grid = [[losses_at[x, y] for x in offsets] for y in offsets]
    drawn = axis.contourf(offsets, offsets, grid, levels=18, cmap="viridis")
    figure.colorbar(drawn, ax=axis, label="loss (nats per token)")
    axis.plot(0, 0, "+", color="white")
    axis.set(xlabel="first direction", ylabel="second direction", aspect="equal")
    axis.set_title(sentences.label_of(found, 0), fontsize=9)
    return figure


def _gradient_error(looks: Looks) -> Any:
    last = looks[-1]
    figure, axes = _new(2, height=_height(len(last.rows)))
    _bars(
        axes[0],
        _names(last.rows),
        {"L2": _column(last.rows, "relative_l2"), "L1": _column(last.rows, "relative_l1")},
        "relative error of the weight gradient",
    )
    _title(axes[0], last, "Quantized against exact")
    if len(looks) > 1:
        _over_steps(axes[1], looks, {"relative_l2": "L2", "relative_l1": "L1"}, "relative error, all layers")
    else:
        angles = {"1 - cosine": [1 - cosine for cosine in _column(last.rows, "cosine")]}
        _bars(axes[1], _names(last.rows), angles, "1 - cosine", named=False)
    return figure


def _gradient_norms(looks: Looks) -> Any:
    if is_history(looks[0]):
        return _norm_history(looks)
    last = looks[-1]
    rows = [row for row in last.rows if row.get("output_zero") is not None] or last.rows
    figure, axes = _new(2, height=_height(len(rows)))
    _bars(axes[0], _names(rows, "parameter"), {"norm": _column(rows, "norm")}, "gradient norm", log=True)
    _title(axes[0], last, "Weight gradients")
    shares = {"becomes 0 with 4 bits": "becomes_zero_4", "becomes 0 with 8 bits": "becomes_zero_8", "is 0": "zero"}
    series = {text: _column(rows, f"output_{name}") for text, name in shares.items()}
    _bars(axes[1], _names(rows, "parameter"), series, "share of the output gradient", named=False)
    return figure


def _norm_history(looks: Looks) -> Any:
    figure, (axis,) = _new(height=2.8)
    rows = [row for found in looks for row in found.rows]
    axis.plot(_column(rows, "step"), _column(rows, "norm"), color=COLORS[0], linewidth=0.9)
    spikes = [row for row in rows if row["spike"]]
    if spikes:
        axis.plot(_column(spikes, "step"), _column(spikes, "norm"), "o", color=COLORS[1], label="spike")
        axis.legend(fontsize=7)
    axis.set(xlabel="step", ylabel="gradient norm before clipping", yscale="log")
    axis.grid(alpha=0.25)
    return figure


def _moments(looks: Looks) -> Any:
    last = looks[-1]
    figure, (axis,) = _new(height=3.8)
    names = [name for name in last.rows[0] if name != "bin"]
    places = range(len(last.rows))
    for name, color in zip(names, ("black", *COLORS * len(names)), strict=False):
        axis.step(places, _column(last.rows, name), where="mid", color=color, label=name, linewidth=1.0)
        axis.plot(0, _column(last.rows, name)[0], "o", color=color, markersize=4)
    every = max(1, len(last.rows) // 16)
    shown = [number for number in places if number == 0 or number % every == 1 % every]
    axis.set_xticks(shown, [str(last.rows[number]["bin"]) for number in shown], fontsize=7, rotation=45)
    axis.set(xlabel=f"{last.settings['moment']} (the zeros on the left)", ylabel="share of the elements", yscale="log")
    axis.legend(fontsize=7)
    axis.grid(alpha=0.25)
    _title(axis, last, "Before and after quantization")
    return figure


def _quantization_error(looks: Looks) -> Any:
    last = looks[-1]
    operands = list(dict.fromkeys(str(row["operand"]) for row in last.rows))
    layers = list(dict.fromkeys(_names(last.rows)))
    series = {}
    for operand in operands:
        found = {str(row["layer"]): row["snr_db"] for row in last.rows if row["operand"] == operand}
        series[operand] = [float(found.get(layer) or math.nan) for layer in layers]
    figure, axes = _new(2 if len(looks) > 1 else 1, height=_height(len(layers)))
    _bars(axes[0], layers, series, "signal to quantization noise (dB)")
    _title(axes[0], last, "By layer")
    if len(looks) > 1:
        _over_steps(axes[1], looks, {f"{name}_snr_db": name for name in operands}, "dB, all layers")
    return figure


def _oscillation(looks: Looks) -> Any:
    last = looks[-1]
    figure, axes = _new(2, height=_height(len(last.rows)))
    names = {"changed": "code changed", "reversed": "reversed", "near_threshold": "near a threshold"}
    _bars(axes[0], _names(last.rows), {text: _column(last.rows, name) for name, text in names.items()}, "share")
    _title(axes[0], last, "Weights since the look before")
    _over_steps(axes[1], looks, names, "share of the weights, all layers")
    return figure


_DRAW: dict[str, Callable[[Looks], Any]] = {
    "outliers": _outliers,
    "sharpness": _sharpness,
    "landscape": _landscape,
    "gradient_error": _gradient_error,
    "gradient_norms": _gradient_norms,
    "moments": _moments,
    "quantization_error": _quantization_error,
    "oscillation": _oscillation,
}
