from __future__ import annotations

import csv
import json
import math
import os
import random
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import collect
import pytest
from collecting import configs, files, names, runs
from PIL import Image
from pretraining import metrics
from survival import status

from ds_quant.cli.shared.errors import CommandError

HOUR = 3600.0
OUTPUTS = {"collected.csv", "collected.md", "curves.png"}
HEADER = b"step,tokens,train_loss,eval_loss,grad_norm,lr\n"


def write_metrics(folder: Path, losses: list[float], *, age: float = HOUR) -> None:
    """One evaluation each 20 steps, from step 0; last changed `age` seconds ago."""
    history: list[dict[str, Any]] = [{"step": 20 * place, "eval_loss": loss} for place, loss in enumerate(losses)]
    history += [{"step": 20 * n, "loss": 5.0 - n / 10, "grad_norm": 0.5, "learning_rate": 1e-4} for n in (1, 2)]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "metrics.csv"
    path.write_text(metrics.to_csv(metrics.rows_of(history, 4096), header=True))
    os.utime(path, (time.time() - age,) * 2)


def write_summary(folder: Path, **changes: Any) -> None:
    """What a run of 40 steps leaves, as far as the collector looks at it."""
    summary = {
        "preset": "tiny",
        "steps": 40,
        "tokens": 163840,
        "seconds": 142.83,
        "tokens_per_second": 6000.0,
        "first_eval_loss": 7.5,
        "final_eval_loss": 4.5,
        "communication": None,
        "seed": 1,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "summary.json").write_text(json.dumps({**summary, **changes}, indent=2) + "\n")


def a_done_run(root: Path, config: str, seed: int, final: float = 4.5, **changes: Any) -> Path:
    folder = root / config / f"seed-{seed}"
    write_metrics(folder, [7.5, 5.5, final])
    write_summary(folder, seed=seed, final_eval_loss=final, **changes)
    return folder


def rows_of(output: Path) -> dict[str, dict[str, str]]:
    """collected.csv by CONFIG/seed-N."""
    with (output / "collected.csv").open(newline="") as file:
        return {f"{row['config']}/seed-{row['seed']}": row for row in csv.DictReader(file)}


def problems_of(output: Path) -> list[str]:
    lines = (output / "collected.md").read_text().split("## Problems\n")[1].splitlines()
    return [line.removeprefix("- ") for line in lines if line.startswith("- ")]


def only_run(root: Path) -> tuple[runs.Run, list[str]]:
    found, problems = runs.collect([root], {}, now=time.time(), stale_after=600.0)
    assert len(found) == 1
    return found[0], problems


