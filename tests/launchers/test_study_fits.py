"""Does the gap grow: lines through gaps whose answer is known."""

from __future__ import annotations

import dataclasses
import random

import numpy as np
import pytest
from helpers.study_results import ROWS, a_result
from scipy import stats
from studying import fits, protocol
from studying.results import Result


def test_a_slope_is_that_of_least_squares() -> None:
    for count in (3, 7):
        points = [(random.choice([1.0, 2.5, 4.0]), random.gauss(0, 1)) for _ in range(count - 2)]
        points += [(1.0, random.gauss(0, 1)), (4.0, random.gauss(0, 1))]
        x, y = np.array(points).T
        expected = stats.linregress(x, y)
        found = fits.slope(points)
        assert found is not None
        assert found.mean == pytest.approx(expected.slope)
        assert found.half_width == pytest.approx(stats.t.ppf(0.975, count - 2) * expected.stderr, rel=1e-3)
    assert fits.slope([(1.0, 1.0), (2.0, 2.0)]) is None
    assert fits.slope([(1.0, 1.0), (1.0, 2.0), (1.0, 3.0)]) is None


def test_a_plane_is_that_of_least_squares() -> None:
    rng = np.random.default_rng()
    values = rng.normal(size=(9, 3))
    x, y, z = values.T
    found = fits.plane([(float(a), float(b), float(c)) for a, b, c in values])
    assert found is not None
    # By Frisch and Waugh: the slope over x is that of what x and z are without 1 and y.
    without = np.column_stack([np.ones(9), y])
    rest_of_x, rest_of_z = (v - without @ np.linalg.lstsq(without, v, rcond=None)[0] for v in (x, z))
    expected = float(rest_of_x @ rest_of_z / (rest_of_x @ rest_of_x))
    left = rest_of_z - expected * rest_of_x
    error = np.sqrt(left @ left / 6 / (rest_of_x @ rest_of_x))
    assert found[0].mean == pytest.approx(expected)
    assert found[0].half_width == pytest.approx(stats.t.ppf(0.975, 6) * error, rel=1e-3)
    swapped = fits.plane([(float(b), float(a), float(c)) for a, b, c in values])
    assert swapped is not None
    assert swapped[1].mean == pytest.approx(found[0].mean)
    assert fits.plane([]) is None
    assert fits.plane([(1.0, 1.0, 0.0), (2.0, 2.0, 1.0), (3.0, 3.0, 1.0), (4.0, 4.0, 1.0)]) is None, "one line"
    assert fits.plane([(1.0, 1.0, 0.0), (2.0, 1.0, 1.0), (1.0, 2.0, 1.0)]) is None, "no deviation"


@pytest.mark.parametrize(
    ("mean", "half", "expected"), [(0.2, 0.1, "grows"), (-0.2, 0.1, "shrinks"), (0.1, 0.2, "not told")]
)
def test_only_an_interval_without_zero_tells(mean: float, half: float, expected: str) -> None:
    assert fits.Slope(6, mean, half).verdict == expected


def runs_of(size: str, ratio: float, gaps: dict[str, float], seeds: int = 3) -> list[Result]:
    parameters = protocol.SIZES[size].parameters("llama", 2048)
    values = {"parameters": parameters, "tokens": round(ratio * parameters)}
    found = [a_result("baseline", 0, 9.0, rate=rate, **values) for rate in (0.001, 0.004)]
    for seed in range(seeds):
        base = 5 + random.random()
        found.append(a_result("baseline", seed, base, **values))
        for row, gap in gaps.items():
            found.append(a_result(row, seed, base + gap, **values))
    return [dataclasses.replace(r, key=dataclasses.replace(r.key, size=size, ratio=ratio)) for r in found]


