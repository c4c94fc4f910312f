"""The acceptance on a GPU, without one: verdicts of made-up measures, steps that crash and hang, and the dry run."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import conftest
import gpu_check
import pytest
import torch

from benchmarks.gpu_check import environment, plan, promises, report, running, training
from benchmarks.gpu_check.int_mm import exact_products, laid_out
from benchmarks.gpu_check.kernels import differences
from benchmarks.gpu_check.optimizer import gpt2_shapes
from benchmarks.gpu_check.promises import AT_LEAST, AT_MOST, DRY_RUN, HELD, MISSED, NOT_MEASURED, Promise
from benchmarks.gpu_check.recording import Record
from benchmarks.gpu_check.training import Ended, loss_gap

FASTER = Promise(6, "speed", "times as fast", AT_LEAST, 1.5)
FEWER = Promise(6, "launches", "launches", AT_MOST, 8)
WHERE = {"dry_run": False, "device": "a GPU", "commit": "abc"}


def result(measures=(), **more):
    found = {"state": "done", "dry_run": False, "measures": dict(measures), "not_measured": {}, "tables": {}}
    return {**found, "title": "a step", "seconds": 3.0, "seconds_allowed": 9.0, "output_tail": None, **more}


# ---- verdicts


@pytest.mark.parametrize(
    ("promise", "value", "outcome"),
    [
        (FASTER, 1.5, HELD),
        (FASTER, 2.0, HELD),
        (FASTER, 1.49, MISSED),
        (FASTER, float("nan"), MISSED),
        (FEWER, 8.0, HELD),
        (FEWER, 0.0, HELD),
        (FEWER, 9.0, MISSED),
        (FEWER, float("inf"), MISSED),
        (FEWER, float("nan"), MISSED),
    ],
)
def test_a_measure_holds_or_misses(promise, value, outcome):
    got = result({promise.measure: value})
    assert promises.judge(promise, got).outcome == outcome
    assert promises.judge(promise, {**got, "dry_run": True}).outcome == DRY_RUN
    # A step that was killed has measured what it has measured.
    assert promises.judge(promise, {**got, "state": "timed out"}).outcome == outcome


@pytest.mark.parametrize(
    ("got", "why"),
    [
        (None, "the step was not run"),
        (result(state="failed"), "the step failed"),
        (result(state="timed out"), "the step timed out"),
        (result(not_measured={"speed": "no second GPU"}), "no second GPU"),
    ],
)
def test_what_is_not_measured_says_why(got, why):
    assert promises.judge(FASTER, got)[1:] == (NOT_MEASURED, None, why)


def test_the_exit_status_tells_what_was_missed_or_failed():
    def status(results):
        return promises.exit_status(promises.judge_all(results), results)

    held = {promise.measure: promise.goal for promise in promises.PROMISES}
    of_step = {
        step.number: {promise.measure: held[promise.measure] for promise in promises.of_step(step.number)}
        for step in plan.STEPS
    }
    good = {number: result(measures) for number, measures in of_step.items()}
    assert status(good) == 0
    assert status({4: good[4]}) == 0, "promises of steps that were not asked for"
    assert status({**good, 4: result(of_step[4], state="failed")}) == 1
    assert status({**good, 4: result(of_step[4], state="timed out")}) == 1
    for promise in promises.PROMISES:
        off = promise.goal + (-0.5 if promise.kind == AT_LEAST else 0.5)
        own = {**of_step[promise.step], promise.measure: off}
        assert status({**good, promise.step: result(own)}) == 1, promise.measure
        assert status({**good, promise.step: result(own, dry_run=True)}) == 0


def test_the_plan_fits_into_ten_minutes_and_every_promise_has_its_step():
    assert sum(step.seconds for step in plan.STEPS) <= plan.TOTAL_SECONDS < 600
    assert [step.number for step in plan.STEPS] == list(range(1, 9))
    assert {promise.step for promise in promises.PROMISES} == set(range(1, 9))
    assert len({promise.measure for promise in promises.PROMISES}) == len(promises.PROMISES)


def test_time_that_is_left_goes_to_the_steps_that_are_still_to_run():
    first = plan.STEPS[0]
    assert plan.allowed(first, list(plan.STEPS), 585.0) == pytest.approx(585 * first.seconds / 590, rel=0.01)
    assert plan.allowed(first, [first], 585.0) == 585
    left, taken = 585.0, []
    for number, step in enumerate(plan.STEPS):
        taken.append(plan.allowed(step, list(plan.STEPS[number:]), left))
        left -= taken[-1]
    assert sum(taken) == pytest.approx(585)


def test_the_report_has_verdicts_tables_and_the_end_of_what_failed():
    results = {
        2: result(
            {"tn_failures": 2},
            state="failed",
            output_tail="RuntimeError: no kernel",
            tables={"a | table": [{"layout": "TN", "tops": 12.3456}, {"layout": "NN", "why": "raises"}]},
        )
    }
    page = report.page(WHERE, promises.judge_all(results), results)
    assert "| device | a GPU |" in page
    assert "| 2 | sizes at which \\_int" not in page
    assert "| ≤ 0 | 2 | missed |" in page
    assert "| ≥ 1.5 |  | not measured: the step was not run |" in page
    assert "| 2 | a step | 3, 9 | failed |" in page
    assert "| layout | tops | why |" in page
    assert "| TN | 12.35 |  |" in page
    assert "RuntimeError: no kernel" in page
    assert "dry run" not in page
    assert "dry run on a CPU" in report.page({**WHERE, "dry_run": True}, [], {})


# ---- what a step writes down


def test_a_record_is_on_disk_after_every_entry_and_whole(tmp_path):
    path = tmp_path / "step.json"
    record = Record(path, seconds=9, dry_run=True)
    record.measure("tn_failures", 1)
    assert json.loads(path.read_text())["measures"] == {"tn_failures": 1.0}
    record.row("table", a=1)
    record.row("table", b="x")
    assert json.loads(path.read_text())["tables"] == {"table": [{"a": 1}, {"b": "x"}]}
    assert [file.name for file in tmp_path.iterdir()] == ["step.json"]
    with pytest.raises(TypeError):
        record.row("table", no_json=object())
    assert json.loads(path.read_text())["measures"], "the old one stays"


def test_a_step_must_say_something_on_each_of_its_promises(tmp_path):
    record = Record(tmp_path / "step.json", seconds=9, dry_run=True)
    record.measure("tn_failures", 0)
    with pytest.raises(RuntimeError, match="step 2 ended without a word on wrong_products"):
        record.check_complete(2)
    record.not_measured("wrong_products", "no time")
    record.check_complete(2)


def test_a_part_that_fails_keeps_no_other_from_running(tmp_path, capsys):
    record = Record(tmp_path / "step.json", seconds=9, dry_run=True)
    with record.part("first"):
        raise ValueError("wrong\nand more")
    with record.part("second"):
        record.measure("tn_failures", 0)
        record.measure("wrong_products", 0)
    with pytest.raises(RuntimeError, match=r"^first: ValueError: wrong$"):
        record.check_complete(2)
    assert "Traceback" in capsys.readouterr().err


# ---- processes


STEP = plan.STEPS[1]


def words(program, *arguments):
    return [sys.executable, "-S", "-c", program, *map(str, arguments)]


def test_a_step_that_hangs_is_killed_in_time_with_its_children(tmp_path):
    program = (
        "import json, pathlib, subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-S', '-c', 'import time; time.sleep(300)'])\n"
        "pathlib.Path(sys.argv[1]).write_text(json.dumps({'measures': {'tn_failures': 3}}))\n"
        "pathlib.Path(sys.argv[2]).write_text(str(child.pid))\n"
        "print('about to hang', flush=True)\n"
        "time.sleep(300)\n"
    )
    pid = tmp_path / "pid"
    begin = time.monotonic()
    got = running.run_step(
        STEP, tmp_path, dry_run=True, seconds=3, words=words(program, tmp_path / ".step-2.partial.json", pid)
    )
    assert time.monotonic() - begin < 20
    assert (got["state"], got["measures"]) == ("timed out", {"tn_failures": 3})
    assert "about to hang" in got["output_tail"]
    assert json.loads((tmp_path / "step-2.json").read_text()) == got
    for _ in range(100):
        if not alive(int(pid.read_text())):
            break
        time.sleep(0.05)
    else:
        raise AssertionError("what it had started runs on")


def alive(pid):
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def test_a_crash_is_recorded_and_the_other_steps_run(tmp_path, monkeypatch, capsys):
    programs = {
        "device": "import sys, json; open(sys.argv[1], 'w').write(json.dumps("
        "{'measures': {'copy_tb_per_s': 3.1, 'bf16_tflops': 700.0}}))",
        "int_mm": "import os; print('the last words', flush=True); os.abort()",
        "kernels": "import sys, json; open(sys.argv[1], 'w').write(json.dumps({'measures': {'wire_host_ms': 2.5}}))",
    }
    monkeypatch.setattr(running, "command", lambda step, path, **_: words(programs[step.name], path))
    monkeypatch.setattr(environment, "_gpu", lambda: {"name": "a GPU", "count": "1"})
    assert gpu_check.main(["--out", str(tmp_path), "--steps", "3,1,2"]) == 1
    states = [json.loads((tmp_path / f"step-{n}.json").read_text())["state"] for n in (1, 2, 3)]
    assert states == ["done", "failed", "done"]
    assert "the last words" in json.loads((tmp_path / "step-2.json").read_text())["output_tail"]
    summary = json.loads((tmp_path / "summary.json").read_text())
    outcomes = {each["measure"]: each["outcome"] for each in summary["verdicts"]}
    assert [outcomes[name] for name in ("copy_tb_per_s", "bf16_tflops", "wire_host_ms")] == [HELD, HELD, MISSED]
    assert outcomes["tn_failures"] == outcomes["speed_up_4096"] == NOT_MEASURED
    assert summary["exit_status"] == 1
    printed = capsys.readouterr().out
    assert "step 2: failed" in printed
    assert (tmp_path / "report.md").read_text().count("the last words") == 1
    assert gpu_check.main(["--out", str(tmp_path), "--steps", "1"]) == 0


def test_without_a_gpu_it_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(environment, "_gpu", dict)
    assert gpu_check.main(["--out", str(tmp_path / "out")]) == 2
    assert "got no GPU that torch sees; allowed: a CUDA device" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("text", ["9", "0", "1,x", "", "1,,2"])
def test_wrong_steps_are_refused(text, tmp_path, capsys):
    assert gpu_check.main(["--out", str(tmp_path), "--dry-run", "--steps", text]) == 2
    assert f"--steps: got {text!r}; allowed: numbers from 1 to 8" in capsys.readouterr().err


# ---- parts of steps that can be wrong without a crash


def test_layouts_are_those_of_linear_layers():
    x, w, g = torch.zeros(6, 4), torch.zeros(5, 4), torch.zeros(6, 5)
    for (a, b), layout in (((x, w.t()), "TN"), ((g, w), "NN"), ((g.t(), x), "NT")):
        first, second = laid_out(a.clone(), b.clone(), layout)
        assert (first.stride(), second.stride()) == (a.stride(), b.stride())
        assert (first.shape, second.shape) == (a.shape, b.shape)
    a = torch.randint(-128, 128, (6, 4), dtype=torch.int8)
    b = torch.randint(-128, 128, (4, 5), dtype=torch.int8)
    assert torch.equal(exact_products(a, b).long(), a.long() @ b.long())


def test_differences_count_elements_and_take_nans_for_equal():
    nan = float("nan")
    got = [torch.tensor([1.0, nan, nan, 0.0]), torch.tensor([3], dtype=torch.int8)]
    want = [torch.tensor([1.0, nan, 2.0, -0.0]), torch.tensor([4], dtype=torch.int8)]
    assert differences(got, want) == 2
    assert differences(want, want) == 0


def test_gpt2_has_its_148_parameters():
    shapes = gpt2_shapes()
    assert len(shapes) == 148
    assert sum(torch.Size(shape).numel() for shape in shapes) == 124_439_808


@pytest.mark.parametrize(
    ("own", "gap"),
    [
        (Ended(0, {1: 5.0, 2: 4.0}, 4.5, 1.0, ""), 0.0),
        (Ended(0, {1: 5.0, 2: 4.25}, 4.5, 1.0, ""), 0.25),
        (Ended(0, {2: 4.0}, 4.0, 1.0, ""), 0.5),
        (Ended(0, {2: float("nan")}, 4.5, 1.0, ""), float("inf")),
        (Ended(1, {1: 5.0}, 4.5, 1.0, ""), None),
        (Ended(0, {}, None, 1.0, ""), None),
    ],
)
def test_the_gap_of_losses(own, gap):
    assert loss_gap(own, Ended(0, {1: 5.0, 2: 4.0}, 4.5, 1.0, "")) == gap


def test_runs_on_a_gpu_cover_what_is_promised():
    assert {each.stage for each in training._RUNS} == {1, 2, 3}
    assert any("overlap_comm" in each.zero for each in training._RUNS)
    assert any("offload_optimizer" in each.zero for each in training._RUNS)
    for each in training._RUNS:
        reference = training.reference_of(each)
        assert reference in training._RUNS
        assert reference.on_cpu
        assert (reference.stage == 3) == (each.stage == 3)
        assert each.on_cpu == (each is reference)
    assert training._TWO_RANKS.ranks == 2


# ---- tests that a GPU adds


class Item:
    """What pytest's items have that the mark goes by."""

    def __init__(self, *marks):
        self.marks = list(marks)

    def iter_markers(self, name):
        return [mark.mark for mark in self.marks if mark.mark.name == name]

    def get_closest_marker(self, name):
        return next(iter(self.iter_markers(name)), None)

    def add_marker(self, mark):
        self.marks.append(getattr(pytest.mark, mark) if isinstance(mark, str) else mark)

    def names(self):
        return [mark.mark.name for mark in self.marks]


