"""A few rows with short runs, held against limits that come from the spread of such runs.

Limits are made of smoke.csv, which has the same runs with other seeds: of each row the paired gaps' mean, plus and
minus what holds one more gap with a probability of 99.9%, if gaps are normal: t * deviation * sqrt(1 + 1 / n). To these
come TOLERANCE nats, since another processor rounds otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from collecting.runs import DONE

from ds_quant.cli.shared.errors import CommandError
from ds_quant.cli.shared.spreads import Spread
from studying import plan, results
from studying.plan import Settings
from studying.results import Result
from studying.rows import BASELINE, Row
from studying.training import Training

PATH = results.PATH.parent / "smoke.csv"
ROWS = ("w8a8", "g4_tensor")
"""One that should be about the baseline, and one that should not: weights in 4 bits take more steps to show."""
SIZE, FAMILY, RATIO, RATE = "0.7m", "llama", 0.15, 4e-3
SEED = 100
"""Of the smoke run; limits are made of others."""
TOLERANCE = 0.01
# Two-sided 99.9% of Student's t with 4 to 10 degrees of freedom.
_T999 = {4: 8.610, 5: 6.869, 6: 5.959, 7: 5.408, 8: 5.041, 9: 4.781, 10: 4.587}


@dataclass(frozen=True)
class Limits:
    """Where the gap of one more run of a row lies; `loss` that of the baseline."""

    low: float
    high: float

    def hold(self, value: float) -> bool:
        """NaN is never held."""
        return self.low <= value <= self.high


def limits(values: Sequence[float]) -> Limits:
    """Of figures of 5 to 11 seeds. Raises CommandError for another number."""
    degrees = len(values) - 1
    if degrees not in _T999:
        raise CommandError(f"smoke: got {len(values)} seeds; allowed: 5 to 11; measure them with --seeds 0-4")
    spread = Spread.of(values)
    assert spread.mean is not None
    assert spread.deviation is not None
    width = _T999[degrees] * spread.deviation * math.sqrt(1 + 1 / len(values)) + TOLERANCE
    return Limits(spread.mean - width, spread.mean + width)


def measured(found: Sequence[Result]) -> dict[str, Limits]:
    """Limits of the baseline's loss and of each row's gap, from the runs of smoke.csv."""
    losses = {name: _losses(found, name) for name in (BASELINE, *ROWS)}
    made = {BASELINE: limits(list(losses[BASELINE].values()))}
    for name in ROWS:
        made[name] = limits([losses[name][seed] - losses[BASELINE][seed] for seed in losses[name]])
    return made


def run(
    settings: Settings, rows: Mapping[str, Row], where: Mapping[str, Any], seeds: Sequence[int] | None, *, at_once: int
) -> int:
    """Train and compare; with `seeds`, measure what limits are made of instead. Returns the exit code."""
    csv = settings.runs / "smoke.csv" if seeds is None else PATH
    training = Training(settings, rows, csv, where, at_once=at_once)
    names = (BASELINE, *ROWS)
    failed = training.run(
        plan.keys(names, seeds=[SEED] if seeds is None else seeds, rates=[RATE], size=SIZE, family=FAMILY, ratio=RATIO)
    )
    if failed or seeds is not None:
        return 1 if failed else 0
    return compare(list(results.read(csv).values()), list(results.read(PATH).values()))


def compare(now: Sequence[Result], before: Sequence[Result]) -> int:
    """Print each figure beside its limits; 1 if one is outside."""
    made = measured(before)
    # A run that diverged has no loss, and NaN is outside.
    losses = {name: _losses(now, name).get(SEED, math.nan) for name in (BASELINE, *ROWS)}
    code = 0
    for name, loss in losses.items():
        value = loss if name == BASELINE else loss - losses[BASELINE]
        held = made[name].hold(value)
        code = code if held else 1
        what = "loss" if name == BASELINE else "gap"
        allowed = f"{made[name].low:+.4f} to {made[name].high:+.4f}"
        print(f"{'ok' if held else 'OUTSIDE'}: {name}: {what} {value:+.4f}, {allowed}")
    return code


def _losses(found: Sequence[Result], name: str) -> dict[int, float]:
    group = (SIZE, FAMILY, RATIO, RATE)
    own = [r for r in found if r.key.row == name and r.key.group == group]
    return {r.key.seed: r.loss for r in own if r.state == DONE}