def test_every_state_has_its_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a_done_run(tmp_path, "baseline", 1, 4.5)
    a_done_run(tmp_path, "w8a8", 1, 4.6, communication={"gradient": "8 bits", "wire_bytes_per_step": 1234567})
    write_metrics(tmp_path / "w8a8" / "seed-2", [7.5, 5.5], age=5.0)
    write_metrics(tmp_path / "w8a8" / "seed-3", [7.5, math.nan, math.nan])
    write_metrics(tmp_path / "w8a8" / "seed-4", [7.5, 5.75])
    (tmp_path / "w8a8" / "seed-5" / "checkpoint-100").mkdir(parents=True)
    (tmp_path / "w8a8" / "seed-5" / "checkpoint-20").mkdir()
    assert collect.main([str(tmp_path), "--expect", "w8a8=1-6", "baseline=1,2"]) == 1
    rows = rows_of(tmp_path)
    assert {name: row["state"] for name, row in rows.items()} == {
        "baseline/seed-1": "done",
        "baseline/seed-2": "missing",
        "w8a8/seed-1": "done",
        "w8a8/seed-2": "running",
        "w8a8/seed-3": "diverged",
        "w8a8/seed-4": "failed",
        "w8a8/seed-5": "failed",
        "w8a8/seed-6": "missing",
    }
    done = rows["w8a8/seed-1"]
    assert (done["steps"], done["final_eval_loss"], done["best_eval_loss"]) == ("40", "4.6", "4.6")
    assert (done["tokens_per_second"], done["wire_bytes_per_step"], done["seconds"]) == ("6000.0", "1234567", "142.83")
    assert done["peak_memory_bytes"] == rows["baseline/seed-1"]["wire_bytes_per_step"] == ""
    assert (rows["w8a8/seed-4"]["steps"], rows["w8a8/seed-4"]["final_eval_loss"]) == ("40", "5.75")
    assert (rows["w8a8/seed-3"]["final_eval_loss"], rows["w8a8/seed-3"]["best_eval_loss"]) == ("nan", "7.5")
    assert (rows["w8a8/seed-5"]["steps"], rows["w8a8/seed-5"]["final_eval_loss"]) == ("100", "")
    assert rows["w8a8/seed-6"]["folder"] == ""
    page = (tmp_path / "collected.md").read_text()
    counts = "1 done, 1 running, 1 diverged, 2 failed, 1 missing"
    assert f"| w8a8 | {counts} | 4.6000 |  | 4.6000 |  | +0.1000 |  | 1 | 6,000 |" in page
    assert page.index("# Collected runs") < page.index("## Runs") < page.index("## Problems")
    assert problems_of(tmp_path) == []
    assert "+0.1000" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("age", "stale_after", "state"), [(5.0, "600", "running"), (HOUR, "600", "failed"), (HOUR, "7200", "running")]
)
def test_a_run_without_a_new_line_is_dead(tmp_path: Path, age: float, stale_after: str, state: str) -> None:
    write_metrics(tmp_path / "w8a8" / "seed-1", [7.5, 5.5], age=age)
    assert collect.main([str(tmp_path), "--stale-after", stale_after]) == 1
    assert rows_of(tmp_path)["w8a8/seed-1"]["state"] == state


def a_told_run(root: Path, state: str, *, reason: str = "", age: float = HOUR, told_age: float = HOUR) -> Path:
    """A run with metrics.csv and status.json, changed so many seconds ago."""
    folder = root / "w8a8" / "seed-1"
    write_metrics(folder, [7.5, 5.5], age=age)
    status.write(folder, state, reason=reason, step=57)
    os.utime(folder / "status.json", (time.time() - told_age,) * 2)
    return folder


@pytest.mark.parametrize(
    ("state", "age", "told_age", "expected"),
    [
        ("running", 5.0, HOUR, "running"),
        ("running", HOUR, 5.0, "running"),
        ("running", HOUR, HOUR, "failed"),
        ("stopped", 5.0, 5.0, "stopped"),
        ("stopped", HOUR, HOUR, "stopped"),
        ("diverged", 5.0, 5.0, "diverged"),
        ("failed", 5.0, 5.0, "failed"),
        # It wrote its last status without a summary.
        ("done", 5.0, 5.0, "failed"),
    ],
)
def test_status_tells_how_a_run_stands(tmp_path: Path, state: str, age: float, told_age: float, expected: str) -> None:
    a_told_run(tmp_path, state, age=age, told_age=told_age)
    assert collect.main([str(tmp_path)]) == 1
    row = rows_of(tmp_path)["w8a8/seed-1"]
    assert (row["state"], row["steps"]) == (expected, "57")
    assert bool(row["reason"]) == (expected == "failed" and state != "failed")
    assert f"| w8a8 | 1 {expected} |" in (tmp_path / "collected.md").read_text()


@pytest.mark.parametrize("state", ["stopped", "diverged", "failed"])
def test_the_reason_is_in_the_table(tmp_path: Path, state: str) -> None:
    a_told_run(tmp_path, state, reason="rank 1, step 57:\nthe disk | is full")
    assert collect.main([str(tmp_path)]) == 1
    assert rows_of(tmp_path)["w8a8/seed-1"]["reason"] == "rank 1, step 57: the disk | is full"
    assert r"| rank 1, step 57: the disk \| is full |" in (tmp_path / "collected.md").read_text()


