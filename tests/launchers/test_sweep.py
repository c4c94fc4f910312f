"""Planning a sweep: what is asked for, what is still to run, and how sbatch's options are handed on. Without Slurm."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import sweep
from collected_runs import a_done_run, write_metrics
from conftest import ROOT
from survival import status
from sweeping import hours, matrix, plan, slurm

from ds_quant.cli.shared.errors import CommandError

SHIPPED = sorted(path.stem for path in (ROOT / "ds_configs").rglob("*.json"))


@pytest.fixture(autouse=True)
def _outside_of_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    for name in [*os.environ]:
        if name.startswith("SLURM") or name in ("CONFIGS", "SEEDS", "SWEEP_DIR", "PRETRAIN_ARGS", "MAX_PARALLEL"):
            monkeypatch.delenv(name)
    monkeypatch.setattr(slurm, "available", lambda: False)


def lines_of(capsys: pytest.CaptureFixture[str]) -> tuple[list[list[str]], str]:
    """The words of each line on stdout, and stderr."""
    printed = capsys.readouterr()
    return [line.split() for line in printed.out.splitlines()], printed.err


def test_a_dry_run_prints_the_whole_matrix(tmp_path: Path) -> None:
    # As a user does it, on a machine that has no Slurm.
    bare = tmp_path / "bin"
    bare.mkdir()
    for name in ("bash", "dirname", "env"):
        (bare / name).symlink_to(Path("/usr/bin") / name)
    (bare / "python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    (bare / "python").chmod(0o755)
    done = subprocess.run(
        ["/usr/bin/bash", str(ROOT / "slurm" / "sweep.sh"), "--dry-run", "--sweep-dir", str(tmp_path / "sweep")],
        capture_output=True,
        text=True,
        timeout=400,
        cwd=tmp_path,
        env={"PATH": str(bare), "HOME": str(tmp_path), "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines()]
    assert len(rows) == len(SHIPPED) * 3
    assert {(row[1], row[3]) for row in rows} == {(name, seed) for name in SHIPPED for seed in "012"}
    assert {(row[0], row[4]) for row in rows} == {("run", "missing")}
    assert rows[0][5] == f"{tmp_path}/sweep/{SHIPPED[0]}/seed-0"
    count = len(SHIPPED) * 3
    assert done.stderr == f"{count} runs ({count} missing): {count} to run\n"
    assert not (tmp_path / "sweep").exists()


def test_what_has_ended_is_kept_and_the_rest_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    a_done_run(tmp_path, "w8a8", 0)
    write_metrics(tmp_path / "w8a8" / "seed-1", [7.5, float("nan")])
    for seed, state in {2: status.STOPPED, 3: status.FAILED, 4: status.DIVERGED, 5: status.RUNNING}.items():
        status.write(tmp_path / "w8a8" / f"seed-{seed}", state)
    (tmp_path / "w8a8" / "seed-6").mkdir()
    command = ["--dry-run", "--configs", "w8a8", "--seeds", "0-7", "--sweep-dir", str(tmp_path)]
    assert sweep.main(command) == 0
    rows, error = lines_of(capsys)
    expected = {
        "0": ("keep", "done"),
        "1": ("keep", "diverged"),
        "2": ("run", "stopped"),
        "3": ("run", "failed"),
        "4": ("keep", "diverged"),
        "5": ("keep", "running"),
        "6": ("run", "missing"),
        "7": ("run", "missing"),
    }
    assert {row[3]: (row[0], row[4]) for row in rows} == expected
    assert error.endswith("8 runs (1 done, 2 diverged, 1 stopped, 1 failed, 1 running, 2 missing): 4 to run\n")

    # With a Slurm to ask, it knows who lives: seed 5 does not, seed 2 is about to.
    monkeypatch.setattr(slurm, "available", lambda: True)
    monkeypatch.setattr(slurm, "living", lambda plans: ({("w8a8", 2): plan.QUEUED, ("w8a8", 0): "running"}, ["7"]))
    assert sweep.main(command) == 0
    rows, _ = lines_of(capsys)
    changed = {"2": ("keep", "queued"), "5": ("run", "failed")}
    assert {row[3]: (row[0], row[4]) for row in rows} == expected | changed


def test_hours_come_from_steps_batch_and_context(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    common = ["--dry-run", "--seeds", "0 1", "--sweep-dir", str(tmp_path), "--tokens-per-second", "100"]
    a_done_run(tmp_path, "baseline", 1)
    assert sweep.main([*common, "--configs", "baseline,w8a8"]) == 0
    rows, error = lines_of(capsys)
    # The preset tiny: 200 steps of 32 sequences of 128 tokens are 819,200.
    assert [row[5:7] for row in rows] == [["2.28", "h"], ["2.28", "h"], ["0.00", "h"], ["2.28", "h"]]
    assert error == "4 runs (3 missing, 1 done): 3 to run, 6.83 hours, 2.28 with 8 at a time\n"
    flags = "--max_steps=50 --global_batch_size 64 --block_size 1024"
    assert sweep.main([*common, "--configs", "w8a8", "--pretrain-args", flags, "--max-parallel", "1"]) == 0
    rows, error = lines_of(capsys)
    assert rows[0][5] == f"{50 * 64 * 1024 / 100 / 3600:.2f}"
    assert "18.20 hours, 18.20 with 1 at a time" in error
    assert sweep.main([*common, "--configs", "w8a8", "--pretrain-args", "--max_steps -1"]) == 2
    assert "--tokens-per-second: got no --max_steps" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (["--configs", "w8a9"], "CONFIGS: got 'w8a9'; allowed: .*; did you mean 'w8a8'?"),
        (["--configs", "zzz*"], "CONFIGS: got 'zzz.'; .*there are: a4_channel, "),
        (["--configs", "nowhere/own.json"], "CONFIGS: got 'nowhere/own.json'; allowed: the path of a .json file"),
        (["--configs", "w8a8 OTHER/w8a8.json"], "CONFIGS: got .* and .*, whose runs would share a folder"),
        (["--configs", "OTHER/two words.json"], "allowed: the path"),
        (["--seeds", "3-1"], "SEEDS: got '3-1'; allowed: numbers and ranges"),
        (["--seeds", "1,x"], "SEEDS: got 'x'; allowed"),
        (["--seeds", "4294967296"], "SEEDS: got '4294967296'"),
        (["--seeds", " "], "SEEDS: got ' '; allowed: at least one"),
        (["--max-parallel", "0"], "--max-parallel: got '0'; allowed: whole numbers above 0"),
        (["--max-parallel", "2.5"], "--max-parallel: got '2.5'"),
        (["--tokens-per-second", "-3"], "--tokens-per-second: got '-3'; allowed: numbers above 0"),
        (["--tokens-per-second", "nan"], "--tokens-per-second: got 'nan'"),
        (["--pretrain-args", "--seed 3"], "PRETRAIN_ARGS: got --seed, which the sweep sets"),
        (["--pretrain-args=--output_dir=x"], "PRETRAIN_ARGS: got --output_dir=x"),
        (["--pretrain-args", "'open"], 'PRETRAIN_ARGS: got "\'open" .No closing quotation.; allowed: words'),
        (["--pretrain-args", "--max_stepz 3"], "pretrain.py refuses .* did you mean --max_steps"),
        (["--configs", "OTHER/broken.json", "--pretrain-args", "--bf16 true"], "pretrain.py refuses .*bitz"),
    ],
)
def test_mistakes_are_said_before_anything_happens(
    wrong: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "w8a8.json").write_text("{}")
    (other / "broken.json").write_text('{"ds_quant": {"linear": {"weight": {"bitz": 8}}}}')
    wrong = [word.replace("OTHER", str(other)) for word in wrong]
    assert sweep.main(["--dry-run", "--sweep-dir", str(tmp_path / "sweep"), *wrong]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert re.match(f"error: .*{said}", printed.err, re.DOTALL), printed.err
    assert not (tmp_path / "sweep").exists()


def test_without_a_job_nothing_is_submitted(capsys: pytest.CaptureFixture[str]) -> None:
    assert sweep.main([]) == 2
    assert "allowed: sbatch slurm/sweep.sh, or bash slurm/sweep.sh --dry-run" in capsys.readouterr().err


def test_configs_by_name_pattern_and_path(tmp_path: Path) -> None:
    own = tmp_path / "own.json"
    own.write_text("{}")
    shipped = ROOT / "ds_configs"
    found = matrix.configs(f"w8a8.json {own} adam*", shipped)
    assert [config.name for config in found] == ["w8a8", "own", "adam4", "adam8"]
    assert (found[1].path, found[2].path) == (str(own), str(shipped / "adam4.json"))
    assert [config.name for config in matrix.configs("", shipped)] == SHIPPED
    (paper,) = matrix.configs("paper_w8a8", shipped)
    assert paper.path == str(shipped / "paper" / "paper_w8a8.json")
    assert matrix.seeds("3 1-2,7, 1") == [3, 1, 2, 7]


def test_a_plan_has_the_arguments_of_each_task(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a_done_run(tmp_path / "sweep", "w8a8", 1)
    configs = matrix.configs("w8a8 baseline", Path("ds_configs"))
    planned = plan.entries(configs, [1, 2], tmp_path / "sweep", {})
    path = tmp_path / "plans" / "plan.json"
    assert plan.write(path, planned, ["--bf16", "a b"]) == 3
    assert [key for key, _ in plan.tasks(path)] == [("baseline", 1), ("w8a8", 2), ("baseline", 2)]
    capsys.readouterr()
    assert sweep.main(["--task", str(path), "1"]) == 0
    assert capsys.readouterr().out.split("\0") == [
        *("--deepspeed", "ds_configs/w8a8.json", "--seed", "2", "--output_dir", f"{tmp_path}/sweep/w8a8/seed-2"),
        *("--resume_from_checkpoint", "auto", "--bf16", "a b", ""),
    ]
    for number in ("3", "x"):
        assert sweep.main(["--task", str(path), number]) == 2
        assert "allowed: 0 to 2" in capsys.readouterr().err
    path.write_text(json.dumps({"tasks": 3}))
    with pytest.raises(CommandError, match=r"plan: got .*; allowed: a file that sweep.py wrote"):
        plan.tasks(path)


def test_own_options_become_those_of_the_runs() -> None:
    # What Slurm 22.05 shows for: sbatch --nodes=2 --time=5 --mem=100 --exclusive ...
    shown = (
        "JobId=7 JobName=x Account=(null) QOS=(null) Requeue=1 TimeLimit=1-00:05:00 TimeMin=N/A Partition=low "
        "ReqNodeList=(null) ExcNodeList=n4 NumNodes=2 NumCPUs=4 NumTasks=2 CPUs/Task=1 ReqB:S:C:T=0:0:*:* "
        "NtasksPerN:B:S:C=0:0:*:* CoreSpec=* MinMemoryNode=100M MinTmpDiskNode=0 Features=(null) OverSubscribe=OK "
        "Licenses=(null) Comment=a b"
    )
    plain = ["--partition=low", "--time=1-00:05:00", "--nodes=2", "--exclude=n4", "--mem=100M"]
    assert slurm.options_of(shown) == plain
    gpus = slurm.options_of(f"{shown} TresPerNode=gres:gpu:a100:8")
    assert gpus == [*plain, "--gres=gpu:a100:8"]
    assert slurm.options_of(f"{shown} TresPerNode=gres/gpu:8,gres/nic:1") == [*plain, "--gres=gpu:8,nic:1"]
    assert slurm.options_of(f"{shown} TresPerJob=gres:gpu:16") == [*plain, "--gpus=16"]
    changed = shown.replace("C=0:0", "C=4:0").replace("CPUs/Task=1", "CPUs/Task=6").replace("Requeue=1", "Requeue=0")
    changed = changed.replace("OverSubscribe=OK", "OverSubscribe=NO").replace(
        "TimeLimit=1-00:05:00", "TimeLimit=UNLIMITED"
    )
    assert slurm.options_of(changed) == [
        *("--partition=low", "--nodes=2", "--exclude=n4", "--mem=100M", "--ntasks-per-node=4", "--cpus-per-task=6"),
        *("--exclusive", "--no-requeue"),
    ]
    assert slurm.options_of(shown.replace("NumTasks=2", "NumTasks=8"))[-1] == "--ntasks=8"
    with pytest.raises(CommandError, match="got --gpus-per-task; allowed: --gpus-per-node"):
        slurm.options_of(f"{shown} TresPerTask=gres:gpu:1")


def test_a_job_hands_on_nothing_that_slurm_told_it() -> None:
    environment = {"SLURM_JOB_ID": "7", "SLURM_GPUS_PER_NODE": "8", "SLURM_CONF": "x", "SBATCH_SIGNAL": "B:USR1@9"}
    assert slurm.outside({**environment, "PATH": "p"}) == {"SLURM_CONF": "x", "SBATCH_SIGNAL": "B:USR1@9", "PATH": "p"}


def test_tokens_with_a_batch_cut_for_many_ranks() -> None:
    flags = ["--deepspeed", "ds_configs/w8a8.json", "--max_steps", "10"]
    assert hours.tokens(flags, 4) == hours.tokens(flags, 1) == 10 * 32 * 128
    with pytest.raises(CommandError, match=r"pretrain.py refuses .*32"):
        hours.tokens(flags, 5)


def test_the_runs_of_an_array_are_given_an_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, line in {"scontrol": ":", "sbatch": f'env > {tmp_path}/given; echo "7;cluster"'}.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{line}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("OMP_NUM_THREADS", "8")
    monkeypatch.setenv("SLURM_JOB_ID", "3")
    own = {"OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1"}
    assert slurm.submit_array(tmp_path / "plan", 2, 1, [], tmp_path / "logs", environment=own) == "7"
    given = (tmp_path / "given").read_text().splitlines()
    assert {f"{name}={value}" for name, value in own.items()} <= set(given)
    assert "SLURM_JOB_ID=3" not in given
    assert "TORCHDYNAMO_DISABLE" not in os.environ, "this process keeps its own"
