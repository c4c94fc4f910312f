"""launchers/collect.py: files that are cut, garbled or foreign are a problem and no crash."""

from __future__ import annotations

import math
import os
import random
from pathlib import Path

import collect
import pytest
from collected_runs import a_done_run, only_run, problems_of, rows_of, write_metrics, write_summary
from collecting import configs, files

HEADER = b"step,tokens,train_loss,eval_loss,grad_norm,lr\n"


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