def test_a_done_run_has_no_reason_and_what_came_after_it_counts(tmp_path: Path) -> None:
    folder = a_told_run(tmp_path, "done", reason="no reason")
    write_summary(folder)
    run, _ = only_run(tmp_path)
    assert (run.state, run.reason, run.steps) == ("done", "", 40)
    # Killed between its summary and its last status.
    a_told_run(tmp_path, "running", told_age=60.0)
    os.utime(folder / "summary.json", (time.time() - 30.0,) * 2)
    assert only_run(tmp_path)[0].state == "done"
    # Its folder was used again, and failed since.
    a_told_run(tmp_path, "failed", reason="the disk is full", told_age=10.0)
    run, _ = only_run(tmp_path)
    assert (run.state, run.reason) == ("failed", "the disk is full")


def test_a_run_of_a_status_alone_is_found(tmp_path: Path) -> None:
    status.write(tmp_path / "w8a8" / "seed-1", "failed", reason="--vocab_size 3 is too small")
    run, problems = only_run(tmp_path)
    assert (run.state, run.reason, problems) == ("failed", "--vocab_size 3 is too small", [])


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "it is empty"),
        (b'{"state": "run', "cut short"),
        (b"null", "it is no JSON object"),
        (b"[1]", "no status of pretrain.py"),
        (b'{"state": "sleeping"}', "no status of pretrain.py"),
        (b'{"state": ["done"]}', "no status of pretrain.py"),
    ],
)
def test_a_broken_status_is_a_problem_and_no_crash(tmp_path: Path, content: bytes, said: str) -> None:
    folder = tmp_path / "w8a8" / "seed-1"
    write_metrics(folder, [7.5, 5.25], age=5.0)
    (folder / "status.json").write_bytes(content)
    run, (problem,) = only_run(tmp_path)
    assert (run.state, run.steps) == ("running", 40)
    assert problem.startswith(f"{folder}/status.json: ")
    assert said in problem
    write_summary(folder)
    assert only_run(tmp_path)[0].state == "done"


def test_foreign_values_of_a_status_are_no_crash(tmp_path: Path) -> None:
    folder = tmp_path / "w8a8" / "seed-1"
    folder.mkdir(parents=True)
    (folder / "status.json").write_text('{"state": "stopped", "reason": {"a": [1]}, "step": "many", "retry": 7}')
    run, problems = only_run(tmp_path)
    assert (run.state, run.reason, run.steps, problems) == ("stopped", "{'a': [1]}", None, [])


@pytest.mark.parametrize("final", [math.nan, math.inf, -math.inf])
def test_a_summary_that_is_not_finite_has_diverged(tmp_path: Path, final: float) -> None:
    write_summary(tmp_path / "w8a8" / "seed-1", final_eval_loss=final)
    assert collect.main([str(tmp_path)]) == 1
    assert rows_of(tmp_path)["w8a8/seed-1"]["state"] == "diverged"


