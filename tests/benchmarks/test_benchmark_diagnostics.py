"""`benchmark.py diagnostics` in a process of its own, with a step of a few milliseconds."""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import benchmark
import pytest
from conftest import ROOT
from helpers.launching import launch

SCRIPT = ROOT / "launchers" / "benchmark.py"
SMALL = ["--batch", "2", "--sequence", "16", "--vocabulary", "96", "--rounds", "2", "--warm-up", "1", "--threads", "1"]


@pytest.mark.timeout(200)
def test_every_way_is_measured_and_the_hundredth_look_computed(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    command = [sys.executable, SCRIPT, "diagnostics", *SMALL, "--device", "cpu", "--output", path]
    _, output = launch(command, timeout=180, env={"PYTHONPATH": str(ROOT)}, cwd=tmp_path)
    rows = {row["contender"]: row for row in csv.DictReader(path.read_text().splitlines())}
    assert list(rows) == [
        "stock DeepSpeed",
        "ds_quant without a section",
        "W8A8",
        "W8A8, once more",
        "W8A8, between looks",
        "W8A8, a step with a look",
        "W8A8, every 100",
    ]
    assert float(rows["W8A8"]["ratio_p50"]) == 1.0
    # A look quantizes weights and inputs, multiplies and counts once more for each layer: it cannot be free.
    names = ("W8A8, a step with a look", "W8A8, between looks", "W8A8, every 100")
    look, between, mean = (float(rows[name]["seconds_p50"]) for name in names)
    assert look > between
    assert min(look, between) <= mean <= max(look, between)
    assert "written: " in output
    assert not (tmp_path / "diagnostics").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--batch", "0"], "--batch: got 0; allowed: 1 or more"),
        (["--sequence", "1"], "--sequence: got 1; allowed: 2 or more"),
        (["--only", "nothing"], "--only: got 'nothing'; allowed: parts of stock DeepSpeed"),
    ],
)
def test_bad_arguments_are_refused(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert benchmark.main(["diagnostics", *arguments]) == 2
    assert said in capsys.readouterr().err
