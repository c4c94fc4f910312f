"""What a diagnostic's picture shows, said with the numbers of the measurements themselves."""

import math
from collections.abc import Callable, Sequence
from typing import Any

from ds_quant.diagnostics.measurement import Measurement
from ds_quant.diagnostics.outliers import persistence

Looks = Sequence[Measurement]


def label_of(found: Measurement, number: int) -> str:
    """The label of a measurement in a picture: the checkpoint's name, its step, or its number."""
    name, quantizers = found.settings.get("name"), found.settings.get("quantizers")
    if name is not None:
        return f"{name}, {quantizers}" if quantizers else str(name)
    return f"look {number + 1}" if found.step is None else f"step {found.step}"


def _at(found: Measurement) -> str:
    return "" if found.step is None else f" at step {found.step}"


def _percent(share: float) -> str:
    return f"{share:.2%}" if share < 0.1 else f"{share:.1%}"


def _extreme(rows: Sequence[Any], name: str, *, largest: bool = True) -> Any:
    """The row with the largest or smallest finite value; None where no row has one."""
    found = [row for row in rows if row.get(name) is not None and math.isfinite(float(row[name]))]
    return (max if largest else min)(found, key=lambda row: float(row[name])) if found else None


def _outliers(looks: Looks) -> str:
    last = looks[-1]
    scalars, worst = last.scalars, _extreme(last.rows, "largest_over_mean")
    count, bound = int(scalars["outlier_channels"]), f"mean + {last.settings['num_std']:g} std{_at(last)}"
    text = f"No input channel of {len(last.rows)} layers exceeds {bound}"
    if count:
        who = "1 input channel" if count == 1 else f"{count} input channels"
        layers = f"{int(scalars['layers_with_outliers'])} of {len(last.rows)} layers"
        verb = "exceeds" if count == 1 else "exceed"
        text = f"{who} ({_percent(scalars['outlier_share'])}) in {layers} {verb} {bound}"
    if worst is not None:
        text += f"; the largest channel is {worst['largest_over_mean']:.1f} times its layer's mean, in {worst['layer']}"
    if len(looks) > 1 and len({tuple(row["layer"] for row in found.rows) for found in looks}) == 1:
        kept = [item for item in persistence(looks) if item["before"]]
        if kept:
            share = sum(item["kept"] for item in kept) / sum(item["before"] for item in kept)
            text += f"; over {len(looks)} looks {_percent(share)} of the outlier channels stay so until the next look"
    return text + "."


def _sharpness(looks: Looks) -> str:
    last = looks[-1]
    error = last.scalars.get("standard_error")
    spread = "" if error is None else f" (standard error {error:.2g})"
    text = (
        f"A step of length {last.settings['rho']:g} up the gradient raises the loss of {last.scalars['loss']:.4f} by "
        f"{last.scalars['sharpness']:.4f} nats{spread}{_at(last)}"
    )
    if len(looks) > 1:
        order = sorted(range(len(looks)), key=lambda number: looks[number].scalars["sharpness"])
        flat, sharp = (f"{label_of(looks[n], n)} ({looks[n].scalars['sharpness']:.4f})" for n in (order[0], order[-1]))
        text += f"; of {len(looks)} measurements {sharp} is the sharpest and {flat} the flattest"
    return text + "."


def _landscape(looks: Looks) -> str:
    last = looks[-1]
    scalars, number = last.scalars, len(looks) - 1
    where = "a line" if last.settings["dimensions"] == 1 else "a plane"
    curved = ", ".join(f"{scalars[name]:.3g}" for name in scalars if name.startswith("curvature"))
    below = scalars["loss"] - scalars["lowest"]
    bottom = "no point lies lower" if below <= 0 else f"the lowest point lies {below:.4f} nats below it"
    text = (
        f"{label_of(last, number)}: from {scalars['loss']:.4f} nats at the weights the loss rises by up to "
        f"{scalars['highest'] - scalars['loss']:.4f} along {where} out to {last.settings['span']:g}, its curvature at "
        f"the weights is {curved}, and {bottom}"
    )
    if len(looks) > 1:
        order = sorted(range(len(looks)), key=lambda number: looks[number].scalars["curvature_1"])
        least, most = (
            f"{label_of(looks[n], n)} ({looks[n].scalars['curvature_1']:.3g})" for n in (order[0], order[-1])
        )
        text += f"; of {len(looks)} lines {most} is curved most and {least} least"
    return text + "."