def test_exit_codes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = a_done_run(tmp_path / "runs", "baseline", 1)
    a_done_run(tmp_path / "runs", "baseline", 2)
    arguments = [str(tmp_path / "runs"), "--output", str(tmp_path / "out")]
    assert collect.main([*arguments, "--expect", "baseline=1-2"]) == 0
    assert collect.main([*arguments, "--expect", "baseline=1-3"]) == 1
    assert collect.main([*arguments, "--expect", "baseline=1,2", "w8a8=1"]) == 1
    assert rows_of(tmp_path / "out")["w8a8/seed-1"]["state"] == "missing"
    capsys.readouterr()
    (tmp_path / "empty").mkdir()
    for wrong, said in {
        (str(tmp_path / "none"),): "ROOT: got .*none; allowed: existing folders",
        (str(tmp_path / "empty"),): "ROOT: got .*empty, with no run below; allowed: folders with runs",
        (*arguments, "--baseline", "base"): "--baseline: got 'base'; allowed: baseline; correct it",
        (*arguments, "--stale-after", "-1"): "--stale-after: got -1.0; allowed: seconds",
        (*arguments, "--stale-after", "nan"): "--stale-after: got nan; allowed: seconds",
        (*arguments, "--expect", "baseline"): "--expect: got 'baseline'; allowed: CONFIG=SEEDS",
        (arguments[0], "--output", str(run)): "--output: got .*, the folder of a run; allowed: any other",
        (arguments[0], "--output", f"{run}/summary.json"): "--output: got .*; allowed: a folder that can be written to",
    }.items():
        assert collect.main(list(wrong)) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert error.count("\n") == 1
        assert all(part in error for part in said.split(".*")), error
    with pytest.raises(SystemExit) as refused:
        collect.main([])
    assert refused.value.code == 2


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "it is empty"),
        (b" \n", "it is empty"),
        (b'{"final_eval_loss": 4.5, "steps": 2', "cut short"),
        (bytes(range(256)) * 20, "it is no JSON"),
        (b"[" * 100_000, "it is no JSON"),
        (b'{"steps": ' + b"9" * 5000 + b"}", "it is no JSON"),
        (b"[1, 2]", "no summary of pretrain.py"),
        (b'{"accuracy": 0.5}', "no summary of pretrain.py"),
        (b'{"final_eval_loss": null}', "its final_eval_loss is no number"),
        (b'{"final_eval_loss": "4.5"}', "its final_eval_loss is no number"),
        (b'{"final_eval_loss": true}', "its final_eval_loss is no number"),
        (b'{"final_eval_loss": 1e300}', "its final_eval_loss is no number"),
    ],
)
def test_a_broken_summary_is_a_problem_and_no_crash(tmp_path: Path, content: bytes, said: str) -> None:
    folder = tmp_path / "w8a8" / "seed-1"
    write_metrics(folder, [7.5, 5.25], age=5.0)
    (folder / "summary.json").write_bytes(content)
    a_done_run(tmp_path, "baseline", 1)
    assert collect.main([str(tmp_path)]) == 1
    row = rows_of(tmp_path)["w8a8/seed-1"]
    assert (row["state"], row["steps"], row["final_eval_loss"]) == ("failed", "40", "5.25")
    (problem,) = problems_of(tmp_path)
    assert problem.startswith(f"{folder}/summary.json: ")
    assert said in problem


def test_a_summary_with_foreign_values_still_tells_the_rest(tmp_path: Path) -> None:
    folder = tmp_path / "w8a8" / "seed-1"
    odd = {"steps": "forty", "seconds": [1], "tokens_per_second": math.nan, "communication": 7, "seed": 1.5}
    write_summary(folder, **odd, peak_memory_bytes=2**31)
    run, problems = only_run(tmp_path)
    assert (run.state, run.seed, run.final_eval_loss, run.peak_memory_bytes) == ("done", 1, 4.5, 2**31)
    assert (run.steps, run.seconds, run.tokens_per_second, run.wire_bytes_per_step) == (None, None, None, None)
    assert problems == []


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "it is empty"),
        (bytes(range(256)) * 20, "no metrics.csv of pretrain.py"),
        (b"epoch,accuracy\n1,0.5\n", "no metrics.csv of pretrain.py"),
        (b"\n" * 50, "it is empty"),
    ],
)
def test_broken_metrics_are_a_problem_and_no_crash(tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path / "w8a8" / "seed-1").mkdir(parents=True)
    path = tmp_path / "w8a8" / "seed-1" / "metrics.csv"
    path.write_bytes(content)
    run, (problem,) = only_run(tmp_path)
    assert run.state == "failed"
    assert said in problem
    write_summary(path.parent)
    run, problems = only_run(tmp_path)
    assert (run.state, run.final_eval_loss, run.best_eval_loss) == ("done", 4.5, None)
    assert problems == [problem]


