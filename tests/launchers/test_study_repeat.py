"""The study: runs that were done again, held against the CSV."""

from __future__ import annotations

import dataclasses
import math
import random
import statistics
from pathlib import Path

import pytest
import torch
from helpers.study_results import ROWS, a_result
from scipy import stats
from studying import adapting, commands, comparing, plan, post_training, processors, repeating, results
from studying.adapting import Adapted
from studying.plan import Key, Settings
from studying.post_training import Evaluated
from studying.results import Result

from ds_quant.cli.shared import processors as shared_processors
from ds_quant.cli.shared.errors import CommandError

GROUP = ("0.7m", "llama", 1.0, 0.002)


def test_one_row_of_each_table_is_drawn() -> None:
    found = [a_result(name, 0, 5.0) for name in ROWS if name not in ("baseline_untied", "baseline_two_ranks")]
    evaluated = [Evaluated(Key(*GROUP[:3], GROUP[3], name, 0), "", "", 5.0) for name in ("w8_channel", "a8_token")]
    names = repeating.drawn(ROWS, found, evaluated, [], GROUP, [0])
    assert [ROWS[name].kind for name in names[:3]] == ["control", "paper", "repair"]
    assert names[0] == "baseline_stage0", "not the baseline, and not what was never run"
    assert set(names[3:]) <= {"w8_channel", "a8_token"}
    told = {"text": "", "processor": "p", "commit": "c", "date": "2026-11-30"}
    losses = {"continued": 5.0, "after": 5.0, "adapted": 5.0}
    adapted = [
        Adapted(Key(*GROUP[:3], GROUP[3], name, 0), fingerprint, **losses, **told)
        for name, fingerprint in (("a4_token", adapting.fingerprint(ROWS["a4_token"])), ("w4_channel", "old"))
    ]
    more = repeating.drawn(ROWS, found, evaluated, adapted, GROUP, [0])
    assert set(more) - set(names) <= {"a4_token"} <= set(more)
    random.shuffle(found)
    assert repeating.drawn(ROWS, found, evaluated[::-1], [], GROUP, [0]) == names
    # Only what the CSV has, as the rows are now.
    left = [dataclasses.replace(r, fingerprint="old") for r in found if r.key.row in names]
    assert not set(names) & set(repeating.drawn(ROWS, [*left, a_result("w8a8", 1, 5.0)], [], [], GROUP, [0]))
    assert repeating.drawn(ROWS, [a_result("w8a8", 1, 5.0)], [], [], GROUP, [1]) == ["w8a8"]


def test_a_row_of_the_table_of_other_rates_is_drawn() -> None:
    def drawn(found: list[Result], seeds: tuple[int, ...] = (0,)) -> tuple[str, float] | None:
        random.shuffle(found)
        return repeating.drawn_at_another_rate(ROWS, found, GROUP, seeds)

    tuned = [a_result(row, 0, 5.0) for row in ("baseline", "w8a8", "a4_token")]
    assert drawn([*tuned, a_result("baseline", 0, 5.0, rate=0.001), a_result("w8a8", 0, 5.0, rate=0.008)]) is None
    names = ("w8a8", "a4_token", "w4_channel")
    others = [a_result(row, 0, 5.0, rate=rate) for row in names for rate in (0.001, 0.004)]
    row = min(names, key=lambda name: plan.fingerprint(ROWS[name]))
    assert drawn([*tuned, *others]) == (row, 0.5)
    assert drawn([*tuned, *others], (1,)) is None, "of another seed"
    high = [one for one in others if one.key.rate == 0.004]
    assert drawn([*tuned, *high]) == (row, 2.0)
    old = [dataclasses.replace(one, fingerprint="0") for one in high if one.key.row == row]
    left = [one for one in high if one.key.row != row]
    assert drawn([*tuned, *old, *left]) == (min(names, key=lambda n: (n == row, plan.fingerprint(ROWS[n]))), 2.0)


def test_without_names_a_row_of_another_rate_is_repeated_too(
    tmp_path: Path, token_shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = Settings(tmp_path, token_shards).text
    path, again = tmp_path / "runs.csv", tmp_path / plan.AGAIN / "runs.csv"
    base = [a_result("baseline", 0, loss, rate=rate, text=text) for rate, loss in ((0.001, 5), (0.002, 4), (0.004, 5))]
    found = [*base, *(a_result("w8a8", 0, 5.0, rate=rate, text=text) for rate in (0.002, 0.004))]
    results.write(path, found)
    results.write(again, found)
    flags = ["repeat", "--runs", str(tmp_path), "--corpus", str(token_shards), "--csv", str(path)]
    for more, rates in (([], ["0.002", "0.002", "0.004", "0.004"]), (["--rows", "w8a8"], ["0.002", "0.002"])):
        assert commands.run([*flags, *more], description="") == 0
        lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("same: ")]
        assert [line.partition("rate ")[2].partition('"')[0] for line in lines] == rates


