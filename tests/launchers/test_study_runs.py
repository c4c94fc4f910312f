"""The study: runs that go on where they were killed, plans, and mistakes."""

from __future__ import annotations

import argparse
import csv
import dataclasses
import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest
from helpers.study_results import ROWS, a_result
from studying import asked, commands, plan, protocol, results
from studying.plan import Key, Settings
from studying.training import Training

from ds_quant.base import trainer_checkpoints
from ds_quant.cli.shared.errors import CommandError


# Of two ranks, the launcher says that one was killed.
@pytest.mark.distributed
@pytest.mark.parametrize(("row", "code"), [("w8a8", -9), ("wire4", 1)])
def test_a_killed_run_goes_on_and_a_finished_one_is_left(
    row: str, code: int, token_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = protocol.Size(32, 64, 2, 2, context_length=32, batch=4, micro_batch=4)
    monkeypatch.setitem(protocol.SIZES, "tiny", tiny)
    key = Key("tiny", "gpt2", 0.2, 1e-3, row, 7)
    where = {"processor": "p", "torch": "t", "deepspeed": "d", "commit": "c", "date": "2026-11-29"}
    said: list[str] = []
    training = Training(Settings(tmp_path / "runs", token_shards), ROWS, tmp_path / "runs.csv", where, say=said.append)
    out = plan.folder(key, ROWS[row], training.settings)

    def kill() -> None:
        while trainer_checkpoints.newest_whole(out) is None:
            time.sleep(0.05)
        os.kill(json.loads((out / "status.json").read_text())["pid"], signal.SIGKILL)

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    assert training.run([key]) == [key]
    killer.join(timeout=1)
    assert not (out / "summary.json").exists(), "killed in the middle"
    assert said[-1].startswith(f"failed ({code})")
    assert not training.csv.exists()

    assert training.missing([key]) == [key]
    assert training.run([key]) == [], training._log(key).read_text()
    summary = json.loads((out / "summary.json").read_text())
    assert summary["resumed_from_step"], "from its checkpoint"
    assert summary["world_size"] == ROWS[row].ranks
    (result,) = results.read(training.csv).values()
    assert result.loss == summary["final_eval_loss"]
    assert result.tokens == summary["tokens"], "of a step that the ranks share"
    assert result.steps == tiny.steps("gpt2", 320, 0.2) == summary["steps"]
    assert (result.state, result.parameters) == ("done", tiny.parameters("gpt2", 320))
    assert result.processor == summary["processor"] != where["processor"], "the run's own machine"

    # A finished run is never run again: neither what the CSV has, nor what only its folder has.
    told = len(said)
    assert training.run([key]) == []
    training.csv.unlink()
    assert training.run([key]) == []
    assert said[told:] == []
    assert repr(results.read(training.csv)[key]) == repr(result), "nan included"
    # Other settings of the row are another run.
    changed = dataclasses.replace(ROWS[row], config=ROWS["w8_channel"].config)
    assert dataclasses.replace(training, rows={row: changed}).missing([key]) == [key]


def test_ranks_of_all_runs_are_no_more_than_processes_at_once(tmp_path: Path) -> None:
    training = Training(Settings(tmp_path, tmp_path), ROWS, tmp_path / "runs.csv", {}, at_once=3)
    one, two = (Key("0.7m", "llama", 1.0, 2e-3, row, 0) for row in ("w8a8", "wire4"))
    other = dataclasses.replace(one, seed=1)
    assert training._fits(two, [one])
    assert training._fits(one, [two])
    assert not training._fits(two, [one, other])
    assert not training._fits(two, [two])
    assert dataclasses.replace(training, at_once=1)._fits(two, []), "alone"


def test_mistakes_are_said(tmp_path: Path, token_shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = ["plan", "--runs", str(tmp_path), "--corpus", str(token_shards), "--csv", str(tmp_path / "runs.csv")]
    for wrong, message in (
        (["--rows", "w5"], "--rows: got 'w5'; allowed: baseline"),
        (["--rows", "w8a8", "g4_token_qkv"], "--rows: got 'g4_token_qkv' for llama; allowed: gpt2; add --families"),
        (["--sizes", "1m"], "--sizes: got '1m'"),
        (["--families", "bert"], "--families: got 'bert'"),
        (["--ratio", "-1"], "--ratio: got '-1'"),
        (["--at-once", "0"], "--at-once: got 0"),
        (["--seeds", "x"], "SEEDS: got 'x'"),
    ):
        for command in ("plan", "run"):
            with pytest.raises(CommandError, match=message):
                commands.run([command, *flags[1:], *wrong], description="")
    with pytest.raises(CommandError, match=r"study\.py submit: got no Slurm job around it"):
        commands.run(["submit", *flags[1:]], description="")
    # A task of a job array has one rank.
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    with pytest.raises(CommandError, match="--rows: got 'wire4', a run of 2 ranks; allowed: runs of at most 1"):
        commands.run(["submit", *flags[1:], "--rows", "wire4"], description="")


def test_a_plan_names_what_is_missing(tmp_path: Path, token_shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "runs.csv"
    flags = ["plan", "--runs", str(tmp_path), "--corpus", str(token_shards), "--csv", str(path)]
    assert commands.run([*flags, "--rows", "w8a8", "--seeds", "0-2"], description="") == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("to tune") for line in lines) == len(protocol.RATES)
    assert sum(line.startswith("to train") for line in lines) == 6
    text = Settings(tmp_path, token_shards).text
    found = [a_result("baseline", seed, 5.0, text=text) for seed in range(2)]
    results.write(path, [*found, *(a_result("baseline", 0, 6.0, text=text, rate=rate) for rate in (0.001, 0.004))])
    assert commands.run([*flags, "--rows", "w8a8", "--seeds", "0-2"], description="") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if "baseline" in line] == [
        'to train ["0.7m", "llama", "D/N 1", "rate 0.002", "baseline", "seed 2"]'
    ]
    with path.open() as file:
        assert next(csv.reader(file)) == list(results.COLUMNS)


def test_rows_of_one_family_are_asked_of_it_alone() -> None:
    options = argparse.Namespace(rows=None, seeds="0", scales=[1.0], ratio="1", device="cpu", most_ranks=None)
    for family in protocol.FAMILIES:
        names = {key.row for key in asked.keys(options, "0.7m", family, 0.002)}
        assert ("g4_token_qkv" in names) == (family == "gpt2")
        assert {"w8a8", "wire4"} <= names
        options.most_ranks = 1
        assert "wire4" not in {key.row for key in asked.keys(options, "0.7m", family, 0.002)}
        options.most_ranks = None
