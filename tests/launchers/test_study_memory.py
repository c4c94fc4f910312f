"""What quantized gradients save in memory: jobs, and the table of their peaks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers.study_results import ROWS, a_peak
from studying import memory, protocol, results
from studying.memory import CASES


@pytest.mark.parametrize("family", protocol.FAMILIES)
def test_jobs_differ_in_nothing_but_what_is_quantized(family: str) -> None:
    jobs = {case.name: memory.job(case, "2m", family, ROWS) for case in CASES}
    plain = []
    for case in CASES:
        job = jobs[case.name]
        config = json.loads(json.dumps(job.config))
        assert ("ds_quant" in config) == bool(case.of), case.name
        assert job.world_size == case.ranks
        assert job.model["hidden_size" if family == "llama" else "n_embd"] == 192
        assert job.model["tie_word_embeddings"] is True
        bucket = config["zero_optimization"]["reduce_bucket_size"]
        assert bucket == protocol.SIZES["2m"].parameters(family, protocol.VOCABULARY)
        config.pop("ds_quant", None)
        config["zero_optimization"].pop("ds_quant_required", None)
        assert config.pop("train_batch_size") == 32 * case.ranks
        plain.append((config, job.model, job.rows, job.length))
    assert all(one == plain[0] for one in plain)
    sections = {case.name: jobs[case.name].config.get("ds_quant") for case in CASES}
    assert sections["g4_token"]["linear"]["gradient"]["bits"] == 4
    assert "gradient" not in sections["w8a8_int8"]["linear"]
    assert sections["w8a8g8_int8"]["linear"]["gradient"]["bits"] == 8
    assert sections["sent_4"]["communication"]["gradient"]["bits"] == 4


def test_a_table_of_differences(tmp_path: Path) -> None:
    found = [a_peak("baseline", 1), a_peak("g8_token", 1, gradients=9_000_000, peak=12_340_000), a_peak("sent_8", 2)]
    results.write_lines(tmp_path / "memory.csv", memory.COLUMNS, map(vars, found))
    assert memory.read(tmp_path / "memory.csv") == found
    lines = [line for line in memory.table(found) if line.startswith("| ")]
    cells = {c[0]: c[1:] for line in lines for c in [[cell.strip() for cell in line.split("|")[1:-1]]]}
    assert cells["baseline"][3:5] == ["10.00", "10.00"]
    assert cells["g8_token"][1:5] == ["baseline", "1", "12.34 (+2.34)", "9.00 (-1.00)"]
    assert cells["sent_8"][3] == "10.00", "what it is held against was not measured"
    assert memory.table([]) == []


@pytest.mark.slow
@pytest.mark.distributed
def test_peaks_are_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(protocol.SIZES, "tiny", protocol.Size(32, 64, 2, 2, context_length=32, batch=4, micro_batch=4))
    cases = [case for case in CASES if case.name in ("baseline", "g4_token")]
    for _ in range(2):
        memory.measure("tiny", "llama", ROWS, tmp_path / "runs.csv", cases)
    one, other = memory.read(tmp_path / "memory.csv")
    # bf16: two bytes of each, and the paper's quantizers keep no gradient of a weight.
    assert other.gradients == one.gradients >= 2 * one.parameters
    assert one.parameters == protocol.SIZES["tiny"].parameters("llama", protocol.VOCABULARY)
    assert one.peak > one.gradients