def test_a_limit_is_the_interval_of_one_more_seed() -> None:
    losses = [random.gauss(5, 0.1) for _ in range(5)]
    expected = stats.t.ppf(0.975, 4) * statistics.stdev(losses) * math.sqrt(1 + 1 / 5)
    assert comparing.limit([*losses, math.nan]) == pytest.approx(expected, rel=1e-3)
    assert comparing.judged(0.99 * expected, losses) == comparing.WITHIN
    assert comparing.judged(-1.01 * expected, losses) == comparing.OUTSIDE
    assert comparing.judged(math.nan, losses) == comparing.OUTSIDE
    assert comparing.judged(0.1, [5.0]) == comparing.UNKNOWN
    assert comparing.judged(math.nan, [5.0]) == comparing.OUTSIDE


def test_kinds_of_processors() -> None:
    name = processors.where("cpu")["processor"]
    assert name.startswith(f"{shared_processors.name(torch.device('cpu'))} with ")
    assert processors.kind(name) == name
    assert processors.kind("AMD EPYC") == "AMD EPYC with AVX512 VNNI", "lines from before the kind was told"


def test_another_digit_is_another_run(tmp_path: Path, token_shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = Settings(tmp_path, token_shards).text
    path, again = tmp_path / "runs.csv", tmp_path / plan.AGAIN / "runs.csv"
    base = [a_result("baseline", 0, 5.0 + rate, rate=rate, text=text) for rate in (0.001, 0.002, 0.004)]
    base[1] = dataclasses.replace(base[1], loss=4.9)
    rows = [a_result("w8a8", seed, 5.01 + 0.1 * seed + 0.2, text=text) for seed in range(3)]
    broken = a_result("v8_tensor", 0, math.nan, state="diverged", text=text)
    results.write(path, [*base, *rows, broken])
    flags = ["repeat", "--runs", str(tmp_path), "--corpus", str(token_shards), "--csv", str(path)]

    def repeat(*changed: Result) -> tuple[int, list[str]]:
        results.write(again, {**results.read(path), **{one.key: one for one in changed}}.values())
        code = commands.run([*flags, "--rows", "w8a8", "v8_tensor"], description="")
        return code, [line for line in capsys.readouterr().out.splitlines() if "loss" in line]

    later = [dataclasses.replace(one, date="2026-12-01", commit="b", other_loss=1.0) for one in (rows[0], broken)]
    code, lines = repeat(*later)
    assert code == 0
    assert [line.partition(":")[0] for line in lines] == ["same"] * 3
    last = dataclasses.replace(rows[0], loss=math.nextafter(rows[0].loss, 9))
    code, lines = repeat(last)
    assert code == 1
    assert lines[1].startswith("OTHER: ")
    # Elsewhere the last digit is another one, and no more than that of another seed.
    code, lines = repeat(dataclasses.replace(last, processor="p with AVX2"))
    assert code == 0
    assert lines[1].startswith("within limits: ")
    code, lines = repeat(dataclasses.replace(rows[0], loss=rows[0].loss + 1, processor="p with AVX2"))
    assert code == 1
    assert lines[1].startswith("OUTSIDE: ")
    code, lines = repeat(dataclasses.replace(broken, state="done", loss=5.0, torch="3.0"))
    assert code == 1
    assert lines[2].startswith("OUTSIDE: ")
    # With quantizers put in, and taken out.
    first = Evaluated(rows[0].key, rows[0].fingerprint, text, 5.3, without=5.2)
    for changed, word in (({}, "same"), ({"loss": 5.4}, "OTHER"), ({"without": 5.4}, "OTHER")):
        for file, one in ((path, first), (again, dataclasses.replace(first, **changed))):
            post_training.write(post_training.path(file), [one])
        results.write(again, results.read(path).values())
        code = commands.run([*flags, "--rows", "w8a8"], description="")
        told = [line for line in capsys.readouterr().out.splitlines() if "quantize" in line]
        assert (len(told), code) == (2, int(word != "same"))
        assert word in {line.partition(":")[0] for line in told}
    results.write(path, [*base, dataclasses.replace(rows[0], fingerprint="of other settings")])
    with pytest.raises(CommandError, match=r"repeat: got .*w8a8"):
        commands.run([*flags, "--rows", "w8a8"], description="")
    results.write(path, [*base, *rows])
    for wrong, message in (
        (["--rows", "w8a8", "w8_tensor"], "w8_tensor"),
        (["--ratio", "4"], "no tuned learning rate"),
        (["--seeds", "9"], "no run"),
    ):
        with pytest.raises(CommandError, match=f"repeat: got .*{message}"):
            commands.run([*flags, *wrong], description="")