def test_gpu_marks(monkeypatch):
    by_reason = Item(pytest.mark.skipif(True, reason="needs a GPU"))
    by_mark = Item(pytest.mark.gpu)
    other = Item(pytest.mark.skipif(True, reason="no compiler"))
    monkeypatch.setattr(conftest, "_has_gpu", lambda: False)
    conftest.mark_gpu_tests([by_reason, by_mark, other])
    assert [item.names() for item in (by_reason, by_mark, other)] == [["skipif", "gpu"], ["gpu", "skip"], ["skipif"]]
    monkeypatch.setattr(conftest, "_has_gpu", lambda: True)
    with_gpu = Item(pytest.mark.gpu)
    conftest.mark_gpu_tests([with_gpu])
    assert with_gpu.names() == ["gpu"]


# ---- the whole of it


@pytest.mark.timeout(290)
def test_the_dry_run_goes_all_the_ways(tmp_path, capsys):
    assert gpu_check.main(["--out", str(tmp_path), "--dry-run"]) == 0, capsys.readouterr().out
    steps = [json.loads((tmp_path / f"step-{step.number}.json").read_text()) for step in plan.STEPS]
    for step in steps:
        assert step["state"] == "done", step["output_tail"]
        assert step["dry_run"]
        assert step["tables"]
    verdicts = json.loads((tmp_path / "summary.json").read_text())["verdicts"]
    left = {each["measure"] for each in verdicts if each["outcome"] != DRY_RUN}
    # Two GPUs, and a system that tells a process its peak memory.
    assert left - {"int32_in_memory"} == {"nccl_loss_gap"}
    measured = {each["measure"]: each["measured"] for each in verdicts}
    # What holds on every device.
    exact = ("quantizer_differences", "key_differences", "gemm_differences", "adamw_differences", "failed_runs")
    assert {name: measured[name] for name in exact} == dict.fromkeys(exact, 0)
    assert measured["worst_loss_gap"] < 0.03
    assert measured["layer_errors"] <= 1
    found = json.loads((tmp_path / "environment.json").read_text())
    assert {"device", "driver", "torch", "triton", "transformers", "deepspeed", "date", "commit"} <= found.keys()
    peers = [row for row in steps[6]["tables"]["training steps"] if row["what"].startswith("torchao")]
    assert all(("note" in row) == (not environment.installed("torchao")) for row in peers)
    assert not os.environ.get("DS_QUANT_KERNELS")
