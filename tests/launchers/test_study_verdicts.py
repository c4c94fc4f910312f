"""The study: verdicts from figures, and the limits of the smoke runs."""

from __future__ import annotations

import dataclasses
import math
import random
import statistics
from typing import Any

import pytest
from helpers.study_results import ROWS, a_result
from scipy import stats
from studying import protocol, results, smoke, verdicts
from studying.plan import Key
from studying.results import Result

from ds_quant.cli.shared.errors import CommandError
from ds_quant.cli.shared.spreads import Gap

GROUP = ("0.7m", "llama", 1.0, 0.002)


def judged(row: str, found: list[Result]) -> verdicts.Judged:
    return next(entry for entry in verdicts.judge(list(ROWS.values()), found, GROUP) if entry.row.name == row)


def test_an_interval_is_that_of_students_t_over_paired_seeds() -> None:
    for count in (2, 3, 8):
        base = [5 + random.random() for _ in range(count)]
        own = [loss + random.gauss(0.1, 0.02) for loss in base]
        found = [a_result("baseline", seed, loss) for seed, loss in enumerate(base)]
        found += [a_result("w4_channel", seed, loss) for seed, loss in enumerate(own)]
        random.shuffle(found)
        gap = judged("w4_channel", found).gap
        gaps = [one - other for one, other in zip(own, base, strict=True)]
        low, high = stats.t.interval(0.95, count - 1, statistics.fmean(gaps), stats.sem(gaps))
        assert gap is not None
        assert gap.half_width is not None
        assert (gap.mean - gap.half_width, gap.mean + gap.half_width) == pytest.approx((low, high), abs=1e-4)


@pytest.mark.parametrize(
    ("mean", "half", "pairs", "diverged", "expected"),
    [
        (0.0, 0.02, 3, 0, "equal"),
        (0.01, 0.009, 3, 0, "equal"),  # above zero, and within 0.02
        (0.0, 0.0201, 3, 0, "undecided"),
        (0.03, 0.02, 3, 0, "degraded"),
        (0.03, 0.03, 3, 0, "undecided"),
        (-0.03, 0.02, 3, 0, "better"),
        (0.5, 0.01, 2, 0, "undecided"),
        (0.0, None, 1, 0, "undecided"),
        (0.0, 0.001, 3, 1, "diverged"),
    ],
)
def test_verdicts(mean: float, half: float | None, pairs: int, diverged: int, expected: str) -> None:
    assert verdicts.verdict(Gap(pairs, mean, half), diverged) == expected


def test_only_like_runs_are_paired() -> None:
    base = [a_result("baseline", seed, 5.0) for seed in range(3)]
    good = [a_result("w8_tensor", seed, 5.1) for seed in range(2)]
    others = [
        a_result("w8_tensor", 2, 9.0, fingerprint="of other settings"),
        a_result("w8_tensor", 3, 9.0),  # no baseline of that seed
        a_result("w8_tensor", 2, 9.0, text="another"),
        a_result("w8_tensor", 2, 9.0, dtype="bfloat16"),
        a_result("w8_tensor", 2, 9.0, steps=100),
        a_result("w8_tensor", 2, 9.0, rate=0.004),
    ]
    for other in others:
        gap = judged("w8_tensor", [*base, *good, other]).gap
        assert gap is not None
        assert (gap.num_pairs, gap.mean) == (2, pytest.approx(0.1)), other
    # A run that ended itself took fewer steps, and decides.
    entry = judged("w8_tensor", [*base, *good, a_result("w8_tensor", 2, math.nan, state="diverged", steps=30)])
    assert (entry.verdict, entry.num_diverged, entry.seeds) == ("diverged", 1, 3)
    assert not verdicts.needs_more_seeds(entry)


def test_small_effects_take_more_seeds() -> None:
    base = [a_result("baseline", seed, 5.0) for seed in range(3)]
    for gap, count, expected in ((0.009, 3, True), (-0.009, 3, True), (0.011, 3, False), (0.009, 2, False)):
        found = [*base, *(a_result("w8a8", seed, 5.0 + gap) for seed in range(count))]
        assert verdicts.needs_more_seeds(judged("w8a8", found)) is expected, (gap, count)


def test_a_run_diverges_by_its_end_not_by_its_way() -> None:
    assert not protocol.has_diverged(5.0, 4.6)
    assert protocol.has_diverged(5.2, 4.6)
    assert protocol.has_diverged(math.nan, 4.6)
    assert protocol.has_diverged(math.inf, math.nan)


def test_limits_hold_a_further_run_of_the_same_kind() -> None:
    # Of normal gaps, one in a thousand is outside, TOLERANCE aside.
    generator = random.Random(5)
    outside = 0
    for _ in range(4000):
        values = [generator.gauss(0.3, 1.0) for _ in range(6)]
        outside += not smoke.limits(values[:5]).hold(values[5])
    assert 0 < outside < 15
    assert not smoke.limits([0.0, 0.1, 0.2, 0.3, 0.4]).hold(math.nan)
    with pytest.raises(CommandError, match="5 to 11"):
        smoke.limits([1.0, 2.0])


def test_the_smoke_runs_tell_rows_apart() -> None:
    made = smoke.measured(list(results.read(smoke.PATH).values()))
    assert made["w8a8"].hold(0.0)
    for name in smoke.ROWS[1:]:
        assert not made[name].hold(0.0), "a run in which the quantizer does nothing must be seen"


def test_a_figure_outside_its_limits_fails(capsys: pytest.CaptureFixture[str]) -> None:
    def short(row: str, seed: int, loss: float, **changes: Any) -> Result:
        return dataclasses.replace(
            a_result(row, seed, loss, **changes),
            key=Key(smoke.SIZE, smoke.FAMILY, smoke.RATIO, smoke.RATE, row, seed),
        )

    gaps = {"baseline": 0.0, "w8a8": 0.0, "g4_tensor": 0.2}
    before = [short(row, seed, 6.5 + gap + seed / 1000) for row, gap in gaps.items() for seed in range(5)]
    now = {row: short(row, smoke.SEED, 6.501 + gap) for row, gap in gaps.items()}
    assert smoke.compare(list(now.values()), before) == 0
    for row, loss in (("w8a8", 6.6), ("g4_tensor", 6.501), ("baseline", 6.0), ("w8a8", math.nan)):
        changed = {**now, row: short(row, smoke.SEED, loss, state="diverged" if math.isnan(loss) else "done")}
        capsys.readouterr()
        assert smoke.compare(list(changed.values()), before) == 1, (row, loss)
        assert f"OUTSIDE: {row}" in capsys.readouterr().out
