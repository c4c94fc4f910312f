"""The loss along one or two random filter-normalized directions through the trained weights (arXiv 1712.09913)."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ds_quant.base.errors import fail
from ds_quant.diagnostics.measurement import Measurement, Row
from ds_quant.diagnostics.perturbation import (
    Loss,
    check_movable,
    evaluating,
    filter_normalized_direction,
    language_loss,
    move,
    restored,
)


def landscape(
    model: nn.Module,
    batches: Iterable[Any],
    loss_of: Loss = language_loss,
    *,
    directions: list[list[Tensor]] | None = None,
    dimensions: int = 1,
    points: int = 21,
    span: float = 1.0,
    seed: int = 0,
    step: int | None = None,
) -> Measurement:
    """The mean loss over `batches` at a line or a grid of points around the weights.

    Points lie at w + x d (+ y e), x and y from -span to span in `points` equal steps, so that an odd number has the
    weights themselves in its middle. d and e are random and filter-normalized, from `seed`, or `directions`, one tensor
    for each trainable parameter. Parameters end with the bits that they had.

    Raises:
        ConfigError: an argument is out of range, no batches, or parameters that cannot be moved.
    """
    where = "diagnostics: landscape"
    if dimensions not in (1, 2):
        raise fail(f"{where}: dimensions", dimensions, "1 or 2", "set one of them")
    if points < 3 or points % 2 == 0:
        raise fail(f"{where}: points", points, "an odd number, 3 or more", "set 21 for a line, 11 for a plane")
    if not (math.isfinite(span) and span > 0):
        raise fail(f"{where}: span", span, "a positive number", "1 reaches twice the weights and zero")
    parameters = list(check_movable(model, where).values())
    batches = list(batches)
    if not batches:
        raise fail(where, "no batches", "at least one", "give more text")
    if directions is None:
        directions = [filter_normalized_direction(model, 2 * seed + number) for number in range(dimensions)]
    half = points // 2
    offsets = [span * number / half for number in range(-half, half + 1)]
    places = [(x,) for x in offsets] if len(directions) == 1 else [(x, y) for x in offsets for y in offsets]
    rows: list[Row] = []
    with evaluating(model), restored(parameters) as origin, torch.no_grad():
        for place in places:
            move(parameters, origin, zip(place, directions, strict=True))
            loss = sum(float(loss_of(model, batch)) for batch in batches) / len(batches)
            rows.append({**dict(zip(("x", "y"), place, strict=False)), "loss": loss})
    losses = {place: float(row["loss"] or 0) for place, row in zip(places, rows, strict=True)}
    center = losses[(0.0,) * len(directions)]
    scalars = {"loss": center, "lowest": min(losses.values()), "highest": max(losses.values())}
    h = offsets[half + 1]
    for number in range(len(directions)):
        before, after = (tuple(s * h if axis == number else 0.0 for axis in range(len(directions))) for s in (-1, 1))
        scalars[f"curvature_{number + 1}"] = (losses[before] - 2 * center + losses[after]) / h**2
    settings: dict[str, Any] = {
        "dimensions": len(directions),
        "points": points,
        "span": span,
        "seed": seed,
        "batches": len(batches),
    }
    return Measurement("landscape", step, scalars, rows, settings)