def test_rows_that_are_not_whole_are_left_out_and_counted(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    whole = b"0,0,,7.5,,\n20,81920,6.9,6.4,1.1,0.001\n"
    path.write_bytes(HEADER + whole + b"40,163840,6.1,5.8,1.0,0.0")
    found = files.read_metrics(path)
    assert found.evaluations() == {0: 7.5, 20: 6.4}
    assert (found.num_unreadable, found.last_step()) == (1, 20)
    assert found.problems == [f"{path}: 1 of 3 rows cannot be read (line 4)"]
    broken = b'x,0,,7.0,,\n40,1,"6\n-20,,,7,,\n2.5,,,7,,\nnan,,,7,,\n,,,7,,\n60,,,1e300,,\n\xff\xfe\x00\n'
    path.write_bytes(HEADER + broken + whole)
    found = files.read_metrics(path)
    assert found.evaluations() == {0: 7.5, 20: 6.4}
    assert found.num_unreadable == 8
    assert found.problems == [f"{path}: 8 of 10 rows cannot be read (lines 2 to 9)"]
    path.write_bytes((HEADER + whole).replace(b"\n", b"\r\n"))
    assert files.read_metrics(path).evaluations() == {0: 7.5, 20: 6.4}
    path.write_bytes(HEADER)
    assert files.read_metrics(path) == files.Metrics(rows=[])


def test_a_file_cut_or_garbled_anywhere_never_crashes(tmp_path: Path) -> None:
    folder = a_done_run(tmp_path / "runs", "w8a8", 1)
    chance = random.Random(0)
    whole = {name: (folder / name).read_bytes() for name in ("summary.json", "metrics.csv")}
    for name, content in whole.items():
        for _ in range(200):
            changed = bytearray(content[: chance.randrange(len(content) + 1)])
            for _ in range(chance.randrange(4)):
                if changed:
                    changed[chance.randrange(len(changed))] = chance.randrange(256)
            (folder / name).write_bytes(changed)
            run, _ = only_run(tmp_path)
            configs.summarize([run], "baseline")
        (folder / name).write_bytes(content)
    for length in range(len(whole["summary.json"]) - 2):
        (folder / "summary.json").write_bytes(whole["summary.json"][:length])
        run, problems = only_run(tmp_path)
        assert (run.state, len(problems)) == ("failed", 1)


def test_what_is_no_regular_file_is_not_read(tmp_path: Path) -> None:
    folder = tmp_path / "w8a8" / "seed-1"
    folder.mkdir(parents=True)
    os.mkfifo(folder / "metrics.csv")
    (folder / "summary.json").mkdir()
    run, problems = only_run(tmp_path)
    assert run.state == "failed"
    assert sorted(problem.split(": ")[1] for problem in problems) == ["it is no regular file"] * 2


def test_an_empty_folder_is_no_run(tmp_path: Path) -> None:
    a_done_run(tmp_path, "baseline", 1)
    (tmp_path / "baseline" / "seed-2").mkdir()
    (tmp_path / "notes").mkdir()
    assert collect.main([str(tmp_path)]) == 0
    (problem,) = problems_of(tmp_path)
    assert problem == (
        f"{tmp_path}/baseline/seed-2: it is named as a run, but has no summary.json, metrics.csv, "
        "status.json or checkpoint"
    )
    assert collect.main([str(tmp_path), "--expect", "baseline=1,2"]) == 1
    assert rows_of(tmp_path)["baseline/seed-2"]["state"] == "missing"


def test_config_and_seed_come_from_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder, expected in {
        "w8a8/seed-7": ("w8a8", 7),
        "sweep/w8a8/seed-007": ("w8a8", 7),
        "w8a8-b0.95-s1234": ("w8a8-b0.95", 1234),
        "tiny": ("tiny", None),
        "w8a8/again": ("w8a8", None),
        "seed-x": ("seed-x", None),
        ".": (tmp_path.name, None),
    }.items():
        assert names.of_folder(tmp_path / folder, tmp_path) == expected
    (tmp_path / "w8a8" / "seed-3").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "w8a8" / "seed-3")
    assert names.of_folder(Path("."), Path(".")) == ("w8a8", 3)


