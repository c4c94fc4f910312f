"""launchers/collect.py: means and gaps to the baseline, and what makes them doubtful."""

from __future__ import annotations

import math
import statistics
import time
from pathlib import Path

import collect
import pytest
from collected_runs import a_done_run, problems_of, write_metrics, write_summary
from collecting import configs, runs


def test_unknown_seeds_enter_means_and_no_pairs(tmp_path: Path) -> None:
    for config, losses in {"baseline": (4.0, 5.0), "w8a8": (4.25, 5.25)}.items():
        for place, loss in enumerate(losses):
            write_summary(tmp_path / config / f"try{place}", final_eval_loss=loss, seed=None)
    assert collect.main([str(tmp_path)]) == 0
    page = (tmp_path / "collected.md").read_text()
    assert "| baseline | 2 done | 4.5000 | 0.7071 |" in page
    assert "| w8a8 | 2 done | 4.7500 | 0.7071 |  |  |  |  |  | 6,000 |" in page
    assert "| w8a8 | unknown | done |" in page
    assert problems_of(tmp_path) == ["no gaps to baseline: no run of it is done and has a known seed"]


def test_gaps_are_taken_over_the_seeds_that_both_have(tmp_path: Path) -> None:
    for seed, loss in {1: 4.50, 2: 4.60, 3: 4.40, 4: 4.70}.items():
        a_done_run(tmp_path, "baseline", seed, loss)
    # Seed 4 of w8a8 failed, seed 9 has no baseline.
    for seed, loss in {1: 4.52, 2: 4.61, 3: 4.43, 9: 4.00}.items():
        a_done_run(tmp_path, "w8a8", seed, loss)
    write_metrics(tmp_path / "w8a8" / "seed-4", [7.5, 9.0])
    a_done_run(tmp_path, "w4a4", 2, 4.85)
    found, _ = runs.collect([tmp_path], {}, now=time.time(), stale_after=600.0)
    baseline, w4a4, w8a8 = configs.summarize(found, "baseline")
    assert (baseline.name, baseline.gap) == ("baseline", None)
    assert w4a4.gap == configs.Gap(1, pytest.approx(0.25), None)
    # Differences 0.02, 0.01, 0.03: mean 0.02, standard deviation 0.01; t(2) = 4.303; 4.303 * 0.01 / sqrt(3).
    assert w8a8.gap == configs.Gap(3, pytest.approx(0.02), pytest.approx(0.024843, abs=1e-5))
    assert w8a8.states == {"done": 4, "failed": 1}
    assert w8a8.final.mean == pytest.approx(4.39)
    assert w8a8.final.deviation == pytest.approx(statistics.stdev([4.52, 4.61, 4.43, 4.0]))
    assert collect.main([str(tmp_path)]) == 1
    page = (tmp_path / "collected.md").read_text()
    assert "| +0.0200 | -0.0048 to +0.0448 | 3 |" in page
    assert "| +0.2500 |  | 1 |" in page


@pytest.mark.parametrize("degrees", [1, 2, 3, 7, 12, 20, 29, 30, 31, 50, 200])
def test_t_quantiles_hold_95_percent(degrees: int) -> None:
    # With t = sqrt(n) tan(a) the density is that of cos(a)^(n-1), which Simpson's rule integrates well.
    def integral(end: float, count: int = 2000) -> float:
        width = end / count
        values = [math.cos(place * width) ** (degrees - 1) for place in range(count + 1)]
        return width / 3 * (values[0] + 4 * sum(values[1:-1:2]) + 2 * sum(values[2:-1:2]) + values[-1])

    inside = integral(math.atan(configs.t_quantile(degrees) / math.sqrt(degrees))) / integral(math.pi / 2)
    assert inside == pytest.approx(0.95, abs=1e-4)


def test_what_makes_means_doubtful_is_said(tmp_path: Path) -> None:
    a_done_run(tmp_path / "a", "baseline", 1, 4.5)
    twin = a_done_run(tmp_path / "b", "baseline", 1, 9.5)
    a_done_run(tmp_path / "a", "w8a8", 1, 4.6, steps=39)
    write_summary(tmp_path / "a" / "w8a8" / "seed-2", seed=3, steps=40)
    assert collect.main([str(tmp_path)]) == 0
    assert "| baseline | 2 done | 4.5000 |  |" in (tmp_path / "collected.md").read_text()
    assert problems_of(tmp_path) == [
        f"{tmp_path}/a/w8a8/seed-1: metrics.csv goes to step 40, summary.json to 39: it was resumed",
        f"{tmp_path}/a/w8a8/seed-2: it is named as seed 2, but its summary.json tells seed 3",
        f"{twin}: {tmp_path}/a/baseline/seed-1 is baseline with seed 1 too; means take that one only",
        "w8a8: its runs and those of baseline took different numbers of steps: 39, 40",
    ]
