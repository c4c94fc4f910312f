"""Whether gaps grow with the size of the model and with tokens per parameter: straight lines through paired gaps.

gap = a + slope * log2(x), by least squares over every pair of runs; x is the parameters of the baseline, or its tokens
a parameter: the slope is what a doubling adds, in nats a token. Where a row ran with different numbers of tokens at
different sizes, gap = a + b * log2(parameters) + c * log2(tokens) tells both apart. So do two sizes with the same steps
and learning rate, whichever is the tuned one. 95% intervals are Student's t with the deviation of the pairs from the
line or plane, as if they were normal and spread alike everywhere. A row with a run that diverged somewhere has none:
what it would have lost there is not known.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from collecting.runs import DONE

from ds_quant.cli.shared.spreads import t_quantile
from ds_quant.cli.shared.tables import markdown_table
from studying import protocol, verdicts
from studying.results import Result, tuned_rate
from studying.rows import BASELINE, Row
from studying.verdicts import Judged

GROWS, SHRINKS, NOT_TOLD = "grows", "shrinks", "not told"
_SAME_STEPS = 0.05
"""Runs whose numbers of steps differ by no more than this share are as long."""


@dataclass(frozen=True)
class Slope:
    """Of a line or a plane through `num_points` points."""

    num_points: int
    mean: float
    half_width: float
    """The 95% interval is mean - half_width to mean + half_width."""

    def interval(self) -> str:
        """As text."""
        return f"{self.mean - self.half_width:+.4f} to {self.mean + self.half_width:+.4f}"

    @property
    def verdict(self) -> str:
        """By whether the interval excludes zero."""
        if self.mean > self.half_width:
            return GROWS
        return SHRINKS if self.mean < -self.half_width else NOT_TOLD


def slope(points: Sequence[tuple[float, float]]) -> Slope | None:
    """Of the line through (x, y) by least squares; None with fewer than 3 points, or all at one x."""
    count = len(points)
    if count < 3 or len({x for x, _ in points}) < 2:
        return None
    center = math.fsum(x for x, _ in points) / count
    height = math.fsum(y for _, y in points) / count
    square = math.fsum((x - center) ** 2 for x, _ in points)
    mean = math.fsum((x - center) * (y - height) for x, y in points) / square
    left = math.fsum((y - height - mean * (x - center)) ** 2 for x, y in points)
    return Slope(count, mean, t_quantile(count - 2) * math.sqrt(left / (count - 2) / square))


def plane(points: Sequence[tuple[float, float, float]]) -> tuple[Slope, Slope] | None:
    """Slopes over x and over y of the plane through (x, y, z) by least squares; None where the points fix none."""
    values = np.array(points, dtype=np.float64).reshape(-1, 3)
    inputs = np.column_stack([np.ones(len(values)), values[:, :2]])
    degrees = len(values) - inputs.shape[1]
    if degrees < 1 or np.linalg.matrix_rank(inputs) < inputs.shape[1]:
        return None
    found = np.linalg.lstsq(inputs, values[:, 2], rcond=None)[0]
    variance = np.square(values[:, 2] - inputs @ found).sum() / degrees
    errors = np.sqrt(variance * np.linalg.inv(inputs.T @ inputs).diagonal())
    slopes = [Slope(len(values), float(found[i]), t_quantile(degrees) * float(errors[i])) for i in (1, 2)]
    return slopes[0], slopes[1]


def text(found: Sequence[Result], rows: Sequence[Row]) -> list[str]:
    """A table for each family and budget with two sizes or more, each size with two budgets, and of both together.

    And for each learning rate and number of steps that two sizes or more have.
    """
    tuned = {}
    for size, family, ratio in sorted({(r.key.size, r.key.family, r.key.ratio) for r in found}):
        rate = tuned_rate(found, size, family, ratio)
        if rate is not None:
            tuned[size, family, ratio] = rate
    lines: list[str] = []
    for family in protocol.FAMILIES:
        for ratio in sorted({group[2] for group in tuned if group[1] == family}):
            sizes = [size for size in protocol.SIZES if (size, family, ratio) in tuned]
            groups = [(size, family, ratio, tuned[size, family, ratio]) for size in sizes]
            title = f"**Does the gap grow with size?** {family}, D/N {ratio:g}"
            lines += _table(title, "parameters", groups, sizes, found, rows, lambda one: one.parameters)
        for size in protocol.SIZES:
            ratios = sorted(group[2] for group in tuned if group[:2] == (size, family))
            groups = [(size, family, ratio, tuned[size, family, ratio]) for ratio in ratios]
            title = f"**Does the gap grow with tokens per parameter?** {family}, {size}"
            names = [f"D/N {ratio:g}" for ratio in ratios]
            lines += _table(title, "D/N", groups, names, found, rows, lambda one: one.tokens / one.parameters)
        lines += _planes(family, [(*group, rate) for group, rate in tuned.items() if group[1] == family], found, rows)
        lines += _alike_but_for_size(family, found, rows)
    return ["### Growth", "", *lines] if lines else []


def _table(
    title: str,
    unit: str,
    groups: Sequence[tuple[str, str, float, float]],
    names: Sequence[str],
    found: Sequence[Result],
    rows: Sequence[Row],
    x_of: Callable[[Result], float],
    least: int = 0,
) -> list[str]:
    """least: pairs that a row needs at each place where it has run."""
    judged: list[dict[str, Judged]] = []
    places: list[float] = []
    for group in groups:
        base = next(r for r in found if r.key.group == group and r.key.row == BASELINE)
        places.append(math.log2(x_of(base)))
        judged.append({entry.row.name: entry for entry in verdicts.judge(rows, found, group)})
    lines = []
    for row in rows:
        entries = [by_name[row.name] for by_name in judged]
        if row.name == BASELINE or any(entry.num_diverged or 0 < len(entry.gaps) < least for entry in entries):
            continue
        points = [(x, gap) for x, entry in zip(places, entries, strict=True) for gap in entry.gaps]
        line = slope(points)
        if line is not None:
            gaps = ["" if entry.gap is None else f"{entry.gap.mean:+.4f}" for entry in entries]
            lines.append([row.name, *gaps, str(line.num_points), f"{line.mean:+.4f}", line.interval(), line.verdict])
    if not lines:
        return []
    header = ["row", *(f"gap, {name}" for name in names), "runs", f"a doubling of {unit}", "95% interval", ""]
    return [title, "", *markdown_table(header, lines), "", *_counted(unit, lines)]


def _planes(
    family: str, groups: Sequence[tuple[str, str, float, float]], found: Sequence[Result], rows: Sequence[Row]
) -> list[str]:
    points: dict[str, list[tuple[float, float, float]]] = {row.name: [] for row in rows}
    diverged = set()
    for group in groups:
        base = next(r for r in found if r.key.group == group and r.key.row == BASELINE)
        place = math.log2(base.parameters), math.log2(base.tokens)
        for entry in verdicts.judge(rows, found, group):
            points[entry.row.name] += [(*place, gap) for gap in entry.gaps]
            if entry.num_diverged:
                diverged.add(entry.row.name)
    lines = []
    for row in rows:
        slopes = None if row.name == BASELINE or row.name in diverged else plane(points[row.name])
        if slopes is not None:
            cells = [cell for one in slopes for cell in (f"{one.mean:+.4f}", one.interval(), one.verdict)]
            lines.append([row.name, str(slopes[0].num_points), *cells])
    if not lines:
        return []
    header = ["row", "runs"]
    for what in ("parameters", "tokens"):
        header += [f"a doubling of {what}", "95% interval", ""]
    return [f"**Size and length apart**: {family}", "", *markdown_table(header, lines), ""]


def _alike_but_for_size(family: str, found: Sequence[Result], rows: Sequence[Row]) -> list[str]:
    sizes, lines = list(protocol.SIZES), []
    base = [r for r in found if r.key.row == BASELINE and r.key.family == family and r.state == DONE]
    for rate in sorted({r.key.rate for r in base}):
        left = sorted({(r.steps, r.key.group) for r in base if r.key.rate == rate})
        while left:
            steps = left[0][0]
            alike = [group for count, group in left if count <= steps * (1 + _SAME_STEPS)]
            left = left[len(alike) :]
            # Of a size with two budgets as long, the first.
            groups = list({group[0]: group for group in reversed(alike)}.values())
            groups.sort(key=lambda group: sizes.index(group[0]))
            names = [f"{size} at D/N {ratio:g}" for size, _, ratio, _ in groups]
            title = f"**What size does by itself**: {family}, learning rate {rate:g}, {steps} steps or some more"
            least = len(protocol.SEEDS)
            lines += _table(title, "parameters", groups, names, found, rows, lambda one: one.parameters, least)
    return lines


def _counted(unit: str, lines: Iterable[Sequence[str]]) -> list[str]:
    told = [line[-1] for line in lines]
    words = ", ".join(f"{told.count(word)} {word}" for word in (GROWS, SHRINKS, NOT_TOLD))
    return [f"Of {len(told)} rows with a doubling of {unit}: {words}.", ""]