def test_seeds_of_expect() -> None:
    assert names.expected(["a=1,2", "b=3-5, 9", "a=4", "lr=1e-4=0"]) == {
        "a": {1, 2, 4},
        "b": {3, 4, 5, 9},
        "lr=1e-4": {0},
    }
    for wrong in ("a", "=1", "a=", "a=x", "a=1,,2", "a=5-3", "a=-1", "a=0-99999999999"):
        with pytest.raises(CommandError, match=r"--expect: got .*; allowed: CONFIG=SEEDS .*; correct it"):
            names.expected([wrong])


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


def test_links_are_followed_once(tmp_path: Path) -> None:
    folder = a_done_run(tmp_path / "disk", "baseline", 1)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "baseline").symlink_to(folder.parent)
    (folder / "model").mkdir()
    (folder / "model" / "round").symlink_to(tmp_path)
    (folder.parent / "round").symlink_to(tmp_path / "runs")
    (tmp_path / "runs" / "broken").symlink_to(tmp_path / "nowhere")
    found, problems = runs.collect([tmp_path / "runs", tmp_path], {}, now=time.time(), stale_after=600.0)
    assert [(run.config, run.seed) for run in found] == [("baseline", 1)]
    assert problems == []


def test_nothing_but_the_outputs_is_written(tmp_path: Path) -> None:
    a_done_run(tmp_path, "baseline", 1)
    write_metrics(tmp_path / "w8a8" / "seed-1", [7.5, 5.5])
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert collect.main([str(tmp_path)]) == 1
    after = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert {path.name for path in after.keys() - before.keys()} == OUTPUTS
    assert {path: after[path] for path in before} == before
    first = {name: (tmp_path / name).read_bytes() for name in OUTPUTS - {"curves.png"}}
    assert collect.main([str(tmp_path), "--output", str(tmp_path / "new" / "er")]) == 1
    assert {path.name for path in (tmp_path / "new" / "er").iterdir()} == OUTPUTS
    # What was written is no run of the next time.
    assert {name: (tmp_path / "new" / "er" / name).read_bytes() for name in first} == first


def test_curves_are_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for place in range(12):
        # Names that mean something to matplotlib, Markdown, and the terminal's markup.
        write_metrics(tmp_path / f"_a|$x^$[red]{place}" / "seed-1", [7.5, 6.0 - place / 10, math.inf, 1e9, 5.0])
    assert collect.main([str(tmp_path)]) == 1
    with Image.open(tmp_path / "curves.png") as image:
        assert min(image.size) > 400
        assert len(set(image.convert("RGB").resize((60, 60)).getdata())) > 20, "not blank"
    assert r"| _a\|$x^$[red]11 | 1 diverged |" in (tmp_path / "collected.md").read_text()
    assert "_a|$x^$[red]11" in capsys.readouterr().out


def test_without_matplotlib_there_are_tables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    a_done_run(tmp_path, "baseline", 1)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert collect.main([str(tmp_path)]) == 0
    assert capsys.readouterr().out.count("matplotlib is missing") == 1
    assert {path.name for path in tmp_path.iterdir() if path.is_file()} == OUTPUTS - {"curves.png"}


def test_names_of_any_bytes_can_be_written(tmp_path: Path) -> None:
    folder = os.fsencode(tmp_path) + b"/new\nline \xff|/seed-1"
    os.makedirs(folder)
    write_summary(Path(os.fsdecode(folder)))
    assert collect.main([str(tmp_path)]) == 0
    (row,) = rows_of(tmp_path).values()
    assert row["config"] == "new line \\udcff|"
    assert r"| new line \\udcff\| | 1 | done |" in (tmp_path / "collected.md").read_text()
