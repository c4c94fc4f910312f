"""The study: tables that are not of runs, measured again and held against their CSVs."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
from helpers.study_models import a_model, in_place_of_files, some_text
from helpers.study_results import ROWS, a_peak, a_result
from studying import adapting, commands, isolation, memory, plan, results
from studying.plan import Settings

ROWS_ADAPTED = ("w4_channel", "a4_token")
CASES = [case.name for case in memory.CASES]


class Study:
    """A study of three seeds whose runs have been repeated, so that only the other tables are left to do."""

    def __init__(self, folder: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        in_place_of_files(monkeypatch, a_model(), some_text(2), some_text(2))
        self.csv, self.again = folder / "runs.csv", folder / plan.AGAIN / "runs.csv"
        self.flags = ["repeat", "--runs", str(folder), "--corpus", str(corpus), "--csv", str(self.csv)]
        tuning = [a_result("baseline", 0, 9.0, rate=rate) for rate in (0.001, 0.004)]
        seeds = [a_result(row, seed, 5.0) for row in ("baseline", *ROWS_ADAPTED) for seed in range(3)]
        for path in (self.csv, self.again):
            results.write(path, [*tuning, *seeds])
        keys = [one.key for one in seeds]
        settings = Settings(self.again.parent, corpus)
        for key in keys[:3]:
            (plan.folder(key, ROWS["baseline"], settings) / "model").mkdir(parents=True)
        adapting.measure(keys, ROWS, settings, self.csv)
        isolation.measure(keys, ROWS, settings, self.csv, arms=("trained", "clipped"))
        self.peaks = [a_peak(name, 1, peak=100 + number) for number, name in enumerate(CASES)]
        results.write_lines(memory.path(self.csv), memory.COLUMNS, map(vars, self.peaks))
        self.measured_jobs: list[str] = []
        monkeypatch.setattr(memory, "measure", self.measure_memory)

    def measure_memory(self, size: str, family: str, rows: Any, csv: Path, cases: Any) -> None:
        self.measured_jobs += [case.name for case in cases]
        own = [one for one in self.peaks if one.case in self.measured_jobs]
        own = [*(dataclasses.replace(one, size="2m", peak=1) for one in own), *own]
        results.write_lines(memory.path(csv), memory.COLUMNS, map(vars, own))

    def repeat(self, capsys: pytest.CaptureFixture[str], *flags: str) -> tuple[int, list[str]]:
        """The exit code, and the lines that are not of runs."""
        capsys.readouterr()
        code = commands.run([*self.flags, *flags], description="")
        words = ("same checkpoint", "memory of", '"baseline", "seed 0"], ')
        return code, [
            line for line in capsys.readouterr().out.splitlines() if " again " in line and any(w in line for w in words)
        ]

    def change_adapted(self, **changes: Any) -> None:
        """Of all lines that are in its CSV."""
        path = adapting.path(self.csv)
        adapting.write(path, [dataclasses.replace(one, **changes) for one in adapting.read(path).values()])


@pytest.fixture
def study(tmp_path: Path, token_shards: Path, monkeypatch: pytest.MonkeyPatch) -> Study:
    return Study(tmp_path, token_shards, monkeypatch)


def test_a_line_of_every_table_is_measured_again(study: Study, capsys: pytest.CaptureFixture[str]) -> None:
    code, lines = study.repeat(capsys)
    assert code == 0, lines
    assert all(line.startswith("same: ") for line in lines)
    for part, count in (("same checkpoint", 3), ("memory of llama, 5m", 9), ('"seed 0"], ', 11)):
        assert sum(part in line for line in lines) == count, part
    assert len(study.measured_jobs) == 1
    (arm,) = {arm for _, arm in isolation.read(isolation.path(study.again))}
    assert arm in ("trained", "clipped"), "what the CSV has"
    # Rows that were named are alone, and so is what was trained on with them.
    code, lines = study.repeat(capsys, "--rows", *ROWS_ADAPTED, "--seeds", "1-2")
    assert code == 0
    assert len(lines) == 2 * 2 * 3
    assert all("same checkpoint" in line for line in lines)


def test_another_digit_is_told(study: Study, capsys: pytest.CaptureFixture[str]) -> None:
    known = next(iter(adapting.read(adapting.path(study.csv)).values()))
    study.change_adapted(adapted=math.nextafter(known.adapted, 9))
    code, lines = study.repeat(capsys, "--rows", known.key.row)
    assert code == 1
    assert [line.partition(":")[0] for line in lines] == ["same", "same", "OTHER"]
    # Measured elsewhere: no more than what another seed changes, which here is nothing at all.
    study.change_adapted(processor="another", adapted=math.nextafter(known.adapted, 9))
    code, lines = study.repeat(capsys, "--rows", known.key.row)
    assert code == 1
    assert lines[-1].startswith("OUTSIDE: ")
    study.change_adapted(adapted=known.adapted)
    assert study.repeat(capsys, "--rows", known.key.row)[0] == 0


def test_models_of_another_machine_have_limits(study: Study, capsys: pytest.CaptureFixture[str]) -> None:
    runs = results.read(study.csv)
    results.write(study.csv, [dataclasses.replace(one, processor="another") for one in runs.values()])
    lines = adapting.read(adapting.path(study.csv)).values()
    moved = [dataclasses.replace(one, after=one.after + 0.1 * one.key.seed) for one in lines]
    moved = [dataclasses.replace(one, after=one.after + 0.01 * (one.key.seed == 0)) for one in moved]
    adapting.write(adapting.path(study.csv), moved)
    code, told = study.repeat(capsys, "--rows", "a4_token")
    assert code == 0
    assert [line.partition(":")[0] for line in told] == ["same", "within limits", "same"]


def test_figures_of_other_settings_are_left(study: Study, capsys: pytest.CaptureFixture[str]) -> None:
    study.change_adapted(fingerprint="of other settings")
    memory.path(study.csv).unlink()
    path = isolation.path(study.csv)
    isolation.write(path, [dataclasses.replace(one, fingerprint="old") for one in isolation.read(path).values()])
    assert study.repeat(capsys) == (0, [])


def test_a_job_that_takes_another_byte(study: Study, capsys: pytest.CaptureFixture[str]) -> None:
    (name,) = {line.split(":")[1] for line in study.repeat(capsys)[1] if "memory of" in line}
    study.peaks = [dataclasses.replace(one, peak=one.peak + 1) for one in study.peaks]
    code, lines = study.repeat(capsys)
    assert code == 1
    assert next(line for line in lines if not line.startswith("same: ")).startswith(f"OTHER:{name}: peak ")
    # Elsewhere no limit is known.
    study.peaks = [dataclasses.replace(one, torch="3.0") for one in study.peaks]
    code, lines = study.repeat(capsys)
    assert code == 0
    assert [line.partition(":")[0] for line in lines if not line.startswith("same: ")] == ["no limit known"]