def _gradient_error(looks: Looks) -> str:
    last = looks[-1]
    scalars, worst = last.scalars, _extreme(last.rows, "relative_l2")
    text = (
        f"Over all layers the quantized weight gradients have a relative L2 error of {scalars['relative_l2']:.3g} and "
        f"a cosine of {scalars['cosine']:.5f} to the exact ones{_at(last)}"
    )
    if worst is not None:
        text += f"; the worst layer is {worst['layer']} with {worst['relative_l2']:.3g} and {worst['cosine']:.5f}"
    return text + "."


def _gradient_norms(looks: Looks) -> str:
    last = looks[-1]
    if last.rows and "spike" in last.rows[0]:
        rows = [row for found in looks for row in found.rows]
        spikes, largest = sum(int(row["spike"] or 0) for row in rows), _extreme(rows, "norm")
        where = "" if largest is None else f"; the largest is {largest['norm']:.3g} at step {largest['step']}"
        return (
            f"{spikes} of {len(rows)} gradient norms exceed {last.settings['factor']:g} times the median of those "
            f"before them{where}."
        )
    worst = _extreme(last.rows, "norm")
    where = "" if worst is None else f", the largest part {worst['norm']:.3g} in {worst['parameter']}"
    text = f"The norm of a micro-batch's gradient is {last.scalars['norm']:.3g}{where}{_at(last)}"
    if "output_becomes_zero_8" in last.scalars:
        zero, eight, four = (last.scalars[f"output_{name}"] for name in ("zero", "becomes_zero_8", "becomes_zero_4"))
        text += (
            f"; of the output gradients {_percent(zero)} are zero, {_percent(eight)} would be with 8 bits and one "
            f"scale, {_percent(four)} with 4"
        )
    return text + "."


def _moments(looks: Looks) -> str:
    last = looks[-1]
    shares = {name.partition("/")[2]: value for name, value in last.scalars.items() if name.startswith("becomes_zero/")}
    said = ", ".join(f"{_percent(share)} with {label}" for label, share in shares.items())
    return f"Of {last.settings['moment']} there becomes zero{_at(last)}: {said}."


def _quantization_error(looks: Looks) -> str:
    last = looks[-1]
    parts = []
    for operand in ("weight", "activation"):
        rows = [row for row in last.rows if row["operand"] == operand]
        if rows:
            worst = _extreme(rows, "relative_l2")
            where = "" if worst is None else f", most in {worst['layer']} ({_percent(worst['relative_l2'])})"
            bits = ", ".join(map(str, sorted({int(row["bits"] or 0) for row in rows})))
            lost, decibels = (last.scalars[f"{operand}_{name}"] for name in ("relative_l2", "snr_db"))
            parts.append(f"{operand}s in {bits} bits lose {_percent(lost)} of their norm ({decibels:.1f} dB){where}")
    text = "; ".join(parts)
    return f"{text[0].upper()}{text[1:]}{_at(last)}."


def _oscillation(looks: Looks) -> str:
    last = looks[-1]
    scalars, bound = last.scalars, last.settings["near"]
    near = (
        f"{_percent(scalars['near_threshold'])} of the weights lie within {bound:g} scales of a decision threshold "
        f"(evenly spread ones: {_percent(2 * bound)})"
    )
    if "changed" not in scalars:
        return f"{near}{_at(last)}; how many codes change takes a second look."
    text = f"{_percent(scalars['changed'])} of the codes have changed since the look before{_at(last)}"
    if "reversed" in scalars:
        share = scalars["reversed"] / scalars["changed"] if scalars["changed"] else 0.0
        text += f", and {_percent(share)} of these changes go back the way that the weight came"
    return f"{text}; {near}."


SENTENCES: dict[str, Callable[[Looks], str]] = {
    "outliers": _outliers,
    "sharpness": _sharpness,
    "landscape": _landscape,
    "gradient_error": _gradient_error,
    "gradient_norms": _gradient_norms,
    "moments": _moments,
    "quantization_error": _quantization_error,
    "oscillation": _oscillation,
}