def test_known_answers_come_back() -> None:
    rows = list(ROWS.values())
    small = runs_of("0.7m", 1.0, {"w4_channel": 0.1, "a4_token": 0.3, "w8a8": 0.0, "v8_tensor": 0.1})
    assert fits.text(small, rows) == [], "nothing to fit with one size and one budget"
    four = runs_of("0.7m", 4.0, {"w4_channel": 0.14, "w8a8": 0.0})
    doublings = np.log2(protocol.SIZES["2m"].parameters("llama", 2048) / small[0].parameters)
    gaps = {"w4_channel": 0.1 + 0.05 * doublings, "a4_token": 0.3 - 0.1 * doublings, "v8_tensor": 0.2}
    large = runs_of("2m", 1.0, gaps)
    broken = next(number for number, one in enumerate(large) if one.key.row == "v8_tensor")
    large[broken] = dataclasses.replace(large[broken], state="diverged")
    lines = fits.text([*small, *large, *four], rows)
    at = next(number for number, line in enumerate(lines) if "tokens per parameter" in line)
    cells = [
        {c[0]: c[1:] for line in part if line.startswith("| ") for c in [[x.strip() for x in line.split("|")[1:-1]]]}
        for part in (lines[:at], lines[at : lines.index("**Size and length apart**: llama")])
    ]
    assert cells[0]["w4_channel"][2:] == ["6", "+0.0500", "+0.0500 to +0.0500", "grows"]
    assert cells[0]["a4_token"][2:] == ["6", "-0.1000", "-0.1000 to -0.1000", "shrinks"]
    assert "v8_tensor" not in cells[0], "diverged at one size"
    assert "w8a8" not in cells[0], "of one size"
    # Two doublings from 1 to 4.
    assert cells[1]["w4_channel"] == ["+0.1000", "+0.1400", "6", "+0.0200", "+0.0200 to +0.0200", "grows"]
    assert "Of 2 rows with a doubling of parameters: 1 grows, 1 shrinks, 0 not told." in lines
    # A size whose rate is not tuned yet does not count.
    untuned = [r for r in large if r.key.rate != 0.001]
    assert not any("with size" in line for line in fits.text([*small, *untuned], rows))


def test_size_and_length_are_told_apart() -> None:
    rows, found = list(ROWS.values()), []
    small, large = (protocol.SIZES[size].parameters("llama", 2048) for size in ("0.7m", "2m"))
    same_length = small / large
    for size, ratio, tokens in (("0.7m", 1.0, 1.0), ("0.7m", 4.0, 4.0), ("2m", same_length, 1.0)):
        # 0.1 a doubling of tokens, and nothing of parameters.
        found += runs_of(size, ratio, {"a4_token": 0.02 + 0.1 * float(np.log2(tokens)), "w8a8": 0.0, "v8_tensor": 0.1})
    broken = next(number for number, one in enumerate(found) if one.key.row == "v8_tensor")
    found[broken] = dataclasses.replace(found[broken], state="diverged")
    made = fits.text(found, rows)
    at = made.index("**Size and length apart**: llama")
    until = next(number for number, line in enumerate(made) if line.startswith("**What size does by itself**"))
    lines = {line.split("|")[1].strip(): line for line in made[at:until] if line.startswith("| ")}
    cells = lines["a4_token"].split("|")
    assert float(cells[3]) == pytest.approx(0.0, abs=1e-4)
    assert [cell.strip() for cell in cells[6:9]] == ["+0.1000", "+0.1000 to +0.1000", "grows"]
    assert "v8_tensor" not in lines, "diverged somewhere"
    assert "not told" in lines["w8a8"] or "+0.0000 to +0.0000" in lines["w8a8"]
    assert not any("Size and length" in line for line in fits.text(found[: len(found) // 3 * 2], rows)), "one size"


def test_sizes_are_compared_at_the_same_rate_and_length() -> None:
    rows = list(ROWS.values())
    small = runs_of("0.7m", 1.0, {"w4_channel": 0.1, "a4_token": 0.1})
    large = runs_of("2m", 0.3, {"w4_channel": 0.15, "a4_token": 0.1})
    longer = runs_of("5m", 0.3, {"w4_channel": 0.9})

    def made(steps: dict[str, int], rate: float = 0.002, *, seeds: int = 3) -> list[str]:
        found = [dataclasses.replace(r, steps=steps[r.key.size]) for r in (*small, *large, *longer)]
        found = [r for r in found if r.key.size != "2m" or r.key.seed < seeds]
        found = [r for r in found if r.key.rate == 0.002]
        found = [
            dataclasses.replace(r, key=dataclasses.replace(r.key, rate=rate)) if r.key.size == "2m" else r
            for r in found
        ]
        return [line for line in fits.text(found, rows) if "What size does" in line or line.startswith("| ")]

    title, header, _, *lines = made({"0.7m": 162, "2m": 159, "5m": 386})
    assert title == "**What size does by itself**: llama, learning rate 0.002, 159 steps or some more"
    assert "gap, 0.7m at D/N 1 | gap, 2m at D/N 0.3 | runs" in header
    cells = {line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:-1]] for line in lines}
    doublings = np.log2(large[0].parameters / small[0].parameters)
    assert cells["w4_channel"][:4] == ["+0.1000", "+0.1500", "6", f"{0.05 / doublings:+.4f}"]
    assert cells["a4_token"][3] == "+0.0000"
    assert made({"0.7m": 162, "2m": 144, "5m": 386}) == [], "of other lengths"
    assert made({"0.7m": 162, "2m": 159, "5m": 386}, seeds=2) == [], "too few seeds of one size"
    assert made({"0.7m": 162, "2m": 159, "5m": 386}, rate=0.001) == [], "of other rates"
