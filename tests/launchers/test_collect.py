"""launchers/collect.py: the state of each run, exit codes, and what is written."""

from __future__ import annotations

import math
import os
import sys
import time
from pathlib import Path

import collect
import pytest
from collected_runs import HOUR, a_done_run, only_run, problems_of, rows_of, write_metrics, write_summary
from collecting import names, runs
from PIL import Image
from survival import status

from ds_quant.cli.shared.errors import CommandError

OUTPUTS = {"collected.csv", "collected.md", "curves.png"}


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
